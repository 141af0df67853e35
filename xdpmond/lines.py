"""Events as lines of text, thousands at a time: JSON Lines and CSV (RFC 4180) with the fields of the contract, JSON Lines with those of the
Elastic Common Schema, and lines for a person.

No line is made by itself. Each field is a column: an array of bytes with a row for each event, as wide as the widest, zeros where a text is
shorter. The columns are put side by side, and the zeros, which no text holds, are taken out: what is left are the lines. So an event
costs less than a microsecond, for the greater part without Python's interpreter lock.

A text from outside is quoted when its table is made. The only such texts are the names of interfaces; addresses and numbers are ours.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Protocol

import numpy as np

from .batch import HIGHEST_VLAN, EventBatch
from .messages import visible
from .model import Action, Family, Outcome, Verdict, protocol_name

FIELDS = (
    "timestamp", "timestamp_iso", "interface", "vlan", "family", "src_ip", "dst_ip", "src_port", "dst_port", "protocol", "protocol_num",
    "packet_size", "action", "verdict", "rule", "suppressed", "flow_hash",
)  # fmt: skip
"""In the order of `messages.event_fields`."""

Part = bytes | np.ndarray
"""Of a line: the same for all, or a row of bytes for each."""
Column = Sequence[Part]
"""What stands between two separators."""


class Style(Protocol):
    """How a format writes one value."""

    quote: bytes
    """On both sides of a text of ours."""

    def text(self, text: str | None) -> bytes: ...
    def protocol(self, number: int) -> bytes: ...
    def vlan(self, number: int | None) -> bytes: ...
    def action(self, action: Action) -> bytes: ...
    def verdict(self, verdict: Verdict | None) -> bytes: ...
    def line(self, columns: Mapping[str, Column], batch: EventBatch) -> Iterable[Part]:
        """The columns by the names of FIELDS, and what stands between them."""


class LineFormat:
    """`head` begins a file, and `lines` follow."""

    def __init__(self, style: Style, head: bytes = b""):
        self.head = head
        self._style = style
        self._null = style.text(None)
        protocols, outcomes = range(256), [Outcome(number) if number in set(Outcome) else Outcome.NO_SOURCE for number in range(16)]
        self._protocols = _table(map(style.protocol, protocols))
        self._vlans = _table(style.vlan(number if number <= HIGHEST_VLAN else None) for number in range(HIGHEST_VLAN + 2))
        self._actions = _table(style.action(Action.DROP if outcome.action is Action.DROP else Action.LOG) for outcome in outcomes)
        self._verdicts = _table(style.verdict(outcome.verdict) for outcome in outcomes)
        self._families = _table(style.text(Family(number).label) if number in set(Family) else b"" for number in range(7))
        self._numbers = np.zeros((65537, 5), "u1")
        self._numbers[:65536] = _digits(np.arange(65536))
        self._numbers[65536, : len(self._null)] = np.frombuffer(self._null, "u1")

    def lines(self, batch: EventBatch) -> bytes:
        if not len(batch):
            return b""
        columns = dict(zip(FIELDS, self._columns(batch), strict=True))
        return _joined(list(self._style.line(columns, batch)), len(batch))

    def _columns(self, batch: EventBatch) -> list[Column]:
        rows, style = batch.rows, self._style
        has_ports = rows["has_ports"] != 0
        which, rules = batch.rules()
        return [
            *self._times(batch),
            [_looked_up(_table(map(style.text, batch.interfaces)), rows["slot"])],
            [_looked_up(self._vlans, np.minimum(rows["vlan"], HIGHEST_VLAN + 1))],
            [_looked_up(self._families, batch.families)],
            self._addresses(batch.families, rows["source"]),
            self._addresses(batch.families, rows["destination"]),
            [self._known_number(rows["source_port"], has_ports)],
            [self._known_number(rows["destination_port"], has_ports)],
            [_looked_up(self._protocols, rows["protocol"])],
            [_looked_up(self._numbers, rows["protocol"])],
            [_decimal(rows["packet_size"])],
            [_looked_up(self._actions, rows["outcome"])],
            [_looked_up(self._verdicts, rows["outcome"])],
            [style.quote, _looked_up(_table(rule.encode() for rule in rules), which), style.quote],
            [_decimal(rows["suppressed"])],
            [_decimal(rows["flow_hash"])],
        ]

    def _times(self, batch: EventBatch) -> tuple[Column, Column]:
        """Seconds since the epoch, and the same by ISO 8601; to the microsecond."""
        moments = batch.microseconds()
        seconds = moments // 1_000_000
        fraction = (moments - seconds * 1_000_000).astype("u4")
        digits = _THOUSANDS[np.stack([fraction // 1000, fraction % 1000], axis=1)].reshape(-1, 6)
        which, each = _distinct(seconds)
        iso = (datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.").encode() for second in each)
        quote = self._style.quote
        since = _looked_up(_table(b"%d." % second for second in each), which)
        return [since, digits], [quote, _looked_up(_table(iso), which), digits, b"+00:00", quote]

    def _known_number(self, values: np.ndarray, known: np.ndarray) -> Part:
        return _looked_up(self._numbers, np.where(known, values, 65536))

    def _addresses(self, families: np.ndarray, addresses: np.ndarray) -> Column:
        if _all_equal(families) and _all_equal(addresses):
            families, addresses = families[:1], addresses[:1]  # as those of one host under attack
        of4, of6 = families == Family.IPV4, families == Family.IPV6
        quote = self._style.quote
        if of4.all():
            texts = _ipv4(addresses)
        elif of6.all():
            texts = _ipv6(addresses)
        else:
            texts = np.zeros((len(families), _LONGEST_ADDRESS), "u1")
            texts[of4, :_LONGEST_IPV4] = _ipv4(addresses[of4])
            texts[of6] = _ipv6(addresses[of6])
            neither = ~(of4 | of6)
            if neither.any():
                texts = _side_by_side(len(families), quote, texts, quote)
                texts[neither] = 0
                texts[neither, : len(self._null)] = np.frombuffer(self._null, "u1")
                return [texts]
        return [quote, _text(texts[0]) if len(texts) == 1 else texts, quote]


class _Plain:
    """What is the same in most formats."""

    quote = b""

    def text(self, text: str | None) -> bytes:
        raise NotImplementedError

    def protocol(self, number: int) -> bytes:
        return self.text(protocol_name(number))

    def vlan(self, number: int | None) -> bytes:
        return self.text(None) if number is None else b"%d" % number

    def action(self, action: Action) -> bytes:
        return self.text(action)

    def verdict(self, verdict: Verdict | None) -> bytes:
        return self.text(verdict)


class _Json(_Plain):
    quote = b'"'

    def text(self, text: str | None) -> bytes:
        return json.dumps(text).encode()

    def line(self, columns: Mapping[str, Column], batch: EventBatch) -> Iterable[Part]:
        for number, name in enumerate(FIELDS):
            yield f'{"," if number else "{"}"{name}":'.encode()
            yield from columns[name]
        yield b"}\n"


class _Ecs(_Json):
    """The names and values that the schema has for such things, and below "xdpmond" what it has none for. What happened is in
    event.type and event.action; event.outcome says that we did what we meant to."""

    _TEXT = (
        '{"@timestamp":%timestamp_iso%,"ecs":{"version":"8.11.0"},"event":{"kind":"event","category":["network"],"action":%action%,'
        '"outcome":"success","module":"xdpmond","dataset":"xdpmond.events"},"source":{"ip":%src_ip%,"port":%src_port%},'
        '"destination":{"ip":%dst_ip%,"port":%dst_port%},"network":{"type":%family%,"transport":%protocol%,"iana_number":"%protocol_num%",'
        '"direction":"ingress","bytes":%packet_size%,"vlan":{"id":%vlan%}},"observer":{"type":"firewall","product":"xdpmond",'
        '"ingress":{"interface":{"name":%interface%}}},"rule":{"name":%rule%},"xdpmond":{"verdict":%verdict%,"suppressed":%suppressed%,'
        '"flow_hash":%flow_hash%}}\n'
    )
    _PARTS = _TEXT.split("%")
    """What stands between two columns, and in every second place the name of one."""
    _TRANSPORT = {58: "ipv6-icmp"}
    """Where our name is not that of IANA."""

    def protocol(self, number: int) -> bytes:
        return self.text(self._TRANSPORT.get(number, protocol_name(number)))

    def vlan(self, number: int | None) -> bytes:
        return self.text(None if number is None else str(number))

    def action(self, action: Action) -> bytes:
        return b'"dropped","type":["connection","denied"]' if action is Action.DROP else b'"logged","type":["connection","allowed"]'

    def line(self, columns: Mapping[str, Column], batch: EventBatch) -> Iterable[Part]:
        for number, part in enumerate(self._PARTS):
            if number % 2:
                yield from columns[part]
            else:
                yield part.encode()


class _Console(_Plain):
    """As `xdpmonctl events` prints them. What is unknown is left out."""

    _OPEN, _BETWEEN = (b"", b"["), (b"", b":", b"]:")

    def text(self, text: str | None) -> bytes:
        return b"" if text is None else visible(text).encode()

    def vlan(self, number: int | None) -> bytes:
        return b"" if number is None else b" vlan %d" % number

    def action(self, action: Action) -> bytes:
        return f"{action:<4}".encode()

    def verdict(self, verdict: Verdict | None) -> bytes:
        return f"{verdict or '':<5}".encode()

    def line(self, columns: Mapping[str, Column], batch: EventBatch) -> Iterable[Part]:
        has_ports, ipv6 = batch.rows["has_ports"] != 0, batch.families == Family.IPV6
        bracketed = (has_ports & ipv6).astype("u1")
        opened, between = _looked_up(_table(self._OPEN), bracketed), _looked_up(_table(self._BETWEEN), has_ports + bracketed)
        which, counts = _distinct(batch.rows["suppressed"])
        more = (f", {count:,} more like it before".encode() if count else b"" for count in counts)
        yield from (*columns["timestamp_iso"], b" ", *columns["action"], b" ", *columns["verdict"], b" ")
        yield from (opened, *columns["src_ip"], between, *columns["src_port"], b" > ")
        yield from (opened, *columns["dst_ip"], between, *columns["dst_port"], b" ", *columns["protocol"])
        yield from (b" ", *columns["packet_size"], b" bytes on ", *columns["interface"], *columns["vlan"])
        yield from (b", rule ", *columns["rule"], _looked_up(_table(more), which), b"\n")


class _Csv(_Plain):
    def text(self, text: str | None) -> bytes:
        if text is None:
            return b""
        quoted = visible(text)
        if any(character in quoted for character in ',"'):
            quoted = '"' + quoted.replace('"', '""') + '"'
        return quoted.encode()

    def line(self, columns: Mapping[str, Column], batch: EventBatch) -> Iterable[Part]:
        for number, name in enumerate(FIELDS):
            if number:
                yield b","
            yield from columns[name]
        yield b"\r\n"


@cache
def jsonl() -> LineFormat:
    """An object a line."""
    return LineFormat(_Json())


@cache
def ecs() -> LineFormat:
    """An object a line, by the Elastic Common Schema."""
    return LineFormat(_Ecs())


@cache
def console() -> LineFormat:
    """A line for a person; what cannot be printed is spelled out."""
    return LineFormat(_Console())


@cache
def csv() -> LineFormat:
    """RFC 4180 with a header line. What is unknown is empty; what cannot be printed is spelled out."""
    return LineFormat(_Csv(), ",".join(FIELDS).encode() + b"\r\n")


# Columns

_DIGITS = np.frombuffer(b"0123456789abcdef", "u1")


def _joined(parts: Sequence[Part], number: int) -> bytes:
    whole = _side_by_side(number, *parts).reshape(-1)
    return whole[whole != 0].tobytes()


def _side_by_side(number: int, *parts: Part) -> np.ndarray:
    """One array of so many rows."""
    template = np.frombuffer(b"".join(part if isinstance(part, bytes) else bytes(part.shape[1]) for part in parts), "u1")
    whole = np.empty((number, len(template)), "u1")
    whole[:] = template
    at = 0
    for part in parts:
        width = len(part) if isinstance(part, bytes) else part.shape[1]
        if not isinstance(part, bytes):
            whole[:, at : at + width] = part
        at += width
    return whole


def _table(texts: Iterable[bytes]) -> np.ndarray:
    """A row for each text."""
    listed = list(texts)
    width = max(map(len, listed), default=0) or 1
    return np.frombuffer(b"".join(text.ljust(width, b"\0") for text in listed), "u1").reshape(len(listed), width)


def _text(row: np.ndarray) -> bytes:
    return row[row != 0].tobytes()


def _all_equal(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _looked_up(table: np.ndarray, which: np.ndarray) -> Part:
    """A row of the table for each; but once for all where it is the same, as much is in a flood: that costs nothing for each."""
    return _text(table[which[0]]) if _all_equal(which) else np.take(table, which, axis=0)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """For each value its place in the list of different ones, and that list."""
    if _all_equal(values):
        return np.zeros(len(values), "i4"), [int(values[0])]
    each, which = np.unique(values, return_inverse=True)
    return which, each.tolist()


def _decimal(values: np.ndarray) -> Part:
    """Unsigned numbers as digits."""
    return b"%d" % values[0] if _all_equal(values) else _digits(values)


def _digits(values: np.ndarray, base: int = 10) -> np.ndarray:
    largest, width = int(values.max()), 1
    while largest >= base**width:
        width += 1
    digits = np.empty((width, len(values)), "u1")
    rest = values
    for place in range(width - 1, -1, -1):
        quotient = rest // base
        digits[place] = _DIGITS[rest - quotient * base]
        rest = quotient
    for place in range(width - 1):  # leading zeros
        digits[place] *= values >= base ** (width - 1 - place)
    return digits.T


_LONGEST_IPV4, _LONGEST_ADDRESS = 4 * len(".255"), len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
_THOUSANDS = _table(b"%03d" % number for number in range(1000))
_OCTETS = _table(f"{dot}{octet}".encode() for dot in ("", ".") for octet in range(256)).view("u4")[:, 0]
"""Four bytes each: the first 256 for the first octet of an address, then those for the others."""
_SECOND_TABLE = np.array([0, 256, 256, 256], "u2")
_GROUPS = np.full((65536, 5), ord(":"), "u1")
_GROUPS[:, 1:] = _digits(np.arange(65536), 16)


def _ipv4(addresses: np.ndarray) -> np.ndarray:
    return _OCTETS[addresses[:, :4] + _SECOND_TABLE].view("u1")


def _ipv6(addresses: np.ndarray) -> np.ndarray:
    """As inet_ntop(3) writes them. It is asked for those that it shortens, with two zero groups in a row or more."""
    groups = addresses.astype("u4")
    groups = groups[:, ::2] << 8 | groups[:, 1::2]
    texts = np.zeros((len(addresses), _LONGEST_ADDRESS), "u1")
    texts[:, :4] = _GROUPS[groups[:, 0], 1:]
    texts[:, 4:] = _GROUPS[groups[:, 1:]].reshape(-1, 35)
    shortened = ((groups[:, 1:] == 0) & (groups[:, :-1] == 0)).any(axis=1)
    if shortened.any():
        each = np.ascontiguousarray(addresses[shortened]).view("V16")[:, 0].tolist()
        places = {address: place for place, address in enumerate(dict.fromkeys(each))}
        table = _table(socket.inet_ntop(socket.AF_INET6, address).encode().ljust(_LONGEST_ADDRESS, b"\0") for address in places)
        texts[shortened] = table[np.fromiter(map(places.__getitem__, each), "i4", len(each))]
    return texts
