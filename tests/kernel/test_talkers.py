"""A talker table that is much too small: who goes, what is not tracked, and that the books balance all the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from xdpmond.kernel import abi, loader
from xdpmond.kernel.maps import Tallies, wait_for_packets_under_way
from xdpmond.model import Count, Verdict
from xdpmond.rows import count_of

from .harness import ROUNDS, Books, Guns, Harness, by_key
from .packets import random_sources, tcp

TABLES = {"sets": 4}
BOTH_KINDS = True

CAPACITY = TABLES["sets"] * abi.WAYS
"""Entries of one CPU's slice."""


@pytest.fixture
def quiet(datapath: Harness) -> Harness:
    datapath.default(Verdict.ALLOW)
    datapath.close_window()
    return datapath


@pytest.fixture
def apart(datapath: Harness) -> Iterator[Harness]:
    """Maps of its own, whose talkers a test may write."""
    made = Harness(datapath.build, loader.load(datapath.build, code=datapath.loaded.code))
    made.default(Verdict.ALLOW)
    yield made
    made.close()


def books(datapath: Harness) -> Books:
    """With nothing under way: of all that this table has seen."""
    tallies = datapath.counters.tallies()
    tracked = datapath.control.tracked + count_of(datapath.running())
    return Books(tallies.sourced, tracked, tallies.evicted, tallies.untracked)


def place_of(datapath: Harness, source: str) -> int:
    """The one entry that a packet of the source makes in this window."""
    entries = datapath.talker_memory()
    before = entries.copy()
    datapath.send(tcp(source))
    (at,) = np.nonzero(entries != before)[0]
    return int(at)


def fill(datapath: Harness, which: np.ndarray) -> None:
    """With others, seen just now, each with a packet in this window; the rest is free. None of it is in the books."""
    entries = datapath.talker_memory()
    entries[:] = 0
    # The packet path's clock is a coarse one, and may be some milliseconds behind.
    lately = (time.clock_gettime_ns(time.CLOCK_MONOTONIC) >> abi.SEEN_SHIFT) - 1
    for at in np.nonzero(which)[0]:
        entries["source"][at] = np.frombuffer(f"somebody {at:7}".encode(), "u1")
        entries["family"][at], entries["window"][at] = abi.FAMILY_IPV6, datapath.control.window
        entries["packets"][at, 0], entries["bytes"][at, 0] = 1, 54 << abi.BYTES_SHIFT
        entries["last_seen"][at] = entries["first_seen"][at] = lately


def test_a_choice_of_two_sets_and_the_oldest_of_both_goes(apart: Harness) -> None:
    """A free entry of the first set, then of the second; then the one of eight that was silent longest, its counts to the evicted."""
    entries = apart.talker_memory()
    number = np.arange(len(entries))
    pairs = set()
    for source in random_sources(40, seed=3):
        fill(apart, number < 0)
        first = place_of(apart, source) // abi.WAYS
        fill(apart, number // abi.WAYS == first)
        before = apart.counters.tallies()
        second = place_of(apart, source) // abi.WAYS
        pairs.add((first, second))
        evicted_of_necessity = first == second
        assert apart.counters.tallies().evictions - before.evictions == evicted_of_necessity
        for oldest in (4 * first + 1, 4 * second + 2):
            fill(apart, number >= 0)
            make_older(entries, number == oldest)
            before = apart.counters.tallies()
            assert place_of(apart, source) == oldest
            after = apart.counters.tallies()
            assert (after.evictions - before.evictions, after.evicted - before.evicted) == (1, Count(1, 54))
            assert place_of(apart, source) == oldest, "and there it is found again"
            assert entries["packets"][oldest, 0] == 2
    assert len(pairs) > 8, "all but the secret decides"


def test_one_that_is_in_its_second_set_is_found_when_the_first_has_room(apart: Harness) -> None:
    entries = apart.talker_memory()
    number, tried = np.arange(len(entries)), 0
    for source in random_sources(20, seed=4):
        fill(apart, number < 0)
        first = place_of(apart, source) // abi.WAYS
        fill(apart, number // abi.WAYS == first)
        at = place_of(apart, source)
        if at // abi.WAYS != first:
            tried += 1
            entries[4 * first : 4 * first + 3] = 0
            assert place_of(apart, source) == at
            assert entries["packets"][at, 0] == 2
    assert tried > 5


def make_older(entries: np.ndarray, which: np.ndarray) -> None:
    """By some seconds: the table's clock has units of 17 ms."""
    entries["last_seen"][which] -= 200


def test_silent_talkers_make_room_without_loss(quiet: Harness) -> None:
    """What was read at a window's end is nobody's loss."""
    for source in random_sources(CAPACITY, seed=4):
        quiet.send(tcp(source))
    quiet.close_window()
    quiet.close_window()
    before = quiet.counters.tallies()
    rows = 0
    for source in random_sources(10 * CAPACITY, seed=5):
        quiet.send(tcp(source))
        rows += len(quiet.close_window())
    after = quiet.counters.tallies()
    assert (after.evicted, after.untracked, rows) == (before.evicted, before.untracked, 10 * CAPACITY)
    assert books(quiet).balanced


def test_unread_counts_are_kept_while_a_window_is_read(quiet: Harness) -> None:
    """While the reader is at a closed window, its talkers stay: who finds no room is untracked, not counted at another's cost."""
    for source in random_sources(20 * CAPACITY, seed=6):
        quiet.send(tcp(source))
    held = by_key(quiet.running())
    assert len(held) == CAPACITY, "the table is full"
    closed = quiet.control.close_window()
    wait_for_packets_under_way()
    before = quiet.counters.tallies()
    strangers = random_sources(5 * CAPACITY, seed=7)
    for source in strangers:
        quiet.send(tcp(source))
    known = next(iter(held))[0]
    quiet.send(tcp(known))
    after = quiet.counters.tallies()
    assert after.untracked - before.untracked == Count(len(strangers), 54 * len(strangers))
    assert after.evicted == before.evicted
    rows = quiet.talkers.read_closed(closed)
    assert by_key(rows) == held
    quiet.control.window_read(closed, count_of(rows).packets, count_of(rows).bytes)
    entries = quiet.talker_memory()
    make_older(entries, entries["window"] != quiet.control.window)
    quiet.send(tcp(strangers[0]))
    assert {source for source, _, _ in by_key(quiet.running())} == {known, strangers[0]}
    assert books(quiet).balanced


def test_the_books_balance_under_fire(quiet: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """Many more sources than room, on all CPUs, over many windows, with a reader that is sometimes late."""
    frames = [tcp(source, port) for source in random_sources(40, seed=8) for port in (22, 80, 443)]
    before = quiet.counters.tallies()
    with shoot(quiet, frames, cpus) as guns:
        closed = 0
        while closed < ROUNDS or not happened(quiet, before):
            number = quiet.control.close_window()
            wait_for_packets_under_way()
            if closed % 5 == 0:
                sourced = quiet.counters.tallies().sourced.packets
                while quiet.counters.tallies().sourced.packets < sourced + 200:
                    assert guns.running()
            count = count_of(quiet.talkers.read_closed(number))
            quiet.control.window_read(number, count.packets, count.bytes)
            closed += 1
            assert guns.running()
            assert closed < 100 * ROUNDS, "neither evicted nor untracked"
        shot = guns.stop()
    final = books(quiet)
    assert final.balanced, final
    assert final.total.packets - before.sourced.packets == int(shot.sent.sum())
    quiet.close_window()
    assert books(quiet) == final, "closing a window moves counts, and makes none"


def happened(datapath: Harness, before: Tallies) -> bool:
    now = datapath.counters.tallies()
    return now.evicted != before.evicted and now.untracked != before.untracked
