"""The world as the service sees it, written by hand: a kernel that keeps a policy in a dict, a disk that may be full, and a loop whose
time the test moves."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from xdpmond.config import Config
from xdpmond.errors import KernelError, StateError
from xdpmond.flowrows import NO_FLOWS
from xdpmond.interfaces import InterfaceState
from xdpmond.messages import Message, Record
from xdpmond.model import Caller, Count, Entry, Mode, Origin, Prefix, RuleCounts, Total, Verdict, parse_address
from xdpmond.policy import Policy
from xdpmond.rows import NO_ROWS, ROW
from xdpmond.service import Ports, Service
from xdpmond.sketches import Sketches
from xdpmond.state import State

T = TypeVar("T")
START = 1_700_000_000.0
ROOT = Caller(0, ":1.7", 42)


class Loop(asyncio.SelectorEventLoop):
    """Timers are due when the test says so."""

    _ahead = 0.0

    def time(self) -> float:
        return super().time() + self._ahead

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a test's coroutine. A test that hangs fails, and so does one that leaves a task behind."""

    async def whole() -> T:
        result = await work()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks without an end: {left}"
        return result

    def hangs(*_: object) -> None:
        raise AssertionError("the test hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        with asyncio.Runner(loop_factory=Loop, debug=False) as runner:
            return runner.run(whole())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def advance(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    loop.advance(seconds)


def entry(prefix: str, verdict: Verdict = Verdict.DENY, origin: Origin = Origin.OPERATOR, **more: Any) -> Entry:
    return Entry(Prefix.parse(prefix), verdict, origin, **more)


def file_entry(prefix: str, verdict: Verdict = Verdict.DENY, line: int = 1) -> Entry:
    return entry(prefix, verdict, Origin.CONFIGURATION, source=f"/etc/xdpmond/xdpmond.toml:{line}")


def rows(*of: tuple[str, int, int, int, int]) -> np.ndarray:
    """Talkers from (source, protocol, port, packets, bytes)."""
    made = np.zeros(len(of), ROW)
    for row, (source, protocol, port, packets, size) in zip(made, of, strict=True):
        family, packed = parse_address(source)
        row["source"] = np.frombuffer(packed.ljust(16, b"\0"), "u1")
        row["family"], row["protocol"], row["port"] = family, protocol, port
        row["packets"], row["bytes"] = packets, size
        row["first_seen"], row["last_seen"] = START - 10, START - 1
    return made


class FakeKernel:
    """Keeps what it is told. `refuse` makes the next call of that name fail."""

    def __init__(self) -> None:
        self.policy: dict[Prefix, Verdict] = {}
        self.default: Verdict | None = None
        self.configured: Config | None = None
        self.counts = RuleCounts({})
        self.cells: list[Total] = []
        self.running = NO_ROWS
        self.flows = NO_FLOWS
        self.sketches = Sketches.empty()
        self.refuse: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.touched: list[Sequence[Prefix] | None] = []
        self.tally = SimpleNamespace(
            sourced=Count(), evicted=Count(), untracked=Count(), elsewhere=Count(), evictions=0, events_made=0, ring_full=0, over_budget=0,
            merged=0, anomalies={"fragment": 0, "short": 2},
        )  # fmt: skip

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.refuse:
            raise self.refuse.pop(name)

    def apply_policy(self, policy: Policy, touched: Sequence[Prefix] | None, default: Verdict) -> None:
        """Looks at what it is told to look at, as the real one does."""
        self._called("apply_policy")
        self.touched.append(touched)
        effective = {prefix: entry.verdict for prefix, entry in policy.effective().items()}
        if touched is None:
            self.policy = effective
        else:
            self.policy = {prefix: verdict for prefix, verdict in self.policy.items() if prefix not in touched}
            self.policy |= {prefix: effective[prefix] for prefix in touched if prefix in effective}
        self.default = default

    def totals(self) -> list[Total]:
        return list(self.cells)

    def tallies(self) -> Any:
        return self.tally

    def read_running(self) -> np.ndarray:
        return self.running

    def read_running_flows(self) -> np.ndarray:
        return self.flows

    def interface_of_slot(self, slot: int) -> str:
        return f"eth{slot}"

    def read_running_sketches(self) -> Sketches:
        return self.sketches

    def configure(self, config: Config) -> None:
        self._called("configure")
        self.configured = config

    def facts(self) -> Mapping[str, Any]:
        return {"links": {"eth0": {"link_id": 3, "program_id": 9}}, "counting_since": START, "talkers_capacity": 1024,
                "talkers_occupied": [2, 0], "prefixes_capacity": 4096, "rule_cells": 64, "maps": []}  # fmt: skip


class FakeStore:
    """A disk that keeps the last state, unless it is `full`."""

    def __init__(self) -> None:
        self.saved: State | None = None
        self.full = False
        self.overgrown = False
        self.compacted = threading.Event()

    def save(self, state: State) -> None:
        if self.full:
            raise StateError("/state cannot be written: No space left on device", hint="changes hold until the daemon stops")
        self.saved = state

    def compact(self) -> None:
        self.overgrown = False
        self.compacted.set()
        if self.full:
            raise StateError("/state cannot be written anew: No space left on device")


class World:
    """A service and all that it touches. Use it within `run`."""

    def __init__(self, config: Config | None = None, state: State | None = None, *, forced: bool = False):
        self.kernel, self.store = FakeKernel(), FakeStore()
        self.now = START
        self.connected: list[str] = []
        """Addresses connected to a failsafe port."""
        self.peers_refused: Exception | None = None
        self.files = config or Config()
        self.files_refused: Exception | None = None
        self.states = [InterfaceState("eth0", "attached", 2, "native", layer="ethernet", mtu=1500, up=True)]
        self.modes: dict[str, Mode] = {}
        """The modes as the packet path has them since the last reconcile."""
        self.reconcile_refused: Exception | None = None
        """Raised once, after the work is done: not every step that fails is the first one."""
        self.records: list[Record] = []
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.reloading: list[bool] = []
        self.before_kernel: Callable[[], object] = lambda: None
        """Happens before the next call to the kernel's side runs, as another call may that stood before it in the queue."""
        self.after_kernel: Callable[[], object] = lambda: None
        """Happens in the turn of the loop after the one in which the call's result has come."""
        self._news = asyncio.Event()
        self.service = Service(config or Config(), state or State(), self._ports(), forced=forced)
        self.modes = {state.name: self.service.mode_on(state.name) for state in self.states}
        self.service.subscribe(self._tell)

    def _ports(self) -> Ports:
        return Ports(
            kernel=self.kernel, store=self.store, in_kernel_thread=self._in_kernel_thread, load_config=self._load, peers=self._peers,
            report=self._report, reconcile=self._reconcile, interface_states=lambda: self.states,
            rule_counts=lambda running: self.kernel.counts,
            losses=lambda: {"queue_full": {}, "journal_held_back": 0}, reloading=self.reloading.append, clock=lambda: self.now,
        )  # fmt: skip

    async def _in_kernel_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.before_kernel()
        result = await asyncio.to_thread(function, *arguments)
        asyncio.get_running_loop().call_soon(self.after_kernel)
        return result

    def _load(self) -> Config:
        if self.files_refused:
            raise self.files_refused
        return self.files

    def _peers(self, config: Config) -> Iterable[tuple[Any, bytes]]:
        if self.peers_refused:
            raise self.peers_refused
        return [parse_address(text) for text in self.connected] if config.failsafe_ports else []

    def _report(self, record: Record) -> None:
        self.records.append(record)
        self._news.set()

    def _tell(self, name: str, body: Mapping[str, Any]) -> None:
        self.told.append((name, body))
        self._news.set()

    async def _reconcile(self) -> None:
        self.modes = {state.name: self.service.mode_on(state.name) for state in self.states}
        if self.reconcile_refused:
            error, self.reconcile_refused = self.reconcile_refused, None
            raise error

    # What tests ask

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that comes with a record or a signal."""
        while not condition():
            self._news.clear()
            await self._news.wait()

    def reports(self, message: Message) -> list[Record]:
        return [record for record in self.records if record.message is message]

    def signals(self, name: str) -> list[Mapping[str, Any]]:
        return [body for told, body in self.told if told == name]

    def verdicts(self) -> dict[str, str]:
        """The policy in the kernel."""
        return {str(prefix): str(verdict) for prefix, verdict in sorted(self.kernel.policy.items())}

    def kept(self) -> dict[str, str]:
        """The policy on disk."""
        assert self.store.saved is not None
        return {str(each.prefix): str(each.verdict) for each in self.store.saved.policy.entries()}

    def snapshot(self) -> tuple[Any, ...]:
        """All that a refused change must leave alone."""
        service = self.service
        return (service.policy.entries(), service.mode, [service.mode_on(state.name) for state in self.states], service.config,
                self.verdicts(), self.kernel.default, self.store.saved, self.modes)  # fmt: skip

    async def deny(self, *prefixes: str, **more: Any) -> dict[str, Any]:
        return await self.service.change(Verdict.DENY, prefixes, caller=ROOT, **more)

    async def allow(self, *prefixes: str, **more: Any) -> dict[str, Any]:
        return await self.service.change(Verdict.ALLOW, prefixes, caller=ROOT, **more)

    async def set_mode(self, mode: str, **more: Any) -> dict[str, Any]:
        return await self.service.set_mode(mode, caller=ROOT, **more)


def kernel_refuses(text: str = "the trie is full") -> KernelError:
    return KernelError(text)
