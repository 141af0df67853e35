"""Events: when one is made, what it tells of those that were not, and that none is lost without being counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from xdpmond.kernel import abi, libbpf
from xdpmond.kernel.maps import Tallies
from xdpmond.model import Count, Outcome, Verdict

from .harness import Guns, Harness
from .packets import random_sources, tcp

TABLES = {"sets": 1024, "ring_bytes": 1 * 4096}

REPORTED = (Outcome.DENIED_PASSED, Outcome.DENIED_DROPPED, Outcome.DEFAULT_LOGGED, Outcome.DEFAULT_DENIED_PASSED,
            Outcome.DEFAULT_DENIED_DROPPED)  # fmt: skip
RECORD = 72  # bytes of an event in the ring, with its header
RING = 4096 // RECORD
"""Events that the ring takes."""

FOREVER = 3600.0


def reportable(datapath: Harness) -> int:
    totals = datapath.totals_by_outcome()
    return sum(totals[outcome].packets for outcome in REPORTED)


class Book:
    """Every packet that is to be reported made an event, or is counted as one that did not."""

    def __init__(self, datapath: Harness):
        self._datapath = datapath
        datapath.drain()
        self._tallies, self.reportable, self._suppressed = datapath.counters.tallies(), reportable(datapath), datapath.suppressed()
        self.events: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        events = self._datapath.drain()
        self.events.append(events)
        return events

    def check(self) -> Tallies:
        """Returns what was tallied since."""
        self.take()
        before, after = self._tallies, self._datapath.counters.tallies()
        made = after.events_made - before.events_made
        ring_full, over_budget, merged = (getattr(after, name) - getattr(before, name) for name in ("ring_full", "over_budget", "merged"))
        events = np.concatenate(self.events)
        assert len(events) == made, "an event that the ring took must come out of it"
        told = int(events["suppressed"].sum(dtype="u8"))
        accounted = made + told + merged + over_budget + ring_full + self._datapath.suppressed() - self._suppressed
        assert accounted == reportable(self._datapath) - self.reportable
        return Tallies(Count(), Count(), Count(), Count(), 0, made, ring_full, over_budget, merged, {})


@pytest.fixture
def book(datapath: Harness) -> Book:
    """With an empty sampler and an unspent budget."""
    libbpf.update(datapath.loaded.maps["sampler"], np.zeros(1, "u4"), np.zeros(abi.SAMPLER_CELLS, abi.SAMPLER))
    of_cpus = np.zeros(datapath.build.cpus, abi.CPU)
    assert libbpf.lookup(datapath.loaded.maps["cpu"], np.zeros(1, "u4"), of_cpus)
    of_cpus["budget"] = 0
    libbpf.update(datapath.loaded.maps["cpu"], np.zeros(1, "u4"), of_cpus)
    return Book(datapath)


def test_one_event_in_an_interval(datapath: Harness, book: Book) -> None:
    datapath.control.set_events(FOREVER, 1000)
    for _ in range(50):
        datapath.send(tcp("198.51.100.1"))
    (event,) = book.take()
    assert (event["suppressed"], event["destination_port"]) == (0, 443)
    book.check()
    # The interval ends: the next packet tells of those in between.
    datapath.control.set_events(0, 1000)
    datapath.send(tcp("198.51.100.1"))
    (event,) = book.take()
    assert event["suppressed"] == 49
    datapath.send(tcp("198.51.100.1"))
    (event,) = book.take()
    assert event["suppressed"] == 0
    book.check()


def test_another_source_port_or_verdict_has_its_own(datapath: Harness, book: Book) -> None:
    datapath.control.set_events(FOREVER, 1000)
    frames = [tcp("198.51.100.2"), tcp("198.51.100.2", 22), tcp("198.51.100.3"), tcp("2001:db8::2")]
    for frame in frames * 3:
        datapath.send(frame)
    assert len(book.take()) == len(frames)
    datapath.policy(deny=["198.51.100.2/32"])
    datapath.send(frames[0])
    (event,) = book.take()
    assert event["outcome"] == Outcome.DENIED_PASSED
    datapath.enforce()
    datapath.send(frames[0])
    (event,) = book.take()
    assert event["outcome"] == Outcome.DENIED_DROPPED
    book.check()


def test_no_event_for_what_is_allowed_or_essential(datapath: Harness, book: Book) -> None:
    datapath.policy(allow=["198.51.100.0/24"])
    datapath.send(tcp("198.51.100.1"))
    datapath.default(Verdict.ALLOW)
    datapath.send(tcp("203.0.113.1"))
    datapath.default(Verdict.DENY)
    datapath.control.set_ports({22: abi.PORT_TCP_FAILSAFE})
    datapath.enforce()
    datapath.send(tcp("203.0.113.1", 22))
    assert not len(book.take())
    assert book.check().events_made == 0


def test_the_fields_of_an_event(datapath: Harness, book: Book) -> None:
    datapath.policy(deny=["198.51.100.0/24"])
    before = datapath.run(tcp("198.51.100.4", 8443, "S"))
    event = before.event
    assert event["source"].tobytes() == bytes([198, 51, 100, 4]) + bytes(12)
    assert event["destination"].tobytes() == bytes([192, 0, 2, 1]) + bytes(12)
    assert (event["source_port"], event["destination_port"], event["has_ports"], event["tcp_flags"]) == (999, 8443, 1, 2)
    assert (event["slot"], event["family"], event["protocol"], event["packet_size"]) == (datapath.slot, abi.FAMILY_IPV4, 6, 54)
    assert (event["vlan"], event["outcome"]) == (abi.VLAN_NONE, Outcome.DENIED_PASSED)
    again = datapath.run(tcp("198.51.100.4", 8443, "S")).event
    other = datapath.run(tcp("198.51.100.4", 8444, "S")).event
    assert event["flow_hash"] == again["flow_hash"] != other["flow_hash"]
    assert event["timestamp"] <= again["timestamp"] <= other["timestamp"]


def test_a_full_ring_is_counted(datapath: Harness, book: Book) -> None:
    for source in random_sources(RING + 30, seed=11):
        datapath.send(tcp(source))
    tallied = book.check()
    assert (tallied.events_made, tallied.ring_full) == (RING, 30)
    # With room again, it goes on.
    datapath.send(tcp("198.51.100.1"))
    assert book.check().events_made == RING + 1


def test_what_was_suppressed_before_a_full_ring_is_counted(datapath: Harness, book: Book) -> None:
    datapath.control.set_events(FOREVER, 1000)
    for _ in range(10):
        datapath.send(tcp("198.51.100.1"))
    datapath.control.set_events(0, 1_000_000)
    for source in random_sources(RING, seed=12):
        datapath.send(tcp(source))
    datapath.send(tcp("198.51.100.1"))
    tallied = book.check()
    assert (tallied.ring_full, tallied.merged) == (2, 9)


def test_events_in_order_across_the_ring_s_end(datapath: Harness, book: Book) -> None:
    """Bulks of every size, many times round the ring: whole records, each once, in order."""
    sources = random_sources(200, seed=13)
    frames = [tcp(source, 1 + number) for number, source in enumerate(sources)]
    ring = datapath.ring
    assert ring is not None
    expected, got = [], []
    at = 0
    for bulk in list(range(1, RING)) * 2:
        for _ in range(bulk):
            datapath.send(frames[at % len(frames)])
            expected.append(1 + at % len(frames))
            at += 1
        part, rest = ring.read(bulk // 2), ring.read()
        assert (len(part), len(rest)) == (bulk // 2, bulk - bulk // 2)
        book.events += [part, rest]
        got += [int(event["destination_port"]) for events in (part, rest) for event in events]
        assert all(events["source"].shape == (len(events), 16) for events in (part, rest))
    assert got == expected
    assert len(got) * RECORD > 20 * 4096
    assert book.check().ring_full == 0


def by_second(events: np.ndarray) -> Counter[int]:
    """A second begins with the first event after the one before."""
    found: Counter[int] = Counter()
    began = -1
    for timestamp in events["timestamp"].tolist():
        if began < 0 or timestamp - began >= 1_000_000_000:
            began = timestamp
        found[began] += 1
    return found


def test_the_budget_bounds_a_flood_of_unknown_sources(datapath: Harness, book: Book) -> None:
    """A quarter is kept for sources already known; one CPU makes no more than its budget in a second."""
    budget = 40
    datapath.control.set_events(0, budget)
    frames = [tcp(source) for source in random_sources(3 * budget, seed=14)]
    for frame in frames:
        datapath.send(frame)
    unknown = by_second(book.take())
    assert max(unknown.values()) <= budget - budget // 4
    over = book.check().over_budget
    # At most two seconds were touched, unless the machine stood still.
    assert over >= len(frames) - len(unknown) * budget
    # Known by now: each has a place in the talker table.
    for frame in frames:
        datapath.send(frame)
        book.take()
    tallied = book.check()
    both = by_second(np.concatenate(book.events))
    assert max(both.values()) <= budget
    assert tallied.over_budget == 2 * len(frames) - sum(both.values())


def test_a_known_source_is_reported_through_a_flood(datapath: Harness, book: Book) -> None:
    budget = 40
    known = tcp("198.51.100.5")
    datapath.send(known)
    datapath.control.set_events(0, budget)
    for source in random_sources(2 * budget, seed=15):
        datapath.send(tcp(source))
    book.take()
    datapath.send(known)
    (event,) = book.take()
    assert event["source"].tobytes()[:4] == bytes([198, 51, 100, 5])
    book.check()


def test_a_budget_of_nothing(datapath: Harness, book: Book) -> None:
    datapath.control.set_events(0, 0)
    for _ in range(5):
        datapath.send(tcp("198.51.100.6"))
    assert book.check().over_budget == 5


@pytest.mark.parametrize("interval", [0.0, 0.002, FOREVER])
def test_no_event_is_lost_uncounted_under_fire(
    datapath: Harness, book: Book, shoot: Callable[..., Guns], cpus: list[int], interval: float
) -> None:
    """On all CPUs, through a ring of 51 events, with sources that share cells of the sampler."""
    datapath.policy(deny=["10.0.0.0/8"])
    datapath.enforce()
    datapath.control.set_events(interval, 1_000_000)
    frames = [tcp(source) for source in ["10.0.0.1", "10.0.0.2", *random_sources(300, seed=16)]]
    with shoot(datapath, frames, cpus) as guns:
        full = datapath.counters.tallies().ring_full
        while reportable(datapath) - book.reportable < 5000:
            book.take()
            assert guns.running()
        # Now the reader stands still until the ring is full, where every packet makes an event.
        while interval == 0 and datapath.counters.tallies().ring_full == full:
            assert guns.running()
        shot = guns.stop()
    tallied = book.check()
    assert int(shot.sent.sum()) == reportable(datapath) - book.reportable
    assert tallied.events_made > 0
    if interval == 0:
        assert tallied.ring_full > 0


def test_one_source_on_all_cpus(datapath: Harness, book: Book, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """It makes one event wherever its packets arrive. (Another one for each CPU that meets the very first at the same moment.)"""
    datapath.control.set_events(FOREVER, 1_000_000)
    with shoot(datapath, [tcp("198.51.100.1")], cpus) as guns:
        while reportable(datapath) - book.reportable < 2000:
            assert guns.running()
        shot = guns.stop()
    assert 1 <= book.check().events_made <= len(cpus)
    datapath.control.set_events(0, 1_000_000)
    datapath.send(tcp("198.51.100.1"))
    (event,) = book.take()
    assert int(shot.sent.sum()) - len(cpus) * 2 <= event["suppressed"] < int(shot.sent.sum())
    book.check()


def test_two_sources_in_one_cell(datapath: Harness, book: Book) -> None:
    """The sampler is a table of cells without chains: who takes another's cell reports what that one had suppressed as merged."""
    datapath.control.set_events(FOREVER, 1_000_000)
    first = tcp("198.51.100.1", 1)
    for _ in range(4):
        datapath.send(first)
    (told,) = book.take()
    assert told["suppressed"] == 0
    before = datapath.counters.tallies().merged
    for sent, source in enumerate(random_sources(400_000, seed=17)):
        frame = bytearray(first)
        frame[26:30] = bytes(int(part) for part in source.split("."))
        datapath.send(bytes(frame))
        if sent % RING == 0:
            book.take()
        if datapath.counters.tallies().merged > before:
            break
    else:
        pytest.fail("no other source came to the cell")
    assert datapath.counters.tallies().merged - before == 3
    book.take()
    datapath.send(first)
    (event,) = book.take()
    assert event["suppressed"] == 0, "what was merged is not told once more"
    book.check()
