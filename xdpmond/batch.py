"""Packet events by the hundred thousand: an array as it came from the packet path, and what is needed to read it.

`model.PacketEvent` is the same as a value. A batch goes whole to whoever wants events; each takes as many values from it as it shows, or
formats it as it is. The rule of an event is not known to the packet path: it is found here, when somebody asks, by the policy that held
when the batch was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from .model import Family, Outcome, PacketEvent, Prefix, Verdict, format_address

HIGHEST_VLAN = 4095
"""A number above it stands for: no tag seen."""


class Matches(Protocol):
    """For each source, the index of the entry that decides, -1: none; and the entries."""

    @property
    def which(self) -> np.ndarray: ...
    @property
    def prefixes(self) -> Sequence[Prefix]: ...
    @property
    def verdicts(self) -> Sequence[Verdict]: ...


Match = Callable[[np.ndarray, np.ndarray], Matches]
"""Families (numbers of `model.Family`) and sources (16 bytes each) to what a policy says of them."""

_DENIES = np.array([number in set(Outcome) and Outcome(number).verdict is Verdict.DENY for number in range(256)])
_LISTED = np.array([number in set(Outcome) and Outcome(number).listed for number in range(256)])
_MAY_BE_LISTED = _LISTED.copy()
_MAY_BE_LISTED[Outcome.ESSENTIAL_PASSED] = True

DEFAULT, REMOVED = 0, 1
"""The first two names that `EventBatch.rules` gives: no entry decided; one did that has left the policy, or decides otherwise now."""


class EventBatch:
    """`rows` has the fields of kernel/abi.EVENT. `families` has the number of a model.Family for each; `epoch` is the wall clock, in
    nanoseconds, at which the monotonic one was 0; `interfaces` are the names by slot."""

    __slots__ = ("_match", "_rules", "epoch", "families", "interfaces", "rows")

    def __init__(self, rows: np.ndarray, families: np.ndarray, epoch: int, interfaces: Sequence[str], match: Match):
        self.rows = rows
        self.families = families
        self.epoch = epoch
        self.interfaces = interfaces
        self._match: Match = match
        self._rules: tuple[np.ndarray, list[str]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> EventBatch:
        """A part, which holds the memory of the whole."""
        batch = EventBatch(self.rows[part], self.families[part], self.epoch, self.interfaces, self._match)
        if self._rules:
            which, names = self._rules
            batch._rules = which[part], names
        return batch

    def copy(self) -> EventBatch:
        """The same with memory of its own."""
        batch = self[:]
        batch.rows, batch.families = batch.rows.copy(), batch.families.copy()
        return batch

    def microseconds(self) -> np.ndarray:
        """When, since the epoch."""
        return (self.rows["timestamp"].astype("i8") + self.epoch) // 1000

    def judged_as(self, other: EventBatch) -> bool:
        """By the same policy?"""
        return self._match == other._match

    def rules(self) -> tuple[np.ndarray, list[str]]:
        """For each event the index of its rule, and the names of these: a prefix, "default", or "removed"."""
        if self._rules is None:
            self._rules = self._find_rules()
            self._match = _forgotten  # a policy may be large, and this one the last that holds it
        return self._rules

    def _find_rules(self) -> tuple[np.ndarray, list[str]]:
        outcomes = self.rows["outcome"]
        which = np.full(len(outcomes), DEFAULT, "i4")
        names = ["default", "removed"]
        asked = np.nonzero(_MAY_BE_LISTED[outcomes])[0]
        if not len(asked):
            return which, names
        matches = self._match(self.families[asked], self.rows["source"][asked])
        used, places = np.unique(matches.which, return_inverse=True)
        missing = int(used[0] < 0)  # what is not found sorts first
        indexes = used[missing:].tolist()
        names += [str(matches.prefixes[index]) for index in indexes]
        denies = np.array([False] * missing + [matches.verdicts[index] is Verdict.DENY for index in indexes])
        found = matches.which >= 0
        agrees = found & (denies[places] == _DENIES[outcomes[asked]])
        absent = np.where(found | _LISTED[outcomes[asked]], REMOVED, DEFAULT)
        which[asked] = np.where(agrees, places - missing + 2, absent)
        return which, names

    def values(self) -> list[PacketEvent]:
        """Each event by itself: for the few that somebody looks at."""
        which, names = self.rules()
        return [
            self._value(row, Family(int(family)), int(at), names[rule])
            for row, family, at, rule in zip(self.rows, self.families, self.microseconds(), which, strict=True)
        ]

    def _value(self, row: np.void, family: Family, at: int, rule: str) -> PacketEvent:
        has_ports, vlan = bool(row["has_ports"]), int(row["vlan"])
        return PacketEvent(
            timestamp=at / 1e6,
            interface=self.interfaces[row["slot"]],
            vlan=vlan if vlan <= HIGHEST_VLAN else None,
            family=family,
            src_ip=_address(family, row["source"]),
            dst_ip=_address(family, row["destination"]),
            src_port=int(row["source_port"]) if has_ports else None,
            dst_port=int(row["destination_port"]) if has_ports else None,
            protocol_num=int(row["protocol"]),
            packet_size=int(row["packet_size"]),
            outcome=Outcome(int(row["outcome"])),
            rule=rule,
            suppressed=int(row["suppressed"]),
            flow_hash=int(row["flow_hash"]),
        )


def _address(family: Family, address: np.ndarray) -> str:
    return "" if family is Family.OTHER else format_address(family, address.tobytes()[: family.bits // 8])


def _forgotten(families: np.ndarray, sources: np.ndarray) -> Matches:
    raise AssertionError("the rules of a batch are found once")
