"""The entries of one origin: columns for the many, objects for the few that changed lately.

A `Layer` is a value, and so are its `Segment`s, one for each family and length. A segment is a base of `Rows`, sorted columns that nobody
changes, and above it a small overlay of entries by address, in which None hides a row of the base. A small change copies the overlay of one
segment: microseconds, however large the base is. When an overlay has grown to `LIMIT` entries it is worked into a new base, all at once.

A column in which all values are the same is kept as one value (numpy calls that a broadcast), so that a million prefixes that came
with one call cost their addresses alone.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .model import Entry, Family, Origin, Prefix, Verdict
from .prefixes import ADDRESS, Bulk, Key, column, each_prefix, find, find_one, packed

LIMIT = 4096
"""Entries of an overlay."""

ALLOW, DENY = 1, 2
"""Verdicts as numbers; 0 is no entry."""
CODES = {Verdict.ALLOW: ALLOW, Verdict.DENY: DENY}
VERDICTS = {ALLOW: Verdict.ALLOW, DENY: Verdict.DENY}

Label = tuple[str, str]
"""Reason and source; of a source with line numbers the file alone."""

Columns = Sequence[np.ndarray]
"""Of equal length. The first one holds addresses, ascending and each once."""


def same(value: object, number: int, dtype: object) -> np.ndarray:
    """A column of one value."""
    one = np.empty((), np.dtype(dtype))  # type: ignore[call-overload]
    one[()] = value
    return np.broadcast_to(one, number)


def is_same(of: np.ndarray) -> bool:
    return of.strides[0] == 0


def _as_same(of: np.ndarray) -> np.ndarray:
    """The column as one value, if it is one."""
    return same(of[0], len(of), of.dtype) if len(of) and bool((of == of[:1]).all()) else of


def select(columns: Columns, rows: np.ndarray) -> list[np.ndarray]:
    """The rows chosen by a mask or by their numbers."""
    number = int(np.count_nonzero(rows)) if rows.dtype == bool else len(rows)
    return [np.broadcast_to(of[:1].reshape(()), number) if number and is_same(of) else of[rows] for of in columns]


def merge(strong: Columns, weak: Columns) -> list[np.ndarray]:
    """The rows of both. Where both have an address, the strong one's is taken."""
    few, many = strong, weak
    if len(weak[0]) < len(strong[0]):  # what is looked up should be the smaller part
        few, many = select(weak, ~find(strong[0], weak[0])[1]), strong
    if not len(few[0]):
        return list(many)
    at = np.searchsorted(many[0], few[0])
    new = many[0][np.minimum(at, len(many[0]) - 1)] != few[0]
    size = len(many[0]) + int(np.count_nonzero(new))
    if size == len(few[0]):
        return list(few)
    to = at + np.cumsum(new) - new
    from_many = np.ones(size, bool)
    from_many[to[new]] = False
    merged = []
    for of_few, of_many in zip(few, many, strict=True):
        if is_same(of_few) and is_same(of_many) and of_few[0] == of_many[0]:
            merged.append(np.broadcast_to(of_many[:1].reshape(()), size))
            continue
        both = np.empty(size, of_many.dtype)
        both[from_many] = of_many
        both[to] = of_few
        merged.append(both)
    return merged


class Rows:
    """Entries of one family and length as columns."""

    __slots__ = ("addresses", "created", "denied", "expires", "expiring", "labels", "lines", "soonest", "verdicts")

    def __init__(self, columns: Columns):
        """In the order of `columns`: addresses, verdicts as numbers, created, expires (infinite: never), labels, lines (0: none)."""
        self.addresses, self.verdicts, self.created, self.expires, self.labels, self.lines = columns
        self.denied = int(np.count_nonzero(self.verdicts == DENY))
        self.expiring = int(np.count_nonzero(self.expires < math.inf))
        self.soonest = float(self.expires.min(initial=math.inf))

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        return self.addresses, self.verdicts, self.created, self.expires, self.labels, self.lines

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def none(cls, family: Family) -> Rows:
        return cls([np.empty(0, dtype) for dtype in (ADDRESS[family], "u1", "f8", "f8", "O", "u4")])

    @classmethod
    def alike(cls, addresses: np.ndarray, of: Bulk, lines: np.ndarray | None) -> Rows:
        number = len(addresses)
        expires = math.inf if of.expires is None else of.expires
        return cls([
            addresses, same(CODES[of.verdict], number, "u1"), same(of.created, number, "f8"), same(expires, number, "f8"),
            same((of.reason, of.source), number, "O"), same(0, number, "u4") if lines is None else lines,
        ])  # fmt: skip

    @classmethod
    def of(cls, family: Family, entries: Mapping[bytes, Entry]) -> Rows:
        """From entries by address."""
        if not entries:
            return cls.none(family)
        order = sorted(entries)
        chosen = [entries[address] for address in order]
        memo: dict[Label, Label] = {}
        labels = np.empty(len(chosen), "O")
        for row, entry in enumerate(chosen):
            label = (entry.reason, entry.source)
            labels[row] = memo.setdefault(label, label)
        columns = [
            np.array([CODES[entry.verdict] for entry in chosen], "u1"),
            np.array([entry.created for entry in chosen], "f8"),
            np.array([math.inf if entry.expires is None else entry.expires for entry in chosen], "f8"),
        ]
        alike = same(next(iter(memo)), len(chosen), "O") if len(memo) == 1 else labels
        return cls([column(family, b"".join(order)), *map(_as_same, columns), alike, same(0, len(chosen), "u4")])

    def where(self, rows: np.ndarray) -> Rows:
        return Rows(select(self.columns, rows))

    def without(self, addresses: np.ndarray) -> Rows:
        rows, found = find(self.addresses, addresses)
        if not found.any():
            return self
        kept = np.ones(len(self), bool)
        kept[rows[found]] = False
        return self.where(kept)

    def over(self, weak: Rows) -> Rows:
        return Rows(merge(self.columns, weak.columns))

    def entry(self, origin: Origin, key: Key, row: int) -> Entry:
        (prefix,) = each_prefix(key, self.addresses[row : row + 1])
        reason, source = self.labels[row]
        line, expires = int(self.lines[row]), float(self.expires[row])
        return Entry(prefix, VERDICTS[int(self.verdicts[row])], origin, float(self.created[row]),
                     None if expires == math.inf else expires, reason, f"{source}:{line}" if line else source)  # fmt: skip

    def entries(self, origin: Origin, key: Key) -> Iterator[Entry]:
        return (self.entry(origin, key, row) for row in range(len(self)))

    def differs(self, other: Rows) -> np.ndarray:
        """Of rows with the same addresses: which differ otherwise."""
        found = np.zeros(len(self), bool)
        for mine, theirs in zip(self.columns[1:], other.columns[1:], strict=True):
            if is_same(mine) and is_same(theirs) and len(found):
                found |= mine[0] != theirs[0]
            else:
                found |= (mine != theirs).astype(bool)
        return found


class Segment:
    """The entries of one origin, family and length. An entry that hides nothing is not kept as None."""

    __slots__ = ("__weakref__", "_plain", "base", "count", "denied", "expiring", "key", "order", "origin", "overlay", "parent", "touched")

    def __init__(self, origin: Origin, key: Key, base: Rows, parent: Segment | None = None, touched: Iterable[bytes] = ()):
        self.origin = origin
        self.key = key
        self.base = base
        self.overlay: Mapping[bytes, Entry | None] = {}
        self.order: Sequence[bytes] = ()
        """The addresses of the overlay, sorted."""
        self.count = len(base)
        self.denied = base.denied
        self.expiring = base.expiring
        self.parent = weakref.ref(parent) if parent else None
        """What this one was made of by a change of `touched`."""
        self.touched = tuple(touched)
        self._plain: tuple[np.ndarray, np.ndarray] | None = None

    def get(self, address: bytes) -> Entry | None:
        try:
            return self.overlay[address]
        except KeyError:
            row = find_one(self.base.addresses, address)
            return self.base.entry(self.origin, self.key, row) if row >= 0 else None

    def code(self, address: bytes) -> int:
        """The verdict as a number."""
        try:
            entry = self.overlay[address]
        except KeyError:
            row = find_one(self.base.addresses, address)
            return int(self.base.verdicts[row]) if row >= 0 else 0
        return CODES[entry.verdict] if entry else 0

    def codes(self, addresses: np.ndarray) -> np.ndarray:
        """The same for many."""
        found = np.zeros(len(addresses), "u1")
        if len(self.base):
            rows, here = find(self.base.addresses, addresses)
            found[here] = self.base.verdicts[rows[here]]
        if self.overlay:
            overlaid, codes = self._overlay_columns()
            rows, here = find(overlaid, addresses)
            found[here] = codes[rows[here]]
        return found

    def _overlay_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and codes of the overlay, made once."""
        if self._plain is None:
            codes = [CODES[entry.verdict] if (entry := self.overlay[address]) else 0 for address in self.order]
            self._plain = column(self.key[0], b"".join(self.order)), np.array(codes, "u1")
        return self._plain

    def changed(self, changes: Mapping[bytes, Entry | None]) -> Segment:
        if len(self.overlay) + len(changes) > LIMIT:
            live = {address: entry for address, entry in changes.items() if entry is not None}
            gone = column(self.key[0], b"".join(sorted(changes.keys() - live.keys())))
            base = Rows.of(self.key[0], live).over(self.rows().without(gone))
            return Segment(self.origin, self.key, base, *((self, changes) if len(changes) <= LIMIT else ()))
        after = Segment(self.origin, self.key, self.base, self, changes)
        overlay, order = dict(self.overlay), list(self.order)
        after.count, after.denied, after.expiring = self.count, self.denied, self.expiring
        for address, entry in changes.items():
            for one, sign in ((self.get(address), -1), (entry, 1)):
                if one is not None:
                    after.count += sign
                    after.denied += sign * (one.verdict is Verdict.DENY)
                    after.expiring += sign * (one.expires is not None)
            if entry is not None or find_one(self.base.addresses, address) >= 0:
                if address not in overlay:
                    insort(order, address)
                overlay[address] = entry
            elif address in overlay:
                del overlay[address], order[bisect_left(order, address)]
        after.overlay, after.order = overlay, order
        return after

    def rows(self) -> Rows:
        """All of them."""
        if not self.overlay:
            return self.base
        hidden = column(self.key[0], b"".join(address for address in self.order if self.overlay[address] is None))
        live = {address: entry for address, entry in self.overlay.items() if entry is not None}
        return Rows.of(self.key[0], live).over(self.base.without(hidden))

    def verdicts(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and verdicts alone."""
        plain = self.base.addresses, self.base.verdicts
        if not self.overlay:
            return plain
        addresses, verdicts = merge(self._overlay_columns(), plain)
        kept = verdicts > 0
        return addresses[kept], verdicts[kept]

    def between(self, first: bytes, last: bytes) -> dict[bytes, int]:
        """The verdicts of the addresses from the first to the last."""
        low, high = self._range(first, last)
        octets, size = packed(self.base.addresses[low:high]), len(first)
        verdicts = self.base.verdicts[low:high].tolist()
        found = {octets[row * size : (row + 1) * size]: verdict for row, verdict in enumerate(verdicts)}
        for address in self._overlaid(first, last):
            entry = self.overlay[address]
            if entry is None:
                del found[address]
            else:
                found[address] = CODES[entry.verdict]
        return found

    def any_between(self, first: bytes, last: bytes) -> bool:
        low, high = self._range(first, last)
        overlaid = self._overlaid(first, last)
        return any(self.overlay[address] is not None for address in overlaid) or high - low > len(overlaid)

    def most_between(self, first: bytes, last: bytes) -> int:
        """How many there are, or more."""
        low, high = self._range(first, last)
        return high - low + len(self._overlaid(first, last))

    def any_other_between(self, first: bytes, last: bytes, code: int) -> bool:
        """Has any of them another verdict? Also true where the overlay hides the only ones that have."""
        low, high = self._range(first, last)
        overlaid = (self.overlay[address] for address in self._overlaid(first, last))
        return bool((self.base.verdicts[low:high] != code).any()) or any(entry and CODES[entry.verdict] != code for entry in overlaid)

    def _range(self, first: bytes, last: bytes) -> tuple[int, int]:
        addresses = self.base.addresses
        low, high = column(self.key[0], first + last)
        return int(addresses.searchsorted(low)), int(addresses.searchsorted(high, "right"))

    def _overlaid(self, first: bytes, last: bytes) -> Sequence[bytes]:
        return self.order[bisect_left(self.order, first) : bisect_right(self.order, last)]

    def _uncovered(self) -> np.ndarray:
        """The rows of the base that still count."""
        kept = np.ones(len(self.base), bool)
        if self.overlay:
            rows, found = find(self.base.addresses, self._overlay_columns()[0])
            kept[rows[found]] = False
        return kept

    def soonest(self) -> float:
        """When the first of them ends; infinite: never."""
        if not self.expiring:
            return math.inf
        ends = [entry.expires for entry in self.overlay.values() if entry is not None and entry.expires is not None]
        if self.base.expiring:
            if is_same(self.base.expires):
                of_base = self.base.soonest if self._uncovered().any() else math.inf
            else:
                rows, found = find(self.base.addresses, self._overlay_columns()[0])
                hidden = self.base.expires[rows[found]]
                of_base = self.base.soonest
                if of_base in hidden:
                    of_base = float(self.base.expires[self._uncovered()].min(initial=math.inf))
            ends.append(of_base)
        return min(ends, default=math.inf)

    def expired(self, now: float) -> Rows:
        over = {a: entry for a, entry in self.overlay.items() if entry is not None and entry.expires is not None and entry.expires <= now}
        rows = Rows.of(self.key[0], over)
        if self.base.soonest <= now:
            rows = rows.over(self.base.where((self.base.expires <= now) & self._uncovered()))
        return rows


class Layer:
    """The entries of one origin."""

    __slots__ = ("count", "denied", "expiring", "origin", "segments")

    def __init__(self, origin: Origin, segments: Mapping[Key, Segment] | None = None):
        self.origin = origin
        self.segments = {key: segment for key, segment in (segments or {}).items() if segment.count}
        self.count = sum(segment.count for segment in self.segments.values())
        self.denied = sum(segment.denied for segment in self.segments.values())
        self.expiring = sum(segment.expiring for segment in self.segments.values())

    def get(self, prefix: Prefix) -> Entry | None:
        segment = self.segments.get((prefix.family, prefix.length))
        return segment.get(prefix.address) if segment else None

    def changed(self, add: Iterable[Entry] = (), remove: Iterable[Prefix] = ()) -> Layer:
        """Remove, then add. An entry added replaces that of the same prefix."""
        changes: dict[Key, dict[bytes, Entry | None]] = {}
        for prefix in remove:
            changes.setdefault((prefix.family, prefix.length), {})[prefix.address] = None
        for entry in add:
            changes.setdefault((entry.prefix.family, entry.prefix.length), {})[entry.prefix.address] = entry
        return Layer(self.origin, {**self.segments, **{key: self._segment(key).changed(of) for key, of in changes.items()}})

    def _segment(self, key: Key) -> Segment:
        return self.segments.get(key) or Segment(self.origin, key, Rows.none(key[0]))

    def with_rows(self, rows: Mapping[Key, Rows]) -> Layer:
        """Add many. They replace what there is of the same prefix."""
        bases = {key: of.over(self._segment(key).rows()) for key, of in rows.items()}
        return Layer(self.origin, {**self.segments, **{key: Segment(self.origin, key, base) for key, base in bases.items()}})

    def with_bulk(self, bulk: Bulk) -> Layer:
        lines = bulk.prefixes.lines if bulk.source else {}
        return self.with_rows({key: Rows.alike(of, bulk, lines.get(key)) for key, of in bulk.prefixes.columns.items()})

    def without(self, prefixes: Mapping[Key, np.ndarray]) -> Layer:
        """Remove many, which need not be there."""
        left = {key: self.segments[key].rows().without(of) for key, of in prefixes.items() if key in self.segments}
        return Layer(self.origin, {**self.segments, **{key: Segment(self.origin, key, rows) for key, rows in left.items()}})

    def expired(self, now: float) -> dict[Key, Rows]:
        found = {key: segment.expired(now) for key, segment in self.segments.items() if segment.expiring}
        return {key: rows for key, rows in found.items() if len(rows)}


class Changes(NamedTuple):
    """What turns one layer into another."""

    added: Mapping[Key, Rows]
    """Also what changed."""
    removed: Mapping[Key, np.ndarray]


def changes(old: Layer, new: Layer) -> Changes:
    """Looks only at segments that the two do not share."""
    added: dict[Key, Rows] = {}
    removed: dict[Key, np.ndarray] = {}
    for key in sorted(old.segments.keys() | new.segments.keys()):
        before, after = old.segments.get(key), new.segments.get(key)
        if before is after:
            continue
        addresses = touched(before, after)
        if addresses is not None:
            pairs = {address: (before.get(address) if before else None, after.get(address) if after else None) for address in addresses}
            added[key] = Rows.of(key[0], {address: entry for address, (was, entry) in pairs.items() if entry and entry != was})
            removed[key] = column(key[0], b"".join(sorted(address for address, (was, entry) in pairs.items() if was and not entry)))
        elif before is None or after is None:
            if after is not None:
                added[key] = after.rows()
            elif before is not None:
                removed[key] = before.rows().addresses
        else:
            old_rows, new_rows = before.rows(), after.rows()
            rows, found = find(old_rows.addresses, new_rows.addresses)
            changed = ~found
            changed[found] = new_rows.where(found).differs(old_rows.where(rows[found]))
            added[key] = new_rows.where(changed)
            removed[key] = old_rows.addresses[~find(new_rows.addresses, old_rows.addresses)[1]]
    return Changes({key: rows for key, rows in added.items() if len(rows)}, {key: of for key, of in removed.items() if len(of)})


def touched(before: Segment | None, after: Segment | None) -> Collection[bytes] | None:
    """The addresses at which two segments of one key may differ; None if only a comparison of all rows can tell."""
    if before and after and after.parent and after.parent() is before:
        return after.touched
    bases = [segment.base if segment and len(segment.base) else None for segment in (before, after)]
    if bases[0] is not bases[1]:
        return None
    was, becomes = before.overlay if before else {}, after.overlay if after else {}
    return [
        address
        for address in was.keys() | becomes.keys()
        if was.get(address) is not becomes.get(address) or (address in was) is not (address in becomes)
    ]
