"""The packet path: ns per packet by BPF_PROG_TEST_RUN's own duration, beside an empty program and xdp-filter.

The program is the shipped one, its bytes unmodified, with the default settings and table sizes: all accounting on, events on. Where
sources vary, a program in front rewrites them (programs/vary.c); what that costs is measured in front of an empty program, and
subtracted. The reference, if there is one, is xdp-filter with all its features on its one hot packet, in the same run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from xdpmond.config import Config, Destination, Events, Flows
from xdpmond.kernel import abi, libbpf
from xdpmond.kernel.datapath import Datapath
from xdpmond.kernel.maps import map_memory
from xdpmond.model import Family, parse_address

from . import peers
from .compiled import compiled
from .lists import SEED, Addresses, Prefixes, mixed_ipv4, mixed_ipv6, sources_outside, sources_within
from .path import (
    KINDS,
    REPEAT,
    UDP_OF,
    Measured,
    Vary,
    check_books,
    drain,
    load_denied,
    load_ten,
    pinned,
    shipped_datapath,
    test_run,
    udp_frame,
)
from .rows import Goal, Of, Row, interleaved

TITLE = "packet path, one core, by BPF_PROG_TEST_RUN"

SOURCES, FEW_SOURCES = 65_536, 1024
MANY_IPV4, MANY_IPV6 = 1_000_000, 100_000
_TRACKED = Goal(99, Of.VALUE, at_least=True)
_FILTER = "xdp-filter"
_SLOW_REPEAT = 1 << 18  # of what takes several hundred ns


def measure(rounds: int) -> Iterable[Row]:
    with pinned(_quietest()):
        for part in (_memory, _ten_prefixes, _many_sources, _features, _other_ways):
            yield from part(rounds)


def _quietest() -> int:
    """The core on which the empty program is quickest: what shares a physical core with a virtual one may be somebody else's work."""
    empty, frame = peers.empty_drop(), udp_frame(Family.IPV4)

    def on(cpu: int) -> Callable[[], float]:
        def run() -> float:
            with pinned(cpu):
                return test_run(empty, frame, libbpf.XDP_DROP)

        return run

    taken = interleaved({str(cpu): on(cpu) for cpu in os.sched_getaffinity(0)}, 5)
    return int(min(taken, key=lambda cpu: taken[cpu]))


def _reference() -> dict[str, Callable[[], float]]:
    """xdp-filter's one hot packet, by family and by what it does, and the empty program."""
    everything = peers.xdp_filter("all")
    empty = peers.empty_drop()
    found: dict[str, Callable[[], float]] = {"empty": lambda: test_run(empty, udp_frame(Family.IPV4), libbpf.XDP_DROP)}
    for family, kind in UDP_OF.items():
        everything.deny(*parse_address(kind.denied))
        for does, source, action in (("passes", kind.permitted, libbpf.XDP_PASS), ("drops", kind.denied, libbpf.XDP_DROP)):
            frame = bytes(kind.build(source))
            found[f"xdp-filter {does} {family.label}"] = lambda frame=frame, action=action: test_run(everything.program, frame, action)  # type: ignore[misc]
    return found


# The machine


def _memory(rounds: int) -> Iterable[Row]:
    """What the rows with many sources lean on: a read that is not in a CPU's own caches, when nothing else is done meanwhile."""
    with ExitStack() as held:
        empty = peers.empty_drop()
        contestants = {"empty": lambda: test_run(empty, udp_frame(Family.IPV4), libbpf.XDP_DROP)}
        for megabytes in (1, 16):
            lines = (megabytes << 20) // _LINE
            chain = held.enter_context(closing(compiled("chase.c", ["chase"], ["chain"], LINES=lines)))
            _fill_chain(chain.maps["chain"], lines)
            contestants[f"{megabytes} MB"] = partial(test_run, chain.programs["chase"], udp_frame(Family.IPV4), libbpf.XDP_DROP)
        medians = interleaved(contestants, rounds)
    near, far = (medians[name] - medians["empty"] for name in ("1 MB", "16 MB"))
    yield Row("this machine: reads in random order, each after the other, from 16 MB (reference: from 1 MB)", far, "ns", near)


_LINE = 64


def _fill_chain(map_fd: int, lines: int) -> None:
    """One circle through all lines."""
    order = np.random.default_rng(SEED).permutation(lines)
    words = np.frombuffer(map_memory(map_fd, lines * _LINE, write=True), "u4", lines * _LINE // 4).reshape(lines, -1)
    words[order, 0] = np.roll(order, -1)


# Ten prefixes, one source


def _ten_prefixes(rounds: int) -> Iterable[Row]:
    with shipped_datapath(Config()) as datapath:
        load_ten(datapath)
        ours = datapath.loaded.programs["xdpmond"]
        everything, addresses = peers.xdp_filter("all"), peers.xdp_filter("ip")
        empty = peers.empty_drop()

        def run_of(program: int, frame: bytes, action: int) -> Callable[[], float]:
            def run() -> float:
                drain(datapath)
                return test_run(program, frame, action)

            return run

        first = KINDS[0]
        contestants = {"empty": run_of(empty, bytes(first.build(first.permitted)), libbpf.XDP_DROP)}
        for kind in KINDS:
            permitted, denied, unlisted = (bytes(kind.build(source)) for source in (kind.permitted, kind.denied, kind.unlisted))
            for name, peer in (("all", everything), ("ip", addresses)):
                peer.deny(*parse_address(kind.denied))
                contestants[f"{name} passes {kind.name}"] = run_of(peer.program, permitted, libbpf.XDP_PASS)
                contestants[f"{name} drops {kind.name}"] = run_of(peer.program, denied, libbpf.XDP_DROP)
            contestants[f"ours passes {kind.name}"] = run_of(ours, permitted, libbpf.XDP_PASS)
            contestants[f"ours drops {kind.name}"] = run_of(ours, denied, libbpf.XDP_DROP)
            contestants[f"ours reports {kind.name}"] = run_of(ours, unlisted, libbpf.XDP_PASS)
        medians = interleaved(contestants, rounds)
        sent = len(KINDS) * 3 * (rounds + 1) * REPEAT
        check_books(datapath, sent)
        tallies = datapath.tallies()
        if tallies.evicted.packets or tallies.untracked.packets:
            raise AssertionError(f"evicted {tallies.evicted.packets}, untracked {tallies.untracked.packets}")

    yield Row("empty program, XDP_DROP", medians["empty"], "ns")
    for kind in KINDS:
        for name, label in (("ip", "address features"), ("all", "all features")):
            for does in ("passes", "drops"):
                row = f"xdp-filter, {label}, {does} {kind.name} (reference: empty)"
                yield Row(row, medians[f"{name} {does} {kind.name}"], "ns", medians["empty"])
        for does, source, peer_does, goal in (
            ("passes", "permitted", "passes", Goal(1.2)),
            ("drops", "denied", "drops", Goal(1.2)),
            ("reports", "unlisted", "passes", None),
        ):
            name = f"10 prefixes, one source: {does} {kind.name}, {source} (reference: {_FILTER})"
            yield Row(name, medians[f"ours {does} {kind.name}"], "ns", medians[f"all {peer_does} {kind.name}"], goal)


# Many prefixes, many sources


@dataclass(frozen=True, slots=True)
class _Contest:
    """A row to be: runs through a path, its reference, and the goal of their ratio."""

    name: str
    measured: Measured
    baseline: Vary
    reference: str
    limit: float | None
    keeps: bool
    """Must it track nearly all packets?"""

    def row(self, medians: Mapping[str, float]) -> Iterable[Row]:
        wrapper = medians[f"{self.name} | wrapper"] - medians["empty"]
        goal = None if self.limit is None else Goal(self.limit)
        row = f"{self.name} ({self.measured.losses}; reference: {_FILTER})"
        yield Row(row, medians[self.name] - wrapper, "ns", medians[self.reference], goal)
        if self.keeps:
            yield Row(f"{self.name}: packets tracked", self.measured.tracked, "%", goal=_TRACKED)


def _many_sources(rounds: int) -> Iterable[Row]:
    rounds = min(rounds, 7)
    with ExitStack() as held:
        ten = held.enter_context(shipped_datapath(Config()))
        load_ten(ten)
        contests = [
            _contest(held, f"10 prefixes, {number:,} sources, unlisted", ten, Family.IPV4, _unlisted(number), "DEFAULT_LOGGED", None)
            for number in (FEW_SOURCES, SOURCES)
        ]
        paths = [ten]
        for number in (1000, 100_000):
            path = held.enter_context(shipped_datapath(Config()))
            load_denied(path, prefixes := mixed_ipv4(number))
            contests.append(_hit_or_miss(held, path, prefixes, True, None))
            paths.append(path)
        for prefixes, goal in ((mixed_ipv4(MANY_IPV4), 3.0), (mixed_ipv6(MANY_IPV6), 5.0)):
            path = held.enter_context(shipped_datapath(Config()))
            load_denied(path, prefixes)
            paths.append(path)
            contests += [_hit_or_miss(held, path, prefixes, hit, goal) for hit in (True, False)]
        contests += [
            _contest(held, "flood, each packet a new source, 10 prefixes, IPv4", ten, Family.IPV4, None, None, 5.0),
            _contest(held, "flood, each packet a new source, 10 prefixes, IPv6", ten, Family.IPV6, None, None, 5.0),
            _contest(held, f"flood, each packet a new source, {MANY_IPV4:,} prefixes, IPv4", paths[3], Family.IPV4, None, None, 5.0),
        ]
        contestants = _reference()
        for contest in contests:
            contestants[contest.name] = contest.measured.run
            contestants[f"{contest.name} | wrapper"] = contest.baseline.run
        medians = interleaved(contestants, rounds)
        for path in paths:
            check_books(path)
        for contest in contests:
            yield from contest.row(medians)


def _hit_or_miss(held: ExitStack, path: Datapath, prefixes: Prefixes, hit: bool, limit: float | None) -> _Contest:
    name = f"{len(prefixes):,} {_label(prefixes.family)} prefixes, {SOURCES:,} sources, {'hit' if hit else 'miss'}"
    sources = sources_within(prefixes, SOURCES) if hit else sources_outside(prefixes, SOURCES)
    outcome = "DENIED_DROPPED" if hit else "DEFAULT_LOGGED"
    return _contest(held, name, path, prefixes.family, sources, outcome, limit, drops=hit, keeps=True)


def _contest(
    held: ExitStack, name: str, path: Datapath, family: Family, sources: Addresses | None, outcome: str | None, limit: float | None, *,
    drops: bool = False, keeps: bool = False,
) -> _Contest:  # fmt: skip
    vary = held.enter_context(closing(Vary(family, sources, path.loaded.programs["xdpmond"])))
    baseline = held.enter_context(closing(Vary(family, sources)))
    # A flood begins with a table that was full long ago; other sources have all been seen.
    warm = 1 << 18 if sources is not None else 4 * _slice(path)
    return _Contest(
        name, Measured(path, vary, outcome, warm), baseline, f"xdp-filter {'drops' if drops else 'passes'} {family.label}", limit, keeps
    )


def _slice(path: Datapath) -> int:
    """Entries of the talker table that one CPU has."""
    return path.talkers.capacity // libbpf.possible_cpus()


def _unlisted(number: int) -> Addresses:
    """Sources on none of the ten prefixes: of 100.64.0.0/10, from which carriers give addresses to customers."""
    random = np.random.default_rng(SEED)
    chosen = random.choice(1 << 22, number, replace=False).astype("u8") | np.uint64(0x64400000)
    return Addresses(Family.IPV4, np.column_stack([chosen << np.uint64(32), np.zeros(number, "u8")]))


def _label(family: Family) -> str:
    return {Family.IPV4: "IPv4", Family.IPV6: "IPv6"}[family]


# What can be switched off


FEATURES: dict[str, tuple[Config, Config]] = {
    "events": (Config(events=dataclasses.replace(Events(), enable=False)), Config()),
    "flows": (Config(), Config(flows=dataclasses.replace(Flows(), enable=True))),
    "destination": (Config(), Config(destination=Destination.LOCAL)),
}
"""Optional part of the packet path: settings without it, and with it."""


def _features(rounds: int) -> Iterable[Row]:
    for name, (without, having) in FEATURES.items():
        with ExitStack() as held:
            contestants: dict[str, Callable[[], float]] = {}
            instructions = {}
            baseline = held.enter_context(closing(Vary(Family.IPV4, _unlisted(SOURCES))))
            contestants["empty"] = lambda: test_run(baseline.drop, udp_frame(Family.IPV4), libbpf.XDP_DROP)  # noqa: B023
            contestants["wrapper"] = baseline.run
            for label, config in (("without", without), ("with", having)):
                path = held.enter_context(shipped_datapath(config))
                load_ten(path)
                program = path.loaded.programs["xdpmond"]
                instructions[label] = libbpf.instruction_count(program)
                vary = held.enter_context(closing(Vary(Family.IPV4, _unlisted(SOURCES), program)))
                contestants[f"many {label}"] = Measured(path, vary, "DEFAULT_LOGGED", 1 << 18).run
                contestants[f"one {label}"] = _hot(path, program)
            medians = interleaved(contestants, rounds)
        wrapper = medians["wrapper"] - medians["empty"]
        yield Row(f"{name}: one unlisted source (reference: without)", medians["one with"], "ns", medians["one without"])
        yield Row(f"{name}: {SOURCES:,} unlisted sources (reference: without)", medians["many with"] - wrapper, "ns",
                  medians["many without"] - wrapper)  # fmt: skip
        row = f"{name}: instructions of the program without (reference: with)"
        yield Row(row, instructions["without"], "instructions", instructions["with"], Goal(0.999))


def _hot(path: Datapath, program: int) -> Callable[[], float]:
    frame = udp_frame(Family.IPV4)

    def run() -> float:
        drain(path)
        return test_run(program, frame, libbpf.XDP_PASS)

    return run


# Other ways of doing it


def _other_ways(rounds: int) -> Iterable[Row]:
    """For the reader: what the systems before this one do, and what the kernel's own maps come to."""
    prefixes = mixed_ipv4(MANY_IPV4)
    sources = sources_within(prefixes, SOURCES)
    with ExitStack() as held:
        scan = held.enter_context(closing(compiled("scan.c", ["scan"], ["networks"])))
        _fill_scan(scan.maps["networks"])
        trie = held.enter_context(closing(compiled("trie.c", ["trie"], ["policy"], PREFIXES=len(prefixes), TALKERS=_DEFAULT_TALKERS)))
        _fill_trie(trie.maps["policy"], prefixes)
        baseline = held.enter_context(closing(Vary(Family.IPV4, sources)))
        contestants = _reference()
        contestants["wrapper"] = lambda: baseline.run(_SLOW_REPEAT)
        frame = udp_frame(Family.IPV4)
        for name, program, action in (("scan", scan.programs["scan"], libbpf.XDP_DROP), ("trie", trie.programs["trie"], libbpf.XDP_PASS)):
            vary = held.enter_context(closing(Vary(Family.IPV4, sources, program)))
            contestants[f"{name} one"] = lambda program=program, action=action: test_run(program, frame, action, _SLOW_REPEAT)  # type: ignore[misc]
            contestants[f"{name} many"] = lambda vary=vary: vary.run(_SLOW_REPEAT)  # type: ignore[misc]
        medians = interleaved(contestants, min(rounds, 5))
    wrapper = medians["wrapper"] - medians["empty"]
    peer = medians["xdp-filter passes ipv4"]
    before, maps = "linear scan of 256 prefixes, LRU table", f"LPM trie of {MANY_IPV4:,} prefixes and three LRU tables"
    for name, label in (("scan", before), ("trie", maps)):
        yield Row(f"{label}, one source, miss (reference: {_FILTER})", medians[f"{name} one"], "ns", peer)
        how = "miss" if name == "scan" else "hit"
        yield Row(f"{label}, {SOURCES:,} sources, {how} (reference: {_FILTER})", medians[f"{name} many"] - wrapper, "ns", peer)


_DEFAULT_TALKERS = 1 << 18


def _fill_scan(map_fd: int) -> None:
    """256 networks of which none covers what is sent."""
    values = np.zeros((256, 2), ">u4")
    values[:, 0] = (240 << 24) + (np.arange(256) << 16)
    values[:, 1] = 0xFFFF0000
    libbpf.update_batch(map_fd, np.arange(256, dtype="u4"), values)


def _fill_trie(map_fd: int, prefixes: Prefixes) -> None:
    keys = np.zeros(len(prefixes), np.dtype([("length", "u4"), ("address", ">u4")]))
    keys["length"] = prefixes.lengths
    keys["address"] = prefixes.addresses.words[:, 0] >> np.uint64(32)
    libbpf.update_batch(map_fd, keys, np.full(len(prefixes), abi.VERDICT_DENY, "u4"))
