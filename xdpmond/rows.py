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


Where = Callable[[np.ndarray], np.ndarray]
"""From rows, a mask of those that are wanted."""


def words_of(rows: np.ndarray) -> np.ndarray:
    """The same memory as an array of WORDS columns."""
    return np.ascontiguousarray(rows).view("u8").reshape(-1, WORDS)


def take(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`rows[at]` for an array of indexes, at seven times its speed."""
    return words_of(rows).take(at, axis=0).view(ROW).reshape(-1)


def count_of(rows: np.ndarray) -> Count:
    return Count(int(rows["packets"].sum()), int(rows["bytes"].sum()))


# The order


def _hash4(address: np.ndarray) -> np.ndarray:
    """39 bits that tell one IPv4 address: to multiply by an odd number loses nothing."""
    return (address * _SECRET[0] & np.uint64(0xFFFFFFFF)) << np.uint64(7)


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
    source = _hash4(low)
    ipv6 = np.flatnonzero(tail >> np.uint64(24) == Family.IPV6)
    if len(ipv6):
        source[ipv6] = _hash6(low.take(ipv6), high.take(ipv6))
    source <<= np.uint64(1)
    source[ipv6] |= np.uint64(1)
    return source << np.uint64(24) | tail & np.uint64(0xFFFFFF)


def order_of(keys: np.ndarray) -> np.ndarray:
    """Indexes that sort the keys."""
    if np.count_nonzero(keys[1:] < keys[:-1]) < _FEW:
        return keys.argsort(kind="stable")  # this merges what are a few sorted runs already
    # Numbers of 16 bits are sorted by radix. Then nothing is far from its place, and the same sort that merges runs has little to do:
    # together less than half of what it costs to sort at once.
    order = (keys >> np.uint64(48)).astype("u2").argsort(kind="stable")
    return order.take(keys.take(order).argsort(kind="stable"))


def ordered_chunks(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indexes in the order of the keys, with these, in chunks of about CHUNK that no source straddles."""
    order = order_of(keys)
    keys = keys.take(order)
    begin = 0
    while begin < len(keys):
        last = keys[min(begin + CHUNK, len(keys)) - 1] | np.uint64(0xFFFFFF)
        end = int(np.searchsorted(keys, last, side="right"))
        yield order[begin:end], keys[begin:end]
        begin = end


def collapse(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Sum neighbours of the same source, protocol and port, given rows in the order of their keys."""
    return _collapse(words_of(rows), keys)


def _collapse(words: np.ndarray, keys: np.ndarray, *, number: bool = False) -> np.ndarray:
    """The same; `number`: also how many there were."""
    if not len(words) or (len(words) == 1 and not number):
        return words.view(ROW).reshape(-1)
    new_source, new = _changes(words)
    if (new_source[1:] & (keys[1:] ^ keys[:-1] < np.uint64(1 << 24))).any():  # sources whose hashes are the same
        words = words.take(np.lexsort((words[:, 2], words[:, 1], words[:, 0], keys >> np.uint64(24))), axis=0)
        _, new = _changes(words)
    if new.all() and not number:
        return words.view(ROW).reshape(-1)
    starts = np.flatnonzero(new)
    merged = words.take(starts, axis=0)
    for column in _SUMS:
        merged[:, column] = np.add.reduceat(words[:, column], starts)
    for column, of in ((_FIRST, np.minimum), (_LAST, np.maximum)):
        merged.view("f8")[:, column] = of.reduceat(words.view("f8")[:, column], starts)
    if number:
        merged[:, 2] |= np.diff(starts, append=len(words)).astype("u8") << np.uint64(32)
    return merged.view(ROW).reshape(-1)


def _changes(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have another source than the one before them, and which are another talker. The first has and is."""
    source, talker = np.ones(len(words), bool), np.ones(len(words), bool)
    tail = words[1:, 2] ^ words[:-1, 2]
    source[1:] = (words[1:, 0] != words[:-1, 0]) | (words[1:, 1] != words[:-1, 1]) | (tail >= np.uint64(1 << 24))
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
    keys = np.concatenate([NO_KEYS, *(sort_keys(*of[at : at + CHUNK, :3].T) for of in words for at in range(0, len(of), CHUNK))])
    for order, chunk_keys in ordered_chunks(keys):
        yield collapse(_gather(words, order).view(ROW).reshape(-1), chunk_keys)


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


def unique_sources(merged: np.ndarray, wanted: np.ndarray | None = None) -> dict[Family, int]:
    """Distinct source addresses by family, of rows that are merged: of all, or of those in a mask."""
    before, ipv4, ipv6 = words_of(NO_ROWS), 0, 0
    for begin in range(0, len(merged), CHUNK):
        words = words_of(merged[begin : begin + CHUNK])
        if wanted is not None:
            words = words.take(np.flatnonzero(wanted[begin : begin + CHUNK]), axis=0)
        new = _changes(np.concatenate([before, words]))[0][len(before) :]
        number = np.count_nonzero(new & (words[:, 2] >> np.uint64(24) == Family.IPV6))
        ipv4, ipv6 = ipv4 + np.count_nonzero(new) - number, ipv6 + number
        before = words[-1:] if len(words) else before
    return {Family.IPV4: ipv4, Family.IPV6: ipv6}


def mask_of(rows: np.ndarray, where: Where) -> np.ndarray:
    """`where(rows)` in small steps."""
    mask = np.empty(len(rows), bool)
    for begin in range(0, len(rows), CHUNK):
        mask[begin : begin + CHUNK] = where(rows[begin : begin + CHUNK])
    return mask


def is_local(rows: np.ndarray) -> np.ndarray:
    """A mask of the rows whose source is in LOCAL."""
    words = words_of(rows)
    is_ipv6 = words[:, 2] >> np.uint64(24) == Family.IPV6
    addresses, found = words[:, 0].astype("u4").byteswap(), np.zeros(len(words), bool)
    for number, shift in _LOCAL4:
        found |= addresses >> shift == number
    ipv6 = np.flatnonzero(is_ipv6)
    if len(ipv6):
        high, low, of_ipv6 = words[ipv6, 0].byteswap(), words[ipv6, 1].byteswap(), np.zeros(len(ipv6), bool)
        for network, mask in _LOCAL6:
            of_ipv6 |= (high & mask[0] == network[0]) & (low & mask[1] == network[1])
        found[ipv6] = of_ipv6
    return found


def _halves(number: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(number >> 64), np.uint64(number & (1 << 64) - 1)


_LOCAL4 = [
    (np.uint32(int.from_bytes(prefix.address, "big") >> 32 - prefix.length), np.uint32(32 - prefix.length))
    for prefix in LOCAL
    if prefix.family is Family.IPV4
]
_LOCAL6 = [
    (_halves(int.from_bytes(prefix.address, "big")), _halves((1 << 128) - (1 << 128 - prefix.length)))
    for prefix in LOCAL
    if prefix.family is Family.IPV6
]


PORT = np.dtype([("ipv4", "u8"), ("ipv6", "u8"), ("packets", "u8"), ("bytes", "u8")])
BY_PORT = np.dtype([("key", "u4"), ("all", PORT), ("local", PORT)])
"""The sources that reached a port, their packets and bytes; and those of local sources alone. `key` is `port_key`."""


def port_key(protocol: int, port: int) -> int:
    return protocol << 16 | port


def by_port(merged: np.ndarray, local: np.ndarray) -> np.ndarray:
    """For each port that was reached its sources, in the order of the keys, as BY_PORT: of rows that are merged, and a mask of those whose
    source is local."""
    parts = [_by_tail(merged[at : at + CHUNK], local[at : at + CHUNK]) for at in range(0, len(merged), CHUNK)]
    cells = _sum_cells(np.concatenate(parts)) if parts else np.zeros((0, 4), "u8")
    cells = cells.take((cells[:, 0] & np.uint64(0xFFFFFF)).argsort(kind="stable"), axis=0)
    keys = cells[:, 0] & np.uint64(0xFFFFFF)
    new = np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]
    at, keys = new.cumsum() - 1, keys[new]
    found = np.zeros(len(keys), BY_PORT)
    found["key"] = keys
    for family, name in ((Family.IPV4, "ipv4"), (Family.IPV6, "ipv6")):
        for of_local in (False, True):
            # Each port is there once at most.
            mine = np.flatnonzero(cells[:, 0] >> np.uint64(24) == (family | of_local << 8))
            for of in ("all", "local") if of_local else ("all",):
                for column, number in ((name, 1), ("packets", 2), ("bytes", 3)):
                    found[of][column][at[mine]] += cells[mine, number]
    return found


def _by_tail(rows: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Sums of a chunk: (family, protocol and port, and whether local; sources; packets; bytes)."""
    words = words_of(rows)
    cells = np.empty((len(words), 4), "u8")
    cells[:, 0] = words[:, 2] & np.uint64(0xFFFFFFFF) | local.astype("u8") << np.uint64(32)
    cells[:, 1] = 1
    cells[:, 2], cells[:, 3] = words[:, _SUMS[0]], words[:, _SUMS[1]]
    return _sum_cells(cells)


def _sum_cells(cells: np.ndarray) -> np.ndarray:
    cells = cells.take(cells[:, 0].argsort(kind="stable"), axis=0)
    starts = np.flatnonzero(np.concatenate([[True], cells[1:, 0] != cells[:-1, 0]])) if len(cells) else np.zeros(0, int)
    summed = cells.take(starts, axis=0)
    if len(starts):
        summed[:, 1:] = np.add.reduceat(cells[:, 1:], starts, axis=0)
    return summed


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
    rows = take(rows, _most(rows[by], limit))
    return take(rows, rows[by].argsort(kind="stable")[::-1])


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

    def add(self, rows: np.ndarray) -> None:
        rows = take(rows, _most(rows[self._by], self._limit))
        if self._used + len(rows) > len(self._kept):
            words_of(self._kept)[: self._limit] = words_of(self.rows)
            self._used = self._limit
        words_of(self._kept)[self._used : self._used + len(rows)] = words_of(rows)
        self._used += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """In the order in which they came."""
        kept = self._kept[: self._used]
        return take(kept, _most(kept[self._by], self._limit))


def survey(*parts: np.ndarray, by: str = "packets", limit: int = 0, where: Where | None = None) -> Survey:
    """Look at all parts as merged, without making that array: how many sources there are, and the `limit` rows with the most of `by`."""
    unique = {Family.IPV4: 0, Family.IPV6: 0}
    kept, seen = _Strongest(by, limit), 0
    for rows in merged_chunks(*parts):
        if where is not None:
            rows = take(rows, np.flatnonzero(where(rows)))
        for family, number in unique_sources(rows).items():
            unique[family] += number
        seen += len(rows)
        kept.add(rows)
    return Survey(unique, kept.rows, seen <= limit)


def strongest_networks(*parts: np.ndarray, bits: Mapping[Family, int], by: str, limit: int, where: Where | None = None) -> np.ndarray:
    """The same of networks of so many bits, each by protocol and port, with the number of its sources; a family that is not in `bits` stays
    as it is."""
    masks = {family: _mask(family, length) for family, length in bits.items()}
    words = [words_of(part) for part in parts if len(part)]
    keys = [sort_keys(*_masked(of[at : at + CHUNK], masks)[:, :3].T) for of in words for at in range(0, len(of), CHUNK)]
    kept = _Strongest(by, limit)
    for order, _ in ordered_chunks(np.concatenate([NO_KEYS, *keys])):  # all of a network is in one
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
