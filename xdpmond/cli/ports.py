"""`xdpmonctl ports`: from how many sources each port was reached, in the last full window and in the running one."""

from __future__ import annotations

from . import fields
from .context import Context
from .fields import Document
from .layout import write_fitting
from .protocols import service, target
from .render import Cell, Column, short, short_bytes

DEFAULT_ROWS = 20
FAMILIES = ("ipv4", "ipv6")

COLUMNS = [
    Column("TO", False), Column("SERVICE", False, 3), Column("IPV4", True), Column("IPV6", True), Column("ERROR", True, 1),
    Column("PACKETS", True, 2), Column("BYTES", True, 2), Column("IPV4 NOW", True, 1), Column("IPV6 NOW", True, 1),
]  # fmt: skip


def ports(context: Context) -> None:
    given = context.arguments
    lines = context.daemon.ports(wanted(context))
    if context.json:
        context.documents(lines)
        return
    rows = fields.parse_lines(lines)
    if context.terminal:
        shown = list(rows)
        kept = [at for at, column in enumerate(COLUMNS) if _needed(column.title, shown, given.interval)]
        cells = [[row[at] for at in kept] for row in (_port(context, row) for row in shown)]
        total = write_fitting(
            context.out, context.style, [COLUMNS[at] for at in kept], cells, width=context.width, lead=1, legend=context.legend,
            drawn=context.style.enabled,
        )  # fmt: skip
    else:
        total = context.table(COLUMNS, (_port(context, row) for row in rows))
        shown = []
    if not context.legend:
        return
    if not total:
        context.line("no port was reached" + (" by anything like that" if wanted(context).keys() - {"limit"} else " yet"))
    elif any(fields.value(row, "exact") is False for row in shown):
        context.line(context.style("~ an estimate and its standard error; ≥ at least so many: the table was too small", "dim"))


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


def _needed(title: str, rows: list[Document], interval: bool) -> bool:
    """On a terminal, a column that says nothing is left out."""
    if title == "ERROR":
        return any(fields.number(row, "error") for row in rows)
    if title.endswith(" NOW"):
        return not interval
    return title != "SERVICE" or any(service(row) for row in rows)


def _port(context: Context, row: Document) -> list[Cell]:
    error = fields.number(row, "error")

    def sources(when: str, family: str) -> str:
        number = fields.count(row, when, family)
        return f"{mark(row)}{number:,}" if context.terminal else f"{mark(row)}{number}"

    packets, size = fields.number(row, "packets"), fields.number(row, "bytes")
    least = "≥" if fields.value(row, "exact") is False else ""
    return [
        target(row),
        service(row),
        sources("sources", "ipv4"),
        sources("sources", "ipv6"),
        f"±{100 * error:.2g} %" if error and fields.value(row, "exact") is False else "",
        least + (short(packets) if context.terminal else str(int(packets))),
        least + (short_bytes(size) if context.terminal else str(int(size))),
        sources("running", "ipv4"),
        sources("running", "ipv6"),
    ]


def mark(row: Document) -> str:
    """What stands before a number of sources: nothing where it is exact, "~" at an estimate, "≥" where some are not counted."""
    if fields.value(row, "exact") is not False:
        return ""
    return "~" if fields.number(row, "error") else "≥"


def brief(row: Document) -> str:
    """`tcp/443 1,234`: the sources of the last full window, or of the running one while there is no other."""
    last, running = (sum(fields.count(row, when, family) for family in FAMILIES) for when in ("sources", "running"))
    return f"{target(row)} {mark(row)}{last or running:,}"
