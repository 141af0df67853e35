"""Windows and summaries: pure functions of what was counted in an interval.

A window is what the packet path counted under one window number. It ends when the daemon says so; one that the daemon ended late is
longer, and says so, and nothing is missing from it. The last one is kept with its talkers, those before it as their sums.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .model import Action, Count, Family, Outcome, PortRange, ProtocolClass, Total, protocol_name
from .ports import PortCounts, Sketches, Unique, count_ports, estimated
from .rows import NO_ROWS, Survey, Where, by_source, strongest, survey, take, talker, unique_sources

_LATE_FACTOR = 1.25
_LITTLE_SECONDS = 5
_KEEP_ROWS = 262_144
"""A summary over many windows keeps the strongest sources of them, so that a long interval does not grow without bound."""


@dataclass(frozen=True)
class Window:
    """One closed window. Times in seconds since the epoch; `rows` are merged. `exact`: every packet found its talker; else there were more
    of them than the rows tell, and totals alone are exact."""

    number: int
    started: float
    ended: float
    wanted_seconds: float
    rows: np.ndarray = field(default_factory=lambda: NO_ROWS, repr=False, compare=False)
    exact: bool = True
    sketches: Sketches | None = field(default=None, repr=False, compare=False)
    """What to estimate from where it is not exact."""
    ports: PortCounts = field(default_factory=PortCounts)
    """The sources of each port; see `counted`."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def late(self) -> bool:
        """Did the daemon end it noticeably later than wanted?"""
        return self.seconds > self.wanted_seconds * _LATE_FACTOR + 1

    @cached_property
    def unique_sources(self) -> Mapping[Family, int]:
        """Distinct source addresses, as far as they were counted."""
        return unique_sources(self.rows)

    @cached_property
    def unique(self) -> Unique:
        """Distinct source addresses, estimated where they were not all counted."""
        return estimated(self.unique_sources, self.exact, self.sketches)

    def counted(self, ranges: Sequence[PortRange]) -> Window:
        """The same with its sources counted: some tenths of a second for a million talkers, so in a thread."""
        window = replace(self, ports=count_ports(self.rows, ranges, exact=self.exact, sketches=self.sketches))
        _ = window.unique
        return window


class Totals:
    """Totals at one moment, summed as asked for."""

    def __init__(self, cells: Iterable[Total], at: float):
        self.cells = list(cells)
        self.at = at

    def where(self, wanted: Callable[[Total], bool] = lambda _: True) -> Count:
        total = Count()
        for cell in self.cells:
            if wanted(cell):
                total += cell.count
        return total

    def outcomes(self, *outcomes: Outcome) -> Count:
        return self.where(lambda cell: cell.outcome in outcomes)

    @property
    def dropped(self) -> Count:
        return self.where(lambda cell: cell.outcome.action is Action.DROP)

    def by(self, key: Callable[[Total], str]) -> dict[str, Count]:
        found: dict[str, Count] = {}
        for cell in self.cells:
            found[key(cell)] = found.get(key(cell), Count()) + cell.count
        return found


@dataclass(frozen=True, slots=True)
class Progress:
    """What is closed and what is running."""

    began: Totals
    """At the beginning of the running window."""
    tracked: Count = field(default_factory=Count)
    """Counted for talkers in all windows that are closed."""
    last: Window | None = None
    before: Totals | None = None
    """At the beginning of the last window."""
    lost: int = 0
    """Packets that had found no place in the talker table when the running window began."""
    inexact_until: float = 0.0
    """The end of the last window that was not exact."""

    def closed(self, window: Window, now: Totals, tracked: Count, lost: int = 0) -> Progress:
        return Progress(now, tracked, window, self.began, lost, self.inexact_until if window.exact else window.ended)

    def exact(self, lost: int) -> bool:
        """Has every packet of the last window and the running one found its talker, if so many have been lost by now?"""
        return lost == self.lost and (self.last is None or self.last.exact)

    def running_exact(self, lost: int) -> bool:
        """The same of the running window alone."""
        return lost == self.lost

    def sketches(self, running: Sketches | None) -> Sketches | None:
        """Those of the last window and the running one together."""
        if self.last is None or running is None:
            return running
        return None if self.last.sketches is None else self.last.sketches | running

    def recent(self, running: np.ndarray, by: str, limit: int, where: Where | None = None) -> Survey:
        """Of the talkers of the last window and the running one together."""
        return survey(self.last.rows if self.last else NO_ROWS, running, by=by, limit=limit, where=where)

    def past(self) -> Past | None:
        """The last window as it goes into the history."""
        if self.last is None or self.before is None:
            return None
        count, dropped = self.began.where() - self.before.where(), self.began.dropped - self.before.dropped
        return Past(self.last.number, self.last.started, self.last.ended, self.last.late, count, dropped, self.last.unique)

    def since(self, now: float) -> Totals:
        """What rates are counted from: a window that has just begun says little."""
        return self.before if now - self.began.at < _LITTLE_SECONDS and self.before is not None else self.began


@dataclass(frozen=True, slots=True)
class Past:
    """A window that has closed, as its sums: of all packets, and of those that were dropped."""

    number: int
    started: float
    ended: float
    late: bool
    count: Count
    dropped: Count
    unique: Unique


class History:
    """The last windows, the oldest first."""

    LENGTH = 240

    def __init__(self) -> None:
        self._windows: deque[Past] = deque(maxlen=self.LENGTH)

    def add(self, window: Past) -> None:
        self._windows.append(window)

    def last(self, number: int) -> list[Past]:
        return list(self._windows)[max(len(self._windows) - number, 0) :]


@dataclass(slots=True)
class Summary:
    """Gathers the windows of one summary interval."""

    started: float
    totals: Totals
    rows: np.ndarray = field(default_factory=lambda: NO_ROWS)
    exact: bool = True
    sketches: Sketches | None = None
    windows: int = 0

    def add(self, window: Window) -> None:
        found = survey(self.rows, window.rows, by="bytes", limit=_KEEP_ROWS)
        self.rows = found.strongest
        self.exact &= window.exact and found.complete
        if not self.windows:
            self.sketches = window.sketches
        elif self.sketches is not None:
            self.sketches = None if window.sketches is None else self.sketches | window.sketches
        self.windows += 1

    def text(self, now: Totals, top: int = 3) -> str:
        """Some lines: what came, what was dropped, and the strongest sources of this interval for each protocol."""
        packets, dropped = now.where() - self.totals.where(), now.dropped - self.totals.dropped
        unique = estimated(unique_sources(self.rows), self.exact, self.sketches)
        quality = "" if unique.exact else "at least " if unique.error is None else "about "
        lines = [
            f"{packets.packets} packets, {packets.bytes} bytes in {now.at - self.started:.0f} s, {dropped.packets} dropped;"
            f" {quality}{unique.ipv4} IPv4 and {unique.ipv6} IPv6 sources"
        ]
        for protocol in np.unique(self.rows["protocol"]):
            of_protocol = take(self.rows, np.flatnonzero(self.rows["protocol"] == protocol))
            sources = strongest(by_source(of_protocol), "bytes", top)
            named = (f"{talker(row).source} {row['packets']} packets {row['bytes']} bytes" for row in sources)
            lines.append(f"{protocol_name(int(protocol))}: {'; '.join(named)}")
        return "\n".join(lines)


def by_protocol(cell: Total) -> str:
    return ProtocolClass(cell.protocol).label


def by_family(cell: Total) -> str:
    return cell.family.label


def lost(tallies: Any) -> int:
    """Packets of talkers that were evicted or untracked: what the tables of talkers and rules do not hold."""
    return int(tallies.evicted.packets + tallies.untracked.packets)


@dataclass(frozen=True, slots=True)
class Pressure:
    """The table of talkers at one moment: the entries of each slice, of how many at most, and the packets since the counting began that
    lost their entry before it was read, or found none."""

    slices: Sequence[int]
    of_slice: int
    evicted: int
    untracked: int

    def fields(self, before: Pressure | None) -> dict[str, int]:
        """For programs that read the journal. What was lost is that since `before`."""
        return {
            "talkers": sum(self.slices),
            "talkers_capacity": len(self.slices) * self.of_slice,
            "talkers_fullest": max(self.slices),
            "evicted": self.evicted - (before.evicted if before else 0),
            "untracked": self.untracked - (before.untracked if before else 0),
        }

    def text(self, before: Pressure | None) -> str:
        """One line for a summary."""
        of = self.fields(before)
        text = f"table of talkers: {of['talkers']} of {of['talkers_capacity']} entries"
        if len(self.slices) > 1:
            text += f", {of['talkers_fullest']} of {self.of_slice} on the fullest CPU"
        if of["evicted"] or of["untracked"]:
            text += f"; {of['evicted']} packets evicted, {of['untracked']} untracked"
        return text


class LossWarning:
    """Tells when talkers begin to be lost; not of each window in a flood, and not twice in an interval."""

    def __init__(self) -> None:
        self._exact = True
        self._told = -math.inf

    def due(self, window: Window, interval: float) -> bool:
        began = self._exact and not window.exact and window.ended - self._told >= interval
        self._exact = window.exact
        if began:
            self._told = window.ended
        return began
