"""The policy in the kernel: two longest-prefix tries of equal content, and a number that says which one packets look into.

A change is made to the one at rest, the number is switched, and when no packet is left in the other it gets the same change. So a packet
sees the old policy or the new one, whatever the size of the change, and the cost is that of the difference.

A prefix keeps its rule index, and with it its counters, for as long as it is in the policy.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ..errors import KernelError
from ..model import Family, Prefix, Verdict
from . import abi, libbpf
from .maps import FAMILY_FROM_ABI, FAMILY_TO_ABI, VERDICT_FROM_ABI, VERDICT_TO_ABI, Control, Counters


class RuleTries:
    """Not for several threads at once."""

    def __init__(self, maps: Mapping[str, int], control: Control, counters: Counters, grace: Callable[[], None]):
        self._tries = (maps["policy_0"], maps["policy_1"])
        self._control = control
        self._counters = counters
        self._grace = grace
        self._index: dict[Prefix, int] = {}
        self._prefix: dict[int, Prefix] = {}
        self._verdict: dict[Prefix, Verdict] = {}
        # A heap: the lowest first, since only those below the number of counters have one.
        self._free: list[int] = []
        self._next = abi.RULE_DEFAULT + 1
        self._equal = True  # do both tries hold the same?

    def index_of(self, prefix: Prefix) -> int | None:
        return self._index.get(prefix)

    def prefix_of(self, index: int) -> Prefix | None:
        """None for the default, or for a rule that is gone since."""
        return self._prefix.get(index)

    def __len__(self) -> int:
        return len(self._index)

    def adopt(self) -> None:
        """Take over tries that hold a policy already: what packets see stays, the other trie is made equal to it."""
        active = _read(self._tries[self._control.policy_copy])
        for prefix, (index, verdict) in active.items():
            self._remember(prefix, index, verdict)
        self._next = max(self._prefix, default=abi.RULE_DEFAULT) + 1
        self._free = sorted(set(range(abi.RULE_DEFAULT + 1, self._next)) - set(self._prefix))
        # The daemon may have died between taking a rule away and clearing its counters.
        self._counters.clear_rules([*self._free, *range(self._next, self._counters.rule_cells)])
        self._equalise()

    def _equalise(self) -> None:
        """Make the trie at rest equal to the one that packets look into."""
        resting = self._tries[1 - self._control.policy_copy]
        stale = _read(resting)
        self._write(resting, set_=self._index.keys(), delete=stale.keys() - self._index.keys())
        self._equal = True

    def current(self) -> dict[Prefix, Verdict]:
        return dict(self._verdict)

    def apply(self, set_: Mapping[Prefix, Verdict], delete: Iterable[Prefix], default: Verdict | None = None) -> None:
        """Change the policy as a whole, and with it the default's verdict, if one is given. Raises KernelError with the policy as it
        was. Takes two grace periods at most: call it in a thread."""
        if not self._equal:
            self._equalise()
        removed = [prefix for prefix in delete if prefix in self._index]
        before = {prefix: self._verdict.get(prefix) for prefix in set_}
        for prefix, verdict in set_.items():
            index = self._index.get(prefix)
            if index is None:
                index = heapq.heappop(self._free) if self._free else self._next
                self._next = max(self._next, index + 1)
            self._remember(prefix, index, verdict)
        resting = 1 - self._control.policy_copy
        self._equal = False
        try:
            self._write(self._tries[resting], set_=set_.keys(), delete=removed)
        except Exception:
            self._undo(resting, before, removed)
            raise
        default = default or self._control.default_of(1 - resting)
        self._control.set_default(default, resting)
        self._control.set_policy_copy(resting)
        # The change is in force. If the other copy cannot be changed now (no memory), it is made equal before the next change.
        with contextlib.suppress(KernelError):
            self._grace()
            self._control.set_default(default, 1 - resting)
            self._write(self._tries[1 - resting], set_=set_.keys(), delete=removed)
            self._equal = True
        self._forget(removed)

    def _remember(self, prefix: Prefix, index: int, verdict: Verdict) -> None:
        self._index[prefix] = index
        self._prefix[index] = prefix
        self._verdict[prefix] = verdict

    def _forget(self, removed: Iterable[Prefix]) -> None:
        freed = []
        for prefix in removed:
            index = self._index.pop(prefix)
            del self._prefix[index], self._verdict[prefix]
            freed.append(index)
        self._counters.clear_rules(freed)
        for index in freed:
            heapq.heappush(self._free, index)

    def _undo(self, trie: int, before: Mapping[Prefix, Verdict | None], removed: Iterable[Prefix]) -> None:
        new = [prefix for prefix, verdict in before.items() if verdict is None]
        for prefix, verdict in before.items():
            if verdict is not None:
                self._verdict[prefix] = verdict
        for prefix in new:
            libbpf.delete(self._tries[trie], _keys([prefix]))
        self._forget(new)
        kept = [prefix for prefix, verdict in before.items() if verdict is not None]
        self._write(self._tries[trie], set_=[*kept, *removed], delete=())
        self._equal = True

    def _write(self, trie: int, *, set_: Iterable[Prefix], delete: Iterable[Prefix]) -> None:
        prefixes = list(set_)
        values = np.empty(len(prefixes), abi.RULE)
        values["index"] = [self._index[prefix] for prefix in prefixes]
        values["verdict"] = [VERDICT_TO_ABI[self._verdict[prefix]] for prefix in prefixes]
        # First out, then in: a full trie has room again.
        for key in _keys(list(delete)):
            libbpf.delete(trie, np.array([key]))
        libbpf.update_batch(trie, _keys(prefixes), values)


def _keys(prefixes: list[Prefix]) -> np.ndarray:
    keys = np.zeros(len(prefixes), abi.PREFIX)
    keys["length"] = [32 + prefix.length for prefix in prefixes]
    keys["family"] = [FAMILY_TO_ABI[prefix.family] for prefix in prefixes]
    packed = b"".join(prefix.address.ljust(16, b"\0") for prefix in prefixes)
    keys["address"] = np.frombuffer(packed, "u1").reshape(-1, 16)
    return keys


def _read(trie: int) -> dict[Prefix, tuple[int, Verdict]]:
    keys, values = libbpf.lookup_batches(trie, abi.PREFIX, abi.RULE)
    found = {}
    for key, value in zip(keys, values, strict=True):
        family = FAMILY_FROM_ABI[int(key["family"])]
        address = key["address"].tobytes()[: (4 if family is Family.IPV4 else 16)]
        found[Prefix(family, address, int(key["length"]) - 32)] = (int(value["index"]), VERDICT_FROM_ABI[int(value["verdict"])])
    return found
