"""The policy: which sources are allowed and which denied, by whose word, and until when.

An entry is known by its prefix and its origin. For one prefix the stronger origin is *effective* (operator, then configuration, then
automatic); among effective entries the longest prefix that covers an address decides. A `Policy` is a value: a change makes a new one,
all or none of it, so that the caller can look at the result (does it lock anybody out?) before it takes effect, and hand the difference
to the kernel. No clock here; whoever asks what has expired says what time it is.

Each origin has a layer of its own. A change copies only the layers that it touches, which keeps an operator's `deny` cheap beside a
configuration of a million prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import FileEntryError, GuardError, LockOutError, NoSuchEntryError
from .model import Entry, Family, Mode, Origin, Prefix, Verdict, format_address

_ORIGINS = sorted(Origin, key=lambda origin: origin.rank)
"""The strongest first."""

Peer = tuple[Family, bytes]
"""The address at the other end of a connection."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The entries of one origin, and what would be slow to find among a million of them."""

    entries: Mapping[Prefix, Entry] = field(default_factory=dict)
    lengths: frozenset[tuple[Family, int]] = frozenset()
    """The prefix lengths to look under. May name one that has no entry any more: that costs a look, nothing else."""
    expiring: Mapping[Prefix, float] = field(default_factory=dict)
    denied: int = 0

    def changed(self, add: Iterable[Entry] = (), remove: Iterable[Prefix] = ()) -> _Layer:
        entries, lengths, expiring, denied = dict(self.entries), set(self.lengths), dict(self.expiring), self.denied
        for prefix in remove:
            denied -= entries.pop(prefix).verdict is Verdict.DENY
            expiring.pop(prefix, None)
        for entry in add:
            replaced = entries.get(entry.prefix)
            denied += (entry.verdict is Verdict.DENY) - (replaced is not None and replaced.verdict is Verdict.DENY)
            entries[entry.prefix] = entry
            lengths.add((entry.prefix.family, entry.prefix.length))
            expiring.pop(entry.prefix, None)
            if entry.expires is not None:
                expiring[entry.prefix] = entry.expires
        return _Layer(entries, frozenset(lengths), expiring, denied)


class Difference(NamedTuple):
    """What turns one policy's verdicts into another's."""

    set: Mapping[Prefix, Verdict]
    delete: Set[Prefix]


class Policy:
    """An immutable set of entries. Verdicts are ALLOW and DENY; a source that no entry covers gets the default, which is not ours."""

    __slots__ = ("_layers",)

    def __init__(self, entries: Iterable[Entry] = ()):
        added: dict[Origin, list[Entry]] = {origin: [] for origin in _ORIGINS}
        for entry in entries:
            added[entry.origin].append(entry)
        self._layers = {origin: _Layer().changed(added[origin]) for origin in _ORIGINS}

    @classmethod
    def _of(cls, layers: dict[Origin, _Layer]) -> Policy:
        policy = cls.__new__(cls)
        policy._layers = layers
        return policy

    def __len__(self) -> int:
        return sum(len(layer.entries) for layer in self._layers.values())

    def count(self, origin: Origin | None = None, verdict: Verdict | None = None) -> int:
        """How many entries there are, of one origin, of one verdict; without counting them one by one."""
        number = 0
        for layer in self._layers.values() if origin is None else [self._layers[origin]]:
            number += {None: len(layer.entries), Verdict.DENY: layer.denied, Verdict.ALLOW: len(layer.entries) - layer.denied}[verdict]
        return number

    def entries(self) -> list[Entry]:
        """All of them, by family, prefix, and strength of origin."""
        everything = [entry for layer in self._layers.values() for entry in layer.entries.values()]
        return sorted(everything, key=lambda e: (e.prefix.family, e.prefix.address, e.prefix.length, e.origin.rank))

    def effective(self) -> dict[Prefix, Entry]:
        """One entry for each prefix, the strongest."""
        strongest: dict[Prefix, Entry] = {}
        for origin in reversed(_ORIGINS):
            strongest.update(self._layers[origin].entries)
        return strongest

    def at(self, prefix: Prefix) -> list[Entry]:
        """The entries of exactly this prefix; the first one is effective."""
        found = (self._layers[origin].entries.get(prefix) for origin in _ORIGINS)
        return [entry for entry in found if entry is not None]

    def match(self, family: Family, address: bytes) -> Entry | None:
        """The entry that decides on an address: the longest effective prefix that covers it."""
        return next(self._covering(family, address), None)

    def explain(self, family: Family, address: bytes) -> list[Entry]:
        """Every entry that covers an address, in the order in which they would decide: the first one does."""
        return list(self._covering(family, address))

    def _covering(self, family: Family, address: bytes, longest: int = 128) -> Iterator[Entry]:
        bits, number = family.bits, int.from_bytes(address, "big")
        lengths = {length for layer in self._layers.values() for of, length in layer.lengths if of is family and length <= longest}
        for length in sorted(lengths, reverse=True):
            shift = bits - length
            yield from self.at(Prefix(family, (number >> shift << shift).to_bytes(bits // 8, "big"), length))

    def inside_allow(self, prefix: Prefix) -> Entry | None:
        """An effective allow that covers the whole prefix, if there is one: nothing is banned automatically there."""
        seen: Prefix | None = None
        for entry in self._covering(prefix.family, prefix.address, prefix.length):
            if entry.prefix != seen and entry.verdict is Verdict.ALLOW:
                return entry
            seen = entry.prefix
        return None

    def with_changes(self, add: Sequence[Entry] = (), remove: Sequence[tuple[Prefix, Origin]] = ()) -> Policy:
        """Remove, then add. An entry added replaces that of the same prefix and origin. Raises, and changes nothing, when an entry to
        remove does not exist or belongs to a file, or when an automatic ban lies inside an allow.

        Automatic bans that come to lie inside an allow by this change are dropped: who allows a network means all of it.
        """
        removed: dict[Origin, list[Prefix]] = {origin: [] for origin in _ORIGINS}
        for prefix, origin in dict.fromkeys(remove):
            entry = self._layers[origin].entries.get(prefix)
            if entry is None:
                raise NoSuchEntryError(f"there is no {origin} entry for {prefix}", hint="see xdpmonctl list")
            if origin is Origin.CONFIGURATION:
                raise FileEntryError(f"{prefix} stands in {entry.source}", hint="delete it there and reload, or override it here")
            removed[origin].append(prefix)
        added: dict[Origin, list[Entry]] = {origin: [] for origin in _ORIGINS}
        for entry in add:
            added[entry.origin].append(entry)
        layers = dict(self._layers)
        for origin in _ORIGINS:
            if added[origin] or removed[origin]:
                layers[origin] = layers[origin].changed(added[origin], removed[origin])
        policy = self._of(layers)
        for entry in added[Origin.AUTOMATIC]:
            allow = policy.inside_allow(entry.prefix) if entry.verdict is Verdict.DENY else None
            if allow is not None:
                message = f"{entry.prefix} is not banned automatically: {allow.prefix} is allowed"
                raise GuardError(message, hint="deny it by hand if you mean it")
        return policy._without_bans_inside_allows(self)

    def with_configuration(self, entries: Iterable[Entry]) -> Policy:
        """The same policy with all entries of origin configuration replaced."""
        policy = self._of({**self._layers, Origin.CONFIGURATION: _Layer().changed(entries)})
        return policy._without_bans_inside_allows(self)

    def _without_bans_inside_allows(self, before: Policy) -> Policy:
        automatic = self._layers[Origin.AUTOMATIC]
        if not automatic.denied:
            return self
        allowed = (prefix for prefix, verdict in difference(before, self).set.items() if verdict is Verdict.ALLOW)
        new_allows = Policy(Entry(prefix, Verdict.ALLOW, Origin.OPERATOR) for prefix in allowed)
        doomed = [p for p, entry in automatic.entries.items() if entry.verdict is Verdict.DENY and new_allows.inside_allow(p)]
        return self._of({**self._layers, Origin.AUTOMATIC: automatic.changed(remove=doomed)}) if doomed else self

    def expired(self, now: float) -> list[Entry]:
        """The entries whose time is over. `now` is in seconds since the epoch, as `Entry.expires` is."""
        return [layer.entries[prefix] for layer in self._layers.values() for prefix, end in layer.expiring.items() if end <= now]

    def expiring(self) -> int:
        """How many entries end by themselves."""
        return sum(len(layer.expiring) for layer in self._layers.values())

    def next_expiry(self) -> float | None:
        return min((end for layer in self._layers.values() for end in layer.expiring.values()), default=None)


def difference(old: Policy, new: Policy) -> Difference:
    """The prefixes whose effective verdict changed. Looks only at layers that the two policies do not share."""
    touched: set[Prefix] = set()
    for origin in _ORIGINS:
        before, after = old._layers[origin].entries, new._layers[origin].entries
        if before is not after:
            touched.update(prefix for prefix, entry in before.items() if after.get(prefix) is not entry)
            touched.update(prefix for prefix in after if prefix not in before)
    changed: dict[Prefix, Verdict] = {}
    deleted: set[Prefix] = set()
    for prefix in touched:
        was, becomes = old.at(prefix), new.at(prefix)
        if not becomes:
            deleted.add(prefix)
        elif not was or was[0].verdict is not becomes[0].verdict:
            changed[prefix] = becomes[0].verdict
    return Difference(changed, deleted)


def refuse_everything(prefixes: Iterable[Prefix], forced: bool) -> None:
    """A /0 means every source there is; raise `GuardError` unless that is said twice."""
    for prefix in prefixes:
        if prefix.length == 0 and not forced:
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
