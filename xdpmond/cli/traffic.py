"""The commands that look at traffic: top and events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from ..errors import NotRunningError
from . import fields
from .context import Context
from .fields import Document
from .policy import at_least
from .render import ACTION_COLOURS, VERDICT_COLOURS, Cell, columns, plural, safe, short_bytes, span
from .status import target


def top(context: Context) -> None:
    given = context.arguments
    options: dict[str, object] = {"by": given.by, "limit": given.limit}
    if given.port is not None:
        options["port"] = given.port
    if given.proto is not None:
        options["protocol"] = given.proto.lower()
    if given.interval:
        options["interval"] = True
    lines = context.daemon.top(options)
    if context.json:
        context.documents(lines)
        return
    from .client import ssh_peers

    own, now = ssh_peers(context.environ), context.clock()
    titles = columns("SOURCE", "TO", ">PACKETS", ">BYTES", ">SYNS", "VERDICT", "SEEN", "RULE")
    total = context.table(titles, (_talker(context, row, own, now) for row in fields.parse_lines(lines)))
    if context.legend and not total:
        context.line("nobody has sent anything" + (" like that" if len(options) > 2 else " yet"))


def _talker(context: Context, row: Document, own: list[str], now: float) -> list[Cell]:
    def exact(key: str) -> str:
        return f"{fields.count(row, key):,}" if context.terminal else str(fields.count(row, key))

    source, verdict, seen = fields.text(row, "source"), fields.text(row, "verdict"), fields.number(row, "last_seen")
    return [
        safe(source) + (" (you)" if source in own and context.terminal else ""),
        target(row),
        at_least(context, row, exact("packets")),
        at_least(context, row, short_bytes(fields.number(row, "bytes")) if context.terminal else exact("bytes")),
        at_least(context, row, exact("syns")),
        (safe(verdict), VERDICT_COLOURS.get(verdict, "")),
        "" if not seen else f"{span(now - seen)} ago" if context.terminal else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seen)),
        safe(fields.text(row, "rule")),
    ]


def events(context: Context) -> int:
    """The last events, or with --follow those that come. Ctrl-C is the ordinary end of following, so its status is 0."""
    given = context.arguments
    if not given.follow:
        _write(context, context.daemon.events({"limit": given.limit} if given.limit else {}))
        return 0
    try:
        _write(context, _first(context.daemon.follow_events(), given.limit))
    except KeyboardInterrupt:
        return 0
    return 0


def _first(lines: Iterator[bytes], limit: int | None) -> Iterator[bytes]:
    """The lines, or the first `limit` of them that are events, read no further than needed. A stream that ends by itself is an error."""
    left = limit
    for line in lines:
        yield line
        if left and not line.startswith(b'{"lost"'):
            left -= 1
            if not left:
                return
    raise NotRunningError("the event stream has ended: the daemon stopped", hint="see: systemctl status xdpmond")


def _write(context: Context, lines: Iterable[bytes]) -> None:
    if context.json:
        context.stream(lines)
        return
    day = ""
    for row in fields.parse_lines(lines):
        if lost := fields.count(row, "lost"):
            context.line(context.style(f"-- {plural(lost, 'event')} lost here: they came faster than they were read --", "red"))
        else:
            moment = time.localtime(fields.number(row, "timestamp"))
            today = time.strftime("%Y-%m-%d", moment)
            if today != day and context.legend:
                context.line(context.style(f"-- {today} --", "dim"))
                day = today
            context.line(event_line(context, row, time.strftime("%H:%M:%S", moment)))
        if context.arguments.follow:
            context.out.flush()


def event_line(context: Context, row: Document, clock: str) -> str:
    """One event: `14:02:11 DROP deny 203.0.113.9:40312 > 192.0.2.1:22 tcp 60 bytes on eth0, rule 203.0.113.0/24, 120 more like it`."""
    action, verdict = fields.text(row, "action"), fields.text(row, "verdict")
    vlan = f" vlan {fields.count(row, 'vlan')}" if fields.value(row, "vlan") is not None else ""
    parts = [
        clock,
        context.style(f"{safe(action):<4}", ACTION_COLOURS.get(action, "")),
        context.style(f"{safe(verdict):<5}", VERDICT_COLOURS.get(verdict, "")),
        _end(row, "src"),
        ">",
        _end(row, "dst"),
        safe(fields.text(row, "protocol")),
        f"{fields.count(row, 'packet_size')} bytes",
    ]
    text = " ".join(parts) + f" on {safe(fields.text(row, 'interface'))}{vlan}, rule {safe(fields.text(row, 'rule'))}"
    suppressed = fields.count(row, "suppressed")
    return text + (f", {suppressed:,} more like it before" if suppressed else "")


def _end(row: Document, side: str) -> str:
    address, port = safe(fields.text(row, f"{side}_ip")), fields.value(row, f"{side}_port")
    if not isinstance(port, int):
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
