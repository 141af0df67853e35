"""Windows of talkers in a table with room for all: each packet is in exactly one window, whatever happens around its end."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP

from xdpmond.kernel import abi, libbpf
from xdpmond.kernel.maps import Control, monotonic_ns, wait_for_packets_under_way
from xdpmond.model import Count, Family, Verdict
from xdpmond.rows import count_of, merge, unique_sources

from .harness import ROUNDS, Guns, Harness, by_key, ids_in
from .packets import MAC, random_sources, tcp

TABLES = {"sets": 2048}
BOTH_KINDS = True

EPHEMERAL = (32768, 60999)


@pytest.fixture
def quiet(datapath: Harness) -> Harness:
    """No events, and a window of its own for the test."""
    datapath.default(Verdict.ALLOW)
    datapath.control.set_ephemeral(*EPHEMERAL)
    datapath.close_window()
    return datapath


def test_what_a_row_says(quiet: Harness) -> None:
    before = monotonic_ns() / 1e9
    for flags in ("S", "SA", "S", "A", "SEC", "R"):
        quiet.send(tcp("198.51.100.7", 22, flags))
    after = monotonic_ns() / 1e9
    (row,) = quiet.close_window()
    assert (row["family"], row["protocol"], row["port"]) == (Family.IPV4, 6, 22)
    assert row["source"].tobytes() == bytes([198, 51, 100, 7]) + bytes(12)
    assert (row["packets"], row["bytes"], row["syns"]) == (6, 6 * 54, 3), "a SYN with ACK is an answer, not an attempt"
    unit, coarse = 2**abi.SEEN_SHIFT / 1e9, 2**quiet.control.seen_shift / 1e9
    offset = time.time() - time.monotonic()
    assert before - 2 * unit <= row["first_seen"] - offset <= row["last_seen"] - offset <= after + 2 * unit
    assert row["last_seen"] - offset > after - coarse - 2 * unit


@pytest.mark.parametrize("length", [1, 60, 3600])
def test_the_bits_that_say_when_a_talker_was_last_seen(quiet: Harness, length: float) -> None:
    """They are enough for two windows, and what these are late."""
    quiet.control.set_window_length(length)
    range_ = 256 * 2**quiet.control.seen_shift / 1e9
    quiet.control.set_window_length(60)
    assert 2 * length + 4 <= range_ <= 2 * (2 * length + 4)


def test_when_a_talker_was_last_seen(quiet: Harness) -> None:
    quiet.control.block["seen_shift"] = 20  # units of a millisecond
    started = monotonic_ns()
    quiet.send(tcp("198.51.100.1"))
    while monotonic_ns() < started + 50_000_000:
        pass
    quiet.send(tcp("198.51.100.1"))
    (row,) = quiet.running()
    quiet.control.set_window_length(60)
    assert 0.02 < row["last_seen"] - row["first_seen"] < 0.25


def test_rows_by_source_protocol_and_port(quiet: Harness) -> None:
    frames = {
        ("198.51.100.7", 6, 22): tcp("198.51.100.7", 22),
        ("198.51.100.7", 6, 443): tcp("198.51.100.7", 443),
        ("198.51.100.7", 17, 443): bytes(Ether(**MAC) / IP(src="198.51.100.7", dst="192.0.2.1") / UDP(dport=443)),
        ("198.51.100.7", 132, 443): bytes(Ether(**MAC) / IP(src="198.51.100.7", dst="192.0.2.1") / SCTP(dport=443)),
        ("198.51.100.7", 1, 9): bytes(Ether(**MAC) / IP(src="198.51.100.7", dst="192.0.2.1") / ICMP(type=8)),
        ("198.51.100.7", 1, 1): bytes(Ether(**MAC) / IP(src="198.51.100.7", dst="192.0.2.1") / ICMP(type=0)),
        ("198.51.100.7", 1, 256): bytes(Ether(**MAC) / IP(src="198.51.100.7", dst="192.0.2.1") / ICMP(type=255)),
        ("198.51.100.7", 1, 0): bytes(Ether(**MAC) / IP(src="198.51.100.7", dst="192.0.2.1", frag=100) / ICMP(type=8)),
        ("2001:db8::7", 58, 129): bytes(Ether(**MAC) / IPv6(src="2001:db8::7", dst="2001:db8::1") / ICMPv6EchoRequest()),
        ("2001:db8::7", 1, 0): bytes(Ether(**MAC) / IPv6(src="2001:db8::7", dst="2001:db8::1", nh=1) / ICMP(type=8)),
        ("198.51.100.8", 6, 22): tcp("198.51.100.8", 22),
        ("2001:db8::7", 6, 22): tcp("2001:db8::7", 22),
        # The bytes of an IPv4 address, as the first of an IPv6 one.
        ("c633:6407::", 6, 22): tcp("c633:6407::", 22),
    }
    for number, frame in enumerate(frames.values(), 1):
        for _ in range(number):
            quiet.send(frame)
    expected = {key: (number, number * len(frame), 0) for number, (key, frame) in enumerate(frames.items(), 1)}
    assert by_key(quiet.running()) == expected
    rows = quiet.close_window()
    assert by_key(rows) == expected
    assert unique_sources(rows) == {Family.IPV4: 2, Family.IPV6: 2}
    assert not len(quiet.running()) and not len(quiet.close_window())


def test_rollover(quiet: Harness) -> None:
    """One talks in every window, one in every other, one in every third: nobody is found where he was silent."""
    sources = {"198.51.100.1": 1, "198.51.100.2": 2, "198.51.100.3": 3}
    for window in range(12):
        sent = {source: window + every for source, every in sources.items() if window % every == 0}
        for source, count in sent.items():
            for _ in range(count):
                quiet.send(tcp(source, flags="S"))
        rows = by_key(quiet.close_window())
        assert rows == {(source, 6, 443): (count, 54 * count, count) for source, count in sent.items()}, f"window {window}"


def test_a_window_that_is_read_late(quiet: Harness) -> None:
    """The reader stands still between the end of a window and its reading: it reads that window alone, and the next has all since."""
    quiet.send(tcp("198.51.100.1"))
    quiet.send(tcp("198.51.100.2"))
    closed = quiet.control.close_window()
    assert quiet.control.reading
    for burst in range(1, 4):
        for _ in range(burst):
            quiet.send(tcp("198.51.100.1"))
            quiet.send(tcp("198.51.100.3"))
    wait_for_packets_under_way()
    for _ in range(2):  # and again, as after a crash between reading and entering
        assert by_key(quiet.talkers.read_closed(closed)) == {("198.51.100.1", 6, 443): (1, 54, 0), ("198.51.100.2", 6, 443): (1, 54, 0)}
    quiet.control.window_read(closed, 2, 108)
    assert not quiet.control.reading
    assert by_key(quiet.close_window()) == {("198.51.100.1", 6, 443): (6, 324, 0), ("198.51.100.3", 6, 443): (6, 324, 0)}


def test_the_ledger_counts_a_window_once(quiet: Harness) -> None:
    tracked = quiet.control.tracked
    for _ in range(3):
        closed = quiet.control.close_window()
        quiet.control.window_read(closed, 5, 500)
        quiet.control.window_read(closed, 5, 500)
    assert quiet.control.tracked - tracked == Count(15, 1500)


def test_a_crash_between_the_two_stores_that_begin_a_window(quiet: Harness) -> None:
    """The next process goes on with the window that was to end: nobody takes it for one that waits to be read."""
    quiet.send(tcp("198.51.100.1"))
    before, running = quiet.control.before, quiet.control.window
    quiet.control.block["before"] = running
    quiet.send(tcp("198.51.100.2"))
    after = Control(quiet.loaded.maps, fresh=False, identity=quiet.loaded.code.identity)
    assert (after.before, after.window, after.reading) == (before, running, False)
    quiet.send(tcp("198.51.100.1"))
    assert by_key(quiet.close_window()) == {("198.51.100.1", 6, 443): (2, 108, 0), ("198.51.100.2", 6, 443): (1, 54, 0)}


@pytest.mark.parametrize("protocol", [6, 17])
def test_ephemeral_ports_fold(quiet: Harness, protocol: int) -> None:
    first, last = EPHEMERAL
    listens = abi.PORT_TCP_LISTENS if protocol == 6 else abi.PORT_UDP_LISTENS
    other = abi.PORT_UDP_LISTENS if protocol == 6 else abi.PORT_TCP_LISTENS
    quiet.control.set_ports({40000: listens, 40001: other, 40007: listens, 40008: listens})
    transport = TCP if protocol == 6 else UDP
    ports = [first - 1, first, first + 1, 40000, 40001, 40007, 40008, last, last + 1, 65535]
    for port in ports:
        quiet.send(bytes(Ether(**MAC) / IP(src="198.51.100.1", dst="192.0.2.1") / transport(dport=port)))
    found = {port: packets for (_, _, port), (packets, _, _) in by_key(quiet.close_window()).items()}
    assert found == {first - 1: 1, first: 4, 40000: 1, 40007: 1, 40008: 1, last + 1: 1, 65535: 1}


def test_a_counter_at_its_end(quiet: Harness) -> None:
    """A talker's 32 bits do not wrap: what comes when they are all but used up is untracked."""
    frame = tcp("198.51.100.1")
    quiet.send(frame)
    entries = quiet.talker_memory()
    (at,) = np.nonzero(ids_in(entries["state"]) == quiet.control.window)[0]
    quiet.detail_memory()["packets"][at] = 0xFFFFFFFF - 62
    before, end, left = quiet.counters.tallies().untracked, 0xFFFFFFFF - abi.STATE_STAY, 61 - abi.STATE_STAY
    for _ in range(left + 3):
        quiet.send(frame)
    assert quiet.counters.tallies().untracked - before == Count(3, 3 * len(frame))
    assert quiet.running()["packets"].tolist() == [end]
    assert quiet.close_window()["packets"].tolist() == [end]


def test_counts_that_outgrow_the_state_of_an_entry(quiet: Harness) -> None:
    """Its few bits are added to the details in time, whatever the sizes of packets: no sum is ever off, nor which window it is of."""
    source = random.Random(7)
    largest = 66_000 if libbpf.has_frags() else 3_400
    talkers = {"198.51.100.1": [54], "198.51.100.2": [54, 1514, largest], "2001:db8::1": [largest], "2001:db8::2": [74, 74, 74, 3000]}
    for _ in range(6):
        sums = {who: Count() for who in talkers}
        for round_ in range(source.randrange(2, 200)):
            for who, sizes in talkers.items():
                frame = tcp(who).ljust(source.choice(sizes), b"\0")
                quiet.send(frame)
                sums[who] += Count(1, len(frame))
            if round_ % 41 == 0 or round_ in (0, 1):
                assert by_key(quiet.running()) == {(who, 6, 443): (of.packets, of.bytes, 0) for who, of in sums.items()}
        wanted = {(who, 6, 443): (of.packets, of.bytes, 0) for who, of in sums.items()}
        closed = quiet.control.close_window()
        wait_for_packets_under_way()
        assert by_key(quiet.talkers.read_closed(closed)) == wanted
        for who in list(talkers)[::2]:
            quiet.send(tcp(who))
        assert by_key(quiet.talkers.read_closed(closed)) == wanted, "also when some talk again"
        quiet.control.window_read(closed, *_pair(sum(sums.values(), Count())))
        quiet.close_window()


@pytest.mark.parametrize("membarrier", [True, False], ids=["membarrier", "no membarrier"])
def test_every_packet_is_in_one_window(
    quiet: Harness, shoot: Callable[..., Guns], cpus: list[int], monkeypatch: pytest.MonkeyPatch, membarrier: bool
) -> None:
    """Traffic on all CPUs over many windows: of each source, the windows together hold exactly what was sent. Also where the kernel refuses
    membarrier, as with nohz_full=."""
    if not membarrier:
        monkeypatch.setattr("xdpmond.kernel.maps._MEMBARRIER_CMD_GLOBAL", 1 << 30)
    sources = [*random_sources(200, seed=1), "2001:db8::1", "2001:db8::2"]
    frames = [tcp(source, 443, "S" if number % 3 == 0 else "A") for number, source in enumerate(sources)]
    before, tracked = quiet.counters.tallies(), quiet.control.tracked
    found: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    attempts: Counter[str] = Counter()
    filled = 0

    def add(rows: np.ndarray) -> None:
        for (source, _, _), (packets, bytes_, syns) in by_key(rows).items():
            found[source] += packets
            sizes[source] += bytes_
            attempts[source] += syns

    with shoot(quiet, frames, cpus) as guns:
        closed = 0
        while closed < ROUNDS or filled < ROUNDS // 2:
            rows = quiet.close_window()
            filled += len(rows) > 0
            add(rows)
            closed += 1
            assert guns.running()
            assert closed < 100 * ROUNDS, "no traffic"
            quiet.talkers.read_running(quiet.control.window)
        shot = guns.stop()
    for _ in range(2):
        add(quiet.close_window())
    assert [found[source] for source in sources] == shot.sent.tolist()
    assert [sizes[source] for source in sources] == [int(count) * len(frame) for count, frame in zip(shot.sent, frames, strict=True)]
    assert [attempts[source] for source in sources] == [int(count) * (number % 3 == 0) for number, count in enumerate(shot.sent)]
    after = quiet.counters.tallies()
    assert (after.untracked, after.evicted) == (before.untracked, before.evicted), "there was room for all"
    assert after.sourced - before.sourced == quiet.control.tracked - tracked == Count(sum(found.values()), sum(sizes.values()))


def test_a_reader_that_stands_still_under_fire(quiet: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """It closes a window, and reads it only after much more traffic: several times, and nothing is lost or found twice."""
    frames = [tcp(source) for source in random_sources(50, seed=2)]
    tracked, before = quiet.control.tracked, quiet.counters.tallies()
    with shoot(quiet, frames, cpus) as guns:
        for _ in range(5):
            closed = quiet.control.close_window()
            wait_for_packets_under_way()
            first = merge(quiet.talkers.read_closed(closed))
            sourced = quiet.counters.tallies().sourced.packets
            while quiet.counters.tallies().sourced.packets < sourced + 500:
                assert guns.running()
            again = merge(quiet.talkers.read_closed(closed))
            for name in ("source", "packets", "bytes"):
                assert np.array_equal(first[name], again[name]), "a closed window changed"
            quiet.control.window_read(closed, *_pair(count_of(again)))
        shot = guns.stop()
    quiet.close_window()
    after = quiet.counters.tallies()
    assert after.sourced.packets - before.sourced.packets == int(shot.sent.sum())
    assert quiet.control.tracked - tracked == after.sourced - before.sourced
    assert (after.untracked, after.evicted) == (before.untracked, before.evicted)


def _pair(count: Count) -> tuple[int, int]:
    return count.packets, count.bytes


def test_denied_packets_are_talkers_too(quiet: Harness) -> None:
    quiet.policy(deny=["198.51.100.0/24"])
    quiet.enforce()
    assert quiet.send(tcp("198.51.100.9")) == libbpf.XDP_DROP
    assert by_key(quiet.close_window()) == {("198.51.100.9", 6, 443): (1, 54, 0)}
