"""What a command gets: its arguments, the daemon, and where and how to write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .fields import Document
from .render import SAMPLE_ROWS, Cell, Column, Style, fitting, safe, write_table

if TYPE_CHECKING:
    from argparse import Namespace


class Daemon(Protocol):
    """The calls that the commands make; `client.Daemon` makes them over D-Bus. Every failure is an `XdpmondError`."""

    def describe(self) -> Document: ...
    def change(self, verdict: str, prefixes: Sequence[str], options: Mapping[str, object]) -> Document: ...
    def change_from_file(self, verdict: str, descriptor: int, options: Mapping[str, object]) -> Document: ...
    def remove(self, prefixes: Sequence[str], options: Mapping[str, object]) -> Document: ...
    def explain(self, address: str) -> Document: ...
    def set_mode(self, mode: str, options: Mapping[str, object]) -> Document: ...
    def confirm(self) -> Document: ...
    def reload(self, options: Mapping[str, object]) -> Document: ...
    def entries(self) -> Iterator[bytes]: ...
    def top(self, options: Mapping[str, object]) -> Iterator[bytes]: ...
    def ports(self, options: Mapping[str, object]) -> Iterator[bytes]: ...
    def windows(self, options: Mapping[str, object]) -> Iterator[bytes]: ...
    def flows(self, options: Mapping[str, object]) -> Iterator[bytes]: ...
    def events(self, options: Mapping[str, object]) -> Iterator[bytes]: ...
    def follow_events(self) -> Iterator[bytes]: ...


class Context:
    """The surroundings of one command."""

    def __init__(
        self, arguments: Namespace, out: TextIO, *, daemon: Callable[[], Daemon], environ: Mapping[str, str], clock: Callable[[], float],
        terminal: bool, colour: bool, width: int,
    ) -> None:  # fmt: skip
        self.arguments = arguments
        self.out = out
        self.environ = environ
        self.clock = clock
        self.terminal = terminal
        self.style = Style(colour)
        self.width = width
        self._make_daemon = daemon
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        if self._daemon is None:
            self._daemon = self._make_daemon()
        return self._daemon

    def connect(self) -> Daemon:
        """A connection of one's own, for a thread, or after the daemon had gone."""
        return self._make_daemon()

    @property
    def live(self) -> bool:
        """Can what is written be rewritten in place?"""
        return self.terminal and self.environ.get("TERM", "dumb") not in ("", "dumb")

    @property
    def unicode(self) -> bool:
        """Can more than ASCII be written?"""
        encoding = getattr(self.out, "encoding", None)
        return encoding is None or encoding.lower().replace("-", "").startswith("utf")

    @property
    def json(self) -> bool:
        return bool(self.arguments.json != "off")

    @property
    def legend(self) -> bool:
        return not self.arguments.no_legend

    def line(self, text: str = "") -> None:
        """Write one line. The text must be safe to print."""
        self.out.write(text + "\n")

    def notes(self, notes: Iterable[str]) -> None:
        """Write what the daemon wants to be known besides the result."""
        for note in notes:
            self.line(self.style("note: ", "yellow") + safe(note))

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> int:
        """Write a table; on a terminal without what it has no room for."""
        if self.terminal:
            stream = iter(rows)
            sample = list(itertools.islice(stream, SAMPLE_ROWS))
            shown = fitting(columns, sample, self.width)
            columns = [columns[at] for at in shown]
            rows = ([row[at] for at in shown] for row in itertools.chain(sample, stream))
        return write_table(
            self.out, self.style, columns, rows, legend=self.legend, terminal=self.terminal and self.style.enabled, width=self.width
        )

    def document(self, document: Any) -> None:
        """Write a document as JSON, in the form that was asked for."""
        self.line(encode(document, self.arguments.json))

    def documents(self, lines: Iterable[bytes]) -> None:
        """Write JSON Lines as one array, without holding all of it in memory."""
        opening = "["
        for text in self._encoded(lines):
            self.out.write(opening + "\n" + text)
            opening = ","
        self.line("[]" if opening == "[" else "\n]")

    def stream(self, lines: Iterable[bytes]) -> None:
        """Write JSON Lines as they come, each at once."""
        for text in self._encoded(lines):
            self.line(text)
            self.out.flush()

    def _encoded(self, lines: Iterable[bytes]) -> Iterator[str]:
        pretty = self.arguments.json == "pretty"
        for line in lines:
            # The daemon writes compact ASCII; anything else is encoded again, lest a terminal obey what stands in a string.
            if pretty or not line.isascii() or b"\x7f" in line:
                yield encode(json.loads(line), self.arguments.json)
            elif text := line.decode("ascii").strip():
                yield text


def encode(document: Any, form: str) -> str:
    if form == "pretty":
        return json.dumps(document, indent=2).replace("\x7f", "\\u007f")
    return json.dumps(document, separators=(",", ":")).replace("\x7f", "\\u007f")
