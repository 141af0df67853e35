"""The packet path as it is shipped, in the benchmark's hands: loaded by the daemon's loader, given a policy, run, and its books checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from xdpmond.config import Config
from xdpmond.kernel import libbpf
from xdpmond.kernel.datapath import NOTHING_KEPT, Datapath
from xdpmond.kernel.maps import map_memory
from xdpmond.kernel.sockets import ephemeral_ports, port_flags
from xdpmond.model import Count, Entry, Family, Origin, Outcome, Prefix, Verdict, parse_address
from xdpmond.policy import Policy
from xdpmond.prefixes import Bulk

from .compiled import Compiled, compiled
from .lists import Addresses, Prefixes

LOOPBACK = 1
"""Through it test runs go."""
REPEAT = 1 << 20
"""Packets of one measurement."""

HERE, HERE6 = "10.0.0.1", "fd00::1"
"""This host's own addresses, to which all packets go."""

ALLOW = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7", "fe80::/10")
DENY = ("203.0.113.0/24", "198.51.100.7", "2001:db8:bad::/48")
"""With what the shipped file allows, a policy of ten prefixes."""


def load_policy(datapath: Datapath, allow: Iterable[Prefix], deny: Iterable[Prefix], default: Verdict = Verdict.LOG) -> None:
    """Make this the policy; by default other sources are reported and passed, as shipped."""
    listed = [(prefix, verdict) for prefixes, verdict in ((allow, Verdict.ALLOW), (deny, Verdict.DENY)) for prefix in prefixes]
    datapath.apply_policy(Policy(Entry(prefix, verdict, Origin.OPERATOR) for prefix, verdict in listed), None, default)


def load_ten(datapath: Datapath) -> None:
    load_policy(datapath, map(Prefix.parse, ALLOW), map(Prefix.parse, DENY))


def load_denied(datapath: Datapath, prefixes: Prefixes) -> None:
    """Make a policy that denies these, made in columns as from a file of them."""
    denied = Bulk(prefixes.columns(), Verdict.DENY, Origin.OPERATOR)
    datapath.apply_policy(Policy().with_bulk(denied), None, Verdict.LOG)


class _NoStore:
    def keep(self, name: str, fd: int) -> None: ...

    def forget(self, name: str) -> None: ...


@contextmanager
def shipped_datapath(config: Config, interface: int = LOOPBACK) -> Iterator[Datapath]:
    """The packet path as the daemon would have it on an interface that enforces."""
    datapath = Datapath.open(config, NOTHING_KEPT, _NoStore())
    try:
        datapath.control.take_slot(interface, enforce=True)
        datapath.control.set_ephemeral(*ephemeral_ports())
        datapath.set_ports(port_flags(config.failsafe_ports))
        datapath.set_addresses(parse_address(text) for text in (HERE, HERE6))
        yield datapath
    finally:
        datapath.close()


@contextmanager
def pinned(cpu: int, *, alone: bool = True) -> Iterator[None]:
    """Keep the calling thread on a CPU, and let hardly anybody else have it: what is measured is time that passes."""
    before, priority = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    os.sched_setaffinity(0, {cpu})
    if alone:
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, priority)
        os.sched_setaffinity(0, before)


_FIRST = -20


# Frames


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of packet, with a source for each way that the policy of ten prefixes has."""

    name: str
    build: Callable[[str], Packet]
    permitted: str
    denied: str
    unlisted: str


_IPV4 = ("10.20.30.40", "203.0.113.9", "192.0.2.77")
_IPV6 = ("fd00::20:40", "2001:db8:bad::9", "2001:db8:77::7")
UDP_PORT = 9


def _ethernet() -> Packet:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def _ipv4_udp(source: str) -> Packet:
    return _ethernet() / IP(src=source, dst=HERE) / UDP(sport=5353, dport=UDP_PORT) / Raw(bytes(18))


def _ipv4_tcp(source: str) -> Packet:
    return _ethernet() / IP(src=source, dst=HERE) / TCP(sport=44321, dport=443, flags="A")


def _vlan(source: str) -> Packet:
    return _ethernet() / Dot1Q(vlan=7) / IP(src=source, dst=HERE) / TCP(sport=44321, dport=443, flags="A")


def _ipv6_udp(source: str) -> Packet:
    return _ethernet() / IPv6(src=source, dst=HERE6) / UDP(sport=5353, dport=UDP_PORT) / Raw(bytes(18))


KINDS = (
    Kind("IPv4 UDP", _ipv4_udp, *_IPV4),
    Kind("IPv4 TCP", _ipv4_tcp, *_IPV4),
    Kind("VLAN, IPv4 TCP", _vlan, *_IPV4),
    Kind("IPv6 UDP", _ipv6_udp, *_IPV6),
)
UDP_OF = {Family.IPV4: KINDS[0], Family.IPV6: KINDS[3]}


def udp_frame(family: Family) -> bytes:
    """Of the packet whose source is rewritten."""
    kind = UDP_OF[family]
    return bytes(kind.build(kind.unlisted))


# Runs


def test_run(program: int, frame: bytes, action: int | None, repeat: int = REPEAT, ifindex: int = LOOPBACK) -> float:
    """ns a packet. With one packet all over, each must come to the action."""
    done = libbpf.test_run(program, frame, repeat=repeat, ifindex=ifindex)
    if action is not None and done.action != action:
        raise AssertionError(f"XDP action {done.action} where {action} was to be measured")
    return float(done.nanoseconds)


class Vary:
    """A program in front of another that gives each packet its source: from `sources` in random order, or else a new one each."""

    def __init__(self, family: Family, sources: Addresses | None, target: int | None = None, ifindex: int = LOOPBACK):
        name = f"{'flood' if sources is None else 'vary'}_{family.label}"
        array = f"sources_{family.label}"
        number = len(sources) if sources is not None else 1
        self._loaded: Compiled = compiled("vary.c", [name, "drop"], [array, "position", "target"], SOURCES=number)
        self._program, self.drop = self._loaded.programs[name], self._loaded.programs["drop"]
        self.frame = udp_frame(family)
        self._ifindex = ifindex
        if sources is not None:
            write_sources(self._loaded.maps[array], sources)
        else:
            # Each CPU has a share of all addresses for itself.
            cpus = libbpf.possible_cpus()
            libbpf.update(self._loaded.maps["position"], np.zeros(1, "u4"), np.arange(cpus, dtype="u8") * ((1 << 32) // cpus))
        libbpf.update(self._loaded.maps["target"], np.zeros(1, "u4"), np.array([self.drop if target is None else target], "u4"))

    def run(self, repeat: int = REPEAT) -> float:
        return test_run(self._program, self.frame, None, repeat, self._ifindex)

    def close(self) -> None:
        self._loaded.close()


def write_sources(map_fd: int, sources: Addresses) -> None:
    """Fill the array from which programs/vary.c takes the sources, in random order. Their number is a power of two."""
    assert len(sources) & (len(sources) - 1) == 0, "the program takes the lower bits of its position"
    size = 8 if sources.family is Family.IPV4 else 16
    memory = np.frombuffer(map_memory(map_fd, len(sources) * size, write=True), "u1", len(sources) * size)
    order = np.random.default_rng(len(sources)).permutation(len(sources))
    memory.reshape(-1, size)[:] = sources.packed()[order, :size]


def drain(datapath: Datapath) -> None:
    """Take the events, as the daemon would: what finds the ring full costs less."""
    while datapath.ring is not None and len(datapath.ring.read()):
        pass


@dataclass
class Measured:
    """Runs of many packets through a path, and what became of these packets in its books."""

    datapath: Datapath
    vary: Vary
    outcome: str | None
    """That all of them must have come to, if all should come to the same: a name of `model.Outcome`."""
    warm: int
    """Packets before each measurement, so that its table holds what it would hold after a while."""
    sourced: int = 0
    evicted: int = 0
    untracked: int = 0
    taken: list[float] = field(default_factory=list)

    def run(self) -> float:
        # What another kind of run left in the table is of an older window, and makes room.
        self.datapath.close_window()
        drain(self.datapath)
        before, totals = self.datapath.tallies(), outcomes(self.datapath)
        self.vary.run(self.warm)
        nanoseconds = self.vary.run()
        after = self.datapath.tallies()
        sent = self.warm + REPEAT
        changed = {name: count - totals.get(name, 0) for name, count in outcomes(self.datapath).items() if count != totals.get(name, 0)}
        if sum(changed.values()) != sent or (self.outcome and changed != {self.outcome: sent}):
            raise AssertionError(f"of {sent} packets the totals have {changed}, where {self.outcome or 'any outcome'} was to be measured")
        self.sourced += after.sourced.packets - before.sourced.packets
        self.evicted += after.evicted.packets - before.evicted.packets
        self.untracked += after.untracked.packets - before.untracked.packets
        return nanoseconds

    @property
    def tracked(self) -> float:
        """Percent."""
        return 100 * (1 - (self.evicted + self.untracked) / self.sourced)

    @property
    def losses(self) -> str:
        return f"evicted {100 * self.evicted / self.sourced:.2g} %, untracked {100 * self.untracked / self.sourced:.2g} %"


def outcomes(datapath: Datapath) -> Mapping[str, int]:
    """Packets by outcome, from the exact totals."""
    found: dict[str, int] = {}
    for total in datapath.totals():
        found[total.outcome.name] = found.get(total.outcome.name, 0) + total.count.packets
    return found


def check_books(datapath: Datapath, sent: int | None = None) -> None:
    """Totals of what had a source = tracked + evicted + untracked, packet for packet and byte for byte; and, if told, what was sent."""
    datapath.close_window()
    tallies, tracked = datapath.tallies(), datapath.control.tracked
    sourceless = Outcome.NO_SOURCE, Outcome.UNREADABLE_DROPPED
    totals = sum((total.count for total in datapath.totals() if total.outcome not in sourceless), Count())
    books = tracked + tallies.evicted + tallies.untracked
    if not totals == tallies.sourced == books or (sent is not None and totals.packets != sent):
        raise AssertionError(
            f"sent {sent}, totals {totals}, sourced {tallies.sourced}, tracked {tracked} + evicted {tallies.evicted} + untracked "
            f"{tallies.untracked} = {books}"
        )
