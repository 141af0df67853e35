"""Made-up policies and sources: large, of mixed length, and the same at every run.

An address is two words in host byte order, of which an IPv4 address fills the upper half of the first; so both families are one code.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from xdpmond.model import Family, Prefix
from xdpmond.prefixes import PrefixSet, column

SEED = 20240229


@dataclass(frozen=True, slots=True)
class Addresses:
    family: Family
    words: np.ndarray
    """Shape (n, 2), u8."""

    def __len__(self) -> int:
        return len(self.words)

    def packed(self) -> np.ndarray:
        """In network byte order: shape (n, 16), u1, IPv4 in the first 4 bytes."""
        return np.ascontiguousarray(self.words.astype(">u8")).view("u1").reshape(-1, 16)

    def texts(self) -> Iterator[str]:
        kind, size = (socket.AF_INET, 4) if self.family is Family.IPV4 else (socket.AF_INET6, 16)
        for packed in self.packed():
            yield socket.inet_ntop(kind, packed[:size].tobytes())


@dataclass(frozen=True, slots=True)
class Prefixes:
    addresses: Addresses
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def family(self) -> Family:
        return self.addresses.family

    def texts(self) -> list[str]:
        return [f"{address}/{length}" for address, length in zip(self.addresses.texts(), self.lengths.tolist(), strict=True)]

    def columns(self) -> PrefixSet:
        """As the policy holds them."""
        packed, size = self.addresses.packed(), self.family.bits // 8
        found = {}
        for length in np.unique(self.lengths).tolist():
            of_length = np.ascontiguousarray(packed[self.lengths == length][:, :size])
            found[self.family, length] = np.sort(column(self.family, of_length.tobytes()))
        return PrefixSet(found)

    def values(self) -> Iterator[Prefix]:
        size = self.family.bits // 8
        for packed, length in zip(self.addresses.packed(), self.lengths.tolist(), strict=True):
            yield Prefix(self.family, packed[:size].tobytes(), length)

    def covered(self, among: Addresses) -> np.ndarray:
        """Which of these addresses lie in a prefix."""
        found = np.zeros(len(among), bool)
        for length in np.unique(self.lengths):
            ours = self.addresses.words[self.lengths == length]
            theirs = among.words & _mask(length)
            if length <= 64:
                found |= np.isin(theirs[:, 0], ours[:, 0])
            else:
                listed = set(map(tuple, ours.tolist()))
                found |= [tuple(words) in listed for words in theirs.tolist()]
        return found


@lru_cache
def mixed_ipv4(count: int) -> Prefixes:
    """70 % /32, 20 % /24, the rest from /16 to /23, anywhere in unicast space."""
    return _mixed(Family.IPV4, count, [32, 24, *range(16, 24)], [0.7, 0.2, *[0.1 / 8] * 8])


@lru_cache
def mixed_ipv6(count: int) -> Prefixes:
    """Half /128, the others from /32 to /64, anywhere in 2000::/3."""
    return _mixed(Family.IPV6, count, [128, *range(32, 65)], [0.5, *[0.5 / 33] * 33])


def _mixed(family: Family, count: int, lengths: list[int], weights: list[float]) -> Prefixes:
    random = np.random.default_rng(SEED + family)
    more = count + count // 8
    drawn = random.choice(np.array(lengths, "u1"), more, p=weights)
    words = random_addresses(random, family, more).words
    for length in lengths:
        words[drawn == length] &= _mask(length)
    rows = np.column_stack([words, drawn.astype("u8")])
    _, first = np.unique(rows, axis=0, return_index=True)
    kept = random.permutation(first)[:count]
    assert len(kept) == count, f"only {len(kept)} different prefixes"
    return Prefixes(Addresses(family, words[kept]), drawn[kept])


def random_addresses(random: np.random.Generator, family: Family, count: int) -> Addresses:
    """Unicast: 1.0.0.0 to 223.255.255.255, or 2000::/3."""
    words = np.zeros((count, 2), "u8")
    if family is Family.IPV4:
        words[:, 0] = random.integers(1 << 24, 224 << 24, count, dtype="u8") << np.uint64(32)
    else:
        words[:, 0] = random.integers(0x2 << 60, 0x4 << 60, count, dtype="u8")
        words[:, 1] = random.integers(0, 1 << 64, count, dtype="u8")
    return Addresses(family, words)


def sources_within(prefixes: Prefixes, count: int) -> Addresses:
    """Different addresses, each in a prefix drawn from all alike, as long as the small ones have any that are left."""
    random = np.random.default_rng(SEED + 1)
    masks = np.array([_mask(length) for length in range(prefixes.family.bits + 1)], "u8")
    words = np.zeros((0, 2), "u8")
    while len(words) < count:
        chosen = random.integers(0, len(prefixes), count * 2)
        within = random_addresses(random, prefixes.family, len(chosen)).words & ~masks[prefixes.lengths[chosen]]
        words = np.unique(np.concatenate([words, within | prefixes.addresses.words[chosen]]), axis=0)
    if prefixes.family is Family.IPV4:
        words &= _mask(32)
    return _different(random, prefixes.family, words, count)


def sources_outside(prefixes: Prefixes, count: int) -> Addresses:
    """Different addresses that no prefix covers."""
    random = np.random.default_rng(SEED + 2)
    drawn = random_addresses(random, prefixes.family, count * 8)
    return _different(random, prefixes.family, drawn.words[~prefixes.covered(drawn)], count)


def _different(random: np.random.Generator, family: Family, words: np.ndarray, count: int) -> Addresses:
    kept = random.permutation(np.unique(words, axis=0))[:count]
    assert len(kept) == count, f"only {len(kept)} different sources"
    return Addresses(family, kept)


def _mask(length: int) -> np.ndarray:
    ones = (1 << 128) - (1 << (128 - int(length)))
    return np.array([ones >> 64, ones & (1 << 64) - 1], "u8")
