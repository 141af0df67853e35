"""How many sources reached each port in a window, exactly or by an estimate.

While every packet finds its talker, the talkers are all the sources there were, and counting them is exact. When the table of talkers is
full, they are some of the sources: what is counted of them is a lower bound, and the sketches that the packet path keeps say about how many
there were. The larger of the two is shown, with the error of the estimate. A port without a sketch of its own has the lower bound alone.

A source that reaches two ports counts once for each, and once in the total. Which ports are of interest is said by the setting `ports`, and
whether local sources are by `show_local`. Neither changes what is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from .model import Count, Family, PortRange
from .rows import NO_ROWS, PORT, WITH_PORTS, WITH_TYPES, PortSums, SourceCount, Where, chunks_of, is_local, only, port_key, words_of

_FAMILIES = (Family.IPV4, Family.IPV6)
CELL = np.dtype([("key", "u4"), ("all", PORT), ("local", PORT)])
"""What reached a port, and what of it came from local sources. `key` is rows.port_key."""


class Sketches(Protocol):
    """What estimates are made from."""

    ERROR: ClassVar[float]
    UNIQUE_ERROR: ClassVar[float]

    def unique(self, family: Family) -> int: ...
    def of_port(self, family: Family, protocol: int, port: int) -> int | None: ...
    def __or__(self, other: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Unique:
    """A number of distinct source addresses. If not `exact`, an estimate with this relative standard error; or at least so many, where
    there is none."""

    ipv4: int = 0
    ipv6: int = 0
    exact: bool = True
    error: float | None = None

    @property
    def total(self) -> int:
        return self.ipv4 + self.ipv6


@dataclass(frozen=True, slots=True)
class PortCount:
    """What reached one port. `port` None: the protocol has none, or it could not be read. Of ICMP there is a type in its place."""

    key: int
    """See rows.port_key."""
    protocol: int
    port: int | None
    icmp_type: int | None
    sources: Unique
    local: Unique
    """Those of `sources` that are local."""
    count: Count
    local_count: Count


Row = tuple[int, tuple[int, int, int, int], tuple[int, int, int, int]]


@dataclass(frozen=True)
class PortCounts:
    """The ports that talkers of an interval reached. Iterated over, it gives a PortCount each, those with the most sources first."""

    ranges: tuple[PortRange, ...] = ()
    """The ports that are counted here; none: all of them."""
    cells: np.ndarray = field(default_factory=lambda: np.zeros(0, CELL), repr=False, compare=False)
    """By key."""
    others: np.ndarray = field(default_factory=lambda: np.zeros(0, "u4"), repr=False, compare=False)
    """The keys of the ports that were reached and are not counted here."""
    sources: Unique = Unique()
    """Distinct sources of all these ports."""
    local: Unique = Unique()
    """Those of them that are local."""
    sketches: Sketches | None = field(default=None, repr=False, compare=False)

    @property
    def exact(self) -> bool:
        return self.sources.exact

    @property
    def count(self) -> Count:
        return _count(self.cells["all"])

    @property
    def local_count(self) -> Count:
        return _count(self.cells["local"])

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[PortCount]:
        number = self.cells["all"]["ipv4"] + self.cells["all"]["ipv6"]
        return (self._port(self.cells[at].item()) for at in number.argsort(kind="stable")[::-1].tolist())

    def of(self, key: int) -> PortCount:
        """One port by its key, whether it was reached or not."""
        at = int(np.searchsorted(self.cells["key"], key))
        found = at < len(self.cells) and self.cells["key"][at] == key
        return self._port(self.cells[at].item() if found else (key, (0, 0, 0, 0), (0, 0, 0, 0)))

    def _port(self, row: Row) -> PortCount:
        key, everyone, local = row
        protocol, port = key >> 16, key & 0xFFFF
        sources = Unique(everyone[0], everyone[1], self.exact)
        if not self.exact and self.sketches is not None:
            estimates = [self.sketches.of_port(family, protocol, port) for family in _FAMILIES]
            sources = _at_least(sources, estimates, self.sketches.ERROR)
        return PortCount(
            key,
            protocol,
            port if port and protocol in WITH_PORTS else None,
            port - 1 if port and protocol in WITH_TYPES else None,
            sources,
            Unique(local[0], local[1], self.exact),
            Count(everyone[2], everyone[3]),
            Count(local[2], local[3]),
        )


def count_ports(merged: np.ndarray = NO_ROWS, ranges: Sequence[PortRange] = (), *, within: Sequence[PortRange] = (), exact: bool = True,
                sketches: Sketches | None = None) -> PortCounts:  # fmt: skip
    """Count the sources of each port, given rows that are merged. `within` narrows it to those ports, which are then no `others`. Takes
    about a twentieth of a second for a million rows, in small steps."""
    every, every_local, sources, local_sources = PortSums(), PortSums(), SourceCount(), SourceCount()
    inside, counted = (on_ports(_keys(of)) if of else None for of in (within, ranges))
    for rows in chunks_of(merged):
        if inside:
            rows = only(rows, inside)
        local = only(rows, is_local)
        every.add(rows)
        every_local.add(local)
        if counted:
            rows, local = only(rows, counted), only(local, counted)
        sources.add(rows)
        local_sources.add(local)
    cells = _cells(every, every_local)
    wanted = in_ranges(cells["key"], ranges)
    unique = estimated(sources.unique, exact, None if ranges or within else sketches)
    return PortCounts(tuple(ranges), cells[wanted], cells["key"][~wanted], unique, _unique(local_sources.unique, exact), sketches)


def _cells(every: PortSums, local: PortSums) -> np.ndarray:
    keys, sums = every.ports()
    local_keys, local_sums = local.ports()
    cells = np.zeros(len(keys), CELL)
    cells["key"], cells["all"] = keys, sums
    cells["local"][np.searchsorted(keys, local_keys)] = local_sums
    return cells


def _keys(ranges: Sequence[PortRange]) -> np.ndarray:
    """Of all ports in them."""
    return np.concatenate(
        [
            np.arange(port_key(protocol, of.low), port_key(protocol, of.high) + 1)
            for of in ranges
            for protocol in (WITH_PORTS if of.protocol is None else (of.protocol,))
        ]
    )


def on_ports(keys: np.ndarray) -> Where:
    """What gives a mask of the rows on ports with these keys."""
    wanted = np.zeros(1 << 24, bool)  # memory that nothing is written to costs nothing
    wanted[keys] = True
    return lambda rows: wanted.take((words_of(rows)[:, 2] & np.uint64(0xFFFFFF)).astype("u4"))


def estimated(counted: Mapping[Family, int], exact: bool, sketches: Sketches | None) -> Unique:
    """Sources of all ports, of which so many were counted."""
    found = _unique(counted, exact)
    if exact or sketches is None:
        return found
    return _at_least(found, [sketches.unique(family) for family in _FAMILIES], sketches.UNIQUE_ERROR)


def shown(sources: Unique, local: Unique, *, with_local: bool) -> Unique:
    """With the local ones or without. Of an estimate those are taken off that are known."""
    if with_local:
        return sources
    return Unique(sources.ipv4 - local.ipv4, sources.ipv6 - local.ipv6, sources.exact, sources.error)


def in_ranges(keys: np.ndarray, ranges: Sequence[PortRange]) -> np.ndarray:
    """A mask of the ports that lie in one of the ranges; no ranges: all."""
    if not ranges:
        return np.ones(len(keys), bool)
    protocols, ports = keys >> 16, keys & 0xFFFF
    mask = np.zeros(len(keys), bool)
    for of in ranges:
        named = np.isin(protocols, WITH_PORTS) if of.protocol is None else protocols == of.protocol
        mask |= named & (ports >= of.low) & (ports <= of.high)
    return mask


def _unique(counted: Mapping[Family, int], exact: bool) -> Unique:
    return Unique(counted.get(Family.IPV4, 0), counted.get(Family.IPV6, 0), exact)


def _at_least(counted: Unique, estimates: Sequence[int | None], error: float) -> Unique:
    """The larger of what was counted and what was estimated, of each family; without a sketch what was counted."""
    ipv4, ipv6 = estimates
    if ipv4 is None or ipv6 is None:
        return counted
    return Unique(max(counted.ipv4, ipv4), max(counted.ipv6, ipv6), False, round(error, 4))


def _count(cells: np.ndarray) -> Count:
    return Count(int(cells["packets"].sum()), int(cells["bytes"].sum()))
