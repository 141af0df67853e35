"""Prefixes by the million: columns of numbers in place of objects, and texts read many lines at a time.

A `PrefixSet` keeps for each family and length the network addresses in one sorted array without doubles: IPv4 as numbers, IPv6 as 16 bytes
in network order, which sort as the numbers do. A million IPv4 prefixes are 4 MB. `model.Prefix` is the same as a value; objects are made
of the few that somebody looks at.

`PrefixReader` takes a text of one prefix a line. Lines that hold nothing but an IPv4 prefix in its one canonical spelling are read all
at once, with numpy. Any other line, be it a comment, IPv6 or a mistake, is read by itself and as strictly as `Prefix.parse` does: what is
taken, and what is said of the rest, does not depend on the way.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .errors import PrefixError, UsageError
from .model import Family, Origin, Prefix, Verdict

Key = tuple[Family, int]
"""Family and length."""

ADDRESS: dict[Family, np.dtype] = {Family.IPV4: np.dtype("u4"), Family.IPV6: np.dtype("S16")}
"""How a column holds addresses."""


def column(family: Family, packed: bytes) -> np.ndarray:
    """A column from addresses in network byte order, one after the other."""
    return np.frombuffer(packed, ">u4").astype("u4") if family is Family.IPV4 else np.frombuffer(packed, "S16")


def packed(addresses: np.ndarray) -> bytes:
    """The addresses of a column in network byte order, one after the other."""
    return addresses.astype(">u4").tobytes() if addresses.dtype.kind == "u" else addresses.tobytes()


def each_prefix(key: Key, addresses: np.ndarray) -> Iterator[Prefix]:
    family, length = key
    octets, size = packed(addresses), family.bits // 8
    return (Prefix(family, octets[at : at + size], length) for at in range(0, len(octets), size))


def masked(key: Key, addresses: np.ndarray) -> np.ndarray:
    """The network of this length that each address lies in."""
    family, length = key
    mask = (1 << family.bits) - (1 << (family.bits - length))
    if family is Family.IPV4:
        return addresses & np.uint32(mask)
    octets = np.ascontiguousarray(addresses).view("u1").reshape(-1, 16) & np.frombuffer(mask.to_bytes(16, "big"), "u1")
    return octets.reshape(-1).view("S16")


def bounds(prefix: Prefix) -> tuple[bytes, bytes]:
    """The first and the last address."""
    host_bits = (1 << (prefix.family.bits - prefix.length)) - 1
    last = int.from_bytes(prefix.address, "big") | host_bits
    return prefix.address, last.to_bytes(len(prefix.address), "big")


def find(addresses: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in a sorted column each wanted address stands, and whether it does."""
    if not len(addresses):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), bool)
    rows = np.minimum(np.searchsorted(addresses, wanted), len(addresses) - 1)
    return rows, addresses[rows] == wanted


def find_one(addresses: np.ndarray, address: bytes) -> int:
    """The row of one address (in network byte order); -1 if there is none."""
    # A number of another type than the column's would have numpy convert the whole column first.
    value = np.uint32(int.from_bytes(address, "big")) if len(address) == 4 else np.frombuffer(address, "S16")[0]
    row = int(addresses.searchsorted(value))
    return row if row < len(addresses) and addresses[row] == value else -1


class PrefixSet:
    """Prefixes, each once. `lines`, if known, says for each on which line it stands. Nobody changes the arrays."""

    __slots__ = ("columns", "lines")

    def __init__(self, columns: Mapping[Key, np.ndarray], lines: Mapping[Key, np.ndarray] | None = None):
        self.columns = {key: columns[key] for key in sorted(columns) if len(columns[key])}
        self.lines = {key: lines[key] for key in self.columns} if lines else {}

    @classmethod
    def of(cls, prefixes: Iterable[Prefix]) -> PrefixSet:
        found: dict[Key, list[bytes]] = {}
        for prefix in prefixes:
            found.setdefault((prefix.family, prefix.length), []).append(prefix.address)
        return cls({key: column(key[0], b"".join(sorted(set(addresses)))) for key, addresses in found.items()})

    def __len__(self) -> int:
        return sum(map(len, self.columns.values()))

    def __iter__(self) -> Iterator[Prefix]:
        """By family, length and address."""
        for key, addresses in self.columns.items():
            yield from each_prefix(key, addresses)

    def first(self, number: int) -> list[Prefix]:
        some = PrefixSet({key: addresses[:number] for key, addresses in self.columns.items()})
        return list(islice(some, number))

    def of_length(self, length: int) -> list[Prefix]:
        return [prefix for key, addresses in self.columns.items() if key[1] == length for prefix in each_prefix(key, addresses)]

    def line_of(self, prefix: Prefix) -> int:
        """0 if that is not known."""
        key = (prefix.family, prefix.length)
        return int(self.lines[key][find_one(self.columns[key], prefix.address)]) if self.lines else 0

    def without(self, other: PrefixSet) -> PrefixSet:
        kept = {
            key: ~find(other.columns[key], addresses)[1] if key in other.columns else np.ones(len(addresses), bool)
            for key, addresses in self.columns.items()
        }
        if all(mask.all() for mask in kept.values()):
            return self
        columns = {key: addresses[kept[key]] for key, addresses in self.columns.items()}
        return PrefixSet(columns, {key: lines[kept[key]] for key, lines in self.lines.items()})

    def common(self, other: PrefixSet) -> Prefix | None:
        """A prefix that is in both, if there is one."""
        for key, addresses in self.columns.items():
            if key in other.columns:
                both = addresses[find(other.columns[key], addresses)[1]]
                if len(both):
                    return next(each_prefix(key, both[:1]))
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Bulk:
    """Many entries that differ in nothing but the prefix, and the line on which it stands in the file `source`."""

    prefixes: PrefixSet
    verdict: Verdict
    origin: Origin
    created: float = 0.0
    expires: float | None = None
    reason: str = ""
    source: str = ""


LONGEST_LINE = 4096
_ENOUGH = 1 << 20
"""Rows that are gathered before doubles are looked for."""


class PrefixReader:
    """Reads a text piece by piece: `feed`, as often as there is more, then `finish`. More than `most` different prefixes are refused.

    Errors name the line, and the file if one is given. Of doubles the first line is kept; with a file the last one, as the configuration
    has it.
    """

    def __init__(self, most: int, file: str = ""):
        self._most = most
        self._file = file
        self._number = 0
        self._rest = b""
        self._ipv4 = [_Gathered.of_ipv4([], [])]
        self._ipv6 = [_Gathered.of_ipv6([], [])]

    def feed(self, data: bytes) -> None:
        whole, found, rest = data.rpartition(b"\n")
        if found:
            self._read(self._rest + whole + b"\n")
            self._rest = rest
        else:
            self._rest += rest
        if len(self._rest) > LONGEST_LINE:
            raise UsageError(f"{self._place(self._number + 1)} is longer than {LONGEST_LINE} characters")

    def finish(self) -> PrefixSet:
        self._read(self._rest + b"\n")
        self._rest = b""
        self._gather()
        return self._result()

    def _read(self, data: bytes) -> None:
        """Whole lines."""
        keys, at, ends, others = _canonical(data)
        canonical = _Gathered(keys, (at + (self._number + 1)).astype("u4"))
        ipv4: tuple[list[int], list[int]] = [], []
        ipv6: tuple[list[bytes], list[int]] = [], []
        edges = [-1, *ends.tolist()] if len(others) else []
        try:
            for index in others.tolist():
                number = self._number + index + 1
                prefix = _parse_line(data[edges[index] + 1 : edges[index + 1]])
                if prefix is None:
                    continue
                family, length, address = prefix
                if family is Family.IPV6:
                    ipv6[0].append(_LENGTH_OCTETS[length] + address)
                    ipv6[1].append(number)
                else:
                    ipv4[0].append(length << 32 | int.from_bytes(address, "big"))
                    ipv4[1].append(number)
        except PrefixError as error:
            # If there were too many prefixes before this line, that came first.
            self._take(canonical.before(number), ipv4, ipv6)
            self._gather()
            raise PrefixError(f"{self._place(number)}: {error.message}", hint=error.hint) from None
        self._number += len(ends)
        self._take(canonical, ipv4, ipv6)
        for parts in (self._ipv4, self._ipv6):
            if sum(map(len, parts[1:])) > max(_ENOUGH, len(parts[0])):
                self._gather()

    def _take(self, canonical: _Gathered, ipv4: tuple[list[int], list[int]], ipv6: tuple[list[bytes], list[int]]) -> None:
        self._ipv4 += [canonical, _Gathered.of_ipv4(*ipv4)]
        self._ipv6.append(_Gathered.of_ipv6(*ipv6))

    def _gather(self) -> None:
        """Drop the doubles, and see whether there are too many."""
        (ipv4,) = self._ipv4 = [_Gathered.merged(self._ipv4, last=bool(self._file))]
        (ipv6,) = self._ipv6 = [_Gathered.merged(self._ipv6, last=bool(self._file))]
        if len(ipv4) + len(ipv6) > self._most:
            line = int(np.sort(np.concatenate([ipv4.lines, ipv6.lines]))[self._most])
            place = self._file or self._place(line)  # the last lines do not tell which prefix was the first too many
            raise UsageError(f"{place}: more than {self._most} prefixes", hint="tables.prefixes says how many there may be")

    def _place(self, line: int) -> str:
        return f"{self._file}:{line}" if self._file else f"line {line}"

    def _result(self) -> PrefixSet:
        (ipv4,), (ipv6,) = self._ipv4, self._ipv6
        edges_ipv4 = np.searchsorted(ipv4.keys, np.arange(34, dtype="u8") << np.uint64(32))
        edges_ipv6 = np.searchsorted(ipv6.keys, np.array(_LENGTH_OCTETS, "S17"))
        addresses_ipv4 = ipv4.keys.astype("u4")  # drops the length
        addresses_ipv6 = np.ascontiguousarray(ipv6.keys.view("u1").reshape(-1, 17)[:, 1:]).view("S16").reshape(-1)
        columns, lines = {}, {}
        for family, edges, addresses, of in (
            (Family.IPV4, edges_ipv4, addresses_ipv4, ipv4),
            (Family.IPV6, edges_ipv6, addresses_ipv6, ipv6),
        ):
            for length in range(family.bits + 1):
                part = slice(edges[length], edges[length + 1])
                columns[family, length], lines[family, length] = addresses[part], of.lines[part]
        return PrefixSet(columns, lines)


_LENGTH_OCTETS = [bytes([length]) for length in range(130)]
_INDEX_BITS = 26
"""A key of IPv4 takes 38 bits of 64."""


@dataclass(frozen=True, slots=True, eq=False)
class _Gathered:
    """Prefixes of one family as keys, the length before the address, and their lines. IPv4: numbers; IPv6: 17 octets."""

    keys: np.ndarray
    lines: np.ndarray

    @classmethod
    def of_ipv4(cls, keys: list[int], lines: list[int]) -> _Gathered:
        return cls(np.array(keys, "u8"), np.array(lines, "u4"))

    @classmethod
    def of_ipv6(cls, keys: list[bytes], lines: list[int]) -> _Gathered:
        return cls(np.frombuffer(b"".join(keys), "S17"), np.array(lines, "u4"))

    def __len__(self) -> int:
        return len(self.keys)

    def before(self, line: int) -> _Gathered:
        kept = self.lines < line
        return _Gathered(self.keys[kept], self.lines[kept])

    @classmethod
    def merged(cls, parts: list[_Gathered], *, last: bool) -> _Gathered:
        """Sorted, each key once."""
        keys = np.concatenate([part.keys for part in parts])
        lines = np.concatenate([part.lines for part in parts])
        if not len(keys):
            return cls(keys, lines)
        if keys.dtype.kind == "u" and len(keys) < 1 << _INDEX_BITS:
            # Key and place sorted as one number: half the time of an argsort.
            keys <<= np.uint64(_INDEX_BITS)
            keys |= np.arange(len(keys), dtype="u8")
            keys.sort()
            order = (keys & np.uint64((1 << _INDEX_BITS) - 1)).astype("u4")
            keys >>= np.uint64(_INDEX_BITS)
            lines = lines[order]
        else:
            order = np.argsort(keys, kind="stable")
            keys, lines = keys[order], lines[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        if len(starts) == len(keys):
            return cls(keys, lines)
        # The parts need not come in the order of their lines.
        return cls(keys[starts], (np.maximum if last else np.minimum).reduceat(lines, starts))


_DOT, _SLASH, _NEWLINE, _OTHER = 1, 2, 3, 4
_KIND = np.full(256, _OTHER, "u1")
_KIND[ord("0") : ord("9") + 1] = 0
_KIND[ord(".")], _KIND[ord("/")], _KIND[ord("\n")] = _DOT, _SLASH, _NEWLINE
_LEAST = np.array([1000, 0, 10, 100], "u2")
"""The least number of so many digits without a leading zero; no digits make none."""
_HOST_BITS = np.array([(1 << (32 - length)) - 1 for length in range(33)], "u4")


def _canonical(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a text that ends with a line's end: keys of the lines that are IPv4 prefixes in canonical spelling, the indices of these lines,
    where each line ends, and the indices of all other lines."""
    text = np.frombuffer(data, "u1")
    kind = _KIND[text]
    marks = np.flatnonzero(kind)
    """Where tokens end: at every byte that is no digit."""
    kinds = kind[marks]
    sizes = np.diff(marks, prepend=-1) - 1
    last = np.flatnonzero(kinds == _NEWLINE)
    first = np.empty_like(last)
    first[0], first[1:] = 0, last[:-1] + 1
    number = last - first + 1
    at = np.flatnonzero((number == 4) | (number == 5))
    first, with_length = first[at], number[at] == 5
    good = (kinds[first] == _DOT) & (kinds[first + 1] == _DOT) & (kinds[first + 2] == _DOT)
    good &= ~with_length | (kinds[first + 3] == _SLASH)
    if not good.all():
        at, first, with_length = at[good], first[good], with_length[good]
    good = np.ones(len(at), bool)
    keys = np.zeros(len(at), "u4")
    for octet in range(4):
        value, valid = _numbers(text, marks[first + octet], sizes[first + octet])
        good &= valid & (value <= 255)
        keys = keys << np.uint32(8) | value
    lengths = np.full(len(at), 32, "u2")
    if with_length.any():
        chosen = first[with_length] + 4
        value, valid = _numbers(text, marks[chosen], sizes[chosen])
        good[with_length] &= valid & (value <= 32)
        lengths[with_length] = np.minimum(value, 32)
    good &= (keys & _HOST_BITS[lengths]) == 0
    others = np.ones(len(last), bool)
    others[at[good]] = False
    return (lengths.astype("u8") << np.uint64(32) | keys)[good], at[good], marks[last], np.flatnonzero(others)


def _numbers(text: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The decimal numbers that end before `ends`, and whether each has one to three digits and no leading zero."""
    digits = np.minimum(sizes, 4)
    value = (text[ends - 1] - np.uint8(48)).astype("u2")
    # Where there are fewer digits, what is read here belongs to something else, and is multiplied by zero.
    value += (text[ends - 2] - np.uint8(48)) * np.array([0, 0, 10, 10, 10], "u2")[digits]
    value += (text[ends - 3] - np.uint8(48)) * np.array([0, 0, 0, 100, 100], "u2")[digits]
    return value, (sizes <= 3) & (value >= _LEAST[digits & 3])


_LENGTHS = {str(length): length for length in range(129)}
_HOST_BITS_IPV6 = [(1 << (128 - length)) - 1 for length in range(129)]
_MAPPED = bytes(10) + b"\xff\xff"


def _parse_line(line: bytes) -> tuple[Family, int, bytes] | None:
    """Family, length and address; None if the line names no prefix."""
    text = line.partition(b"#")[0].strip().decode("ascii", errors="replace")
    if not text:
        return None
    if ":" in text:
        # What Prefix.parse would take, without the objects. It has the last word on everything else.
        address, slash, length_text = text.partition("/")
        length = _LENGTHS.get(length_text, -1) if slash else 128
        try:
            of = socket.inet_pton(socket.AF_INET6, address)
        except (OSError, ValueError):
            length = -1
        if length >= 0 and not int.from_bytes(of, "big") & _HOST_BITS_IPV6[length] and of[:12] != _MAPPED:
            return Family.IPV6, length, of
    prefix = Prefix.parse(text)
    return prefix.family, prefix.length, prefix.address
