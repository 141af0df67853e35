"""The structure in which the packet path looks up a verdict: built as a whole from a policy, or changed at a few prefixes.

bpf/policy.h reads it, and bpf/abi.h gives its layout. All levels hold codes (abi.CODE_*) of 256 neighbours, and a code says what is the
verdict if no deeper level says otherwise. So a change of a prefix touches the level that it belongs to, and of the deeper ones only the
code that they have for what is not theirs, "outside".

`Built` is free of addresses in memory. A `Copy` is one of the two places of the policy's maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..errors import KernelError
from ..model import Family, Prefix, Verdict
from . import abi
from .tables import SMALLEST_POLICY, PolicySize


class Verdicts(Protocol):
    """What the structure is made from: the effective prefixes of a policy."""

    def segments(self, family: Family) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
        """By increasing length: the length, the addresses (sorted, unique, host order; IPv4 u4, IPv6 u8 of shape (n, 2)), and the verdicts
        (u1: 1 allow, 2 deny)."""

    def inside(self, prefix: Prefix, shortest: int, longest: int) -> Sequence[tuple[Prefix, Verdict]]:
        """Those within `prefix`, itself included, of these lengths, by increasing length."""

    def any_inside(self, prefix: Prefix, shortest: int, longest: int) -> bool: ...

    def covering(self, family: Family, address: bytes, shortest: int, longest: int) -> Verdict | None:
        """The verdict of the longest one of these lengths that covers the address."""


class DoesNotFit(KernelError):
    """The policy needs more room than there is."""


class NeedsWhole(Exception):
    """A change that touches too much to be made point by point."""


_CODE = {Verdict.ALLOW: abi.CODE_ALLOW, Verdict.DENY: abi.CODE_DENY, None: abi.CODE_NONE}
_USED = 1 << abi.REF_USED_SHIFT
_KEY_SHIFT = abi.REF_USED_SHIFT + 1
_LINE_MASK = 0xFFFFFFFF
_TOMBSTONE = _USED
"""A node without depth: nobody looks for it, and those behind it are found."""
_MOST_BUCKETS = 1 << 25
_MOST_NODES = 500
"""Of other prefixes that one change may touch before all is built anew."""


# The codes of 256 neighbours


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes of shape (n, 256), u1, as lines of shape (n, 8), u64."""
    quarters = codes.reshape(len(codes), 64, 4)
    packed = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return np.ascontiguousarray(packed).view("<u8")


def unpack(line: np.ndarray) -> np.ndarray:
    """One line as 256 codes."""
    quarters = np.ascontiguousarray(line).view("u1")
    return np.stack([quarters >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(256)


def _fill(flat: np.ndarray, starts: np.ndarray, bits: int, codes: np.ndarray) -> None:
    """Set 2 ** bits neighbours from each start on."""
    if bits == 0:
        flat[starts] = codes
    elif len(starts):
        flat[starts[:, None] + np.arange(1 << bits)] = codes[:, None]


def _reference(outside: int, ranges: Sequence[tuple[int, int, int]]) -> int:
    """Of up to two ranges (first place, number of places, code), of which the later goes before the earlier."""
    first = ranges[0] if ranges else (0, 1, outside)
    second = ranges[1] if len(ranges) > 1 else first
    ref = outside
    for (place, number, code), shift in ((first, 2), (second, 20)):
        ref |= code << shift | place << shift + 2 | (number - 1) << shift + 10
    return ref


# A policy as a whole

_Places = tuple[np.ndarray, np.ndarray]


@dataclass(slots=True)
class Built:
    """All parts, before they have a place. Line 0 is unused."""

    ipv4: np.ndarray
    ipv6: np.ndarray
    lines: np.ndarray
    keys4: np.ndarray
    """The first 24 bits, sorted."""
    refs4: np.ndarray
    nodes6: np.ndarray
    """abi.NODE."""
    depths: list[int]
    """Of IPv6 nodes."""
    prefixes: int
    """How many it was made from."""

    _places: dict[tuple[object, ...], _Places | None] = field(default_factory=dict)

    def size(self, seed: Sequence[int]) -> PolicySize:
        """What it takes, with room to grow. How many buckets that is depends on the seed, too."""

        def buckets(number: int, each: int, least: int, places: Callable[[int, Sequence[int]], _Places | None]) -> int:
            wanted = max(least, 1 << (max(number, 1) // each).bit_length())
            while places(wanted, seed) is None:
                wanted *= 2
                if wanted > _MOST_BUCKETS:
                    raise DoesNotFit(f"the policy finds no room in {wanted // 2} buckets")
            return wanted

        least = SMALLEST_POLICY
        lines = len(self.lines) + len(self.lines) // 4 + least.lines
        buckets4 = buckets(len(self.refs4), 4, least.buckets4, self.places4)
        return PolicySize(lines, buckets4, buckets(len(self.nodes6), 2, least.buckets6, self.places6))

    def places4(self, buckets: int, seed: Sequence[int]) -> _Places | None:
        """Bucket and place in it of each reference; None if so few buckets do not do."""
        return self._remembered(("4", buckets, *seed[:2]), lambda: _find_places(_homes4(self.keys4, seed), buckets, abi.BUCKET4))

    def places6(self, buckets: int, seed: Sequence[int]) -> _Places | None:
        return self._remembered(("6", buckets, *seed[:2]), lambda: _find_places(_homes6(self.nodes6, seed), buckets, abi.BUCKET6))

    def _remembered(self, question: tuple[object, ...], find: Callable[[], _Places | None]) -> _Places | None:
        if question not in self._places:
            self._places[question] = find()
        return self._places[question]


def build(policy: Verdicts) -> Built:
    """Everything from the beginning: some 0.5 s for a million prefixes."""
    lines = [np.zeros((1, 8), "u8")]
    segments4, segments6 = list(policy.segments(Family.IPV4)), list(policy.segments(Family.IPV6))
    ipv4, keys4, refs4 = _build4(segments4, lines)
    ipv6, nodes6, depths = _build6(segments6, lines)
    prefixes = sum(len(addresses) for _, addresses, _ in segments4 + segments6)
    return Built(ipv4, ipv6, np.concatenate(lines), keys4, refs4, nodes6, depths, prefixes)


def _add_lines(lines: list[np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Returns the indexes of new lines."""
    first = sum(map(len, lines))
    for at in range(0, len(codes), 8192):
        lines.append(pack(codes[at : at + 8192]))
    return np.arange(first, first + len(codes), dtype="u8")


_Segments = list[tuple[int, np.ndarray, np.ndarray]]


def _build4(segments: _Segments, lines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    top = np.zeros(65536, "u4")
    for length, addresses, codes in segments:
        if length <= 16:
            _fill(top, (addresses >> 16).astype("i8"), 16 - length, codes)
    longer = [segment for segment in segments if segment[0] > 16]
    if not longer:
        return top, np.zeros(0, "u4"), np.zeros(0, "u8")
    with_line = np.zeros(65536, bool)
    for _, addresses, _ in longer:
        with_line[addresses >> 16] = True
    line_of = np.cumsum(with_line) - 1
    codes16 = np.zeros((int(with_line.sum()), 256), "u1")
    flat = codes16.reshape(-1)

    def place(addresses: np.ndarray) -> np.ndarray:
        return line_of[addresses >> 16] * 256 + (addresses >> 8 & 0xFF)

    for length, addresses, codes in longer:
        if length <= 24:
            _fill(flat, place(addresses), 24 - length, codes)
    deepest = [(length, addresses >> 8, addresses & 0xFF, codes) for length, addresses, codes in longer if length > 24]
    keys, starts, order = _grouped(deepest)
    outside = flat[place(keys << 8)]
    refs = _references(outside, starts, order, 32, lines) | keys.astype("u8") << np.uint64(_KEY_SHIFT)
    flat[place(keys << 8)] = abi.CODE_DEEPER
    indexes = _add_lines(lines, codes16)
    top[with_line] |= (indexes << np.uint64(2)).astype("u4")
    return top, keys, refs


@dataclass(slots=True)
class _Members:
    """Prefixes that hang on nodes, ordered by node and length."""

    lengths: np.ndarray
    places: np.ndarray
    codes: np.ndarray


def _grouped(parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, _Members]:
    """Parts are (length, key, place, code). Returns the distinct keys, where the members of each begin, and the members."""
    if not parts:
        return np.zeros(0, "u4"), np.zeros(0, "i8"), _Members(*(np.zeros(0, "u1"),) * 3)
    keys = np.concatenate([part[1] for part in parts])
    # Lengths rise from part to part, and a stable sort leaves them so within a key.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.nonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))[0]
    members = _Members(
        np.concatenate([np.full(len(part[1]), part[0], "u1") for part in parts])[order],
        np.concatenate([part[2].astype("u1") for part in parts])[order],
        np.concatenate([part[3] for part in parts])[order],
    )
    return keys[starts], starts, members


def _references(outside: np.ndarray, starts: np.ndarray, of: _Members, level_end: int, lines: list[np.ndarray]) -> np.ndarray:
    """References for nodes whose members begin at `starts`, without their keys. `level_end` is the length of a single place."""
    counts = np.diff(np.concatenate([starts, [len(of.lengths)]]))
    refs = outside.astype("u8") | np.uint64(_USED)
    spans = ((1 << (level_end - of.lengths.astype("i8"))) - 1).astype("u8")
    codes, places = of.codes.astype("u8"), of.places.astype("u8")
    packed = codes | places << np.uint64(2) | spans << np.uint64(10)
    few = counts <= 2
    first = packed[starts]
    second = packed[np.minimum(starts + 1, len(packed) - 1)] if len(packed) else first
    second = np.where(counts == 2, second, first)
    refs[few] |= (first << np.uint64(2) | second << np.uint64(20))[few]
    many = np.nonzero(~few)[0]
    if len(many):
        codes_of = np.repeat(outside[many][:, None], 256, axis=1)
        flat = codes_of.reshape(-1)
        row_of = np.full(len(starts), -1, "i8")
        row_of[many] = np.arange(len(many))
        rows = row_of[np.repeat(np.arange(len(starts)), counts)]
        for length in range(level_end - 7, level_end + 1):
            mine = np.nonzero((rows >= 0) & (of.lengths == length))[0]
            _fill(flat, rows[mine] * 256 + of.places[mine], level_end - length, of.codes[mine])
        refs[many] = np.uint64(_USED | abi.REF_LINE) | _add_lines(lines, codes_of)
    return refs


def search_steps(depths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(depth, step if there is a node, step if not) of a balanced search; step 0 begins. Nowhere is abi.SEARCH_STEPS."""
    steps: list[tuple[int, int, int]] = []

    def add(low: int, high: int) -> int:
        if low > high:
            return abi.SEARCH_STEPS
        middle, mine = (low + high) // 2, len(steps)
        steps.append((0, 0, 0))
        steps[mine] = (depths[middle], add(middle + 1, high), add(low, middle - 1))
        return mine

    add(0, len(depths) - 1)
    return steps


def paths(depths: Sequence[int]) -> dict[int, list[int]]:
    """By depth: the depths, itself the last, on which there must be a node so that the search finds one there."""
    steps, found = search_steps(depths), {}

    def walk(step: int, above: list[int]) -> None:
        if step < len(steps):
            depth, deeper, shallower = steps[step]
            found[depth] = [*above, depth]
            walk(deeper, found[depth])
            walk(shallower, above)

    walk(0, [])
    return found


def _leading(words: np.ndarray, depth: int) -> np.ndarray:
    """The first `depth` bytes of addresses of shape (n, 2), zeros behind."""
    kept = words.copy()
    if depth <= 8:
        kept[:, 1] = 0
        kept[:, 0] &= np.uint64(-1 << 64 - 8 * depth & (1 << 64) - 1)
    else:
        kept[:, 1] &= np.uint64(-1 << 128 - 8 * depth & (1 << 64) - 1)
    return kept


def _sortable(words: np.ndarray) -> np.ndarray:
    """Addresses of shape (n, 2) as byte strings, which sort as the addresses do."""
    return np.ascontiguousarray(words.astype(">u8")).view("S16").reshape(-1)


def _byte(words: np.ndarray, depth: int) -> np.ndarray:
    """The byte behind the first `depth` ones."""
    return (words[:, depth // 8] >> np.uint64(56 - 8 * (depth % 8)) & np.uint64(0xFF)).astype("i8")


def _build6(segments: _Segments, lines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    top = np.zeros(65536, "u4")
    for length, words, codes in segments:
        if length <= 16:
            _fill(top, (words[:, 0] >> np.uint64(48)).astype("i8"), 16 - length, codes)
    longer = [segment for segment in segments if segment[0] > 16]
    for _, words, _ in longer:
        top[(words[:, 0] >> np.uint64(48)).astype("i8")] |= abi.TOP_DEEPER
    depths = sorted({(length - 1) // 8 for length, _, _ in longer})
    path_to = paths(depths)
    made: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # by depth: sorted keys, their words, their references
    for depth in depths:
        on_path = [words for length, words, _ in longer if depth in path_to[(length - 1) // 8]]
        all_words = _leading(np.concatenate(on_path), depth)
        keys, first = np.unique(_sortable(all_words), return_index=True)
        words = all_words[first]
        # What is not theirs is as the nearest node above says.
        outside = np.zeros(len(keys), "u1")
        open_ = np.arange(len(keys))
        for above in reversed([of for of in depths if of < depth]):
            their_keys, _, their_refs = made[above]
            mine = words[open_]
            at = np.minimum(np.searchsorted(their_keys, _sortable(_leading(mine, above))), len(their_keys) - 1)
            met = their_keys[at] == _sortable(_leading(mine, above))
            outside[open_[met]] = _codes_at(their_refs[at[met]], _byte(mine[met], above), lines)
            their_refs[at[met]] |= np.uint64(abi.REF_DEEPER)  # and so up: each node tells the nearest one above it
            open_ = open_[~met]
        own = [(length, words, codes) for length, words, codes in longer if (length - 1) // 8 == depth]
        refs = outside.astype("u8") | np.uint64(_USED)
        refs |= refs_of_nothing(outside)
        own_keys, starts, members = _grouped(
            [(length, np.searchsorted(keys, _sortable(_leading(of, depth))), _byte(of, depth), codes) for length, of, codes in own]
        )
        refs[own_keys] = _references(outside[own_keys], starts, members, 8 * depth + 8, lines)
        made[depth] = (keys, words, refs)
    nodes = np.zeros(sum(len(keys) for keys, _, _ in made.values()), abi.NODE)
    begin = 0
    for depth, (_, words, refs) in made.items():
        part = nodes[begin : begin + len(words)]
        part["high"], part["low"] = words[:, 0], words[:, 1]
        part["ref"] = refs | np.uint64(depth << _KEY_SHIFT)
        begin += len(words)
    return top, nodes, depths


def refs_of_nothing(outside: np.ndarray) -> np.ndarray:
    """The ranges of references whose nodes have no prefix: any place, with the code that is outside."""
    codes = outside.astype("u8")
    return codes << np.uint64(2) | codes << np.uint64(20)


def _codes_at(refs: np.ndarray, places: np.ndarray, lines: list[np.ndarray]) -> np.ndarray:
    """What references say of places."""
    places = places.astype("u8")
    codes = refs & np.uint64(3)
    for shift in (2, 20):
        first, span = refs >> np.uint64(shift + 2) & np.uint64(0xFF), refs >> np.uint64(shift + 10) & np.uint64(0xFF)
        codes = np.where((places - first) & np.uint64(0xFF) <= span, refs >> np.uint64(shift) & np.uint64(3), codes)
    in_line = np.nonzero(refs & np.uint64(abi.REF_LINE))[0]
    if len(in_line):
        all_lines = np.concatenate(lines)
        words = all_lines[(refs[in_line] & np.uint64(_LINE_MASK)).astype("i8"), (places[in_line] >> np.uint64(5)).astype("i8")]
        codes[in_line] = words >> (np.uint64(2) * (places[in_line] & np.uint64(31))) & np.uint64(3)
    return codes.astype("u1")


# Hashing, as bpf/policy.h does it

_M64 = (1 << 64) - 1


def home4(key: int, seed: Sequence[int]) -> int:
    return (key * seed[0] & _M64) >> 32


def home6(high: int, low: int, depth: int, seed: Sequence[int]) -> int:
    mixed = (high ^ depth) * seed[0] & _M64
    home = ((mixed ^ mixed >> 32 ^ low) * seed[1] & _M64) >> 32
    return home ^ home >> 16


def _homes4(keys: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    return keys.astype("u8") * np.uint64(seed[0]) >> np.uint64(32)


def _homes6(nodes: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    mixed = (nodes["high"] ^ nodes["ref"] >> np.uint64(_KEY_SHIFT) & np.uint64(15)) * np.uint64(seed[0])
    home = (mixed ^ mixed >> np.uint64(32) ^ nodes["low"]) * np.uint64(seed[1]) >> np.uint64(32)
    return home ^ home >> np.uint64(16)


def _find_places(homes: np.ndarray, buckets: int, each: int) -> _Places | None:
    """A bucket and a place in it for everyone: in the home bucket, or where that is full in one of the next. None if that fails."""
    bucket, place = np.empty(len(homes), "i8"), np.empty(len(homes), "i8")
    taken = np.zeros(buckets, "i8")
    waiting = np.arange(len(homes))
    for displaced in range(abi.DISPLACED + 1):
        wanted = (homes[waiting] + np.uint64(displaced) & np.uint64(buckets - 1)).astype("i8")
        order = np.argsort(wanted, kind="stable")
        waiting, wanted = waiting[order], wanted[order]
        starts = np.nonzero(np.concatenate([[True], wanted[1:] != wanted[:-1]]))[0] if len(wanted) else np.zeros(0, "i8")
        number = np.diff(np.concatenate([starts, [len(wanted)]]))
        at = taken[wanted] + np.arange(len(wanted)) - np.repeat(starts, number)
        fits = at < each
        bucket[waiting[fits]], place[waiting[fits]] = wanted[fits], at[fits]
        taken[wanted[starts]] = np.minimum(taken[wanted[starts]] + number, each)
        waiting = waiting[~fits]
        if not len(waiting):
            return bucket, place
    return None


# One of the two places


@dataclass(slots=True)
class Copy:
    """One copy of the policy in the maps' memory: `head` is its abi.POLICY, the others are arrays, or its parts of them."""

    head: np.ndarray
    ipv4: np.ndarray
    ipv6: np.ndarray
    lines: np.ndarray
    """Shape (n, 8), u64."""
    buckets4: np.ndarray
    """Shape (n, 8), u64."""
    buckets6: np.ndarray
    """Shape (n, 16), u64: high, low and reference of each node in turn, and one word of padding."""
    seed: Sequence[int]
    _next_line: int = 1
    _free_lines: list[int] = field(default_factory=list)
    _paths: dict[int, list[int]] = field(default_factory=dict)

    @property
    def size(self) -> PolicySize:
        return PolicySize(len(self.lines), len(self.buckets4), len(self.buckets6))

    # Whole

    def write(self, built: Built) -> None:
        """Make it hold a policy. Raises DoesNotFit, and is then good for nothing before the next `write`."""
        if len(built.lines) > len(self.lines):
            raise DoesNotFit(f"the policy needs {len(built.lines)} lines, of which there are {len(self.lines)}")
        places4, places6 = built.places4(len(self.buckets4), self.seed), built.places6(len(self.buckets6), self.seed)
        if places4 is None or places6 is None:
            raise DoesNotFit("the policy's buckets are too few")
        self.lines[: len(built.lines)] = built.lines
        self._next_line, self._free_lines = len(built.lines), []
        self.buckets4[:] = 0
        self.buckets4[places4] = built.refs4
        self.buckets6[:] = 0
        bucket, place = places6
        for offset, name in enumerate(("high", "low", "ref")):
            self.buckets6[bucket, 3 * place + offset] = built.nodes6[name]
        self._set_search(built.depths)
        self.ipv4[:], self.ipv6[:] = built.ipv4, built.ipv6

    def _set_search(self, depths: list[int]) -> None:
        steps = search_steps(depths)
        self.head["root"] = 0 if steps else abi.SEARCH_STEPS
        for at, (depth, deeper, shallower) in enumerate(steps):
            self.head["steps"][at] = (depth, deeper, shallower, 0)
        self._paths = paths(depths)

    def take_from(self, other: Copy) -> None:
        """Become equal to the other copy, of the same size."""
        used = other._next_line
        self.lines[:used] = other.lines[:used]
        self.buckets4[:], self.buckets6[:] = other.buckets4, other.buckets6
        self.ipv4[:], self.ipv6[:] = other.ipv4, other.ipv6
        for name in ("root", "steps"):
            self.head[name] = other.head[name]
        self._next_line, self._free_lines, self._paths = used, list(other._free_lines), dict(other._paths)

    # Point by point

    def change(self, policy: Verdicts, prefixes: Sequence[Prefix]) -> None:
        """Follow the policy at these prefixes, which came, went, or changed their verdict. Raises NeedsWhole or DoesNotFit; the copy is
        then good for nothing before the next `write` or `take_from`."""
        new_depths = {(prefix.length - 1) // 8 for prefix in prefixes if prefix.family is Family.IPV6 and prefix.length > 16}
        if not new_depths <= self._paths.keys():
            raise NeedsWhole  # another search, for which nodes stand elsewhere
        for prefix in prefixes:
            if prefix.family is Family.IPV4:
                self._change4(policy, prefix)
            else:
                self._change6(policy, prefix)

    def _change4(self, policy: Verdicts, prefix: Prefix) -> None:
        number = int.from_bytes(prefix.address, "big")
        if prefix.length <= 16:
            codes = self._top_codes(policy, prefix)
            tops = slice(number >> 16, (number >> 16) + len(codes))
            self.ipv4[tops] = self.ipv4[tops] & np.uint32(0xFFFFFFFC) | codes
            return
        top = number >> 16
        index = int(self.ipv4[top]) >> 2
        old = unpack(self.lines[index]) if index else np.zeros(256, "u1")
        codes = np.zeros(256, "u1")
        for each, verdict in policy.inside(_node(Family.IPV4, number, 2), 17, 24):
            at = int.from_bytes(each.address, "big") >> 8 & 0xFF
            codes[at : at + (1 << 24 - each.length)] = _CODE[verdict]
        place = number >> 8 & 0xFF
        deeper = old == abi.CODE_DEEPER
        touched = slice(place, place + (1 << max(24 - prefix.length, 0)))
        deeper[touched] |= prefix.length > 24
        for at in (place + np.nonzero(deeper[touched])[0]).tolist():
            deeper[at] = self._change_reference4(policy, top << 8 | at, int(codes[at]))
        codes[deeper] = abi.CODE_DEEPER
        if codes.any():
            index = index or self._take_line()
            self.lines[index] = pack(codes[None])[0]
        elif index:
            self._free_lines.append(index)
            index = 0
        self.ipv4[top] = int(self.ipv4[top]) & 3 | index << 2

    def _change_reference4(self, policy: Verdicts, key: int, outside: int) -> bool:
        """Returns whether there is one now."""
        own = policy.inside(_node(Family.IPV4, key << 8, 3), 25, 32)
        bucket, place, old = self._find4(key)
        if old & abi.REF_LINE:
            self._free_lines.append(old & _LINE_MASK)
        if not own:
            if old:
                self.buckets4[bucket, place] = 0
            return False
        self.buckets4[bucket, place] = self._make_reference(own, 3, outside) | key << _KEY_SHIFT
        return True

    def _find4(self, key: int) -> tuple[int, int, int]:
        """Bucket, place and reference of a key; of the first free place, if it is not there."""
        mask = len(self.buckets4) - 1
        home, free = home4(key, self.seed), None
        for displaced in range(abi.DISPLACED + 1):
            bucket = home + displaced & mask
            for place, ref in enumerate(self.buckets4[bucket].tolist()):
                if ref >> abi.REF_USED_SHIFT == key << 1 | 1:
                    return bucket, place, ref
                if not ref and free is None:
                    free = bucket, place, 0
        if free is None:
            raise DoesNotFit("the policy's IPv4 buckets are full")
        return free

    def _make_reference(self, own: Sequence[tuple[Prefix, Verdict]], depth: int, outside: int) -> int:
        """Without a key. `own` are the prefixes of the node, by increasing length."""
        end = 8 * depth + 8
        ranges = [(prefix.address[depth], 1 << end - prefix.length, _CODE[verdict]) for prefix, verdict in own]
        if len(ranges) <= 2:
            return _USED | _reference(outside, ranges)
        codes = np.full(256, outside, "u1")
        for first, number, code in ranges:
            codes[first : first + number] = code
        index = self._take_line()
        self.lines[index] = pack(codes[None])[0]
        return _USED | abi.REF_LINE | index

    def _take_line(self) -> int:
        if self._free_lines:
            return self._free_lines.pop()
        if self._next_line >= len(self.lines):
            raise DoesNotFit(f"the policy's {len(self.lines)} lines are full")
        self._next_line += 1
        return self._next_line - 1

    @staticmethod
    def _top_codes(policy: Verdicts, prefix: Prefix) -> np.ndarray:
        """The codes of all /16 in a prefix of up to 16 bits."""
        codes = np.full(1 << 16 - prefix.length, _CODE[policy.covering(prefix.family, prefix.address, 0, prefix.length)], "u1")
        first = int.from_bytes(prefix.address[:2], "big")
        for each, verdict in policy.inside(prefix, prefix.length + 1, 16):
            at = int.from_bytes(each.address[:2], "big") - first
            codes[at : at + (1 << 16 - each.length)] = _CODE[verdict]
        return codes

    def _change6(self, policy: Verdicts, prefix: Prefix) -> None:
        number = int.from_bytes(prefix.address, "big")
        top = number >> 112
        if prefix.length <= 16:
            codes = self._top_codes(policy, prefix)
            tops = slice(top, top + len(codes))
            self.ipv6[tops] = self.ipv6[tops] & abi.TOP_DEEPER | codes
            return
        depth = (prefix.length - 1) // 8
        # Its own node, those on the way to it, and those above it that are to say whether there are deeper ones.
        nodes = {(number >> 128 - 8 * on << 128 - 8 * on, on) for on in self._paths if on <= depth}
        # Those below it, whose code for what is not theirs may be another one now.
        below = policy.inside(prefix, 8 * depth + 9, 128)
        if len(below) > _MOST_NODES:
            raise NeedsWhole
        for each, _ in below:
            of = int.from_bytes(each.address, "big")
            nodes |= {(of >> 128 - 8 * on << 128 - 8 * on, on) for on in self._paths[(each.length - 1) // 8] if on > depth}
        for key, on in sorted(nodes, key=lambda node: node[1]):
            self._change_node(policy, key, on)
        deeper = abi.TOP_DEEPER if policy.any_inside(_node(Family.IPV6, number, 2), 17, 128) else 0
        self.ipv6[top] = int(self.ipv6[top]) & 3 | deeper

    def _change_node(self, policy: Verdicts, key: int, depth: int) -> None:
        node = _node(Family.IPV6, key, depth)
        high, low = key >> 64, key & _M64
        bucket, place, old = self._find6(high, low, depth)
        if old & abi.REF_LINE:
            self._free_lines.append(old & _LINE_MASK)
        # A node is needed for its own prefixes, and on the way to deeper ones.
        deepest = max(end for end, way in self._paths.items() if depth in way)
        if not policy.any_inside(node, 8 * depth + 1, 8 * deepest + 8):
            if old:
                self._remove6(bucket, place)
            return
        outside = _CODE[policy.covering(Family.IPV6, node.address, 17, 8 * depth)]
        ref = self._make_reference(policy.inside(node, 8 * depth + 1, 8 * depth + 8), depth, outside) | depth << _KEY_SHIFT
        if policy.any_inside(node, 8 * depth + 9, 128):
            ref |= abi.REF_DEEPER
        self.buckets6[bucket, 3 * place : 3 * place + 3] = (high, low, ref)

    def _find6(self, high: int, low: int, depth: int) -> tuple[int, int, int]:
        """Bucket, place and reference of a node; of the first free place, if it is not there."""
        mask = len(self.buckets6) - 1
        home, free = home6(high, low, depth, self.seed), None
        for displaced in range(abi.DISPLACED + 1):
            bucket = home + displaced & mask
            words = self.buckets6[bucket].tolist()
            for place in range(abi.BUCKET6):
                ref = words[3 * place + 2]
                if ref >> abi.REF_USED_SHIFT & 31 == depth << 1 | 1 and words[3 * place] == high and words[3 * place + 1] == low:
                    return bucket, place, ref
                if ref in (0, _TOMBSTONE) and free is None:
                    free = bucket, place, 0
            if not words[3 * abi.BUCKET6 - 1]:
                break
        if free is None:
            raise DoesNotFit("the policy's IPv6 buckets are full")
        return free

    def _remove6(self, bucket: int, place: int) -> None:
        words = self.buckets6[bucket]
        if words[3 * abi.BUCKET6 - 1]:
            # Others may have gone past this bucket because it was full.
            words[3 * place : 3 * place + 3] = (0, 0, _TOMBSTONE)
            return
        last = max(at for at in range(abi.BUCKET6) if words[3 * at + 2])
        words[3 * place : 3 * place + 3] = words[3 * last : 3 * last + 3].copy()
        words[3 * last : 3 * last + 3] = 0


def _node(family: Family, number: int, depth: int) -> Prefix:
    """The first `depth` bytes of an address, as a prefix."""
    bits = family.bits
    return Prefix(family, (number >> bits - 8 * depth << bits - 8 * depth).to_bytes(bits // 8, "big"), 8 * depth)
