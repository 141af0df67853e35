"""A policy as plain as can be, to make the kernel's structure from: a dict, and every question answered by looking at all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from xdpmond.model import Family, Prefix, Verdict

_CODES = {Verdict.ALLOW: 1, Verdict.DENY: 2}


def _number(prefix: Prefix) -> int:
    return int.from_bytes(prefix.address, "big")


def covers(outer: Prefix, inner: Prefix) -> bool:
    shift = outer.family.bits - outer.length
    return outer.family is inner.family and outer.length <= inner.length and _number(outer) >> shift == _number(inner) >> shift


class PlainPolicy:
    """`kernel.verdicts.Verdicts`, of these prefixes."""

    def __init__(self, prefixes: Mapping[Prefix, Verdict]):
        self._prefixes = dict(prefixes)

    def segments(self, family: Family) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for length in range(family.bits + 1):
            found = sorted((_number(p), _CODES[v]) for p, v in self._prefixes.items() if p.family is family and p.length == length)
            if found:
                numbers = [number for number, _ in found]
                if family is Family.IPV4:
                    addresses = np.array(numbers, "u4")
                else:
                    addresses = np.array([(number >> 64, number & (1 << 64) - 1) for number in numbers], "u8")
                yield length, addresses, np.array([code for _, code in found], "u1")

    def inside(self, prefix: Prefix, shortest: int, longest: int) -> list[tuple[Prefix, Verdict]]:
        found = [(p, v) for p, v in self._prefixes.items() if shortest <= p.length <= longest and covers(prefix, p)]
        return sorted(found, key=lambda item: (item[0].length, item[0].address))

    def most_inside(self, prefix: Prefix, shortest: int, longest: int) -> int:
        return sum(shortest <= p.length <= longest and covers(prefix, p) for p in self._prefixes) if prefix.length else len(self._prefixes)

    def any_inside(self, prefix: Prefix, shortest: int, longest: int) -> bool:
        return bool(self.inside(prefix, shortest, longest))

    def covering(self, family: Family, address: bytes, shortest: int, longest: int) -> Verdict | None:
        single = Prefix(family, address, family.bits)
        found = [(p.length, v) for p, v in self._prefixes.items() if shortest <= p.length <= longest and covers(p, single)]
        return max(found)[1] if found else None
