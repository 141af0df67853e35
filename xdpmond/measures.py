"""What is measured, as families of measurements: the one list from which Prometheus, the text file and InfluxDB are served.

A family is one row of `FAMILIES`: its name, its kind, its labels, what it means, and how its samples follow from the numbers of one moment.
A name ends in its unit; a counter ends in `_total`. No address and no prefix is ever a label: how many series there are is bounded by the
configuration and by the machine, never by who sends packets.

What is counted in the kernel goes on over a restart of the daemon; the rest begins at 0 with the process. A counter never goes back while
the process lives: see `Meter`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from .config import Config
from .interfaces import InterfaceState
from .messages import Message
from .model import Count, Family, Mode, Origin, Outcome, PortRange, ProtocolClass, Total, Verdict, protocol_name
from .ports import PortCount, Unique, in_ranges, shown
from .rows import is_local, talker
from .windows import Window


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"


Sample = tuple[tuple[str, ...], float]
"""The values of the labels in their order, and the value: an int where the family is whole."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What came to ports in the last full window."""

    shown: Sequence[PortCount]
    """Those that have series of their own."""
    left_out: int
    """How many others there are, and what came to them together."""
    rest: Count
    not_listed: int
    """How many more were reached that the setting `ports` does not name."""


NO_PORTS = Ports((), 0, Count(), 0)


@dataclass(frozen=True, slots=True)
class Reloads:
    """How often the configuration was read again, and how that went. `last_good` is when it was last taken, at the start or since."""

    good: int = 0
    refused: int = 0
    last_good: float = 0.0
    ok: bool = True
    """Did the last one go well?"""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of the service at one moment, read one after the other while packets go on arriving. Times are seconds since the
    epoch."""

    at: float
    version: str
    started: float
    config: Config
    mode: Mode
    modes: Mapping[str, Mode]
    """By interface."""
    totals: Sequence[Total]
    tallies: Any
    facts: Mapping[str, Any]
    tracked: Count
    """What the talkers of all closed windows had."""
    entries: Mapping[tuple[Verdict, Origin], int]
    interfaces: Sequence[InterfaceState]
    losses: Mapping[str, Any]
    """By stage; a number, or several by where it was."""
    reloads: Reloads
    window: Window | None = None
    """The last full one."""
    ports: Ports = NO_PORTS
    """Chosen of those that it reached: see `Meter`."""
    late_windows: int = 0
    decided: Mapping[tuple[Verdict, Origin], Count] = field(default_factory=dict)
    """What entries have decided on in closed windows since the process began; at least so much."""
    messages: Mapping[Message, int] = field(default_factory=dict)
    bus_connected: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """A family with its samples."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    whole: bool
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A family as declared."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    of: Callable[[Numbers], Iterable[Sample]]
    whole: bool = True
    """Is each value a whole number? (Else InfluxDB must be told so from the first value on.)"""

    def measured(self, numbers: Numbers) -> Measured:
        return Measured(self.name, self.kind, self.help, self.labels, self.whole, tuple(self.of(numbers)))


FAMILIES: list[Row] = []
"""In the order in which they are shown."""


def _family(name: str, help: str, *labels: str, whole: bool = True) -> Callable[[Callable[[Numbers], Any]], Callable[[Numbers], Any]]:
    """Declare a row by the function that makes its samples: pairs of label values and value, or a bare value where there are no labels."""

    def declare(function: Callable[[Numbers], Any]) -> Callable[[Numbers], Any]:
        def samples(numbers: Numbers) -> Iterable[Sample]:
            found = function(numbers)
            return found if labels else () if found is None else [((), found)]

        kind = Kind.COUNTER if name.endswith("_total") else Kind.GAUGE
        FAMILIES.append(Row(f"xdpmond_{name}", kind, labels, " ".join(help.split()), samples, whole))
        return function

    return declare


# Packets

_OF_TOTALS = "interface", "family", "protocol", "verdict", "action"
_ORDINARY = [
    *((Family.IPV4, protocol) for protocol in (ProtocolClass.TCP, ProtocolClass.UDP, ProtocolClass.ICMP)),
    *((Family.IPV6, protocol) for protocol in (ProtocolClass.TCP, ProtocolClass.UDP, ProtocolClass.ICMPV6)),
]


def _totals(numbers: Numbers) -> dict[tuple[str, ...], Count]:
    """The totals by their labels. What is ordinary on an attached interface is there from the first moment on, as 0: a series that appears
    with its first packets would hide these from rates."""
    attached = [state.name for state in numbers.interfaces if state.state == "attached"]
    outcomes = dict.fromkeys((outcome.verdict, outcome.action) for outcome in Outcome if outcome.verdict)
    found: dict[tuple[str, ...], Count] = {
        (name, family.label, protocol.label, str(verdict), action.lower()): Count()
        for name in attached
        for family, protocol in _ORDINARY
        for verdict, action in outcomes
    }
    for cell in numbers.totals:
        verdict, action = cell.outcome.verdict or "none", cell.outcome.action
        labels = (cell.interface, cell.family.label, ProtocolClass(cell.protocol).label, str(verdict), action.lower())
        found[labels] = found.get(labels, Count()) + cell.count
    return found


@_family("packets_total", """
    Packets that arrived, each counted in the kernel. verdict: what the policy said of the source ("none": the frame has no readable
    source); action: what was done ("log": passed and reported). Sent frames are not counted. Goes on over a restart of the daemon.""",
    *_OF_TOTALS)  # fmt: skip
def _packets(numbers: Numbers) -> Iterator[Sample]:
    return ((labels, count.packets) for labels, count in _totals(numbers).items())


@_family("bytes_total", "Bytes of these packets: the length of the frames without their check sequence.", *_OF_TOTALS)
def _bytes(numbers: Numbers) -> Iterator[Sample]:
    return ((labels, count.bytes) for labels, count in _totals(numbers).items())


@_family("anomalies_total", """
    Packets with something odd about their headers, by what it was: fragments, headers that are cut short, extension headers without
    end.""", "kind")  # fmt: skip
def _anomalies(numbers: Numbers) -> Iterator[Sample]:
    return (((name,), number) for name, number in numbers.tallies.anomalies.items())


# The books: readable source = tracked + evicted + untracked + elsewhere, but for what the running window holds


@_family("sourced_packets_total", "Packets with a readable source: what the books are kept of.")
def _sourced_packets(numbers: Numbers) -> int:
    return int(numbers.tallies.sourced.packets)


@_family("sourced_bytes_total", "Bytes of these packets.")
def _sourced_bytes(numbers: Numbers) -> int:
    return int(numbers.tallies.sourced.bytes)


def _books(numbers: Numbers) -> dict[str, Count]:
    tallies = numbers.tallies
    return {"tracked": numbers.tracked, "evicted": tallies.evicted, "untracked": tallies.untracked, "elsewhere": tallies.elsewhere}


@_family("talker_packets_total", """
    Packets by how the table of talkers took them. tracked: read with their talker when a window had ended; evicted: their talker had to
    make room before it was read; untracked: no room was found; elsewhere: they were for other hosts, which destination = "local" leaves
    out. The books balance: these together are xdpmond_sourced_packets_total less what the running window holds.""",
    "state")  # fmt: skip
def _talker_packets(numbers: Numbers) -> Iterator[Sample]:
    return (((state,), count.packets) for state, count in _books(numbers).items())


@_family("talker_bytes_total", "Bytes of these packets.", "state")
def _talker_bytes(numbers: Numbers) -> Iterator[Sample]:
    return (((state,), count.bytes) for state, count in _books(numbers).items())


# Windows, sources, ports


@_family("windows_total", "Windows that have ended since the counting in the kernel began.")
def _windows(numbers: Numbers) -> int | None:
    return numbers.window.number if numbers.window else None


@_family("windows_late_total", "Windows that the daemon ended noticeably later than it should have. They are longer; nothing is missing.")
def _windows_late(numbers: Numbers) -> int:
    return numbers.late_windows


@_family("window_wanted_seconds", "The length that windows should have.", whole=False)
def _window_wanted(numbers: Numbers) -> float:
    return numbers.config.window


@_family("window_seconds", "The length of the last full window. Absent until there is one, as all that is told of it.", whole=False)
def _window_seconds(numbers: Numbers) -> float | None:
    return round(numbers.window.seconds, 3) if numbers.window else None


@_family("window_ended_timestamp_seconds", "When the last full window ended, in seconds since 1970.", whole=False)
def _window_ended(numbers: Numbers) -> float | None:
    return round(numbers.window.ended, 3) if numbers.window else None


@_family("window_exact", """
    Are the numbers of sources of the last full window exact? 1: every packet found its talker. 0: they are estimates (see
    xdpmond_sources_error_ratio), or of ports without a sketch of their own lower bounds.""")  # fmt: skip
def _window_exact(numbers: Numbers) -> int | None:
    return int(numbers.window.exact) if numbers.window else None


@_family("sources_error_ratio", """
    The relative standard error of xdpmond_window_sources: 0 where it is exact.""", whole=False)  # fmt: skip
def _error(numbers: Numbers) -> float | None:
    return numbers.window.unique.error or 0.0 if numbers.window else None


@_family("window_sources", """
    Distinct source addresses in the last full window, each once, whatever they sent and wherever they are.""", "family")  # fmt: skip
def _window_sources(numbers: Numbers) -> Iterable[Sample]:
    if numbers.window is None:
        return ()
    return ((("ipv4",), numbers.window.unique.ipv4), (("ipv6",), numbers.window.unique.ipv6))


@_family("port_sources", """
    Distinct source addresses that reached a port in the last full window. A source on several ports counts on each. There is no
    port="other" here: a source that reached two of the ports that are left out would count twice; xdpmond_window_sources has each
    once. port: a number, of which the first of ip_local_port_range stands for all of that range on which nobody listens; "type 8"
    of ICMP; "none" where there is none to read.""", "family", "protocol", "port")  # fmt: skip
def _port_sources(numbers: Numbers) -> Iterator[Sample]:
    for port in numbers.ports.shown:
        of = _sources(numbers, port)
        yield from (((family, *_name(port)), number) for family, number in (("ipv4", of.ipv4), ("ipv6", of.ipv6)) if number)


@_family("port_packets", """
    Packets to a port in the last full window. Those to the ports that are left out stand together as protocol="other", port="other".""",
    "protocol", "port")  # fmt: skip
def _port_packets(numbers: Numbers) -> Iterator[Sample]:
    ports = numbers.ports
    yield from ((_name(port), _count(numbers, port).packets) for port in ports.shown)
    if ports.left_out:
        yield ("other", "other"), ports.rest.packets


@_family("port_bytes", "Bytes of these packets.", "protocol", "port")
def _port_bytes(numbers: Numbers) -> Iterator[Sample]:
    ports = numbers.ports
    yield from ((_name(port), _count(numbers, port).bytes) for port in ports.shown)
    if ports.left_out:
        yield ("other", "other"), ports.rest.bytes


@_family("ports", """
    Ports that were reached in the last full window, by whether they have series of their own (shown), have none because there are
    more than metrics.max_ports (left_out), or because the setting ports does not name them (not_listed).""", "state")  # fmt: skip
def _ports(numbers: Numbers) -> Iterable[Sample]:
    if numbers.window is None:
        return ()
    of = numbers.ports
    return ((("shown",), len(of.shown)), (("left_out",), of.left_out), (("not_listed",), of.not_listed))


def _name(port: PortCount) -> tuple[str, str]:
    """The labels protocol and port."""
    number = f"type {port.icmp_type}" if port.icmp_type is not None else "none" if port.port is None else str(port.port)
    return protocol_name(port.protocol), number


def _sources(numbers: Numbers, port: PortCount) -> Unique:
    return shown(port.sources, port.local, with_local=numbers.config.show_local)


def _count(numbers: Numbers, port: PortCount) -> Count:
    return port.count if numbers.config.show_local else port.count - port.local_count


_TRANSPORTS = {6: "TCP", 17: "UDP", 132: "SCTP"}


def _active_users(numbers: Numbers) -> Iterator[Sample]:
    for port in numbers.ports.shown:
        transport, of = _TRANSPORTS.get(port.protocol), _sources(numbers, port)
        if transport and port.port is not None:
            for network, sources in (("IPv4", of.ipv4), ("IPv6", of.ipv6)):
                if sources:
                    yield (network, transport, str(port.port)), sources


ACTIVE_USERS = Row(
    "active_users",
    Kind.GAUGE,
    ("network", "transport", "port"),
    "Distinct source addresses that reached a port in the last full window: xdpmond_port_sources as xdp-ip-counter names it, for dashboards"
    " made for that. Only with metrics.active_users = true.",
    _active_users,
)
"""Not among the families: offered on request."""


# The policy

_ORIGINS = [(verdict, origin) for verdict in (Verdict.ALLOW, Verdict.DENY) for origin in Origin]


@_family("policy_info", """
    Always 1. mode: what holds where no interface has its own; file_mode: what the files say; default: for sources on no list.""",
    "mode", "file_mode", "default")  # fmt: skip
def _policy_info(numbers: Numbers) -> Iterator[Sample]:
    yield (str(numbers.mode), str(numbers.config.mode), str(numbers.config.default)), 1


@_family("policy_entries", "Entries of the policy.", "verdict", "origin")
def _entries(numbers: Numbers) -> Iterator[Sample]:
    return (((verdict, origin), numbers.entries[verdict, origin]) for verdict, origin in _ORIGINS)


@_family("policy_entries_capacity", "The most entries that the policy can have (tables.prefixes).")
def _entries_capacity(numbers: Numbers) -> int:
    return numbers.config.tables.prefixes


@_family("rule_packets_total", """
    Packets that an entry decided on, by the verdict and the origin of the entry, in windows that ended since the daemon was started. At
    least so many: what cannot be attributed to one entry, as in a window in which the policy changed, is in no series here. Packets
    that no entry covers are not in it either.""", "verdict", "origin")  # fmt: skip
def _rule_packets(numbers: Numbers) -> Iterator[Sample]:
    return (((verdict, origin), numbers.decided.get((verdict, origin), Count()).packets) for verdict, origin in _ORIGINS)


@_family("rule_bytes_total", "Bytes of these packets.", "verdict", "origin")
def _rule_bytes(numbers: Numbers) -> Iterator[Sample]:
    return (((verdict, origin), numbers.decided.get((verdict, origin), Count()).bytes) for verdict, origin in _ORIGINS)


# Events and losses


@_family("events_total", "Samples of packets that were made for the journal, the logs and followers.")
def _events(numbers: Numbers) -> int:
    return int(numbers.tallies.events_made)


@_family("lost_total", """
    What was not kept or not passed on, by the stage that lost it. In the kernel: ring (full buffer of events), budget (events over
    events.per_second), merged (numbers of suppressed packets whose place another source took). In the daemon: queue_full (records for the
    journal), journal_held_back (on purpose), followers, log_queue, log_disk (events for log files), influxdb (points), flow_cache and
    ipfix (records of flows).""", "stage")  # fmt: skip
def _lost(numbers: Numbers) -> Iterator[Sample]:
    tallies = numbers.tallies
    for stage, number in {"ring": tallies.ring_full, "budget": tallies.over_budget, "merged": tallies.merged, **numbers.losses}.items():
        yield (stage,), sum(number.values()) if isinstance(number, Mapping) else number


@_family("messages_total", "Messages to the journal or the terminal, by kind, without those that are samples of packets.", "message")
def _messages(numbers: Numbers) -> Iterator[Sample]:
    return (((kind.name.lower(),), numbers.messages.get(kind, 0)) for kind in Message if not kind.of_packet)


# Tables


@_family("talker_table_entries", """
    Talkers in the table. It has a slice for each possible CPU; a card with one queue fills one of them.""", "slice")  # fmt: skip
def _table_entries(numbers: Numbers) -> Iterator[Sample]:
    return (((str(number),), entries) for number, entries in enumerate(numbers.facts["talkers_occupied"]))


@_family("talker_table_slice_capacity", "The talkers that each slice has room for.")
def _table_capacity(numbers: Numbers) -> int:
    return int(numbers.facts["talkers_capacity"] // len(numbers.facts["talkers_occupied"]))


@_family("talker_evictions_total", "Talkers that had to make room for others within their window.")
def _evictions(numbers: Numbers) -> int:
    return int(numbers.tallies.evictions)


@_family("map_bytes", "Memory that a table in the kernel takes, beside that of the process.", "map")
def _map_bytes(numbers: Numbers) -> Iterator[Sample]:
    return (((cost.name,), cost.bytes) for cost in numbers.facts["maps"])


# Interfaces


@_family("interface_attached", "Is the program attached to an interface that shall be watched?", "interface")
def _attached(numbers: Numbers) -> Iterator[Sample]:
    return (((state.name,), int(state.state == "attached")) for state in numbers.interfaces)


@_family("interface_up", "Is the interface up?", "interface")
def _up(numbers: Numbers) -> Iterator[Sample]:
    return (((state.name,), int(state.up)) for state in numbers.interfaces)


@_family("interface_info", "Always 1. state: attached, waiting or refused; attach: native or generic; mode: monitor or enforce.",
         "interface", "state", "attach", "mode", "layer")  # fmt: skip
def _interface_info(numbers: Numbers) -> Iterator[Sample]:
    for state in numbers.interfaces:
        yield (state.name, state.state, state.attach, str(numbers.modes.get(state.name, "")), state.layer), 1


# The daemon itself


@_family("build_info", "Always 1, with the version of the daemon.", "version")
def _build_info(numbers: Numbers) -> Iterator[Sample]:
    yield (numbers.version,), 1


@_family("start_timestamp_seconds", "When the daemon was started, in seconds since 1970.", whole=False)
def _started(numbers: Numbers) -> float:
    return round(numbers.started, 3)


@_family("counting_since_timestamp_seconds", "When the counting in the kernel began, in seconds since 1970: what a restart does not end.",
         whole=False)  # fmt: skip
def _counting_since(numbers: Numbers) -> float:
    return round(float(numbers.facts["counting_since"]), 3)


@_family("read_timestamp_seconds", "When these numbers were read, in seconds since 1970.", whole=False)
def _read(numbers: Numbers) -> float:
    return round(numbers.at, 3)


@_family("reloads_total", "How often the configuration was read again, by whether it was taken (good) or not (refused).", "result")
def _reloads(numbers: Numbers) -> Iterator[Sample]:
    return iter(((("good",), numbers.reloads.good), (("refused",), numbers.reloads.refused)))


@_family("last_reload_successful", "Was the configuration taken when it was read last?")
def _last_reload(numbers: Numbers) -> int:
    return int(numbers.reloads.ok)


@_family("last_reload_success_timestamp_seconds", "When the configuration that holds was read, in seconds since 1970.", whole=False)
def _last_good(numbers: Numbers) -> float:
    return round(numbers.reloads.last_good, 3)


@_family("bus_connected", "Is the daemon on the bus, where xdpmonctl can reach it? (Also 0 with bus.enable = false.)")
def _bus(numbers: Numbers) -> int:
    return int(numbers.bus_connected)


SERIES = Row("xdpmond_series", Kind.GAUGE, (), "Series that are told here, this one included.", lambda numbers: ())
"""Follows from all others."""


class Meter:
    """Makes families of numbers, one set after another, and remembers what one set alone cannot tell.

    A counter never goes back. It would where a place in the kernel's totals changes hands: its count is then another interface's. What such
    a series has shown stays, and only what is added to it counts from there on.
    """

    def __init__(self) -> None:
        self._before: dict[str, dict[tuple[str, ...], tuple[float, float]]] = {}
        """What was read and what was shown, of each counter."""
        self._keys: frozenset[int] = frozenset()
        """The ports that had series of their own."""
        self._chosen: tuple[object, Ports] | None = None
        """From what they were chosen, and what came of it."""

    def measure(self, numbers: Numbers) -> list[Measured]:
        if numbers.window is not None:
            numbers = replace(numbers, ports=self._choose(numbers.window, numbers.config))
        rows = [*FAMILIES, ACTIVE_USERS] if numbers.config.metrics.active_users else FAMILIES
        found = [self._steady(row.measured(numbers)) for row in rows]
        series = 1 + sum(len(family.samples) for family in found)
        return [*found, Measured(SERIES.name, SERIES.kind, SERIES.help, (), True, (((), series),))]

    def _choose(self, window: Window, config: Config) -> Ports:
        """Those with the most sources; where these are equal, those first that were there before: what a scan leaves on each port of
        thousands shall not make new series in every window."""
        source = (window.number, window.ended, config.metrics.max_ports, config.show_local)
        if self._chosen is None or self._chosen[0] != source:
            cells, most = window.ports.cells, config.metrics.max_ports
            names = ("ipv4", "ipv6", "packets", "bytes")
            of = {name: cells["all"][name] - (0 if config.show_local else cells["local"][name]) for name in names}
            known = np.isin(cells["key"], np.fromiter(self._keys, "u4", len(self._keys)))
            order = np.lexsort((of["packets"], known, of["ipv4"] + of["ipv6"]))[::-1]
            order = order[(of["packets"] > 0)[order]]
            first, rest = cells["key"][order[:most]].tolist(), order[most:]
            self._keys = frozenset(first)
            count = Count(int(of["packets"][rest].sum()), int(of["bytes"][rest].sum()))
            self._chosen = source, Ports([window.ports.of(key) for key in first], len(rest), count, len(window.ports.others))
        return self._chosen[1]

    def _steady(self, family: Measured) -> Measured:
        if family.kind is not Kind.COUNTER:
            return family
        known = self._before.setdefault(family.name, {})
        samples = []
        for labels, value in family.samples:
            read, shown = known.get(labels, (0, 0))
            shown += max(value - read, 0)
            known[labels] = (value, shown)
            samples.append((labels, shown))
        return Measured(family.name, family.kind, family.help, family.labels, family.whole, tuple(samples))


# The list of sources

_LISTED_AT_A_TIME = 512


def source_list(rows: np.ndarray, ranges: Sequence[PortRange] = (), *, with_local: bool = True) -> Iterator[bytes]:
    """Talkers with a port as a JSON array, in pieces: `[{"ip", "network", "transport", "port"}, ...]`, one for each address and port.
    `ranges`: of these ports alone; none: of all."""
    begin = b"["
    for at in range(0, len(rows), _LISTED_AT_A_TIME):
        part = rows[at : at + _LISTED_AT_A_TIME]
        wanted = in_ranges(part["protocol"].astype("u4") << 16 | part["port"], ranges)
        if not with_local:
            wanted &= ~is_local(part)
        items = []
        for row in part[wanted]:
            of = talker(row)
            transport = _TRANSPORTS.get(of.protocol)
            if transport and of.port is not None:
                network = "IPv4" if of.family is Family.IPV4 else "IPv6"
                items.append({"ip": of.source, "network": network, "transport": transport, "port": of.port})
        if items:
            yield begin + json.dumps(items)[1:-1].encode()
            begin = b", "
    yield b"]\n" if begin == b", " else b"[]\n"
