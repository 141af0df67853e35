"""Events as the packet path writes them, without it; and a policy of a dict."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from xdpmond.batch import EventBatch
from xdpmond.kernel import abi
from xdpmond.model import Family, Outcome, Prefix, Verdict, parse_address

EPOCH = 1_700_000_000_000_000_000
"""Nanoseconds since 1970 at which the monotonic clock was 0."""
INTERFACES = [f"eth{slot}" for slot in range(abi.MAX_SLOTS)]
_PLAIN: dict[str, Any] = {
    "src": "203.0.113.9", "dst": "192.0.2.1", "packet_size": 60, "source_port": 40312, "destination_port": 22, "vlan": abi.VLAN_NONE,
    "protocol": 6, "outcome": Outcome.DEFAULT_LOGGED, "has_ports": 1,
}  # fmt: skip


class DictPolicy:
    """The longest prefix of a dict. `asked` counts the sources that were looked up."""

    def __init__(self, verdicts: Mapping[str, Verdict] | None = None):
        self._entries = {Prefix.parse(text): verdict for text, verdict in (verdicts or {}).items()}
        self.asked = 0

    def match(self, families: np.ndarray, sources: np.ndarray) -> Any:
        self.asked += len(families)
        entries = list(self._entries)
        which = np.full(len(families), -1, "i4")
        for row, (number, source) in enumerate(zip(families, sources, strict=True)):
            family = Family(int(number))
            covering = [entry for entry in entries if entry.covers(family, source.tobytes()[: family.bits // 8])]
            if covering:
                which[row] = entries.index(max(covering, key=lambda entry: entry.length))
        return SimpleNamespace(which=which, prefixes=entries, verdicts=list(self._entries.values()))


NO_POLICY = DictPolicy()


def batch(*events: Mapping[str, Any], policy: DictPolicy = NO_POLICY, interfaces: list[str] = INTERFACES) -> EventBatch:
    """A batch with an event for each mapping, of fields of abi.EVENT, and `src` and `dst` as text."""
    rows = np.zeros(len(events), abi.EVENT)
    families = np.zeros(len(events), "u1")
    for number, given in enumerate(events):
        fields = {"timestamp": number * 1000, **_PLAIN, **given}
        for name, text in (("destination", fields.pop("dst")), ("source", fields.pop("src"))):
            families[number], packed = parse_address(text)
            rows[number][name] = np.frombuffer(packed.ljust(16, b"\0"), "u1")
        for name, value in fields.items():
            rows[number][name] = value
    return EventBatch(rows, families, EPOCH, interfaces, policy.match)


def numbered(*numbers: int, policy: DictPolicy = NO_POLICY) -> EventBatch:
    """A batch of events that are told apart by `flow_hash`."""
    return batch(*({"flow_hash": number} for number in numbers), policy=policy)
