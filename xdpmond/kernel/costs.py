"""What the maps cost in memory, computed from their definitions.

The kernel tells for each map what it charges, as `memlock` in /proc/self/fdinfo. How it comes to that is known for the types of map that we
have, so the cost of a table can be said before it is made; a test compares the two for every map.

Kernels to 6.3 tell an approximation instead: keys and values, in whole pages. From 6.4 on it is the memory itself, with a header whose
size depends on the kernel's configuration. Two maps of the smallest size tell which of the two holds, and how large the headers are.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import libbpf
from .tables import ARRAY, MMAPABLE, PERCPU_ARRAY, RINGBUF, Table, make

_POINTER = 8
_RING_META_PAGES = 3
"""Of the kernel's own, the consumer's and the producer's position."""


@dataclass(frozen=True, slots=True)
class Formula:
    """How a kernel counts. `headers`: bytes by type of map; without them the approximation of older kernels is meant."""

    cpus: int
    headers: Mapping[int, int] | None = None
    page: int = mmap.PAGESIZE

    def cost(self, of: Table) -> int | None:
        """Bytes, or None for a type of map that is not known here."""
        if self.headers is None:
            if of.type == RINGBUF:
                return 0  # it has neither keys nor values
            value_size = _up(of.value_size, 8) * self.cpus if of.type == PERCPU_ARRAY else of.value_size
            return _up(of.entries * _up(of.key_size + value_size, 8), self.page)
        if of.type not in self.headers:
            return None
        header, elements = self.headers[of.type], of.entries * _up(of.value_size, 8)
        if of.type == PERCPU_ARRAY:
            return header + of.entries * _POINTER + elements * self.cpus
        if of.type == RINGBUF:
            # The pages of the data are mapped twice in a row, so that what crosses the end is whole.
            pages = of.entries // self.page
            return header + (_RING_META_PAGES + pages) * self.page + (_RING_META_PAGES + 2 * pages) * _POINTER
        if of.flags & MMAPABLE:
            return _up(header, self.page) + _up(elements, self.page)
        return header + elements


@lru_cache(1)
def formula() -> Formula:
    """That of the running kernel."""
    cpus, page = libbpf.possible_cpus(), mmap.PAGESIZE
    array = _charged_for(Table(ARRAY, 4, 8, 1, 0))
    if array == page:
        return Formula(cpus)
    ring = Table(RINGBUF, 0, 0, page, 0)
    without = Formula(cpus, {RINGBUF: 0}).cost(ring) or 0
    return Formula(cpus, {ARRAY: array - 8, PERCPU_ARRAY: array - 8, RINGBUF: _charged_for(ring) - without})


def _charged_for(probe: Table) -> int:
    fd = make("probe", probe)
    try:
        return charged(fd)
    finally:
        os.close(fd)


def charged(fd: int) -> int:
    """What the kernel says that a map costs, in bytes."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("memlock:"):
            return int(line.split()[1])
    return 0


@dataclass(frozen=True, slots=True)
class MapCost:
    name: str
    entries: int
    bytes: int


def costs(maps: Mapping[str, int]) -> Iterable[MapCost]:
    """Of maps by name and descriptor: computed where that is known, else as the kernel says."""
    how = formula()
    for name, fd in maps.items():
        table = Table(*libbpf.map_info(fd))
        computed = how.cost(table)
        yield MapCost(name, table.entries, charged(fd) if computed is None else computed)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to
