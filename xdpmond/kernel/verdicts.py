"""The structure in which the packet path looks up a verdict: built as a whole from a policy, or changed at a few prefixes.

bpf/policy.h reads it, and bpf/abi.h gives its layout. All levels hold codes (abi.CODE_*) of neighbours, and a code says what is the
verdict if no deeper level says otherwise.

IPv4 has two levels. The top has the codes of prefixes of up to g bits, for blocks of so many. A /24 covered by a prefix of g + 1
to 24 bits, or has longer ones, has a reference: a prefix of g + 1 to 24 bits is written to each /24 in it. g is that of 16, 18, 20, 22, 24
by which top and references take fewest bytes, where a top of more than 256 KB counts eightfold, since it does not stay in the cache.
What a reference does not know, the top says; so a change of a prefix touches one of the two levels.

IPv6 has a top of all /16, and nodes for longer prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

    def most_inside(self, prefix: Prefix, shortest: int, longest: int) -> int:
        """How many these are, or more; soon told."""

    def any_inside(self, prefix: Prefix, shortest: int, longest: int) -> bool: ...

    def covering(self, family: Family, address: bytes, shortest: int, longest: int) -> Verdict | None:
        """The verdict of the longest one of these lengths that covers the address."""


class DoesNotFit(KernelError):
    """The policy needs more room than there is."""


class NeedsWhole(Exception):
    """A change that touches too much to be made point by point."""


_CODE = {Verdict.ALLOW: abi.CODE_ALLOW, Verdict.DENY: abi.CODE_DENY, None: abi.CODE_NONE}
_KEY_SHIFT = abi.REF_KEY_SHIFT
_LINE_MASK = 0xFFFFFFFF
_LINE = 0xFF << 32
"""The four codes of a reference that is a line."""
_TOMBSTONE = abi.REF_DEEPER
"""A node without depth: nobody looks for it, and those behind it are found."""
_MOST_BUCKETS = 1 << 25
_MOST_OTHERS = 500
_OTHERS_WORTH_A_BUILD = 100
"""Of other prefixes that one change may touch before all is built anew: so many, and this part of all. To look at one takes some 20 µs, and
to build it a quarter of one."""

TOP_BITS = (16, 18, 20, 22, 24)
_CACHED_TOP = 1 << 20
_REFERENCE_BYTES = 16  # a place in a bucket, and those that stay free
_REFERENCES_EACH = 4.5
"""In a bucket of 7, at most: then one of thirty is not in its first bucket."""
_SPARE_LINES = 256


# The codes of 256 neighbours


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes of shape (n, 256), u1, as lines of shape (n, 8), u64."""
    quarters = codes.reshape(len(codes), 64, 4)
    packed = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return np.ascontiguousarray(packed).view("<u8")


def unpack(lines: np.ndarray) -> np.ndarray:
    """Lines as codes, one after the other."""
    quarters = np.ascontiguousarray(lines).view("u1").reshape(-1)
    return np.stack([quarters >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)


def _fill(flat: np.ndarray, starts: np.ndarray, bits: int, codes: np.ndarray) -> None:
    """Set 2 ** bits neighbours from each start on."""
    if bits == 0:
        flat[starts] = codes
    elif len(starts):
        flat[starts[:, None] + np.arange(1 << bits)] = codes[:, None]


def _reference(outside: int, ranges: Sequence[tuple[int, int, int]]) -> int:
    """Of up to two ranges (first place, number of places, code), of which the later goes before the earlier."""
    one = ranges[0] if ranges else (0, 256, outside)
    other = ranges[1] if len(ranges) > 1 else one
    (first, number, code), (other_first, other_number, other_code) = one, other
    ref = first | (-number & 0xFF) << 8 | other_first << 16 | (-other_number & 0xFF) << 24
    return ref | other_code << 32 | other_code << 34 | code << 36 | outside << 38


def _is_line(ref: int) -> bool:
    return ref & _LINE == _LINE


# A policy as a whole

_Places = tuple[np.ndarray, np.ndarray]
_Segments = list[tuple[int, np.ndarray, np.ndarray]]


@dataclass(slots=True)
class Built:
    """All parts, before they have a place."""

    top_bits: int
    """g of IPv4."""
    ipv6: np.ndarray
    lines: np.ndarray
    """The first ones are the top of IPv4."""
    keys4: np.ndarray
    """The first 24 bits."""
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

        def buckets(number: int, each: float, least: int, places: Callable[[int, Sequence[int]], _Places | None]) -> int:
            wanted = max(least, 1 << int(max(number, 1) / each).bit_length())
            while places(wanted, seed) is None:
                wanted *= 2
                if wanted > _MOST_BUCKETS:
                    raise DoesNotFit(f"the policy finds no room in {wanted // 2} buckets")
            return wanted

        least = SMALLEST_POLICY
        lines = len(self.lines) + (len(self.lines) - top_lines(self.top_bits)) // 4 + _SPARE_LINES
        buckets4 = buckets(len(self.refs4), _REFERENCES_EACH, least.buckets4, self.places4)
        return PolicySize(lines, buckets4, buckets(len(self.nodes6), 2, least.buckets6, self.places6))

    def places4(self, buckets: int, seed: Sequence[int]) -> _Places | None:
        """Bucket and place in it of each reference; None if so few buckets do not do."""
        return self._remembered(("4", buckets, *seed[:2]), lambda: _find_places4(_hashes4(self.keys4, seed), buckets))

    def places6(self, buckets: int, seed: Sequence[int]) -> _Places | None:
        return self._remembered(("6", buckets, *seed[:2]), lambda: _find_places(_homes6(self.nodes6, seed), buckets, abi.BUCKET6))

    def _remembered(self, question: tuple[object, ...], find: Callable[[], _Places | None]) -> _Places | None:
        if question not in self._places:
            self._places[question] = find()
        return self._places[question]


def build(policy: Verdicts) -> Built:
    """Everything from the beginning: some 0.3 s for a million prefixes."""
    segments4, segments6 = list(policy.segments(Family.IPV4)), list(policy.segments(Family.IPV6))
    top_bits = choose_top_bits({length: len(addresses) for length, addresses, _ in segments4})
    lines = [_build_top4(segments4, top_bits)]
    keys4, refs4 = _build4([segment for segment in segments4 if segment[0] > top_bits], lines)
    ipv6, nodes6, depths = _build6(segments6, lines)
    prefixes = sum(len(addresses) for _, addresses, _ in segments4 + segments6)
    return Built(top_bits, ipv6, np.concatenate(lines), keys4, refs4, nodes6, depths, prefixes)


def _add_lines(lines: list[np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Returns the indexes of new lines."""
    first = sum(map(len, lines))
    for at in range(0, len(codes), 8192):
        lines.append(pack(codes[at : at + 8192]))
    return np.arange(first, first + len(codes), dtype="u8")


def top_lines(top_bits: int) -> int:
    return 1 << top_bits - 8


def choose_top_bits(numbers: Mapping[int, int]) -> int:
    """g, for so many prefixes of each length: see the top of this module."""

    def cost(bits: int) -> int:
        top = (1 << bits) // 4
        references = sum(number << 24 - length for length, number in numbers.items() if bits < length <= 24)
        return (top if 1 << bits <= _CACHED_TOP else 8 * top) + _REFERENCE_BYTES * references

    return min(TOP_BITS, key=cost)


def _build_top4(segments: _Segments, bits: int) -> np.ndarray:
    codes_of = np.zeros((top_lines(bits), 256), "u1")
    for length, addresses, codes in segments:
        if length <= bits:
            _fill(codes_of.reshape(-1), (addresses >> 32 - bits).astype("i8"), bits - length, codes)
    return pack(codes_of)


def _build4(segments: _Segments, lines: list[np.ndarray]) -> _Places:
    """Keys and references of the /24, for the prefixes that are not in the top."""
    covered, covered_codes = _covered([(24 - length, addresses >> 8, codes) for length, addresses, codes in segments if length <= 24])
    deepest = [(length, addresses >> 8, addresses & 0xFF, codes) for length, addresses, codes in segments if length > 24]
    keys, starts, order = _grouped(deepest)
    at, met = _positions(covered, keys)
    outside = np.zeros(len(keys), "u1")
    outside[met] = covered_codes[at[met]]
    refs = _references(outside, starts, order, 32, lines)
    # Of the /24 that are covered, those without longer prefixes.
    alone = np.ones(len(covered), bool)
    alone[at[met]] = False
    keys = np.concatenate([keys, covered[alone]])
    refs = np.concatenate([refs, refs_of_nothing(covered_codes[alone])])
    return keys, refs | keys.astype("u8") << np.uint64(_KEY_SHIFT)


def _covered(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> _Places:
    """Parts are (bits, first key, code), with 2 ** bits keys each; a later one goes before. Returns the distinct keys, sorted, and
    their codes."""
    if not parts:
        return np.zeros(0, "u4"), np.zeros(0, "u1")
    keys = np.concatenate([(first[:, None] + np.arange(1 << bits, dtype="u4")).reshape(-1) for bits, first, _ in parts])
    codes = np.concatenate([np.repeat(codes, 1 << bits) for bits, _, codes in parts])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    last = np.nonzero(np.concatenate([keys[1:] != keys[:-1], [True]]))[0]
    return keys[last], codes[order[last]]


def _positions(within: np.ndarray, keys: np.ndarray) -> _Places:
    """Where in a sorted array each key stands, and whether it does."""
    at = np.searchsorted(within, keys)
    met = at < len(within)
    met[met] = within[at[met]] == keys[met]
    return at, met


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
    masks = (-1 << level_end - of.lengths.astype("i8")).astype("u8") & np.uint64(0xFF)
    ranges, codes = of.places.astype("u8") | masks << np.uint64(8), of.codes.astype("u8")
    few = counts <= 2
    one, other = starts, starts + (counts == 2)
    refs = ranges[one] | ranges[other] << np.uint64(16)
    refs |= codes[other] << np.uint64(32) | codes[other] << np.uint64(34)
    refs |= codes[one] << np.uint64(36) | outside.astype("u8") << np.uint64(38)
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
        refs[many] = np.uint64(_LINE) | _add_lines(lines, codes_of)
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
        refs = refs_of_nothing(outside)
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
    """References without a prefix of their own: of any place the same code."""
    return outside.astype("u8") * np.uint64(0x55) << np.uint64(32)


def _codes_at(refs: np.ndarray, places: np.ndarray, lines: list[np.ndarray]) -> np.ndarray:
    """What references say of places."""
    places = places.astype("u8")
    which = np.zeros(len(refs), "u8")
    for shift in (0, 16):
        first, mask = refs >> np.uint64(shift) & np.uint64(0xFF), refs >> np.uint64(shift + 8) & np.uint64(0xFF)
        which += (places & mask != first) * np.uint64(2 if shift == 0 else 4)
    codes = refs >> np.uint64(32) >> which & np.uint64(3)
    in_line = np.nonzero(codes == abi.CODE_LINE)[0]
    if len(in_line):
        all_lines = np.concatenate(lines)
        words = all_lines[(refs[in_line] & np.uint64(_LINE_MASK)).astype("i8"), (places[in_line] >> np.uint64(5)).astype("i8")]
        codes[in_line] = words >> (np.uint64(2) * (places[in_line] & np.uint64(31))) & np.uint64(3)
    return codes.astype("u1")


# Hashing, as bpf/policy.h does it

_M64 = (1 << 64) - 1


def homes4(key: int, seed: Sequence[int], buckets: int) -> tuple[int, int]:
    """The two buckets that a reference may be in."""
    hashed = key * seed[0] & _M64
    return hashed >> 32 & buckets - 1, (hashed >> 32) + (hashed >> 57 | 1) & buckets - 1


def home6(high: int, low: int, depth: int, seed: Sequence[int]) -> int:
    mixed = (high ^ depth) * seed[0] & _M64
    home = ((mixed ^ mixed >> 32 ^ low) * seed[1] & _M64) >> 32
    return home ^ home >> 16


def _hashes4(keys: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    return keys.astype("u8") * np.uint64(seed[0])


def _homes6(nodes: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    mixed = (nodes["high"] ^ nodes["ref"] >> np.uint64(_KEY_SHIFT) & np.uint64(15)) * np.uint64(seed[0])
    home = (mixed ^ mixed >> np.uint64(32) ^ nodes["low"]) * np.uint64(seed[1]) >> np.uint64(32)
    return home ^ home >> np.uint64(16)


def _homes4(hashes: np.ndarray, buckets: int) -> _Places:
    """The two buckets that each reference may be in."""
    home, mask = hashes >> np.uint64(32), np.uint64(buckets - 1)
    return (home & mask).astype("i8"), (home + (hashes >> np.uint64(57) | np.uint64(1)) & mask).astype("i8")


def _find_places4(hashes: np.ndarray, buckets: int) -> _Places | None:
    """A bucket and a place in it for each reference. All begin in the first of their two; of a bucket that is too full as many as that
    leave whose other one has room, in another order each time if some do not find any. None if that fails."""
    home, other = _homes4(hashes, buckets)
    bucket = home.copy()
    number = np.bincount(bucket, minlength=buckets)
    crowded = np.nonzero(number[bucket] > abi.BUCKET4)[0]
    crowded = crowded[np.argsort(bucket[crowded], kind="stable")]
    for turn in range(2 * abi.BUCKET4):
        crowded = crowded[(bucket[crowded] == home[crowded]) & (number[home[crowded]] > abi.BUCKET4)]
        if not len(crowded):
            break
        rank, size = _ranks(home[crowded])
        leaving = crowded[(rank + turn) % size < number[home[crowded]] - abi.BUCKET4]
        leaving = leaving[np.argsort(other[leaving], kind="stable")]
        leaving = leaving[number[other[leaving]] + _ranks(other[leaving])[0] < abi.BUCKET4]
        np.subtract.at(number, home[leaving], 1)
        np.add.at(number, other[leaving], 1)
        bucket[leaving] = other[leaving]
    if number.max(initial=0) > abi.BUCKET4:
        return None
    # In two turns of 16 bits, which numpy sorts by radix: a third of the time.
    order = np.argsort(bucket.astype("u2"), kind="stable")
    order = order[np.argsort((bucket >> 16).astype("u2")[order], kind="stable")]
    place = np.empty(len(bucket), "i8")
    place[order] = _ranks(bucket[order])[0]
    return bucket, place


def _ranks(groups: np.ndarray) -> _Places:
    """Of a sorted array: the how manieth of its like each one is, and of how many."""
    if not len(groups):
        return np.zeros(0, "i8"), np.zeros(0, "i8")
    starts = np.nonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))[0]
    sizes = np.diff(np.concatenate([starts, [len(groups)]]))
    return np.arange(len(groups)) - np.repeat(starts, sizes), np.repeat(sizes, sizes)


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
    ipv6: np.ndarray
    lines: np.ndarray
    """Shape (n, 8), u64."""
    buckets4: np.ndarray
    """Shape (n, 8), u64: seven references, and how many are away."""
    buckets6: np.ndarray
    """Shape (n, 16), u64: high, low and reference of each node in turn, and one word of padding."""
    seed: Sequence[int]
    _next_line: int = 0
    _free_lines: list[int] = field(default_factory=list)
    _paths: dict[int, list[int]] = field(default_factory=dict)

    @property
    def size(self) -> PolicySize:
        return PolicySize(len(self.lines), len(self.buckets4), len(self.buckets6))

    # Whole

    def clear(self) -> None:
        """Make zeros a policy without prefixes."""
        self.head["root"], self.head["shift4"] = abi.SEARCH_STEPS, 32 - TOP_BITS[0]
        self._next_line = top_lines(TOP_BITS[0])

    def write(self, built: Built) -> None:
        """Make it hold a policy. Raises DoesNotFit, and is then good for nothing before the next `write`."""
        if len(built.lines) > len(self.lines):
            raise DoesNotFit(f"the policy needs {len(built.lines)} lines, of which there are {len(self.lines)}")
        places4, places6 = built.places4(len(self.buckets4), self.seed), built.places6(len(self.buckets6), self.seed)
        if places4 is None or places6 is None:
            raise DoesNotFit("the policy's buckets are too few")
        self.lines[: len(built.lines)] = built.lines
        self._next_line, self._free_lines = len(built.lines), []
        self._write4(built, places4)
        self.buckets6[:] = 0
        bucket, place = places6
        for offset, name in enumerate(("high", "low", "ref")):
            self.buckets6[bucket, 3 * place + offset] = built.nodes6[name]
        self._set_search(built.depths)
        self.head["shift4"] = 32 - built.top_bits
        self.head["deeper4"] = np.packbits(np.bincount(built.keys4 >> 16, minlength=256) > 0, bitorder="little").view("<u8")
        self.ipv6[:] = built.ipv6

    def _write4(self, built: Built, places: _Places) -> None:
        self.buckets4[:] = 0
        self.buckets4[places] = built.refs4
        home, _ = _homes4(_hashes4(built.keys4, self.seed), len(self.buckets4))
        np.add.at(self.buckets4, (home[home != places[0]], abi.BUCKET4), 1)

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
        self.ipv6[:] = other.ipv6
        for name in ("root", "steps", "shift4", "deeper4"):
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

    @staticmethod
    def _require_few(policy: Verdicts, prefix: Prefix, shortest: int, longest: int) -> None:
        """Raise NeedsWhole if there are so many such prefixes that to look at each takes longer than to build all."""
        everything = Prefix(prefix.family, bytes(len(prefix.address)), 0)
        if policy.most_inside(prefix, shortest, longest) > _MOST_OTHERS + policy.most_inside(everything, 0, 128) // _OTHERS_WORTH_A_BUILD:
            raise NeedsWhole

    def _change4(self, policy: Verdicts, prefix: Prefix) -> None:
        bits = 32 - int(self.head["shift4"])
        if prefix.length <= bits:
            self._require_few(policy, prefix, prefix.length + 1, bits)
            codes = self._top_codes(policy, prefix, bits)
            first = int.from_bytes(prefix.address, "big") >> 32 - bits
            lines = slice(first >> 8, (first + len(codes) - 1 >> 8) + 1)
            all_codes = unpack(self.lines[lines])
            all_codes[first & 0xFF : (first & 0xFF) + len(codes)] = codes
            self.lines[lines] = pack(all_codes.reshape(-1, 256))
            return
        # The /24 that it covers, or is in.
        whole = prefix if prefix.length <= 24 else _node(Family.IPV4, int.from_bytes(prefix.address, "big"), 3)
        self._require_few(policy, whole, whole.length + 1, 32)
        first = int.from_bytes(whole.address, "big") >> 8
        outside = [_CODE[policy.covering(Family.IPV4, whole.address, bits + 1, whole.length)]] * (1 << 24 - whole.length)
        for each, verdict in policy.inside(whole, whole.length + 1, 24):
            at, number = (int.from_bytes(each.address, "big") >> 8) - first, 1 << 24 - each.length
            outside[at : at + number] = [_CODE[verdict]] * number
        own: dict[int, list[tuple[Prefix, Verdict]]] = {}
        for each, verdict in policy.inside(whole, 25, 32):
            own.setdefault(int.from_bytes(each.address[:3], "big"), []).append((each, verdict))
        for key, code in enumerate(outside, first):
            self._change_reference4(key, code, own.get(key, []))

    def _change_reference4(self, key: int, outside: int, own: Sequence[tuple[Prefix, Verdict]]) -> None:
        found = self._find4(key)
        old = int(self.buckets4[found]) if found else 0
        if _is_line(old):
            self._free_lines.append(old & _LINE_MASK)
        if own or outside:
            found = found or self._make_room4(key)
            self.buckets4[found] = self._make_reference(own, 3, outside) | key << _KEY_SHIFT
            # Not taken away before all is built anew.
            self.head["deeper4"][key >> 22] |= np.uint64(1 << (key >> 16 & 63))
        elif found:
            home, _ = homes4(key, self.seed, len(self.buckets4))
            self.buckets4[found] = 0
            self.buckets4[home, abi.BUCKET4] -= np.uint64(found[0] != home)

    def _find4(self, key: int) -> tuple[int, int] | None:
        """Bucket and place of a key, if it is there."""
        for bucket in homes4(key, self.seed, len(self.buckets4)):
            for place, ref in enumerate(self.buckets4[bucket, : abi.BUCKET4].tolist()):
                if ref and ref >> _KEY_SHIFT == key:
                    return bucket, place
        return None

    def _make_room4(self, key: int) -> tuple[int, int]:
        """A place for a key that is not there yet, perhaps that of one which can go to its other bucket."""
        home, other = homes4(key, self.seed, len(self.buckets4))
        for bucket in (home, other):
            for place, ref in enumerate(self.buckets4[bucket, : abi.BUCKET4].tolist()):
                if not ref:
                    self.buckets4[home, abi.BUCKET4] += np.uint64(bucket != home)
                    return bucket, place
        for place, ref in enumerate(self.buckets4[home, : abi.BUCKET4].tolist()):
            its_home, its_other = homes4(ref >> _KEY_SHIFT, self.seed, len(self.buckets4))
            free = np.nonzero(self.buckets4[its_other, : abi.BUCKET4] == 0)[0]
            if its_home == home and len(free):
                self.buckets4[its_other, free[0]] = ref
                self.buckets4[home, abi.BUCKET4] += np.uint64(1)
                return home, place
        raise DoesNotFit("the policy's IPv4 buckets are full")

    def _make_reference(self, own: Sequence[tuple[Prefix, Verdict]], depth: int, outside: int) -> int:
        """Without a key. `own` are the prefixes of the node, by increasing length."""
        end = 8 * depth + 8
        ranges = [(prefix.address[depth], 1 << end - prefix.length, _CODE[verdict]) for prefix, verdict in own]
        if len(ranges) <= 2:
            return _reference(outside, ranges)
        codes = np.full(256, outside, "u1")
        for first, number, code in ranges:
            codes[first : first + number] = code
        index = self._take_line()
        self.lines[index] = pack(codes[None])[0]
        return _LINE | index

    def _take_line(self) -> int:
        if self._free_lines:
            return self._free_lines.pop()
        if self._next_line >= len(self.lines):
            raise DoesNotFit(f"the policy's {len(self.lines)} lines are full")
        self._next_line += 1
        return self._next_line - 1

    @staticmethod
    def _top_codes(policy: Verdicts, prefix: Prefix, bits: int) -> np.ndarray:
        """The codes of all blocks of `bits` bits in a prefix that is not longer."""
        codes = np.full(1 << bits - prefix.length, _CODE[policy.covering(prefix.family, prefix.address, 0, prefix.length)], "u1")
        shift = prefix.family.bits - bits
        first = int.from_bytes(prefix.address, "big") >> shift
        for each, verdict in policy.inside(prefix, prefix.length + 1, bits):
            at = (int.from_bytes(each.address, "big") >> shift) - first
            codes[at : at + (1 << bits - each.length)] = _CODE[verdict]
        return codes

    def _change6(self, policy: Verdicts, prefix: Prefix) -> None:
        number = int.from_bytes(prefix.address, "big")
        top = number >> 112
        if prefix.length <= 16:
            self._require_few(policy, prefix, prefix.length + 1, 16)
            codes = self._top_codes(policy, prefix, 16)
            tops = slice(top, top + len(codes))
            self.ipv6[tops] = self.ipv6[tops] & abi.TOP_DEEPER | codes
            return
        depth = (prefix.length - 1) // 8
        # Its own node, those on the way to it, and those above it that are to say whether there are deeper ones.
        nodes = {(number >> 128 - 8 * on << 128 - 8 * on, on) for on in self._paths if on <= depth}
        # Those below it, whose code for what is not theirs may be another one now.
        self._require_few(policy, prefix, 8 * depth + 9, 128)
        for each, _ in policy.inside(prefix, 8 * depth + 9, 128):
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
        if _is_line(old):
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
                if ref >> _KEY_SHIFT & 15 == depth and words[3 * place] == high and words[3 * place + 1] == low:
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
