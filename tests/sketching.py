"""Filling sketches as the packet path does, from hashes."""

from __future__ import annotations

import numpy as np


def observe(registers: np.ndarray, hashes: np.ndarray) -> None:
    """Enter sources by their hashes, 64 bits each: the lowest choose the register, the upper 50 give the rank."""
    _, bits = np.frexp((hashes >> np.uint64(14)).astype("f8"))  # which holds 50 bits exactly
    found = np.sort((hashes & np.uint64(registers.size - 1)) << np.uint64(6) | (51 - bits).astype("u8"))
    last = np.flatnonzero(np.append(np.diff(found >> np.uint64(6)) != 0, [True] * (len(found) > 0)))
    place, flat = (found[last] >> np.uint64(6)).astype(np.intp), registers.reshape(-1)
    flat[place] = np.maximum(flat[place], found[last] & np.uint64(63))
