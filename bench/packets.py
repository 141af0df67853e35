"""The packet path: ns per packet by BPF_PROG_TEST_RUN's own duration, one hot packet, beside an empty program and xdp-filter.

The program is the shipped one, compiled by the daemon's loader with the default settings and table sizes: all accounting on, events on.
The policy has ten prefixes: the seven that the shipped file permits, and three denied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from xdpmond.config import Config
from xdpmond.kernel import libbpf
from xdpmond.kernel.datapath import NOTHING_KEPT, Datapath
from xdpmond.kernel.sockets import ephemeral_ports, port_flags
from xdpmond.model import Prefix, Verdict, parse_address

from . import peers
from .rows import Goal, Row, interleaved

TITLE = "packet path, one hot packet, 10 prefixes"
REPEAT = 1 << 20
"""Packets of one measurement."""

_LOOPBACK = 1
_ALLOW = ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7", "fe80::/10")
_DENY = ("203.0.113.0/24", "198.51.100.7", "2001:db8:bad::/48")
_NOT_SLOWER = Goal(1.2)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of packet, with a source for each way that the policy has."""

    name: str
    build: Callable[[str], Packet]
    permitted: str
    denied: str
    unlisted: str


_IPV4 = ("10.20.30.40", "203.0.113.9", "192.0.2.77")
_IPV6 = ("fd00::20:40", "2001:db8:bad::9", "2001:db8:77::7")


def _ethernet() -> Packet:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def _ipv4_udp(source: str) -> Packet:
    return _ethernet() / IP(src=source, dst="10.0.0.1") / UDP(sport=5353, dport=9) / Raw(bytes(18))


def _ipv4_tcp(source: str) -> Packet:
    return _ethernet() / IP(src=source, dst="10.0.0.1") / TCP(sport=44321, dport=443, flags="A")


def _vlan(source: str) -> Packet:
    return _ethernet() / Dot1Q(vlan=7) / IP(src=source, dst="10.0.0.1") / TCP(sport=44321, dport=443, flags="A")


def _ipv6_udp(source: str) -> Packet:
    return _ethernet() / IPv6(src=source, dst="fd00::1") / UDP(sport=5353, dport=9) / Raw(bytes(18))


KINDS = (
    Kind("IPv4 UDP", _ipv4_udp, *_IPV4),
    Kind("IPv4 TCP", _ipv4_tcp, *_IPV4),
    Kind("VLAN, IPv4 TCP", _vlan, *_IPV4),
    Kind("IPv6 UDP", _ipv6_udp, *_IPV6),
)


class _NoStore:
    def keep(self, name: str, fd: int) -> None: ...

    def forget(self, name: str) -> None: ...


def shipped_datapath(config: Config) -> Datapath:
    """The packet path as the daemon would have it on the loopback interface, through which test runs go, with the ten prefixes."""
    datapath = Datapath.open(config, NOTHING_KEPT, _NoStore())
    datapath.control.take_slot(_LOOPBACK, enforce=True)
    datapath.control.set_ephemeral(*ephemeral_ports())
    datapath.control.set_ports(port_flags(config.failsafe_ports))
    policy = {Prefix.parse(text): Verdict.ALLOW for text in _ALLOW} | {Prefix.parse(text): Verdict.DENY for text in _DENY}
    datapath.apply_policy(policy, (), Verdict.LOG)
    return datapath


def run_of(program: int, frame: bytes, action: int) -> Callable[[], float]:
    """A measurement of a program on a frame. It must come to the action that is measured."""

    def run() -> float:
        done = libbpf.test_run(program, frame, repeat=REPEAT, ifindex=_LOOPBACK)
        if done.action != action:
            raise AssertionError(f"XDP action {done.action} where {action} was to be measured")
        return float(done.nanoseconds)

    return run


def measure(rounds: int) -> Iterable[Row]:
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    datapath = shipped_datapath(Config())
    try:
        yield from _rows(datapath, rounds)
    finally:
        datapath.close()
        os.sched_setaffinity(0, cpus)


def _rows(datapath: Datapath, rounds: int) -> Iterable[Row]:
    ours = datapath.loaded.programs["xdpmond"]
    everything, addresses = peers.xdp_filter("all"), peers.xdp_filter("ip")
    first = KINDS[0]
    contestants = {"empty": run_of(peers.empty_drop(), bytes(first.build(first.permitted)), libbpf.XDP_DROP)}
    for kind in KINDS:
        permitted, denied, unlisted = (bytes(kind.build(source)) for source in (kind.permitted, kind.denied, kind.unlisted))
        family, address = parse_address(kind.denied)
        for name, peer in (("all", everything), ("ip", addresses)):
            peer.deny(family, address)
            contestants[f"{name} passes {kind.name}"] = run_of(peer.program, permitted, libbpf.XDP_PASS)
            contestants[f"{name} drops {kind.name}"] = run_of(peer.program, denied, libbpf.XDP_DROP)
        contestants[f"ours passes {kind.name}"] = run_of(ours, permitted, libbpf.XDP_PASS)
        contestants[f"ours drops {kind.name}"] = run_of(ours, denied, libbpf.XDP_DROP)
        contestants[f"ours reports {kind.name}"] = run_of(ours, unlisted, libbpf.XDP_PASS)
    medians = interleaved(contestants, rounds)
    _check_books(datapath, rounds)

    empty = medians["empty"]
    yield Row("empty program, XDP_DROP", empty, "ns")
    for kind in KINDS:
        for name, label in (("ip", "address features"), ("all", "all features")):
            for does in ("passes", "drops"):
                yield Row(f"xdp-filter, {label}, {does} {kind.name} (reference: empty)", medians[f"{name} {does} {kind.name}"], "ns", empty)
        for does, source, peer_does, goal in (
            ("passes", "permitted", "passes", _NOT_SLOWER),
            ("drops", "denied", "drops", _NOT_SLOWER),
            ("reports", "unlisted", "passes", None),
        ):
            name = f"xdpmond {does} {kind.name}, {source} (reference: xdp-filter, all features)"
            yield Row(name, medians[f"ours {does} {kind.name}"], "ns", medians[f"all {peer_does} {kind.name}"], goal)


def _check_books(datapath: Datapath, rounds: int) -> None:
    """What was measured must have been counted, packet for packet."""
    sent = len(KINDS) * 3 * (rounds + 1) * REPEAT
    tallies = datapath.tallies()
    counted = sum(total.count.packets for total in datapath.totals())
    if not sent == counted == tallies.sourced.packets:
        raise AssertionError(f"{sent} packets were sent, the totals have {counted}, the books {tallies.sourced.packets}")
    if tallies.evicted.packets or tallies.untracked.packets:
        raise AssertionError(f"evicted {tallies.evicted.packets}, untracked {tallies.untracked.packets}")
