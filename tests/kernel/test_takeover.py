"""The packet path over a restart of the daemon: what is kept, what is made anew, and that the numbers stay with their names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator

import pytest

from xdpmond.config import Config, Events, Tables
from xdpmond.kernel import libbpf
from xdpmond.kernel.datapath import NOTHING_KEPT, Datapath, Kept
from xdpmond.model import Count, Outcome, Prefix, Verdict

from .harness import LOOPBACK
from .packets import tcp

SMALL = Config(tables=Tables(talkers=1024, prefixes=4096, rule_counters=1024), events=Events(ring_size=65536))
LISTED = Prefix.parse("198.51.100.0/24")
FRAME = tcp("198.51.100.1", 22)
STRANGER = tcp("203.0.113.1", 22)


class Store:
    """A descriptor store that only remembers what it was told."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def keep(self, name: str, fd: int) -> None:
        self.kept[name] = fd

    def forget(self, name: str) -> None:
        self.kept.pop(name, None)

    def next_start(self) -> Kept:
        """What a process started now would find: descriptors of its own of the same objects."""
        return Kept.of((name, os.dup(fd)) for name, fd in self.kept.items())


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def start(store: Store) -> Iterator[Callable[..., Datapath]]:
    made: list[Datapath] = []

    def open_(config: Config = SMALL, *, again: bool = False) -> Datapath:
        made.append(Datapath.open(config, store.next_start() if again else NOTHING_KEPT, store))
        made[-1].control.take_slot(LOOPBACK, enforce=True)
        return made[-1]

    yield open_
    for datapath in made:
        datapath.close()


def send(datapath: Datapath, frame: bytes, repeat: int = 1) -> int:
    return libbpf.test_run(datapath.loaded.programs["xdpmond"], frame, repeat=repeat, ifindex=LOOPBACK).action


def test_the_same_build_goes_on_with_the_same_program(start: Callable[..., Datapath]) -> None:
    before = start()
    before.apply_policy({LISTED: Verdict.DENY}, (), Verdict.LOG)
    send(before, FRAME, 5)
    after = start(again=True)
    assert libbpf.program_id(after.loaded.programs["xdpmond"]) == libbpf.program_id(before.loaded.programs["xdpmond"])
    assert after.rules.current() == {LISTED: Verdict.DENY}
    assert after.rule_counts() == {LISTED: Count(5, 5 * len(FRAME))}
    assert send(after, FRAME) == libbpf.XDP_DROP


def test_counters_are_not_given_to_other_rules_when_the_tries_are_new(start: Callable[..., Datapath]) -> None:
    before = start()
    before.apply_policy({LISTED: Verdict.DENY}, (), Verdict.LOG)
    send(before, FRAME, 777)
    after = start(dataclasses.replace(SMALL, tables=dataclasses.replace(SMALL.tables, prefixes=8192)), again=True)
    other = Prefix.parse("192.0.2.0/24")
    after.apply_policy({other: Verdict.DENY}, (), Verdict.LOG)
    assert after.rule_counts() == {other: Count()}
    # What does not hang on an index goes on.
    assert after.tallies().sourced == Count(777, 777 * len(FRAME))


def test_what_an_old_table_held_unread_is_entered_when_its_size_changes(start: Callable[..., Datapath]) -> None:
    before = start()
    send(before, FRAME, 10)
    before.close_window()
    send(before, FRAME, 7)
    after = start(dataclasses.replace(SMALL, tables=dataclasses.replace(SMALL.tables, talkers=2048)), again=True)
    after.adopt_links((), {}, {})
    assert after.control.tracked == Count(17, 17 * len(FRAME))
    assert len(after.read_running()) == 0


def test_a_window_that_was_not_read_before_a_crash_is_read_once(start: Callable[..., Datapath]) -> None:
    before = start()
    send(before, FRAME, 3)
    before.control.close_window()  # and the process dies
    send(before, FRAME, 2)
    after = start(again=True)
    assert [int(row["packets"]) for row in after.close_window()] == [3]
    assert after.control.tracked == Count(3, 3 * len(FRAME))
    assert [int(row["packets"]) for row in after.close_window()] == [2]
    assert after.control.tracked == Count(5, 5 * len(FRAME))


def test_the_default_is_switched_with_the_lists(start: Callable[..., Datapath]) -> None:
    datapath = start()
    datapath.apply_policy({LISTED: Verdict.ALLOW}, (), Verdict.DENY)
    assert (send(datapath, FRAME), send(datapath, STRANGER)) == (libbpf.XDP_PASS, libbpf.XDP_DROP)
    # Between the switch and the end of the change, a packet meets the new default with the new lists.
    actions: list[tuple[int, int]] = []
    grace = datapath.rules._grace

    def watched() -> None:
        actions.append((send(datapath, FRAME), send(datapath, STRANGER)))
        grace()

    datapath.rules._grace = watched
    datapath.apply_policy({}, [LISTED], Verdict.LOG)
    assert actions == [(libbpf.XDP_PASS, libbpf.XDP_PASS)]
    outcomes = {total.outcome for total in datapath.totals()}
    assert outcomes == {Outcome.ALLOWED, Outcome.DEFAULT_DENIED_DROPPED, Outcome.DEFAULT_LOGGED}
    assert datapath.control.default_of(0) is datapath.control.default_of(1) is Verdict.LOG


def test_without_events_the_program_has_no_ring(start: Callable[..., Datapath]) -> None:
    datapath = start(dataclasses.replace(SMALL, events=Events(enable=False)))
    assert datapath.ring is None
    assert "events" not in datapath.loaded.maps
    assert send(datapath, STRANGER) == libbpf.XDP_PASS
