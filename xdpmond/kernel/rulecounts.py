"""What each rule was met by, in a map of the kernel that only the daemon reads and writes: so it outlives the daemon.

Element 0 is no rule. Its `bytes` are the digest of the policy that holds, 0 if that is not known, and the first 8 bytes of its address
are the time of the policy's last change in the running window; its `packets` are those that had found no talker when that window began;
and it is partial when the rules without an element may have been met. The ledger's `attributing` names the window whose counts are being
added: if it is set at a start, they were not added whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..model import Count, Prefix, RuleCount, RuleCounts
from . import abi
from .maps import FAMILY_FROM_ABI, FAMILY_TO_ABI, map_memory


class RuleCountTable:
    """For as many rules as it has elements but one; the first to be met get them."""

    def __init__(self, map_fd: int, cells: int, ledger: np.void):
        self._memory = map_memory(map_fd, cells * abi.RULE_COUNT.itemsize, write=True)
        self._cells = np.frombuffer(self._memory, abi.RULE_COUNT, cells)
        self._ledger = ledger
        self._head = self._cells[0]
        self.fresh = not self._head["used"]
        self._head["used"] = 1
        used = np.nonzero(self._cells["used"])[0][1:]
        self._place = {_prefix(self._cells[index]): int(index) for index in used}
        self._free = (np.nonzero(self._cells["used"] == 0)[0][::-1]).tolist()
        if ledger["attributing"]:
            self.mark_all()
            self.end()

    @property
    def digest(self) -> int:
        return int(self._head["bytes"])

    @digest.setter
    def digest(self, value: int) -> None:
        self._head["bytes"] = value

    @property
    def changed(self) -> float:
        return float(self._head["address"][:8].view("f8")[0])

    @changed.setter
    def changed(self, value: float) -> None:
        self._head["address"][:8].view("f8")[0] = value

    @property
    def lost(self) -> int:
        return int(self._head["packets"])

    @lost.setter
    def lost(self, value: int) -> None:
        self._head["packets"] = value

    def begin(self, window: int) -> None:
        self._ledger["attributing"] = window

    def end(self) -> None:
        self._ledger["attributing"] = 0

    def add(self, counts: Mapping[Prefix, Count]) -> None:
        unknown = bool(self._head["partial"])
        found = [(place, count) for prefix, count in counts.items() if (place := self._take(prefix, partial=unknown)) is not None]
        places = [place for place, _ in found]
        self._cells["packets"][places] += np.array([count.packets for _, count in found], "u8")
        self._cells["bytes"][places] += np.array([count.bytes for _, count in found], "u8")

    def mark(self, prefixes: Iterable[Prefix]) -> None:
        """These may have been met more often."""
        places = (self._take(prefix, partial=True) for prefix in prefixes)
        self._cells["partial"][[place for place in places if place is not None]] = 1

    def mark_all(self) -> None:
        self._cells["partial"] = 1

    def make(self, prefixes: Iterable[Prefix]) -> None:
        """These are new, so that nothing of before is missing in them: where it matters, each gets an element of its own at once."""
        if self._head["partial"]:
            for prefix in prefixes:
                self._take(prefix, partial=False)

    def _take(self, prefix: Prefix, *, partial: bool) -> int | None:
        """The place of a prefix, which it gets if it has none. When all are taken, the others are met uncounted."""
        index = self._place.get(prefix)
        if index is None:
            if not self._free:
                self._head["partial"] = 1
                return None
            index = self._place[prefix] = self._free.pop()
            cell = self._cells[index]
            cell["address"] = np.frombuffer(prefix.address.ljust(16, b"\0"), "u1")
            cell["family"], cell["length"] = FAMILY_TO_ABI[prefix.family], prefix.length
            cell["packets"], cell["bytes"], cell["partial"] = 0, 0, partial
            cell["used"] = 1
        return index

    def prefixes(self) -> list[Prefix]:
        return list(self._place)

    def free(self, prefixes: Iterable[Prefix]) -> None:
        """These have left the policy."""
        for prefix in prefixes:
            index = self._place.pop(prefix, None)
            if index is not None:
                self._cells["used"][index] = 0
                self._free.append(index)

    def counts(self) -> RuleCounts:
        cells = self._cells[list(self._place.values())]
        figures = zip(cells["packets"].tolist(), cells["bytes"].tolist(), (cells["partial"] != 0).tolist(), strict=True)
        counts = {prefix: RuleCount(*figure) for prefix, figure in zip(self._place, figures, strict=True)}
        return RuleCounts(counts, RuleCount(partial=bool(self._head["partial"])))


def _prefix(cell: np.void) -> Prefix:
    family = FAMILY_FROM_ABI[int(cell["family"])]
    return Prefix(family, cell["address"].tobytes()[: family.bits // 8], int(cell["length"]))
