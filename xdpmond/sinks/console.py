"""Records as lines for a person who watches the daemon in the foreground.

Names and reasons come from outside, and a terminal obeys escape sequences in them: everything unprintable is spelled out. Lines go to the
descriptor directly, because a thread that a stopped terminal keeps inside Python's own buffer would break the end of the program.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Mapping

from ..messages import Message, Priority, Record, visible
from .queued import PATIENCE, Budget, QueuedSink

_RED, _YELLOW, _DIM = "31", "33", "2"
_INDENT = " " * 9
"""As wide as the time of day and the space behind it."""
_MOST_EVENTS = 500
"""Samples of traffic in a second: more than anybody reads, at a few hundredths of a core."""


class ConsoleSink(QueuedSink):
    """A line for each record; with `verbose` its kind and its fields below it."""

    name = "console"

    def __init__(
        self,
        verbose: bool = False,
        *,
        fd: int | None = None,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        capacity: int = 2048,
    ) -> None:
        super().__init__(capacity)
        self._verbose = verbose
        self._fd = _standard_output() if fd is None else fd
        self._clock = clock
        self._budget = Budget(_MOST_EVENTS, 1.0, time.monotonic)
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._coloured = _is_terminal(self._fd) and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
        self._gone = self._fd < 0
        self._told = 0

    def _admit(self, events: int) -> int:
        taken = self._budget.take(events)
        self._lost += events - taken
        return taken

    def _write(self, record: Record) -> bool:
        if self._gone:
            return False
        lost = self._lost
        if lost > self._told:
            missed = f"-- lost here: {lost - self._told:,} (they came faster than they could be shown) --"
            if not self._print(self._paint(missed, _RED) + "\n"):
                return False
            self._told = lost
        return self._print(self.render(record))

    def render(self, record: Record) -> str:
        """The record as text that ends with a line break."""
        first, *others = record.text.split("\n")
        moment = time.strftime("%H:%M:%S", time.localtime(record.timestamp or self._clock()))
        lines = [f"{self._paint(moment, _DIM)} {self._headline(record, visible(first, keep=chr(9)))}"]
        lines += [_INDENT + visible(line, keep="\t") for line in others]
        if self._verbose:
            known = [record.message.name, *(f"{visible(key)}={_shown(value)}" for key, value in record.fields.items() if value is not None)]
            lines.append(_INDENT + self._paint(" ".join(known), _DIM))
        return "\n".join(lines) + "\n"

    def _headline(self, record: Record, text: str) -> str:
        if record.message.of_packet:
            action, space, rest = text.partition(" ")
            return self._paint(f"{action:<4}", _RED if record.message is Message.PACKET_DROPPED else _YELLOW) + space + rest
        if record.severity <= Priority.ERROR:
            return self._paint("error: ", _RED) + text
        return self._paint("warning: ", _YELLOW) + text if record.severity == Priority.WARNING else text

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._coloured else text

    def _print(self, text: str) -> bool:
        """Write all of it, in pieces that a pipe takes whole. Whoever read it may go away, and then nothing more is tried."""
        rest = text.encode(self._encoding, "backslashreplace")
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        try:
            while rest:
                if self._abandoned:
                    return False
                if poll.poll(PATIENCE * 1000):
                    with contextlib.suppress(BlockingIOError):
                        rest = rest[os.write(self._fd, rest[: select.PIPE_BUF]) :]
        except OSError:
            self._gone = True
            return False
        return True


def _standard_output() -> int:
    """Its descriptor; -1 if the program was started without one, for the number 1 then belongs to whatever was opened first."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return -1


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(_shown, value))
    text = visible(str(value))
    return repr(text) if " " in text or not text else text
