"""Packets a second that an attached program drops: real frames through a veth pair, native XDP, one core and two.

The sender is BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES in the peer's namespace: a program that gives each frame its source and
transmits it (programs/vary.c). A frame is sent and received on the same core, so the sender's cost is part of each figure, and the same
in all of them. What arrived is read from the receiving driver's counter.

Virtual cores are not alike: what shares a physical core with one of them is somebody else's. So "one core" is the mean of each core alone,
and two cores are measured while both send all the time. Measurements are short and many, in turns, since neighbours come and go within
seconds. And where the pages of a table lie is luck, which lasts as long as the table: so each of ours is measured on several.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager

import numpy as np

from xdpmond.config import Config
from xdpmond.kernel import libbpf
from xdpmond.kernel.datapath import Datapath
from xdpmond.model import Family, Outcome, Prefix

from . import peers
from .compiled import compiled
from .lists import Addresses, mixed_ipv4, sources_within
from .packets import MANY_IPV4, SOURCES
from .path import UDP_PORT, check_books, drain, load_denied, load_policy, pinned, shipped_datapath, udp_frame, write_sources
from .rows import Goal, Of, Row, interleaved
from .wire import Wire, enter, wire, within

TITLE = f"live: {SOURCES:,} sources through a veth pair, native XDP, all of them dropped"

_SECONDS = 0.1  # of one measurement
_TURNS = 5  # in a round
_TABLES = 3
_LEAST = 1 << 17  # packets
_TRACKED = Goal(99, Of.VALUE, at_least=True)


class _Sender:
    """Frames from the far end of a wire, from some cores at once."""

    def __init__(self, at: Wire, sources: Addresses):
        self._at = at
        self._loaded = compiled("vary.c", ["send_ipv4", "drop"], ["sources_ipv4", "position"], SOURCES=len(sources))
        self.drop = self._loaded.programs["drop"]
        self._frame = udp_frame(Family.IPV4)
        write_sources(self._loaded.maps["sources_ipv4"], sources)
        # The cores begin at different places, as they would with traffic of their own.
        cpus = libbpf.possible_cpus()
        libbpf.update(self._loaded.maps["position"], np.zeros(1, "u4"), np.arange(cpus, dtype="u8") * (len(sources) // cpus))

    def close(self) -> None:
        self._loaded.close()

    def rate(self, counts: dict[int, int]) -> tuple[float, float]:
        """Million packets a second that arrive while each core sends its number as fast as it can; and the share that got lost before the
        program. The numbers become those that take as long as a measurement should, so that all cores end at once the next time."""
        sent = sum(counts.values())
        seconds, arrived = self._shoot(counts)
        rate = sum(count / seconds[cpu] for cpu, count in counts.items())
        counts |= {cpu: max(_LEAST, int(count * _SECONDS / seconds[cpu])) for cpu, count in counts.items()}
        return rate * arrived / sent / 1e6, 1 - arrived / sent

    def _shoot(self, counts: dict[int, int]) -> tuple[dict[int, float], int]:
        barrier = threading.Barrier(len(counts))
        seconds: dict[int, float] = {}
        failures: list[BaseException] = []

        def shoot(cpu: int) -> None:
            try:
                enter(self._at.wire_namespace)
                with pinned(cpu):
                    barrier.wait()
                    started = time.monotonic()
                    libbpf.test_run(self._loaded.programs["send_ipv4"], self._frame, repeat=counts[cpu], ifindex=self._at.wire,
                                    flags=libbpf.BPF_F_TEST_XDP_LIVE_FRAMES)  # fmt: skip
                    seconds[cpu] = time.monotonic() - started
            except BaseException as error:
                barrier.abort()
                failures.append(error)

        before = self._at.received()
        threads = [threading.Thread(target=shoot, args=(cpu,)) for cpu in counts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return seconds, self._at.received() - before


@contextmanager
def attached(at: Wire, program: int) -> Iterator[None]:
    link = within(at.front_namespace, libbpf.create_link, program, at.front, libbpf.XDP_FLAGS_DRV_MODE)
    try:
        yield
    finally:
        os.close(link)


def measure(rounds: int) -> Iterable[Row]:
    turns = _TURNS * min(rounds, 7)
    cpus = sorted(os.sched_getaffinity(0))
    both = cpus[:2]
    prefixes = mixed_ipv4(MANY_IPV4)
    sources = sources_within(prefixes, SOURCES)
    with ExitStack() as held:
        at = held.enter_context(wire(queues=len(both)))
        sender = held.enter_context(closing(_Sender(at, sources)))
        few = [held.enter_context(shipped_datapath(Config(), at.front)) for _ in range(_TABLES)]
        many = [held.enter_context(shipped_datapath(Config(), at.front)) for _ in range(_TABLES)]
        for path in few:
            load_policy(path, (), [Prefix.parse("0.0.0.0/1"), Prefix.parse("128.0.0.0/1")])
        for path in many:
            load_denied(path, prefixes)
        ours = {"ours, 2 prefixes": few, f"ours, {MANY_IPV4:,} prefixes": many}
        names = {"bare XDP_DROP": [sender.drop], "xdp-filter by port": [_xdp_filter()]}
        names |= {name: [path.loaded.programs["xdpmond"] for path in paths] for name, paths in ours.items()}
        groups = [[cpu] for cpu in both] + ([both] if len(both) > 1 else [])
        contestants: dict[tuple[str, int, int], Callable[[], float]] = {}
        for name, programs in names.items():
            for group, cores in enumerate(groups):
                for number, program in enumerate(programs):
                    contestants[name, group, number] = _round(at, sender, program, cores, (*few, *many))
        found = interleaved(contestants, turns)

        def median(name: str, group: int) -> float:
            return statistics.median(found[name, group, number] for number in range(len(names[name])))

        medians = {f"{name}, 1": statistics.mean(median(name, group) for group in range(len(both))) for name in names}
        if len(both) > 1:
            medians |= {f"{name}, 2": median(name, len(both)) for name in names}
        yield from _rows(medians, ours, cores=len(both))
    if len(both) > 1:
        yield from _one_queue(sources, both, turns)


def _round(
    at: Wire, sender: _Sender, program: int, cores: list[int], paths: Iterable[Datapath], may_lose: bool = False
) -> Callable[[], float]:
    counts = dict.fromkeys(cores, _LEAST)

    def run() -> float:
        for path in paths:
            drain(path)
        with attached(at, program):
            rate, lost = sender.rate(counts)
        if lost > 0.001 and not may_lose:
            raise AssertionError(f"{100 * lost:.1f} % of the frames did not reach the program")
        return rate

    return run


def _rows(medians: dict[str, float], ours: dict[str, list[Datapath]], cores: int) -> Iterable[Row]:
    yield Row("bare XDP_DROP, one core", medians["bare XDP_DROP, 1"], "Mpps")
    by_port = "xdp-filter, all features, by destination port, one core (reference: bare XDP_DROP)"
    yield Row(by_port, medians["xdp-filter by port, 1"], "Mpps", medians["bare XDP_DROP, 1"])
    for name, paths in ours.items():
        rate = medians[f"{name}, 1"]
        yield Row(f"{name}, one core (reference: xdp-filter)", rate, "Mpps", medians["xdp-filter by port, 1"], Goal(0.75, at_least=True))
        yield Row(f"{name}, one core (reference: bare XDP_DROP)", rate, "Mpps", medians["bare XDP_DROP, 1"], Goal(0.5, at_least=True))
        tallies = [_checked(path) for path in paths]
        lost = sum(each.evicted.packets + each.untracked.packets for each in tallies)
        yield Row(f"{name}: packets tracked", 100 * (1 - lost / sum(each.sourced.packets for each in tallies)), "%", goal=_TRACKED)
    if cores > 1:
        for name in ("bare XDP_DROP", "xdp-filter by port"):
            yield Row(f"{name}, two cores (reference: one core)", medians[f"{name}, 2"], "Mpps", medians[f"{name}, 1"])
        for name in ours:
            yield Row(f"{name}, two cores (reference: one core)", medians[f"{name}, 2"], "Mpps", medians[f"{name}, 1"],
                      Goal(1.8, at_least=True))  # fmt: skip


def _checked(path: Datapath):  # type: ignore[no-untyped-def]
    """The tallies of a path that dropped all that it saw and whose books balance."""
    check_books(path)
    outcomes = {total.outcome for total in path.totals()}
    if outcomes != {Outcome.DENIED_DROPPED}:
        raise AssertionError(f"not all was dropped: {outcomes}")
    return path.tallies()


def _one_queue(sources: Addresses, cores: list[int], turns: int) -> Iterable[Row]:
    """For the reader: both cores send, but the receiver has a single queue, so that one core at a time handles what arrives."""
    with ExitStack() as held:
        at = held.enter_context(wire(queues=1))
        sender = held.enter_context(closing(_Sender(at, sources)))
        path = held.enter_context(shipped_datapath(Config(), at.front))
        load_policy(path, (), [Prefix.parse("0.0.0.0/1"), Prefix.parse("128.0.0.0/1")])
        program = path.loaded.programs["xdpmond"]
        # What is sent faster than the queue is emptied gets lost before the program.
        contestants = {str(each): _round(at, sender, program, each, [path], may_lose=True) for each in (*([cpu] for cpu in cores), cores)}
        medians = interleaved(contestants, turns)
        alone = statistics.mean(medians[str([cpu])] for cpu in cores)
        yield Row("ours, 2 prefixes, one queue, two cores sending (reference: one core)", medians[str(cores)], "Mpps", alone)


def _xdp_filter() -> int:
    """xdp-filter with all features, which drops by destination port."""
    everything = peers.xdp_filter("all")
    everything.deny_destination_port(socket.htons(UDP_PORT))
    return everything.program
