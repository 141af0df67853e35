"""Which rule the packets of a window met. The packet path knows verdicts and no rules; so its talkers are matched with the policy when a
window has ended, and for a question about the running one.

That is exact as long as a talker met one policy. A talker that was there before the policy changed may have met both: where the change
concerns it, its packets of that window are counted to no rule, and the rules that they may belong to are *partial*, which means "at least
so many". So are all rules when talkers were evicted or untracked in the window.

`RuleBook` keeps the sums in a store that outlives this process, whose interface it declares itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .model import Count, Entry, Family, Origin, Prefix, RuleCount, RuleCounts, Verdict
from .policy import Policy

_SLACK = 0.05
"""Seconds. A talker's first packet is known to 17 ms, and some packets are under way when the policy is switched."""

CHUNK = 32768
"""Rows that are matched at a time: so that no step holds the interpreter's lock for long."""

_MOST_BULKS = 4
"""Changes as a whole that are remembered in one window with the policy before them, which may be large."""


class Matches(Protocol):
    """Of many sources at once: `which` is for each the place of its longest match in `prefixes`, or -1."""

    @property
    def which(self) -> np.ndarray: ...
    @property
    def prefixes(self) -> Sequence[Prefix]: ...


class Rules(Protocol):
    """What is needed of a policy."""

    def match_rows(self, families: np.ndarray, sources: np.ndarray) -> Matches: ...
    def explain(self, family: Family, address: bytes) -> Sequence[Entry]: ...
    def at(self, prefix: Prefix) -> Sequence[Entry]: ...
    def segments(self, family: Family) -> Iterable[tuple[int, np.ndarray, np.ndarray]]: ...


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the policy, of these prefixes; or as a whole, with the policy before it, if that is known. `at` is when packets met the
    new one. `new`: those of the prefixes that had no entry before."""

    at: float
    touched: Sequence[Prefix] | None = None
    before: Rules | None = None
    new: Sequence[Prefix] = ()


@dataclass(frozen=True, slots=True)
class Attribution:
    """What the rows of a window add to each rule, and the rules of which they may hold more; all, if so said."""

    counts: Mapping[Prefix, Count]
    partial: frozenset[Prefix] = frozenset()
    all_partial: bool = False


def attribute(rows: np.ndarray, policy: Rules, changes: Sequence[Change] = ()) -> Attribution:
    """Sum the rows (of `rows.ROW`) by the prefix that decides on their source. `changes` are those since the window began, by the clock
    of the rows."""
    counts: dict[Prefix, Count] = {}
    partial: set[Prefix] = set()
    touched = _Touched(policy, changes)
    all_partial = False
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        now = policy.match_rows(part["family"], part["source"])
        unclear = touched.unclear(part, now, partial)
        for change in changes:
            if change.touched is None:
                older = np.flatnonzero(part["first_seen"] < change.at + _SLACK)
                if change.before is None:
                    all_partial |= len(older) > 0
                    unclear[older] = True
                else:
                    unclear[older[_moved(part[older], now, now.which[older], change.before, partial)]] = True
        _add(counts, part, np.where(unclear, -1, now.which), now.prefixes)
    return Attribution(counts, frozenset(partial), all_partial)


def _add(counts: dict[Prefix, Count], rows: np.ndarray, which: np.ndarray, prefixes: Sequence[Prefix]) -> None:
    # As floating point numbers, which are exact for what a window can hold. The first one is for those that count nowhere, -1.
    packets, size = (np.bincount(which + 1, rows[name], len(prefixes) + 1) for name in ("packets", "bytes"))
    for index in np.flatnonzero(packets[1:]):
        more = Count(int(packets[index + 1]), int(size[index + 1]))
        counts[prefixes[index]] = counts.get(prefixes[index], Count()) + more


class _Touched:
    """Changes of single prefixes, and which rows they may have moved from one rule to another.

    A row is concerned by the change of a prefix that covers it, unless a longer one decides, which had done so before; as far as that is
    known, when the policy changed as a whole besides.
    """

    def __init__(self, policy: Rules, changes: Sequence[Change]):
        self._policy = policy
        self._alone = all(change.touched is not None for change in changes)
        self._times: dict[Prefix, float] = {}
        for change in changes:
            self._times |= {prefix: max(change.at, self._times.get(prefix, 0.0)) for prefix in change.touched or ()}
        self._latest = dict(_with_those_above(self._times))
        self._rules: Rules = Policy(Entry(prefix, Verdict.DENY, Origin.OPERATOR) for prefix in self._times)

    def unclear(self, rows: np.ndarray, now: Matches, partial: set[Prefix]) -> np.ndarray:
        """Whether each row may be such; adds the rules that it may belong to."""
        if not self._times:
            return np.zeros(len(rows), bool)
        changed = self._rules.match_rows(rows["family"], rows["source"])
        # The last elements stand for -1, no match.
        deciding = np.array([*(prefix.length for prefix in now.prefixes), -1])[now.which]
        length = np.array([*(prefix.length for prefix in changed.prefixes), -2])[changed.which]
        until = np.array([*(self._latest[prefix] for prefix in changed.prefixes), 0.0])[changed.which]
        concerned = deciding <= length if self._alone else changed.which >= 0
        unclear: np.ndarray = concerned & (rows["first_seen"] < until + _SLACK)
        if not self._alone:
            partial.update(now.prefixes[index] for index in np.unique(now.which[unclear]) if index >= 0)
        for index in np.unique(changed.which[unclear]):
            partial.update(self._rivals(changed.prefixes[index]))
        return unclear

    def _rivals(self, prefix: Prefix) -> Iterator[Prefix]:
        """The rules that may have decided in the place of this one, itself included."""
        for entry in self._policy.explain(prefix.family, prefix.address):
            if entry.prefix.length <= prefix.length:
                yield entry.prefix
                if self._alone and entry.prefix not in self._times:
                    return  # it decided before, or those below it did


def _with_those_above(times: Mapping[Prefix, float]) -> Iterator[tuple[Prefix, float]]:
    """Each prefix with the latest time of its own and of those that cover it."""
    above: list[tuple[Prefix, float]] = []
    for prefix in sorted(times):
        while above and not above[-1][0].covers(prefix.family, prefix.address):
            above.pop()
        above.append((prefix, max(times[prefix], above[-1][1] if above else 0.0)))
        yield above[-1]


def _moved(rows: np.ndarray, now: Matches, which: np.ndarray, before: Rules, partial: set[Prefix]) -> np.ndarray:
    """Which of the rows met another rule before; adds both rules to `partial`."""
    was = before.match_rows(rows["family"], rows["source"])
    number: dict[Prefix, int] = {}
    # The last element stands for -1, no match.
    here, there = (
        np.array([*(number.setdefault(prefix, len(number)) for prefix in of.prefixes), -1])[places]
        for of, places in ((now, which), (was, was.which))
    )
    moved = here != there
    for of, places in ((now, which), (was, was.which)):
        partial.update(of.prefixes[index] for index in np.unique(places[moved]) if index >= 0)
    return moved


_EMPTY = 0x243F6A8885A308D3
_FACTORS = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_M64 = (1 << 64) - 1


def digest(policy: Rules) -> int:
    """A number that tells the prefixes of one policy from those of another; never 0. The sum of a number for each prefix, so that a change
    of few prefixes is a small one: see `share`."""
    total = _EMPTY
    for family in (Family.IPV4, Family.IPV6):
        for length, addresses, _ in policy.segments(family):
            tag = np.uint64(family << 8 | length)
            words = addresses.reshape(len(addresses), -1).astype("u8")
            hashed = np.full(len(words), tag, "u8")
            for column in range(words.shape[1]):
                hashed = (hashed ^ words[:, column]) * np.uint64(_FACTORS[0])
                hashed = (hashed ^ hashed >> np.uint64(32)) * np.uint64(_FACTORS[1])
            total += int(hashed.sum(dtype="u8"))
    return total & _M64 or 1


def share(prefix: Prefix) -> int:
    """What a prefix adds to the digest."""
    hashed = prefix.family << 8 | prefix.length
    width = min(len(prefix.address), 8)
    for at in range(0, len(prefix.address), width):
        hashed = (hashed ^ int.from_bytes(prefix.address[at : at + width], "big")) * _FACTORS[0] & _M64
        hashed = (hashed ^ hashed >> 32) * _FACTORS[1] & _M64
    return hashed


class Store(Protocol):
    """Where the sums are kept: for so many rules as it has room for."""

    digest: int
    """Of the policy that holds; 0: not known."""
    changed: float
    """When the policy changed last in the running window, by CLOCK_MONOTONIC; 0: it has not."""
    lost: int
    """Packets that had found no place in the talker table when the running window began."""
    fresh: bool
    """Nothing was kept here before: there was no process before this one, or the store is of another size."""

    def begin(self, window: int) -> None: ...
    def end(self) -> None: ...
    def add(self, counts: Mapping[Prefix, Count]) -> None: ...
    def mark(self, prefixes: Iterable[Prefix]) -> None: ...
    def mark_all(self) -> None: ...
    def make(self, prefixes: Iterable[Prefix]) -> None: ...
    def prefixes(self) -> Sequence[Prefix]: ...
    def free(self, prefixes: Iterable[Prefix]) -> None: ...
    def counts(self) -> RuleCounts: ...


class RuleBook:
    """The sums over all windows, and what is known of the policies that the running one has seen. One call at a time."""

    def __init__(self, store: Store, *, first: bool, lost: int, clock: Callable[[], float] = time.monotonic):
        """`first`: no process has counted packets before this one. `lost` packets have found no place in the talker table so far."""
        self._store = store
        self._first = first
        if store.fresh:
            store.lost = lost
        self._clock = clock
        self._policy: Rules = Policy()
        self._begun = False
        self._digest = 0
        self._changes: list[Change] = []
        self.decided: dict[tuple[Verdict, Origin], Count] = {}
        """What entries of each verdict and origin have decided on, in the windows that were closed here. An entry that goes takes nothing
        with it, so that these sums only grow."""

    def changing(self) -> None:
        """The policy is about to change: after a crash from now on nobody knows which one holds."""
        if self._begun:
            self._store.digest = 0

    def unchanged(self) -> None:
        """It has not changed after all."""
        if self._begun:
            self._store.digest = self._digest

    def changed(self, policy: Rules, touched: Sequence[Prefix] | None) -> None:
        """The policy has changed in the kernel."""
        if not self._begun:
            self._begin(policy)
            return
        now = self._clock()
        if touched is not None:
            new = [prefix for prefix in touched if not self._policy.at(prefix)]
            self._changes.append(Change(now, touched, new=new))
            gone = [prefix for prefix in touched if self._policy.at(prefix) and not policy.at(prefix)]
            come = [prefix for prefix in new if policy.at(prefix)]
            self._digest = self._digest + sum(map(share, come)) - sum(map(share, gone)) & _M64 or 1
        else:
            remembered = sum(change.before is not None for change in self._changes) < _MOST_BULKS
            self._changes.append(Change(now, before=self._policy if remembered else None))
            self._digest = digest(policy)
        self._policy = policy
        self._store.changed, self._store.digest = now, self._digest

    def _begin(self, policy: Rules) -> None:
        """The first policy of this process: perhaps that of the last one, whose window goes on."""
        self._begun, self._policy, self._digest = True, policy, digest(policy)
        store = self._store
        if self._first:
            store.changed = 0.0
        elif store.digest != self._digest:
            store.changed = self._clock()
        if store.changed:
            self._changes.append(Change(store.changed))
        store.digest = self._digest

    def settle(self, policy: Rules) -> None:
        """A policy of the same prefixes: that which others hold, so that there are not two in memory."""
        self._policy = policy

    @property
    def lost(self) -> int:
        """Packets that had found no place in the talker table when the running window began."""
        return self._store.lost

    def begin(self, window: int) -> None:
        """The window is about to be read, and then to be closed here. If that never comes, the next process knows that it is missing."""
        self._store.begin(window)

    def close(self, rows: np.ndarray, began: float, *, lost: int, lost_before: int) -> None:
        """Add the rows of the window that has ended; the next one `began` then. `lost` packets have found no place in the talker table
        since the counting began, `lost_before` of them for certain before that."""
        found = self._attribute(rows)
        self._add_decided(found.counts)
        store = self._store
        for change in self._changes:
            gone = store.prefixes() if change.touched is None else change.touched
            store.free(prefix for prefix in gone if not self._policy.at(prefix))
        store.make(prefix for change in self._changes for prefix in change.new if self._policy.at(prefix))
        store.add(found.counts)
        store.mark(prefix for prefix in found.partial if self._policy.at(prefix))
        if found.all_partial or lost != store.lost:
            store.mark_all()
        store.lost = lost_before
        # At a start after a crash, a closed window may wait to be read: what changes at the start concerns the running one as well.
        self._changes = [change for change in self._changes if change.at > began]
        store.changed = max((change.at for change in self._changes), default=0.0)
        store.end()

    def _add_decided(self, counts: Mapping[Prefix, Count]) -> None:
        decided = dict(self.decided)
        for prefix, count in counts.items():
            (entry, *_) = self._policy.at(prefix)
            of = entry.verdict, entry.origin
            decided[of] = decided.get(of, Count()) + count
        self.decided = decided  # as a whole: others read it meanwhile

    def counts(self, running: np.ndarray, lost: int) -> RuleCounts:
        """The sums with the running window's rows."""
        found, kept = self._attribute(running), self._store.counts()
        everything = found.all_partial or lost != self._store.lost
        counts = dict(kept.counts)
        for prefix, more in found.counts.items():
            of = counts.get(prefix, kept.others)
            counts[prefix] = RuleCount(of.packets + more.packets, of.bytes + more.bytes, of.partial)
        for prefix in counts if everything else found.partial:
            counts[prefix] = replace(counts.get(prefix, kept.others), partial=True)
        return RuleCounts(counts, replace(kept.others, partial=kept.others.partial or everything))

    def _attribute(self, rows: np.ndarray) -> Attribution:
        epoch = time.time() - self._clock()
        return attribute(rows, self._policy, [replace(change, at=change.at + epoch) for change in self._changes])
