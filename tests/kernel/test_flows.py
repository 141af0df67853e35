"""A table of flows: what a flow says, which talker it belongs to, and that its windows are exact."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, IPv6, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from xdpmond.flowrows import merge_flows, talkers_of
from xdpmond.kernel import abi, libbpf, loader
from xdpmond.kernel.maps import monotonic_ns, wait_for_packets_under_way
from xdpmond.model import Count, Family, Outcome, Verdict
from xdpmond.rows import count_of

from .harness import ROUNDS, Guns, Harness, by_key
from .packets import MAC

TABLES = {"sets": 2048, "flows": True}

SOURCE, HERE = "198.51.100.7", "192.0.2.1"


@pytest.fixture
def quiet(datapath: Harness) -> Harness:
    datapath.default(Verdict.ALLOW)
    datapath.close_window()
    return datapath


def frame(packet: Packet, padding: int = 0) -> bytes:
    return bytes(Ether(**MAC) / packet) + b"\xee" * padding


def tcp(source_port: int, port: int = 443, flags: str = "A", to: str = HERE, source: str = SOURCE) -> bytes:
    return frame(IP(src=source, dst=to) / TCP(sport=source_port, dport=port, flags=flags))


def running(datapath: Harness) -> np.ndarray:
    return datapath.talkers.read_running_flows(datapath.control.window)


def closed(datapath: Harness) -> np.ndarray:
    """The flows of the window, which ends."""
    number = datapath.control.close_window()
    wait_for_packets_under_way()
    flows = datapath.talkers.read_closed_flows(number)
    count = count_of(flows)
    datapath.control.window_read(number, count.packets, count.bytes)
    datapath.sketches.clear(number)
    return flows


def by_ports(flows: np.ndarray) -> Mapping[tuple[int, int], int]:
    return {(int(flow["source_port"]), int(flow["port"])): int(flow["packets"]) for flow in flows}


def test_what_a_flow_says(quiet: Harness) -> None:
    before = monotonic_ns() / 1e9
    quiet.policy(deny=["198.51.100.0/24"])
    for flags in ("S", "A", "PA", "FA"):
        quiet.send(tcp(40001, 443, flags))
    quiet.enforce()
    quiet.send(tcp(40001, 443, "R"))
    after = monotonic_ns() / 1e9
    for flow in (running(quiet)[0], closed(quiet)[0]):
        assert (flow["family"], flow["protocol"]) == (Family.IPV4, 6)
        assert (flow["source_port"], flow["port"], flow["talker_port"]) == (40001, 443, 443)
        assert flow["source"].tobytes() == bytes([198, 51, 100, 7]) + bytes(12)
        assert flow["destination"].tobytes() == bytes([192, 0, 2, 1]) + bytes(12)
        assert (flow["packets"], flow["bytes"], flow["ip_bytes"], flow["syns"]) == (5, 5 * 54, 5 * 40, 1)
        assert flow["tcp_flags"] == 0x02 | 0x10 | 0x08 | 0x01 | 0x04
        assert (flow["outcome"], flow["slot"]) == (Outcome.DENIED_DROPPED, quiet.slot)
        unit, offset = 2**abi.SEEN_SHIFT / 1e9, time.time() - time.monotonic()
        assert before - 2 * unit <= flow["first_seen"] - offset <= flow["last_seen"] - offset <= after + 2 * unit
    assert not len(running(quiet)) and not len(closed(quiet))


def test_each_part_of_the_5_tuple_makes_a_flow(quiet: Harness) -> None:
    frames = [
        tcp(1000), tcp(1001), tcp(1000, 80), tcp(1000, to="192.0.2.2"), tcp(1000, source="198.51.100.8"),
        frame(IP(src=SOURCE, dst=HERE) / UDP(sport=1000, dport=443)),
        frame(IPv6(src="c633:6407::", dst="c000:201::") / TCP(sport=1000, dport=443)),
        frame(IPv6(src="c633:6407::", dst="c000:201::1") / TCP(sport=1000, dport=443)),
        frame(IPv6(src="c633:6407::", dst="c000:201::1:0:0:1") / TCP(sport=1000, dport=443)),
    ]  # fmt: skip
    for number, sent in enumerate(frames, 1):
        for _ in range(number):
            quiet.send(sent)
    flows = running(quiet)
    assert sorted(flows["packets"].tolist()) == list(range(1, len(frames) + 1))
    assert by_key(quiet.running()) == {
        (SOURCE, 6, 443): (1 + 2 + 4, 7 * 54, 0), (SOURCE, 6, 80): (3, 3 * 54, 0), ("198.51.100.8", 6, 443): (5, 5 * 54, 0),
        (SOURCE, 17, 443): (6, 6 * 42, 0), ("c633:6407::", 6, 443): (7 + 8 + 9, 24 * 74, 24),
    }  # fmt: skip
    rows = talkers_of(flows)
    assert by_key(rows) == by_key(quiet.running())
    assert by_key(quiet.close_window()) == by_key(rows)


def test_ports_of_talkers_fold_and_those_of_flows_do_not(quiet: Harness) -> None:
    for port in (40000, 40001, 40002):
        quiet.send(tcp(443, port))
    flows = closed(quiet)
    assert by_ports(flows) == {(443, port): 1 for port in (40000, 40001, 40002)}
    assert set(flows["talker_port"].tolist()) == {32768}
    assert by_key(talkers_of(flows)) == {(SOURCE, 6, 32768): (3, 3 * 54, 0)}


def test_icmp_has_a_type_and_a_code(quiet: Harness) -> None:
    quiet.send(frame(IP(src=SOURCE, dst=HERE) / ICMP(type=3, code=1)))
    quiet.send(frame(IP(src=SOURCE, dst=HERE) / ICMP(type=3, code=3)))
    quiet.send(frame(IPv6(src="2001:db8::7", dst="2001:db8::1") / ICMPv6EchoReply()))
    flows = closed(quiet)
    assert sorted(zip(flows["protocol"].tolist(), flows["port"].tolist(), flows["source_port"].tolist(), strict=True)) == [
        (1, 4, 1), (1, 4, 3), (58, 130, 0),
    ]  # fmt: skip
    assert by_key(talkers_of(flows)) == {(SOURCE, 1, 4): (2, 84, 0), ("2001:db8::7", 58, 130): (1, 62, 0)}


def jumbo(length: int) -> bytes:
    """The packet does not say how long it is."""
    return frame(IPv6(src="2001:db8::7", dst="2001:db8::1", plen=0) / UDP(sport=1, dport=2) / Raw(bytes(length)))


@pytest.mark.parametrize(
    ("sent", "ip_bytes"),
    [
        (frame(IP(src=SOURCE, dst=HERE) / TCP(), padding=6), 40),
        (bytes(Ether(**MAC) / Dot1Q(vlan=5) / Dot1Q(vlan=6) / IP(src=SOURCE, dst=HERE) / UDP() / Raw(b"x" * 100)), 128),
        (frame(IPv6(src="2001:db8::7", dst="2001:db8::1") / IPv6ExtHdrHopByHop() / UDP(), padding=10), 56),
        (jumbo(200), 40 + 8 + 200),
        (frame(IP(src=SOURCE, dst=HERE, len=9000) / UDP()), 28),  # it says more than there is
        (frame(IP(src=SOURCE, dst=HERE) / UDP())[:30], 16),  # cut short
    ],
    ids=["padding", "two tags", "IPv6", "jumbogram", "a lie", "short"],
)
def test_the_bytes_of_ip(quiet: Harness, sent: bytes, ip_bytes: int) -> None:
    for _ in range(2):
        quiet.send(sent)
    (flow,) = closed(quiet)
    assert (flow["bytes"], flow["ip_bytes"]) == (2 * len(sent), 2 * ip_bytes)


def test_the_bytes_of_ip_without_a_link_header(quiet: Harness) -> None:
    sent = bytes(IP(src=SOURCE, dst=HERE) / UDP() / Raw(b"x" * 10))
    quiet.send(sent, program="xdpmond_ip")
    (flow,) = closed(quiet)
    assert flow["bytes"] == flow["ip_bytes"] == 38


def test_flags_and_bytes_belong_to_their_window(quiet: Harness) -> None:
    quiet.send(tcp(1000, flags="S"))
    quiet.send(tcp(1001, flags="S"))
    number = quiet.control.close_window()
    quiet.send(tcp(1000, flags="FA"))
    wait_for_packets_under_way()
    for _ in range(2):
        flows = quiet.talkers.read_closed_flows(number)
        assert {flow["source_port"].item(): (flow["tcp_flags"].item(), flow["ip_bytes"].item()) for flow in flows} == {
            1000: (2, 40), 1001: (2, 40),
        }  # fmt: skip
    assert [(int(flow["tcp_flags"]), int(flow["syns"])) for flow in running(quiet)] == [(0x11, 0)]
    quiet.control.window_read(number, 2, 108)
    assert [int(flow["tcp_flags"]) for flow in closed(quiet)] == [0x11]
    closed(quiet)
    quiet.send(tcp(1000, flags="R"))
    assert [int(flow["tcp_flags"]) for flow in closed(quiet)] == [4]


def test_events_are_by_source_and_port(quiet: Harness) -> None:
    """Not by flow: a source that opens connection after connection makes one event in an interval."""
    quiet.default(Verdict.LOG)
    quiet.control.set_events(3600, 1_000_000)
    for port in range(2000, 2010):
        quiet.send(tcp(port, 8443, source="198.51.100.99"))
    assert len(quiet.drain()) == 1


def test_flows_of_one_source_under_fire(quiet: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """From all CPUs over many windows: of each flow, the windows together hold exactly what was sent."""
    frames = [tcp(1000 + number, 443, "S" if number % 2 else "A") for number in range(200)]
    found: Counter[int] = Counter()
    tracked, before = quiet.control.tracked, quiet.counters.tallies()
    with shoot(quiet, frames, cpus) as guns:
        for window in range(100 * ROUNDS):
            flows = closed(quiet)
            for flow in flows:
                found[int(flow["source_port"])] += int(flow["packets"])
                assert flow["tcp_flags"] == (2 if flow["source_port"] % 2 else 16)
                assert (flow["bytes"], flow["ip_bytes"]) == (54 * flow["packets"], 40 * flow["packets"])
            running(quiet)
            assert guns.running()
            if window >= ROUNDS and len(found) == len(frames):
                break
        shot = guns.stop()
    for flow in merge_flows(closed(quiet), closed(quiet)):
        found[int(flow["source_port"])] += int(flow["packets"])
    assert [found[1000 + number] for number in range(200)] == shot.sent.tolist()
    after = quiet.counters.tallies()
    assert (after.untracked, after.evicted) == (before.untracked, before.evicted)
    assert quiet.control.tracked - tracked == Count(int(shot.sent.sum()), 54 * int(shot.sent.sum()))


def test_what_is_off_is_not_compiled_in(quiet: Harness) -> None:
    without = Harness(dataclasses.replace(quiet.build, flows=False))
    try:
        assert libbpf.map_info(without.loaded.maps["talkers"])[2] * 4 == libbpf.map_info(quiet.loaded.maps["talkers"])[2]
        for name in (loader.ETHERNET, loader.IP):
            assert libbpf.instruction_count(without.loaded.program(name)) < libbpf.instruction_count(quiet.loaded.program(name))
    finally:
        without.close()
