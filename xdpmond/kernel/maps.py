"""The small maps: control, ledger, totals, tallies, port flags. Exact numbers, read in bulk.

`control` and `ledger` are mapped into memory, so that the daemon's word reaches the packet path with one aligned store. What is per CPU
is summed here. Nothing is ever cleared: a reader subtracts.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import KernelError
from ..model import Count, Family, Outcome, ProtocolClass, Verdict
from . import abi, libbpf

FAMILY_TO_ABI = {Family.IPV4: abi.FAMILY_IPV4, Family.IPV6: abi.FAMILY_IPV6}
FAMILY_FROM_ABI = (Family.OTHER, Family.IPV4, Family.IPV6)
VERDICT_TO_ABI = {Verdict.ALLOW: abi.VERDICT_ALLOW, Verdict.LOG: abi.VERDICT_LOG, Verdict.DENY: abi.VERDICT_DENY}
VERDICT_FROM_ABI = {number: verdict for verdict, number in VERDICT_TO_ABI.items()}


def map_memory(map_fd: int, size: int, *, write: bool) -> mmap.mmap:
    """Map an array map's elements; `size` in bytes, rounded up to whole pages."""
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    try:
        return mmap.mmap(map_fd, pages, flags=mmap.MAP_SHARED, prot=prot)
    except OSError as error:
        raise KernelError(f"map a BPF array: {error.strerror}") from None


_MEMBARRIER_CMD_GLOBAL = 1
_SYS_MEMBARRIER = {"x86_64": 324}
_ARRAY, _ARRAY_OF_MAPS = 2, 12  # enum bpf_map_type


def wait_for_packets_under_way() -> None:
    """Return when every packet that was in the program at the time of the call has left it (an RCU grace period: membarrier(2), about
    10 ms). Call it in a thread."""
    number = _SYS_MEMBARRIER.get(os.uname().machine)
    if number is None or ctypes.CDLL(None).syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) != 0:
        _wait_by_a_map()


def _wait_by_a_map() -> None:
    """Where a processor has no tick (nohz_full=) the kernel refuses membarrier. Who changes a map of maps is kept waiting until no program
    looks at the old one (maybe_wait_bpf_programs in kernel/bpf/syscall.c)."""
    with contextlib.ExitStack() as made:
        inner = libbpf.create_map(_ARRAY, "xdpmond_grace", value_size=4, entries=1)
        made.callback(os.close, inner)
        outer = libbpf.create_map(_ARRAY_OF_MAPS, "xdpmond_graces", value_size=4, entries=1, inner=inner)
        made.callback(os.close, outer)
        libbpf.update(outer, np.zeros(1, "u4"), np.array([inner], "u4"))


def monotonic_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def realtime_at_monotonic_zero() -> float:
    """Seconds since the epoch when CLOCK_MONOTONIC was 0, as the wall clock has it now."""
    return time.time() - time.monotonic()


_FIRST_POLICY = 2
"""What a policy of number 0 or 1 says is not remembered."""
_WINDOW_SHIFT = 32
"""The number of a window stands in the upper half of `moment`."""


class Control:
    """What the daemon tells the packet path; and the ledger, what it tells itself after its own restart."""

    def __init__(self, maps: Mapping[str, int], *, fresh: bool, identity: int):
        self._memory = map_memory(maps["control"], abi.CONTROL.itemsize, write=True)
        self._ledger_memory = map_memory(maps["ledger"], abi.LEDGER.itemsize, write=True)
        self.block = np.frombuffer(self._memory, abi.CONTROL, 1)[0]
        self.ledger = np.frombuffer(self._ledger_memory, abi.LEDGER, 1)[0]
        self._ports = np.frombuffer(map_memory(maps["ports"], 65536, write=True), "u1", 65536)
        if fresh:
            self._begin()
        self.ledger["abi_version"] = abi.ABI_VERSION
        self.ledger["build"] = identity
        if int(self.block["before"]) == self.window:
            self.block["before"] = self.block["read_window"]  # the last run ended within close_window
        self.ledger["generation"] += 1

    def _begin(self) -> None:
        self.block["seed"] = [secrets.randbits(64) | 1 for _ in range(4)]
        self.block["slots"]["number"] = np.arange(abi.MAX_SLOTS)
        # Window 1 is empty and read, so that an entry of window 0 (never used) is older than the one before the running one.
        self.block["read_window"] = self.block["before"] = 1
        self._set_moment(2, _FIRST_POLICY)
        self.set_window_length(60)
        self.ledger["started"] = self.ledger["window_started"] = monotonic_ns()

    @property
    def window(self) -> int:
        """Number of the running one."""
        return int(self.block["moment"]) >> _WINDOW_SHIFT

    @property
    def before(self) -> int:
        """Number of the window before."""
        return int(self.block["before"])

    @property
    def reading(self) -> bool:
        """Was the last closed window not yet read?"""
        return int(self.block["read_window"]) != self.before

    @property
    def seen_shift(self) -> int:
        return int(self.block["seen_shift"])

    @property
    def _policy(self) -> int:
        return int(self.block["moment"]) % abi.POLICY_NUMBERS

    def _set_moment(self, window: int, policy: int) -> None:
        """One store, so that no packet sees anything but what held at one time."""
        self.block["moment"] = window << _WINDOW_SHIFT | window % abi.WINDOW_IDS << abi.POLICY_BITS | policy

    @property
    def window_started(self) -> float:
        """CLOCK_MONOTONIC, seconds."""
        return int(self.ledger["window_started"]) / 1e9

    def close_window(self, following: int | None = None) -> int:
        """Begin the next window, whose number is `following` if not the next; return the number of the one that ended. The one before it
        must have been read. Follow with a grace period, then read it, then `window_read`."""
        closed = self.window
        self.ledger["window_started"] = monotonic_ns()
        # A packet that sees the new moment sees this too. One that still has the old moment finds no entry of the window before its own, as
        # if that had been silent: but its counts were read.
        self.block["before"] = closed
        self._set_moment(following or closed + 1, _FIRST_POLICY | self.policy_copy)
        return closed

    def set_window_length(self, seconds: float) -> None:
        """How long windows are to be: when a talker was last seen is kept in units of 2^n ns, of which it can tell 256 apart."""
        longest = 2 * seconds + 4  # the window that is read and the running one, and what they take longer
        self.block["seen_shift"] = math.ceil(math.log2(longest * 1e9 / 256))

    @property
    def tracked(self) -> Count:
        """Counts read at the ends of windows, since the maps were made."""
        half = self.ledger["half"][self._newer_half()]
        return Count(int(half["packets"]), int(half["bytes"]))

    def _newer_half(self) -> int:
        windows = self.ledger["half"]["window"]
        return int(windows[1] > windows[0])

    def window_read(self, closed: int, packets: int, bytes_: int) -> None:
        """Enter what the window `closed` held. A crash at any point leaves the old sum or the new one, and never counts twice."""
        newer = self._newer_half()
        half = self.ledger["half"]
        if int(half["window"][newer]) != closed:
            other = 1 - newer
            half["packets"][other] = half["packets"][newer] + np.uint64(packets)
            half["bytes"][other] = half["bytes"][newer] + np.uint64(bytes_)
            half["window"][other] = closed
        self.block["read_window"] = closed

    def adopt_tracked(self, extra: Count) -> None:
        """Enter counts taken from a talker table that is given up. Not safe against a crash; used when tables change size."""
        half = self.ledger["half"]
        newer = self._newer_half()
        half["packets"][newer] += np.uint64(extra.packets)
        half["bytes"][newer] += np.uint64(extra.bytes)

    def set_policy_copy(self, copy: int) -> None:
        """Let packets look into this copy of the policy, also if it is the one that they look into: what they remember of it goes.

        A window has some 250 numbers for this. When they are used up, nothing is remembered until the next window begins."""
        number = self._policy
        following = number + (1 if (number ^ copy) & 1 else 2)
        if number < _FIRST_POLICY or following >= abi.POLICY_NUMBERS:
            following = copy
        self._set_moment(self.window, following)

    @property
    def policy_copy(self) -> int:
        return self._policy & 1

    def set_events(self, interval: float, per_second: int) -> None:
        self.block["event_interval"] = int(interval * 1e9)
        self.block["event_budget"] = per_second
        self.block["event_reserve"] = per_second // 4

    def set_ephemeral(self, first: int, last: int) -> None:
        self.block["ephemeral_first"], self.block["ephemeral_last"] = first, last

    def set_ports(self, flags: Mapping[int, int]) -> None:
        """Flags by port (abi.PORT_*); all others become 0. Port by port, since the packet path reads meanwhile."""
        wanted = np.zeros(65536, "u1")
        for port, value in flags.items():
            wanted[port] = value
        changed = np.nonzero(wanted != self._ports)[0]
        self._ports[changed] = wanted[changed]

    def slot_of(self, ifindex: int) -> int | None:
        found = np.nonzero(self.block["slots"]["ifindex"] == ifindex)[0]
        return int(found[0]) if len(found) else None

    def take_slot(self, ifindex: int, *, enforce: bool, preferred: int | None = None) -> int:
        """Give the interface a slot (the one it has, the preferred one, or a free one). Raises KernelError when all are taken."""
        slots = self.block["slots"]
        slot = self.slot_of(ifindex)
        if slot is None:
            free = [int(n) for n in np.nonzero(slots["ifindex"] == 0)[0]]
            if not free:
                raise KernelError(f"all {abi.MAX_SLOTS} interface slots are taken", hint="watch fewer interfaces")
            slot = preferred if preferred in free else free[0]
            slots["enforce"][slot] = enforce
            slots["ifindex"][slot] = ifindex
        slots["enforce"][slot] = enforce
        return slot

    def free_slot(self, slot: int) -> None:
        self.block["slots"]["ifindex"][slot] = 0

    def set_enforce(self, slot: int, enforce: bool) -> None:
        self.block["slots"]["enforce"][slot] = enforce


@dataclass(frozen=True, slots=True)
class Tallies:
    """What the packet path counts besides the totals. All since the maps were made."""

    sourced: Count
    evicted: Count
    untracked: Count
    elsewhere: Count
    evictions: int
    events_made: int
    ring_full: int
    over_budget: int
    merged: int
    anomalies: Mapping[str, int]


class Counters:
    """Totals and tallies: per-CPU arrays, read whole and summed."""

    def __init__(self, maps: Mapping[str, int], *, cpus: int):
        self._maps = maps
        self._cpus = cpus

    def totals(self) -> np.ndarray:
        """Packets and bytes [2] by slot, family, class and outcome: an array of shape (16, 3, 8, 16, 2), u64."""
        _, values = libbpf.lookup_batches(self._maps["totals"], np.dtype("u4"), np.dtype(("u8", (self._cpus, 2))))
        return values.sum(axis=1).reshape(abi.MAX_SLOTS, abi.FAMILIES, abi.CLASSES, abi.OUTCOMES, 2)

    def tallies(self) -> Tallies:
        """struct xm_tallies summed over the CPUs."""
        cpus = np.zeros(self._cpus, abi.CPU)
        libbpf.lookup(self._maps["cpu"], np.zeros(1, "u4"), cpus)
        value = cpus["tallies"]

        def count(name: str) -> Count:
            return Count(int(value[name]["packets"].sum()), int(value[name]["bytes"].sum()))

        anomalies = value["anomaly"].sum(axis=0)
        return Tallies(
            sourced=count("sourced"),
            evicted=count("evicted"),
            untracked=count("untracked"),
            elsewhere=count("elsewhere"),
            evictions=int(value["evictions"].sum()),
            events_made=int(value["events_made"].sum()),
            ring_full=int(value["events_ring_full"].sum()),
            over_budget=int(value["events_over_budget"].sum()),
            merged=int(value["events_merged"].sum()),
            anomalies={anomaly.name.lower(): int(anomalies[anomaly]) for anomaly in abi.Anomaly},
        )


def cells(totals: np.ndarray) -> Iterable[tuple[int, Family, ProtocolClass, Outcome, Count]]:
    """The cells of `Counters.totals` that are not zero: slot, family, class, outcome, count."""
    for slot, family, protocol, outcome in np.argwhere(totals[..., 0]):
        packets, bytes_ = totals[slot, family, protocol, outcome]
        yield int(slot), FAMILY_FROM_ABI[family], ProtocolClass(protocol), Outcome(outcome), Count(int(packets), int(bytes_))
