"""Events as lines of text, thousands at a time: JSON Lines and CSV (RFC 4180), with the fields of the contract.

No line is made by itself. Each field is a column: an array of bytes with a row for each event, as wide as the widest, zeros where a text is
shorter. The columns are put side by side, and the zeros, which no text holds, are taken out: what is left are the lines. So an event
costs less than a microsecond, for the greater part without Python's interpreter lock.

A text from outside is quoted when its table is made. The only such texts are the names of interfaces; addresses and numbers are ours.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Protocol

import numpy as np

from .batch import HIGHEST_VLAN, EventBatch
from .messages import visible
from .model import Action, Family, Outcome, protocol_name

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
    def line(self, columns: Sequence[Column]) -> Iterable[Part]:
        """The columns in the order of FIELDS, and what stands between them."""


class LineFormat:
    """`head` begins a file, and `lines` follow."""

    def __init__(self, style: Style, head: bytes = b""):
        self.head = head
        self._style = style
        self._null = style.text(None)
        protocols, outcomes = range(256), [Outcome(number) if number in set(Outcome) else Outcome.NO_SOURCE for number in range(16)]
        self._protocols = _table(style.text(protocol_name(number)) for number in protocols)
        self._actions = _table(style.text(Action.DROP if outcome.action is Action.DROP else Action.LOG) for outcome in outcomes)
        self._verdicts = _table(style.text(outcome.verdict) for outcome in outcomes)
        self._families = _table(style.text(Family(number).label) if number in set(Family) else b"" for number in range(7))
        self._numbers = np.zeros((65537, 5), "u1")
        self._numbers[:65536] = _digits(np.arange(65536))
        self._numbers[65536, : len(self._null)] = np.frombuffer(self._null, "u1")

    def lines(self, batch: EventBatch) -> bytes:
        return _joined(list(self._style.line(self._columns(batch))), len(batch)) if len(batch) else b""

    def _columns(self, batch: EventBatch) -> list[Column]:
        rows, style = batch.rows, self._style
        has_ports = rows["has_ports"] != 0
        which, rules = batch.rules()
        return [
            *self._times(batch),
            [_looked_up(_table(map(style.text, batch.interfaces)), rows["slot"])],
            [self._known_number(rows["vlan"], rows["vlan"] <= HIGHEST_VLAN)],
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


class _Json:
    quote = b'"'

    def text(self, text: str | None) -> bytes:
        return json.dumps(text).encode()

    def line(self, columns: Sequence[Column]) -> Iterable[Part]:
        for number, (name, column) in enumerate(zip(FIELDS, columns, strict=True)):
            yield f'{"," if number else "{"}"{name}":'.encode()
            yield from column
        yield b"}\n"


class _Csv:
    quote = b""

    def text(self, text: str | None) -> bytes:
        if text is None:
            return b""
        quoted = visible(text)
        if any(character in quoted for character in ',"'):
            quoted = '"' + quoted.replace('"', '""') + '"'
        return quoted.encode()

    def line(self, columns: Sequence[Column]) -> Iterable[Part]:
        for number, column in enumerate(columns):
            if number:
                yield b","
            yield from column
        yield b"\r\n"


@cache
def jsonl() -> LineFormat:
    """An object a line."""
    return LineFormat(_Json())


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
