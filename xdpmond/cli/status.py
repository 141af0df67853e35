"""`xdpmonctl status`: one screen for someone who is logged in over SSH while something is wrong.

The order is the order of their questions: is the host guarded at all, what is being dropped, how much comes in, from whom, are these
numbers complete, and what should I type next. It fits 80 by 24 with a line left for the prompt: long lines are continued below, and when
there is more to say than fits, first the list of sources gives way, then the ends of long lines. Red is kept for what is wrong; what is
limited by design (events are samples) is said without alarm.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import NotRunningError, XdpmondError
from . import fields
from .context import Context
from .fields import Document
from .ports import brief
from .protocols import target
from .render import VERDICT_COLOURS, Cell, Style, bars, columns, format_row, percent, plural, safe, short, short_bytes, span

SCREEN_LINES = 23
SHOWN_INTERFACES = 3
SHOWN_SOURCES = 5
SHOWN_HINTS = 3
SHOWN_PORTS = 5
SHOWN_WINDOWS = 60
BUSY_PACKETS = 100
"""A source with fewer is not worth a ban."""
LABEL = 10
UNLIMITED = 10_000
"""The width of what is not a terminal."""

UNLISTED = {"allow": "unlisted ones pass", "log": "unlisted ones pass and are reported", "deny": "unlisted ones are dropped too"}


def status(context: Context) -> None:
    document = context.daemon.describe()
    if context.json:
        context.document(document)
        return
    from .client import ssh_peers

    width = context.width if context.terminal else UNLIMITED
    screen = Screen(document, context.style, own=ssh_peers(context.environ), width=width, now=context.clock(), unicode=context.unicode)
    windows = told(context.daemon.windows, limit=SHOWN_WINDOWS)
    # Those of a full window are counted already, those of the running one would be for us.
    ports = told(context.daemon.ports, limit=SHOWN_PORTS, interval=bool(windows))
    for line in screen.lines(windows, ports, legend=context.legend):
        context.line(line)


def told(method: Callable[[Mapping[str, object]], Iterable[bytes]], **options: object) -> list[Document]:
    """The rows that the daemon tells; none if it is too old to know the method. The screen is shown in any case."""
    try:
        return list(fields.parse_lines(method(options)))
    except NotRunningError:
        raise
    except XdpmondError:
        return []


class Screen:
    """One status document as lines. `own` are the addresses that the reader's own SSH session comes from."""

    def __init__(self, document: Document, style: Style, *, own: list[str], width: int, now: float, unicode: bool = True) -> None:
        self._document = document
        self._style = style
        self._own = own
        self._width = width
        self._now = now
        self._unicode = unicode
        self._tight = False
        self._interfaces = fields.rows(document, "interfaces")
        self._attached = [row for row in self._interfaces if fields.text(row, "state") == "attached"]

    def lines(self, windows: Sequence[Document] = (), ports: Sequence[Document] = (), *, legend: bool = True) -> list[str]:
        """The screen; if it does not fit, the same with long lines cut instead of continued, then without the ports, then the windows."""
        for level in range(4):
            self._tight = level > 0
            lines = self._lines(windows if level < 3 else (), ports if level < 2 else (), legend)
            if len(lines) <= SCREEN_LINES or self._width >= UNLIMITED:
                break
        return lines

    def _lines(self, windows: Sequence[Document], ports: Sequence[Document], legend: bool) -> list[str]:
        head = [*self.verdict(), *self._interface_lines(), *self._mode(), *self.traffic(), *self.history(windows)]
        head += [*self._totals(), *self._policy_and_tables(), *self._ports(ports)]
        problems = [*self._losses(), *self._reload(), *self._warnings()]
        hints = self._hints() if legend else []
        tail = ["", *problems, *hints] if problems or hints else []
        room = SCREEN_LINES - len(head) - len(tail) - 3  # an empty line, a title and the columns' names stand above the sources
        return head + self._sources(max(1, min(SHOWN_SOURCES, room)), legend) + tail

    def _line(self, label: str, parts: Iterable[Cell], *colours: str, separator: str = ", ") -> list[str]:
        """Label and parts, continued below the first part where they would pass the width; on a tight screen cut there."""
        limit = self._width - len(" ...") if self._tight else self._width
        lines = []
        line, used, first = self._style(f"{label:<{LABEL}}", *colours), max(LABEL, len(label)), True
        for part in parts:
            text, colour = (part, "") if isinstance(part, str) else part
            gap = "" if first else separator
            if not first and used + len(gap) + len(text) > limit:
                if self._tight:
                    return [line + " ..."]
                lines.append(line + gap.rstrip())
                line, used, gap = " " * LABEL, LABEL, ""
            line, used, first = line + gap + self._style(text, colour), used + len(gap) + len(text), False
        return [*lines, line]

    def verdict(self) -> list[str]:
        modes = {fields.text(row, "mode") or fields.text(self._document, "mode") for row in self._attached}
        if not self._attached:
            waiting = ", ".join(safe(fields.text(row, "name")) for row in self._interfaces)
            return [self._style("NOT WATCHING", "bold", "red") + f"  no interface is attached{': ' + waiting if waiting else ''}"]
        if modes == {"monitor"}:
            passed = fields.number(self._document, "totals", "denied_passed", "packets")
            tail = f"; {short(passed)} packets of denied sources were let in" if passed else ""
            return [self._style("MONITOR", "bold", "yellow") + f"  nothing is dropped{tail}"]
        per_second = fields.number(self._document, "rates", "dropped_per_second")
        now = f"dropping {short(per_second)} packets/s" if per_second else "denied sources are dropped"
        if modes == {"enforce"}:
            unlisted = UNLISTED.get(fields.text(self._document, "default"), "")
            return [self._style("ENFORCE", "bold", "green") + f"  {now}; {unlisted}"]
        enforcing = ", ".join(safe(fields.text(row, "name")) for row in self._attached if fields.text(row, "mode") == "enforce")
        return [self._style("MIXED", "bold", "yellow") + f"  {now}, on {enforcing} alone"]

    def _interface_lines(self) -> list[str]:
        rows = sorted(self._interfaces, key=lambda row: fields.text(row, "state") == "attached")  # what is missing stands first
        mixed = len({fields.text(row, "mode") for row in rows}) > 1
        shown = rows[:SHOWN_INTERFACES] if len(rows) > SHOWN_INTERFACES + 1 else rows
        lines = []
        for row in shown:
            state = fields.text(row, "state")
            parts: list[Cell] = [(safe(state), "green" if state == "attached" else "red")]
            if state == "attached":
                parts += [safe(fields.text(row, key)) for key in (("attach", "mode") if mixed else ("attach",))]
                parts += [("link down", "yellow")] if fields.value(row, "up") is False else []
            said = [fields.text(row, "reason"), *fields.texts(row, "notes")[:1]]
            lines += self._line(safe(fields.text(row, "name")) + " ", parts + [safe(text) for text in said if text])
        if len(rows) > len(shown):
            lines += self._line("", [f"and {len(rows) - len(shown)} more interfaces"])
        return lines

    def _mode(self) -> list[str]:
        if fields.text(self._document, "mode_source") != "operator":
            return []
        return self._line("mode", [f"set by xdpmonctl; the files say {safe(fields.text(self._document, 'file_mode'))}"])

    def traffic(self) -> list[str]:
        rates = fields.value(self._document, "rates") or {}
        packets, dropped = fields.number(rates, "packets_per_second"), fields.number(rates, "dropped_per_second")
        parts: list[Cell] = [f"{short(packets)} packets/s", f"{short_bytes(fields.number(rates, 'bytes_per_second'))}/s"]
        parts.append((f"{short(dropped)}/s dropped ({percent(dropped, packets)})", "red") if dropped else "none dropped")
        if interval := fields.number(rates, "interval_seconds"):
            parts.append(f"over {span(interval)}")
        return self._line("traffic", parts)

    def history(self, windows: Sequence[Document]) -> list[str]:
        """The packets of the last windows as bars, yellow where some were dropped and red where most were. By the second: a late window is
        longer."""
        if not windows:
            return []
        lengths = [max(fields.number(row, "ended") - fields.number(row, "started"), 0.001) for row in windows]
        rates = [fields.number(row, "packets") / length for row, length in zip(windows, lengths, strict=True)]
        what = f"most {short(max(rates))} packets/s in {plural(len(rates), 'window')} of {span(sorted(lengths)[len(lengths) // 2])}"
        room = max(1, self._width - LABEL - len(what) - 2)
        shown = list(zip(windows, bars(rates, unicode=self._unicode), strict=True))[-room:]
        runs = itertools.groupby(shown, key=lambda pair: _window_colour(pair[0]))
        painted = "".join(self._style("".join(bar for _, bar in run), colour) for colour, run in runs)
        return [f"{'windows':<{LABEL}}{painted}  {what}"]

    def _totals(self) -> list[str]:
        document = self._document

        def total(name: str, words: str, colour: str = "") -> list[Cell]:
            packets = fields.number(document, "totals", name, "packets")
            return [(f"{short(packets)} {words}", colour)] if packets else []

        packets = fields.number(document, "totals", "packets")
        return self._line("total", [
            f"{short(packets)} {'packet' if packets == 1 else 'packets'} in {span(self._counting_seconds())}",
            *total("dropped", "dropped", "red"),
            *total("denied_passed", "denied but let in", "yellow"),
            *total("logged", "unlisted"),
            *total("allowed", "allowed"),
            *total("essential", "essential"),
            *total("no_source", "without a source"),
        ])  # fmt: skip

    def _policy_and_tables(self) -> list[str]:
        tables = [] if self._tight else self._tables()
        flows = [] if self._tight else self._flows()
        return [
            *self._line("policy", self._policy()),
            *(self._line("tables", tables) if tables else []),
            *(self._line("flows", flows) if flows else []),
        ]

    def _flows(self) -> list[Cell]:
        """The records that are kept, and where those go that have ended; nothing where flows are off."""
        flows = fields.value(self._document, "flows")
        if not isinstance(flows, dict):
            return []
        capacity, collector = fields.number(flows, "capacity"), safe(fields.text(flows, "collector"))
        parts: list[Cell] = [f"{short(fields.number(flows, 'records'))} of {short(capacity)} records"]
        if collector:
            parts.append(f"{short(fields.number(flows, 'exported'))} sent to {collector}")
        if fields.value(flows, "reachable") is False:
            parts.append(("which cannot be reached", "red"))
        return parts

    def _ports(self, ports: Sequence[Document]) -> list[str]:
        """Those with the most sources."""
        shown = [row for row in ports if not fields.flag(row, "total")][:SHOWN_PORTS]
        parts: list[Cell] = [brief(row, unit=not at) for at, row in enumerate(shown)]
        return self._line("ports", parts) if parts else []

    def _counting_seconds(self) -> float:
        """How long the totals have been counted: over the daemon's own restarts."""
        since = fields.number(self._document, "counting_since")
        return max(0.0, self._now - since) if since else fields.number(self._document, "uptime_seconds")

    def _policy(self) -> list[Cell]:
        policy = fields.value(self._document, "policy") or {}
        parts: list[Cell] = [f"{fields.count(policy, 'deny'):,} denied", f"{fields.count(policy, 'allow'):,} allowed"]
        parts.append(f"others: {safe(fields.text(self._document, 'default'))}")
        if expiring := fields.count(policy, "expiring"):
            following = fields.number(policy, "next_expiry")
            parts.append(f"{expiring:,} for a time only" + (f" (next ends in {span(following - self._now)})" if following else ""))
        return parts

    def _tables(self) -> list[Cell]:
        """How full, and how large: the table of talkers has a slice for each CPU, and a card with one queue fills one of them."""
        talkers = fields.value(self._document, "tables", "talkers") or {}
        parts: list[Cell] = []
        if capacity := fields.number(talkers, "capacity"):
            entries = fields.number(talkers, "entries")
            parts.append(f"{short(entries)} of {short(capacity)} talkers ({percent(entries, capacity)})")
            slices = fields.rows(talkers, "slices")
            if len(slices) > 1:
                fullest = max(slices, key=lambda of: fields.number(of, "load"))
                parts.append(f"fullest CPU {percent(fields.number(fullest, 'load'), 1)}")
        if size := fields.number(self._document, "maps", "bytes"):
            parts.append(f"maps {short_bytes(size)}")
        return parts

    def _sources(self, most: int, legend: bool) -> list[str]:
        talkers = fields.rows(self._document, "top")[:most]
        window = fields.value(self._document, "window") or {}
        unique = sum(fields.count(window, "unique_sources", family) for family in ("ipv4", "ipv6"))
        since = fields.number(window, "started") or fields.number(self._document, "running_since")
        if not talkers:
            return ["", self._style("top sources", "bold") + ": nobody has sent anything lately"] if legend else []
        shown = columns("SOURCE", "TO", ">PACKETS", ">BYTES", ">SYNS", "VERDICT")
        body = [self._source(talker) for talker in talkers]
        rows: list[list[Cell]] = [[(column.title, "dim") for column in shown], *body] if legend else body
        widths = [max(len(cell if isinstance(cell, str) else cell[0]) for cell in column) for column in zip(*rows, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) > self._width:  # long IPv6 addresses: the column of SYNs gives way
            shown, rows, widths = shown[:4] + shown[5:], [row[:4] + row[5:] for row in rows], widths[:4] + widths[5:]
        lines = [format_row(self._style, shown, widths, row) for row in rows]
        if not legend:
            return ["", *lines]
        moment = time.strftime("%H:%M:%S", time.localtime(since))
        late = ", a late window" if fields.flag(window, "late") else ""
        about = "" if fields.value(window, "exact") is not False else "about " if fields.number(window, "error") else "≥ "
        title = "top sources" + (f" of {about}{unique:,}" if unique else "") + (f" since {moment}" if since else "") + late
        return ["", self._style(title, "bold"), *lines]

    def _source(self, talker: Document) -> list[Cell]:
        source, verdict = fields.text(talker, "source"), fields.text(talker, "verdict")
        return [
            safe(source) + (" (you)" if source in self._own else ""),
            target(talker),
            short(fields.number(talker, "packets")),
            short_bytes(fields.number(talker, "bytes")),
            short(fields.number(talker, "syns")),
            (safe(verdict), VERDICT_COLOURS.get(verdict, "")),
        ]

    def _losses(self) -> list[str]:
        """What the numbers above do not hold: in red what should not be, without alarm what is limited by design."""
        losses = fields.value(self._document, "losses") or {}
        books = fields.value(self._document, "books") or {}
        lines = []
        if fields.value(books, "balanced") is False:
            lines += self._line("books", ["the counters do not add up; please report it with: xdpmonctl status -j"], "bold", "red")
        queues = fields.value(losses, "queue_full")
        lost = _counted(losses, ring_full="events (ring full)")
        lost += _counted(queues, **{name: f"for {safe(name)} (queue full)" for name in queues}) if isinstance(queues, dict) else []
        for name, why in (("log_queue", "queue full"), ("log_disk", "not written")):
            of_logs = fields.value(losses, name)
            if isinstance(of_logs, dict):
                of_all = sum(fields.number(of_logs, path) for path in of_logs)
                lost += _counted({name: of_all}, **{name: f"for log files ({why})"})
        lost += _counted(losses, followers="for followers", influxdb="points for InfluxDB",
                         flow_cache="records of flows (no room)", ipfix="records of flows (not received)")  # fmt: skip
        if lost:
            lines += self._line("lost", lost, "bold", "red")
        packets = {name: fields.number(books, name, "packets") for name in ("evicted", "untracked")}
        if any(packets.values()):
            untold = _counted(packets, evicted="packets evicted", untracked="packets untracked")
            lines += self._line("lost", [*untold, "too many sources to list; totals are exact"], "bold", "red")
        limited = _counted(losses, over_budget="events over budget", merged="merged", journal_held_back="held back from the journal")
        if limited:
            lines += self._line("sampled", limited, "dim")
        forwarded = {"elsewhere": fields.number(books, "elsewhere", "packets")}
        if elsewhere := _counted(forwarded, elsewhere="packets to other hosts, not counted by source"):
            lines += self._line("elsewhere", elsewhere, "dim")
        anomalies = fields.value(self._document, "anomalies")
        odd = _counted(anomalies, **{name: safe(name) for name in anomalies}) if isinstance(anomalies, dict) else []
        if odd:
            lines += self._line("anomalies", odd, "yellow")
        return lines

    def _reload(self) -> list[str]:
        if fields.value(self._document, "last_reload", "ok") is not False:
            return []
        when = fields.number(self._document, "last_reload", "when")
        ago = f" {span(self._now - when)} ago" if when else ""
        text = f"refused{ago}: {safe(fields.text(self._document, 'last_reload', 'message'))} (the settings before it hold)"
        return self._line("reload", text.split(), "bold", "red", separator=" ")

    def _warnings(self) -> list[str]:
        """What the daemon thinks of its own configuration, such as that enforcing would drop all replies."""
        warnings = fields.texts(self._document, "configuration", "warnings")
        return [line for text in warnings for line in self._line("warning", safe(text).split(), "yellow", separator=" ")]

    def _hints(self) -> list[str]:
        """Commands to type next, the most urgent first, each with what it does where that fits."""
        document = self._document
        found: list[tuple[str, str]] = []
        if not self._attached:
            found.append(("journalctl -u xdpmond -n 20", "why no interface is attached"))
        confirm = fields.value(document, "confirm")
        if isinstance(confirm, dict):
            before = safe(fields.text(confirm, "mode") or "the one before")
            left = span(fields.number(confirm, "seconds_left"))
            found.append(("xdpmonctl confirm", f"keep this mode, or it goes back to {before} in {left}"))
        if fields.value(document, "last_reload", "ok") is False:
            found.append(("xdpmonctl check-config", "what is wrong with the files"))
        denied = fields.number(document, "totals", "denied_passed", "packets")
        # With default = "deny" that would also drop the answers to this host's own connections, and is refused.
        enforceable = fields.text(document, "default") != "deny"
        if self._attached and fields.text(document, "mode") == "monitor" and denied and enforceable:
            found.append(("xdpmonctl mode enforce --confirm 60s", "drop what is denied; undone unless confirmed"))
        for talker in fields.rows(document, "top"):
            source = fields.text(talker, "source")
            # A link-local source is a neighbour, often the router.
            if fields.text(talker, "verdict") == "log" and source not in self._own and not source.startswith("fe80:"):
                found.append((f"xdpmonctl explain {safe(source)}", "the busiest source on no list"))
                if fields.number(talker, "packets") >= BUSY_PACKETS:
                    found.append((f"xdpmonctl deny {safe(source)} --for 10m", "shut it out for ten minutes"))
                break
        found = found[:SHOWN_HINTS]
        widest = max((len(command) for command, _ in found), default=0)
        lines = []
        for index, (command, what) in enumerate(found):
            gap = 2 + (widest - len(command) if LABEL + widest + 2 + len(what) <= self._width else 0)
            aside = " " * gap + what if LABEL + len(command) + gap + len(what) <= self._width else ""
            lines.append(self._style(f"{'' if index else 'next':<{LABEL}}") + self._style(command, "cyan") + aside)
        return lines


def _counted(numbers: Document, **words: str) -> list[Cell]:
    """`12 k WORDS` for each of the keys whose number is not zero."""
    return [f"{short(fields.number(numbers, key))} {text}" for key, text in words.items() if fields.number(numbers, key)]


def _window_colour(window: Document) -> str:
    dropped = fields.number(window, "dropped")
    return "red" if 2 * dropped > fields.number(window, "packets") else "yellow" if dropped else "cyan"
