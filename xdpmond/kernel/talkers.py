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

from ..model import Count, Family, Talker
from . import abi
from .maps import FAMILY_FROM_ABI, map_memory

ROW = np.dtype(
    [
        ("source", "u1", 16), ("family", "u1"), ("protocol", "u1"), ("port", "u2"), ("packets", "u8"), ("bytes", "u8"), ("syns", "u8"),
        ("first_seen", "u4"), ("last_seen", "u4"),
    ]
)  # fmt: skip
"""One talker of one interval. Times in units of 2^SEEN_SHIFT ns of CLOCK_MONOTONIC."""

KEY = np.dtype([("low", "u8"), ("high", "u8"), ("tail", "u4")])
_CHUNK_SETS = 8192  # 2 MB: small enough that the interpreter's lock is never held for long


class TalkerTable:
    """The slices of all CPUs."""

    def __init__(self, map_fd: int, *, cpus: int, sets: int):
        self.capacity = cpus * sets * abi.WAYS
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
            first = live.copy()
            second = live.copy()
            still = (second["window"] == closed) & (first["packets"][:, 0] > 0) & (first["family"] > 0)
            rolled = second["window"] == running
            late = np.nonzero(rolled & (first["window"] != running))[0]
            second[late] = live[late]
            rolled &= second["packets"][:, 1] > 0
            found.append(_rows(first[still], 0))
            found.append(_rows(second[rolled], 1))
        return np.concatenate(found)

    def read_running(self, running: int) -> np.ndarray:
        """All talkers of the running window so far, as an array of ROW. An entry that is replaced under the reader is left out."""
        found = []
        for live in self._chunks():
            first = live.copy()
            second = live.copy()
            same = (first["window"] == running) & (second["window"] == running) & (first["first_seen"] == second["first_seen"])
            same &= (first["source"] == second["source"]).all(axis=1) & (first["port"] == second["port"])
            same &= (first["protocol"] == second["protocol"]) & (second["packets"][:, 0] > 0)
            found.append(_rows(second[same], 0))
        return np.concatenate(found)

    def occupied(self, running: int) -> int:
        """Entries of the running window or the one before it."""
        return sum(int(np.count_nonzero(live["window"] >= running - 1)) for live in self._chunks())


def _rows(entries: np.ndarray, which: int) -> np.ndarray:
    rows = np.empty(len(entries), ROW)
    for name in ("source", "family", "protocol", "port", "first_seen", "last_seen"):
        rows[name] = entries[name]
    for name in ("packets", "bytes", "syns"):
        rows[name] = entries[name][:, which]
    return rows


def count_of(rows: np.ndarray) -> Count:
    return Count(int(rows["packets"].sum()), int(rows["bytes"].sum()))


def merge(*parts: np.ndarray) -> np.ndarray:
    """Sum the rows of the same source, protocol and port: over CPUs, or over intervals."""
    rows = np.concatenate(parts)
    if not len(rows):
        return rows
    keys = np.empty(len(rows), KEY)
    words = np.ascontiguousarray(rows["source"]).view("u8").reshape(-1, 2)
    keys["low"], keys["high"] = words[:, 0], words[:, 1]
    keys["tail"] = rows["port"].astype("u4") | rows["protocol"].astype("u4") << 16 | rows["family"].astype("u4") << 24
    order = np.lexsort((keys["tail"], keys["high"], keys["low"]))
    ordered = keys[order]
    starts = np.nonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))[0]
    merged = rows[order[starts]]
    sorted_rows = rows[order]
    for name in ("packets", "bytes", "syns"):
        merged[name] = np.add.reduceat(sorted_rows[name], starts)
    merged["first_seen"] = np.minimum.reduceat(sorted_rows["first_seen"], starts)
    merged["last_seen"] = np.maximum.reduceat(sorted_rows["last_seen"], starts)
    return merged


def unique_sources(rows: np.ndarray) -> dict[Family, int]:
    """Distinct source addresses by family."""
    words = np.ascontiguousarray(rows["source"]).view("u8").reshape(-1, 2)
    found = {}
    for number, family in enumerate(FAMILY_FROM_ABI):
        if family is not Family.OTHER:
            chosen = words[rows["family"] == number]
            found[family] = len(np.unique(chosen, axis=0)) if len(chosen) else 0
    return found


def strongest(rows: np.ndarray, by: str, limit: int) -> np.ndarray:
    """The `limit` rows with the most of `by` ("packets", "bytes", "syns"), strongest first; ties by source."""
    if len(rows) > limit > 0:
        rows = rows[np.argpartition(rows[by], len(rows) - limit)[len(rows) - limit :]]
    return rows[np.argsort(rows[by], kind="stable")[::-1]]


def talker(row: np.void, epoch: float) -> Talker:
    """One row as a value; `epoch` is the wall clock at CLOCK_MONOTONIC 0, in seconds."""
    family = FAMILY_FROM_ABI[row["family"]]
    unit = (1 << abi.SEEN_SHIFT) / 1e9
    return Talker(
        family=family,
        address=row["source"].tobytes()[: family.bits // 8],
        protocol=int(row["protocol"]),
        port=int(row["port"]) if row["protocol"] in (6, 17, 132) and row["port"] != abi.PORT_NONE else None,
        packets=int(row["packets"]),
        bytes=int(row["bytes"]),
        syns=int(row["syns"]),
        first_seen=epoch + int(row["first_seen"]) * unit,
        last_seen=epoch + int(row["last_seen"]) * unit,
    )
