"""IPFIX messages (RFC 7011) from records of flows: what a collector needs to know of them, and then the records by the thousand.

A message is a header, and sets. A template set says which fields the records of later data sets have, by the numbers that IANA keeps
(RFC 7012); over UDP it is sent again and again, as a collector may come late. There are four kinds of record: IPv4 and IPv6, and of both
those of ICMP, which have a type and a code in the place of ports. The sequence number of a message counts the records that were sent before
it, so that a collector sees what the network has lost.

Octets are those of the IP packets, with their headers, whatever the link added. Whether the last packet of the flow was dropped stands in
forwardingStatus (RFC 7270).

There is no record about the exporter itself: it would count as one of those, and nfcapd of Debian 12 does not count it and sees a gap.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .model import Action, Family, Outcome

VERSION = 10
MESSAGE_HEADER, SET_HEADER = struct.Struct("!HHIII"), struct.Struct("!HH")
TEMPLATE_SET = 2
SMALLEST_MESSAGE = 512
"""Bytes; all templates fit in it."""

FORWARDED, DROPPED = 64, 130
"""forwardingStatus: forwarded, for no reason that is told; dropped by an access list."""
_ICMP, _ICMPV6 = 1, 58


class Field(NamedTuple):
    """An information element: its number in IANA's registry, and its type here, whose size is that on the wire."""

    number: int
    type: str


_FIELDS = {
    "sourceIPv4Address": Field(8, "V4"),
    "destinationIPv4Address": Field(12, "V4"),
    "sourceIPv6Address": Field(27, "V16"),
    "destinationIPv6Address": Field(28, "V16"),
    "sourceTransportPort": Field(7, ">u2"),
    "destinationTransportPort": Field(11, ">u2"),
    "icmpTypeCodeIPv4": Field(32, ">u2"),
    "icmpTypeCodeIPv6": Field(139, ">u2"),
    "protocolIdentifier": Field(4, "u1"),
    "tcpControlBits": Field(6, ">u2"),
    "packetDeltaCount": Field(2, ">u8"),
    "octetDeltaCount": Field(1, ">u8"),
    "flowStartMilliseconds": Field(152, ">u8"),
    "flowEndMilliseconds": Field(153, ">u8"),
    "flowEndReason": Field(136, "u1"),
    "forwardingStatus": Field(89, "u1"),
    "ingressInterface": Field(10, ">u4"),
    "flowDirection": Field(61, "u1"),
}
_COMMON = (
    "protocolIdentifier", "tcpControlBits", "packetDeltaCount", "octetDeltaCount", "flowStartMilliseconds", "flowEndMilliseconds",
    "flowEndReason", "forwardingStatus", "ingressInterface", "flowDirection",
)  # fmt: skip
_PORTS = ("sourceTransportPort", "destinationTransportPort")


@dataclass(frozen=True)
class Template:
    id: int
    fields: Sequence[str]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype([(name, _FIELDS[name].type) for name in self.fields])

    def encoded(self) -> bytes:
        """As a record of a template set."""
        return struct.pack("!HH", self.id, len(self.fields)) + b"".join(
            struct.pack("!HH", _FIELDS[name].number, self.dtype[name].itemsize) for name in self.fields
        )


IPV4 = Template(256, ("sourceIPv4Address", "destinationIPv4Address", *_PORTS, *_COMMON))
IPV6 = Template(257, ("sourceIPv6Address", "destinationIPv6Address", *_PORTS, *_COMMON))
ICMPV4 = Template(258, ("sourceIPv4Address", "destinationIPv4Address", "icmpTypeCodeIPv4", *_COMMON))
ICMPV6 = Template(259, ("sourceIPv6Address", "destinationIPv6Address", "icmpTypeCodeIPv6", *_COMMON))
TEMPLATES = (IPV4, IPV6, ICMPV4, ICMPV6)

_STATUS = np.array(
    [DROPPED if number in set(Outcome) and Outcome(number).action is Action.DROP else FORWARDED for number in range(256)], "u1"
)


class Message(NamedTuple):
    data: bytes
    records: int


class Encoder:
    """Makes the messages of one observation domain, and numbers their records: each message that is made is to be sent."""

    def __init__(self, domain: int, packet_size: int):
        self._domain = domain
        self._size = packet_size
        self._sequence = 0

    def templates(self, now: float) -> Message:
        """What has to come before all else, and from time to time."""
        return self._message(_set(TEMPLATE_SET, b"".join(template.encoded() for template in TEMPLATES)), 0, now)

    def flows(self, records: np.ndarray, ifindexes: Mapping[int, int], now: float) -> Iterator[Message]:
        """Records (flows.ENDED) in as few messages as hold them. `ifindexes` are the numbers of the interfaces by slot."""
        interfaces = np.zeros(256, "u4")  # 0: unknown
        for slot, ifindex in ifindexes.items():
            interfaces[slot] = ifindex
        sets, held = b"", 0
        for template, data in _encoded(records, interfaces):
            width, at = template.dtype.itemsize, 0
            while at < len(data):
                room = (self._size - MESSAGE_HEADER.size - len(sets) - SET_HEADER.size) // width
                if room < 1:
                    yield self._message(sets, held, now)
                    sets, held = b"", 0
                    continue
                some = data[at : at + room * width]
                at += len(some)
                sets += _set(template.id, some)
                held += len(some) // width
        if held:
            yield self._message(sets, held, now)

    def _message(self, sets: bytes, records: int, now: float) -> Message:
        length = MESSAGE_HEADER.size + len(sets)
        head = MESSAGE_HEADER.pack(VERSION, length, int(now) & 0xFFFFFFFF, self._sequence, self._domain)
        self._sequence = (self._sequence + records) & 0xFFFFFFFF
        return Message(head + sets, records)


def _set(number: int, content: bytes) -> bytes:
    return SET_HEADER.pack(number, SET_HEADER.size + len(content)) + content


def _encoded(records: np.ndarray, interfaces: np.ndarray) -> Iterator[tuple[Template, bytes]]:
    """The records of each template, side by side."""
    ipv4, ipv6 = records["family"] == Family.IPV4, records["family"] == Family.IPV6
    known = records["port"] > 0
    icmpv4, icmpv6 = ipv4 & known & (records["protocol"] == _ICMP), ipv6 & known & (records["protocol"] == _ICMPV6)
    for template, wanted in ((IPV4, ipv4 & ~icmpv4), (IPV6, ipv6 & ~icmpv6), (ICMPV4, icmpv4), (ICMPV6, icmpv6)):
        at = np.flatnonzero(wanted)
        if len(at):
            yield template, _rows(template, records.take(at), interfaces).tobytes()


def _rows(template: Template, records: np.ndarray, interfaces: np.ndarray) -> np.ndarray:
    rows = np.empty(len(records), template.dtype)
    source, destination = template.fields[:2]
    width = template.dtype[source].itemsize
    for name, of in ((source, "source"), (destination, "destination")):
        rows[name] = np.ascontiguousarray(records[of][:, :width]).view(f"V{width}")[:, 0]
    if template in (ICMPV4, ICMPV6):
        # The port of a flow is the type + 1, and its source port the code.
        rows[template.fields[2]] = (records["port"] - 1) << 8 | records["source_port"] & 0xFF
    else:
        icmp = np.isin(records["protocol"], (_ICMP, _ICMPV6))
        rows["sourceTransportPort"] = np.where(icmp, 0, records["source_port"])
        rows["destinationTransportPort"] = np.where(icmp, 0, records["port"])
    for name, values in (
        ("protocolIdentifier", records["protocol"]),
        ("tcpControlBits", records["tcp_flags"]),
        ("packetDeltaCount", records["packets"]),
        ("octetDeltaCount", records["ip_bytes"]),
        ("flowStartMilliseconds", records["first_seen"] * 1000),
        ("flowEndMilliseconds", records["last_seen"] * 1000),
        ("flowEndReason", records["reason"]),
        ("forwardingStatus", _STATUS[records["outcome"]]),
        ("ingressInterface", interfaces[records["slot"]]),
    ):
        rows[name] = values
    rows["flowDirection"] = 0  # ingress
    return rows
