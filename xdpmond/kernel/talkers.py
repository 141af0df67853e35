"""The talker table, read through memory while the packet path writes it.

Each CPU writes a slice of its own and nothing is ever cleared. An entry has the number of the window that its counts [0] belong to; its
counts [1] belong to the window before. The writer's order for the first packet of a new window is: move [0] to [1], then store the
number, then zero [0] (`roll` in bpf/xdpmond.bpf.c).

So, once no packet is under way that still saw the old number, a window that has closed is read exactly, without stopping anything, by
copying a slice twice:

- number still the closed one in the *second* copy: the writer had not zeroed [0] at the time of the *first*, whose [0] is right;
- number already the running one in the *first*: [1] had been moved before, so that of the *second* is right;
- it changed in between: a third look at [1] is right.

This leans on stores being seen in their order, as x86 promises. An entry whose closed counts are unread is not replaced meanwhile
(`keeps_closed`), so that no count is both read and counted as evicted.
"""

from __future__ import annotations

import numpy as np

from ..rows import ROW
from . import abi
from .maps import map_memory, realtime_at_monotonic_zero

_FAMILY_NUMBER = np.array([0, 4, 6], "u1")  # enum xm_family to model.Family
_SEEN_UNIT = (1 << abi.SEEN_SHIFT) / 1e9  # seconds

_CHUNK_SETS = 8192  # 2 MB: small enough that the interpreter's lock is never held for long


class TalkerTable:
    """The slices of all CPUs."""

    def __init__(self, map_fd: int, *, cpus: int, sets: int):
        self.capacity = cpus * sets * abi.WAYS
        self._slices = cpus
        self._memory = map_memory(map_fd, cpus * sets * abi.SET.itemsize, write=False)
        self._entries = np.frombuffer(self._memory, abi.TALKER, self.capacity)

    def _chunks(self):
        step = _CHUNK_SETS * abi.WAYS
        for at in range(0, self.capacity, step):
            yield self._entries[at : at + step]

    def read_closed(self, closed: int) -> np.ndarray:
        """All talkers of the window `closed`, which must be the one before the running one, as an array of ROW; a source that came in on
        several CPUs has a row for each. Call it in a thread."""
        found = []
        running = closed + 1
        for live in self._chunks():
            # What has neither number now has no counts of the closed window, whatever becomes of it while we read.
            live_rows = np.nonzero(live["window"] - np.uint32(closed) <= 1)[0]
            first = live[live_rows]
            second = live[live_rows]
            still = (second["window"] == closed) & (first["packets"][:, 0] > 0)
            rolled = second["window"] == running
            late = np.nonzero(rolled & (first["window"] != running))[0]
            second[late] = live[live_rows[late]]
            rolled &= second["packets"][:, 1] > 0
            found.append(_rows(first[still], 0))
            found.append(_rows(second[rolled], 1))
        return np.concatenate(found)

    def read_running(self, running: int) -> np.ndarray:
        """All talkers of the running window so far, as an array of ROW. An entry that is replaced under the reader is left out."""
        found = []
        for live in self._chunks():
            live_rows = np.nonzero(live["window"] == running)[0]
            first = live[live_rows]
            second = live[live_rows]
            same = (second["window"] == running) & (second["packets"][:, 0] > 0) & (first["first_seen"] == second["first_seen"])
            for name in ("source", "port", "protocol"):
                equal = first[name] == second[name]
                same &= equal.all(axis=1) if equal.ndim > 1 else equal
            found.append(_rows(second[same], 0))
        return np.concatenate(found)

    def occupied(self, running: int) -> list[int]:
        """Entries of the running window or the one before it, by slice."""
        found = []
        for of_cpu in self._entries.reshape(self._slices, -1):
            parts = (of_cpu[at : at + _CHUNK_SETS * abi.WAYS] for at in range(0, len(of_cpu), _CHUNK_SETS * abi.WAYS))
            found.append(sum(int(np.count_nonzero(live["window"] >= running - 1)) for live in parts))
        return found


def _rows(entries: np.ndarray, which: int) -> np.ndarray:
    rows = np.empty(len(entries), ROW)
    for name in ("source", "protocol", "port"):
        rows[name] = entries[name]
    rows["family"] = _FAMILY_NUMBER[entries["family"]]
    for name in ("packets", "bytes", "syns"):
        rows[name] = entries[name][:, which]
    epoch = realtime_at_monotonic_zero()
    for name in ("first_seen", "last_seen"):
        rows[name] = epoch + entries[name] * _SEEN_UNIT
    return rows
