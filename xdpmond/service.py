"""The use-cases: what a person or a program can ask of the daemon, whatever the way they came by.

Every change goes the same way: read strictly, make the policy that would hold, look whether it cuts anybody off, put it in the kernel,
keep it, tell. If a step refuses, all is as it was before; only a disk that refuses does not undo what holds already, and is told. Changes
wait for each other; questions do not. What takes long with a million prefixes or talkers is done in threads, on values that nobody changes.

The kernel's side is reached through `Kernel`, whose calls block and are made in one thread, `in_kernel_thread`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from . import __version__, answers, documents, flowanswers, memory
from .answers import SHOWN_WINDOWS, Reading, View
from .config import Config, config_warnings, naming_the_place, require_force
from .config import Names as NameFiles
from .errors import (
    ConfigError,
    FileEntryError,
    GuardError,
    KernelError,
    LockOutError,
    NoSuchEntryError,
    PrefixError,
    StateError,
    UsageError,
    XdpmondError,
)
from .feeds import EventFeed, EventHub
from .flows import FlowCache
from .interfaces import DEFAULT, InterfaceState
from .measures import Numbers, Reloads
from .messages import Message, Record
from .model import Caller, Count, Entry, Mode, Origin, Prefix, RuleCounts, Total, Verdict, parse_address
from .modes import Modes
from .names import NO_NAMES, Names
from .policy import Peer, Policy, difference, guard_peers, refuse_everything
from .ports import Sketches
from .prefixes import Bulk, PrefixSet
from .prefixfile import read_prefixes
from .state import State
from .units import parse_reason
from .windows import History, Progress, Totals, Window, lost

Json = dict[str, Any]
Notify = Callable[[str, Mapping[str, Any]], None]

_LONGEST_WAIT = 60.0
"""Seconds."""
_NAMED = 100
"""Prefixes named in what is told of a change."""


class Kernel(Protocol):
    """What the use-cases need of the packet path."""

    def apply_policy(self, policy: Policy, touched: Sequence[Prefix] | None, default: Verdict) -> None:
        """`touched` are the prefixes whose effective verdict may differ from what the kernel has; None: any may."""

    def totals(self) -> list[Total]: ...
    def tallies(self) -> Any: ...
    def read_running(self) -> np.ndarray: ...
    def read_running_sketches(self) -> Sketches: ...
    def read_running_flows(self) -> np.ndarray:
        """Asked for only where flows are on."""

    def interface_of_slot(self, slot: int) -> str: ...
    def configure(self, config: Config) -> None: ...
    def facts(self) -> Mapping[str, Any]: ...


class Store(Protocol):
    def save(self, state: State) -> None: ...
    @property
    def overgrown(self) -> bool: ...
    def compact(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """The world as the service needs it; each is injected, so that tests bring their own."""

    kernel: Kernel
    store: Store
    in_kernel_thread: Callable[..., Awaitable[Any]]
    load_config: Callable[[], Config]
    peers: Callable[[Config], Iterable[Peer]]
    report: Callable[[Record], None]
    reconcile: Callable[[], Awaitable[None]]
    interface_states: Callable[[], list[InterfaceState]]
    rule_counts: Callable[[np.ndarray], RuleCounts]
    """Of all windows that have closed, and of these rows of the running one. Called in the kernel's thread."""
    losses: Callable[[], Mapping[str, Any]]
    reloading: Callable[[bool], None]
    """Told when a reload begins and when it has ended, well or not."""
    clock: Callable[[], float]
    open_names: Callable[[NameFiles], Names] = Names.open
    flows: Callable[[], Json | None] = lambda: None
    """The records of flows, as the status shows them; None: flows are off."""


class Service:
    """State and changes. Build it, then `begin` once before anything else."""

    def __init__(self, config: Config, state: State, ports: Ports, *, forced: bool = False):
        self._config = config
        self._ports = ports
        self._policy = state.policy.with_configuration(config.entries, config.lists)
        self._modes = Modes(state.mode, dict(state.interface_modes))
        self._forced = forced
        self._changing = asyncio.Lock()
        self.reading = asyncio.Lock()
        """Held while talkers are read and worked on. A million of them take 64 MB: one array at a time, however many ask."""
        self._asked = asyncio.Lock()
        self._subscribers: list[Notify] = []
        self._unconfirmed: _Unconfirmed | None = None
        self._expiry_changed = asyncio.Event()
        self._confirmation_changed = asyncio.Event()
        self._untidy = asyncio.Event()
        self._last_reload: Json = {"when": None, "ok": True, "message": ""}
        self._status: asyncio.Future[Json] | None = None
        """What those who asked wait for; the next one who asks too, until its reading begins."""
        self.events = EventHub()
        self.history = History()
        self.flow_cache = FlowCache(config.flows.records) if config.flows.enable else None
        """The records of flows, if the packet path was built to count them: a change takes effect at the next start."""
        self._names = NO_NAMES
        self._names_problem = ""
        self.progress = Progress(Totals([], ports.clock()))
        """Of the windows. Whoever ends them sets it anew."""
        self.started = ports.clock()
        self.version = __version__
        self._reloads = Reloads(last_good=self.started)

    # What the bus shows as properties

    @property
    def config(self) -> Config:
        return self._config

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def settled_policy(self) -> Policy | None:
        """The policy as the kernel has it; None while that may change."""
        return None if self._changing.locked() else self._policy

    @property
    def mode(self) -> Mode:
        return self._modes.everywhere or self._config.mode

    @property
    def file_mode(self) -> Mode:
        return self._config.mode

    @property
    def default(self) -> Verdict:
        return self._config.default

    @property
    def interfaces(self) -> Sequence[str]:
        return [state.name for state in self._ports.interface_states() if state.state == "attached"]

    @property
    def entry_count(self) -> int:
        return len(self._policy)

    @property
    def flows_enabled(self) -> bool:
        return self.flow_cache is not None

    @property
    def window_seconds(self) -> float:
        return self._config.window

    @property
    def last_window(self) -> int:
        """The number of the last full window; 0 before there is one."""
        return self.progress.last.number if self.progress.last else 0

    def mode_on(self, interface: str) -> Mode:
        return self._modes.of(self._config, interface)

    # Life

    async def begin(self) -> None:
        """Bring our policy into the kernel: before any interface is attached. What ended while no daemon ran is gone."""
        over, number, self._policy = await asyncio.to_thread(_ended, self._policy, self._ports.clock())
        await self._ports.in_kernel_thread(self._ports.kernel.apply_policy, self._policy, None, self._config.default)
        self._untidy.set()
        try:
            self._names = await asyncio.to_thread(self._ports.open_names, self._config.names)
        except ConfigError as error:
            self._names_problem = str(error)  # no reason to leave a host without its watch
        if over:
            await self._save()
            self._tell_expired(over, number)

    async def run(self) -> None:
        """Do what is due by itself: end entries, take back modes that nobody confirmed, tidy up. Ends by cancellation."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._expire_in_time(), name="expiry")
            tasks.create_task(self._revert_in_time(), name="confirmation")
            tasks.create_task(self._tidy_in_time(), name="tidying")

    async def _expire_in_time(self) -> None:
        refused = False
        while True:
            self._expiry_changed.clear()
            following = self._policy.next_expiry()
            # The wall clock may be set while we wait, so that no wait is long.
            wait = None if following is None else _LONGEST_WAIT
            if following is not None and not refused:
                wait = min(max(following - self._ports.clock(), 0), _LONGEST_WAIT)
            try:
                await asyncio.wait_for(self._expiry_changed.wait(), wait)
                refused = False
            except TimeoutError:
                try:
                    await self._expire_now()
                    refused = False
                except KernelError as error:
                    # They stay, and are tried again: an end that comes late is no reason to end the watch.
                    refused = True
                    self._report(Message.WARNING, f"entries whose time is over cannot be removed: {error}")

    async def _expire_now(self) -> None:
        async with self._changing:
            over, number, policy = await asyncio.to_thread(_ended, self._policy, self._ports.clock())
            if not over:
                return
            await self._commit(policy)
        self._tell_expired(over, number)

    def _tell_expired(self, over: Sequence[Entry], number: int) -> None:
        """`over` are some of so many."""
        for entry in over[:20]:
            text = f"{entry.verdict} {entry.prefix} has ended" + (f" ({entry.reason})" if entry.reason else "")
            self._report(Message.ENTRY_EXPIRED, text, prefix=str(entry.prefix), verdict=entry.verdict, reason=entry.reason)
        if number > 20:
            self._report(Message.ENTRY_EXPIRED, f"{number - 20} more entries have ended", count=number - 20)
        self._tell_policy("expired", [entry.prefix for entry in over], number, "", None)

    def subscribe(self, callback: Notify) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def notify(self, name: str, body: Mapping[str, Any]) -> None:
        """A signal to all subscribers; the empty name says only that properties may have changed."""
        for callback in list(self._subscribers):
            callback(name, body)

    def _report(self, message: Message, text: str, **fields: object) -> None:
        self._ports.report(Record(message, text, fields))

    # Changes of the policy

    async def change(self, verdict: Verdict, prefixes: Sequence[str], *, caller: Caller, seconds: float | None = None, reason: str = "",
                     force: bool = False, extra_peers: Sequence[str] = ()) -> Json:  # fmt: skip
        """Allow or deny prefixes: all or none. A repeated one replaces verdict, expiry and reason."""
        if not prefixes:
            raise UsageError("no prefix is given", hint="write for example 192.0.2.0/24")
        parsed = [Prefix.parse(text) for text in prefixes]
        before, notes = await self._add(verdict, PrefixSet.of(parsed), parsed, caller, seconds, reason, force, extra_peers)
        applied = [
            documents.applied(entry, replaced=any(old.origin is Origin.OPERATOR for old in before.at(entry.prefix)))
            for entry in (self._policy.at(prefix)[0] for prefix in dict.fromkeys(parsed))
        ]
        return {"applied": applied, "mode": self.mode, "notes": notes}

    async def change_from_file(self, verdict: Verdict, fd: int, *, caller: Caller, seconds: float | None = None, reason: str = "",
                               force: bool = False, extra_peers: Sequence[str] = ()) -> Json:  # fmt: skip
        """The same with the prefixes of a file: one a line, `#` begins a comment. `applied` is their number, each counted once."""
        parsed = await asyncio.to_thread(read_prefixes, fd, self._config.tables.prefixes)
        _, notes = await self._add(verdict, parsed, parsed.first(_NAMED), caller, seconds, reason, force, extra_peers)
        return {"applied": len(parsed), "mode": self.mode, "notes": notes}

    async def _add(self, verdict: Verdict, prefixes: PrefixSet, named: Sequence[Prefix], caller: Caller, seconds: float | None, reason: str,
                   force: bool, extra_peers: Sequence[str]) -> tuple[Policy, list[str]]:  # fmt: skip
        """`named` are some of the prefixes, for whoever reads about it. Returns the policy that was, and notes."""
        if verdict is Verdict.LOG:
            raise UsageError("an entry allows or denies")
        if seconds is not None and not 1 <= seconds <= 10 * 365 * 86400:
            raise UsageError(f"{seconds:g} seconds is no time to hold an entry", hint="from 1s to 3650d")
        reason = parse_reason(reason)
        with self._refusals_reported(caller):
            refuse_everything(prefixes, force)
        now = self._ports.clock()
        expires = None if seconds is None else now + seconds
        async with self._changing:
            before = self._policy
            policy = await asyncio.to_thread(before.with_bulk, Bulk(prefixes, verdict, Origin.OPERATOR, now, expires, reason))
            _require_room(before, policy, self._config)
            with self._refusals_reported(caller):
                await self._guard(policy, force, extra_peers)
            notes = await self._commit(policy)
        what = f"{named[0]}" if len(prefixes) == 1 else f"{len(prefixes)} prefixes"
        until = f" for {seconds:.0f} s" if seconds is not None else ""
        because = f": {reason}" if reason else ""
        self._report(Message.POLICY_CHANGED, f"{verdict} {what}{until} by uid {caller.uid}{because}", verdict=verdict,
                     prefix=" ".join(map(str, named[:20])), count=len(prefixes), reason=reason, caller_uid=caller.uid,
                     caller=caller.name)  # fmt: skip
        self._tell_policy(verdict, named, len(prefixes), reason, caller)
        if verdict is Verdict.DENY and self._strictest_mode() is Mode.MONITOR:
            notes.append("monitor mode: nothing is dropped; 'xdpmonctl mode enforce' drops")
        return before, notes

    async def remove(self, prefixes: Sequence[str], *, caller: Caller, force: bool = False, extra_peers: Sequence[str] = ()) -> Json:
        """Remove entries added at run time: all or none. One that stands in a file is refused, with file and line."""
        if not prefixes:
            raise UsageError("no prefix is given")
        parsed = [Prefix.parse(text) for text in prefixes]
        async with self._changing:
            doomed = []
            for prefix in dict.fromkeys(parsed):
                entries = self._policy.at(prefix)
                if not entries:
                    raise NoSuchEntryError(f"there is no entry for {prefix}", hint="see xdpmonctl list")
                own = [entry for entry in entries if entry.origin is not Origin.CONFIGURATION] or entries
                doomed += [(entry.prefix, entry.origin) for entry in own]
            before = self._policy
            with self._refusals_reported(caller):
                policy = await asyncio.to_thread(before.with_changes, remove=doomed)
                await self._guard(policy, force, extra_peers)
            notes = await self._commit(policy)
        removed = [documents.applied(entry) for prefix, origin in doomed for entry in before.at(prefix) if entry.origin is origin]
        for prefix in dict.fromkeys(parsed):
            left = self._policy.at(prefix)
            if left:
                still = "allowed" if left[0].verdict is Verdict.ALLOW else "denied"
                notes.append(f"{prefix} is still {still} by {left[0].source or left[0].origin}")
        self._report(Message.POLICY_CHANGED, f"removed {' '.join(map(str, parsed[:20]))} by uid {caller.uid}", verdict="remove",
                     prefix=" ".join(map(str, parsed[:20])), count=len(parsed), caller_uid=caller.uid, caller=caller.name)  # fmt: skip
        self._tell_policy("removed", parsed, len(parsed), "", caller)
        return {"removed": removed, "mode": self.mode, "notes": notes}

    def _tell_policy(self, what: str, prefixes: Sequence[Prefix], number: int, reason: str, caller: Caller | None) -> None:
        self.notify("PolicyChanged", {"change": str(what), "prefixes": [str(prefix) for prefix in prefixes[:_NAMED]], "count": number,
                                      "reason": reason, "uid": caller.uid if caller else -1})  # fmt: skip

    async def _guard(self, policy: Policy, force: bool, extra_peers: Sequence[str] = (), *, modes: Modes | None = None,
                     config: Config | None = None) -> None:  # fmt: skip
        """Refuse a change that cuts off somebody who is connected to a failsafe port.

        Nobody knows through which interface a peer comes, so it has to get in on each one on which it does so far.
        """
        if force:
            return
        peers = set(await asyncio.to_thread(self._ports.peers, config or self._config))
        for text in extra_peers:
            try:
                peers.add(parse_address(text))
            except PrefixError:
                continue  # a link-local address with its zone: not known to the policy
        old = self._modes_by_interface(self._modes, self._config)
        new = self._modes_by_interface(modes or self._modes, config or self._config)
        # What is not watched so far lets everybody in.
        for was, becomes in {(old.get(name, Mode.MONITOR), mode) for name, mode in new.items()}:
            guard_peers(self._policy, was, policy, becomes, sorted(peers))

    @contextlib.contextmanager
    def _refusals_reported(self, caller: Caller) -> Iterator[None]:
        """What a guard refuses stands in the journal: somebody tried."""
        try:
            yield
        except (GuardError, LockOutError, FileEntryError) as error:
            self._report(Message.CHANGE_REFUSED, f"refused: {error}", code=error.code, caller_uid=caller.uid, caller=caller.name)
            raise

    def _modes_by_interface(self, modes: Modes, config: Config) -> dict[str, Mode]:
        """Of all interfaces that are known, and of those that the configuration names."""
        names = {*self._known_interfaces(), *(name for name in config.interface if name != DEFAULT)} or {DEFAULT}
        return {name: modes.of(config, name) for name in names}

    def _strictest_mode(self, modes: Modes | None = None, config: Config | None = None) -> Mode:
        found = self._modes_by_interface(modes or self._modes, config or self._config)
        return Mode.ENFORCE if Mode.ENFORCE in found.values() else Mode.MONITOR

    def warnings(self) -> list[str]:
        """What the configuration permits but perhaps does not mean, in the modes that hold now, whoever set them."""
        interfaces = {name: replace(own, mode=None) for name, own in self._config.interfaces.items()}
        warnings = config_warnings(replace(self._config, mode=self._strictest_mode(), interfaces=interfaces))
        warnings += [self._names_problem] if self._names_problem else []
        return warnings + [f"[names]: {file} is damaged, and no names are taken from it" for file in self._names.damaged]

    async def _commit(self, policy: Policy) -> list[str]:
        """Make the policy hold, and keep it on disk. Returns notes for the caller. A full disk is one: a ban that holds until the next
        start is better than none."""
        await self._apply(policy, self._config)
        return await self._save()

    async def _apply(self, policy: Policy, config: Config) -> int:
        """Make policy and configuration hold: in the kernel, then here. Returns how many rules changed."""
        touched, changed = await asyncio.to_thread(difference, self._policy, policy)
        if changed or config.default is not self._config.default:
            await self._ports.in_kernel_thread(self._ports.kernel.apply_policy, policy, touched, config.default)
        if touched is None:
            self._untidy.set()
        self._policy, self._config = policy, config
        self._expiry_changed.set()
        return changed

    async def _save(self) -> list[str]:
        modes = self._unconfirmed.before if self._unconfirmed else self._modes
        try:
            await asyncio.to_thread(self._ports.store.save, State(self._policy.without_configuration(), modes.everywhere, dict(modes.on)))
        except StateError as error:
            self._report(Message.STATE_PROBLEM, str(error))
            return [f"not kept on disk: {error}"]
        if self._ports.store.overgrown:
            self._untidy.set()
        return []

    async def _tidy_in_time(self) -> None:
        """On disk and in memory. Nobody waits for this: changes go on meanwhile."""
        while True:
            await self._untidy.wait()
            self._untidy.clear()
            try:
                if self._ports.store.overgrown:
                    await asyncio.to_thread(self._ports.store.compact)
            except StateError as error:
                self._report(Message.STATE_PROBLEM, str(error))
            await asyncio.to_thread(memory.give_back)

    # Mode

    async def set_mode(self, mode: str, *, caller: Caller, interface: str = "", force: bool = False, confirm: float | None = None,
                       extra_peers: Sequence[str] = ()) -> Json:  # fmt: skip
        """Monitor, enforce, or default (the files' mode again), everywhere or on one interface. With `confirm`, the mode goes back by
        itself after that many seconds unless `confirm` is called."""
        if mode not in ("monitor", "enforce", "default"):
            raise UsageError(f"'{mode}' is not a mode", hint="monitor, enforce or default")
        wanted = None if mode == "default" else Mode(mode)
        if confirm is not None and not 1 <= confirm <= 86400:
            raise UsageError("the time to confirm is from 1s to 1d")
        async with self._changing:
            watched = [name for name in self._known_interfaces() if name != DEFAULT]
            if interface and interface not in watched:
                raise NoSuchEntryError(f"{interface} is not watched", hint=f"watched are: {', '.join(watched) or 'none'}")
            before, pending = self._modes, self._unconfirmed
            after = before.with_change(wanted, interface)
            with self._refusals_reported(caller):
                if self._strictest_mode(after) is Mode.ENFORCE and self._strictest_mode() is not Mode.ENFORCE:
                    require_force(self._config, force or self._forced, Mode.ENFORCE)
                await self._guard(self._policy, force, extra_peers, modes=after)
            self._modes = after
            try:
                await self._ports.reconcile()
            except BaseException:
                self._modes = before
                await self._reconcile_again()
                raise
            self._await_confirmation(pending, before, wanted, interface, confirm)
            notes = await self._save()
        shown = self.mode_on(interface) if interface else self.mode
        self._tell_mode(shown, interface, f"uid {caller.uid}", caller.uid)
        notes += self.warnings() if shown is Mode.ENFORCE else []
        return {"mode": shown, "file_mode": self.file_mode, "interface": interface, "confirm_seconds": confirm, "notes": notes}

    async def _reconcile_again(self) -> None:
        """After what was refused: some of it may be in the packet path already. What fails here, too, is put right when a window ends."""
        with contextlib.suppress(KernelError):
            await self._ports.reconcile()

    def _await_confirmation(self, pending: _Unconfirmed | None, before: Modes, wanted: Mode | None, interface: str,
                            confirm: float | None) -> None:  # fmt: skip
        """Remember what the modes go back to. A change of one interface leaves what waits for the others waiting."""
        if confirm is not None:
            ends = asyncio.get_running_loop().time() + confirm
            self._unconfirmed = _Unconfirmed(pending.before if pending else before, interface, ends)
        elif pending:
            back = pending.before.with_change(wanted, interface)
            self._unconfirmed = None if back == self._modes else replace(pending, before=back)
        self._confirmation_changed.set()

    def _known_interfaces(self) -> list[str]:
        return [state.name for state in self._ports.interface_states()]

    def _tell_mode(self, mode: Mode, interface: str, who: str, uid: int) -> None:
        where = f" on {interface}" if interface else ""
        self._report(Message.MODE_CHANGED, f"{mode} mode{where}, by {who}", mode=mode, interface=interface, caller_uid=uid)
        self.notify("ModeChanged", {"mode": str(mode), "interface": interface, "by": who})

    async def _revert_in_time(self) -> None:
        """Take back a mode that nobody confirms. By the loop's time: a wall clock that is set back must not prolong it."""
        while True:
            self._confirmation_changed.clear()
            pending = self._unconfirmed
            wait = None if pending is None else max(pending.ends - asyncio.get_running_loop().time(), 0)
            try:
                await asyncio.wait_for(self._confirmation_changed.wait(), wait)
            except TimeoutError:
                await self._revert(pending)

    async def _revert(self, pending: _Unconfirmed | None) -> None:
        async with self._changing:
            if pending is None or self._unconfirmed is not pending:
                return  # confirmed, or changed, in the last moment
            self._modes, self._unconfirmed = pending.before, None
            await self._ports.reconcile()
            await self._save()
        mode = self.mode_on(pending.interface) if pending.interface else self.mode
        self._tell_mode(mode, pending.interface, "the time to confirm having passed", 0)

    async def confirm(self, *, caller: Caller) -> Json:
        """Keep the mode that waits to be confirmed."""
        async with self._changing:
            pending, self._unconfirmed = self._unconfirmed, None
            if pending is None:
                raise NoSuchEntryError("no change waits to be confirmed")
            self._confirmation_changed.set()
            notes = await self._save()
        return {"mode": self.mode, "notes": notes}

    # Configuration

    async def reload(self, *, caller: Caller, force: bool = False) -> Json:
        """Read all files again and apply the difference. What is refused changes nothing. `force`: even if it cuts off somebody who is
        connected to a failsafe port."""
        async with self._changing:
            self._ports.reloading(True)
            try:
                changed, notes = await self._reload(force)
            except Exception as error:
                said = str(error) if isinstance(error, XdpmondError) else f"internal error: {error!r}"
                self._last_reload = {"when": self._ports.clock(), "ok": False, "message": said}
                self._reloads = replace(self._reloads, refused=self._reloads.refused + 1, ok=False)
                code = error.code if isinstance(error, XdpmondError) else XdpmondError.code
                self._report(Message.RELOAD_REFUSED, f"the configuration is refused, the old settings stay: {said}", code=code)
                self.notify("", {})
                raise
            finally:
                self._ports.reloading(False)
                self._untidy.set()
            message = f"configuration read again: {changed} rule{'s' if changed != 1 else ''} changed"
            self._last_reload = {"when": self._ports.clock(), "ok": True, "message": message}
            self._reloads = replace(self._reloads, good=self._reloads.good + 1, last_good=self._ports.clock(), ok=True)
        self._report(Message.RELOADED, "; ".join([message, *notes]), changed=changed, caller_uid=caller.uid)
        self.notify("PolicyChanged", {"change": "reload", "prefixes": [], "count": changed, "reason": "", "uid": caller.uid})
        return {"message": message, "notes": notes, "changed": changed}

    async def _reload(self, force: bool) -> tuple[int, list[str]]:
        """Returns how many rules changed, and notes."""
        config = await asyncio.to_thread(self._ports.load_config)
        mode = self._strictest_mode(config=config)
        was_so = self._config.default is config.default and self._strictest_mode() is mode
        require_force(config, self._forced or was_so, mode)
        policy = await asyncio.to_thread(self._policy.with_configuration, config.entries, config.lists)
        _require_room(self._policy, policy, config)
        with naming_the_place(config):
            names = await asyncio.to_thread(self._ports.open_names, config.names)
        try:
            await self._guard(policy, force, config=config)
        except LockOutError as error:
            raise LockOutError(error.message, hint="allow it in the configuration, or use xdpmonctl reload --force") from None
        before = self._policy, self._config
        changed = await self._apply(policy, config)
        try:
            await self._ports.in_kernel_thread(self._ports.kernel.configure, config)
            await self._ports.reconcile()
        except BaseException:
            await self._apply(*before)
            await self._ports.in_kernel_thread(self._ports.kernel.configure, before[1])
            await self._reconcile_again()
            raise
        self._names, self._names_problem = names, ""
        notes = documents.restart_notes(before[1], config) + self.warnings()
        if policy.count(Origin.AUTOMATIC) != before[0].count(Origin.AUTOMATIC):
            notes += await self._save()  # the files allow now what was banned
        return changed, notes

    # Windows

    def window_closed(self, window: Window, now: Totals, tracked: Count, lost: int) -> None:
        """The running window has ended, and its sources were counted. The rest is as for `Progress.closed`."""
        self.progress = self.progress.closed(window, now, tracked, lost)
        past = self.progress.past()
        assert past is not None
        self.history.add(past)
        self.notify("WindowClosed", documents.past(past))

    # Questions

    @contextlib.asynccontextmanager
    async def _turn_to_read(self) -> AsyncIterator[None]:
        """Hold `reading` for somebody who asks. They wait for each other before: a window that ends waits for one of them at most."""
        async with self._asked, self.reading:
            yield

    def _view(self) -> View:
        """All of ours that the answers are made from. Taken in the turn of the loop in which the numbers of the kernel's side arrive: the
        next one may have another window."""
        return View(self._config, self._policy, self._modes, self._strictest_mode(), self.progress, self._ports.clock(), self._names)

    async def status(self) -> Json:
        """The document of `xdpmonctl status --json`; its keys are stable. All who ask before a reading begins share it."""
        if self._status is None:
            self._status = asyncio.ensure_future(self._make_status())
            self._status.add_done_callback(lambda made: made.cancelled() or made.exception())  # who asked may have gone
        return await asyncio.shield(self._status)

    async def _make_status(self) -> Json:
        kernel = self._ports.kernel

        def read() -> Reading:
            before, running, sketches = kernel.tallies(), kernel.read_running(), kernel.read_running_sketches()
            return Reading(before, running, Totals(kernel.totals(), self._ports.clock()), kernel.tallies(), kernel.facts(), sketches)

        async with self._turn_to_read():
            self._status = None
            reading = await self._ports.in_kernel_thread(read)
            view, states, losses, waiting = self._view(), self._ports.interface_states(), self._ports.losses(), self._pending_confirmation()
            last_reload, warnings, flows = self._last_reload, self.warnings(), self._ports.flows()
            traffic = await asyncio.to_thread(answers.traffic, view, reading, self.history.last(SHOWN_WINDOWS))
        return {
            "version": self.version,
            "running_since": self.started,
            "uptime_seconds": self._ports.clock() - self.started,
            **answers.settings(view),
            "confirm": waiting,
            "interfaces": [documents.interface(state, view.modes.of(view.config, state.name), reading.facts) for state in states],
            **traffic,
            "flows": flows,
            "losses": {**traffic["losses"], **losses},
            "last_reload": last_reload,
            "configuration": {"files": list(view.config.files), "warnings": warnings},
        }

    async def measurements(self) -> Numbers:
        """What metrics are made from. Talkers are not read for it: it is asked every few seconds."""
        kernel = self._ports.kernel

        def read() -> tuple[list[Total], Any, Mapping[str, Any]]:
            return kernel.totals(), kernel.tallies(), kernel.facts()

        totals, tallies, facts = await self._ports.in_kernel_thread(read)
        view, states, policy = self._view(), self._ports.interface_states(), self._policy
        return Numbers(
            at=self._ports.clock(), version=self.version, started=self.started, config=view.config, mode=self.mode,
            modes={state.name: view.modes.of(view.config, state.name) for state in states}, totals=totals, tallies=tallies, facts=facts,
            tracked=view.progress.tracked, interfaces=states, losses=self._ports.losses(), reloads=self._reloads, window=view.progress.last,
            entries={(verdict, origin): policy.count(origin, verdict) for verdict in (Verdict.ALLOW, Verdict.DENY) for origin in Origin},
        )  # fmt: skip

    def _pending_confirmation(self) -> Json | None:
        if self._unconfirmed is None:
            return None
        return {
            "mode": self._unconfirmed.before.everywhere or self._config.mode,
            "seconds_left": round(max(0.0, self._unconfirmed.ends - asyncio.get_running_loop().time()), 3),
        }

    async def entries(self) -> Iterable[str]:
        """Every entry as JSON, by family, prefix, and strength of origin. Made as it is read, which a thread may do."""
        async with self._turn_to_read():
            *_, counts = await self._ports.in_kernel_thread(self._read_rules)
        loop, policy = asyncio.get_running_loop(), self._policy

        def listed() -> Iterator[str]:
            try:
                yield from answers.entries(policy, counts)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._untidy.set)

        return listed()

    def _read_running(self) -> tuple[np.ndarray, int]:
        """The talkers of the running window, and the packets that have found no talker since the counting began."""
        kernel = self._ports.kernel
        return kernel.read_running(), lost(kernel.tallies())

    def _read_rules(self) -> tuple[np.ndarray, int, RuleCounts]:
        running, losses = self._read_running()
        return running, losses, self._ports.rule_counts(running)

    async def explain(self, address: str) -> Json:
        """Which entry decides on an address, what would be done with its packets, and what came from it lately."""
        family, packed = parse_address(address)
        async with self._turn_to_read():
            running, losses, counts = await self._ports.in_kernel_thread(self._read_rules)
            return await asyncio.to_thread(answers.explain, self._view(), family, packed, counts, running, self.progress.exact(losses))

    async def top(self, *, by: str = "bytes", limit: int = 20, port: int | None = None, protocol: str | None = None,
                  interval: bool = False, local: bool | None = None, prefix_length: int | None = None,
                  prefix_length6: int | None = None) -> Iterable[Json]:  # fmt: skip
        """The strongest talkers of the last full window and the running one; `interval`: of the last full window alone. With lengths of
        prefixes, the strongest networks. Made as it is read, which a thread may do."""
        wanted = answers.Wanted.parse(by, limit, port, protocol, local=local, prefix_length=prefix_length, prefix_length6=prefix_length6)
        async with self._turn_to_read():
            running, losses = (None, None) if interval else await self._ports.in_kernel_thread(self._read_running)
            exact = self.progress.exact(self.progress.lost if losses is None else losses)
            return await asyncio.to_thread(answers.top, self._view(), running, wanted, exact)

    async def ports(self, *, limit: int = 100, port: int | None = None, protocol: str | None = None, interval: bool = False,
                    local: bool | None = None) -> Iterable[Json]:  # fmt: skip
        """The ports with the most sources, in the last full window and the running one, and their total; `interval`: of the last full
        window alone. Made as it is read."""
        wanted = answers.WantedPorts.parse(limit, local, port, protocol)

        def read() -> tuple[np.ndarray, Sketches, int]:
            return self._ports.kernel.read_running(), self._ports.kernel.read_running_sketches(), lost(self._ports.kernel.tallies())

        async with self._turn_to_read():
            running, sketches, losses = (None, None, 0) if interval else await self._ports.in_kernel_thread(read)
            return await asyncio.to_thread(answers.ports, self._view(), running, wanted, sketches, self.progress.running_exact(losses))

    async def flows(self, *, by: str = "bytes", limit: int = 20, port: int | None = None, protocol: str | None = None,
                    address: str | None = None) -> Iterable[Json]:  # fmt: skip
        """The strongest flows, each since its record began. Made as it is read."""
        wanted = flowanswers.WantedFlows.parse(by, limit, port, protocol, address)
        if self.flow_cache is None:
            raise XdpmondError("flows are off", hint="set enable = true in [flows] of the configuration, and restart xdpmond")
        kernel = self._ports.kernel

        def read() -> tuple[np.ndarray, int]:
            return kernel.read_running_flows(), lost(kernel.tallies())

        async with self._turn_to_read():
            running, losses = await self._ports.in_kernel_thread(read)
            now, progress, inactive = self._ports.clock(), self.progress, self._config.flows.inactive_timeout
            started = progress.last.ended if progress.last else progress.began.at
            inexact_until = progress.inexact_until if progress.running_exact(losses) else now
            return await asyncio.to_thread(flowanswers.flows, self.flow_cache, running, started, wanted, now=now, inactive=inactive,
                                           inexact_until=inexact_until, interface=kernel.interface_of_slot)  # fmt: skip

    async def windows(self, *, limit: int = 60) -> Iterable[Json]:
        """The last windows that have closed, the oldest first."""
        return map(documents.past, self.history.last(limit))

    async def recent_events(self, limit: int) -> Iterable[Json]:
        return [dict(event) for event in self.events.recent(limit)]

    def follow_events(self) -> EventFeed:
        return self.events.follow()


def _require_room(before: Policy, after: Policy, config: Config) -> None:
    """Refuse what would make the policy larger than it may be. A smaller one is welcome however large it still is."""
    if len(after) > max(len(before), config.tables.prefixes):
        message = f"the policy would hold {len(after)} entries, and tables.prefixes is {config.tables.prefixes}"
        raise XdpmondError(message, hint="remove some, or raise that")


def _ended(policy: Policy, now: float) -> tuple[list[Entry], int, Policy]:
    """Some of the entries whose time is over, the number of all, and the policy without them."""
    over = policy.expired(now, _NAMED)
    left = policy.without_expired(now)
    return over, len(policy) - len(left), left


@dataclass(frozen=True, slots=True)
class _Unconfirmed:
    """What the modes go back to unless the change is confirmed; the interface that was changed, if one; and when, by the loop's time."""

    before: Modes
    interface: str
    ends: float
