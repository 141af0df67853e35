"""`xdpmonctl events`: the packets that were reported, last or live."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from ..errors import NotRunningError
from . import fields
from .context import Context
from .fields import Document
from .protocols import endpoint
from .render import ACTION_COLOURS, VERDICT_COLOURS, plural, safe


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
    """One event: `14:02:11 DROP deny  203.0.113.9:40312 > 192.0.2.1:22 tcp 60 bytes on eth0, rule 203.0.113.0/24, 120 more like it before`.

    On a terminal, what matters least is left out of a line that is too long: the interface, the size, the rule. Two addresses that do not
    fit on one line stand on two.
    """
    action, verdict = fields.text(row, "action"), fields.text(row, "verdict")
    vlan = f" vlan {fields.count(row, 'vlan')}" if fields.value(row, "vlan") is not None else ""
    suppressed = fields.count(row, "suppressed")
    tail = {
        "size": f" {fields.count(row, 'packet_size')} bytes",
        "where": f" on {safe(fields.text(row, 'interface'))}{vlan}",
        "rule": f", rule {safe(fields.text(row, 'rule'))}",
        "more": f", {suppressed:,} more like it before" if suppressed else "",
    }
    head = [clock, f"{safe(action):<4}", f"{safe(verdict):<5}"]
    ends = [endpoint(row, "src_ip", "src_port"), f"> {endpoint(row, 'dst_ip', 'dst_port')} {safe(fields.text(row, 'protocol'))}"]
    room = context.width if context.terminal else sys.maxsize
    used = len(" ".join([*head, *ends]))
    if used > room:
        ends[1] = "\n" + " " * (len(clock) + 1) + ends[1]
        used = len(ends[1]) - 1
    if suppressed and used + len(tail["more"]) > room:
        tail["more"] = f", {suppressed:,} more"
    for part in ("where", "size", "rule"):
        if used + sum(map(len, tail.values())) > room:
            del tail[part]
    head[1:] = context.style(head[1], ACTION_COLOURS.get(action, "")), context.style(head[2], VERDICT_COLOURS.get(verdict, ""))
    return " ".join([*head, *ends]).replace(" \n", "\n") + "".join(tail.values())
