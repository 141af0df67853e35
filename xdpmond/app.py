"""The daemon put together: command line, parts, tasks, signals, and the order in which they start and end.

Under systemd the program stays attached when this process ends: the descriptor store holds it, until `systemctl stop` empties the store.
In the foreground the links are this process's own, so that its end, however it comes, detaches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import getpass
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__, memory
from .attribution import RuleBook
from .batch import EventBatch, Match
from .config import Config, config_warnings, naming_the_place, require_force
from .configfiles import ConfigPaths, load
from .errors import KernelError, StateError, UsageError, XdpmondError
from .feeds import BlockedSources
from .interfaces import Interfaces
from .kernel.codefile import CodeFile
from .kernel.datapath import Closed, Datapath, Kept
from .kernel.maps import Tallies
from .kernel.pump import EventPump
from .kernel.rulecounts import RuleCountTable
from .measures import Meter, Numbers, source_list
from .messages import Message, Record
from .model import Caller, Mode, Prefix, RuleCounts, Verdict
from .names import Names
from .policy import Policy
from .rows import NO_ROWS
from .service import Ports, Service
from .sinks.console import ConsoleSink
from .sinks.exporters import Exporters, require_possible, require_sensible
from .sinks.flows import FlowExport
from .sinks.journal import JournalSink
from .sinks.logfile import LogFiles, require_within, require_writable
from .state import NAME as STATE_FILE
from .state import OperatorStore, State
from .systemd import Notifier, stored_descriptors, writable_paths
from .windows import LossWarning, Pressure, Progress, Summary, Totals, Window, lost

if TYPE_CHECKING:
    from .bus.server import BusServer
    from .kernel.links import LinkWatch


def parser() -> argparse.ArgumentParser:
    """The command line of the daemon."""
    arguments = argparse.ArgumentParser(
        prog="xdpmond", description="Watch every packet that reaches this host, and drop those of denied sources.", allow_abbrev=False,
        epilog="As a service: systemctl start xdpmond. For a trial, this command runs in the foreground and detaches when it ends.",
    )  # fmt: skip
    add = arguments.add_argument
    add("-i", "--interface", action="append", metavar="IF", help="watch this interface, whatever the configuration says (may be repeated)")
    add("-c", "--config", metavar="FILE", help="read this file, and FILE.d/*.toml, instead of those in /etc/xdpmond")
    add("--enforce", "--drop-packets", action="store_true", dest="enforce", help="drop the packets of denied sources")
    add("--force", action="store_true", help='enforce default = "deny" although answers to own connections are dropped too')
    add("--check-config", action="store_true", help="read the configuration, say what is wrong with it, and end")
    add("--hash-password", metavar="NAME", help="ask for a password, and write the line for metrics.users of the configuration")
    add("--bus", metavar="ADDRESS", default=os.environ.get("XDPMOND_BUS"), help="D-Bus address to serve on (default: the system bus)")
    add("--no-bus", action="store_true", help="do not serve on D-Bus")
    add("--state", metavar="FILE", help="keep entries added at run time in this file (default without systemd: in memory)")
    add("-v", "--verbose", action="store_true", help="show all that is known of each event")
    add("--version", action="version", version=f"xdpmond {__version__}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    memory.configure()
    options = parser().parse_args(argv)
    paths = ConfigPaths.single(options.config) if options.config else ConfigPaths()
    try:
        if options.hash_password is not None:
            return _hash_password(options.hash_password)
        if options.check_config:
            return _check(paths, options)
        return asyncio.run(Daemon(options, paths).run())
    except XdpmondError as error:
        print(f"xdpmond: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"         {error.hint}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # before it was ready
        return 130


def _state_directory() -> Path | None:
    """That which systemd has made for us, the first if it has several."""
    directory = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(directory) if directory else None


def _first(error: BaseException) -> BaseException:
    """The first of what a task group gathered."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _hash_password(name: str) -> int:
    """From the terminal, or a line of the standard input."""
    from .sinks.passwords import hashed

    if sys.stdin.isatty():
        password = getpass.getpass(f"Password of {name}: ")
        if getpass.getpass("Again: ") != password:
            raise UsageError("the passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    print(hashed(name, password))
    return 0


def _check(paths: ConfigPaths, options: argparse.Namespace) -> int:
    config = load(paths)
    require_force(config, options.force)
    writable = writable_paths("xdpmond.service") if not options.config else None
    if writable is not None:
        require_within(config.log, writable)
    with naming_the_place(config):
        require_sensible(config, writable)
        Names.open(config.names)
    for warning in config_warnings(config):
        print(f"xdpmond: note: {warning}")
    files = ", ".join(config.files) or "no file: the defaults hold"
    print(f"the configuration is good: {config.count(Verdict.ALLOW)} allowed and {config.count(Verdict.DENY)} denied prefixes,"
          f" mode {config.mode} ({files})")  # fmt: skip
    return 0


_TALKERS_LOST = (
    "the table of talkers is full: some sources are not listed, and counts of entries are lower bounds; totals are exact"
    " (see tables.talkers in xdpmond.toml(5))"
)


class _BookedKernel:
    """The packet path as the service sees it: what it does to the policy is entered in the book of rule counts."""

    def __init__(self, datapath: Datapath, book: RuleBook):
        self._datapath, self._book = datapath, book
        self.totals, self.tallies, self.read_running = datapath.totals, datapath.tallies, datapath.read_running
        self.read_running_flows, self.read_running_sketches = datapath.read_running_flows, datapath.read_running_sketches
        self.configure, self.facts, self.interface_of_slot = datapath.configure, datapath.facts, datapath.interface_of_slot

    def apply_policy(self, policy: Policy, touched: Sequence[Prefix] | None, default: Verdict) -> None:
        self._book.changing()
        try:
            self._datapath.apply_policy(policy, touched, default)
        except KernelError:
            self._book.unchanged()
            raise
        self._book.changed(policy, touched)


class MemoryStore:
    """Keeps nothing: for trials in the foreground."""

    overgrown = False

    def load(self) -> State:
        return State()

    def save(self, state: State) -> None:
        """What is added lasts as long as the process."""

    def compact(self) -> None:
        """There is nothing to be compacted."""


class Daemon:
    """One run of the daemon."""

    def __init__(self, options: argparse.Namespace, paths: ConfigPaths):
        self._options = options
        self._paths = paths
        self._notifier = Notifier()
        self._kernel_thread = ThreadPoolExecutor(1, "kernel")
        self._stop = asyncio.Event()
        self._window_changed = asyncio.Event()
        self._blocked = BlockedSources()
        self._logs = LogFiles(self.report)
        self._exporters = Exporters(self.report, self._list_sources)
        self._messages: Counter[Message] = Counter()
        self._counting = threading.Lock()
        self._measure_now = asyncio.Event()
        self._late_windows = 0
        self._flows: FlowExport | None = None
        self._bus: BusServer | None = None
        self._blocked_timer: asyncio.TimerHandle | None = None
        self._hung_up = asyncio.Event()
        self._has_terminal = os.isatty(0)

    # Parts

    def _load_config(self) -> Config:
        """The files, and above them the command line."""
        config = load(self._paths)
        if self._options.interface:
            config = dataclasses.replace(config, interface=tuple(self._options.interface))
        if self._options.enforce:
            interfaces = {name: dataclasses.replace(own, mode=None) for name, own in config.interfaces.items()}
            config = dataclasses.replace(config, mode=Mode.ENFORCE, interfaces=interfaces)
        if self._options.no_bus:
            config = dataclasses.replace(config, bus=dataclasses.replace(config.bus, enable=False))
        return config

    def _load_again(self) -> Config:
        """For a reload, which refuses what a start has to put up with: logs that cannot be written now."""
        config = self._load_config()
        require_writable(config.log)
        with naming_the_place(config):
            require_possible(config)
        return config

    def _make_store(self) -> OperatorStore | MemoryStore:
        if self._options.state:
            return OperatorStore(Path(self._options.state))
        return OperatorStore(directory / STATE_FILE) if (directory := _state_directory()) else MemoryStore()

    def _load_state(self, store: OperatorStore | MemoryStore) -> State:
        """What was kept; or what is left of it, if something was lost."""
        for _ in range(2):
            try:
                return store.load()
            except StateError as error:
                self.report(Record(Message.STATE_PROBLEM, str(error)))
        return State()

    async def _in_kernel_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._kernel_thread, partial(function, *arguments))

    # Life

    async def run(self) -> int:
        # What works in other threads, such as the writers of logs, hands the interpreter to the loop within a millisecond, not five.
        sys.setswitchinterval(0.001)
        # From the first moment on: by default, the signal ends a process.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up.set)
        config = await asyncio.to_thread(self._load_config)
        require_force(config, self._options.force)
        under_systemd = self._notifier.present and JournalSink.available()
        self._sink = JournalSink(config.journal.events_per_minute) if under_systemd else ConsoleSink(verbose=self._options.verbose)
        try:
            return await self._run(config)
        finally:
            await asyncio.to_thread(self._exporters.close)
            await asyncio.to_thread(self._logs.close)
            await asyncio.to_thread(self._sink.close)
            self._kernel_thread.shutdown()

    def report(self, record: Record) -> None:
        """From any thread: sinks take records without blocking."""
        with self._counting:
            self._messages[record.message] += 1
        self._sink.put(dataclasses.replace(record, timestamp=record.timestamp or time.time()))

    async def _run(self, config: Config) -> int:
        kept = Kept.of(stored_descriptors())
        store = self._make_store()
        state = await asyncio.to_thread(self._load_state, store)
        directory = _state_directory()
        keeper = CodeFile(directory, lambda text: self.report(Record(Message.WARNING, text))) if directory else None
        # pyroute2 takes longer to import than all the rest. That and D-Bus are needed when there is a packet path, which a child may have
        # to compile, and the kernel to verify.
        late = [".kernel.links", ".bus.server"] if config.bus.enable else [".kernel.links"]
        importing = asyncio.create_task(asyncio.to_thread(lambda: [import_module(name, __package__) for name in late]))
        self._datapath: Datapath = await self._in_kernel_thread(Datapath.open, config, kept, self._notifier, keeper)
        await importing
        from .kernel.links import LinkWatch
        from .kernel.sockets import established_peers

        self._book: RuleBook = await self._in_kernel_thread(self._open_book)
        links = LinkWatch()
        self._interfaces = Interfaces(self._datapath, links, self.report)
        ports = Ports(
            kernel=_BookedKernel(self._datapath, self._book), store=store, in_kernel_thread=self._in_kernel_thread,
            load_config=self._load_again, peers=lambda of: established_peers(of.failsafe_ports), report=self.report,
            reconcile=self._put_in_place, interface_states=lambda: self._interfaces.states, rule_counts=self._rule_counts,
            losses=self._losses, reloading=self._reloading, clock=time.time,
            flows=lambda: self._flows.state() if self._flows else None,
        )  # fmt: skip
        self._service = Service(config, state, ports, forced=self._options.force)
        try:
            await self._start(kept)
            return await self._serve(links)
        except XdpmondError:
            raise
        except Exception as error:
            # A task that fails ends the daemon, whole and soon: the next start goes on with what the kernel and the disk have kept.
            self.report(Record(Message.INTERNAL_ERROR, f"xdpmond ends because a part of it failed:\n{traceback.format_exc()}"))
            raise XdpmondError(f"ended by an internal error: {_first(error)!r}", hint="the lines above say where") from None
        finally:
            self._notifier.stopping()
            self.report(Record(Message.STOPPING, self._farewell()))
            links.close()
            await self._in_kernel_thread(self._datapath.close)

    def _farewell(self) -> str:
        if self._notifier.present:
            return "xdpmond ends; the program stays attached until the service is stopped"
        return "xdpmond ends and detaches" if self._datapath.attachments else "xdpmond ends"

    def _open_book(self) -> RuleBook:
        datapath = self._datapath
        table = RuleCountTable(datapath.loaded.maps["rules"], 1 + datapath.build.rule_cells, datapath.control.ledger)
        if datapath.lost_rows:
            table.mark_all()
        return RuleBook(table, first=not datapath.took_over, lost=lost(datapath.tallies()))

    async def _start(self, kept: Kept) -> None:
        """Policy first, then interfaces: no packet meets an empty policy."""
        service, datapath = self._service, self._datapath
        await service.begin()
        await self._in_kernel_thread(self._refresh_ports)
        replaced = await self._in_kernel_thread(self._interfaces.take_over, kept.links, service.config, service.mode_on)
        await self._reconcile()
        states = self._interfaces.states
        refused = [state for state in states if state.state == "refused"]
        if not self._notifier.present and refused and len(refused) == len(states):
            raise KernelError(f"no interface can be watched: {refused[0].reason}")
        totals = await self._in_kernel_thread(self._read_totals)
        service.progress = Progress(totals, datapath.control.tracked, lost=self._book.lost)
        if datapath.took_over:
            links, rules = len(kept.links), len(service.policy)
            text = f"went on with what the last run left: {links} links, {rules} rules"
            self.report(Record(Message.TOOK_OVER, text, {"links": links, "rules": rules}))
        if replaced:
            self.report(
                Record(Message.PROGRAM_REPLACED, f"put a new program in place on {', '.join(replaced)}", {"interfaces": " ".join(replaced)})
            )
        for warning in service.warnings():
            self.report(Record(Message.WARNING, warning))

    async def _serve(self, links: LinkWatch) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGUSR1, self._logs.reopen)
        self._configure_logs()
        self._exporters.configure(self._service.config)
        changed = asyncio.Event()
        self._flows = self._make_flow_export()
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(links.watch(changed.set), name="links"),
                tasks.create_task(self._follow_links(changed), name="reconcile"),
                tasks.create_task(self._windows(), name="windows"),
                tasks.create_task(self._measure(), name="metrics"),
                tasks.create_task(self._follow_hang_ups(), name="reload"),
                tasks.create_task(self._service.run(), name="service"),
            ]
            if self._datapath.ring:
                pump = EventPump(self._datapath, self._match, self._publish)
                running.append(tasks.create_task(pump.run(), name="events"))
            if self._flows:
                running.append(tasks.create_task(self._flows.run(), name="flows"))
            if seconds := self._notifier.watchdog_seconds:
                running.append(tasks.create_task(self._watchdog(seconds / 3), name="watchdog"))
            if self._service.config.bus.enable:
                from .bus.server import BusServer

                bus = self._bus = BusServer(self._service, self._options.bus, self._of_bus)
                running.append(tasks.create_task(bus.run(), name="bus"))
                await bus.settled()
            self._notifier.ready(self._status_line())
            self.report(Record(Message.STARTED, f"xdpmond {__version__} is ready: {self._status_line()}", {"version": __version__}))
            await self._stop.wait()
            async with self._service.reading:  # so that no window is half read
                for task in running:
                    task.cancel()
        if self._flows:
            await self._end_flows(self._flows)
        return 0

    def _make_flow_export(self) -> FlowExport | None:
        cache = self._service.flow_cache
        if cache is None:
            return None
        made = FlowExport(cache, self._service.reading, self.report)
        made.configure(self._service.config)
        return made

    async def _end_flows(self, flows: FlowExport) -> None:
        """Records do not outlive the process, so those that somebody collects end with it, and so does the window that has the rest."""
        if flows.exports:
            async with self._service.reading:
                await self._end_window()
        await flows.close()

    def _of_bus(self, priority: int, text: str) -> None:
        """What the bus room has to say, by syslog priority: 4 and below is a problem, 5 a call that was refused."""
        kind = Message.BUS_PROBLEM if priority <= 4 else Message.CHANGE_REFUSED if priority == 5 else Message.BUS_CONNECTED
        self.report(Record(kind, text, priority=priority))

    # Tasks

    async def _watchdog(self, seconds: float) -> None:
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(seconds)

    async def _follow_links(self, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            await self._reconcile(self._interfaces.keep)

    async def _put_in_place(self) -> None:
        """Interfaces, modes and failsafe ports as the service wants them now. The ports first: if they cannot be listed, no mode has
        changed yet."""
        await self._in_kernel_thread(self._refresh_ports)
        await self._reconcile()

    async def _reconcile(self, do: Callable[[Config, Callable[[str], Mode]], None] | None = None) -> None:
        before = self._interfaces.states
        await self._in_kernel_thread(do or self._interfaces.reconcile, self._service.config, self._service.mode_on)
        if self._interfaces.states != before:
            self._service.notify("", {})
            self._notifier.status(self._status_line())

    async def _windows(self) -> None:
        """End each window when it is due, or as soon after as this process gets to run."""
        service, control = self._service, self._datapath.control
        summary, warning = Summary(time.time(), service.progress.began), LossWarning()
        pressure = await self._in_kernel_thread(lambda: self._read_pressure(self._datapath.tallies()))
        while True:
            due = control.window_started + service.config.window
            self._window_changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._window_changed.wait(), max(0.0, due - time.monotonic()))
                continue
            interval = service.config.summary_interval
            async with service.reading:
                window, totals, tallies = await self._end_window()
                if interval:
                    await asyncio.to_thread(summary.add, window)
            self._late_windows += window.late
            self._measure_now.set()
            if warning.due(window, interval):
                self.report(Record(Message.WARNING, _TALKERS_LOST))
            if not interval:
                summary = Summary(window.ended, totals)
            elif window.ended - summary.started >= interval - 0.5:
                text = await asyncio.to_thread(summary.text, totals)
                pressure, before = await self._in_kernel_thread(self._read_pressure, tallies), pressure
                self._summarize("\n".join([text, pressure.text(before)]), pressure.fields(before))
                summary = Summary(window.ended, totals)
            await self._reconcile(self._interfaces.keep)

    async def _end_window(self) -> tuple[Window, Totals, Tallies]:
        """End the running window, and give what it held to whoever keeps it. `service.reading` is held."""
        service = self._service
        window, closed, lost_before = await self._in_kernel_thread(self._close_window, service.config.window, service.settled_policy)
        totals, flows = Totals(closed.totals, closed.at), closed.flows
        window = await asyncio.to_thread(window.counted, service.config.ports)
        service.window_closed(window, totals, self._datapath.control.tracked, lost_before)
        if self._flows and flows is not None:
            ifindexes = {attached.slot: attached.ifindex for attached in self._datapath.attachments.values()}
            await asyncio.to_thread(self._flows.window_closed, flows, window.started, window.ended, ifindexes)
        return window, totals, closed.tallies

    def _close_window(self, wanted: float, policy: Policy | None) -> tuple[Window, Closed, int]:
        """Returns also how many packets had found no talker for certain before the new window."""
        control, book = self._datapath.control, self._book
        epoch = time.time() - time.monotonic()
        number, started = control.window, control.window_started + epoch
        closing = control.before if control.reading else number
        # One that waits to be read since a crash has been followed by another already.
        lost_before = book.lost if control.reading else lost(self._datapath.tallies())
        exact_until = book.lost
        if policy is not None:
            book.settle(policy)
        book.begin(number)
        closed = self._datapath.close_window()
        lost_now = lost(self._datapath.tallies())
        book.close(closed.rows, control.window_started, lost=lost_now, lost_before=lost_before)
        try:
            self._refresh_ports()
        except KernelError as error:
            self.report(Record(Message.WARNING, f"which ports are listened on is not seen: {error}"))
        window = Window(closing, started, control.window_started + epoch, wanted, closed.rows, lost_now == exact_until, closed.sketches)
        return window, closed, lost_before

    async def _measure(self) -> None:
        """Measure for whoever wants it: at intervals, and whenever a window has ended."""
        meter, told, failed = Meter(), 0, False
        while True:
            self._measure_now.clear()
            if self._exporters.wanted:
                try:
                    numbers = await self._numbers()
                    families = await asyncio.to_thread(meter.measure, numbers)
                    window, failed = numbers.window, False
                    new = window is not None and window.number != told
                    self._exporters.publish(families, window.ended if window and new else None)
                    told = window.number if window else told
                except Exception as error:  # no fault in what is told about the watch shall end the watch
                    said = str(error) if isinstance(error, XdpmondError) else traceback.format_exc()
                    if not failed:
                        self.report(Record(Message.METRICS_PROBLEM, f"there are no new figures for metrics: {said}"))
                    failed = True
            seconds = self._service.config.metrics.refresh if self._exporters.refreshing else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._measure_now.wait(), seconds)

    async def _numbers(self) -> Numbers:
        numbers = await self._service.measurements()
        with self._counting:
            messages = dict(self._messages)
        return dataclasses.replace(numbers, late_windows=self._late_windows, decided=self._book.decided, messages=messages,
                                   bus_connected=self._bus is not None and self._bus.connected)  # fmt: skip

    def _list_sources(self) -> Iterator[bytes]:
        """Those of the last full window. From any thread."""
        config, last = self._service.config, self._service.progress.last
        return source_list(last.rows if last else NO_ROWS, config.ports, with_local=config.show_local)

    def _read_pressure(self, tallies: Tallies) -> Pressure:
        facts: Mapping[str, Any] = self._datapath.facts()
        slices = facts["talkers_occupied"]
        return Pressure(slices, facts["talkers_capacity"] // len(slices), tallies.evicted.packets, tallies.untracked.packets)

    def _rule_counts(self, running: np.ndarray) -> RuleCounts:
        return self._book.counts(running, lost(self._datapath.tallies()))

    def _read_totals(self) -> Totals:
        return Totals(self._datapath.totals(), time.time())

    def _refresh_ports(self) -> None:
        from .kernel.sockets import ephemeral_ports, port_flags

        self._datapath.control.set_ephemeral(*ephemeral_ports())
        self._datapath.set_ports(port_flags(self._service.config.failsafe_ports))

    def _summarize(self, text: str, figures: Mapping[str, int]) -> None:
        losses = self._losses()
        held_back = losses["journal_held_back"]
        extra = f"\n{held_back} events were held back from the journal since the start" if held_back else ""
        unwritten = sum(sum(losses[name].values()) for name in ("log_queue", "log_disk"))
        extra += f"\n{unwritten} events were lost to log files since the start" if unwritten else ""
        self.report(Record(Message.SUMMARY, text + extra, {"held_back": held_back, "unwritten": unwritten, **figures}))
        self._notifier.status(self._status_line())

    # Events

    def _match(self) -> Match:
        return self._service.policy.match_rows

    def _publish(self, batch: EventBatch) -> None:
        self._service.events.publish(batch)
        self._sink.put_events(batch)
        self._logs.put(batch)
        if self._blocked.add(batch) and self._blocked_timer is None:
            self._blocked_timer = asyncio.get_running_loop().call_later(1.0, self._tell_blocked)

    def _configure_logs(self) -> None:
        config = self._service.config
        self._logs.configure(config.log if self._datapath.ring else (), config.log_buffer_size)

    def _tell_blocked(self) -> None:
        """One signal a second at most, with the sources whose packets were dropped in it."""
        self._blocked_timer = None
        self._service.notify("SourceBlocked", self._blocked.take())

    def _losses(self) -> Mapping[str, Any]:
        return {
            "queue_full": {self._sink.name: self._sink.lost} if self._sink.lost else {},
            "journal_held_back": self._sink.held_back,
            "followers": self._service.events.lost,
            "influxdb": self._exporters.lost,
            **self._logs.losses(),
            **(self._flows.losses() if self._flows else {}),
        }

    # Signals and systemd

    async def _follow_hang_ups(self) -> None:
        """SIGHUP: read the configuration again; or end, if it came because the terminal has gone. Whoever tries to enforce over SSH, and
        is cut off by it, gets in again."""
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            if self._has_terminal and not os.isatty(0):
                self._stop.set()
                return
            try:
                await self._service.reload(caller=Caller(os.getuid(), "SIGHUP"))
            except XdpmondError:
                pass  # reported where it was found
            except Exception:
                self.report(Record(Message.INTERNAL_ERROR, f"reading the configuration again failed:\n{traceback.format_exc()}"))

    def _reloading(self, active: bool) -> None:
        if active:
            self._notifier.reloading()
        else:
            self._sink.set_budget(self._service.config.journal.events_per_minute)
            self._configure_logs()
            if self._flows:
                self._flows.configure(self._service.config)
            self._exporters.configure(self._service.config)
            self._measure_now.set()
            self._window_changed.set()
            self._notifier.ready(self._status_line())

    def _status_line(self) -> str:
        service = self._service
        attached = [
            f"{state.name} ({state.attach}, {service.mode_on(state.name)})"
            for state in self._interfaces.states
            if state.state == "attached"
        ]
        others = [f"{state.name} {state.state}" for state in self._interfaces.states if state.state != "attached"]
        watched = f"watching {', '.join(attached)}" if attached else "watching nothing"
        entries = "1 entry" if len(service.policy) == 1 else f"{len(service.policy)} entries"
        return "; ".join([watched, *others, f"{entries}, default {service.default}"])
