"""`xdpmonctl ports`: from how many sources each port was reached, in the last full window and in the running one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from . import fields
from .context import Context
from .fields import Document
from .layout import write_fitting
from .protocols import service, target
from .render import Cell, Column, plural, short, short_bytes

DEFAULT_ROWS = 20
FAMILIES = ("ipv4", "ipv6")

COLUMNS = [
    Column("TO", False), Column("SERVICE", False, 3), Column("IPV4", True), Column("IPV6", True), Column("ERROR", True, 1),
    Column("PACKETS", True, 2), Column("BYTES", True, 2), Column("IPV4 NOW", True, 1), Column("IPV6 NOW", True, 1),
]  # fmt: skip


def ports(context: Context) -> None:
    given = context.arguments
    options = wanted(context)
    if context.json:
        context.documents(context.daemon.ports(options))
        return
    answer = list(fields.parse_lines(context.daemon.ports(one_more(options))))
    total = next((row for row in answer if fields.flag(row, "total")), {})
    found = [row for row in answer if row is not total]
    rows = found[: given.limit or DEFAULT_ROWS]
    more = len(found) > len(rows)
    if rows and total and context.legend:
        rows.append(total)
    kept = [at for at, column in enumerate(COLUMNS) if not context.terminal or _needed(column.title, rows, given.interval)]
    cells = [[row[at] for at in kept] for row in (_port(context, row) for row in rows)]
    shown = [COLUMNS[at] for at in kept]
    if context.terminal:
        write_fitting(
            context.out, context.style, shown, cells, width=context.width, lead=1, legend=context.legend, drawn=context.style.enabled
        )
    else:
        context.table(shown, cells)
    if context.legend:
        for line in [cut(len(rows) - bool(total))] * more + [*_remarks(context, rows, total)]:
            context.line(context.style(line, "dim"))


def _remarks(context: Context, rows: list[Document], total: Document) -> Iterator[str]:
    """What stands below the table."""
    if not rows:
        yield "no port like that was reached" if wanted(context).keys() - {"limit"} else "no port was reached lately"
    elif context.terminal:
        yield "IPV4, IPV6: distinct sources in the last full window" + ("" if context.arguments.interval else "; NOW: in the running one")
    if total and not _sources(total, "sources") and _sources(total, "running"):
        yield "the first window has not ended yet: what came in it stands under NOW"
    if any(_mark(row) or _mark(fields.value(row, "running") or {}) for row in rows):
        yield "~ an estimate and its standard error; ≥ at least so many: the table was too small"
    hidden = sum(fields.count(total, "hidden", "local", family) for family in FAMILIES)
    if hidden:
        yield f"without {plural(hidden, 'local source')}; --local shows them"
    if left_out := fields.count(total, "hidden", "ports"):
        yield f"without {plural(left_out, 'port')} that the setting `ports` leaves out"


def wanted(context: Context) -> dict[str, object]:
    """The options of the call: what was given, and no more."""
    given = context.arguments
    options: dict[str, object] = {"limit": given.limit or DEFAULT_ROWS}
    if given.port is not None:
        options["port"] = given.port
    if given.proto is not None:
        options["protocol"] = given.proto.lower()
    if getattr(given, "interval", False):
        options["interval"] = True
    if getattr(given, "local", None) is not None:
        options["local"] = given.local
    return options


LARGEST_LIMIT = (1 << 32) - 1
"""On the bus."""


def one_more(options: Mapping[str, object]) -> dict[str, object]:
    """Ask for a row more than is shown, to know whether there is one."""
    limit = options["limit"]
    assert isinstance(limit, int)
    return {**options, "limit": min(limit + 1, LARGEST_LIMIT)}


def cut(shown: int) -> str:
    """What is said where there is more than is shown."""
    return f"only the first {f'{shown:,}' if shown > 1 else 'one'}; --limit shows more"


def _needed(title: str, rows: list[Document], interval: bool) -> bool:
    """On a terminal, a column that says nothing is left out."""
    if title == "ERROR":
        return any(fields.number(row, "error") for row in rows)
    if title.endswith(" NOW"):
        return not interval
    return title != "SERVICE" or any(service(row) for row in rows)


def _port(context: Context, row: Document) -> list[Cell]:
    running, error = fields.value(row, "running") or {}, fields.number(row, "error")

    def sources(of: Document, when: str, family: str) -> str:
        number = fields.count(row, when, family)
        return f"{_mark(of)}{number:,}" if context.terminal else f"{_mark(of)}{number}"

    packets, size = fields.number(row, "packets"), fields.number(row, "bytes")
    least = "≥" if fields.value(row, "exact") is False else ""
    return [
        ("total", "bold") if fields.flag(row, "total") else target(row),
        service(row) or " " * fields.flag(row, "total"),
        sources(row, "sources", "ipv4"),
        sources(row, "sources", "ipv6"),
        f"±{100 * error:.2g} %" if error and least else "",
        least + (short(packets) if context.terminal else str(int(packets))),
        least + (short_bytes(size) if context.terminal else str(int(size))),
        sources(running, "running", "ipv4"),
        sources(running, "running", "ipv6"),
    ]


def _mark(of: Document) -> str:
    """What stands before a number of sources: nothing where it is exact, "~" at an estimate, "≥" where some are not counted."""
    if fields.value(of, "exact") is not False:
        return ""
    return "~" if fields.number(of, "error") else "≥"


def _sources(row: Document, when: str) -> int:
    return sum(fields.count(row, when, family) for family in FAMILIES)


def brief(row: Document, *, unit: bool = False) -> str:
    """`tcp/443 1,234`: the sources of the last full window, or of the running one while there is no other."""
    sources, of = _sources(row, "sources"), row
    if not sources:
        sources, of = _sources(row, "running"), fields.value(row, "running") or {}
    return f"{target(row)} {_mark(of)}{plural(sources, 'source') if unit else format(sources, ',')}"
