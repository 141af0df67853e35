"""Packets that hypothesis makes: any stack of headers that scapy can build, and damage done to it."""

from __future__ import annotations

import random

from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

IPV4_POOL = ["192.0.2.1", "198.51.100.77", "10.1.2.3", "203.0.113.255", "0.0.0.0", "255.255.255.255"]
IPV6_POOL = ["2001:db8::1", "2001:db8:ffff::2", "fe80::1", "febf::1", "::", "ff02::1", "fd00::1"]
IPV4, IPV6 = st.sampled_from(IPV4_POOL), st.sampled_from(IPV6_POOL)
PORTS = st.one_of(st.sampled_from([0, 22, 67, 68, 80, 443, 546, 547, 32768, 60999, 65535]), st.integers(0, 65535))
PAYLOADS = st.binary(max_size=40)

MAC = {"src": "02:00:00:00:00:01", "dst": "02:00:00:00:00:02"}


@st.composite
def links(draw: st.DrawFn) -> Packet:
    link: Packet = Ether(**MAC)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 2, 3]))):
        link = link / draw(st.sampled_from([Dot1Q, Dot1AD]))(vlan=draw(st.integers(0, 4095)), prio=draw(st.integers(0, 7)))
    return link


@st.composite
def transports(draw: st.DrawFn, *, v6: bool) -> tuple[Packet, int]:
    """A transport header and its protocol number."""
    kinds = ["tcp", "udp", "sctp", "icmp", "icmpv6", "gre", "none"] + (["nd"] if v6 else [])
    kind = draw(st.sampled_from(kinds))
    sport, dport = draw(PORTS), draw(PORTS)
    if kind == "tcp":
        options = draw(st.sampled_from([[], [("MSS", 1460)], [("MSS", 1460), ("NOP", None), ("WScale", 7)]]))
        return TCP(sport=sport, dport=dport, flags=draw(st.integers(0, 255)), options=options), 6
    if kind == "udp":
        if draw(st.booleans()):
            sport, dport = draw(st.sampled_from([(67, 68), (68, 67), (547, 546), (546, 547)]))
        return UDP(sport=sport, dport=dport), 17
    if kind == "sctp":
        return SCTP(sport=sport, dport=dport, tag=1), 132
    if kind == "icmp":
        return ICMP(type=draw(st.sampled_from([0, 3, 8]))), 1
    if kind == "nd":
        return draw(st.sampled_from([ICMPv6ND_NS, ICMPv6ND_NA, ICMPv6ND_RA, ICMPv6ND_RS]))(), 58
    if kind == "icmpv6":
        return (ICMPv6EchoRequest() if v6 else Raw(b"\x87\0\0\0")), 58
    return Raw(b"\0" * 8), 47 if kind == "gre" else 59


@st.composite
def ipv4_packets(draw: st.DrawFn, sources: st.SearchStrategy[str] = IPV4) -> Packet:
    transport, number = draw(transports(v6=False))
    options = draw(st.sampled_from([[], [], [IPOption_NOP()], [IPOption_RR(routers=["0.0.0.0"] * 3)], [IPOption_NOP()] * 40]))
    flags, offset = draw(st.sampled_from([(0, 0), (0, 0), (0, 0), (2, 0), (1, 0), (1, 100), (0, 185)]))
    source = draw(sources)
    destination = draw(IPV4)
    header = IP(
        src=source, dst=destination, proto=number, ttl=draw(st.sampled_from([1, 64, 255])), flags=flags, frag=offset, options=options
    )
    return header / transport / Raw(draw(PAYLOADS))


@st.composite
def extension_headers(draw: st.DrawFn) -> list[Packet]:
    chain: list[Packet] = []
    for kind in draw(st.lists(st.sampled_from("hdrfFaI"), max_size=10) | st.just([])):
        if kind == "h":
            chain.append(IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * draw(st.integers(0, 20)))]))
        elif kind == "d":
            chain.append(IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * draw(st.integers(0, 20)))]))
        elif kind == "r":
            chain.append(IPv6ExtHdrRouting(addresses=["2001:db8::9"] * draw(st.integers(0, 2))))
        elif kind == "a":
            chain.append(AH(payloadlen=4, icv=b"\1" * 12))
        else:
            offset, more = {"f": (0, 1), "F": (draw(st.sampled_from([1, 300])), 1), "I": (0, 0)}[kind]
            chain.append(IPv6ExtHdrFragment(offset=offset, m=more, id=7))
    return chain


NEXT_HEADER = {IPv6ExtHdrHopByHop: 0, IPv6ExtHdrDestOpt: 60, IPv6ExtHdrRouting: 43, IPv6ExtHdrFragment: 44, AH: 51}


def ipv6_packet(
    source: str, destination: str, hop_limit: int, chain: list[Packet], transport: Packet, number: int, payload: bytes
) -> Packet:
    """With the next header numbers set by hand: scapy would not set all of them."""
    numbers = [NEXT_HEADER[type(header)] for header in chain] + [number]
    packet: Packet = IPv6(src=source, dst=destination, hlim=hop_limit, nh=numbers[0])
    for header, following in zip(chain, numbers[1:], strict=True):
        header.nh = following
        packet = packet / header
    return packet / transport / Raw(payload)


@st.composite
def ipv6_packets(draw: st.DrawFn, sources: st.SearchStrategy[str] = IPV6, hop_limits: tuple[int, ...] = (1, 64, 254, 255)) -> Packet:
    transport, number = draw(transports(v6=True))
    return ipv6_packet(
        draw(sources), draw(IPV6), draw(st.sampled_from(hop_limits)),
        draw(extension_headers()), transport, number, draw(PAYLOADS),
    )  # fmt: skip


def ip_packets() -> st.SearchStrategy[bytes]:
    """Without an Ethernet header."""
    return st.one_of(ipv4_packets(), ipv6_packets()).map(bytes)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    link = draw(links())
    kind = draw(st.sampled_from(["ip", "ip", "ip", "ip", "arp", "odd"]))
    if kind == "arp":
        return bytes(link / ARP(psrc="192.0.2.1", pdst="192.0.2.2", hwsrc=MAC["src"]))
    if kind == "odd":
        link.lastlayer().type = draw(st.sampled_from([0x88CC, 0x8847, 0x0600, 0x9000]))
        return bytes(link / Raw(draw(PAYLOADS)))
    # Frames on a wire are padded to 60 bytes: what lies behind the packet's own length is not the packet.
    return bytes(link / draw(st.one_of(ipv4_packets(), ipv6_packets()))) + b"\xee" * draw(st.integers(0, 12))


@st.composite
def mutated(draw: st.DrawFn, frame: bytes, *, start: int = 0, least: int = 14) -> bytes:
    """The frame, damaged at or behind `start`: bytes changed, taken out or put in, or the rest cut off; at least `least` bytes long."""
    data = bytearray(frame)
    for _ in range(draw(st.integers(1, 4))):
        if len(data) <= start:
            break
        at = draw(st.integers(start, len(data) - 1))
        kind = draw(st.sampled_from(["set", "set", "flip", "header", "cut", "remove", "insert"]))
        if kind == "set":
            data[at] = draw(st.sampled_from([0, 1, 4, 6, 17, 43, 44, 51, 58, 60, 135, 136, 139, 140, 255]))
        elif kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "header":
            # Near the front, where the headers are.
            data[min(at, start + (at - start) % 48)] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[max(at, least) :]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    if len(data) < least:
        data += frame[len(data) : least]
    return bytes(data)


def tcp(source: str, port: int = 443, flags: str = "A") -> bytes:
    """A frame of 54 bytes, 74 with IPv6."""
    network = IPv6(src=source, dst="2001:db8::1") if ":" in source else IP(src=source, dst="192.0.2.1")
    return bytes(Ether(**MAC) / network / TCP(sport=999, dport=port, flags=flags))


def random_sources(count: int, seed: int) -> list[str]:
    """Distinct IPv4 sources, the same for the same seed."""
    chosen = random.Random(seed).sample(range(1 << 24, 223 << 24), count)
    return [".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0)) for number in chosen]
