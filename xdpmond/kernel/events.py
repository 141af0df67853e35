"""The ring buffer, read in bulk through memory (kernel/bpf/ringbuf.c gives the layout).

The first page holds the consumer's position, which we write; the next one the producer's; then the data, mapped twice in a row so that
no record is ever broken. A record is a header of 8 bytes, whose top bit says that it is still being written, and the event.

`read` looks at the headers and copies the events, all at once: it costs some nanoseconds an event.
"""

from __future__ import annotations

import mmap

import numpy as np

from . import abi, libbpf

_BUSY = 1 << 31
_RECORD = np.dtype([("length", "u4"), ("page", "u4"), ("event", abi.EVENT)])


class EventRing:
    """`fileno()` polls readable when there is something to read."""

    def __init__(self, map_fd: int):
        self._fd = map_fd
        _, _, _, size, _ = libbpf.map_info(map_fd)
        self._mask = size - 1
        self._consumer_memory = mmap.mmap(map_fd, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._consumer = np.frombuffer(self._consumer_memory, "u8", 1)
        self._memory = mmap.mmap(map_fd, mmap.PAGESIZE + 2 * size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        self._producer = np.frombuffer(self._memory, "u8", 1)
        self.capacity = size // _RECORD.itemsize
        """Events that it takes."""

    def fileno(self) -> int:
        return self._fd

    def read(self, most: int = 8192) -> np.ndarray:
        """Take up to `most` events, oldest first, as an array of abi.EVENT; empty if there is none."""
        position = int(self._consumer[0])
        count = min((int(self._producer[0]) - position) // _RECORD.itemsize, most)
        records = np.frombuffer(self._memory, _RECORD, count, mmap.PAGESIZE + (position & self._mask))
        busy = np.nonzero(records["length"] & _BUSY)[0]
        if len(busy):
            records = records[: busy[0]]
        events = records["event"].copy()
        self._consumer[0] = position + len(events) * _RECORD.itemsize
        return events
