"""The C parser against a second one in Python and against scapy, on packets that hypothesis makes and on damaged ones.

What the parser read is seen from outside: in the event, in the talker table, in the anomalies and the totals.
"""

from __future__ import annotations

import socket

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from xdpmond.kernel import abi, libbpf
from xdpmond.model import Family, Outcome

from . import packets, reference
from .harness import EXAMPLES, Harness, by_key
from .reference import View

SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def address_text(family: Family, address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if family is Family.IPV4 else socket.AF_INET6, address)


def check_event(datapath: Harness, frame: bytes, program: str = "xdpmond", *, ethernet: bool = True) -> View:
    """Run one frame, and compare the event, the talker and the anomalies with the reference."""
    view = reference.read(frame, ethernet=ethernet)
    note(f"frame {frame.hex()}\nreference {view}")
    before = datapath.counters.tallies()
    assert datapath.send(frame, program=program) == libbpf.XDP_PASS
    after = datapath.counters.tallies()
    events = datapath.drain()
    anomalies = {name: count - before.anomalies[name] for name, count in after.anomalies.items() if count != before.anomalies[name]}
    assert anomalies == {name: view.anomalies.count(name) for name in view.anomalies}
    sourced = after.sourced - before.sourced
    if view.family is Family.OTHER:
        assert (sourced.packets, len(events)) == (0, 0)
        return view
    assert (sourced.packets, sourced.bytes, len(events)) == (1, len(frame), 1)
    event = events[0]
    assert event["family"] == (abi.FAMILY_IPV4 if view.family is Family.IPV4 else abi.FAMILY_IPV6)
    assert event["source"].tobytes() == view.source.ljust(16, b"\0")
    assert event["destination"].tobytes() == view.destination.ljust(16, b"\0")
    assert event["protocol"] == view.protocol
    assert bool(event["has_ports"]) == (view.ports is not None)
    assert (event["source_port"], event["destination_port"]) == (view.ports or (0, 0))
    assert event["vlan"] == (abi.VLAN_NONE if view.vlan is None else view.vlan)
    assert event["tcp_flags"] == view.tcp_flags
    assert event["packet_size"] == len(frame)
    assert event["outcome"] == Outcome.DEFAULT_LOGGED
    port = view.ports[1] if view.ports else abi.PORT_NONE
    folded = 32768 if 32768 <= port <= 60999 else port
    if view.icmp:
        folded = view.icmp[0] + 1
    row = by_key(datapath.running()).get((address_text(view.family, view.source), view.protocol, 0 if folded == abi.PORT_NONE else folded))
    assert row is not None, "no talker of this key"
    return view


def check_scapy(view: View, frame: bytes, *, ethernet: bool = True) -> bool:
    """What scapy's own dissection says must be what the reference says, wherever the two do not differ by right. True if it had ports."""
    if view.scapy_differs:
        return False
    addresses = reference.scapy_addresses(frame, ethernet=ethernet)
    if addresses is not None:
        assert addresses == (view.family, address_text(view.family, view.source), address_text(view.family, view.destination))
    ports = reference.scapy_ports(frame, ethernet=ethernet)
    if ports is not None:
        assert view.ports is not None
        assert ports == (view.protocol, *view.ports)
    icmp = reference.scapy_icmp(frame, ethernet=ethernet)
    if icmp is not None and not view.later:
        assert view.icmp == (icmp if (view.family, view.protocol) in reference.WITH_TYPES else None)
    return ports is not None


@SETTINGS
@given(frame=packets.frames())
def test_whole_packets(datapath: Harness, frame: bytes) -> None:
    """On a packet that scapy built it must find all that we find: nothing is excused by its having given up."""
    view = check_event(datapath, frame)
    found = check_scapy(view, frame)
    if view.ports and not view.scapy_differs:
        assert found, "scapy read no ports where we did"


@SETTINGS
@given(frame=packets.frames())
def test_the_totals_of_whole_packets(datapath: Harness, frame: bytes) -> None:
    view = reference.read(frame)
    seen = datapath.run(frame)
    assert (seen.family, seen.protocol_class, seen.size) == (view.family, view.protocol_class, len(frame))
    assert seen.outcome is (Outcome.DEFAULT_LOGGED if view.family else Outcome.NO_SOURCE)


@SETTINGS
@given(data=st.data())
def test_damaged_packets(datapath: Harness, data: st.DataObject) -> None:
    frame = data.draw(packets.mutated(data.draw(packets.frames()), start=12))
    check_scapy(check_event(datapath, frame), frame)


@SETTINGS
@given(frame=st.binary(min_size=14, max_size=120), kind=st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8"]))
def test_random_bytes(datapath: Harness, frame: bytes, kind: bytes) -> None:
    frame = frame[:12] + kind + frame[14:]
    check_scapy(check_event(datapath, frame), frame)


@SETTINGS
@given(data=st.data())
def test_damaged_packets_without_a_link_header(datapath: Harness, data: st.DataObject) -> None:
    packet = data.draw(packets.ip_packets())
    if data.draw(st.booleans()):
        packet = data.draw(packets.mutated(packet))
    view = check_event(datapath, packet, "xdpmond_ip", ethernet=False)
    assert view.vlan is None
    check_scapy(view, packet, ethernet=False)


DENIED_IPV4 = ["192.0.2.1", "192.0.2.200"]
DENIED_IPV6 = ["2001:db8:dead::1", "2001:db8:dead:beef::"]


@pytest.fixture
def denying(datapath: Harness) -> Harness:
    datapath.policy(deny=["192.0.2.0/24", "2001:db8:dead::/48", "fe80::/10"])
    datapath.enforce()
    return datapath


@SETTINGS
@given(data=st.data())
def test_nothing_behind_its_address_lets_a_denied_source_in(denying: Harness, data: st.DataObject) -> None:
    """No exception: the hop limit of these is never 255 and none of the sources is link-local."""
    packet = data.draw(st.one_of(packets.ipv4_packets(st.sampled_from(DENIED_IPV4)),
                                 packets.ipv6_packets(st.sampled_from(DENIED_IPV6), hop_limits=(1, 64, 254))))  # fmt: skip
    link = data.draw(packets.links().filter(lambda link: len(link) <= 22))
    frame = bytes(link / packet)
    end = reference.source_end(frame)
    damaged = data.draw(packets.mutated(frame, start=end, least=end))
    note(f"frame {frame.hex()}, damaged {damaged.hex()}")
    assert damaged[:end] == frame[:end]
    assert denying.send(damaged) == libbpf.XDP_DROP
    assert [event["outcome"] for event in denying.drain()] == [Outcome.DENIED_DROPPED]


@SETTINGS
@given(data=st.data())
def test_only_what_the_link_needs_gets_in_from_a_denied_source(denying: Harness, data: st.DataObject) -> None:
    """With the exceptions: neighbour discovery and router advertisements that no router forwarded, DHCPv6 answers from the link."""
    sources = st.sampled_from([*DENIED_IPV6, "fe80::1", "fe80::dead"])
    frame = bytes(data.draw(packets.links().filter(lambda link: len(link) <= 22)) / data.draw(packets.ipv6_packets(sources)))
    end = reference.source_end(frame)
    damaged = data.draw(packets.mutated(frame, start=end, least=end))
    view = reference.read(damaged)
    note(f"damaged {damaged.hex()}, {view}")
    essential = view.essential == "always"
    if essential:
        assert (view.protocol == 58 and view.hop_limit == 255) or (view.ports == (547, 546) and view.source[:2] == b"\xfe\x80")
    assert denying.send(damaged) == (libbpf.XDP_PASS if essential else libbpf.XDP_DROP)


@pytest.mark.parametrize("layer", ["ipv4", "ipv6"])
def test_every_truncation_of_a_denied_packet(denying: Harness, layer: str) -> None:
    """Byte by byte: what holds the whole source is dropped; what does not, passes and is counted so."""
    if layer == "ipv4":
        packet = packets.IP(src="192.0.2.1", dst="198.51.100.1") / packets.TCP(dport=22)
    else:
        packet = packets.IPv6(src="2001:db8:dead::1", dst="2001:db8::1") / packets.IPv6ExtHdrHopByHop() / packets.UDP(dport=53)
    frame = bytes(packets.Ether(**packets.MAC) / packet)
    end = reference.source_end(frame)
    for length in range(14, len(frame) + 1):
        cut = frame[:length]
        action = denying.send(cut)
        assert action == (libbpf.XDP_DROP if length >= end else libbpf.XDP_PASS), f"at {length} bytes"
