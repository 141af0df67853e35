"""How many sources there were, told from a few kilobytes: HyperLogLog sketches.

The packet path hashes each source with a secret seed. A sketch is an array of registers: some bits of the hash choose one, the number of
leading zeros of the others, plus one, is its rank, and the register keeps the largest rank that it saw. The more different sources, the
larger the ranks. A source that comes again changes nothing, and of two sketches the larger of each pair of registers is that of both.

They are for windows whose talkers did not all find a place in the table. Where all did, counting them is exact.

The estimator is that of Otmar Ertl, "New cardinality estimation algorithms for HyperLogLog sketches" (2017): it holds for small numbers
and large ones alike, where the original needs a correction below 2.5 sources a register, and is biased near that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .model import Family

REGISTERS = 2048
"""Of a cell, one byte each."""
OVERALL_CELLS = 8
"""A family's cells for all its sources, whose registers are one sketch."""
PORT_PAIRS = 120
"""Pairs of cells, IPv4 and IPv6, for the sources on single ports."""
CELLS = 2 * OVERALL_CELLS + 2 * PORT_PAIRS

_RANK_BITS = 50
"""Of a hash: those that are left when 14 have chosen one of 16384 registers."""
_FAMILIES = (Family.IPV4, Family.IPV6)
_NEVER = ((Family.IPV4, 58), (Family.IPV6, 1))
"""ICMP is that of IPv4 and ICMPv6 that of IPv6. A type of the one and a type of the other may share a pair, each with a cell of its own."""


@dataclass(frozen=True, slots=True)
class Sketches:
    """Those of one window: its CELLS cells, and the number of the pair of cells by (protocol, port) of those ports that have one.
    The port of ICMP and ICMPv6 is the type + 1."""

    cells: np.ndarray
    ports: Mapping[tuple[int, int], int]

    ERROR: ClassVar[float] = 1.04 / math.sqrt(REGISTERS)
    """Relative standard error of `of_port`: two of three estimates are that close, 19 of 20 twice as close."""
    UNIQUE_ERROR: ClassVar[float] = 1.04 / math.sqrt(REGISTERS * OVERALL_CELLS)
    """The same of `unique`."""

    @classmethod
    def empty(cls) -> Sketches:
        """Of no packets."""
        return cls(np.zeros((CELLS, REGISTERS), "u1"), {})

    def unique(self, family: Family) -> int:
        """How many sources sent anything, about."""
        first = OVERALL_CELLS * _FAMILIES.index(family)
        return estimate(self.cells[first : first + OVERALL_CELLS])

    def of_port(self, family: Family, protocol: int, port: int) -> int | None:
        """How many sources sent to this port, about; None if the port has no sketch of its own."""
        pair = self.ports.get((protocol, port))
        if pair is not None and (family, protocol) in _NEVER:
            return 0
        return None if pair is None else estimate(self.cells[2 * OVERALL_CELLS + 2 * pair + _FAMILIES.index(family)])

    def __or__(self, other: Sketches) -> Sketches:
        """Of both windows together. A port has a sketch if it has the same one in both."""
        ports = {key: pair for key, pair in self.ports.items() if other.ports.get(key) == pair}
        return Sketches(np.maximum(self.cells, other.cells), ports)


def estimate(registers: np.ndarray) -> int:
    """How many different hashes made these registers, about."""
    number = registers.size
    most = _RANK_BITS + 1  # the largest rank: no bit is set
    counts = np.bincount(np.minimum(registers.ravel(), most), minlength=most + 1)
    total = number * _tau(1 - counts[most] / number)
    for rank in range(most - 1, 0, -1):
        total = 0.5 * (total + counts[rank])
    total += number * _sigma(counts[0] / number)
    return round(number * number / (2 * math.log(2) * max(total, 2.0**-_RANK_BITS)))


def _sigma(share: float) -> float:
    """x + x^2 + 2 x^4 + 4 x^8 + ...: what the empty registers weigh."""
    if share == 1:
        return math.inf
    total, power, before = share, 1.0, -1.0
    while total != before:
        share *= share
        before = total
        total += share * power
        power *= 2
    return total


def _tau(share: float) -> float:
    """What the full registers weigh."""
    if share in (0.0, 1.0):
        return 0.0
    total, power, before = 1 - share, 1.0, -1.0
    while total != before:
        share = math.sqrt(share)
        before = total
        power *= 0.5
        total -= (1 - share) ** 2 * power
    return total / 3
