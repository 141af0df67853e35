"""Verdict, action, totals and talker of each kind of header, one frame at a time; what keeps a host reachable; sizes."""

from __future__ import annotations

import functools
import operator
import socket

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import DHCP6_Reply
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLQuery,
    ICMPv6MLReport,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    RouterAlert,
)
from scapy.layers.ipsec import AH, ESP
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from xdpmond.kernel import abi, libbpf
from xdpmond.model import Family, Outcome, ProtocolClass, Verdict

from . import namespaces
from .harness import Harness, by_key
from .namespaces import Namespace
from .packets import MAC, ipv6_packet

V4, V6 = "198.51.100.7", "2001:db8::7"
HOST4, HOST6 = "192.0.2.1", "2001:db8::1"


def ether(**fields: object) -> Packet:
    return Ether(**MAC, **fields)


def ip(**fields: object) -> Packet:
    return IP(src=V4, dst=HOST4, **fields)


def ipv6(*chain: Packet, number: int, transport: Packet) -> Packet:
    return ipv6_packet(V6, HOST6, 64, list(chain), transport, number, b"")


TAG = Dot1Q(vlan=100)
EIGHT_TAGS = functools.reduce(operator.truediv, [Dot1Q(vlan=0)] * 8)
UDP53 = UDP(sport=5000, dport=53)
PAD = {"options": [PadN(optdata=b"\0" * 4)]}

IPV4, IPV6, NO_IP, Class = Family.IPV4, Family.IPV6, Family.OTHER, ProtocolClass

# name: frame, family, class, protocol, destination port or None, vlan or None, anomalies
HEADERS: dict[str, tuple[Packet, Family, ProtocolClass, int, int | None, int | None, tuple[str, ...]]] = {
    "tcp": (ether() / ip() / TCP(dport=443), IPV4, Class.TCP, 6, 443, None, ()),
    "udp": (ether() / ip() / UDP53, IPV4, Class.UDP, 17, 53, None, ()),
    "sctp": (ether() / ip() / SCTP(dport=3868), IPV4, Class.SCTP, 132, 3868, None, ()),
    "icmp": (ether() / ip() / ICMP(), IPV4, Class.ICMP, 1, None, None, ()),
    "gre": (ether() / ip() / GRE(), IPV4, Class.OTHER, 47, None, None, ()),
    "esp": (ether() / ip() / ESP(spi=1, data=b"x" * 16), IPV4, Class.OTHER, 50, None, None, ()),
    "port 0": (ether() / ip() / TCP(dport=0), IPV4, Class.TCP, 6, 0, None, ()),
    "802.1Q": (ether() / TAG / ip() / UDP53, IPV4, Class.UDP, 17, 53, 100, ()),
    "vlan 0": (ether() / Dot1Q(vlan=0, prio=5) / ip() / UDP53, IPV4, Class.UDP, 17, 53, 0, ()),
    "vlan 4095": (ether() / Dot1Q(vlan=4095) / ip() / UDP53, IPV4, Class.UDP, 17, 53, 4095, ()),
    "QinQ": (ether() / Dot1AD(vlan=7) / TAG / ip() / UDP53, IPV4, Class.UDP, 17, 53, 7, ()),
    "QinQ and IPv6": (ether() / Dot1AD(vlan=7) / TAG / ipv6(number=17, transport=UDP53), IPV6, Class.UDP, 17, 53, 7, ()),
    "three tags": (ether() / Dot1AD(vlan=7) / TAG / TAG / ip() / UDP53, IPV4, Class.UDP, 17, 53, 7, ()),
    "eight tags": (ether() / EIGHT_TAGS / ip() / UDP53, IPV4, Class.UDP, 17, 53, 0, ()),
    "nine tags": (ether() / EIGHT_TAGS / TAG / ip() / UDP53, NO_IP, Class.NON_IP, 0, None, None, ("vlan_depth",)),
    "options": (ether() / ip(options=[IPOption_RR(routers=["0.0.0.0"] * 9)]) / UDP53, IPV4, Class.UDP, 17, 53, None, ()),
    "first fragment": (ether() / ip(flags="MF") / UDP53, IPV4, Class.UDP, 17, 53, None, ()),
    "later fragment": (ether() / ip(frag=185, proto=17) / Raw(bytes(UDP53)), IPV4, Class.UDP, 17, None, None,
                       ("later_fragment",)),
    "ARP": (ether() / ARP(psrc=V4, pdst=HOST4, hwsrc=MAC["src"]), NO_IP, Class.ARP, 0, None, None, ()),
    "tagged ARP": (ether() / TAG / ARP(psrc=V4, pdst=HOST4, hwsrc=MAC["src"]), NO_IP, Class.ARP, 0, None, None, ()),
    "LLDP": (ether(type=0x88CC) / Raw(b"x" * 40), NO_IP, Class.NON_IP, 0, None, None, ()),
    "802.3": (Raw(bytes(12) + b"\0\x26" + b"\x42\x42\3" + bytes(35)), NO_IP, Class.NON_IP, 0, None, None, ()),
    "IPv6 tcp": (ether() / ipv6(number=6, transport=TCP(dport=22)), IPV6, Class.TCP, 6, 22, None, ()),
    "IPv6 sctp": (ether() / ipv6(number=132, transport=SCTP(dport=3868)), IPV6, Class.SCTP, 132, 3868, None, ()),
    "ICMPv6": (ether() / ipv6(number=58, transport=ICMPv6EchoRequest()), IPV6, Class.ICMPV6, 58, None, None, ()),
    "no next header": (ether() / ipv6(number=59, transport=Raw(b"")), IPV6, Class.OTHER, 59, None, None, ()),
    "hop-by-hop": (ether() / ipv6(IPv6ExtHdrHopByHop(**PAD), number=17, transport=UDP53), IPV6, Class.UDP, 17, 53, None, ()),
    "destination options": (ether() / ipv6(IPv6ExtHdrDestOpt(**PAD), number=17, transport=UDP53), IPV6, Class.UDP, 17, 53, None,
                            ()),
    "routing": (ether() / ipv6(IPv6ExtHdrRouting(addresses=[HOST6, V6]), number=17, transport=UDP53), IPV6, Class.UDP, 17, 53,
                None, ()),
    "AH": (ether() / ipv6(AH(payloadlen=4, icv=b"\1" * 12), number=17, transport=UDP53), IPV6, Class.UDP, 17, 53, None, ()),
    "IPv6 first fragment": (ether() / ipv6(IPv6ExtHdrFragment(m=1, offset=0), number=17, transport=UDP53), IPV6, Class.UDP, 17, 53,
                            None, ()),
    "IPv6 later fragment": (ether() / ipv6(IPv6ExtHdrFragment(m=1, offset=9), number=17, transport=UDP53), IPV6, Class.UDP, 17,
                            None, None, ("later_fragment",)),
    "RFC 8200 order": (ether() / ipv6(IPv6ExtHdrHopByHop(**PAD), IPv6ExtHdrDestOpt(**PAD), IPv6ExtHdrRouting(addresses=[V6]),
                                      IPv6ExtHdrFragment(m=1), AH(payloadlen=4, icv=b"\1" * 12), IPv6ExtHdrDestOpt(**PAD), number=6,
                                      transport=TCP(dport=25)), IPV6, Class.TCP, 6, 25, None, ()),
    "eight headers": (ether() / ipv6(*[IPv6ExtHdrDestOpt(**PAD) for _ in range(8)], number=17, transport=UDP53), IPV6, Class.UDP,
                      17, 53, None, ()),
    "nine headers": (ether() / ipv6(*[IPv6ExtHdrDestOpt(**PAD) for _ in range(9)], number=17, transport=UDP53), IPV6, Class.OTHER,
                     60, None, None, ("extension_depth",)),
}  # fmt: skip

# Frames cut short, by the frame's whole length.
SHORT: dict[str, tuple[Packet, int, Family, ProtocolClass, tuple[str, ...]]] = {
    "link header alone": (ether() / ip() / TCP(), 14, NO_IP, Class.NON_IP, ("short_ip",)),
    "half a tag": (ether() / TAG / ip() / TCP(), 16, NO_IP, Class.NON_IP, ("short_frame",)),
    "IPv4 before its source ends": (ether() / ip() / TCP(), 29, NO_IP, Class.NON_IP, ("short_ip",)),
    "IPv4 behind its source": (ether() / ip() / TCP(), 30, IPV4, Class.TCP, ("short_ip",)),
    "IPv6 before its source ends": (ether() / ipv6(number=6, transport=TCP()), 37, NO_IP, Class.NON_IP, ("short_ip",)),
    "IPv6 behind its source": (ether() / ipv6(number=6, transport=TCP()), 38, IPV6, Class.TCP, ("short_ip",)),
    "options cut": (ether() / ip(options=[IPOption_RR(routers=["0.0.0.0"] * 3)]) / TCP(), 40, IPV4, Class.TCP, ("ip_length",)),
    "no transport": (ether() / ip() / TCP(), 34, IPV4, Class.TCP, ("short_transport",)),
    "half the ports": (ether() / ip() / UDP53, 37, IPV4, Class.UDP, ("short_transport",)),
    "half an extension header": (ether() / ipv6(IPv6ExtHdrHopByHop(**PAD), number=6, transport=TCP()), 58, IPV6, Class.OTHER,
                                 ("short_extension",)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_each_header(datapath: Harness, name: str) -> None:
    packet, family, protocol_class, protocol, port, vlan, anomalies = HEADERS[name]
    frame = bytes(packet)
    seen = datapath.run(frame)
    assert seen.action == libbpf.XDP_PASS
    assert (seen.family, seen.protocol_class, seen.size, seen.anomalies) == (family, protocol_class, len(frame), anomalies)
    if family is Family.OTHER:
        assert seen.outcome is Outcome.NO_SOURCE
        assert not len(seen.events)
        assert seen.sourced.packets == 0
        return
    assert seen.outcome is Outcome.DEFAULT_LOGGED
    assert (seen.sourced.packets, seen.sourced.bytes) == (1, len(frame))
    event = seen.event
    assert event["protocol"] == protocol
    assert (int(event["destination_port"]) if event["has_ports"] else None) == port
    assert event["vlan"] == (abi.VLAN_NONE if vlan is None else vlan)
    assert event["packet_size"] == len(frame)
    source = V4 if family is Family.IPV4 else V6
    types = {"icmp": 8, "ICMPv6": 128}
    assert (source, protocol, types[name] + 1 if name in types else port or 0) in by_key(datapath.running())


@pytest.mark.parametrize("name", SHORT)
def test_short_frames(datapath: Harness, name: str) -> None:
    packet, length, family, protocol_class, anomalies = SHORT[name]
    seen = datapath.run(bytes(packet)[:length])
    assert seen.action == libbpf.XDP_PASS
    assert (seen.family, seen.protocol_class, seen.size, seen.anomalies) == (family, protocol_class, length, anomalies)
    if family is not Family.OTHER:
        assert not seen.event["has_ports"]


def test_a_port_is_read_from_within_the_packet_alone(datapath: Harness) -> None:
    """Padding behind the packet's own length is not a transport header, on either family."""
    four = bytes(ether() / ip(len=22) / TCP(dport=22))
    six = bytearray(bytes(ether() / ipv6(number=6, transport=TCP(dport=22))))
    six[18:20] = b"\0\3"
    for frame in (four, bytes(six)):
        seen = datapath.run(frame)
        assert seen.anomalies == ("short_transport",)
        assert not seen.event["has_ports"]


@pytest.mark.parametrize("bit", range(13))
def test_any_bit_of_the_fragment_offset(datapath: Harness, bit: int) -> None:
    four = ether() / ip(frag=1 << bit, proto=6) / Raw(bytes(TCP(dport=22)))
    six = ether() / ipv6(IPv6ExtHdrFragment(offset=1 << bit), number=6, transport=TCP(dport=22))
    for frame in (four, six):
        seen = datapath.run(bytes(frame))
        assert (seen.anomalies, seen.event["has_ports"], seen.event["protocol"]) == (("later_fragment",), 0, 6)


def test_the_port_flags_of_tcp(datapath: Harness) -> None:
    assert datapath.run(bytes(ether() / ip() / TCP(dport=80, flags="SEC"))).event["tcp_flags"] == 0xC2
    cut = datapath.run(bytes(ether() / ip() / TCP(dport=80, flags="S"))[:46])
    assert (cut.event["destination_port"], cut.event["tcp_flags"], cut.anomalies) == (80, 0, ("short_transport",))


@pytest.mark.parametrize("size", [14, 60, 1514, 3000, 9014])
def test_the_size_is_that_of_the_frame(datapath: Harness, size: int) -> None:
    """Up to a jumbo frame, which test runs hold in several buffers as drivers do."""
    header = bytes(ether() / IP(src=V4, dst=HOST4, len=max(size - 14, 28)) / UDP53)
    seen = datapath.run(header[:size].ljust(size, b"x"))
    assert seen.size == size
    if size >= 60:
        assert (seen.event["packet_size"], seen.event["destination_port"]) == (size, 53)


def test_a_denied_jumbo_frame_is_dropped(datapath: Harness) -> None:
    datapath.policy(deny=["198.51.100.0/24"])
    datapath.enforce()
    frame = bytes(ether() / ip() / UDP53 / Raw(b"x" * 8972))
    assert len(frame) == 9014
    seen = datapath.run(frame)
    assert (seen.action, seen.outcome, seen.size) == (libbpf.XDP_DROP, Outcome.DENIED_DROPPED, 9014)


# Policy: allow 10.0.0.0/8, deny 198.51.100.0/24, and their IPv6 counterparts. The verdict and the action of each pair of mode and default.
LISTED = {"allow": ["10.0.0.0/8", "fd00::/8"], "deny": ["198.51.100.0/24", "2001:db8::/64"]}
SOURCES = {"allow": ("10.1.2.3", "fd00::1"), "deny": (V4, V6), "": ("203.0.113.9", "2001:db8:1::1")}
UNLISTED = {
    ("allow", False): Outcome.DEFAULT_ALLOWED, ("allow", True): Outcome.DEFAULT_ALLOWED,
    ("log", False): Outcome.DEFAULT_LOGGED, ("log", True): Outcome.DEFAULT_LOGGED,
    ("deny", False): Outcome.DEFAULT_DENIED_PASSED, ("deny", True): Outcome.DEFAULT_DENIED_DROPPED,
}  # fmt: skip
REPORTED = {
    Outcome.DENIED_PASSED,
    Outcome.DENIED_DROPPED,
    Outcome.DEFAULT_LOGGED,
    Outcome.DEFAULT_DENIED_PASSED,
    Outcome.DEFAULT_DENIED_DROPPED,
}


@pytest.mark.parametrize("listed", SOURCES)
@pytest.mark.parametrize("default", Verdict)
@pytest.mark.parametrize("enforce", [False, True])
def test_verdict_and_action(datapath: Harness, enforce: bool, default: Verdict, listed: str) -> None:
    datapath.policy(**LISTED)
    datapath.default(default)
    datapath.enforce(enforce)
    if listed == "allow":
        expected = Outcome.ALLOWED
    elif listed == "deny":
        expected = Outcome.DENIED_DROPPED if enforce else Outcome.DENIED_PASSED
    else:
        expected = UNLISTED[default.value, enforce]
    v4, v6 = SOURCES[listed]
    for network in (IP(src=v4, dst=HOST4), IPv6(src=v6, dst=HOST6)):
        seen = datapath.run(bytes(ether() / network / TCP(dport=443, flags="S")))
        assert seen.outcome is expected
        assert seen.action == (libbpf.XDP_DROP if expected.action.value == "DROP" else libbpf.XDP_PASS)
        assert len(seen.events) == (expected in REPORTED)


def test_frames_without_a_source_pass_in_the_strictest_mode(datapath: Harness) -> None:
    datapath.default(Verdict.DENY)
    datapath.enforce()
    for name in ("ARP", "LLDP", "802.3"):
        assert datapath.run(bytes(HEADERS[name][0])).action == libbpf.XDP_PASS


def test_more_tags_than_are_followed_hide_nobody(datapath: Harness) -> None:
    """Linux takes off any number of tags with the id 0. What may be behind them is dropped where denied packets are, and counted."""
    frame = bytes(HEADERS["nine tags"][0])
    seen = datapath.run(frame)
    assert (seen.action, seen.outcome) == (libbpf.XDP_PASS, Outcome.NO_SOURCE)
    datapath.enforce()
    seen = datapath.run(frame)
    assert (seen.action, seen.outcome, seen.family) == (libbpf.XDP_DROP, Outcome.UNREADABLE_DROPPED, Family.OTHER)
    assert (seen.anomalies, seen.sourced.packets, len(seen.events)) == (("vlan_depth",), 0, 0)
    datapath.policy(deny=[f"{V4}/32"])
    for name in ("802.1Q", "three tags", "eight tags"):
        assert datapath.run(bytes(HEADERS[name][0])).outcome is Outcome.DENIED_DROPPED


LINK_LOCAL = "fe80::1234"


def discovery(packet: Packet, hop_limit: int = 255, source: str = LINK_LOCAL) -> Packet:
    return ether() / IPv6(src=source, dst="ff02::1", hlim=hop_limit) / packet


def listener_query(source: str = LINK_LOCAL, hop_limit: int = 1, packet: Packet | None = None) -> Packet:
    alert = IPv6ExtHdrHopByHop(options=[RouterAlert()])
    return ether() / ipv6_packet(source, "ff02::1", hop_limit, [alert], packet or ICMPv6MLQuery(), 58, b"")


def dhcp_answer(**ports: int) -> Packet:
    return ether() / IP(src=V4, dst="255.255.255.255") / UDP(**({"sport": 67, "dport": 68} | ports)) / BOOTP(op=2) / DHCP(options=["end"])


def dhcpv6_answer(source: str = LINK_LOCAL, sport: int = 547, dport: int = 546) -> Packet:
    return ether() / IPv6(src=source, dst="fe80::2") / UDP(sport=sport, dport=dport) / DHCP6_Reply()


# name: frame, passes a deny by name, passes the default's deny
ESSENTIAL: dict[str, tuple[Packet, bool, bool]] = {
    "router advertisement": (discovery(ICMPv6ND_RA()), True, True),
    "neighbour solicitation": (discovery(ICMPv6ND_NS()), True, True),
    "neighbour advertisement": (discovery(ICMPv6ND_NA()), True, True),
    "solicitation of an address being tried": (discovery(ICMPv6ND_NS(), source="::"), True, True),
    "advertisement from a global address": (discovery(ICMPv6ND_NA(), source="2001:db8::9"), True, True),
    "router advertisement, forwarded": (discovery(ICMPv6ND_RA(), 254), False, False),
    "neighbour solicitation, forwarded": (discovery(ICMPv6ND_NS(), 254), False, False),
    "neighbour advertisement, forwarded": (discovery(ICMPv6ND_NA(), 254), False, False),
    "router solicitation": (discovery(ICMPv6ND_RS()), False, False),
    "redirect": (discovery(ICMPv6ND_Redirect()), False, False),
    "echo request": (discovery(ICMPv6EchoRequest()), False, False),
    "fragmented router advertisement": (
        ether() / ipv6_packet(LINK_LOCAL, "ff02::1", 255, [IPv6ExtHdrFragment(m=1)], ICMPv6ND_RA(), 58, b""), False, False),
    "router advertisement behind a header": (
        ether() / ipv6_packet(LINK_LOCAL, "ff02::1", 255, [IPv6ExtHdrHopByHop(**PAD)], ICMPv6ND_RA(), 58, b""), True, True),
    "router advertisement in an atomic fragment": (
        ether() / ipv6_packet(LINK_LOCAL, "ff02::1", 255, [IPv6ExtHdrFragment(m=0)], ICMPv6ND_RA(), 58, b""), True, True),
    "multicast listener query": (listener_query(), True, True),
    "multicast listener query, forwarded": (listener_query(hop_limit=64), False, False),
    "multicast listener query from afar": (listener_query("2001:db8::9"), False, False),
    "multicast listener report": (listener_query(packet=ICMPv6MLReport()), False, False),
    "protocol 58 in IPv4": (ether() / ip(ttl=255, proto=58) / Raw(b"\x86" + bytes(15)), False, False),
    "DHCP answer": (dhcp_answer(), False, True),
    "DHCP request": (dhcp_answer(sport=68, dport=67), False, False),
    "from the DHCP port to another": (dhcp_answer(dport=69), False, False),
    "DHCP ports in TCP": (ether() / ip() / TCP(sport=67, dport=68), False, False),
    "later fragment of a DHCP answer": (ether() / ip(frag=100, proto=17) / Raw(bytes(UDP(sport=67, dport=68))), False, False),
    "DHCPv6 answer": (dhcpv6_answer(), True, True),
    "DHCPv6 answer from the link-local prefix's end": (dhcpv6_answer("febf::1"), True, True),
    "DHCPv6 answer from behind it": (dhcpv6_answer("fec0::1"), False, False),
    "DHCPv6 answer from afar": (dhcpv6_answer("2001:db8::5"), False, False),
    "DHCPv6 request": (dhcpv6_answer(sport=546, dport=547), False, False),
    "failsafe port": (ether() / ip() / TCP(dport=22), False, True),
    "failsafe port, IPv6": (ether() / ipv6(number=6, transport=TCP(dport=22)), False, True),
    "failsafe UDP port": (ether() / ip() / UDP(dport=1194), False, True),
    "failsafe port of the other protocol": (ether() / ip() / UDP(dport=22), False, False),
    "failsafe UDP port of the other protocol": (ether() / ip() / TCP(dport=1194), False, False),
    "failsafe port as the source": (ether() / ip() / TCP(sport=22, dport=23), False, False),
    "failsafe port in SCTP": (ether() / ip() / SCTP(dport=22), False, False),
    "failsafe port in a later fragment": (ether() / ip(frag=1, proto=6) / Raw(bytes(TCP(dport=22))), False, False),
}  # fmt: skip

EVERYONE = ["0.0.0.0/0", "::/0"]


@pytest.fixture
def reachable(datapath: Harness) -> Harness:
    datapath.control.set_ports({22: abi.PORT_TCP_FAILSAFE, 1194: abi.PORT_UDP_FAILSAFE, 23: abi.PORT_TCP_LISTENS | abi.PORT_UDP_LISTENS})
    return datapath


@pytest.mark.parametrize("name", ESSENTIAL)
def test_essential_traffic(reachable: Harness, name: str) -> None:
    packet, against_name, against_default = ESSENTIAL[name]
    frame = bytes(packet)

    def outcome_of(enforce: bool, default: Verdict, **lists: list[str]) -> tuple[Outcome, int]:
        reachable.policy(**lists)
        reachable.default(default)
        reachable.enforce(enforce)
        seen = reachable.run(frame)
        assert len(seen.events) == (seen.outcome in REPORTED)
        return seen.outcome, seen.action

    passed, dropped = libbpf.XDP_PASS, libbpf.XDP_DROP
    by_name = (Outcome.ESSENTIAL_PASSED, passed) if against_name else (Outcome.DENIED_DROPPED, dropped)
    by_default = (Outcome.ESSENTIAL_PASSED, passed) if against_default else (Outcome.DEFAULT_DENIED_DROPPED, dropped)
    assert outcome_of(True, Verdict.LOG, deny=EVERYONE) == by_name
    assert outcome_of(True, Verdict.DENY, deny=EVERYONE) == by_name
    assert outcome_of(True, Verdict.DENY) == by_default
    # What would pass anyway is counted as what it is.
    assert outcome_of(True, Verdict.LOG) == (Outcome.DEFAULT_LOGGED, passed)
    assert outcome_of(True, Verdict.ALLOW) == (Outcome.DEFAULT_ALLOWED, passed)
    assert outcome_of(True, Verdict.DENY, allow=EVERYONE) == (Outcome.ALLOWED, passed)
    assert outcome_of(False, Verdict.DENY) == (Outcome.DEFAULT_DENIED_PASSED, passed)
    assert outcome_of(False, Verdict.DENY, deny=EVERYONE) == (Outcome.DENIED_PASSED, passed)


@pytest.mark.parametrize("family", [Family.IPV4, Family.IPV6])
def test_frames_that_start_with_the_ip_header(datapath: Harness, family: Family) -> None:
    network = ip() if family is Family.IPV4 else IPv6(src=V6, dst=HOST6)
    packet = bytes(network / TCP(dport=80, flags="S"))
    seen = datapath.run(packet, program="xdpmond_ip")
    assert (seen.family, seen.protocol_class, seen.outcome, seen.size) == (family, ProtocolClass.TCP, Outcome.DEFAULT_LOGGED, len(packet))
    assert (seen.event["destination_port"], seen.event["vlan"]) == (80, abi.VLAN_NONE)
    datapath.policy(deny=EVERYONE)
    datapath.enforce()
    assert datapath.run(packet, program="xdpmond_ip").action == libbpf.XDP_DROP


def test_neither_version_without_a_link_header(datapath: Harness) -> None:
    seen = datapath.run(b"\x10" + bytes(39), program="xdpmond_ip")
    assert (seen.action, seen.family, seen.outcome) == (libbpf.XDP_PASS, Family.OTHER, Outcome.NO_SOURCE)


def test_the_totals_of_many_frames(datapath: Harness) -> None:
    """Packets and bytes by outcome, of a repeated run."""
    datapath.policy(deny=["198.51.100.0/24"])
    datapath.enforce()
    frame = bytes(ether() / ip() / UDP53)
    before = datapath.totals_by_outcome()[Outcome.DENIED_DROPPED]
    datapath.send(frame, repeat=1000)
    after = datapath.totals_by_outcome()[Outcome.DENIED_DROPPED] - before
    assert (after.packets, after.bytes) == (1000, 1000 * len(frame))


def test_another_interface_has_a_slot_and_a_mode_of_its_own(datapath: Harness, namespace: Namespace) -> None:
    """One enforces while the other monitors, and one without a slot is passed unseen."""
    datapath.policy(deny=["198.51.100.0/24"])
    datapath.enforce()
    frame = bytes(ether() / ip() / UDP53)

    def within() -> None:
        namespaces.ip("link", "add", "xm-kern-a", "type", "veth", "peer", "name", "xm-kern-b")
        other = socket.if_nametoindex("xm-kern-a")
        unknown = datapath.run(frame, ifindex=other)
        assert (unknown.action, unknown.anomalies) == (libbpf.XDP_PASS, ("unknown_slot",))
        slot = datapath.control.take_slot(other, enforce=False)
        try:
            assert slot != datapath.slot
            monitored, enforced = datapath.run(frame, ifindex=other), datapath.run(frame)
            assert (monitored.slot, monitored.outcome, monitored.event["slot"]) == (slot, Outcome.DENIED_PASSED, slot)
            assert (enforced.slot, enforced.outcome) == (datapath.slot, Outcome.DENIED_DROPPED)
        finally:
            datapath.control.free_slot(slot)
        assert datapath.run(frame, ifindex=other).anomalies == ("unknown_slot",)

    namespace.call(within)
