"""Flows by the million: one numpy row for a 5-tuple over an interval, as `rows` has one for a talker.

A flow is what came from one source, address and port, to one destination by one protocol. The talkers are in it: their rows are sums over
those of the flows, and `talkers_of` makes them. The port of a talker may be a folded one (see `rows`), that of a flow is always the
packets' own, so a row has both.

Rows are brought together as in `rows`: sorted once by a key of 64 bits, which is the source's part of a talker's key and a hash of the
rest, then compared with their neighbours in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from .rows import CHUNK, NO_KEYS, ROW, WORDS, assemble, collapse, merge, order_of, ordered_chunks, sort_keys

FLOW = np.dtype(
    [
        ("source", "u1", 16), ("destination", "u1", 16), ("source_port", "u2"), ("port", "u2"), ("protocol", "u1"), ("family", "u1"),
        ("outcome", "u1"), ("tcp_flags", "u1"), ("slot", "u1"), ("pad", "u1"), ("talker_port", "u2"), ("pad2", "u4"), ("packets", "u8"),
        ("bytes", "u8"), ("ip_bytes", "u8"), ("syns", "u8"), ("first_seen", "f8"), ("last_seen", "f8"),
    ]
)  # fmt: skip
"""`family` is the number of a model.Family; an IPv4 address fills the first 4 bytes, and the rest is 0. Of ICMP and ICMPv6, `port` is the
type + 1 and `source_port` the code; 0: none, or unread. `outcome` (model.Outcome) and `slot`, which tells the interface, are those of the
last packet, `tcp_flags` those of all, `talker_port` is the port of the talker. `bytes` are frame lengths, as everywhere; `ip_bytes` are
those of the IP packets alone, as IPFIX counts. Times are seconds since the epoch. A row is twelve words."""

FLOW_WORDS = FLOW.itemsize // 8
NO_FLOWS = np.zeros(0, FLOW)

_PLACE, _REST = (FLOW.fields[name][1] // 8 for name in ("source_port", "slot"))  # type: ignore[index]
_SUMS = [FLOW.fields[name][1] // 8 for name in ("packets", "bytes", "ip_bytes", "syns")]  # type: ignore[index]
_FIRST, _LAST = (FLOW.fields[name][1] // 8 for name in ("first_seen", "last_seen"))  # type: ignore[index]
_TUPLE = np.uint64(0xFFFF_FFFFFFFF)
"""Of the word with the ports: what is of the 5-tuple. Above it stand the outcome and the flags."""
_FLAGS = np.uint64(56)
_HASHED = np.uint64(0xFFFFFF)
_FACTORS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def flow_words(flows: np.ndarray) -> np.ndarray:
    """The same memory as an array of FLOW_WORDS columns."""
    return np.ascontiguousarray(flows).view("u8").reshape(-1, FLOW_WORDS)


def take_flows(flows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`flows[at]` for an array of indexes, several times as fast."""
    return flow_words(flows).take(at, axis=0).view(FLOW).reshape(-1)


def flow_keys(low: np.ndarray, high: np.ndarray, to_low: np.ndarray, to_high: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Keys of flows, from the first five words of their rows: by source in the upper 40 bits, then by a hash of all else."""
    place = place & _TUPLE
    hashed = (to_low ^ place) * _FACTORS[0]
    hashed ^= hashed >> np.uint64(32)
    hashed += to_high
    hashed *= _FACTORS[1]
    return sort_keys(low, high, place >> np.uint64(40) << np.uint64(24) | hashed >> np.uint64(40))


def collapse_flows(flows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Sum neighbours of the same 5-tuple, given rows in the order of their keys."""
    words = flow_words(flows)
    if len(words) < 2:
        return flows
    new = _changes(words)
    if (new[1:] & (keys[1:] == keys[:-1])).any():  # flows whose keys are the same
        words = words.take(np.lexsort((words[:, 4] & _TUPLE, words[:, 3], words[:, 2], words[:, 1], words[:, 0], keys)), axis=0)
        new = _changes(words)
    if new.all():
        return words.view(FLOW).reshape(-1)
    starts = np.flatnonzero(new)
    merged = words.take(_latest(words, starts), axis=0)
    for column in _SUMS:
        merged[:, column] = np.add.reduceat(words[:, column], starts)
    for column, of in ((_FIRST, np.minimum), (_LAST, np.maximum)):
        merged.view("f8")[:, column] = of.reduceat(words.view("f8")[:, column], starts)
    merged[:, _PLACE] |= np.bitwise_or.reduceat(words[:, _PLACE] >> _FLAGS << _FLAGS, starts)
    return merged.view(FLOW).reshape(-1)


def _changes(words: np.ndarray) -> np.ndarray:
    """Which rows are another flow than the one before them. The first one is."""
    new = np.ones(len(words), bool)
    new[1:] = (words[1:, :4] != words[:-1, :4]).any(axis=1) | ((words[1:, _PLACE] ^ words[:-1, _PLACE]) & _TUPLE != 0)
    return new


def _latest(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of each group of neighbours the one that was seen last: its outcome and interface hold."""
    lengths = np.diff(starts, append=len(words))
    group = np.repeat(np.arange(len(starts)), lengths)
    order = np.lexsort((words.view("f8")[:, _LAST], group))
    return order[starts + lengths - 1]


def merge_flows(*parts: np.ndarray) -> np.ndarray:
    """Sum the rows of the same 5-tuple: over CPUs, or over intervals. Those of a source are neighbours then."""
    words = [flow_words(part) for part in parts if len(part)]
    if not words:
        return NO_FLOWS.copy()
    keys = np.concatenate([NO_KEYS, *(flow_keys(*of[at : at + CHUNK, :5].T) for of in words for at in range(0, len(of), CHUNK))])
    return assemble_flows(len(keys), (collapse_flows(_gather(words, order), of) for order, of in flow_chunks(keys)))


def flow_chunks(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indexes in the order of the keys, with these, in chunks of about CHUNK that no flow straddles. A single source may have a million
    flows."""
    order = order_of(keys)
    keys = keys.take(order)
    begin = 0
    while begin < len(keys):
        end = int(np.searchsorted(keys, keys[min(begin + CHUNK, len(keys)) - 1], side="right"))
        yield order[begin:end], keys[begin:end]
        begin = end


def assemble_flows(most: int, chunks: Iterable[np.ndarray]) -> np.ndarray:
    """`rows.assemble` for flows."""
    words, length = np.empty((most, FLOW_WORDS), "u8"), 0
    for chunk in chunks:
        words[length : length + len(chunk)] = flow_words(chunk)
        length += len(chunk)
    return words[:length].view(FLOW).reshape(-1)


def _gather(parts: list[np.ndarray], at: np.ndarray) -> np.ndarray:
    """`concatenate(parts)[at]` as rows, without concatenating."""
    gathered = np.empty((len(at), FLOW_WORDS), "u8")
    for part in parts:
        mine = np.flatnonzero((at >= 0) & (at < len(part)))
        gathered[mine] = part.take(at.take(mine), axis=0)
        at = at - len(part)
    return gathered.view(FLOW).reshape(-1)


def talkers_of(flows: np.ndarray) -> np.ndarray:
    """The rows of the talkers (rows.ROW, merged) whose flows these are."""
    words = flow_words(flows)
    keys = np.empty(len(words), "u8")
    for begin in range(0, len(words), CHUNK):
        some = words[begin : begin + CHUNK]
        keys[begin : begin + CHUNK] = sort_keys(some[:, 0], some[:, 1], _talker_tail(some))
    return assemble(len(words), (_talkers_at(words, order, of) for order, of in ordered_chunks(keys)))


def _talkers_at(words: np.ndarray, order: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The talkers of whole sources, in pieces: a single source may have a million flows."""
    if len(order) <= 2 * CHUNK:
        return collapse(_talker_rows(words.take(order, axis=0)), keys)
    pieces = (slice(at, at + CHUNK) for at in range(0, len(order), CHUNK))
    return merge(*(collapse(_talker_rows(words.take(order[of], axis=0)), keys[of]) for of in pieces))


def _talker_tail(words: np.ndarray) -> np.ndarray:
    """The third word of a talker's row: its port, protocol and family."""
    return words[:, _PLACE] >> np.uint64(32) << np.uint64(16) & np.uint64(0xFFFF0000) | words[:, _REST] >> np.uint64(16) & np.uint64(0xFFFF)


def _talker_rows(words: np.ndarray) -> np.ndarray:
    """Flows as rows of their talkers, not yet summed."""
    rows = np.empty((len(words), WORDS), "u8")
    rows[:, :2], rows[:, 2] = words[:, :2], _talker_tail(words)
    flows, made = words.view(FLOW).reshape(-1), rows.view(ROW).reshape(-1)
    for name in ("packets", "bytes", "syns", "first_seen", "last_seen"):
        made[name] = flows[name]
    return made
