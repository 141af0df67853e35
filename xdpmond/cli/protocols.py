"""What a packet was sent to, in words: `tcp/443`, `icmp echo-request`, and the service that a port is known for.

ICMP has types where others have ports. Their names are those of IANA's registries, shortened; a type that is not here is shown by its
number, and never as if it were a port.
"""

from __future__ import annotations

import socket

from . import fields
from .fields import Document
from .render import safe

ICMP_TYPES = {
    0: "echo-reply", 3: "unreachable", 4: "source-quench", 5: "redirect", 8: "echo-request", 9: "router-advert", 10: "router-solicit",
    11: "time-exceeded", 12: "parameter-problem", 13: "timestamp-request", 14: "timestamp-reply", 17: "mask-request", 18: "mask-reply",
    40: "photuris", 42: "extended-echo-request", 43: "extended-echo-reply",
}  # fmt: skip
ICMPV6_TYPES = {
    1: "unreachable", 2: "packet-too-big", 3: "time-exceeded", 4: "parameter-problem", 128: "echo-request", 129: "echo-reply",
    130: "mld-query", 131: "mld-report", 132: "mld-done", 133: "router-solicit", 134: "router-advert", 135: "neigh-solicit",
    136: "neigh-advert", 137: "redirect", 143: "mld2-report", 160: "extended-echo-request", 161: "extended-echo-reply",
}  # fmt: skip
_TYPES = {"icmp": ICMP_TYPES, "icmpv6": ICMPV6_TYPES}


def target(row: Document) -> str:
    """Protocol and port, or protocol and type; the protocol alone where neither was read."""
    protocol, port = safe(fields.text(row, "protocol")), fields.text(row, "port")
    kind = fields.value(row, "icmp_type")
    if isinstance(kind, int) and not isinstance(kind, bool):
        return f"{protocol} {_TYPES.get(protocol, {}).get(kind, f'type {kind}')}"
    return f"{protocol}/{safe(port)}" if port else protocol


def service(row: Document) -> str:
    """What the port is known for, by /etc/services; nothing if by nothing, or if that file is not installed."""
    port = fields.value(row, "port")
    if not isinstance(port, int) or not 0 < port < 1 << 16:
        return ""
    try:
        return safe(socket.getservbyport(port, fields.text(row, "protocol")))
    except (OSError, ValueError):
        return ""


def endpoint(row: Document, side: str, port: str) -> str:
    """`192.0.2.1:22`, `[2001:db8::1]:22`, or the address alone."""
    address, number = safe(fields.text(row, side)), fields.value(row, port)
    if not isinstance(number, int) or isinstance(number, bool):
        return address
    return f"[{address}]:{number}" if ":" in address else f"{address}:{number}"
