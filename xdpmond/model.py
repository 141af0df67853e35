"""The values that the rooms exchange: frozen, typed, free of BPF and of D-Bus.

A packet has a *verdict* (what the policy says of its source: allow, log or deny), and an *action* (what was done with it: pass, log or
drop). They differ: in monitor mode nothing is dropped whatever the verdict, and some packets that keep a host reachable pass although
the default denies. The *outcome* is the pair of them as the kernel counts it.
"""

from __future__ import annotations

import enum
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import PrefixError


class Family(enum.IntEnum):
    """Address family, by the number of the IP version. OTHER is a frame without a readable IP source."""

    OTHER = 0
    IPV4 = 4
    IPV6 = 6

    @property
    def bits(self) -> int:
        return 32 if self is Family.IPV4 else 128

    @property
    def label(self) -> str:
        return {Family.OTHER: "other", Family.IPV4: "ipv4", Family.IPV6: "ipv6"}[self]


class Verdict(enum.StrEnum):
    """What the policy says of a source."""

    ALLOW = "allow"
    LOG = "log"
    DENY = "deny"


class Action(enum.StrEnum):
    """What was done with a packet. LOG means passed and reported."""

    PASS = "PASS"
    LOG = "LOG"
    DROP = "DROP"


class Mode(enum.StrEnum):
    MONITOR = "monitor"
    ENFORCE = "enforce"


class Origin(enum.StrEnum):
    """Who put an entry there. For the same prefix operator wins over configuration, configuration over automatic."""

    OPERATOR = "operator"
    CONFIGURATION = "configuration"
    AUTOMATIC = "automatic"

    @property
    def rank(self) -> int:
        """0 is the strongest."""
        return _ORIGIN_RANK[self]


_ORIGIN_RANK = {Origin.OPERATOR: 0, Origin.CONFIGURATION: 1, Origin.AUTOMATIC: 2}


class AttachMode(enum.StrEnum):
    """How a program is, or shall be, attached to an interface."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"


@dataclass(frozen=True, slots=True, order=True)
class Prefix:
    """An IP prefix: family, network address in network byte order (4 or 16 bytes), length in bits. Ordered by family, then address."""

    family: Family
    address: bytes
    length: int

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read `ADDRESS` or `ADDRESS/LENGTH` by inet_pton rules (RFC 4291, dotted quad with four decimal parts).

        A bare address is a /32 or /128. Host bits, IPv4-mapped addresses, zone ids, host names, short and octal forms, netmasks in
        place of a length raise `PrefixError`, whose hint names the likely meaning.
        """
        shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
        address_text, slash, length_text = text.partition("/")
        family = Family.IPV6 if ":" in address_text else Family.IPV4
        try:
            address = _packed(family, address_text)
        except ValueError:
            raise PrefixError(f"{shown} is not an IP prefix", hint=_guess(address_text, text)) from None
        if family is Family.IPV6 and address[:12] == _MAPPED:
            meant = socket.inet_ntop(socket.AF_INET, address[12:])
            if re.fullmatch("9[6-9]|1[01][0-9]|12[0-8]", length_text):
                meant += f"/{int(length_text) - 96}"
            raise PrefixError(f"{shown} is an IPv4-mapped IPv6 address", hint=f"no packet carries one as its source; write {meant}")
        length = family.bits
        if slash:
            if not re.fullmatch("0|[1-9][0-9]{0,2}", length_text) or int(length_text) > family.bits:
                raise PrefixError(f"{shown} has no valid prefix length", hint=_guess_length(length_text, family))
            length = int(length_text)
        number = int.from_bytes(address, "big")
        host_bits = number & ((1 << (family.bits - length)) - 1)
        if host_bits:
            network = cls(family, (number - host_bits).to_bytes(len(address), "big"), length)
            host = cls(family, address, family.bits)
            raise PrefixError(f"{shown} has host bits set", hint=f"write {network} for the network or {host.host} for the one host")
        return cls(family, address, length)

    @property
    def host(self) -> str:
        """The address alone, as text."""
        return format_address(self.family, self.address)

    def __str__(self) -> str:
        return f"{self.host}/{self.length}"

    def covers(self, family: Family, address: bytes) -> bool:
        """Does the address (4 or 16 bytes) lie within?"""
        if family is not self.family:
            return False
        shift = self.family.bits - self.length
        return int.from_bytes(address, "big") >> shift == int.from_bytes(self.address, "big") >> shift


_MAPPED = bytes(10) + b"\xff\xff"


def parse_address(text: str) -> tuple[Family, bytes]:
    """Read one bare address by the rules of `Prefix.parse`; raise `PrefixError`."""
    if "/" in text:
        raise PrefixError(f"{text[:60]!r} is a prefix where one address is wanted", hint="leave out the slash and what follows")
    try:
        _packed(Family.IPV6 if ":" in text else Family.IPV4, text)
    except ValueError:
        raise PrefixError(f"{text[:60]!r} is not an IP address", hint=_guess(text, text, address=True)) from None
    prefix = Prefix.parse(text)
    return prefix.family, prefix.address


def _packed(family: Family, text: str) -> bytes:
    """The bytes of an address; ValueError if it is none."""
    try:
        return socket.inet_pton(socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET, text)
    except OSError as error:
        raise ValueError from error


def format_address(family: Family, address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if family is Family.IPV4 else socket.AF_INET6, address)


def _guess(address_text: str, text: str, *, address: bool = False) -> str:
    """Say what the writer of a prefix, or of an address, probably meant."""
    if "%" in address_text:
        return "a zone id has no meaning to a packet; leave out the % and what follows"
    if ":" not in address_text:
        parts = address_text.split(".")
        if all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
            if any(int(part) > 255 for part in parts):
                return "each part is 0 to 255"
            if len(parts) < 4:
                padded = ".".join([str(int(part)) for part in parts] + ["0"] * (4 - len(parts)))
                return "four decimal parts are wanted" + ("" if address else f"; perhaps {padded}/{len(parts) * 8}")
            if len(parts) == 4 and any(len(part) > 1 and part.startswith("0") for part in parts):
                return "a part with a leading zero could be octal; write it in decimal without the zero"
        elif any(c.isalpha() for c in address_text):
            return "host names are not looked up; write the address"
    if any(c.isspace() for c in text):
        return "leave out the white space"
    return "write for example 192.0.2.1 or 2001:db8::1" if address else "write for example 192.0.2.0/24, 2001:db8::/32 or a bare address"


def _guess_length(length_text: str, family: Family) -> str:
    if family is Family.IPV4 and "." in length_text:
        try:
            mask = int.from_bytes(socket.inet_pton(socket.AF_INET, length_text), "big")
        except (OSError, UnicodeError, ValueError):
            mask = 0
        inverted = ~mask & 0xFFFFFFFF
        if mask and inverted & (inverted + 1) == 0:
            return f"a netmask is not taken; write /{32 - inverted.bit_length()}"
    return f"the length is a decimal number from 0 to {family.bits}"


@dataclass(frozen=True, slots=True)
class Port:
    """A transport port: protocol name ("tcp", "udp", "sctp") and number."""

    protocol: str
    number: int

    def __str__(self) -> str:
        return f"{self.protocol}/{self.number}"


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports of a protocol, or of every one that has ports (None); of one without ports all that it has."""

    protocol: int | None
    low: int = 0
    high: int = 65535

    def __str__(self) -> str:
        name = "" if self.protocol is None else protocol_name(self.protocol)
        if (self.low, self.high) == (0, 65535):
            return f"{name}/*" if self.protocol in (6, 17, 132) else name
        numbers = str(self.low) if self.low == self.high else f"{self.low}-{self.high}"
        return f"{name}/{numbers}" if name else numbers


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the policy: a prefix with a verdict, who put it there, and until when it holds.

    `created` and `expires` are seconds since the epoch (wall clock, so that they survive a reboot); `expires` None means for good.
    `source` is "FILE:LINE" for origin configuration, else empty.
    """

    prefix: Prefix
    verdict: Verdict
    origin: Origin
    created: float = 0.0
    expires: float | None = None
    reason: str = ""
    source: str = ""


class ProtocolClass(enum.IntEnum):
    """The protocol classes that totals are kept for; the order is that of `enum xm_class` in bpf/abi.h."""

    OTHER = 0
    TCP = 1
    UDP = 2
    ICMP = 3
    ICMPV6 = 4
    SCTP = 5
    ARP = 6
    NON_IP = 7

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


class Outcome(enum.IntEnum):
    """Verdict and action of a packet as one number; the order is that of `enum xm_outcome` in bpf/abi.h."""

    NO_SOURCE = 0
    """Passed: the frame has no readable source address."""
    ALLOWED = 1
    """Passed: an allow entry matched."""
    DENIED_PASSED = 2
    """Passed in monitor mode although a deny entry matched."""
    DENIED_DROPPED = 3
    """Dropped: a deny entry matched."""
    DEFAULT_ALLOWED = 4
    """Passed: no entry matched, default = allow."""
    DEFAULT_LOGGED = 5
    """Passed and reported: no entry matched, default = log."""
    DEFAULT_DENIED_PASSED = 6
    """Passed in monitor mode: no entry matched, default = deny."""
    DEFAULT_DENIED_DROPPED = 7
    """Dropped: no entry matched, default = deny."""
    ESSENTIAL_PASSED = 8
    """Passed although denied: neighbour discovery, router advertisement, DHCP answer or failsafe port."""
    UNREADABLE_DROPPED = 9
    """Dropped in enforce mode: behind more VLAN tags than are followed there may be a packet of anybody's."""

    @property
    def verdict(self) -> Verdict | None:
        return _OUTCOME[self][0]

    @property
    def action(self) -> Action:
        return _OUTCOME[self][1]

    @property
    def listed(self) -> bool:
        """Did an entry decide, not the default? (An essential packet may be either.)"""
        return self in (Outcome.ALLOWED, Outcome.DENIED_PASSED, Outcome.DENIED_DROPPED)


_OUTCOME: dict[Outcome, tuple[Verdict | None, Action]] = {
    Outcome.NO_SOURCE: (None, Action.PASS),
    Outcome.ALLOWED: (Verdict.ALLOW, Action.PASS),
    Outcome.DENIED_PASSED: (Verdict.DENY, Action.LOG),
    Outcome.DENIED_DROPPED: (Verdict.DENY, Action.DROP),
    Outcome.DEFAULT_ALLOWED: (Verdict.ALLOW, Action.PASS),
    Outcome.DEFAULT_LOGGED: (Verdict.LOG, Action.LOG),
    Outcome.DEFAULT_DENIED_PASSED: (Verdict.DENY, Action.LOG),
    Outcome.DEFAULT_DENIED_DROPPED: (Verdict.DENY, Action.DROP),
    Outcome.ESSENTIAL_PASSED: (Verdict.DENY, Action.PASS),
    Outcome.UNREADABLE_DROPPED: (Verdict.DENY, Action.DROP),
}


@dataclass(frozen=True, slots=True)
class Count:
    """Packets and bytes (frame length without FCS)."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)

    def __sub__(self, other: Count) -> Count:
        return Count(self.packets - other.packets, self.bytes - other.bytes)


@dataclass(frozen=True, slots=True)
class RuleCount:
    """What the entries of a prefix decided on. `partial`: at least so many; some packets could not be attributed to a rule."""

    packets: int = 0
    bytes: int = 0
    partial: bool = False


@dataclass(frozen=True, slots=True)
class RuleCounts:
    """The counts of all rules; `others` is what holds for those that are not among `counts`."""

    counts: Mapping[Prefix, RuleCount]
    others: RuleCount = RuleCount()

    def get(self, prefix: Prefix) -> RuleCount:
        return self.counts.get(prefix, self.others)


@dataclass(frozen=True, slots=True)
class Total:
    """One cell of the totals: exact, counted in the kernel for every packet."""

    interface: str
    family: Family
    protocol: ProtocolClass
    outcome: Outcome
    count: Count


@dataclass(frozen=True, slots=True)
class Talker:
    """One source on one destination port over an interval. `port` None: the protocol has none, or it could not be read; FOLDED_PORT:
    one of the ephemeral ports, kept as one."""

    family: Family
    address: bytes
    protocol: int
    port: int | None
    packets: int
    bytes: int
    syns: int
    first_seen: float
    """Seconds since the epoch."""
    last_seen: float
    icmp_type: int | None = None
    """Of ICMP and ICMPv6, which have no ports."""

    @property
    def source(self) -> str:
        return format_address(self.family, self.address)


@dataclass(frozen=True, slots=True)
class PacketEvent:
    """A sample: the first packet of a (source, verdict, port) in an interval. `suppressed` tells how many like it came since the last
    event and made none. `vlan` None: untagged, or the tag was stripped by the driver. Ports None: none, or unreadable."""

    timestamp: float
    """Seconds since the epoch."""
    interface: str
    vlan: int | None
    family: Family
    src_ip: str
    dst_ip: str
    src_port: int | None
    dst_port: int | None
    protocol_num: int
    packet_size: int
    outcome: Outcome
    rule: str
    """The matching prefix as text, or "default"."""
    suppressed: int
    flow_hash: int


PROTOCOL_NAMES = {
    1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 41: "ipv6", 47: "gre", 50: "esp", 51: "ah", 58: "icmpv6", 89: "ospf", 103: "pim",
    112: "vrrp", 132: "sctp",
}  # fmt: skip
"""IANA protocol numbers to the names used in output; others are shown by number."""


def protocol_name(number: int) -> str:
    return PROTOCOL_NAMES.get(number, str(number))


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a server listens: an IP address and a port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def local(self) -> bool:
        """Can nobody but this host reach it?"""
        return bool(self.path) or self.host == "::1" or self.host.startswith("127.")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to send to: a host's name or address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks for a change: the uid, the unique bus name (or "SIGHUP"), and the process as it was when first seen."""

    uid: int
    name: str
    pid: int | None = None
