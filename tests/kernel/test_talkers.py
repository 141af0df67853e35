"""A talker table that is much too small: who goes, what is not tracked, and that the books balance all the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from xdpmond.kernel import abi
from xdpmond.kernel.maps import Tallies, wait_for_packets_under_way
from xdpmond.model import Books, Count, Verdict
from xdpmond.rows import count_of

from .harness import ROUNDS, Guns, Harness, by_key
from .packets import random_sources, tcp

TABLES = {"sets": 4}

CAPACITY = TABLES["sets"] * abi.WAYS
"""Entries of one CPU's slice."""


@pytest.fixture
def quiet(datapath: Harness) -> Harness:
    datapath.control.set_default(Verdict.ALLOW)
    datapath.close_window()
    return datapath


def books(datapath: Harness) -> Books:
    """With nothing under way: of all that this table has seen."""
    tallies = datapath.counters.tallies()
    tracked = datapath.control.tracked + count_of(datapath.running())
    return Books(tallies.sourced, tracked, tallies.evicted, tallies.untracked)


def test_the_oldest_goes(quiet: Harness) -> None:
    """Of a set's four, the one that was silent longest makes room, with its counts going to the evicted."""
    frames = {source: tcp(source) for source in random_sources(60, seed=3)}
    entries = quiet.talker_memory()
    sets: dict[int, list[str]] = {}
    for source, frame in frames.items():
        # Which set is this source's? Alone in its window it shows.
        quiet.close_window()
        quiet.send(frame)
        (at,) = np.nonzero(entries["window"] == quiet.control.window)[0]
        sets.setdefault(int(at) // abi.WAYS, []).append(source)
    crowded = max(sets.values(), key=len)
    quiet.close_window()
    quiet.close_window()
    make_older(entries, entries["family"] > 0)
    before = quiet.counters.tallies()
    for source in crowded[:4]:
        quiet.send(frames[source])
    assert quiet.counters.tallies().evictions == before.evictions, "there were silent ones to take the place of"
    oldest = crowded[2]
    make_older(entries, (entries["source"][:, :4] == np.frombuffer(frames[oldest][26:30], "u1")).all(axis=1))
    quiet.send(frames[crowded[4]])
    after = quiet.counters.tallies()
    assert (after.evictions - before.evictions, after.evicted - before.evicted) == (1, Count(1, 54))
    assert {source for source, _, _ in by_key(quiet.running())} == set(crowded[:5]) - {oldest}
    assert books(quiet).balanced


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
