"""How a frame is to be read: the packet path's parser, written a second time, in Python and from the RFCs; and scapy's reading of it.

`read` must agree with the C parser on any bytes. `scapy_ports` and `scapy_addresses` are what scapy's own dissection of the whole frame
says; it must agree with both wherever it reaches, but for these legitimate differences, which `View.scapy_differs` names:

- a third VLAN tag: scapy reads on, we do not;
- a version that disagrees with the EtherType: scapy believes the EtherType, we believe neither;
- an IPv4 header or total length that is impossible (RFC 791): scapy takes the rest of the frame, we read no port. A total length of 0 is
  read alike: as long as the frame, as large aggregates have it;
- an IPv6 payload length of 0: scapy takes the payload for empty unless there is a jumbo option, we take it to be as long as the frame,
  since aggregates larger than 64 KiB come without the option;
- AH behind IPv4: scapy follows it, we keep protocol 51;
- SCTP in a later IPv4 fragment: scapy reads ports there, we never do;
- more than 8 extension headers: scapy reads on, we do not;
- AH shorter than its fixed part, type 4 routing headers, type 0 routing headers of half an address, and mobility headers: scapy's length
  comes from the content, ours from the length field (RFC 8200, RFC 6275); HIP and shim6 are unknown to scapy.

Where scapy gives up (a transport header cut behind its ports, options that it cannot parse), we may read on: 4 bytes hold both ports.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from scapy.layers.inet import ICMP as ICMPLayer
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    _ICMPv6,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, bind_layers, split_layers

from xdpmond.model import Family, ProtocolClass

ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_ARP = 0x0800, 0x86DD, 0x0806
VLAN_TYPES = (0x8100, 0x88A8)
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS, MOBILITY, HIP, SHIM6 = 0, 43, 44, 51, 60, 135, 139, 140
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS, MOBILITY, HIP, SHIM6)
ICMP, TCP_NUMBER, UDP_NUMBER, ICMPV6, SCTP_NUMBER = 1, 6, 17, 58, 132
WITH_PORTS = (TCP_NUMBER, UDP_NUMBER, SCTP_NUMBER)
WITH_TYPES = ((Family.IPV4, ICMP), (Family.IPV6, ICMPV6))
CLASSES = {
    ICMP: ProtocolClass.ICMP, TCP_NUMBER: ProtocolClass.TCP, UDP_NUMBER: ProtocolClass.UDP, ICMPV6: ProtocolClass.ICMPV6,
    SCTP_NUMBER: ProtocolClass.SCTP,
}  # fmt: skip

# What scapy 2.5 knows to dissect, but was not told that it may follow there.
_FOLLOWING = {
    HOP_BY_HOP: IPv6ExtHdrHopByHop, ROUTING: IPv6ExtHdrRouting, FRAGMENT: IPv6ExtHdrFragment, AUTHENTICATION: AH,
    DESTINATION_OPTIONS: IPv6ExtHdrDestOpt, TCP_NUMBER: TCP, UDP_NUMBER: UDP, SCTP_NUMBER: SCTP,
}  # fmt: skip
split_layers(AH, IP, nh=0)  # it takes hop-by-hop options for IPv4
for _lower in (IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, IPv6ExtHdrFragment, IPv6ExtHdrDestOpt, AH):
    for _number, _upper in _FOLLOWING.items():
        bind_layers(_lower, _upper, nh=_number)


@dataclass(slots=True)
class View:
    """What a frame says of itself."""

    family: Family = Family.OTHER
    protocol_class: ProtocolClass = ProtocolClass.NON_IP
    source: bytes = b""
    destination: bytes = b""
    protocol: int = 0
    ports: tuple[int, int] | None = None
    vlan: int | None = None
    tcp_flags: int = 0
    icmp: tuple[int, int] | None = None
    """Type and code."""
    hop_limit: int = 0
    essential: str = ""
    """"always": not even a source denied by name loses it; "default": the default alone does not drop it."""
    anomalies: list[str] = field(default_factory=list)
    scapy_differs: str = ""
    later: bool = False
    fragmented: bool = False


def read(frame: bytes, *, ethernet: bool = True) -> View:
    view = View()
    kind, rest = _link(view, frame) if ethernet else (_version_type(frame), frame)
    if kind == ETHERTYPE_IPV4:
        _ipv4(view, rest)
    elif kind == ETHERTYPE_IPV6:
        _ipv6(view, rest)
    elif kind == ETHERTYPE_ARP:
        view.protocol_class = ProtocolClass.ARP
    if view.family is not Family.OTHER:
        view.protocol_class = CLASSES.get(view.protocol, ProtocolClass.OTHER)
    return view


def _version_type(frame: bytes) -> int:
    return {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}.get(frame[0] >> 4, 0)


def _link(view: View, frame: bytes) -> tuple[int, bytes]:
    (kind,) = struct.unpack_from("!H", frame, 12)
    rest = frame[14:]
    for depth in range(8):
        if kind not in VLAN_TYPES:
            break
        if len(rest) < 4:
            view.anomalies.append("short_frame")
            return 0, b""
        tag, kind = struct.unpack_from("!HH", rest)
        if depth == 0:
            view.vlan = tag & 0xFFF
        rest = rest[4:]
    if kind in VLAN_TYPES:
        view.anomalies.append("vlan_depth")
        view.scapy_differs = "a ninth tag"
        return 0, b""
    return kind, rest


def _ipv4(view: View, data: bytes) -> None:
    if len(data) < 16:
        view.anomalies.append("short_ip")
        return
    if data[0] >> 4 != 4:
        view.anomalies.append("ip_version")
        view.scapy_differs = "the version"
        return
    view.family, view.source = Family.IPV4, data[12:16]
    view.hop_limit, view.protocol = data[8], data[9]
    if len(data) < 20:
        view.anomalies.append("short_ip")
        return
    view.destination = data[16:20]
    header, (total,) = (data[0] & 15) * 4, struct.unpack_from("!H", data, 2)
    if header < 20 or (total and total < header) or header > len(data):
        view.anomalies.append("ip_length")
        view.scapy_differs = "impossible lengths"
        return
    if view.protocol == AUTHENTICATION:
        view.scapy_differs = "AH behind IPv4"
    (fragment,) = struct.unpack_from("!H", data, 6)
    view.fragmented, view.later = bool(fragment & 0x3FFF), bool(fragment & 0x1FFF)
    _transport(view, data[header : total or None])


def _ipv6(view: View, data: bytes) -> None:
    if len(data) < 24:
        view.anomalies.append("short_ip")
        return
    if data[0] >> 4 != 6:
        view.anomalies.append("ip_version")
        view.scapy_differs = "the version"
        return
    view.family, view.source = Family.IPV6, data[8:24]
    view.protocol, view.hop_limit = data[6], data[7]
    if len(data) < 40:
        view.anomalies.append("short_ip")
        return
    view.destination = data[24:40]
    (payload,) = struct.unpack_from("!H", data, 4)
    if not payload:
        view.scapy_differs = "payload length 0"
    rest = data[40 : 40 + payload if payload else None]
    for depth in range(9):
        if view.protocol not in EXTENSIONS:
            break
        if depth == 8:
            view.anomalies.append("extension_depth")
            view.scapy_differs = "extension headers beyond the depth"
            return
        if len(rest) < 8:
            view.anomalies.append("short_extension")
            return
        length = _extension_length(view, rest)
        if view.protocol == FRAGMENT:
            (fragment,) = struct.unpack_from("!H", rest, 2)
            view.fragmented, view.later = bool(fragment & 0xFFF9), bool(fragment & 0xFFF8)
        if len(rest) < length:
            view.anomalies.append("short_extension")
            return
        view.protocol, rest = rest[0], rest[length:]
        if view.later:
            break
    _transport(view, rest)


def _extension_length(view: View, header: bytes) -> int:
    if view.protocol == FRAGMENT:
        return 8
    if view.protocol == AUTHENTICATION:
        if header[1] < 1:
            view.scapy_differs = "AH without its fixed part"
        return (header[1] + 2) * 4
    if view.protocol in (MOBILITY, HIP, SHIM6) or (view.protocol == ROUTING and (header[2] == 4 or header[1] % 2)):
        view.scapy_differs = "a header that scapy measures otherwise"
    return (header[1] + 1) * 8


def _is_link_local(source: bytes) -> bool:
    return source[0] == 0xFE and source[1] & 0xC0 == 0x80


def _transport(view: View, data: bytes) -> None:
    if view.later:
        view.anomalies.append("later_fragment")
        if view.protocol == SCTP_NUMBER:
            view.scapy_differs = "SCTP in a later fragment"
        return
    if (view.family, view.protocol) in WITH_TYPES:
        if len(data) < 2:
            view.anomalies.append("short_transport")
            return
        view.icmp = data[0], data[1]
        if view.protocol == ICMPV6 and 134 <= data[0] <= 136 and view.hop_limit == 255 and not view.fragmented:
            view.essential = "always"
        if view.protocol == ICMPV6 and data[0] == 130 and view.hop_limit == 1 and not view.fragmented and _is_link_local(view.source):
            view.essential = "always"
    if view.protocol not in WITH_PORTS:
        return
    if len(data) < 4:
        view.anomalies.append("short_transport")
        return
    view.ports = struct.unpack_from("!HH", data)
    if view.protocol == TCP_NUMBER:
        if len(data) < 14:
            view.anomalies.append("short_transport")
        else:
            view.tcp_flags = data[13]
    if view.protocol == UDP_NUMBER:
        if view.family is Family.IPV4 and view.ports == (67, 68):
            view.essential = "default"
        if view.family is Family.IPV6 and view.ports == (547, 546) and _is_link_local(view.source):
            view.essential = "always"


def _outer(frame: bytes, ethernet: bool) -> Packet | None:
    """scapy's IP layer, if it has one right behind the link header and its tags."""
    if not ethernet:
        # Behind a header made up for it: scapy then turns a packet that it cannot dissect into raw bytes, in place of an exception.
        frame = bytes(12) + struct.pack("!H", _version_type(frame)) + frame
    layer = Ether(frame)
    if not isinstance(layer, Ether):
        return None  # 802.3 with a length
    layer = layer.payload
    while isinstance(layer, Dot1Q):
        if layer.type <= 1500:
            return None
        layer = layer.payload
    return layer if isinstance(layer, IP | IPv6) else None


def scapy_addresses(frame: bytes, *, ethernet: bool = True) -> tuple[Family, str, str] | None:
    """Family, source and destination as scapy reads them; None if it does not get as far."""
    ip = _outer(frame, ethernet)
    if ip is None or "dst" not in ip.fields:
        return None
    return (Family.IPV4 if isinstance(ip, IP) else Family.IPV6), ip.src, ip.dst


def _upper(frame: bytes, ethernet: bool) -> Packet | None:
    """What scapy finds behind the IP headers."""
    layer: Packet | None = _outer(frame, ethernet)
    if layer is None:
        return None
    layer = layer.payload
    while isinstance(layer, IPv6ExtHdrHopByHop | IPv6ExtHdrDestOpt | IPv6ExtHdrRouting | IPv6ExtHdrFragment | AH):
        layer = layer.payload
    return layer


def scapy_icmp(frame: bytes, *, ethernet: bool = True) -> tuple[int, int] | None:
    """Type and code of ICMP as scapy reads them; None if it does not get as far, or knows no such type of ICMPv6."""
    layer = _upper(frame, ethernet)
    return (layer.type, layer.code) if isinstance(layer, ICMPLayer | _ICMPv6) and "type" in layer.fields else None


def scapy_ports(frame: bytes, *, ethernet: bool = True) -> tuple[int, int, int] | None:
    """Protocol, source and destination port as scapy reads them; None if it does not get as far."""
    layer = _upper(frame, ethernet)
    for kind, number in ((TCP, TCP_NUMBER), (UDP, UDP_NUMBER), (SCTP, SCTP_NUMBER)):
        if isinstance(layer, kind) and "dport" in layer.fields:
            return number, layer.sport, layer.dport
    return None


def source_end(frame: bytes) -> int:
    """Where the source address ends in a frame that `read` finds one in."""
    (kind,), at = struct.unpack_from("!H", frame, 12), 14
    while kind in VLAN_TYPES:
        (kind,), at = struct.unpack_from("!H", frame, at + 2), at + 4
    return at + (16 if kind == ETHERTYPE_IPV4 else 24)
