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
from typing import Protocol

import numpy as np

from ..batch import HIGHEST_VLAN, EventBatch
from ..messages import visible
from ..model import Action, Family, Outcome, protocol_name

FIELDS = (
    "timestamp", "timestamp_iso", "interface", "vlan", "family", "src_ip", "dst_ip", "src_port", "dst_port", "protocol", "protocol_num",
    "packet_size", "action", "verdict", "rule", "suppressed", "flow_hash",
)  # fmt: skip
"""In the order of `messages.event_fields`."""

Part = bytes | np.ndarray
"""Of a line: the same for all, or a column."""


class Style(Protocol):
    """How a format writes one value."""

    quote: bytes
    """On both sides of a text of ours."""

    def text(self, text: str | None) -> bytes: ...
    def line(self, columns: Sequence[Part]) -> Iterable[Part]:
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
        self._numbers = _table([*(b"%d" % number for number in range(65536)), self._null])

    def lines(self, batch: EventBatch) -> bytes:
        return _joined(list(self._style.line(self._columns(batch))), len(batch)) if len(batch) else b""

    def _columns(self, batch: EventBatch) -> list[Part]:
        rows, style = batch.rows, self._style
        has_ports = rows["has_ports"] != 0
        which, rules = batch.rules()
        return [
            *self._times(batch),
            _table(map(style.text, batch.interfaces))[rows["slot"]],
            self._known_numbers(rows["vlan"], rows["vlan"] <= HIGHEST_VLAN),
            self._families[batch.families],
            self._addresses(batch.families, rows["source"]),
            self._addresses(batch.families, rows["destination"]),
            self._known_numbers(rows["source_port"], has_ports),
            self._known_numbers(rows["destination_port"], has_ports),
            self._protocols[rows["protocol"]],
            self._numbers[rows["protocol"]],
            _decimal(rows["packet_size"]),
            self._actions[rows["outcome"]],
            self._verdicts[rows["outcome"]],
            _table(map(style.text, rules))[which],
            _decimal(rows["suppressed"]),
            _decimal(rows["flow_hash"]),
        ]

    def _times(self, batch: EventBatch) -> tuple[np.ndarray, np.ndarray]:
        """Seconds since the epoch, and the same by ISO 8601; to the microsecond."""
        moments = batch.microseconds()
        seconds = moments // 1_000_000
        fraction = (moments - seconds * 1_000_000).astype("u4")
        digits = _THOUSANDS[np.stack([fraction // 1000, fraction % 1000], axis=1)].reshape(-1, 6)
        which, each = _distinct(seconds)
        iso = (datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S.").encode() for second in each)
        quote = self._style.quote
        since = _side_by_side(len(moments), _table(b"%d." % second for second in each)[which], digits)
        return since, _side_by_side(len(moments), quote, _table(iso)[which], digits, b"+00:00", quote)

    def _known_numbers(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        return np.take(self._numbers, np.where(known, values, 65536), axis=0)

    def _addresses(self, families: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        of4, of6 = families == Family.IPV4, families == Family.IPV6
        if of4.all():
            texts = _ipv4(addresses)
        elif of6.all():
            texts = _ipv6(addresses)
        else:
            texts = np.zeros((len(families), _LONGEST_ADDRESS), "u1")
            texts[of4, :_LONGEST_IPV4] = _ipv4(addresses[of4])
            texts[of6] = _ipv6(addresses[of6])
        quoted = _side_by_side(len(families), self._style.quote, texts, self._style.quote)
        neither = ~(of4 | of6)
        if neither.any():
            quoted[neither] = 0
            quoted[neither, : len(self._null)] = np.frombuffer(self._null, "u1")
        return quoted


class _Json:
    quote = b'"'

    def text(self, text: str | None) -> bytes:
        return json.dumps(text).encode()

    def line(self, columns: Sequence[Part]) -> Iterable[Part]:
        for number, (name, column) in enumerate(zip(FIELDS, columns, strict=True)):
            yield f'{"," if number else "{"}"{name}":'.encode()
            yield column
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

    def line(self, columns: Sequence[Part]) -> Iterable[Part]:
        for number, column in enumerate(columns):
            if number:
                yield b","
            yield column
        yield b"\r\n"


def jsonl() -> LineFormat:
    """An object a line."""
    return LineFormat(_Json())


def csv() -> LineFormat:
    """RFC 4180 with a header line. What is unknown is empty; what cannot be printed is spelled out."""
    return LineFormat(_Csv(), ",".join(FIELDS).encode() + b"\r\n")


# Columns


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


def _distinct(values: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """For each value its place in the list of different ones, and that list."""
    if values[0] == values[-1] and values.min() == values.max():
        return np.zeros(len(values), "i4"), [int(values[0])]
    each, which = np.unique(values, return_inverse=True)
    return which, each.tolist()


def _decimal(values: np.ndarray) -> np.ndarray:
    """Unsigned numbers as digits."""
    width = len(str(int(values.max())))
    digits = np.empty((width, len(values)), "u1")
    rest = values
    for place in range(width - 1, -1, -1):
        quotient = rest // 10
        digits[place] = rest - quotient * 10 + ord("0")
        rest = quotient
    for place in range(width - 1):  # leading zeros
        digits[place] *= values >= 10 ** (width - 1 - place)
    return digits.T


_LONGEST_IPV4, _LONGEST_ADDRESS = len("255.255.255.255"), len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
_THOUSANDS = _table(b"%03d" % number for number in range(1000))
_FIRST_OCTET = _table(b"%d" % octet for octet in range(256))
_NEXT_OCTETS = _table(b".%d" % octet for octet in range(256))
_GROUPS = _table(b":%x" % group for group in range(65536))


def _ipv4(addresses: np.ndarray) -> np.ndarray:
    return np.concatenate([_FIRST_OCTET[addresses[:, 0]], _NEXT_OCTETS[addresses[:, 1:4]].reshape(-1, 12)], axis=1)


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
