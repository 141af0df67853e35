"""Flow records: what is known of each 5-tuple since its record began, and how records end, as in NetFlow and IPFIX (RFC 5470, RFC 7011).

The packet path counts flows by windows. When a window closes, its rows are added to the records in the `FlowCache`, and it is seen which
records have ended: nothing came for the inactive timeout, the record has become as old as the active timeout, or TCP said that it is over.
So timeouts have the grain of windows. The first packet of a record is known to the packet path's own grain if the flow was new then; a
record that takes a flow up again begins with the window.

The cache is bounded. A flow that finds no room becomes a record that ends at once. What has ended waits for whoever takes it: in the
cache, or, if its place is needed, beside it until the next window closes; then it is lost, and counted. Every step is one over columns, in
chunks, so that the interpreter's lock is held for a millisecond or two at a time. For one thread at a time.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .flowrows import FLOW, FLOW_WORDS, flow_words
from .rows import CHUNK, order_of

LINGER = 2.0
"""Seconds for which a TCP connection that has ended is waited on: the answer to a FIN is one more packet."""


class EndReason(enum.IntEnum):
    """Why a record ended, by the numbers of flowEndReason (RFC 5102, section 5.11.3)."""

    IDLE = 1
    ACTIVE = 2
    END_OF_FLOW = 3
    FORCED = 4
    LACK_OF_RESOURCES = 5


ENDED = np.dtype([("reason" if field[0] == "pad" else field[0], *field[1:]) for field in FLOW.descr])  # type: ignore[misc]
"""A row of flowrows.FLOW, with the reason for its end where FLOW has padding."""
NO_RECORDS = np.zeros(0, ENDED)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    active: float
    inactive: float


@dataclass(frozen=True, slots=True)
class Lost:
    """What nobody took in time. `octets` are IP lengths."""

    records: int = 0
    packets: int = 0
    octets: int = 0

    def with_rows(self, rows: np.ndarray) -> Lost:
        packets, octets = int(rows["packets"].sum()), int(rows["ip_bytes"].sum())
        return Lost(self.records + len(rows), self.packets + packets, self.octets + octets)


def _word(name: str) -> int:
    return int(FLOW.fields[name][1]) // 8  # type: ignore[index]


def _bits(*names: str) -> np.uint64:
    """Those of these fields in their word."""
    row = np.zeros(1, FLOW)
    for name in names:
        row[name] = np.iinfo(row[name].dtype).max
    return np.uint64(row.view("u8")[_word(names[0])])


_SUMS = [_word(name) for name in ("packets", "bytes", "ip_bytes", "syns")]
_PACKETS, _FIRST, _LAST, _PLACE = (_word(name) for name in ("packets", "first_seen", "last_seen", "source_port"))
_TUPLE, _FLAGS = _bits("source_port", "port", "protocol", "family"), _bits("tcp_flags")
TCP, OVER = 6, 0x05
"""The flags FIN and RST."""
_SECRET = [np.uint64(secrets.randbits(64) | 1) for _ in range(6)]
_LITTLE = 65_536

Where = Callable[[np.ndarray], np.ndarray]
"""From rows, a mask of those that are wanted."""


def _hash(words: np.ndarray) -> np.ndarray:
    """64 bits that tell a 5-tuple, but for one pair in many millions of millions; whoever chooses his addresses cannot choose them."""
    mixed = (words[:, _PLACE] & _TUPLE) * _SECRET[0]
    for word in range(4):
        mixed ^= mixed >> np.uint64(32)
        mixed += words[:, word]
        mixed *= _SECRET[1 + word]
    mixed ^= mixed >> np.uint64(29)
    return mixed * _SECRET[5]


def _same_tuple(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    same = (a[:, _PLACE] ^ b[:, _PLACE]) & _TUPLE == 0
    for word in range(4):
        same &= a[:, word] == b[:, word]
    return same


def _joined(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Words of records, and of the rows that they go on with. Interface and outcome are those of the later."""
    whole = new.copy()
    for column in _SUMS:
        whole[:, column] += old[:, column]
    whole[:, _FIRST] = old[:, _FIRST]
    whole.view("f8")[:, _LAST] = np.maximum(old.view("f8")[:, _LAST], new.view("f8")[:, _LAST])
    whole[:, _PLACE] |= old[:, _PLACE] & _FLAGS
    return whole


def _chunks(number: int) -> Iterator[slice]:
    return (slice(at, min(at + CHUNK, number)) for at in range(0, number, CHUNK))


class FlowCache:
    """At most `most` records, 109 bytes each; memory is taken as they come."""

    def __init__(self, most: int):
        self.most = most
        self._words = np.empty((most, FLOW_WORDS), "u8")  # costs nothing where nothing is written
        self._reasons = np.zeros(0, "u1")
        """By place: why the record there has ended; 0: it has not."""
        self._used = 0
        """Places from the first on that have been in use; one with no packets is free."""
        self._keys = np.zeros(0, "u8")
        self._places = np.zeros(0, "u4")
        """The records by their keys, and where each is."""
        self._out: list[np.ndarray] = []
        """Records that have ended and whose places were needed."""
        self.lost = Lost()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def due(self) -> int:
        """Records that have ended and wait to be taken."""
        return sum(map(len, self._out)) + int(np.count_nonzero(self._reasons))

    # A window closes

    def close(self, rows: np.ndarray, started: float, ended: float, timeouts: Timeouts) -> None:
        """Add the flows (flowrows.FLOW, merged) of a window with these times, and see which records have ended with it. What has ended
        before and was put beside the cache is lost now."""
        for left in self._out:
            self.lost = self.lost.with_rows(left)
        self._out = []
        words = flow_words(rows)
        keys, order = _sorted_keys(words)
        fresh = self._go_on(words, keys, order, started, ended)
        room = self.most - len(self._keys)
        if len(fresh) > room:
            self._judge(ended, timeouts)
            gone = self._remove(self._due_places(len(fresh) - room))
            self._out += [gone] if len(gone) else []
        self._begin(words, keys, order, fresh, started, ended)
        self._judge(ended, timeouts)

    def _go_on(self, words: np.ndarray, keys: np.ndarray, order: np.ndarray, started: float, ended: float) -> np.ndarray:
        """Add the rows of flows that have a record. Returns where in the sorted keys those are that have none."""
        fresh = [np.zeros(0, "i8")]
        for chunk in _chunks(len(keys)):
            of, found = self._find(keys[chunk])
            some = _clamped(words.take(order[chunk], axis=0), started, ended)
            have = np.flatnonzero(found)
            places, mine = of.take(have), some.take(have, axis=0)
            before = self._words.take(places, axis=0)
            same = _same_tuple(before, mine)
            if not same.all():  # two flows with one key
                self._refuse(mine[~same])
                places, mine, before = places[same], mine[same], before[same]
            self._words[places] = _joined(before, mine)
            fresh.append(np.flatnonzero(~found) + chunk.start)
        return np.concatenate(fresh)

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of the records with these keys, and which of them there are."""
        if not len(self._keys):
            return np.zeros(len(keys), "u4"), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._places.take(at), self._keys.take(at) == keys

    def _begin(self, words: np.ndarray, keys: np.ndarray, order: np.ndarray, fresh: np.ndarray, started: float, ended: float) -> None:
        """Make records for flows that have none."""
        fresh_keys = keys.take(fresh)
        alone = np.ones(len(fresh), bool)
        alone[1:] = fresh_keys[1:] != fresh_keys[:-1]
        alone[np.flatnonzero(alone)[self.most - len(self._keys) :]] = False
        without = fresh[~alone]
        for chunk in _chunks(len(without)):
            self._refuse(_clamped(words.take(order.take(without[chunk]), axis=0), started, ended))
        fresh, fresh_keys = fresh[alone], fresh_keys[alone]
        free = np.flatnonzero(self._words[: self._used, _PACKETS] == 0)[: len(fresh)]
        places = np.concatenate([free, np.arange(self._used, self._used + len(fresh) - len(free))]).astype("u4")
        self._used += len(fresh) - len(free)
        for chunk in _chunks(len(fresh)):
            self._words[places[chunk]] = _clamped(words.take(order.take(fresh[chunk]), axis=0), started, ended)
        keys, places = np.concatenate([self._keys, fresh_keys]), np.concatenate([self._places, places])
        merged = keys.argsort(kind="stable")  # two runs that are sorted already
        self._keys, self._places = keys.take(merged), places.take(merged)

    def _refuse(self, words: np.ndarray) -> None:
        refused = np.ascontiguousarray(words).view(ENDED).reshape(-1)
        refused["reason"] = EndReason.LACK_OF_RESOURCES
        self._out.append(refused)

    def _judge(self, now: float, timeouts: Timeouts) -> None:
        """See which records have ended."""
        self._reasons = np.zeros(self._used, "u1")
        for chunk in _chunks(self._used):
            rows = self._words[chunk].view(FLOW).reshape(-1)
            silent, reasons = now - rows["last_seen"], self._reasons[chunk]
            reasons[now - rows["first_seen"] >= timeouts.active] = EndReason.ACTIVE
            reasons[(silent >= timeouts.inactive) | (silent < 0)] = EndReason.IDLE  # the latter if the clock has been set back
            over = (rows["protocol"] == TCP) & (rows["tcp_flags"] & OVER != 0)
            reasons[over & (silent >= LINGER)] = EndReason.END_OF_FLOW
            reasons[rows["packets"] == 0] = 0

    # What has ended

    def flush(self) -> None:
        """End all records now."""
        self._reasons = np.where(self._words[: self._used, _PACKETS] > 0, EndReason.FORCED, 0).astype("u1")

    def take(self, most: int) -> np.ndarray:
        """Up to so many of the records that have ended (ENDED). They are the taker's then."""
        if self._out:
            first = self._out[0]
            self._out[:1] = [first[most:]] if len(first) > most else []
            return first[:most]
        return self._remove(self._due_places(most))

    def _due_places(self, most: int) -> np.ndarray:
        return np.flatnonzero(self._reasons)[:most]

    def _remove(self, places: np.ndarray) -> np.ndarray:
        if not len(places):
            return NO_RECORDS
        gone = np.empty((len(places), FLOW_WORDS), "u8")
        for chunk in _chunks(len(places)):
            gone[chunk] = self._words.take(places[chunk], axis=0)
            self._words[places[chunk], _PACKETS] = 0
        records = gone.view(ENDED).reshape(-1)
        records["reason"] = self._reasons.take(places)
        self._reasons[places] = 0
        stays = np.flatnonzero(self._words[: self._used, _PACKETS].take(self._places) > 0)
        self._keys, self._places = self._keys.take(stays), self._places.take(stays)
        if len(self._keys) * 4 < self._used and self._used > _LITTLE:
            self._give_back()
        return records

    def _give_back(self) -> None:
        """Move the few records that are left together, and let go of the memory of the many."""
        words, reasons = np.empty((self.most, FLOW_WORDS), "u8"), self._reasons.take(self._places)
        for chunk in _chunks(len(self._places)):
            words[chunk] = self._words.take(self._places[chunk], axis=0)
        self._words, self._reasons, self._used = words, reasons, len(reasons)
        self._places = np.arange(self._used, dtype="u4")

    # Questions

    def strongest(self, running: np.ndarray, started: float, by: str, limit: int, where: Where) -> np.ndarray:
        """The `limit` flows (flowrows.FLOW) with the most of `by`, a field, strongest first: of the records together with the rows of the
        running window, which began at `started`."""
        words, which, found = flow_words(running), np.full(self._used, -1, "i4"), np.zeros(len(running), bool)
        keys, order = _sorted_keys(words)
        for chunk in _chunks(len(words)):
            places, have = self._find(keys[chunk])
            at = order[chunk][have]
            same = _same_tuple(self._words.take(places[have], axis=0), words.take(at, axis=0))
            which[places[have][same]] = at[same]
            found[at[same]] = True
        best = _Best(by, limit, where)
        for chunk in _chunks(self._used):
            records, of = self._words[chunk].copy(), which[chunk]
            more = np.flatnonzero(of >= 0)
            records[more] = _joined(records.take(more, axis=0), _clamped(words.take(of[more], axis=0), started, np.inf))
            best.add(records)
        new = np.flatnonzero(~found)
        for chunk in _chunks(len(new)):
            best.add(_clamped(words.take(new[chunk], axis=0), started, np.inf))
        return best.rows()


def _sorted_keys(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys of rows, sorted, and where in the rows each is."""
    keys = np.empty(len(words), "u8")
    for chunk in _chunks(len(words)):
        keys[chunk] = _hash(words[chunk])
    order = order_of(keys)
    return keys.take(order), order


def _clamped(words: np.ndarray, started: float, ended: float) -> np.ndarray:
    """Rows of a window whose times lie within it: the packet path may know the flow for longer, or have seen it again since."""
    times = words.view("f8")
    np.clip(times[:, _LAST], started, ended, out=times[:, _LAST])
    np.clip(times[:, _FIRST], started, times[:, _LAST], out=times[:, _FIRST])
    return words


class _Best:
    """The strongest of many rows, added in pieces."""

    def __init__(self, by: str, limit: int, where: Where):
        self._by, self._limit, self._where = _word(by), limit, where
        self._kept = np.zeros((0, FLOW_WORDS), "u8")
        self._least: int | None = None
        """What a row must have more of to be among them, once there are enough."""

    def add(self, words: np.ndarray) -> None:
        may = words[:, _PACKETS] > 0
        if self._least is not None:
            may &= words[:, self._by] > self._least
        words = words.take(np.flatnonzero(may), axis=0)
        wanted = np.flatnonzero(self._where(words.view(FLOW).reshape(-1)))
        kept = np.concatenate([self._kept, words.take(wanted, axis=0)])
        if len(kept) > self._limit:
            kept = kept.take(np.argpartition(kept[:, self._by], len(kept) - self._limit)[len(kept) - self._limit :], axis=0)
            self._least = int(kept[:, self._by].min())
        self._kept = kept

    def rows(self) -> np.ndarray:
        """The strongest first."""
        return self._kept.take(self._kept[:, self._by].argsort(kind="stable")[::-1], axis=0).view(FLOW).reshape(-1)
