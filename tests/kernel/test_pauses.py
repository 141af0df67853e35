"""A daemon that is late, stands still or crashes, under fire on all CPUs: what its windows hold, and what was evicted or untracked
meanwhile, are together what was sent, to the packet and the byte."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from xdpmond.kernel.maps import wait_for_packets_under_way
from xdpmond.model import Count, Verdict
from xdpmond.rows import count_of

from .harness import ROUNDS, Guns, Harness, by_key
from .packets import random_sources, tcp

SOURCES = 700
"""More than a CPU's slice of the table has entries for."""

PAUSES = ("none", "before it ends the window", "before it reads it", "before it enters it", "everywhere")
LONG = 4 * SOURCES
"""Packets of a pause: the time of several windows."""


@pytest.fixture
def quiet(datapath: Harness) -> Harness:
    datapath.default(Verdict.ALLOW)
    datapath.close_window()
    datapath.close_window()
    return datapath


def test_nothing_is_missing(quiet: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    frames = [tcp(source) + bytes(number % 97) for number, source in enumerate(random_sources(SOURCES, seed=9))]
    sources = random_sources(SOURCES, seed=9)
    before, tracked, totals = quiet.counters.tallies(), quiet.control.tracked, quiet.totals_by_outcome()
    found: Counter[str] = Counter()
    in_windows = Count()

    def enter(closed: int, rows: np.ndarray) -> None:
        nonlocal in_windows
        count = count_of(rows)
        quiet.control.window_read(closed, count.packets, count.bytes)
        in_windows += count
        for (source, _, _), (packets, _, _) in by_key(rows).items():
            found[source] += packets

    with shoot(quiet, frames, cpus) as guns:

        def stand_still(here: str) -> None:
            if pause not in (here, "everywhere"):
                return
            sourced = quiet.counters.tallies().sourced.packets
            while quiet.counters.tallies().sourced.packets < sourced + LONG:
                assert guns.running()

        for number, pause in enumerate(itertools.cycle(PAUSES)):
            stand_still("before it ends the window")
            closed = quiet.control.close_window()
            wait_for_packets_under_way()
            stand_still("before it reads it")
            rows = quiet.talkers.read_closed(closed)
            if pause in ("before it enters it", "everywhere"):
                stand_still("before it enters it")
                again = quiet.talkers.read_closed(closed)  # as the next process does
                assert by_key(again) == by_key(rows)
            enter(closed, rows)
            lost = quiet.counters.tallies()
            if number >= ROUNDS and lost.evicted != before.evicted and lost.untracked != before.untracked:
                break
            assert number < 100 * ROUNDS, "neither evicted nor untracked"
        shot = guns.stop()
    for _ in range(2):
        closed = quiet.control.close_window()
        wait_for_packets_under_way()
        enter(closed, quiet.talkers.read_closed(closed))

    sent = Count(int(shot.sent.sum()), sum(int(count) * len(frame) for count, frame in zip(shot.sent, frames, strict=True)))
    after = quiet.counters.tallies()
    lost = after.evicted - before.evicted + (after.untracked - before.untracked)
    assert in_windows + lost == sent
    assert after.sourced - before.sourced == sent
    assert quiet.control.tracked - tracked == in_windows
    passed = {outcome: count - totals[outcome] for outcome, count in quiet.totals_by_outcome().items() if count != totals[outcome]}
    assert list(passed.values()) == [sent]
    assert all(found[source] <= count for source, count in zip(sources, shot.sent.tolist(), strict=True)), "a packet was found twice"
    assert sum(found.values()) == in_windows.packets
