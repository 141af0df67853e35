"""The reader of the talker table against every interleaving with the packet path: no luck is needed to meet the rare ones.

One entry is written in the order of bpf/xdpmond.bpf.c, store by store, and the reader looks at it in the order of kernel/talkers.py. All
interleavings of the two stand side by side as the entries of one made-up table, which the real reader then reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from xdpmond import flowrows, rows
from xdpmond.kernel import abi, talkers
from xdpmond.kernel.talkers import TalkerTable

from .harness import state

CLOSED = 10
RUNNING = CLOSED + 1
MOST = abi.STATE_PACKETS >> abi.STATE_PACKETS_SHIFT
COUNT = 5  # packets that the talker had in the closed window
FIELDS = ("state", "packets0", "packets1", "who")
STATE = 1
"""The word of an entry that has it."""
SIZE, IP_SIZE = 54, 40

Of = tuple[int, int, bool]
"""What a state says: the window, its packets that are not in the details, and whether the window before had any."""
Moment = tuple[Of, int, int, int]
"""Also: whose entry it is, the first or the second."""


def stores(first: Moment, *changes: tuple[str, object]) -> list[Moment]:
    """What an entry goes through."""
    moments = [first]
    for name, value in changes:
        moments.append(tuple(value if field == name else old for field, old in zip(FIELDS, moments[-1], strict=True)))  # type: ignore[arg-type]
    return moments


ROLL = (
    ("packets1", COUNT), ("state", (RUNNING, 0, True)), ("packets0", 0), ("state", (RUNNING, 1, True)), ("state", (RUNNING, 2, True)),
)  # fmt: skip
REPLACE = (
    ("state", (0, 0, False)), ("who", 1), ("packets0", 0), ("state", (RUNNING, 1, False)), ("state", (RUNNING, 2, False)),
)  # fmt: skip
CARRY = (("state", (RUNNING, 1, False)), ("packets0", MOST))
"""Of as many packets as a state holds, when one more comes."""
HELD = ((CLOSED, 2, False), COUNT - 2, 3, 0)

# What happens to an entry while it is read, and the packets of the closed window that a reader must find in it.
HISTORIES = {
    "silent since": (stores(HELD), COUNT),
    "talks again": (stores(HELD, *ROLL), COUNT),
    "talked again before, and goes on": (stores(((RUNNING, 1, True), 0, COUNT, 0), ("state", (RUNNING, 2, True))), COUNT),
    "new in the running window": (stores(((RUNNING, 1, False), 0, 6, 0), ("state", (RUNNING, 2, False))), 0),
    "older, and talks again": (
        stores(((CLOSED - 1, 7, True), 4, 8, 0), ("state", (RUNNING, 0, False)), ("packets0", 0), ("state", (RUNNING, 1, False))), 0,
    ),
    "older, and replaced": (stores(((CLOSED - 1, 7, True), 0, 8, 0), *REPLACE), 0),
    "much older, and replaced": (stores(((CLOSED - 5, 7, True), 0, 8, 0), *REPLACE), 0),
    "free, and taken": (stores(((0, 0, False), 0, 0, 0), *REPLACE[1:]), 0),
    "replaced in the running window": (stores(((RUNNING, 4, False), 0, 0, 0), *REPLACE), 0),
}  # fmt: skip


def interleavings(moments: int) -> Iterator[list[tuple[int, ...]]]:
    """Moments at which the fields are read: of a look at one of them, and of three copies, one after the other, within which any order
    will do."""

    def copies(earliest: int, number: int) -> Iterator[list[tuple[int, ...]]]:
        if not number:
            yield []
            return
        for read in itertools.product(range(earliest, moments), repeat=len(FIELDS) - 1):
            for rest in copies(max(read), number - 1):
                yield [(*read, read[0]), *rest]

    for look in range(moments):
        for read in copies(look, 3):
            yield [(look,) * len(FIELDS), *read]


class Scripted(TalkerTable):
    """A table whose every look shows the next of the prepared ones."""

    def __init__(self, kind: np.dtype, history: list[Moment], schedules: list[list[tuple[int, ...]]]):
        """Of each schedule an entry, and of each look at it the moments at which its fields are read."""
        self.flows = kind == abi.FLOW
        self._control = SimpleNamespace(window=RUNNING, seen_shift=29)  # type: ignore[assignment]
        self._slice = self.capacity = len(schedules)
        self._looks = [self._look(kind, history, moments) for moments in np.array(schedules).transpose(1, 2, 0)]
        self._next = iter(self._looks)

    def _look(self, kind: np.dtype, history: list[Moment], moments: np.ndarray) -> tuple[np.ndarray, ...]:
        entries, details, past = (np.zeros(self.capacity, of) for of in (kind, abi.DETAIL, abi.PAST))
        states = np.array([state(window, held, SIZE * held, carried=carried) for (window, held, carried), *_ in history], "u8")[moments[0]]
        held = np.array([held for (_, held, _), *_ in history])[moments[0]]
        packets0, packets1 = (np.array([moment[field] for moment in history], "u8")[moments[field]] for field in (1, 2))
        begins = entries["talker"] if self.flows else entries
        begins["state"] = states
        # So that each row says of which interleaving it is.
        begins["name"] = np.arange(self.capacity) + self.capacity * np.array([who for *_, who in history])[moments[3]]
        begins["port"], begins["family"] = 443, abi.FAMILY_IPV4
        for part, packets in ((details, packets0), (past, packets1)):
            # What else is counted, and moved in the same steps.
            part["packets"], part["bytes"] = packets, SIZE * packets
        for index, packets in enumerate((packets0 + held.astype("u8"), packets1)):  # what has no part in the state
            (details, past)[index]["syns"] = packets
            if self.flows:
                entries["ip_bytes"][:, index], entries["tcp_flags"][:, index] = IP_SIZE * packets, packets
        return tuple(part.view("u8").reshape(self.capacity, -1) for part in (entries, details, past))

    def _show(self) -> None:
        self._talkers, self._details, self._past = next(self._next)

    def _chunks(self) -> Iterator[slice]:
        yield slice(0, self.capacity)

    def _column(self, chunk: slice, word: int) -> np.ndarray:
        if word == STATE:
            self._show()
        return super()._column(chunk, word)


class ScriptedCopies(Scripted):
    """Whose copies show one look each."""

    def _copy(self, at: np.ndarray) -> np.ndarray:
        shown = next(self._next)
        self._next = itertools.chain([shown], self._next)  # of one copy: it takes the entries in its course
        self._talkers, self._details, self._past = shown
        return super()._copy(at)

    def _take(self, at: np.ndarray) -> np.ndarray:
        self._show()
        return super()._take(at)


@pytest.mark.parametrize("kind", [abi.TALKER, abi.FLOW], ids=["talkers", "flows"])
@pytest.mark.parametrize("name", HISTORIES)
def test_a_closed_window_is_read_exactly(name: str, kind: np.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    history, expected = HISTORIES[name]
    schedules = list(interleavings(len(history)))
    for module in (rows, flowrows):
        monkeypatch.setattr(module, "CHUNK", len(schedules))  # so that each copy is one of the whole
    table = ScriptedCopies(kind, history, schedules)
    read = table.read_closed_flows(CLOSED) if table.flows else table.read_closed(CLOSED)
    found = found_in(read, len(schedules))
    wrong = np.nonzero(found != expected)[0]
    assert not len(wrong), f"{len(wrong)} of {len(schedules)} interleavings, such as {schedules[wrong[0]]}: {found[wrong[0]]} packets"
    assert (read["bytes"] == SIZE * read["packets"]).all() and (read["syns"] == read["packets"]).all()
    if table.flows:
        assert (read["ip_bytes"] == IP_SIZE * read["packets"]).all() and (read["tcp_flags"] == read["packets"]).all()


def found_in(read: np.ndarray, entries: int, who: int = 0) -> np.ndarray:
    found = np.zeros(2 * entries, "i8")
    np.add.at(found, np.ascontiguousarray(read["source"][:, :4]).view("u4").ravel(), read["packets"])
    return found[who * entries : (who + 1) * entries]


TALKS = stores(((RUNNING, MOST - 1, False), 0, 0, 0), ("state", (RUNNING, MOST, False)), *CARRY, ("state", (RUNNING, 2, False)))
NOW = {
    "carries": TALKS,
    "carries again": stores(
        ((RUNNING, MOST - 1, False), MOST, 0, 0), ("state", (RUNNING, MOST, False)), ("state", (RUNNING, 1, False)), ("packets0", 2 * MOST),
        ("state", (RUNNING, MOST, False)), ("state", (RUNNING, 1, False)), ("packets0", 3 * MOST),
    ),
    "talks again": stores(HELD, *ROLL),
    "is replaced": stores(((RUNNING, 4, False), MOST, 0, 0), *REPLACE),
    "is replaced before it carries": stores(((RUNNING, 4, False), 0, 0, 0), *REPLACE),
    "is taken": stores(((0, 0, False), 9, 9, 0), *REPLACE[1:]),
}  # fmt: skip


def visible(moment: Moment) -> int:
    """Packets of the running window that an entry shows. What is on its way to the details is not among them; nor is anything in the middle
    of `roll`."""
    (window, held, _), packets0, *_ = moment
    return held + packets0 if window == RUNNING and held else 0


class Stepwise(Scripted):
    """Each step of whose reader is a look of its own."""

    def _take(self, at: np.ndarray) -> np.ndarray:
        self._show()
        return super()._take(at)

    def _take_details(self, at: np.ndarray) -> np.ndarray:
        self._show()
        return super()._take_details(at)

    def _take_packets(self, at: np.ndarray) -> np.ndarray:
        self._show()
        return super()._take_packets(at)


@pytest.mark.parametrize("name", NOW)
def test_nothing_is_found_twice_in_the_running_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in steps: the state; then, of those that matter, states, details, states again; details once more, and as long as these
    have changed details and states; and states at last. What is found is what was there at one moment."""
    history = NOW[name]
    copy = ("details", "who", "state")
    steps = ("state", "who", "state", *copy, *("details", *copy) * talkers._TRIES, "who", "state")
    schedules = []
    for moments in itertools.combinations_with_replacement(range(len(history)), len(steps)):
        # Whose entry it is and its state are two words of one look.
        who = {at + 1: moments[at] for at, step in enumerate(steps) if step == "who"}
        schedules.append([(moment, moment, moment, who.get(at, moment)) for at, moment in enumerate(moments) if steps[at] != "who"])
    for module in (rows, flowrows):
        monkeypatch.setattr(module, "CHUNK", len(schedules))
    read = Stepwise(abi.TALKER, history, schedules).read_running(RUNNING)
    for who in (0, 1):
        found = found_in(read, len(schedules), who)
        shown = [visible(moment) if moment[3] == who else 0 for moment in history]
        for number, schedule in enumerate(schedules):
            possible = set(shown[schedule[0][0] : schedule[-1][0] + 1])
            assert found[number] in possible, f"{[moments[0] for moments in schedule]}: {found[number]}, not one of {possible}"
