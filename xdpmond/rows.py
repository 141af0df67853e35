"""Talkers by the million: one numpy row for a source on a destination port over an interval.

`model.Talker` is the same as a value; rows become values only when they are shown.

Rows are brought together by sorting them once, by a key of 64 bits: the source, then protocol and port. An IPv4 address is in the key
whole; an IPv6 address by a hash with a secret seed, so that whoever chooses his addresses cannot choose their keys. Two addresses with the
same hash become neighbours all the same, and neighbours are compared in full. What is sorted is then taken in chunks that no source
straddles: memory that is needed besides the rows themselves stays small, and no step holds the interpreter's lock for long.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .model import Count, Family, Prefix, Talker

ROW = np.dtype(
    [
        ("source", "u1", 16), ("port", "u2"), ("protocol", "u1"), ("family", "u1"), ("sources", "u4"), ("packets", "u8"), ("bytes", "u8"),
        ("syns", "u8"), ("first_seen", "f8"), ("last_seen", "f8"),
    ]
)  # fmt: skip
"""`family` is the number of a model.Family; IPv4 fills the first 4 bytes of `source`, and the rest is 0; `port` 0: none, or unreadable,
and of ICMP the type + 1; `sources` is 0 but for networks; times are seconds since the epoch. A row is eight words: numpy moves words much
faster than structs."""

WORDS = ROW.itemsize // 8
NO_ROWS = np.zeros(0, ROW)
NO_KEYS = np.zeros(0, "u8")
CHUNK = 8192
"""Rows that are worked on at a time: half a megabyte, what a CPU's cache holds."""

_SUMS = [ROW.fields[name][1] // 8 for name in ("packets", "bytes", "syns")]  # type: ignore[index]
_FIRST, _LAST = (ROW.fields[name][1] // 8 for name in ("first_seen", "last_seen"))  # type: ignore[index]
WITH_PORTS = (6, 17, 132)
"""TCP, UDP, SCTP."""
WITH_TYPES = (1, 58)
"""ICMP, ICMPv6."""
LOCAL = tuple(
    Prefix.parse(text)
    for text in ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
                 "::/127", "fc00::/7", "fe80::/10")
)  # fmt: skip
"""Sources that no packet from the Internet has: this host and this link (RFC 1122, 3927, 4291), private networks (RFC 1918, 4193), and
those behind a carrier's address translation (RFC 6598)."""

_FEW = 64
_SECRET = [np.uint64(secrets.randbits(64) | 1) for _ in range(3)]
_LOWER = np.uint64((1 << 48) - 1)
"""What is below the upper 16 bits."""
_ONE_SOURCE = np.uint64(1 << 24)
"""Keys that differ by less have the same source, or sources with the same hash."""


Where = Callable[[np.ndarray], np.ndarray]
"""From rows, a mask of those that are wanted."""


def words_of(rows: np.ndarray) -> np.ndarray:
    """The same memory as an array of WORDS columns."""
    return np.ascontiguousarray(rows).view("u8").reshape(-1, WORDS)


def take(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`rows[at]` for an array of indexes, at seven times its speed."""
    return words_of(rows).take(at, axis=0).view(ROW).reshape(-1)


def count_of(rows: np.ndarray) -> Count:
    return sum((Count(int(of["packets"].sum()), int(of["bytes"].sum())) for of in chunks_of(rows)), Count())


# The order


def _hash6(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """39 bits of an IPv6 address, which others may have too."""
    mixed = low * _SECRET[0]
    mixed ^= mixed >> np.uint64(32)
    mixed += high
    mixed *= _SECRET[1]
    mixed ^= mixed >> np.uint64(29)
    mixed *= _SECRET[2]
    return mixed >> np.uint64(25)


def sort_keys(low: np.ndarray, high: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """From the first three words of rows: by source in the upper 40 bits, then by protocol and port."""
    source = low * _SECRET[0] << np.uint64(32)  # of IPv4: to multiply 32 bits by an odd number loses nothing
    ipv6 = np.flatnonzero(tail >> np.uint64(24) == Family.IPV6)
    if len(ipv6):
        source[ipv6] = _hash6(low.take(ipv6), high.take(ipv6)) << np.uint64(25) | _ONE_SOURCE
    return source | tail & np.uint64(0xFFFFFF)


def order_of(keys: np.ndarray) -> np.ndarray:
    """Indexes that sort the keys."""
    # When nothing is far from its place any more, the sort that merges runs has little to do: together less than half of what it costs
    # to sort at once.
    order = _nearly_sorted(keys)
    return order.take(keys.take(order).argsort(kind="stable"))


def _nearly_sorted(keys: np.ndarray) -> np.ndarray:
    """Indexes that sort the keys by their upper 16 bits at least."""
    if np.count_nonzero(keys[1:] < keys[:-1]) < _FEW:
        return keys.argsort(kind="stable")  # this merges what are a few sorted runs already
    return keys.view("u2")[3::4].argsort(kind="stable")  # numbers of 16 bits are sorted by radix


def ordered_chunks(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indexes in the order of the keys, with these, in chunks of about CHUNK that no source straddles."""
    order = _nearly_sorted(keys)
    keys = keys.take(order)
    begin = 0
    while begin < len(keys):
        last = keys[min(begin + CHUNK, len(keys)) - 1] | _LOWER
        end = int(np.searchsorted(keys, last, side="right"))
        within = keys[begin:end].argsort(kind="stable")
        yield order[begin:end].take(within), keys[begin:end].take(within)
        begin = end


def collapse(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Sum neighbours of the same source, protocol and port, given rows in the order of their keys."""
    return _collapse(words_of(rows), keys)


def _collapse(words: np.ndarray, keys: np.ndarray, *, number: bool = False) -> np.ndarray:
    """The same; `number`: also how many there were."""
    if not len(words) or (len(words) == 1 and not number):
        return words.view(ROW).reshape(-1)
    alike = keys[1:] ^ keys[:-1] < _ONE_SOURCE
    if not number and not alike.any():
        return words.view(ROW).reshape(-1)
    new_source, new = _changes(words)
    if (new_source[1:] & alike).any():  # sources whose hashes are the same
        words = words.take(np.lexsort((words[:, 2], words[:, 1], words[:, 0], keys >> np.uint64(24))), axis=0)
        _, new = _changes(words)
    if new.all() and not number:
        return words.view(ROW).reshape(-1)
    starts = np.flatnonzero(new)
    if number:
        merged = _merged(words, starts)
        merged[:, 2] |= np.diff(starts, append=len(words)).astype("u8") << np.uint64(32)
        return merged.view(ROW).reshape(-1)
    several = ~new
    several[:-1] |= several[1:]
    few = np.flatnonzero(several)
    if 2 * len(few) > len(words):
        return _merged(words, starts).view(ROW).reshape(-1)
    merged = words.take(starts, axis=0)
    merged[np.flatnonzero(several[starts])] = _merged(words.take(few, axis=0), np.flatnonzero(new[few]))
    return merged.view(ROW).reshape(-1)


def _merged(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Each row that stands at a start, with the sums of those up to the next."""
    merged = words.take(starts, axis=0)
    for column in _SUMS:
        merged[:, column] = np.add.reduceat(words[:, column], starts)
    for column, of in ((_FIRST, np.minimum), (_LAST, np.maximum)):
        merged.view("f8")[:, column] = of.reduceat(words.view("f8")[:, column], starts)
    return merged


def _changes(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have another source than the one before them, and which are another talker. The first has and is."""
    source, talker = np.ones(len(words), bool), np.ones(len(words), bool)
    low, high, tail = (words[:, column].copy() for column in range(3))
    tail = tail[1:] ^ tail[:-1]
    source[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1]) | (tail >= _ONE_SOURCE)
    talker[1:] = source[1:] | (tail != 0)
    return source, talker


def assemble(most: int, chunks: Iterable[np.ndarray]) -> np.ndarray:
    """One array from chunks that have `most` rows together at most; memory that is not written to costs nothing."""
    words = np.empty((most, WORDS), "u8")
    length = 0
    for chunk in chunks:
        words[length : length + len(chunk)] = words_of(chunk)
        length += len(chunk)
    return words[:length].view(ROW).reshape(-1)


# Questions


def merged_chunks(*parts: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of all parts with those of the same source, protocol and port summed, in chunks that no source straddles."""
    words = [words_of(part) for part in parts if len(part)]
    for order, keys in ordered_chunks(_keys_of(words)):
        yield collapse(_gather(words, order).view(ROW).reshape(-1), keys)


def _keys_of(parts: list[np.ndarray], masks: Mapping[Family, np.ndarray] | None = None) -> np.ndarray:
    """Those of the rows of all parts, or of their networks. Whoever sorts them may let go of them: they are many."""
    keys, length = np.empty(sum(map(len, parts)), "u8"), 0
    for words in (part[begin : begin + CHUNK] for part in parts for begin in range(0, len(part), CHUNK)):
        keys[length : length + len(words)] = sort_keys(*(_masked(words, masks) if masks else words)[:, :3].T)
        length += len(words)
    return keys


def _gather(parts: list[np.ndarray], at: np.ndarray) -> np.ndarray:
    """`concatenate(parts)[at]`, without concatenating."""
    if len(parts) == 1:
        return parts[0].take(at, axis=0)
    gathered = np.empty((len(at), WORDS), "u8")
    for part in parts:
        mine = np.flatnonzero((at >= 0) & (at < len(part)))
        gathered[mine] = part.take(at.take(mine), axis=0)
        at = at - len(part)
    return gathered


def merge(*parts: np.ndarray) -> np.ndarray:
    """Sum the rows of the same source, protocol and port: over CPUs, or over intervals. Those of a source are neighbours then."""
    return assemble(sum(len(part) for part in parts), merged_chunks(*parts))


def by_source(rows: np.ndarray) -> np.ndarray:
    """Sum the rows of each source, whose protocol and port are then 0."""
    rows = words_of(rows).copy()
    rows[:, 2] &= np.uint64(0xFF000000)
    return merge(rows.view(ROW).reshape(-1))


class SourceCount:
    """Counts the distinct sources of merged rows, which come in chunks."""

    def __init__(self) -> None:
        self.unique = {Family.IPV4: 0, Family.IPV6: 0}
        self._last = words_of(NO_ROWS)

    def add(self, rows: np.ndarray) -> None:
        words = words_of(rows)
        if not len(words):
            return
        new, _ = _changes(words)
        new[0] = _changes(np.concatenate([self._last, words[:1]]))[0][-1]
        self._last = words[-1:].copy()
        ipv6 = int(np.count_nonzero(new & (words[:, 2] >> np.uint64(24) == Family.IPV6)))
        self.unique[Family.IPV4] += int(np.count_nonzero(new)) - ipv6
        self.unique[Family.IPV6] += ipv6


def chunks_of(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows, CHUNK at a time."""
    return (rows[begin : begin + CHUNK] for begin in range(0, len(rows), CHUNK))


def unique_sources(merged: np.ndarray) -> dict[Family, int]:
    """Distinct source addresses by family, of rows that are merged."""
    sources = SourceCount()
    for rows in chunks_of(merged):
        sources.add(rows)
    return sources.unique


def only(rows: np.ndarray, where: Where) -> np.ndarray:
    return take(rows, np.flatnonzero(where(rows)))


def is_local(rows: np.ndarray) -> np.ndarray:
    """A mask of the rows whose source is in LOCAL."""
    words = words_of(rows)
    found = _LOCAL4.take(words.view("u2")[:, 0])
    ipv6 = np.flatnonzero(words[:, 2] >> np.uint64(24) == Family.IPV6)
    if len(ipv6):
        high, low, of_ipv6 = words[ipv6, 0].byteswap(), words[ipv6, 1].byteswap(), np.zeros(len(ipv6), bool)
        for network, mask in _LOCAL6:
            of_ipv6 |= (high & mask[0] == network[0]) & (low & mask[1] == network[1])
        found[ipv6] = of_ipv6
    return found


def _begins_of_local() -> np.ndarray:
    """Which IPv4 addresses are local, by their first two octets as they lie in memory: no prefix of them is longer."""
    local = np.zeros((256, 256), bool)
    for prefix in LOCAL:
        if prefix.family is Family.IPV4:
            first, second = prefix.address[:2]
            local.ravel()[first << 8 | second :][: 1 << 16 - prefix.length] = True
    return local.T.ravel()


def _halves(number: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(number >> 64), np.uint64(number & (1 << 64) - 1)


_LOCAL4 = _begins_of_local()
_LOCAL6 = [
    (_halves(int.from_bytes(prefix.address, "big")), _halves((1 << 128) - (1 << 128 - prefix.length)))
    for prefix in LOCAL
    if prefix.family is Family.IPV6
]


PORT = np.dtype([("ipv4", "u8"), ("ipv6", "u8"), ("packets", "u8"), ("bytes", "u8")])
"""The sources that reached a port, their packets and bytes."""


def port_key(protocol: int, port: int) -> int:
    return protocol << 16 | port


class PortSums:
    """Counts the sources of each port, their packets and bytes, of merged rows, which come in chunks."""

    def __init__(self) -> None:
        self._sums: list[Columns] = [[NO_KEYS] * 4]
        self._waiting = 0

    def add(self, rows: np.ndarray) -> None:
        words = words_of(rows)
        tail = words[:, 2] & np.uint64(0xFFFFFFFF)
        # Of the family, protocol and port the port is in front: the upper bits are sorted first, and in it rows differ most.
        places = tail << np.uint64(48) | tail >> np.uint64(16)
        self._sums.append(_summed([places, np.ones(len(words), "u8"), words[:, _SUMS[0]], words[:, _SUMS[1]]]))
        self._waiting += len(self._sums[-1][0])
        if self._waiting > _MOST_WAITING:
            self._together()

    def _together(self) -> Columns:
        self._sums, self._waiting = [_summed([np.concatenate(column) for column in zip(*self._sums, strict=True)])], 0
        return self._sums[0]

    def ports(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys of the ports that were reached, in order, and for each a PORT."""
        places, *sums = self._together()
        keys, at = np.unique((places >> np.uint64(48) | places << np.uint64(16)) & np.uint64(0xFFFFFF), return_inverse=True)
        found = np.zeros(len(keys), PORT)
        for family, name in ((Family.IPV4, "ipv4"), (Family.IPV6, "ipv6")):
            mine = np.flatnonzero(places >> np.uint64(8) & np.uint64(0xFF) == family)
            for column, values in zip((name, "packets", "bytes"), sums, strict=True):
                found[column][at[mine]] += values[mine]  # each port is there once at most
        return keys.astype("u4"), found


Columns = list[np.ndarray]
_MOST_WAITING = 1 << 17


def _summed(columns: Columns) -> Columns:
    """What stands in the first column once each, and in the others the sums over it."""
    if not len(columns[0]):
        return columns
    if (columns[0][1:] < columns[0][:-1]).any():
        order = order_of(columns[0])
        columns = [column.take(order) for column in columns]
    places, *others = columns
    starts = np.flatnonzero(np.concatenate([[True], places[1:] != places[:-1]]))
    return [places.take(starts), *(np.add.reduceat(column, starts) for column in others)]


def _most(column: np.ndarray, limit: int) -> np.ndarray:
    """Indexes of the `limit` largest, in the order in which they stand."""
    if len(column) <= limit:
        return np.arange(len(column))
    if not limit:
        return np.zeros(0, int)
    at = np.argpartition(column, len(column) - limit)[len(column) - limit :]
    at.sort()
    return at


def strongest(rows: np.ndarray, by: str, limit: int) -> np.ndarray:
    """The `limit` rows with the most of `by` ("packets", "bytes", "syns"), strongest first."""
    kept = _Strongest(by, limit)
    for chunk in chunks_of(rows):
        kept.add(chunk)
    found = kept.rows
    return take(found, found[by].argsort(kind="stable")[::-1])


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found out of many rows."""

    unique: dict[Family, int]
    """Distinct source addresses."""
    strongest: np.ndarray
    """In the order of merged rows."""
    complete: bool
    """Is that every row?"""


class _Strongest:
    """Of rows that come in chunks, the `limit` ones with the most of `by`."""

    def __init__(self, by: str, limit: int):
        self._by, self._limit = by, limit
        self._kept, self._used = np.empty(2 * limit, ROW), 0
        self._least: int | None = None

    def add(self, rows: np.ndarray) -> None:
        if self._least is not None:
            rows = only(rows, lambda of: of[self._by] > self._least)
        rows = take(rows, _most(rows[self._by], self._limit))
        if self._used + len(rows) > len(self._kept):
            words_of(self._kept)[: self._limit] = words_of(self.rows)
            self._used = self._limit
            self._least = self._kept[self._by][: self._limit].min()  # of any more `limit` rows have at least as much
        words_of(self._kept)[self._used : self._used + len(rows)] = words_of(rows)
        self._used += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """In the order in which they came."""
        kept = self._kept[: self._used]
        return take(kept, _most(kept[self._by], self._limit))


def survey(*parts: np.ndarray, by: str = "packets", limit: int = 0, where: Where | None = None) -> Survey:
    """Look at all parts as merged, without making that array: how many sources there are, and the `limit` rows with the most of `by`."""
    sources, kept, seen = SourceCount(), _Strongest(by, limit), 0
    for rows in merged_chunks(*parts):
        if where is not None:
            rows = only(rows, where)
        sources.add(rows)
        kept.add(rows)
        seen += len(rows)
    return Survey(sources.unique, kept.rows, seen <= limit)


def strongest_networks(*parts: np.ndarray, bits: Mapping[Family, int], by: str, limit: int, where: Where | None = None) -> np.ndarray:
    """The same of networks of so many bits, each by protocol and port, with the number of its sources; a family that is not in `bits` stays
    as it is."""
    masks = {family: _mask(family, length) for family, length in bits.items()}
    words = [words_of(part) for part in parts if len(part)]
    kept = _Strongest(by, limit)
    for order, _ in ordered_chunks(_keys_of(words, masks)):  # all of a network is in one
        rows = _gather(words, order).view(ROW).reshape(-1)
        if where is not None:
            rows = take(rows, np.flatnonzero(where(rows)))
        networks = _masked(words_of(merge(rows)), masks)
        of_networks = sort_keys(*networks[:, :3].T)
        order = order_of(of_networks)
        kept.add(_collapse(networks.take(order, axis=0), of_networks.take(order), number=True))
    return kept.rows


def _mask(family: Family, bits: int) -> np.ndarray:
    """As the two words of a source."""
    octets = ((1 << bits) - 1 << family.bits - bits).to_bytes(family.bits // 8, "big")
    return np.frombuffer(octets.ljust(16, b"\0"), "u8")


def _masked(words: np.ndarray, masks: Mapping[Family, np.ndarray]) -> np.ndarray:
    """Rows with the sources of networks."""
    words = words.copy()
    for family, mask in masks.items():
        mine = np.flatnonzero(words[:, 2] >> np.uint64(24) == family)
        words[mine, 0] &= mask[0]
        words[mine, 1] &= mask[1]
    return words


def of_source(rows: np.ndarray, family: Family, packed: bytes) -> np.ndarray:
    """The rows of one source."""
    words = words_of(rows)
    low, high = np.frombuffer(packed.ljust(16, b"\0"), "u8")
    return take(rows, np.flatnonzero((words[:, 0] == low) & (words[:, 1] == high) & (words[:, 2] >> np.uint64(24) == family)))


def talker(row: np.void) -> Talker:
    """One row as a value."""
    family = Family(int(row["family"]))
    port, protocol = int(row["port"]) or None, int(row["protocol"])
    return Talker(
        family=family,
        address=row["source"].tobytes()[: family.bits // 8],
        protocol=protocol,
        port=port if protocol in WITH_PORTS else None,
        icmp_type=port - 1 if port and protocol in WITH_TYPES else None,
        packets=int(row["packets"]),
        bytes=int(row["bytes"]),
        syns=int(row["syns"]),
        first_seen=float(row["first_seen"]),
        last_seen=float(row["last_seen"]),
    )
