"""The policy: which sources are allowed and which denied, by whose word, and until when.

An entry is known by its prefix and its origin. For one prefix the stronger origin is *effective* (operator, then configuration, then
automatic); among effective entries the longest prefix that covers an address decides. A `Policy` is a value: a change makes a new one,
all or none of it, so that the caller can look at the result (does it lock anybody out?) before it takes effect, and hand the difference
to the kernel. No clock here; whoever asks what has expired says what time it is.

Each origin has a layer of its own, and a million entries are columns in it (see `layers`). `Entry` objects are made of those that somebody
looks at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .errors import FileEntryError, GuardError, LockOutError, NoSuchEntryError
from .layers import ALLOW, CODES, DENY, VERDICTS, Layer, Segment, merge, touched
from .model import Entry, Family, Mode, Origin, Prefix, Verdict, format_address
from .prefixes import ADDRESS, Bulk, Key, PrefixSet, bounds, column, each_prefix, find, masked, packed

ORIGINS = sorted(Origin, key=lambda origin: origin.rank)
"""The strongest first."""

Peer = tuple[Family, bytes]
"""The address at the other end of a connection."""

_FEW = 256
"""So many entries are changed one by one, in the overlays; more of them at once."""
_MOST_TOUCHED = 1024
"""Changes that are named one by one."""
_SHOWN_AT_ONCE = 4096


class Difference(NamedTuple):
    """What turns one policy's verdicts into another's: `changed` prefixes, which are `touched`, or too many to name each (None)."""

    touched: Sequence[Prefix] | None
    changed: int


class Matches(NamedTuple):
    """Longest matches of many addresses: for each the number of its prefix, or -1."""

    which: np.ndarray
    prefixes: list[Prefix]
    verdicts: list[Verdict]


class Rest(tuple[Origin, int, float, float, tuple[str, str]]):
    """What an entry has besides its prefix, as its columns have it: many entries have it in common."""

    __slots__ = ()

    def entry(self, prefix: Prefix, line: int = 0) -> Entry:
        origin, verdict, created, expires, (reason, source) = self
        return Entry(prefix, VERDICTS[verdict], origin, created, None if expires == math.inf else expires, reason,
                     f"{source}:{line}" if line else source)  # fmt: skip


Listed = tuple[Family, bytes, int, Rest, int, bool]
"""One entry among many: family, address, length; the rest; the line of its source, or 0; is it effective?"""


class Policy:
    """An immutable set of entries. Verdicts are ALLOW and DENY; a source that no entry covers gets the default, which is not ours."""

    __slots__ = ("_lengths", "layers")

    layers: Mapping[Origin, Layer]
    _lengths: Mapping[Family, Sequence[tuple[int, Sequence[Segment]]]]
    """For each family the lengths that there are, the longest first, with their segments, the strongest first."""

    def __init__(self, entries: Iterable[Entry] = ()):
        added: dict[Origin, list[Entry]] = {origin: [] for origin in ORIGINS}
        for entry in entries:
            added[entry.origin].append(entry)
        self._set({origin: Layer(origin).changed(added[origin]) for origin in ORIGINS})

    @classmethod
    def of(cls, layers: Mapping[Origin, Layer]) -> Policy:
        policy = cls.__new__(cls)
        policy._set({origin: layers.get(origin) or Layer(origin) for origin in ORIGINS})
        return policy

    def _set(self, layers: Mapping[Origin, Layer]) -> None:
        self.layers = layers
        found: dict[Key, list[Segment]] = {}
        for origin in ORIGINS:
            for key, segment in layers[origin].segments.items():
                found.setdefault(key, []).append(segment)
        self._lengths = {
            family: [(length, found[of, length]) for of, length in sorted(found, reverse=True) if of is family]
            for family in (Family.IPV4, Family.IPV6)
        }

    def _but(self, layer: Layer) -> Policy:
        return Policy.of({**self.layers, layer.origin: layer})

    def __len__(self) -> int:
        return sum(layer.count for layer in self.layers.values())

    def count(self, origin: Origin | None = None, verdict: Verdict | None = None) -> int:
        """How many entries there are, of one origin, of one verdict; without counting them one by one."""
        number = 0
        for layer in self.layers.values() if origin is None else [self.layers[origin]]:
            number += {None: layer.count, Verdict.DENY: layer.denied, Verdict.ALLOW: layer.count - layer.denied}[verdict]
        return number

    # What there is

    def listed(self) -> Iterator[Listed]:
        """All entries, by family, prefix, and strength of origin. Made as it is read."""
        for family, lengths in self._lengths.items():
            yield from _listed(family, [segment for _, segments in reversed(lengths) for segment in segments])

    def shown(self) -> Iterator[tuple[Entry, bool]]:
        """The same as entries, each with whether it is effective."""
        for family, address, length, rest, line, effective in self.listed():
            yield rest.entry(Prefix(family, address, length), line), effective

    def entries(self) -> list[Entry]:
        return [entry for entry, _ in self.shown()]

    def effective(self) -> dict[Prefix, Entry]:
        """One entry for each prefix, the strongest."""
        return {entry.prefix: entry for entry, effective in self.shown() if effective}

    def at(self, prefix: Prefix) -> list[Entry]:
        """The entries of exactly this prefix; the first one is effective."""
        found = (self.layers[origin].get(prefix) for origin in ORIGINS)
        return [entry for entry in found if entry is not None]

    def match(self, family: Family, address: bytes) -> Entry | None:
        """The entry that decides on an address: the longest effective prefix that covers it."""
        return next(self._covering(family, address), None)

    def over(self, prefix: Prefix) -> Entry | None:
        """The entry that decides on all of a prefix, but for what longer ones within say."""
        return next(self._covering(prefix.family, prefix.address, prefix.length), None)

    def explain(self, family: Family, address: bytes) -> list[Entry]:
        """Every entry that covers an address, in the order in which they would decide: the first one does."""
        return list(self._covering(family, address))

    def _covering(self, family: Family, address: bytes, longest: int = 128) -> Iterator[Entry]:
        for network, segments in self._networks(family, address, 0, longest):
            found = (segment.get(network) for segment in segments)
            yield from (entry for entry in found if entry is not None)

    def _networks(self, family: Family, address: bytes, shortest: int, longest: int) -> Iterator[tuple[bytes, Sequence[Segment]]]:
        """Where an entry that covers the address may be, the longest first."""
        bits, number = family.bits, int.from_bytes(address, "big")
        for length, segments in self._lengths[family]:
            if shortest <= length <= longest:
                shift = bits - length
                yield (number >> shift << shift).to_bytes(bits // 8, "big"), segments

    def inside_allow(self, prefix: Prefix) -> Entry | None:
        """An effective allow that covers the whole prefix, if there is one: nothing is banned automatically there."""
        seen: Prefix | None = None
        for entry in self._covering(prefix.family, prefix.address, prefix.length):
            if entry.prefix != seen and entry.verdict is Verdict.ALLOW:
                return entry
            seen = entry.prefix
        return None

    # What the packet path is made of

    def segments(self, family: Family) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """What is effective, by increasing length: length, addresses, verdicts. Addresses are sorted, each is there once; IPv4 as "u4",
        IPv6 as "u8" in two columns, the high half first. Verdicts are 1 for allow and 2 for deny, "u1"."""
        found = []
        for length, segments in reversed(self._lengths[family]):
            addresses, verdicts = _effective(family, segments)
            if family is Family.IPV6:
                addresses = np.frombuffer(packed(addresses), ">u8").astype("u8").reshape(-1, 2)
            found.append((length, addresses, np.ascontiguousarray(verdicts)))
        return found

    def inside(self, prefix: Prefix, shortest: int, longest: int) -> list[tuple[Prefix, Verdict]]:
        """What is effective within the prefix, itself included, of these lengths; by length and address."""
        found = []
        first, last = bounds(prefix)
        for length, segments in reversed(self._lengths[prefix.family]):
            if max(shortest, prefix.length) <= length <= longest:
                verdicts: dict[bytes, int] = {}
                for segment in reversed(segments):
                    verdicts.update(segment.between(first, last))
                found += [(Prefix(prefix.family, address, length), VERDICTS[verdicts[address]]) for address in sorted(verdicts)]
        return found

    def most_inside(self, prefix: Prefix, shortest: int, longest: int) -> int:
        """How many such there are, or more."""
        first, last = bounds(prefix)
        return sum(segment.most_between(first, last) for segment in self._segments_inside(prefix, shortest, longest))

    def any_inside(self, prefix: Prefix, shortest: int, longest: int) -> bool:
        """Is there any such?"""
        first, last = bounds(prefix)
        return any(segment.any_between(first, last) for segment in self._segments_inside(prefix, shortest, longest))

    def _segments_inside(self, prefix: Prefix, shortest: int, longest: int) -> Iterator[Segment]:
        for length, segments in self._lengths[prefix.family]:
            if max(shortest, prefix.length) <= length <= longest:
                yield from segments

    def any_other_inside(self, prefix: Prefix, verdict: Verdict | None) -> bool:
        """Is there anything effective within the prefix, longer than that, whose verdict is another one?"""
        first, last = bounds(prefix)
        code = CODES.get(verdict, 0) if verdict else 0
        for length, segments in self._lengths[prefix.family]:
            if length > prefix.length and any(segment.any_other_between(first, last, code) for segment in segments):
                codes: dict[bytes, int] = {}
                for segment in reversed(segments):  # the strongest last
                    codes.update(segment.between(first, last))
                if any(other != code for other in codes.values()):
                    return True
        return False

    def covering(self, family: Family, address: bytes, shortest: int, longest: int) -> Verdict | None:
        """The verdict of the longest effective prefix that covers the address, among those of these lengths."""
        for network, segments in self._networks(family, address, shortest, longest):
            code = _code(segments, network)
            if code:
                return VERDICTS[code]
        return None

    def match_rows(self, families: np.ndarray, sources: np.ndarray) -> Matches:
        """The longest match of many addresses at once: `families` holds 4 and 6, `sources` 16 octets each, of which IPv4 uses the first
        four."""
        matches = Matches(np.full(len(families), -1, "i4"), [], [])
        for family in (Family.IPV4, Family.IPV6):
            rows = np.flatnonzero(families == family)
            if not len(rows) or not self._lengths[family]:
                continue
            octets = np.ascontiguousarray(sources[rows, : family.bits // 8])
            addresses, back = np.unique(column(family, octets.tobytes()), return_inverse=True)
            which = np.full(len(addresses), -1, "i4")
            open_ = np.arange(len(addresses))
            for length, segments in self._lengths[family]:
                networks = masked((family, length), addresses[open_])
                codes = _codes(segments, networks)
                hit = codes > 0
                hits, first, to = np.unique(networks[hit], return_index=True, return_inverse=True)
                which[open_[hit]] = len(matches.prefixes) + to
                matches.prefixes.extend(each_prefix((family, length), hits))
                matches.verdicts.extend(VERDICTS[code] for code in codes[hit][first].tolist())
                open_ = open_[~hit]
            matches.which[rows] = which[back]
        return matches

    # Changes

    def with_changes(self, add: Sequence[Entry] = (), remove: Sequence[tuple[Prefix, Origin]] = ()) -> Policy:
        """Remove, then add. An entry added replaces that of the same prefix and origin. Raises, and changes nothing, when an entry to
        remove does not exist or belongs to a file, or when an automatic ban lies inside an allow.

        Automatic bans that come to lie inside an allow by this change are dropped: who allows a network means all of it.
        """
        removed: dict[Origin, list[Prefix]] = {origin: [] for origin in ORIGINS}
        for prefix, origin in dict.fromkeys(remove):
            entry = self.layers[origin].get(prefix)
            if entry is None:
                raise NoSuchEntryError(f"there is no {origin} entry for {prefix}", hint="see xdpmonctl list")
            if origin is Origin.CONFIGURATION:
                raise FileEntryError(f"{prefix} stands in {entry.source}", hint="delete it there and reload, or override it here")
            removed[origin].append(prefix)
        added: dict[Origin, list[Entry]] = {origin: [] for origin in ORIGINS}
        for entry in add:
            added[entry.origin].append(entry)
        layers = dict(self.layers)
        for origin in ORIGINS:
            if added[origin] or removed[origin]:
                layers[origin] = layers[origin].changed(added[origin], removed[origin])
        policy = self.of(layers)
        for entry in added[Origin.AUTOMATIC]:
            allow = policy.inside_allow(entry.prefix) if entry.verdict is Verdict.DENY else None
            if allow is not None:
                message = f"{entry.prefix} is not banned automatically: {allow.prefix} is allowed"
                raise GuardError(message, hint="deny it by hand if you mean it")
        return policy._without_bans_inside_allows(self)

    def with_bulk(self, bulk: Bulk) -> Policy:
        """The same as adding entries to the operator's, for any number."""
        if bulk.origin is not Origin.OPERATOR:
            raise ValueError(f"entries of origin {bulk.origin} are not added in bulk")
        if len(bulk.prefixes) <= _FEW:
            entry = (bulk.verdict, bulk.origin, bulk.created, bulk.expires, bulk.reason, bulk.source)
            return self.with_changes([Entry(prefix, *entry) for prefix in bulk.prefixes])
        return self._but(self.layers[Origin.OPERATOR].with_bulk(bulk))._without_bans_inside_allows(self)

    def with_configuration(self, entries: Iterable[Entry], lists: Iterable[Bulk] = ()) -> Policy:
        """The same policy with all entries of origin configuration replaced."""
        layer = Layer(Origin.CONFIGURATION).changed(entries)
        for bulk in lists:
            layer = layer.with_bulk(bulk)
        return self._but(layer)._without_bans_inside_allows(self)

    def without_configuration(self) -> Policy:
        """Only what was added at run time."""
        return self._but(Layer(Origin.CONFIGURATION))

    def _without_bans_inside_allows(self, before: Policy) -> Policy:
        automatic = self.layers[Origin.AUTOMATIC]
        if not automatic.denied:
            return self
        allowed = {key: addresses[becomes == ALLOW] for key, addresses, becomes in _changes(before, self)}
        doomed: dict[Key, np.ndarray] = {}
        for (family, length), segment in automatic.segments.items():
            wider = [key for key, of in allowed.items() if key[0] is family and key[1] <= length and len(of)]
            if wider:
                addresses, verdicts = segment.verdicts()
                inside = np.zeros(len(addresses), bool)
                for key in wider:
                    inside |= find(allowed[key], masked(key, addresses))[1]
                doomed[family, length] = addresses[inside & (verdicts == DENY)]
        return self._but(automatic.without(doomed)) if any(map(len, doomed.values())) else self

    # Time

    def expired(self, now: float, most: int | None = None) -> list[Entry]:
        """The entries whose time is over, or some of them. `now` is in seconds since the epoch, as `Entry.expires` is."""
        found = (
            rows.entries(layer.origin, key) for layer in self.layers.values() if layer.expiring for key, rows in layer.expired(now).items()
        )
        return list(itertools.islice(itertools.chain.from_iterable(found), most))

    def without_expired(self, now: float) -> Policy:
        over = self.expired(now, _FEW + 1)
        if len(over) <= _FEW:
            return self.with_changes(remove=[(entry.prefix, entry.origin) for entry in over]) if over else self
        gone = {layer.origin: {key: rows.addresses for key, rows in layer.expired(now).items()} for layer in self.layers.values()}
        return self.of({origin: self.layers[origin].without(of) for origin, of in gone.items()})._without_bans_inside_allows(self)

    def expiring(self) -> int:
        """How many entries end by themselves."""
        return sum(layer.expiring for layer in self.layers.values())

    def next_expiry(self) -> float | None:
        ends = (segment.soonest() for layer in self.layers.values() if layer.expiring for segment in layer.segments.values())
        soonest = min(ends, default=math.inf)
        return None if soonest == math.inf else soonest


def _listed(family: Family, segments: Sequence[Segment]) -> Iterator[Listed]:
    """`segments` by length, the shortest first, and strength of origin."""
    parts = [(segment, segment.rows()) for segment in segments]
    if not parts:
        return
    addresses = np.concatenate([rows.addresses for _, rows in parts])
    part_of = np.repeat(np.arange(len(parts), dtype="u2"), [len(rows) for _, rows in parts])
    row_of = np.concatenate([np.arange(len(rows), dtype="u4") for _, rows in parts])
    order = np.argsort(addresses, kind="stable").astype("u4")
    size, before = family.bits // 8, (b"", -1)
    for start in range(0, len(order), _SHOWN_AT_ONCE):
        chosen = order[start : start + _SHOWN_AT_ONCE]
        octets, part, row = packed(addresses[chosen]), part_of[chosen], row_of[chosen]
        columns = [np.empty(len(chosen), dtype) for dtype in ("u1", "f8", "f8", "O", "u4")]
        for number in np.unique(part):
            here = part == number
            for to, of in zip(columns, parts[number][1].columns[1:], strict=True):
                to[here] = of[row[here]]
        for index, (number, verdict, created, expires, label, line) in enumerate(
            zip(part.tolist(), *(of.tolist() for of in columns), strict=True)
        ):
            segment = parts[number][0]
            of_prefix = octets[index * size : (index + 1) * size], segment.key[1]
            yield family, *of_prefix, Rest((segment.origin, verdict, created, expires, label)), line, of_prefix != before
            before = of_prefix


def _effective(family: Family, segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and verdicts of what is effective among segments of one length, the strongest first."""
    columns: Sequence[np.ndarray] = np.empty(0, ADDRESS[family]), np.empty(0, "u1")
    for segment in reversed(segments):
        columns = merge(segment.verdicts(), columns)
    return columns[0], columns[1]


def _code(segments: Sequence[Segment], address: bytes) -> int:
    """The effective verdict of one prefix as a number, 0 if there is none."""
    return next((code for segment in segments if (code := segment.code(address))), 0)


def _codes(segments: Sequence[Segment], addresses: np.ndarray) -> np.ndarray:
    """The same for many."""
    found = np.zeros(len(addresses), "u1")
    for segment in reversed(segments):
        codes = segment.codes(addresses)
        found = np.where(codes > 0, codes, found)
    return found


def _changes(old: Policy, new: Policy) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
    """For each family and length the addresses whose effective verdict changed, ascending, with what it becomes. Looks only at segments
    that the two policies do not share."""
    differing: dict[Key, list[tuple[Segment | None, Segment | None]]] = {}
    for origin in ORIGINS:
        before, after = old.layers[origin].segments, new.layers[origin].segments
        if before is not after:
            for key in before.keys() | after.keys():
                if before.get(key) is not after.get(key):
                    differing.setdefault(key, []).append((before.get(key), after.get(key)))
    for key in sorted(differing):
        family = key[0]
        olds, news = ([of.layers[origin].segments[key] for origin in ORIGINS if key in of.layers[origin].segments] for of in (old, new))
        few: set[bytes] = set()
        for pair in differing[key]:
            addresses_of_pair = touched(*pair)
            if addresses_of_pair is None:
                addresses, _ = merge(_effective(family, olds), _effective(family, news))
                break
            few.update(addresses_of_pair)
        else:
            addresses = column(family, b"".join(sorted(few)))
        becomes = _codes(news, addresses)
        changed = _codes(olds, addresses) != becomes
        if changed.any():
            yield key, addresses[changed], becomes[changed]


def difference(old: Policy, new: Policy) -> Difference:
    """The prefixes whose effective verdict changed."""
    changes = list(_changes(old, new))
    changed = sum(len(addresses) for _, addresses, _ in changes)
    if changed > _MOST_TOUCHED:
        return Difference(None, changed)
    return Difference([prefix for key, addresses, _ in changes for prefix in each_prefix(key, addresses)], changed)


def refuse_everything(prefixes: PrefixSet, forced: bool) -> None:
    """A /0 means every source there is; raise `GuardError` unless that is said twice."""
    for prefix in prefixes.of_length(0):
        if not forced:
            raise GuardError(f"{prefix} is every {prefix.family.label} source", hint="use --force if you mean it")


def locked_out(policy: Policy, mode: Mode, peers: Iterable[Peer]) -> list[tuple[Peer, Entry]]:
    """The peers whose packets to a failsafe port would be dropped, with the entry that does it.

    Only an entry can: failsafe ports pass whatever the default says, but an entry that denies by name wins over them.
    """
    if mode is not Mode.ENFORCE:
        return []
    found: list[tuple[Peer, Entry]] = []
    for peer in dict.fromkeys(_unmap(peer) for peer in peers):
        entry = policy.match(*peer)
        if entry is not None and entry.verdict is Verdict.DENY:
            found.append((peer, entry))
    return found


def guard_peers(old: Policy, old_mode: Mode, new: Policy, new_mode: Mode, peers: Iterable[Peer]) -> None:
    """Raise `LockOutError` if a change would cut off a peer that gets in so far.

    A peer that is locked out already does not count: the connection of an attacker denied by force lingers on for hours, and must not
    stand in the way of every later change.
    """
    peers = list(peers)
    outside = {peer for peer, _ in locked_out(old, old_mode, peers)}
    cut_off = [(peer, entry) for peer, entry in locked_out(new, new_mode, peers) if peer not in outside]
    if cut_off:
        (family, address), entry = cut_off[0]
        others = f" and {len(cut_off) - 1} more" if len(cut_off) > 1 else ""
        raise LockOutError(
            f"this would cut off {format_address(family, address)}{others}, connected to a failsafe port: {entry.prefix} is denied"
            f" ({entry.source or entry.origin})",
            hint=f"allow {format_address(family, address)} first, or use --force",
        )


_MAPPED = bytes(10) + b"\xff\xff"


def _unmap(peer: Peer) -> Peer:
    """A server that listens on :: names its IPv4 peers as ::ffff:a.b.c.d; on the wire they are IPv4."""
    family, address = peer
    return (Family.IPV4, address[12:]) if family is Family.IPV6 and address.startswith(_MAPPED) else peer
