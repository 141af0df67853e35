"""This host's own addresses, as the packet path knows them: what `destination = "local"` counts.

They are in a hash of the kernel's own, which the packet path asks once for each packet. Addresses come and go one by one, so that what
stays is never missing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..errors import KernelError
from ..model import Family
from . import abi, libbpf
from .maps import FAMILY_TO_ABI

Address = tuple[Family, bytes]
"""4 or 16 bytes."""


class LocalAddresses:
    """The map `locals`. Blocking calls."""

    def __init__(self, map_fd: int):
        self._map = map_fd
        keys, _ = libbpf.lookup_batches(map_fd, abi.ADDRESS, np.dtype("u1"), abi.LOCALS)
        self._there = {key.tobytes() for key in keys}

    def set(self, addresses: Iterable[Address]) -> None:
        """These and no others. Raises KernelError if there are too many, and leaves it as it was then."""
        wanted = {_key(address) for address in addresses}
        if len(wanted) > abi.LOCALS:
            raise KernelError(
                f"this host has {len(wanted)} addresses, and at most {abi.LOCALS} are told apart", hint='set destination = "any"'
            )
        for key in self._there - wanted:
            libbpf.delete(self._map, np.frombuffer(key, "u1"))
            self._there.discard(key)
        for key in wanted - self._there:
            libbpf.update(self._map, np.frombuffer(key, "u1"), np.ones(1, "u1"))
            self._there.add(key)


def _key(address: Address) -> bytes:
    family, packed = address
    return packed.ljust(16, b"\0") + FAMILY_TO_ABI[family].to_bytes(4, "little")
