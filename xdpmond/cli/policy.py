"""The commands on the policy: allow, deny, remove, list, explain."""

from __future__ import annotations

import os
import stat
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader

from ..errors import UsageError, XdpmondError
from . import fields
from .context import Context
from .fields import Document
from .protocols import target
from .render import ACTION_COLOURS, VERDICT_COLOURS, Cell, Column, ago, columns, iso, plural, safe, short_bytes, span

LONGEST_CALL = 8192
"""Characters of prefixes in one call; more travel as a descriptor, since the daemon takes no large messages."""

ENTRY_COLUMNS = [
    Column("PREFIX", False), Column("VERDICT", False), Column("ORIGIN", False, 3), Column("EXPIRES", False), Column("PACKETS", True, 1),
    Column("BYTES", True, 2), Column("REASON", False),
]  # fmt: skip
"""Where an entry is from, its file and line tell, too."""

DONE = {"allow": "allowed", "deny": "denied"}


def allow(context: Context) -> None:
    _change(context, "allow")


def deny(context: Context) -> None:
    _change(context, "deny")


def _change(context: Context, verdict: str) -> None:
    given = context.arguments
    if bool(given.prefixes) == bool(given.from_file):
        raise UsageError(
            f"{verdict} takes prefixes or --from-file, not both" if given.prefixes else f"{verdict} of what?",
            hint=f"write for example: xdpmonctl {verdict} 192.0.2.0/24",
        )
    options = _options(context)
    if given.duration is not None:
        options["seconds"] = duration(given.duration)
    if given.reason:
        options["reason"] = given.reason
    if given.from_file:
        with _opened(given.from_file) as descriptor:
            document = context.daemon.change_from_file(verdict, descriptor, options)
    else:
        prefixes = checked(given.prefixes)
        if sum(map(len, prefixes)) > LONGEST_CALL:
            with _in_memory(["\n".join(prefixes).encode()]) as descriptor:
                document = context.daemon.change_from_file(verdict, descriptor, options)
        else:
            document = context.daemon.change(verdict, prefixes, options)
    if context.json:
        context.document(document)
        return
    for row in fields.rows(document, "applied"):
        context.line(_applied(context, row))
    if not fields.rows(document, "applied"):
        context.line(f"{plural(fields.count(document, 'applied'), 'prefix', 'prefixes')} {DONE[verdict]}")
    context.notes(fields.texts(document, "notes"))


def _applied(context: Context, row: Document) -> str:
    verdict = fields.text(row, "verdict")
    text = f"{safe(fields.text(row, 'prefix'))} {context.style(DONE.get(verdict, safe(verdict)), VERDICT_COLOURS.get(verdict, ''))}"
    if fields.number(row, "expires"):
        text += f" {until(fields.number(row, 'expires'), context.clock())}"
    if reason := fields.text(row, "reason"):
        text += f": {safe(reason)}"
    return text + (" (in place of an older entry)" if fields.flag(row, "replaced") else "")


def remove(context: Context) -> None:
    prefixes = checked(context.arguments.prefixes)
    document = context.daemon.remove(prefixes, _options(context))
    if context.json:
        context.document(document)
        return
    for prefix in prefixes:
        context.line(f"{prefix} removed")
    context.notes(fields.texts(document, "notes"))


def list_entries(context: Context) -> None:
    lines = context.daemon.entries()
    if context.json:
        context.documents(lines)
        return
    now = context.clock()
    total = context.table(ENTRY_COLUMNS, _entries(context, fields.parse_lines(lines), now))
    if context.legend:
        context.line(f"\n{plural(total, 'entry', 'entries')}" if total else "\nno entries: every source meets the default")


def _entries(context: Context, rows: Iterable[Document], now: float) -> Iterator[list[Cell]]:
    """A long list is mostly of entries that came together, and differ in nothing but their prefix."""
    before: Document = {}
    cells: list[Cell] = []
    for row in rows:
        prefix, row["prefix"] = safe(fields.text(row, "prefix")), ""
        if row != before or not cells:
            before, cells = row, _entry(context, row, now)
        yield [prefix, *cells[1:]]


def _entry(context: Context, row: Document, now: float) -> list[Cell]:
    verdict, expires, effective = fields.text(row, "verdict"), fields.number(row, "expires"), fields.value(row, "effective") is not False
    why = [safe(text) for text in (fields.text(row, "reason"), fields.text(row, "source")) if text]
    if not effective:
        why.append("(hidden by a stronger entry)")
    return [
        safe(fields.text(row, "prefix")),
        (safe(verdict), VERDICT_COLOURS.get(verdict, "") if effective else "dim"),
        safe(fields.text(row, "origin")),
        f"in {span(expires - now)}" if expires and context.terminal else _moment(expires) if expires else "",
        at_least(context, row, _exact(context, row, "packets")),
        at_least(context, row, _size(context, row)),
        ", ".join(why),
    ]


def at_least(context: Context, row: Document, figure: str) -> str:
    """What a partial row says is a lower bound: some packets are counted nowhere but in the totals."""
    if not fields.flag(row, "partial"):
        return figure
    return f"≥ {figure}" if context.terminal else f"≥{figure}"


def _exact(context: Context, row: Document, key: str) -> str:
    """A counter: with separators for people, as plain digits for programs."""
    return f"{fields.count(row, key):,}" if context.terminal else str(fields.count(row, key))


def _size(context: Context, row: Document) -> str:
    return short_bytes(fields.number(row, "bytes")) if context.terminal else str(fields.count(row, "bytes"))


def explain(context: Context) -> None:
    from ..model import parse_address

    parse_address(context.arguments.address)
    document = context.daemon.explain(context.arguments.address)
    if context.json:
        context.document(document)
        return
    verdict, action = fields.text(document, "verdict"), fields.text(document, "action")
    decided = context.style(safe(verdict), VERDICT_COLOURS.get(verdict, ""), "bold")
    done = context.style(safe(action), ACTION_COLOURS.get(action, ""))
    context.line(f"{safe(fields.text(document, 'address'))}: verdict {decided}, action {done}")
    for line in fields.text(document, "text").splitlines():
        for part in textwrap.wrap(safe(line), max(context.width - 2, 20)) if context.terminal else [safe(line)]:
            context.line(f"  {part}")
    if known := _names(document):
        context.line(f"  {known}")
    now = context.clock()
    covering = fields.rows(document, "covering")
    if covering:
        context.line(f"\nentries that cover it, the deciding one first, mode {safe(fields.text(document, 'mode'))}:")
        context.table(ENTRY_COLUMNS, [_entry(context, row, now) for row in covering])
    talkers = fields.rows(document, "talkers")
    if talkers:
        context.line("\nwhat it sent:")
        context.table(columns("TO", ">PACKETS", ">BYTES", ">SYNS", "LAST SEEN"), [_sent(context, row) for row in talkers])
    elif context.legend:
        context.line("\nit has sent nothing that is still in the tables")


def _names(document: Document) -> str:
    """Where an address is, and whose."""
    country, number, name = (safe(fields.text(document, key)) for key in ("country", "as_number", "as_name"))
    return ", ".join(filter(None, [country, " ".join(filter(None, [f"AS{number}" if number else "", name]))]))


def _sent(context: Context, row: Document) -> list[Cell]:
    when = fields.number(row, "last_seen")
    seen = ago(context.clock() - when) if when and context.terminal else _moment(when)
    figures = (_exact(context, row, "packets"), _size(context, row), _exact(context, row, "syns"))
    return [target(row), *(at_least(context, row, figure) for figure in figures), seen]


def _options(context: Context) -> dict[str, object]:
    from .client import ssh_peers

    options: dict[str, object] = {"force": True} if context.arguments.force else {}
    if peers := ssh_peers(context.environ):
        options["peers"] = peers
    return options


def checked(prefixes: list[str]) -> list[str]:
    """The prefixes in their one spelling; all are read before anything is sent. The daemon checks them again."""
    from ..model import Prefix

    return [str(Prefix.parse(prefix)) for prefix in prefixes]


def duration(text: str) -> float:
    """A length of time above zero; UsageError otherwise."""
    from ..units import parse_duration

    seconds = parse_duration(text)
    if seconds <= 0:
        raise UsageError(f"'{text}' is no time at all", hint="write for example 90s, 10m or 1h30m")
    return seconds


def until(expires: float, now: float) -> str:
    form = "%H:%M:%S" if expires - now < 43200 else "%Y-%m-%d %H:%M"
    return f"for {span(expires - now)}, until {time.strftime(form, time.localtime(expires))}"


def _moment(when: float) -> str:
    return iso(when) if when else ""


@contextmanager
def _opened(name: str) -> Iterator[int]:
    """A descriptor of the file that the daemon can read without waiting: what is not a regular file is copied into memory first."""
    try:
        stream = open(sys.stdin.fileno() if name == "-" else name, "rb", closefd=name != "-")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise XdpmondError(f"cannot read '{name}': {getattr(error, 'strerror', None) or error}") from None
    with stream:
        if name != "-" and stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            yield stream.fileno()
            return
        with _in_memory(_chunks(stream, name)) as descriptor:
            yield descriptor


def _chunks(stream: BufferedReader, name: str) -> Iterator[bytes]:
    try:
        while chunk := stream.read(1 << 20):
            yield chunk
    except OSError as error:
        raise XdpmondError(f"cannot read '{name}': {error.strerror}") from None


@contextmanager
def _in_memory(chunks: Iterable[bytes]) -> Iterator[int]:
    """A descriptor of a file without a name that holds the chunks, at its start."""
    with open(os.memfd_create("xdpmonctl-prefixes"), "wb", buffering=0) as memory:
        for chunk in chunks:
            memory.write(chunk)
        memory.seek(0)
        yield memory.fileno()
