"""The table of talkers or flows, read through memory while the packet path writes it.

Each CPU writes a slice of its own and nothing is ever cleared. An entry has the number of the window that its counts [0] belong to; its
counts [1] belong to the window before. The writer's order for the first packet of a new window is: move [0] to [1], then store the
number, then zero [0] (`roll` in bpf/xdpmond.bpf.c).

So, once no packet is under way that still saw the old number, a window that has closed is read exactly, without stopping anything, by
copying each entry and then looking at its number again:

- it is still the closed one: the writer had not zeroed [0] when the entry was copied, so that is right;
- it is the running one: [1] had been moved before, so that of another copy is right.

This leans on stores being seen in their order, as x86 promises. An entry whose closed counts are unread is not replaced meanwhile
(`keeps_closed`), so that no count is both read and counted as evicted.

A million entries are read in two passes. The first finds those that matter, and their keys; then the keys are sorted; the second copies
entries in that order, so that the same talker in several slices is summed on the way, and no second array of all rows is ever needed.

Where flows are on, an entry is a flow (struct xm_flow), which begins with its talker. All of the above holds for it as well; the talkers
are then made of the flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .. import flowrows
from ..flowrows import FLOW, FLOW_WORDS
from ..rows import CHUNK, ROW, assemble, collapse, ordered_chunks, sort_keys, take
from . import abi
from .maps import map_memory, realtime_at_monotonic_zero

_SEEN_UNIT = (1 << abi.SEEN_SHIFT) / 1e9  # seconds

# An entry's words: the first eight are those of a talker, which has no others
_TAIL, _BYTES, _PACKETS, _SYNS, _SEEN, _TO, _PORTS, _IP_BYTES = 2, 3, 5, 6, 7, 8, 10, 11
_BYTES_SHIFT = np.uint64(abi.BYTES_SHIFT)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_BYTE, _FLAGS_BEFORE, _OUTCOME, _SLOT = np.uint64(0xFF), np.uint64(40), np.uint64(48), np.uint64(56)

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How entries become rows, of talkers or of flows."""

    named_by: tuple[int, ...]
    """The words that tell one from another, beside whatever else stands in them."""
    keys: Callable[..., np.ndarray]
    """From these words."""
    chunks: Callable[[np.ndarray], Chunks]
    rows: Callable[[np.ndarray], np.ndarray]
    """From a copy of entries; in the same memory, if it can be."""
    take: Callable[[np.ndarray, np.ndarray], np.ndarray]
    collapse: Callable[[np.ndarray, np.ndarray], np.ndarray]
    assemble: Callable[[int, Iterable[np.ndarray]], np.ndarray]


class TalkerTable:
    """The slices of all CPUs."""

    def __init__(self, map_fd: int, *, cpus: int, sets: int, flows: bool = False):
        """`flows`: an entry is one."""
        entry = abi.FLOW if flows else abi.TALKER
        self.flows = flows
        self._slice = sets * abi.WAYS
        self.capacity = cpus * self._slice
        self._memory = map_memory(map_fd, self.capacity * entry.itemsize, write=False)
        words = entry.itemsize // 8
        self._words = np.frombuffer(self._memory, "u8", self.capacity * words).reshape(-1, words)

    def _column(self, chunk: slice, word: int) -> np.ndarray:
        """One word of neighbouring entries, as it is now."""
        return self._words[chunk, word].copy()

    def _copy(self, at: np.ndarray) -> np.ndarray:
        """Entries as they are now."""
        return self._words.take(at, axis=0)

    def _tails(self, at: np.ndarray) -> np.ndarray:
        """The third words of entries, as they are now."""
        return self._words.reshape(-1).take(at * self._words.shape[1] + _TAIL)

    def _chunks(self) -> Iterator[slice]:
        return (slice(at, at + CHUNK) for at in range(0, self.capacity, CHUNK))

    def _find(self, kind: _Kind, matters: Callable[[slice, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The places of entries that matter, and their keys. `matters` is given a chunk, and the third words of its entries."""
        places, keys, used = np.empty(self.capacity, "u4"), np.empty(self.capacity, "u8"), 0
        for chunk in self._chunks():
            tail = self._column(chunk, _TAIL)
            found = np.flatnonzero(matters(chunk, tail))
            named_by = (tail if word == _TAIL else self._column(chunk, word) for word in kind.named_by)
            keys[used : used + len(found)] = kind.keys(*(column.take(found) for column in named_by))
            places[used : used + len(found)] = chunk.start + found
            used += len(found)
        return places[:used], keys[:used]

    def _read(self, kind: _Kind, matters: Callable[[slice, np.ndarray], np.ndarray],
              settle: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:  # fmt: skip
        """The entries that matter as merged rows. From their places and keys `settle` makes a copy of them whose counts [0] are the right
        ones, and says which are wanted."""
        places, keys = self._find(kind, matters)
        chunks = kind.chunks(keys)
        del keys  # 8 MB

        def merged(at: np.ndarray, keys: np.ndarray) -> np.ndarray:
            entries, wanted = settle(at, keys)
            rows = kind.rows(entries)
            if not wanted.all():
                found = np.flatnonzero(wanted)
                rows, keys = kind.take(rows, found), keys.take(found)
            return kind.collapse(rows, keys)

        return kind.assemble(len(places), (merged(places.take(order).astype("i8"), chunk_keys) for order, chunk_keys in chunks))

    def read_closed(self, closed: int) -> np.ndarray:
        """All talkers of the window `closed`, which must be the one before the running one, as merged rows. Call it in a thread."""
        return flowrows.talkers_of(self.read_closed_flows(closed)) if self.flows else self._read_closed(_TALKERS, closed)

    def read_closed_flows(self, closed: int) -> np.ndarray:
        """All flows of that window, as merged rows."""
        return self._read_closed(_FLOWS, closed)

    def _read_closed(self, kind: _Kind, closed: int) -> np.ndarray:
        running = closed + 1

        def matters(chunk: slice, tail: np.ndarray) -> np.ndarray:
            # What has neither number now has no counts of the closed window, whatever becomes of it while we read; and what has the
            # running one has moved them. So what is found here has unread counts, and its talker stays.
            window = tail >> _HALF
            matter = window == closed
            moved = np.flatnonzero(window == running)
            matter[moved] = self._column(chunk, _PACKETS).take(moved) >> _HALF > 0
            return matter

        def settle(at: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            entries = self._copy(at)  # before the numbers: see above
            moved = np.flatnonzero(self._tails(at) >> _HALF != closed)
            if len(moved):
                again = self._copy(at.take(moved))
                for word in (_BYTES, _IP_BYTES) if kind is _FLOWS else (_BYTES,):
                    again[:, word] = again[:, word + 1]
                for word in (_PACKETS, _SYNS):
                    again[:, word] >>= _HALF
                if kind is _FLOWS:
                    flags = again[:, _PORTS] >> _FLAGS_BEFORE & _BYTE
                    again[:, _PORTS] = again[:, _PORTS] & ~(_BYTE << _HALF) | flags << _HALF
                entries[moved] = again
            return entries, entries[:, _PACKETS] & _LOW > 0

        return self._read(kind, matters, settle)

    def read_running(self, running: int) -> np.ndarray:
        """All talkers of the running window so far, as merged rows. An entry that is replaced under the reader is left out."""
        return flowrows.talkers_of(self.read_running_flows(running)) if self.flows else self._read_running(_TALKERS, running)

    def read_running_flows(self, running: int) -> np.ndarray:
        """All flows of that window so far, as merged rows."""
        return self._read_running(_FLOWS, running)

    def _read_running(self, kind: _Kind, running: int) -> np.ndarray:
        def matters(_: slice, tail: np.ndarray) -> np.ndarray:
            return tail >> _HALF == running

        def settle(at: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            first, second = self._copy(at), self._copy(at)
            named_by = [second[:, word].copy() for word in kind.named_by]
            same = (second[:, _TAIL] >> _HALF == running) & (kind.keys(*named_by) == keys)
            for word, now in zip(kind.named_by, named_by, strict=True):
                before = first[:, word]
                same &= before & _LOW == now & _LOW if word == _PORTS else before == now
            same &= first[:, _SEEN] & _LOW == second[:, _SEEN] & _LOW
            return second, same & (second[:, _PACKETS] & _LOW > 0)

        return self._read(kind, matters, settle)

    def occupied(self, running: int) -> list[int]:
        """Entries of the running window or the one before it, in each slice."""
        live = np.concatenate([self._column(chunk, _TAIL) >> _HALF >= running - 1 for chunk in self._chunks()])
        return [int(used) for used in np.count_nonzero(live.reshape(-1, self._slice), axis=1)]


def _tail(tail: np.ndarray) -> np.ndarray:
    """A row's third word from that of an entry."""
    family = tail >> np.uint64(24) & np.uint64(3)  # enum xm_family: 1 is IPv4, 2 is IPv6
    return tail & np.uint64(0xFFFFFF) | (family * np.uint64(2) + np.uint64(2)) << np.uint64(24)


def _place(tail: np.ndarray, ports: np.ndarray) -> np.ndarray:
    """The word of a flow's row that has the ports, the protocol and the family."""
    return ports & _LOW | _tail(tail) >> np.uint64(16) << _HALF


def _keys(low: np.ndarray, high: np.ndarray, tail: np.ndarray) -> np.ndarray:
    return sort_keys(low, high, _tail(tail))


def _flow_keys(low: np.ndarray, high: np.ndarray, tail: np.ndarray, *to: np.ndarray) -> np.ndarray:
    to_low, to_high, ports = to
    return flowrows.flow_keys(low, high, to_low, to_high, _place(tail, ports))


def _rows(entries: np.ndarray) -> np.ndarray:
    """Turn a copy of entries into rows, in its own memory."""
    packets, syns = entries[:, _PACKETS] & _LOW, entries[:, _SYNS] & _LOW
    bytes_, seen = entries[:, _BYTES] >> _BYTES_SHIFT, entries[:, _SEEN].copy()
    entries[:, _TAIL] = _tail(entries[:, _TAIL])
    rows = entries.view(ROW).reshape(-1)
    rows["packets"], rows["bytes"], rows["syns"] = packets, bytes_, syns
    _set_seen(rows, seen)
    return rows


def _flow_rows(entries: np.ndarray) -> np.ndarray:
    tail, ports = entries[:, _TAIL], entries[:, _PORTS]
    words = np.empty((len(entries), FLOW_WORDS), "u8")
    words[:, :2], words[:, 2:4] = entries[:, :2], entries[:, _TO : _TO + 2]
    words[:, 4] = _place(tail, ports) | (ports >> _OUTCOME & _BYTE) << np.uint64(48) | (ports >> _HALF & _BYTE) << np.uint64(56)
    words[:, 5] = ports >> _SLOT | (tail & np.uint64(0xFFFF)) << np.uint64(16)
    rows = words.view(FLOW).reshape(-1)
    rows["packets"], rows["syns"] = entries[:, _PACKETS] & _LOW, entries[:, _SYNS] & _LOW
    rows["bytes"], rows["ip_bytes"] = entries[:, _BYTES] >> _BYTES_SHIFT, entries[:, _IP_BYTES]
    _set_seen(rows, entries[:, _SEEN].copy())
    return rows


def _set_seen(rows: np.ndarray, seen: np.ndarray) -> None:
    times = seen.view("u4").astype("f8")
    times *= _SEEN_UNIT
    times += realtime_at_monotonic_zero()
    rows["first_seen"], rows["last_seen"] = times[::2], times[1::2]


_TALKERS = _Kind((0, 1, _TAIL), _keys, ordered_chunks, _rows, take, collapse, assemble)
_FLOWS = _Kind(
    (0, 1, _TAIL, _TO, _TO + 1, _PORTS), _flow_keys, flowrows.flow_chunks, _flow_rows, flowrows.take_flows, flowrows.collapse_flows,
    flowrows.assemble_flows,
)  # fmt: skip
