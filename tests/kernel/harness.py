"""One loaded packet path with small tables, and what a test asks of it: run this frame, what did it come to?

Test runs go through ifindex 1, the loopback interface of any namespace, whose slot says whether denied packets are dropped. Nothing in
the maps is ever cleared, so every answer is a difference.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xdpmond.kernel import abi, libbpf, loader
from xdpmond.kernel.events import EventRing
from xdpmond.kernel.maps import Control, Counters, cells, map_memory, wait_for_packets_under_way
from xdpmond.kernel.rules import PolicyTable
from xdpmond.kernel.sketchtable import SketchTable
from xdpmond.kernel.tables import PolicySize
from xdpmond.kernel.talkers import TalkerTable
from xdpmond.model import Count, Family, Outcome, Prefix, ProtocolClass, Verdict
from xdpmond.rows import count_of, merge, talker

from .plainpolicy import PlainPolicy

LOOPBACK = 1
EXAMPLES = int(os.environ.get("XDPMOND_TEST_EXAMPLES", "200"))
ROUNDS = max(15, min(EXAMPLES // 3, 60))
"""Of what is done again and again under traffic."""


@dataclass(frozen=True, slots=True)
class Books:
    """The accounts that must balance: `total == tracked + evicted + untracked + elsewhere`, over packets with a readable source.

    `tracked` is in the talker table or was read from it at a window's end; `evicted` lost its entry to another talker before it was
    read; `untracked` found no entry free; `elsewhere` was for other hosts, which `destination = "local"` does not count by talker.
    """

    total: Count
    tracked: Count
    evicted: Count
    untracked: Count
    elsewhere: Count = field(default_factory=Count)

    @property
    def balanced(self) -> bool:
        return self.total == self.tracked + self.evicted + self.untracked + self.elsewhere


@dataclass(frozen=True, slots=True)
class Seen:
    """What one frame came to. `events` and `anomalies` are those that it added."""

    action: int
    slot: int
    family: Family
    protocol_class: ProtocolClass
    outcome: Outcome
    size: int
    sourced: Count
    anomalies: tuple[str, ...]
    events: np.ndarray

    @property
    def event(self) -> np.void:
        assert len(self.events) == 1, f"{len(self.events)} events"
        return self.events[0]


def small_build(**changes: object) -> loader.Build:
    settings: dict[str, object] = {"sets": 64, "rule_cells": 1024, "ring_bytes": 16 * 4096, **changes}
    return loader.Build(cpus=libbpf.possible_cpus(), frags=libbpf.has_frags(), **settings)  # type: ignore[arg-type]


POLICY_SIZE = PolicySize(2048, 1024, 2048)


class Compiled(dict[int, loader.Code]):
    """The texts that this run has compiled, by their identity: one serves tables of any size. Else each module would wait a second for its
    own, and half a minute under emulation."""

    def load(self, identity: int) -> loader.Code | None:
        return self.get(identity)

    def save(self, code: loader.Code) -> None:
        self[code.identity] = code


COMPILED = Compiled()


class Harness:
    """The packet path, loaded."""

    def __init__(self, build: loader.Build, loaded: loader.Loaded | None = None):
        self.build = build
        self.loaded = loaded or loader.load(build, policy=POLICY_SIZE, keeper=COMPILED)
        maps = self.loaded.maps
        self.control = Control(maps, fresh="control" not in self.loaded.reused, identity=self.loaded.code.identity)
        self.counters = Counters(maps, cpus=build.cpus)
        self.rules = self.new_rules()
        self.prefixes: dict[Prefix, Verdict] = {}
        self.talkers = TalkerTable(maps, self.control, cpus=build.cpus, sets=build.sets, flows=build.flows)
        self.sketches = SketchTable(maps, self.control.window, reading=self.control.reading)
        self.ring = EventRing(maps["events"]) if build.ring_bytes else None
        self.control.set_ephemeral(32768, 60999)
        self.slot = self.control.take_slot(LOOPBACK, enforce=False)
        self.reset()

    def close(self) -> None:
        self.rules.close()
        self.loaded.close()

    def new_rules(self) -> PolicyTable:
        size = loader.kept_policy_size(self.loaded.maps)
        assert size is not None
        make = PolicyTable if "policy" in self.loaded.reused else PolicyTable.new
        return make(self.loaded.maps, size, self.control, wait_for_packets_under_way)

    def reset(self) -> None:
        """As after loading, but for the counters: no policy, monitor mode, default log, an event for every packet, no port flags."""
        self.control.set_enforce(self.slot, False)
        self.control.set_events(0, 1_000_000)
        self.control.set_ports({})
        # Whole, since another object may have written to the same maps.
        self.apply({}, list(self.prefixes), Verdict.LOG, whole=True)
        self.drain()

    def policy(self, **lists: Iterable[str]) -> None:
        """Make this the whole policy: `policy(allow=[...], deny=[...])`."""
        wanted = {Prefix.parse(text): Verdict(verdict) for verdict, texts in lists.items() for text in texts}
        self.apply(wanted, self.prefixes.keys() - wanted.keys())

    def apply(self, set_: Mapping[Prefix, Verdict], delete: Iterable[Prefix] = (), default: Verdict | None = None, *,
              whole: bool = False) -> None:  # fmt: skip
        """Change the policy: point by point if it can be so, or `whole`."""
        gone = set(delete)
        prefixes = {prefix: verdict for prefix, verdict in self.prefixes.items() if prefix not in gone} | dict(set_)
        self.rules.apply(PlainPolicy(prefixes), None if whole else [*gone, *set_], default or self.rules.default)
        self.prefixes = prefixes

    def default(self, verdict: Verdict) -> None:
        """What becomes of sources that no prefix covers."""
        self.apply({}, default=verdict)

    def enforce(self, enforce: bool = True) -> None:
        self.control.set_enforce(self.slot, enforce)

    def drain(self) -> np.ndarray:
        """All events in the ring."""
        taken = []
        while self.ring is not None and len(some := self.ring.read()):
            taken.append(some)
        return np.concatenate(taken) if taken else np.zeros(0, abi.EVENT)

    def suppressed(self) -> int:
        """Packets in the sampler that no event has told yet."""
        cells = np.zeros(abi.SAMPLER_CELLS, abi.SAMPLER)
        assert libbpf.lookup(self.loaded.maps["sampler"], np.zeros(1, "u4"), cells)
        return int(cells["suppressed"].sum())

    def send(self, frame: bytes, *, program: str = "xdpmond", repeat: int = 1, ifindex: int = LOOPBACK) -> int:
        """Run one frame through the program on this CPU; return the XDP action."""
        return libbpf.test_run(self.loaded.program(program), frame, repeat=repeat, ifindex=ifindex).action

    def run(self, frame: bytes, *, program: str = "xdpmond", ifindex: int = LOOPBACK) -> Seen:
        """`send`, and report all that it changed. One frame must change one cell of the totals."""
        self.drain()
        totals, tallies = self.counters.totals(), self.counters.tallies()
        action = self.send(frame, program=program, ifindex=ifindex)
        changed = list(cells(self.counters.totals() - totals))
        after = self.counters.tallies()
        anomalies = tuple(name for name, count in after.anomalies.items() for _ in range(count - tallies.anomalies[name]))
        if not changed:
            assert anomalies == ("unknown_slot",), f"nothing was counted; anomalies {anomalies}"
            return Seen(action, -1, Family.OTHER, ProtocolClass.OTHER, Outcome.NO_SOURCE, 0, Count(), anomalies, self.drain())
        ((slot, family, protocol_class, outcome, count),) = changed
        assert count.packets == 1
        sourced = after.sourced - tallies.sourced
        return Seen(action, slot, family, protocol_class, outcome, count.bytes, sourced, anomalies, self.drain())

    def totals_by_outcome(self) -> dict[Outcome, Count]:
        """Of all slots, families and classes."""
        summed = self.counters.totals().sum(axis=(0, 1, 2))
        return {outcome: Count(int(summed[outcome][0]), int(summed[outcome][1])) for outcome in Outcome}

    def running(self) -> np.ndarray:
        return self.talkers.read_running(self.control.window)

    def talker_memory(self) -> np.ndarray:
        """The talkers in the table, to write to: those of flows if it is one of flows."""
        entry = abi.FLOW if self.build.flows else abi.TALKER
        memory = map_memory(self.loaded.maps["talkers"], self.talkers.capacity * entry.itemsize, write=True)
        entries = np.frombuffer(memory, entry, self.talkers.capacity)
        return entries["talker"] if self.build.flows else entries

    def detail_memory(self) -> np.ndarray:
        """Their details, to write to."""
        memory = map_memory(self.loaded.maps["details"], self.talkers.capacity * abi.DETAIL.itemsize, write=True)
        return np.frombuffer(memory, abi.DETAIL, self.talkers.capacity)

    def close_window(self) -> np.ndarray:
        """End a window as the daemon does; its rows."""
        closed = self.control.close_window(self.talkers.following(self.control.window))
        wait_for_packets_under_way()
        rows = self.talkers.read_closed(closed)
        count = count_of(rows)
        self.control.window_read(closed, count.packets, count.bytes)
        self.sketches.clear(closed)
        return rows


def state(window: int, packets: int, size: int, *, seen: int = 0, carried: bool = False) -> int:
    """The state of a talker that was last heard in this window; `packets` and `size` are those that are not in its details. The policy was
    not asked."""
    moment = window % abi.WINDOW_IDS << abi.POLICY_BITS
    lower = carried * abi.STATE_CARRIED | (seen & 0xFF) << abi.STATE_SEEN_SHIFT | packets << abi.STATE_PACKETS_SHIFT | size
    return moment << abi.STATE_MOMENT_SHIFT | lower


def ids_in(states: np.ndarray) -> np.ndarray:
    """Of the windows."""
    return states >> np.uint64(abi.STATE_MOMENT_SHIFT + abi.POLICY_BITS)


def packets_in(states: np.ndarray) -> np.ndarray:
    """Those that are not in the details."""
    return (states & np.uint64(abi.STATE_PACKETS)) >> np.uint64(abi.STATE_PACKETS_SHIFT)


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Keep the calling thread on one CPU: slices of tables and budgets are per CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class Shot:
    """What the guns did: packets sent, and of these dropped, for each frame."""

    sent: np.ndarray
    dropped: np.ndarray


class Guns:
    """Processes that run frames through a program as fast as they can, each on a CPU of its own, until told to stop."""

    def __init__(self, binary: Path, program: int, frames: Sequence[bytes], cpus: Iterable[int], scratch: Path):
        self._frames = len(frames)
        listing = scratch / "frames"
        listing.write_bytes(b"".join(struct.pack("=I", len(frame)) + frame for frame in frames))
        self._processes = []
        for cpu in cpus:
            command = [str(binary), str(program), str(cpu), str(listing)]
            self._processes.append(
                subprocess.Popen(command, pass_fds=[program], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0)
            )
        for process in self._processes:
            assert process.stdout is not None and process.stdout.read(1) == b"\0", "a gun did not begin"

    def __enter__(self) -> Guns:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def running(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def stop(self) -> Shot:
        """Let each gun end the run it is in; what they sent together."""
        for process in self._processes:
            process.terminate()
        counts = np.zeros((self._frames, 2), "u8")
        for process in self._processes:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, f"a gun ended with status {process.returncode}"
            counts += np.frombuffer(output, "u8").reshape(self._frames, 2)
        return Shot(counts[:, 0], counts[:, 1])


def by_key(rows: np.ndarray) -> Mapping[tuple[str, int, int], tuple[int, int, int]]:
    """Packets, bytes and SYNs of each (source, protocol, port), summed over the CPUs."""
    found = {}
    for row in merge(rows):
        value = talker(row)
        found[value.source, value.protocol, int(row["port"])] = (value.packets, value.bytes, value.syns)
    return found
