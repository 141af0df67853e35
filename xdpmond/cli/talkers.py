"""`xdpmonctl top` and `xdpmonctl flows`: who sends how much to which port, and which conversation is how large; once, or as a live screen.

A column is one row of a table: its title, its rank (see `layout`), and how to make its cell. What is printed once on a terminal and what
the live screen shows are made from the same columns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from . import fields
from .context import Context, Daemon
from .fields import Document
from .layout import write_fitting
from .ports import FAMILIES, cut, one_more, wanted
from .protocols import endpoint, target
from .render import SAMPLE_ROWS, VERDICT_COLOURS, Cell, Column, ago, iso, plural, safe, short, short_bytes
from .resolve import Resolver

LONGEST_OWNER = 28
"""Characters of the name of an autonomous system."""


class Rates(NamedTuple):
    """What a row moves in a second."""

    packets: float
    bytes: float
    syns: float
    measured: bool = True
    """Between two refreshes of a live screen; else the mean over all that the row counts."""


class Look(NamedTuple):
    """What the cells of a row depend on besides the row."""

    terminal: bool
    own: list[str]
    now: float
    name: Callable[[str], str]
    rates: Callable[[Document], Rates]
    live: bool = False


class Shown(NamedTuple):
    """A column of a table of talkers or flows."""

    title: str
    rank: int
    cell: Callable[[Document, Look], Cell]
    key: str = ""
    """Ordered by this, the column always stands, and that of its rate nearly so."""
    only: Callable[[Document], object] | None = None
    """The column is there only if this is true of some row."""


def mean_rates(row: Document) -> Rates:
    """As the daemon says; of a flow, from its first packet to its last."""
    packets, size, syns = (fields.number(row, key) for key in ("packets", "bytes", "syns"))
    if fields.value(row, "packets_per_second") is None:
        seconds = fields.number(row, "last_seen") - fields.number(row, "first_seen")
        per_second = 1 / seconds if seconds > 0 else 0.0
        return Rates(packets * per_second, size * per_second, syns * per_second, measured=False)
    per_second = fields.number(row, "packets_per_second")
    return Rates(per_second, fields.number(row, "bytes_per_second"), per_second * syns / packets if packets else 0.0, measured=False)


def _figure(key: str, size: bool = False) -> Callable[[Document, Look], Cell]:
    def cell(row: Document, look: Look) -> Cell:
        if not look.terminal:
            return _least(row, look, str(fields.count(row, key)))
        return _least(row, look, short_bytes(fields.number(row, key)) if size else short(fields.number(row, key)))

    return cell


def _least(row: Document, look: Look, figure: str) -> str:
    if not fields.flag(row, "partial"):
        return figure
    return f"≥ {figure}" if look.terminal else f"≥{figure}"


def _rate(key: str, size: bool = False) -> Callable[[Document, Look], Cell]:
    def cell(row: Document, look: Look) -> Cell:
        rates = look.rates(row)
        value: float = getattr(rates, key)
        if not look.terminal:
            return f"{value:.3f}".rstrip("0").rstrip(".")
        text = short_bytes(value) if size else short(value)
        return (text, "dim") if look.live and not rates.measured else text

    return cell


def _moment(row: Document, look: Look, key: str) -> str:
    moment = fields.number(row, key)
    if not moment:
        return ""
    if look.terminal:
        return ago(look.now - moment)
    return iso(moment)


def _source(row: Document, look: Look) -> Cell:
    source = fields.text(row, "source")
    return safe(source) + (" (you)" if source in look.own and look.terminal else "")


def _verdict(row: Document, look: Look) -> Cell:
    verdict = fields.text(row, "verdict")
    return safe(verdict), VERDICT_COLOURS.get(verdict, "")


def _owner(row: Document, look: Look) -> Cell:
    number, name = fields.text(row, "as_number"), safe(fields.text(row, "as_name"))
    if look.terminal and len(name) > LONGEST_OWNER:
        name = name[: LONGEST_OWNER - 1] + "…"
    return " ".join(filter(None, [f"AS{safe(number)}" if number else "", name]))


def _outcome(row: Document, look: Look) -> Cell:
    """What came of it where packets were dropped, else the verdict."""
    verdict, action = fields.text(row, "verdict"), fields.text(row, "action")
    return safe(action if action == "DROP" else verdict), VERDICT_COLOURS.get(verdict, "")


def _ago(row: Document, look: Look) -> Cell:
    seen = _moment(row, look, "last_seen")
    return f"{seen}, ended" if fields.value(row, "active") is False and look.terminal else seen


TALKERS = (
    Shown("SOURCE", 0, _source),
    Shown(">SOURCES", 3, lambda row, look: str(fields.count(row, "sources")), only=lambda row: fields.number(row, "sources") > 1),
    Shown("NAME", 1, lambda row, look: look.name(fields.text(row, "source"))),
    Shown("TO", 0, lambda row, look: target(row)),
    Shown(">PACKETS", 6, _figure("packets"), "packets"),
    Shown(">PACKETS/S", 7, _rate("packets"), "packets"),
    Shown(">BYTES", 6, _figure("bytes", size=True), "bytes"),
    Shown(">BYTES/S", 7, _rate("bytes", size=True), "bytes"),
    Shown(">SYNS", 8, _figure("syns"), "syn"),
    Shown(">SYNS/S", 10, _rate("syns"), "syn"),
    Shown("VERDICT", 1, _verdict),
    Shown("RULE", 3, lambda row, look: safe(fields.text(row, "rule"))),
    Shown("FIRST", 4, lambda row, look: _moment(row, look, "first_seen")),
    Shown("SEEN", 9, lambda row, look: _moment(row, look, "last_seen")),
    Shown("COUNTRY", 5, lambda row, look: safe(fields.text(row, "country")), only=lambda row: fields.value(row, "country")),
    Shown("AS", 5, _owner, only=lambda row: fields.value(row, "as_number") or fields.value(row, "as_name")),
)
TALKER_ADDRESSES = 1

FLOWS = (
    Shown("SOURCE", 0, lambda row, look: endpoint(row, "source", "source_port")),
    Shown("DESTINATION", 0, lambda row, look: endpoint(row, "destination", "port")),
    Shown("PROTOCOL", 1, lambda row, look: target({**row, "port": None})),
    Shown(">PACKETS", 4, _figure("packets"), "packets"),
    Shown(">PACKETS/S", 7, _rate("packets"), "packets"),
    Shown(">BYTES", 4, _figure("bytes", size=True), "bytes"),
    Shown(">BYTES/S", 7, _rate("bytes", size=True), "bytes"),
    Shown("FLAGS", 5, lambda row, look: safe(fields.text(row, "tcp_flags"))),
    Shown("VERDICT", 1, _outcome),
    Shown("SEEN", 6, _ago),
    Shown("FIRST", 7, lambda row, look: _moment(row, look, "first_seen")),
    Shown("INTERFACE", 8, lambda row, look: safe(fields.text(row, "interface"))),
)
FLOW_ADDRESSES = 2


def table_of(
    shown: Sequence[Shown], rows: Sequence[Document], by: str, *, names: bool = False, live: bool = False
) -> tuple[list[Column], Callable[[Document, Look], list[Cell]]]:
    """The columns for these rows, and what makes the cells of one."""
    kept = [row for row in shown if (row.title != "NAME" or names) and (row.only is None or any(map(row.only, rows)))]

    def rank(of: Shown) -> int:
        if of.key != by:
            return of.rank
        return (0 if live else 2) if of.title.endswith("/S") else 2 if live else 0

    columns = [Column(of.title.lstrip(">"), of.title.startswith(">"), rank(of)) for of in kept]
    return columns, lambda row, look: [of.cell(row, look) for of in kept]


def top(context: Context) -> int | None:
    from .client import ssh_peers

    given = context.arguments
    options: dict[str, object] = {"by": given.by, **wanted(context)}
    for name, length in (("prefix_length", given.prefix_len), ("prefix_length6", given.prefix_len6)):
        if length is not None:
            options[name] = length
    own = ssh_peers(context.environ)
    return show(context, Subject("top", TALKERS, TALKER_ADDRESSES, ("bytes", "packets", "syn"), options, "nobody has sent anything", own))


def flows(context: Context) -> int | None:
    given = context.arguments
    options: dict[str, object] = {"by": given.by, **wanted(context)}
    if given.address is not None:
        options["address"] = given.address
    return show(context, Subject("flows", FLOWS, FLOW_ADDRESSES, ("bytes", "packets"), options, "no flow was seen", []))


class Subject(NamedTuple):
    """What is asked for, and how it is shown."""

    name: str
    shown: Sequence[Shown]
    addresses: int
    keys: tuple[str, ...]
    """What it can be ordered by."""
    options: Mapping[str, object]
    none: str
    own: list[str]

    @property
    def nothing(self) -> str:
        """What is said where there is no row."""
        return self.none + (" like that" if self.options.keys() - {"by", "limit"} else " lately")

    def ask(self, daemon: Daemon, options: Mapping[str, object]) -> Iterator[bytes]:
        return daemon.top(options) if self.name == "top" else daemon.flows(options)


def show(context: Context, subject: Subject) -> int | None:
    """Once; or again and again, until interrupted, on a live screen where that is possible."""
    given = context.arguments
    if given.watch is None:
        _once(context, subject)
        return None
    if context.live and not context.json:
        from .live import watch

        return watch(context, subject)
    if not given.watch:  # no interval was given
        _once(context, subject)
        return None
    try:
        while True:
            started = time.monotonic()
            if context.legend and not context.json:
                context.line(context.style(f"-- {iso(context.clock())} --", "dim"))
            _once(context, subject)
            context.out.flush()
            time.sleep(max(0.0, started + given.watch - time.monotonic()))
    except KeyboardInterrupt:
        return 0


def _once(context: Context, subject: Subject) -> None:
    if context.json:
        context.documents(subject.ask(context.daemon, subject.options))
        return
    end = End()
    stream = _first(fields.parse_lines(subject.ask(context.daemon, one_more(subject.options))), subject.options["limit"], end)
    sample = list(itertools.islice(stream, SAMPLE_ROWS))
    resolver = Resolver() if getattr(context.arguments, "resolve", False) else None
    if resolver is not None:
        sample += stream
        addresses = [fields.text(row, "source") for row in sample]
        resolver.ask(addresses)
        resolver.wait(addresses)
    look = Look(context.terminal, subject.own, context.clock(), resolver.name if resolver else lambda _: "", mean_rates)
    columns, cells = table_of(subject.shown, sample, str(subject.options["by"]), names=resolver is not None)
    rows = (cells(row, look) for row in itertools.chain(sample, stream))
    if context.terminal:
        total = write_fitting(
            context.out, context.style, columns, rows, width=context.width, lead=subject.addresses, legend=context.legend,
            drawn=context.style.enabled,
        )  # fmt: skip
    else:
        total = context.table(columns, rows)
    if context.legend and not total:
        context.line(subject.nothing)
    if context.legend and end.more:
        context.line(context.style(cut(total), "dim"))
    if context.legend and end.note:
        context.line(context.style(hidden(end.note), "dim"))


class End:
    """What comes after the rows that are shown."""

    more = False
    note: Document | None = None
    """Of sources that are not shown."""


def _first(rows: Iterator[Document], most: object, end: End) -> Iterator[Document]:
    """So many rows; what follows them is put apart."""
    number = 0
    for row in rows:
        if "source" not in row and "hidden" in row:
            end.note = row
        elif number == most:
            end.more = True
        else:
            number += 1
            yield row


def hidden(note: Document) -> str:
    number = sum(fields.count(note, "hidden", "local", family) for family in FAMILIES)
    return f"without {plural(number, 'local source')}; --local shows them"
