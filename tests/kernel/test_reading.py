"""The reader of the talker table against every interleaving with the packet path: no luck is needed to meet the rare ones.

One entry is written in the order of bpf/xdpmond.bpf.c, store by store, and the reader looks at it in the order of kernel/talkers.py. All
interleavings of the two stand side by side as the entries of one made-up table, which the real reader then reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

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
FIELDS = ("state", "packets0", "packets1", "who", "bytes0")
READ = FIELDS[:-1]
"""What a look at an entry reads one by one; the bytes with the packets."""
STATE = 1
"""The word of an entry that has it."""
SIZE, IP_SIZE = 54, 40


class Of(NamedTuple):
    """What a state says."""

    window: int
    held: int
    """Packets that are not in the details."""
    carried: bool = False
    """Had the window before any?"""
    sized: int | None = None
    """How many packets' bytes are not in the details, if not of those."""


Moment = tuple[Of, int, int, int, int]
"""Also: the packets of the details, those of the past, whose entry it is, the first or the second, and of how many packets the details
have the bytes."""


def stores(first: tuple[Of, int, int, int] | Moment, *changes: tuple[str, object]) -> list[Moment]:
    """What an entry goes through. "details" are their packets and bytes in one; at first they agree unless said otherwise."""
    moments: list[Moment] = [(*first[:4], first[4] if len(first) == 5 else first[1])]
    for name, value in changes:
        stored = ("packets0", "bytes0") if name == "details" else (name,)
        moments.append(tuple(value if field in stored else old for field, old in zip(FIELDS, moments[-1], strict=True)))  # type: ignore[arg-type]
    return moments


ROLL = (
    ("packets1", COUNT), ("state", Of(RUNNING, 0, True)), ("details", 0), ("state", Of(RUNNING, 1, True)), ("state", Of(RUNNING, 2, True)),
)  # fmt: skip
REPLACE = (
    ("state", Of(0, 0)), ("who", 1), ("details", 0), ("state", Of(RUNNING, 1)), ("state", Of(RUNNING, 2)),
)  # fmt: skip
HELD = (Of(CLOSED, 2), COUNT - 2, 3, 0)

# What happens to an entry while it is read, and the packets of the closed window that a reader must find in it.
HISTORIES = {
    "silent since": (stores(HELD), COUNT),
    "talks again": (stores(HELD, *ROLL), COUNT),
    "talked again before, and goes on": (stores((Of(RUNNING, 1, True), 0, COUNT, 0), ("state", Of(RUNNING, 2, True))), COUNT),
    "new in the running window": (stores((Of(RUNNING, 1), 0, 6, 0), ("state", Of(RUNNING, 2))), 0),
    "older, and talks again": (
        stores((Of(CLOSED - 1, 7, True), 4, 8, 0), ("state", Of(RUNNING, 0)), ("details", 0), ("state", Of(RUNNING, 1))), 0,
    ),
    "older, and replaced": (stores((Of(CLOSED - 1, 7, True), 0, 8, 0), *REPLACE), 0),
    "much older, and replaced": (stores((Of(CLOSED - 5, 7, True), 0, 8, 0), *REPLACE), 0),
    "free, and taken": (stores((Of(0, 0), 0, 0, 0), *REPLACE[1:]), 0),
    "replaced in the running window": (stores((Of(RUNNING, 4), 0, 0, 0), *REPLACE), 0),
}  # fmt: skip


def interleavings(moments: int) -> Iterator[list[tuple[int, ...]]]:
    """Moments at which the fields are read: of a look at one of them, and of three copies, one after the other, within which any order
    will do."""

    def copies(earliest: int, number: int) -> Iterator[list[tuple[int, ...]]]:
        if not number:
            yield []
            return
        for read in itertools.product(range(earliest, moments), repeat=len(READ) - 1):
            for rest in copies(max(read), number - 1):
                yield [(*read, read[0]), *rest]

    for look in range(moments):
        for read in copies(look, 3):
            yield [(look,) * len(READ), *read]


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
        of = [each for each, *_ in history]
        sizes = [SIZE * (each.held if each.sized is None else each.sized) for each in of]
        states = np.array([state(each.window, each.held, size, carried=each.carried) for each, size in zip(of, sizes, strict=True)], "u8")
        held = np.array([each.held for each in of])[moments[0]]
        packets0, packets1, bytes0 = (
            np.array([moment[field] for moment in history], "u8")[moments[at]] for field, at in ((1, 1), (2, 2), (4, 1))
        )
        begins = entries["talker"] if self.flows else entries
        begins["state"] = states[moments[0]]
        # So that each row says of which interleaving it is.
        begins["name"] = np.arange(self.capacity) + self.capacity * np.array([who for *_, who, _ in history])[moments[3]]
        begins["port"], begins["family"] = 443, abi.FAMILY_IPV4
        for part, packets, sized in ((details, packets0, bytes0), (past, packets1, packets1)):
            part["packets"], part["bytes"] = packets, SIZE * sized
        # What else is counted, and moved in the same steps, without a part in the state.
        for index, packets in enumerate((packets0 + held.astype("u8"), packets1)):
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


def found_in(read: np.ndarray, entries: int, who: int = 0, *, what: str = "packets") -> np.ndarray:
    found = np.zeros(2 * entries, "i8")
    np.add.at(found, np.ascontiguousarray(read["source"][:, :4]).view("u4").ravel(), read[what])
    return found[who * entries : (who + 1) * entries]


def carry(stay: int, packets: int, total: int) -> tuple[tuple[str, object], ...]:
    """When one packet more comes than fits into the state, so that `total` have come: how many stay there, and are in the details
    then. These have all of the bytes."""
    return ("state", Of(RUNNING, stay + 1, False, 0)), ("packets0", packets), ("bytes0", total)


STAY = abi.STATE_STAY
FULL = Of(RUNNING, MOST, False, MOST - STAY - 1)
"""Of what was carried before."""
NOW = {
    "carries": stores((Of(RUNNING, MOST), 0, 0, 0), *carry(STAY, MOST - STAY, MOST + 1), ("state", Of(RUNNING, STAY + 2, False, 1))),
    "carries again": stores(
        (Of(RUNNING, MOST), 0, 0, 0), *carry(STAY, MOST - STAY, MOST + 1), ("state", FULL),
        *carry(STAY, 2 * (MOST - STAY), 2 * MOST - STAY + 1),
    ),
    "carries bytes alone": stores((Of(RUNNING, 1), 0, 0, 0), *carry(1, 0, 2), *carry(2, 0, 3)),
    "talks again": stores(HELD, *ROLL[:2], ("packets0", 0), ("bytes0", 0), *ROLL[3:]),
    "talks again, and had nothing but bytes": stores(
        (Of(CLOSED, 1, False, 0), 0, 0, 0, 1), *ROLL[:2], ("packets0", 0), ("bytes0", 0), *ROLL[3:]
    ),
    "is replaced": stores((Of(RUNNING, 4), MOST, 0, 0), *REPLACE),
    "is replaced before it carries": stores((Of(RUNNING, 4), 0, 0, 0), *REPLACE),
    "is taken": stores((Of(0, 0), 9, 9, 0), *REPLACE[1:]),
}  # fmt: skip


def visible(moment: Moment) -> tuple[int, int]:
    """Packets of the running window that an entry shows, and how many packets' bytes. What is on its way to the details is not among
    them; nor is anything in the middle of `roll`."""
    (window, held, _, sized), packets0, _, _, bytes0 = moment
    return (held + packets0, (held if sized is None else sized) + bytes0) if window == RUNNING and held else (0, 0)


def details_of(moment: Moment) -> tuple[int, int]:
    _, packets0, _, _, bytes0 = moment
    return packets0, bytes0


class Stepwise(Scripted):
    """Each step of whose reader is a look of its own."""

    def _take(self, at: np.ndarray) -> np.ndarray:
        self._show()
        return super()._take(at)

    def _take_details(self, at: np.ndarray) -> np.ndarray:
        self._show()
        return super()._take_details(at)


@pytest.mark.parametrize("name", NOW)
def test_nothing_is_found_twice_in_the_running_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in steps: the state; then, of those that matter, states, details, states again; details once more, and as long as these
    have changed details and states; and states at last. What is found is what was there at one moment."""
    history = NOW[name]
    monkeypatch.setattr(talkers, "_TRIES", 2)
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
        packets = found_in(read, len(schedules), who).tolist()
        sized = (found_in(read, len(schedules), who, what="bytes") / SIZE).tolist()
        shown = [visible(moment) if moment[3] == who else (0, 0) for moment in history]
        for schedule, *found in zip(schedules, packets, sized, strict=True):
            looks = [moments[0] for moments in schedule]
            possible = shown[looks[0] : looks[-1] + 1]
            assert found[0] in {packets for packets, _ in possible}, f"{looks}: {found}, of {possible}"
            assert found[1] <= max(sized for _, sized in possible), f"{looks}: {found}, of {possible}"
            # Details that had changed when they were looked at once more, and are at rest since, are right.
            last = looks[-1]
            stays = shown[looks[0]] != (0, 0) and history[last][3] == who
            if stays and looks[4] == last and details_of(history[last]) != details_of(history[looks[2]]):
                assert found == list(shown[last]), f"{looks}: {found}"
