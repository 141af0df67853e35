"""A talker table that is much too small: who goes, what is not tracked, and that the books balance all the same."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from ipaddress import IPv6Address

import numpy as np
import pytest

from xdpmond.errors import KernelError
from xdpmond.kernel import abi, libbpf, loader
from xdpmond.kernel.maps import Tallies, monotonic_ns, wait_for_packets_under_way
from xdpmond.kernel.talkers import TalkerTable
from xdpmond.model import Count, Verdict
from xdpmond.rows import count_of

from .harness import ROUNDS, Books, Guns, Harness, by_key, ids_in, packets_in, state
from .packets import random_sources, tcp

TABLES = {"sets": 4}
BOTH_KINDS = True

LARGEST = 66_000 if libbpf.has_frags() else 3_400
"""Bytes of a frame: more than the state of an entry can count."""
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


def place_of(datapath: Harness, source: str, size: int = 54) -> int:
    """The one entry that a packet of the source makes in this window."""
    entries = datapath.talker_memory()
    before = entries.copy()
    datapath.send(tcp(source).ljust(size, b"\0"))
    (at,) = np.nonzero(entries != before)[0]
    return int(at)


def fill(datapath: Harness, which: np.ndarray) -> None:
    """With others, seen just now, each with a packet in this window; the rest is free. None of it is in the books."""
    entries = datapath.talker_memory()
    entries[:] = 0
    shift = datapath.control.seen_shift
    # Not when a unit of the table's clock ends: the packet path's clock is a coarse one, and may be some milliseconds behind.
    while (monotonic_ns() >> shift) != (lately := (monotonic_ns() - 20_000_000) >> shift):
        pass
    for at in np.nonzero(which)[0]:
        entries["name"][at], entries["family"][at] = at, abi.FAMILY_IPV6
        entries["state"][at] = state(datapath.control.window, 1, 54, seen=lately)


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
            assert packets_in(entries["state"])[oldest] == 2
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
            assert packets_in(entries["state"])[at] == 2
    assert tried > 5


def test_of_those_that_were_seen_last_at_one_time(apart: Harness) -> None:
    """The one with the fewest packets goes, and one of the window before goes sooner than any of the running one."""
    entries, number = apart.talker_memory(), np.arange(CAPACITY)
    (source,) = random_sources(1, seed=11)
    fill(apart, number < 0)
    home = place_of(apart, source) // abi.WAYS
    rest = np.uint64(abi.STATE_PACKETS - (1 << abi.STATE_PACKETS_SHIFT))
    for fewest in (home * abi.WAYS + 2, home * abi.WAYS + 1):
        fill(apart, number < CAPACITY)
        entries["state"][number] |= rest
        entries["state"][fewest] &= ~rest
        assert place_of(apart, source) == fewest
    fill(apart, number < CAPACITY)
    older = home * abi.WAYS + 3
    entries["state"][older] |= rest
    make_older(entries, np.arange(len(entries)) == older, units=1)
    assert place_of(apart, source) == older, "but one that was seen sooner before any"
    before = apart.counters.tallies()
    fill(apart, number < CAPACITY)
    silent = home * abi.WAYS + 3
    entries["state"][silent] = state(apart.control.before, 31, 54, seen=monotonic_ns() >> apart.control.seen_shift)
    assert place_of(apart, source) == silent
    read_before = dataclasses.replace(before, sourced=before.sourced + Count(1, 54))
    assert apart.counters.tallies() == read_before, "nothing is lost with it"


@pytest.mark.parametrize("size", [54, 1514, LARGEST])
def test_who_sends_much_stays(apart: Harness, size: int) -> None:
    """However little of it is outside the details: of sources that have just come, with a packet each or some, one makes room."""
    entries, much = apart.talker_memory(), tcp("198.51.100.1").ljust(size, b"\0")
    fill(apart, np.arange(len(entries)) < 0)
    at = place_of(apart, "198.51.100.1", size)
    for _ in range(abi.STATE_STAY):
        apart.send(much)
    for newcomer in random_sources(80, seed=13):
        apart.send(much)
        states, name, held = entries["state"], entries["name"][at], entries["state"][at]
        fill(apart, np.arange(len(entries)) != at)
        states[:] = states + np.uint64(abi.STATE_STAY - 1 << abi.STATE_PACKETS_SHIFT)
        seen = np.uint64(abi.STATE_SEEN)
        entries[at] = name, 443, 6, abi.FAMILY_IPV4, held & ~seen | states[at - 1] & seen
        assert place_of(apart, newcomer) != at


@pytest.mark.parametrize("packets", [1, 2, 31, 32, 150])
@pytest.mark.parametrize("size", [54, 1514, LARGEST])
def test_what_is_evicted_is_counted(apart: Harness, packets: int, size: int) -> None:
    """Also what was added to the details."""
    entries, source = apart.talker_memory(), "198.51.100.1"
    fill(apart, np.arange(len(entries)) < 0)
    at = place_of(apart, source, size)
    for _ in range(packets - 1):
        apart.send(tcp(source).ljust(size, b"\0"))
    make_older(entries, np.arange(len(entries)) == at)
    before, name = apart.counters.tallies(), entries["name"][at]
    for other in random_sources(2000, seed=12):
        apart.send(tcp(other))
        if entries["name"][at] != name:
            break
    after = apart.counters.tallies()
    others = after.evictions - before.evictions - 1
    assert after.evicted - before.evicted == Count(packets + others, packets * size + others * 54)


def test_numbers_of_windows_come_again(apart: Harness) -> None:
    """After 2^24 windows, but never one that an entry is left of: so nobody's counts of long ago are taken for new ones."""
    control, entries = apart.control, apart.talker_memory()
    fill(apart, np.arange(len(entries)) < 0)
    silent = dict(zip(random_sources(5, seed=14), (1, 2, 5, 6, 9), strict=True))
    places = [place_of(apart, source) for source in silent]
    for at, number in zip(places, silent.values(), strict=True):
        entries["state"][at] = state(abi.WINDOW_IDS + number, 5, 500)
    control.block["before"] = control.block["read_window"] = abi.WINDOW_IDS - 5
    control._set_moment(abi.WINDOW_IDS - 4, 2)
    for source in [*random_sources(10, seed=13), *silent]:
        apart.send(tcp(source))
        assert by_key(apart.running()) == {(source, 6, 443): (1, 54, 0)}
        number, used = control.window, {0, *ids_in(entries["state"]).tolist()}
        assert by_key(apart.close_window()) == {(source, 6, 443): (1, 54, 0)}
        assert control.before == number and not control.reading
        if control.window < abi.WINDOW_IDS:
            assert control.window == number + 1
        else:  # odd and even take turns, as sketches need
            assert control.window == next(n for n in itertools.count(number + 1, 2) if n % abi.WINDOW_IDS not in used)
    assert control.window > abi.WINDOW_IDS + 11, "some were passed over"


class Left(TalkerTable):
    """A table in which entries are left of windows with these ids."""

    def __init__(self, ids: np.ndarray):
        self._states = ids << np.uint64(abi.STATE_MOMENT_SHIFT + abi.POLICY_BITS)

    def _chunks(self) -> Iterator[slice]:
        yield slice(0, len(self._states))

    def _column(self, chunk: slice, word: int) -> np.ndarray:
        return self._states


def test_when_the_numbers_of_windows_are_used_up() -> None:
    """By many more talkers than a table has as shipped. No number is taken that is not free: the window goes on."""
    ids = np.arange(abi.WINDOW_IDS, dtype="u8")
    free = Left(np.delete(ids, 100))
    assert free.following(abi.WINDOW_IDS + 5) == abi.WINDOW_IDS + 100
    assert free.following(3 * abi.WINDOW_IDS + 101) == 4 * abi.WINDOW_IDS + 100
    for table, running in ((free, abi.WINDOW_IDS + 6), (Left(ids), abi.WINDOW_IDS + 5)):
        with pytest.raises(KernelError, match="used up") as caught:
            table.following(running)
        assert "tables.talkers" in str(caught.value.hint)


def test_sources_of_one_name_are_told_apart(quiet: Harness) -> None:
    """Of IPv6 the entry has the exclusive or of four words, which whoever chooses his addresses can choose."""
    words = [0x20010DB8, 0x1234, 0x5678, 0x9ABC]
    orders = itertools.permutations(words)
    sources = [str(IPv6Address(int.from_bytes(b"".join(word.to_bytes(4, "big") for word in order), "big"))) for order in orders]
    sent = {source: number for number, source in enumerate(sources[: CAPACITY // 2], 1)}
    assert len(sent) > TABLES["sets"], "some are in one set"
    for _ in range(2):
        quiet.close_window()  # after which all others make room
    for source, number in sent.items():
        for _ in range(number):
            quiet.send(tcp(source))
    assert {source: packets for (source, _, _), (packets, _, _) in by_key(quiet.running()).items()} == sent
    assert books(quiet).balanced


def test_sources_of_one_name_in_one_set(datapath: Harness) -> None:
    """In whatever order they came there, and whichever talkers of either port stand beside them: a packet is its own talker's."""
    build = dataclasses.replace(datapath.build, sets=1)
    alone = Harness(build, loader.load(build, code=datapath.loaded.code))
    try:
        alone.policy(deny=["2001:db8::/32"])
        alone.enforce()
        one, other, permitted = (f"2001:{rest}:0:3" for rest in ("db8:0:1:0:2", "db8:0:2:0:1", "db9:0:1:0:2"))
        talkers = [(one, 443), (other, 443), (one, 22), (permitted, 443)]
        for order in itertools.permutations(talkers):
            alone.close_window()
            alone.talker_memory()[:] = 0
            for _ in range(3):
                for source, port in order:
                    assert (alone.send(tcp(source, port)) == libbpf.XDP_PASS) == (source == permitted)
            counted = {(source, port): packets for (source, _, port), (packets, _, _) in by_key(alone.running()).items()}
            assert counted == dict.fromkeys(talkers, 3), order
    finally:
        alone.close()


def make_older(entries: np.ndarray, which: np.ndarray, units: int = 10) -> None:
    """By some units of the table's clock, of half a second."""
    seen, one = np.uint64(abi.STATE_SEEN), np.uint64(1 << abi.STATE_SEEN_SHIFT)
    states = entries["state"]
    states[which] = states[which] & ~seen | states[which] - np.uint64(units) * one & seen


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
    make_older(entries, ids_in(entries["state"]) != quiet.control.window)
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
