"""The reader of the talker table against every interleaving with the packet path: no luck is needed to meet the rare ones.

One entry is written in the order of bpf/xdpmond.bpf.c, store by store. The reader looks at it up to five times (at its window, then at its
counts, to know whether it matters; then it copies it, looks at its window again, and may copy it again), and within a copy each field may
be read at any moment and in any order. All interleavings of the two stand side by side as the entries of one made-up table, which the
real reader then reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from xdpmond import flowrows, rows
from xdpmond.kernel import abi
from xdpmond.kernel.talkers import TalkerTable

CLOSED = 10
RUNNING = CLOSED + 1
COUNT = 5  # packets that the talker had in the closed window
FIELDS = ("window", "packets0", "packets1")
State = tuple[int, int, int]


def stores(first: State, *changes: tuple[str, int]) -> list[State]:
    """The states that an entry goes through."""
    states = [first]
    for name, value in changes:
        states.append(tuple(value if field == name else old for field, old in zip(FIELDS, states[-1], strict=True)))  # type: ignore[arg-type]
    return states


ROLL = (("packets1", COUNT), ("window", RUNNING), ("packets0", 0), ("packets0", 1), ("packets0", 2))
REPLACE = (("packets1", 0), ("window", RUNNING), ("packets0", 1), ("packets0", 2))

# What happens to an entry while it is read, and the packets of the closed window that a reader must find in it.
HISTORIES = {
    "silent since": (stores((CLOSED, COUNT, 3)), COUNT),
    "talks again": (stores((CLOSED, COUNT, 3), *ROLL), COUNT),
    "talked again before, and goes on": (stores((RUNNING, 1, COUNT), ("packets0", 2), ("packets0", 3)), COUNT),
    "new in the running window": (stores((RUNNING, 1, 0), ("packets0", 2)), 0),
    "older, and talks again": (stores((CLOSED - 1, 7, 8), ("packets1", 0), *ROLL[1:]), 0),
    "older, and replaced": (stores((CLOSED - 1, 7, 8), *REPLACE), 0),
    "much older, and replaced": (stores((CLOSED - 5, 7, 8), *REPLACE), 0),
    "free, and taken": (stores((0, 0, 0), *REPLACE), 0),
    "replaced in the running window": (stores((RUNNING, 4, 0), *REPLACE), 0),
}


def interleavings(moments: int) -> Iterator[list[tuple[int, ...]]]:
    """Moments at which the fields are read: of two looks at one of them, and of three copies, one after the other."""

    def copies(earliest: int, number: int) -> Iterator[list[tuple[int, ...]]]:
        if not number:
            yield []
            return
        for read in itertools.product(range(earliest, moments), repeat=len(FIELDS)):
            for rest in copies(max(read), number - 1):
                yield [read, *rest]

    for looks in itertools.combinations_with_replacement(range(moments), 2):
        for read in copies(looks[-1], 3):
            yield [*((look,) * len(FIELDS) for look in looks), *read]


class Scripted(TalkerTable):
    """A table whose every look shows the next of the prepared ones; which talker it is does not change."""

    def __init__(self, looks: list[np.ndarray]):
        self.flows = looks[0].dtype == abi.FLOW
        self._slice = self.capacity = len(looks[0])
        self._looks = [look.view("u8").reshape(len(look), -1) for look in looks]
        self._copies = self._looks[2:]

    def _chunks(self) -> Iterator[slice]:
        yield slice(0, self.capacity)

    def _column(self, chunk: slice, word: int) -> np.ndarray:
        looked_at = {2: self._looks[0], 5: self._looks[1]}  # window, packets
        return looked_at.get(word, self._looks[0])[chunk, word].copy()

    def _copy(self, at: np.ndarray) -> np.ndarray:
        return self._copies.pop(0)[at]

    def _tails(self, at: np.ndarray) -> np.ndarray:
        return self._copies.pop(0)[at, 2]


@pytest.mark.parametrize("kind", [abi.TALKER, abi.FLOW], ids=["talkers", "flows"])
@pytest.mark.parametrize("name", HISTORIES)
def test_a_closed_window_is_read_exactly(name: str, kind: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    states, expected = HISTORIES[name]
    schedules = list(interleavings(len(states)))
    for module in (rows, flowrows):
        monkeypatch.setattr(module, "CHUNK", len(schedules))  # so that each copy is one of the whole
    looks = [np.zeros(len(schedules), kind) for _ in range(5)]
    for look, moments in zip(looks, np.array(schedules).transpose(1, 2, 0), strict=True):
        window, packets0, packets1 = (np.array([state[field] for state in states])[at] for field, at in enumerate(moments))
        talker = look["talker"] if kind == abi.FLOW else look
        talker["window"], talker["packets"][:, 0], talker["packets"][:, 1] = window, packets0, packets1
        talker["family"] = abi.FAMILY_IPV4
        # So that each row says of which interleaving it is.
        talker["source"][:, :4] = np.arange(len(schedules), dtype="u4").view("u1").reshape(-1, 4)
        talker["port"] = 443
        if kind == abi.FLOW:  # what else is counted there, and moved in the same steps
            look["ip_bytes"][:, 0], look["ip_bytes"][:, 1] = 40 * packets0, 40 * packets1
            look["tcp_flags"][:, 0], look["tcp_flags"][:, 1] = packets0, packets1
    table = Scripted(looks)
    read = table.read_closed_flows(CLOSED) if kind == abi.FLOW else table.read_closed(CLOSED)
    found = np.zeros(len(schedules), "u8")
    np.add.at(found, np.ascontiguousarray(read["source"][:, :4]).view("u4").ravel(), read["packets"])
    wrong = np.nonzero(found != expected)[0]
    assert not len(wrong), f"{len(wrong)} of {len(schedules)} interleavings, such as {schedules[wrong[0]]}: {found[wrong[0]]} packets"
    if kind == abi.FLOW:
        assert (read["ip_bytes"] == 40 * read["packets"]).all() and (read["tcp_flags"] == read["packets"]).all()
