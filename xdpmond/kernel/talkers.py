"""The talker table, read through memory while the packet path writes it.

Each CPU writes a slice of its own and nothing is ever cleared. An entry has the number of the window that its counts [0] belong to; its
counts [1] belong to the window before. The writer's order for the first packet of a new window is: move [0] to [1], then store the
number, then zero [0] (`roll` in bpf/xdpmond.bpf.c).

So, once no packet is under way that still saw the old number, a window that has closed is read exactly, without stopping anything, by
copying each entry twice:

- number still the closed one in the *second* copy: the writer had not zeroed [0] at the time of the *first*, whose [0] is right;
- number already the running one in the *first*: [1] had been moved before, so that of the *second* is right;
- it changed in between: a third look at [1] is right.

This leans on stores being seen in their order, as x86 promises. An entry whose closed counts are unread is not replaced meanwhile
(`keeps_closed`), so that no count is both read and counted as evicted.

A million entries are read in two passes. The first finds those that matter, and their keys; then the keys are sorted; the second copies
entries in that order, so that the same talker in several slices is summed on the way, and no second array of all rows is ever needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..rows import CHUNK, ROW, WORDS, assemble, collapse, ordered_chunks, sort_keys, take
from . import abi
from .maps import map_memory, realtime_at_monotonic_zero

_SEEN_UNIT = (1 << abi.SEEN_SHIFT) / 1e9  # seconds

# An entry's words, which are eight like those of a row: source in two, then
_TAIL, _BYTES, _PACKETS, _SYNS, _SEEN = 2, 3, 5, 6, 7
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class TalkerTable:
    """The slices of all CPUs."""

    def __init__(self, map_fd: int, *, cpus: int, sets: int):
        self._slice = sets * abi.WAYS
        self.capacity = cpus * self._slice
        self._memory = map_memory(map_fd, cpus * sets * abi.SET.itemsize, write=False)
        self._words = np.frombuffer(self._memory, "u8", self.capacity * WORDS).reshape(-1, WORDS)

    def _column(self, chunk: slice, word: int) -> np.ndarray:
        """One word of neighbouring entries, as it is now."""
        return self._words[chunk, word].copy()

    def _copy(self, at: np.ndarray) -> np.ndarray:
        """Entries as they are now."""
        return self._words.take(at, axis=0)

    def _chunks(self) -> Iterator[slice]:
        return (slice(at, at + CHUNK) for at in range(0, self.capacity, CHUNK))

    def _find(self, matters: Callable[[slice, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The places of entries that matter, and their keys. `matters` is given a chunk, and the third words of its entries."""
        places, keys, used = np.empty(self.capacity, "u4"), np.empty(self.capacity, "u8"), 0
        for chunk in self._chunks():
            tail = self._column(chunk, _TAIL)
            found = np.flatnonzero(matters(chunk, tail))
            identity = (column.take(found) for column in (self._column(chunk, 0), self._column(chunk, 1), _tail(tail)))
            keys[used : used + len(found)] = sort_keys(*identity)
            places[used : used + len(found)] = chunk.start + found
            used += len(found)
        return places[:used], keys[:used]

    def _read(self, matters: Callable[[slice, np.ndarray], np.ndarray], rows: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """What `rows` makes of the places of the entries that matter, and of their keys, in the order of these."""
        places, keys = self._find(matters)
        chunks = ordered_chunks(keys)
        del keys  # 8 MB
        return assemble(len(places), (rows(places.take(order), chunk_keys) for order, chunk_keys in chunks))

    def read_closed(self, closed: int) -> np.ndarray:
        """All talkers of the window `closed`, which must be the one before the running one, as merged rows. Call it in a thread."""
        running = closed + 1

        def matters(chunk: slice, tail: np.ndarray) -> np.ndarray:
            # What has neither number now has no counts of the closed window, whatever becomes of it while we read; and what has the
            # running one has moved them. So what is found here has unread counts, and its talker stays.
            window, moved = tail >> _HALF, self._column(chunk, _PACKETS) >> _HALF
            return (window == closed) | ((window == running) & (moved > 0))

        def rows(at: np.ndarray, keys: np.ndarray) -> np.ndarray:
            first, second = self._copy(at), self._copy(at)
            still = second[:, _TAIL] >> _HALF == closed
            late = np.flatnonzero(~still & (first[:, _TAIL] >> _HALF == closed))
            second[late] = self._copy(at.take(late))
            packets = np.where(still, first[:, _PACKETS] & _LOW, second[:, _PACKETS] >> _HALF)
            syns = np.where(still, first[:, _SYNS] & _LOW, second[:, _SYNS] >> _HALF)
            bytes_ = np.where(still, first[:, _BYTES], second[:, _BYTES + 1])
            return _collapsed(_rows(second, packets, bytes_, syns), keys, packets > 0)

        return self._read(matters, rows)

    def read_running(self, running: int) -> np.ndarray:
        """All talkers of the running window so far, as merged rows. An entry that is replaced under the reader is left out."""

        def matters(_: slice, tail: np.ndarray) -> np.ndarray:
            return tail >> _HALF == running

        def rows(at: np.ndarray, keys: np.ndarray) -> np.ndarray:
            first, second = self._copy(at), self._copy(at)
            packets = second[:, _PACKETS] & _LOW
            low, high, tail = second[:, : _TAIL + 1].T.copy()
            same = (packets > 0) & (tail >> _HALF == running) & (sort_keys(low, high, _tail(tail)) == keys)
            for word, now in enumerate((low, high, tail)):
                same &= first[:, word] == now
            same &= first[:, _SEEN] & _LOW == second[:, _SEEN] & _LOW
            return _collapsed(_rows(second, packets, second[:, _BYTES].copy(), second[:, _SYNS] & _LOW), keys, same)

        return self._read(matters, rows)

    def occupied(self, running: int) -> list[int]:
        """Entries of the running window or the one before it, in each slice."""
        live = np.concatenate([self._column(chunk, _TAIL) >> _HALF >= running - 1 for chunk in self._chunks()])
        return [int(used) for used in np.count_nonzero(live.reshape(-1, self._slice), axis=1)]


def _tail(tail: np.ndarray) -> np.ndarray:
    """A row's third word from that of an entry."""
    family = tail >> np.uint64(24) & np.uint64(3)  # enum xm_family: 1 is IPv4, 2 is IPv6
    return tail & np.uint64(0xFFFFFF) | (family * np.uint64(2) + np.uint64(2)) << np.uint64(24)


def _rows(entries: np.ndarray, packets: np.ndarray, bytes_: np.ndarray, syns: np.ndarray) -> np.ndarray:
    """Turn a copy of entries into rows with these counts, in its own memory."""
    seen, epoch = entries[:, _SEEN].copy(), realtime_at_monotonic_zero()
    entries[:, _TAIL] = _tail(entries[:, _TAIL])
    rows = entries.view(ROW).reshape(-1)
    rows["packets"], rows["bytes"], rows["syns"] = packets, bytes_, syns
    rows["first_seen"] = epoch + (seen & _LOW) * _SEEN_UNIT
    rows["last_seen"] = epoch + (seen >> _HALF) * _SEEN_UNIT
    return rows


def _collapsed(rows: np.ndarray, keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if not wanted.all():
        at = np.flatnonzero(wanted)
        rows, keys = take(rows, at), keys.take(at)
    return collapse(rows, keys)
