"""`xdpmonctl status`: one screen for someone who is logged in over SSH while something is wrong.

The order is the order of their questions: is the host guarded at all, what is being dropped, how much comes in, from whom, are these
numbers complete, and what should I type next. It fits 80 by 24 with a line left for the prompt: when there is more to say, the list of
sources gives way first. Red is kept for what is wrong; what is cut short by design (events are samples) is said without alarm.
"""

from __future__ import annotations

from . import fields
from .context import Context
from .fields import Document
from .render import VERDICT_COLOURS, Cell, Style, columns, format_row, percent, plural, safe, short, short_bytes, span

UNLISTED = {"allow": "unlisted ones pass", "log": "unlisted ones pass and are reported", "deny": "so are all unlisted ones"}

SCREEN_LINES = 23
SHOWN_INTERFACES = 3
SHOWN_SOURCES = 5
SHOWN_HINTS = 3
LABEL = 10


def status(context: Context) -> None:
    document = context.daemon.describe()
    if context.json:
        context.document(document)
        return
    from .client import ssh_peers

    own = ssh_peers(context.environ)
    for line in screen(document, context.style, own=own, width=context.width, legend=context.legend, now=context.clock()):
        context.line(_clip(line, context.width) if context.terminal else line)


def screen(document: Document, style: Style, *, own: list[str], width: int, legend: bool, now: float) -> list[str]:
    """The lines of the screen."""
    head = [_verdict(document, style), *_interfaces(document, style), *_figures(document, style)]
    problems = [*_losses(document, style), *_reload(document, style, now)]
    hints = _hints(document, style, own)[:SHOWN_HINTS] if legend else []
    room = SCREEN_LINES - len(head) - len(problems) - len(hints) - 2 * bool(problems or hints) - 3
    lines = head + _sources(document, style, own, max(1, min(SHOWN_SOURCES, room)), width, legend)
    if problems or hints:
        lines += ["", *problems, *hints]
    return lines


def _label(style: Style, name: str, text: str, *colours: str) -> str:
    return style(f"{name:<{LABEL}}", *colours) + text


def _verdict(document: Document, style: Style) -> str:
    interfaces = fields.rows(document, "interfaces")
    attached = [interface for interface in interfaces if fields.text(interface, "state") == "attached"]
    modes = {fields.text(interface, "mode") or fields.text(document, "mode") for interface in attached}
    default = fields.text(document, "default")
    per_second = fields.number(document, "rates", "dropped_per_second")
    if not attached:
        waiting = ", ".join(safe(fields.text(interface, "name")) for interface in interfaces)
        return style("NOT WATCHING", "bold", "red") + f"  no interface is attached{': ' + waiting if waiting else ''}"
    if modes == {"monitor"}:
        passed = fields.number(document, "totals", "denied_passed", "packets")
        tail = f"; {short(passed)} packets of denied sources were let in" if passed else ""
        return style("MONITOR", "bold", "yellow") + f"  nothing is dropped{tail}"
    unlisted = UNLISTED.get(default, "")
    now = f"{short(per_second)} packets/s dropped; " if per_second else ""
    if modes == {"enforce"}:
        return style("ENFORCE", "bold", "green") + f"  {now}denied sources are dropped, {unlisted}"
    enforcing = ", ".join(safe(fields.text(interface, "name")) for interface in attached if fields.text(interface, "mode") == "enforce")
    return style("MIXED", "bold", "yellow") + f"  {now}denied sources are dropped on {enforcing} alone"


def _interfaces(document: Document, style: Style) -> list[str]:
    interfaces = fields.rows(document, "interfaces")
    interfaces.sort(key=lambda interface: fields.text(interface, "state") == "attached")  # what is missing stands first
    mixed = len({fields.text(interface, "mode") for interface in interfaces}) > 1
    shown = interfaces[:SHOWN_INTERFACES] if len(interfaces) > SHOWN_INTERFACES + 1 else interfaces
    lines = []
    for interface in shown:
        state = fields.text(interface, "state")
        parts = [style(safe(state), "green" if state == "attached" else "red")]
        if state == "attached":
            parts.append(safe(fields.text(interface, "attach")))
            parts += [safe(fields.text(interface, "mode"))] if mixed else []
        reason = fields.text(interface, "reason")
        parts += [safe(text) for text in [reason, *fields.texts(interface, "notes")[:1]] if text]
        lines.append(_label(style, safe(fields.text(interface, "name")) + " ", ", ".join(parts)))
    if len(interfaces) > len(shown):
        lines.append(_label(style, "", f"and {len(interfaces) - len(shown)} more interfaces"))
    return lines


def _figures(document: Document, style: Style) -> list[str]:
    def total(name: str) -> float:
        return fields.number(document, "totals", name, "packets")

    rates = fields.value(document, "rates") or {}
    packets, dropped = fields.number(rates, "packets_per_second"), fields.number(rates, "dropped_per_second")
    drops = f"{short(dropped)}/s dropped ({percent(dropped, packets)})"
    now = [
        f"{short(packets)} packets/s, {short_bytes(fields.number(rates, 'bytes_per_second'))}/s",
        style(drops, "bold") if dropped else "none dropped",
    ]
    interval = fields.number(rates, "interval_seconds")
    whole = fields.number(document, "totals", "packets")
    parts = [
        ("dropped", total("dropped"), "red"), ("denied but let in", total("denied_passed"), "yellow"), ("unlisted", total("logged"), ""),
        ("allowed", total("allowed"), ""), ("essential", total("essential"), ""),
    ]  # fmt: skip
    said = [style(f"{short(amount)} {name}", colour) for name, amount, colour in parts if amount]
    since = span(fields.number(document, "uptime_seconds"))
    return [
        _label(style, "traffic", ", ".join(now) + (f", over {span(interval)}" if interval else "")),
        _label(style, "total", f"{short(whole)} packets in {since}" + (": " + ", ".join(said) if said else "")),
        _label(style, "policy", _policy(document)),
    ]


def _policy(document: Document) -> str:
    policy = fields.value(document, "policy") or {}
    deny, allow, expiring = (fields.count(policy, key) for key in ("deny", "allow", "expiring"))
    text = f"{deny:,} denied, {allow:,} allowed, others: {safe(fields.text(document, 'default'))}"
    if expiring:
        text += f"; {expiring:,} {'ends' if expiring == 1 else 'end'} by {'itself' if expiring == 1 else 'themselves'}"
    mode, file_mode = fields.text(document, "mode"), fields.text(document, "file_mode")
    if mode != file_mode and file_mode:
        text += f"; the files say {safe(file_mode)}"
    return text


def _sources(document: Document, style: Style, own: list[str], most: int, width: int, legend: bool) -> list[str]:
    talkers = fields.rows(document, "top")[:most]
    unique = sum(fields.count(document, "window", "unique_sources", family) for family in ("ipv4", "ipv6"))
    late = ", a late window" if fields.flag(document, "window", "late") else ""
    title = f"top sources of {plural(unique, 'source')}{late}" if unique else f"top sources{late}"
    if not talkers:
        return ["", style("top sources", "bold") + ": nobody has sent anything yet"] if legend else []
    shown = columns("SOURCE", "TO", ">PACKETS", ">BYTES", ">SYNS", "VERDICT")
    body = [_source(talker, own) for talker in talkers]
    rows: list[list[Cell]] = [[(column.title, "dim") for column in shown], *body] if legend else body
    widths = [max(len(cell if isinstance(cell, str) else cell[0]) for cell in column) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * len(widths) > width:  # long IPv6 addresses: the SYN column gives way
        shown, rows, widths = shown[:4] + shown[5:], [row[:4] + row[5:] for row in rows], widths[:4] + widths[5:]
    lines = [format_row(style, shown, widths, row) for row in rows]
    return ["", style(title, "bold"), *lines] if legend else ["", *lines]


def _source(talker: Document, own: list[str]) -> list[Cell]:
    source, verdict = fields.text(talker, "source"), fields.text(talker, "verdict")
    return [
        safe(source) + (" (you)" if source in own else ""),
        target(talker),
        short(fields.number(talker, "packets")),
        short_bytes(fields.number(talker, "bytes")),
        short(fields.number(talker, "syns")),
        (safe(verdict), VERDICT_COLOURS.get(verdict, "")),
    ]


def target(talker: Document) -> str:
    """What a talker talks to: `tcp/22`, or `icmp` where there is no port."""
    protocol, port = safe(fields.text(talker, "protocol")), fields.text(talker, "port")
    return f"{protocol}/{safe(port)}" if port else protocol


def _losses(document: Document, style: Style) -> list[str]:
    """Lines about what the numbers above do not hold: in red what should not be, without alarm what is limited by design."""
    losses = fields.value(document, "losses") or {}
    queues = fields.value(losses, "queue_full")
    wrong = [f"{short(fields.number(losses, 'ring_full'))} events (ring full)"] if fields.number(losses, "ring_full") else []
    if isinstance(queues, dict):
        wrong += [f"{short(fields.number(queues, name))} for {safe(name)} (queue full)" for name in queues if fields.number(queues, name)]
    books = fields.value(document, "books") or {}
    unlisted = {name: fields.number(books, name, "packets") for name in ("evicted", "untracked")}
    untold = [f"{short(packets)} packets {name}" for name, packets in unlisted.items() if packets]
    lines = []
    if fields.value(books, "balanced") is False:
        text = "the counters do not add up; please report it with: xdpmonctl status -j"
        lines.append(_label(style, "books", text, "bold", "red"))
    if wrong:
        lines.append(_label(style, "lost", ", ".join(wrong), "bold", "red"))
    if untold:
        lines.append(_label(style, "lost", f"{', '.join(untold)}: too many sources to list; totals are exact", "bold", "red"))
    limited = [
        f"{short(fields.number(losses, key))} {what}"
        for key, what in (("over_budget", "events over budget"), ("merged", "merged"), ("journal_held_back", "held back from the journal"))
        if fields.number(losses, key)
    ]
    if limited:
        lines.append(_label(style, "sampled", ", ".join(limited), "dim"))
    anomalies = fields.value(document, "anomalies")
    if isinstance(anomalies, dict) and any(fields.number(anomalies, name) for name in anomalies):
        odd = [f"{short(fields.number(anomalies, name))} {safe(name)}" for name in anomalies if fields.number(anomalies, name)]
        lines.append(_label(style, "odd", ", ".join(odd), "yellow"))
    return lines


def _reload(document: Document, style: Style, now: float) -> list[str]:
    reload = fields.value(document, "last_reload")
    if not isinstance(reload, dict) or fields.value(reload, "ok") is not False:
        return []
    when = fields.number(reload, "when")
    ago = f" {span(now - when)} ago" if when else ""
    return [_label(style, "reload", f"refused{ago}, the settings before it hold: {safe(fields.text(reload, 'message'))}", "bold", "red")]


def _hints(document: Document, style: Style, own: list[str]) -> list[str]:
    """Commands to type next, the most urgent first, each with what it does."""
    found: list[tuple[str, str]] = []
    interfaces = fields.rows(document, "interfaces")
    attached = any(fields.text(interface, "state") == "attached" for interface in interfaces)
    if not attached:
        found.append(("journalctl -u xdpmond -n 20", "why no interface is attached"))
    confirm = fields.value(document, "confirm")
    if isinstance(confirm, dict):
        left = span(fields.number(confirm, "seconds_left"))
        before = safe(fields.text(confirm, "mode") or "the one before")
        found.append(("xdpmonctl confirm", f"keep this mode, or it goes back to {before} in {left}"))
    if fields.value(document, "last_reload", "ok") is False:
        found.append(("xdpmonctl check-config", "what is wrong with the files"))
    if attached and fields.text(document, "mode") == "monitor" and fields.number(document, "totals", "denied_passed", "packets"):
        found.append(("xdpmonctl mode enforce --confirm 60s", "drop what is denied; goes back unless confirmed"))
    for talker in fields.rows(document, "top"):
        source = fields.text(talker, "source")
        if fields.text(talker, "verdict") == "log" and source not in own:
            found.append((f"xdpmonctl explain {safe(source)}", "the busiest source on no list"))
            found.append((f"xdpmonctl deny {safe(source)} --for 10m", "shut it out for ten minutes"))
            break
    found = found[:SHOWN_HINTS]
    widest = max((len(command) for command, _ in found), default=0)
    return [_label(style, "next" if not index else "", f"{style(command, 'cyan')}{' ' * (widest - len(command))}  {what}")
            for index, (command, what) in enumerate(found)]  # fmt: skip


def _clip(line: str, width: int) -> str:
    """Cut a line to the width of the terminal, not counting colours."""
    shown, index, painted = 0, 0, False
    while index < len(line):
        if line[index] == "\x1b":
            end = line.index("m", index) + 1
            painted = line[index:end] != "\x1b[0m"
            index = end
            continue
        if shown == width - 1 and _visible_length(line[index:]) > 1:
            return line[:index] + ("\x1b[0m" if painted else "") + ">"
        shown += 1
        index += 1
    return line


def _visible_length(text: str) -> int:
    length, index = 0, 0
    while index < len(text):
        if text[index] == "\x1b":
            index = text.index("m", index) + 1
        else:
            length, index = length + 1, index + 1
    return length
