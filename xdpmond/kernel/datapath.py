"""The packet path as the daemon holds it: programs, maps and links, from the descriptor store or made anew, behind one object.

Whatever is stored in systemd's descriptor store survives this process. So every descriptor goes there as soon as it exists, and is taken
out of it when it is given up: `Store` is how.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..config import Config
from ..errors import KernelError
from ..flowrows import talkers_of
from ..model import AttachMode, Count, Mode, Prefix, Total, Verdict
from ..rows import count_of
from ..sketches import Sketches
from . import abi, libbpf, loader
from .attach import Attached, attach, layer_of, unfit_for_native
from .costs import costs
from .events import EventRing
from .locals import Address, LocalAddresses
from .maps import Control, Counters, Tallies, cells, realtime_at_monotonic_zero, wait_for_packets_under_way
from .rules import PolicyTable, PolicyTooLarge
from .sketchtable import Key, SketchTable, busiest, ports_of_interest
from .tables import POLICY_MAPS, SMALLEST_POLICY, TALKER_MAPS, make, policy_tables
from .talkers import TalkerTable
from .verdicts import Verdicts

if TYPE_CHECKING:
    from .links import Link


class Store(Protocol):
    """The descriptor store, or nothing where there is none."""

    def keep(self, name: str, fd: int) -> None: ...

    def forget(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What was found in the store, by kind and name. Link descriptors are by ifindex as they were stored."""

    programs: Mapping[str, int]
    maps: Mapping[str, int]
    links: tuple[int, ...]
    code: int | None = None

    @classmethod
    def of(cls, stored: Iterable[tuple[str, int]]) -> Kept:
        """Sort (name, descriptor) pairs as `keep` was given them; close what has a name of ours no more."""
        programs, maps, links, code = {}, {}, [], None
        for name, fd in stored:
            kind, _, rest = name.partition("-")
            if kind == "prog" and rest not in programs:
                programs[rest] = fd
            elif kind == "map" and rest not in maps:
                maps[rest] = fd
            elif kind == "link":
                links.append(fd)
            elif kind == "code" and code is None:
                code = fd
            else:
                os.close(fd)
        return cls(programs, maps, tuple(links), code)


NOTHING_KEPT = Kept({}, {}, ())


@dataclass(frozen=True, slots=True)
class Attachment:
    """A link of ours. `slot` is its place in the totals."""

    name: str
    ifindex: int
    link: int
    slot: int
    mode: AttachMode
    reason: str
    layer: str


@dataclass(frozen=True, slots=True)
class Closed:
    """What a window held that has ended. Totals and tallies are as they were at its end: what has come while it was read is not in them."""

    totals: list[Total]
    tallies: Tallies
    at: float
    """When these two were read, in seconds since the epoch."""
    rows: np.ndarray
    """A row for each source, protocol and port: `rows.ROW`, merged."""
    flows: np.ndarray | None
    """A row for each 5-tuple, `flowrows.FLOW`, merged; None where flows are off."""
    sketches: Sketches


class Datapath:
    """Blocking calls: make them in a thread, one at a time, but for those of `control`."""

    def __init__(self, config: Config, loaded: loader.Loaded, build: loader.Build, store: Store, *, fresh: bool, took_over: bool):
        self.loaded = loaded
        self.build = build
        self.took_over = took_over
        self._store = store
        self.control = Control(loaded.maps, fresh=fresh, identity=loaded.code.identity)
        self.counters = Counters(loaded.maps, cpus=build.cpus)
        size = loader.kept_policy_size(loaded.maps) or SMALLEST_POLICY
        open_policy = PolicyTable if "policy" in loaded.reused else PolicyTable.new
        self.rules = open_policy(loaded.maps, size, self.control, wait_for_packets_under_way)
        self.talkers = TalkerTable(loaded.maps, self.control, cpus=build.cpus, sets=build.sets, flows=build.flows)
        self.sketches = SketchTable(loaded.maps, self.control.window, reading=self.control.reading)
        self._busy: list[Key] = []
        self._idle = not took_over
        """Nothing is attached yet: the ports are told first."""
        self._lost = self._lost_packets()
        self._locals = LocalAddresses(loaded.maps["locals"]) if build.local else None
        self.ring = EventRing(loaded.maps["events"]) if build.ring_bytes else None
        self._attached: dict[str, Attachment] = {}
        self._slot_names: dict[int, str] = {}
        self._retired: _Retired | None = None
        self.configure(config)

    @classmethod
    def open(cls, config: Config, kept: Kept, store: Store, keeper: loader.Keeper | None = None) -> Datapath:
        """Go on with what was kept if it is the same program; else load a new one, onto the maps whose layout is unchanged, which is then
        put in the place of the old one by updating its links. The kept policy holds until `apply_policy` is called."""
        if os.uname().machine != "x86_64":
            # kernel/talkers.py reads what another CPU writes, and counts on seeing its stores in their order.
            raise KernelError(f"xdpmond runs on x86-64 so far; this machine is {os.uname().machine}")
        build = loader.Build.of(config)
        usable = dict(kept.maps) if _same_abi(kept.maps) else {}
        code = loader.Code.kept(kept.code) if kept.code is not None else None
        ledger = _ledger(usable)
        same = code is not None and ledger is not None and int(ledger["build"]) == code.identity
        maps = {name: fd for name, fd in usable.items() if name in build.maps}
        loaded = loader.load(build, maps, code=code, programs=kept.programs if same else None, keeper=keeper)
        fresh = "control" not in loaded.reused
        retired = None if fresh or "talkers" in loaded.reused else _Retired.of(usable)
        datapath = cls(config, loaded, build, store, fresh=fresh, took_over=not fresh)
        datapath._retired = retired
        _replace(store, "map", kept.maps, {name: fd for name, fd in loaded.maps.items() if name not in loaded.reused},
                 keep_open=loaded.reused | (set(TALKER_MAPS) if retired else set()))  # fmt: skip
        _replace(store, "prog", kept.programs, {name: fd for name, fd in loaded.programs.items() if kept.programs.get(name) != fd},
                 keep_open={name for name, fd in loaded.programs.items() if kept.programs.get(name) == fd})  # fmt: skip
        if loaded.code is not code:
            _keep_code(store, loaded.code)
        if kept.code is not None:
            os.close(kept.code)
        return datapath

    @property
    def lost_rows(self) -> bool:
        """Did the last run's table of talkers give way to one of another size, with rows that nobody has read? To be asked at the start."""
        return self._retired is not None

    def configure(self, config: Config) -> None:
        """What of the configuration the packet path reads while it runs."""
        self.control.set_events(config.events.interval, config.events.per_second)
        self.control.set_window_length(config.window)
        self._ports, self._failsafe = config.ports, config.failsafe_ports

    def set_ports(self, flags: Mapping[int, int]) -> None:
        """What is known of ports, as `sockets.port_flags` says: it holds from now on, and decides which ports have sketches."""
        self.control.set_ports(flags)
        wanted = ports_of_interest(self._ports, self._failsafe, flags, self._busy)
        self.sketches.assign(wanted, self.control.window, idle=self._idle)
        self._idle = False

    # Links

    @property
    def needs_addresses(self) -> bool:
        """Has it to know which addresses are this host's own?"""
        return self._locals is not None

    def set_addresses(self, addresses: Iterable[Address]) -> None:
        """This host's own."""
        if self._locals:
            self._locals.set(addresses)

    @property
    def attachments(self) -> Mapping[str, Attachment]:
        return dict(self._attached)

    def adopt_links(self, links: Iterable[int], present: Mapping[str, Link], wanted: Mapping[str, tuple[Mode, AttachMode]]) -> list[str]:
        """Take links from the store, with a changed program put in; let go those that are dead or wanted no more. Returns the names of
        the interfaces whose program was replaced."""
        by_index = {link.ifindex: link for link in present.values()}
        replaced = []
        for fd in links:
            _, program, ifindex = libbpf.link_info(fd)
            link = by_index.get(ifindex)
            state = libbpf.query_xdp(ifindex) if link else None
            native = state is not None and state.native == program
            mode = AttachMode.NATIVE if native else AttachMode.GENERIC
            wish = wanted.get(link.name) if link else None
            unfit = native and link is not None and unfit_for_native(link.kind)
            if link is None or wish is None or wish[1] not in (AttachMode.AUTO, mode) or unfit or link.name in self._attached:
                os.close(fd)
                self._store.forget(f"link-{ifindex}")
                continue
            layer = layer_of(link.arphrd, link.name, link.kind)
            ours = self._program(layer)
            slot = self.control.take_slot(ifindex, enforce=wish[0] is Mode.ENFORCE)
            if libbpf.program_id(ours) != program:
                libbpf.update_link(fd, ours)
                replaced.append(link.name)
            reason = "" if native else "as it was attached before the restart"
            self._attached[link.name] = Attachment(link.name, ifindex, fd, slot, mode, reason, layer)
            self._slot_names[slot] = link.name
            self._store.keep(f"link-{ifindex}", fd)
        if replaced or self._retired:
            # No link runs the program any more that judged by other maps, or wrote to the old table.
            wait_for_packets_under_way()
        if replaced:
            self._forget_verdicts()
        if self._retired:
            self.control.adopt_tracked(self._retired.unread(self.control))
            self._retired = None
        for slot in range(abi.MAX_SLOTS):
            ifindex = int(self.control.block["slots"]["ifindex"][slot])
            if ifindex and ifindex not in {attached.ifindex for attached in self._attached.values()}:
                self.control.free_slot(slot)
        return replaced

    def attach(self, link: Link, mode: Mode, wanted: AttachMode) -> Attachment:
        """Attach to one interface. Raises KernelError or ForeignProgramError."""
        layer = layer_of(link.arphrd, link.name, link.kind)
        program = self._program(layer)
        slot = self.control.take_slot(link.ifindex, enforce=mode is Mode.ENFORCE, preferred=self._preferred_slot(link.name))
        try:
            done: Attached = attach(program, link.name, link.ifindex, wanted, unfit_for_native(link.kind))
        except KernelError:
            self.control.free_slot(slot)
            raise
        attachment = Attachment(link.name, link.ifindex, done.link, slot, done.mode, done.reason, layer)
        self._attached[link.name] = attachment
        self._slot_names[slot] = link.name
        self._store.keep(f"link-{link.ifindex}", done.link)
        return attachment

    def _program(self, layer: str) -> int:
        """The program for such links. That for IP is loaded, and stored, when the first of them is there: few hosts have any."""
        name = _PROGRAM_OF_LAYER[layer]
        known = name in self.loaded.programs
        program = self.loaded.program(name)
        if not known:
            self._store.keep(f"prog-{name}", program)
        return program

    def _preferred_slot(self, name: str) -> int | None:
        """The slot that the interface had, else one that no other interface ever had: totals are kept by slot."""
        had = [slot for slot, of in self._slot_names.items() if of == name]
        never = [slot for slot in range(abi.MAX_SLOTS) if slot not in self._slot_names]
        return next(iter(had + never), None)

    def release(self, name: str) -> None:
        """Let an interface go: closing the last descriptor of a link detaches it, if the interface is still there."""
        attachment = self._attached.pop(name)
        self._store.forget(f"link-{attachment.ifindex}")
        os.close(attachment.link)
        self.control.free_slot(attachment.slot)

    def is_attached(self, name: str) -> bool:
        """Does the kernel still hold our link to its interface? Somebody may have detached it by force."""
        attachment = self._attached.get(name)
        if attachment is None:
            return False
        return libbpf.link_info(attachment.link)[2] == attachment.ifindex

    def set_mode(self, name: str, mode: Mode) -> None:
        self.control.set_enforce(self._attached[name].slot, mode is Mode.ENFORCE)

    # Policy

    def apply_policy(self, policy: Verdicts, touched: Sequence[Prefix] | None, default: Verdict) -> None:
        """Let packets see this policy and default. `touched` are the prefixes by which it differs from the last one, None: all may."""
        try:
            self.rules.apply(policy, touched, default)
        except PolicyTooLarge as needed:
            try:
                self._move_policy(needed, default)
            except KernelError:
                if not needed.fits:
                    raise
                self.rules.apply(policy, touched, default, shrink=False)

    def _move_policy(self, needed: PolicyTooLarge, default: Verdict) -> None:
        """Into maps of another size: fill them, load the program onto them, and put it in the place of the one that runs, which for a
        packet is one step. If something fails, all is as it was."""
        maps: dict[str, int] = {}
        programs: dict[str, int] = {}
        rules = None
        try:
            for name, table in policy_tables(needed.size).items():
                maps[name] = make(name, table)
            rules = PolicyTable.new(maps, needed.size, self.control, wait_for_packets_under_way)
            rules.begin(needed.built, default)
            for name in self.loaded.programs:
                programs[name] = self.loaded.code.load(name, self.loaded.maps | maps)
            self._exchange(programs)
        except BaseException:
            if rules:
                rules.close()
            loader.close([*maps.values(), *programs.values()])
            raise
        old_rules, self.rules = self.rules, rules
        old = [(f"map-{name}", self.loaded.maps[name]) for name in maps]
        old += [(f"prog-{name}", fd) for name, fd in self.loaded.programs.items()]
        self.loaded.maps.update(maps)
        self.loaded.programs = programs
        for name, _ in old:
            self._store.forget(name)
        for name in POLICY_MAPS:
            self._store.keep(f"map-{name}", maps[name])
        for name, fd in programs.items():
            self._store.keep(f"prog-{name}", fd)
        old_rules.close()
        loader.close(fd for _, fd in old)

    def _exchange(self, programs: Mapping[str, int]) -> None:
        """Put these programs on all links, or on none. A link whose interface has gone takes none, and will be let go."""
        done: list[Attachment] = []
        try:
            for attachment in self._attached.values():
                if self.is_attached(attachment.name):
                    libbpf.update_link(attachment.link, programs[_PROGRAM_OF_LAYER[attachment.layer]])
                    done.append(attachment)
            wait_for_packets_under_way()
        except KernelError:
            for attachment in done:
                with contextlib.suppress(KernelError):
                    libbpf.update_link(attachment.link, self.loaded.programs[_PROGRAM_OF_LAYER[attachment.layer]])
            with contextlib.suppress(KernelError):
                wait_for_packets_under_way()
            raise
        finally:
            self._forget_verdicts()

    def _forget_verdicts(self) -> None:
        """Two programs have judged by two sets of policy maps under one number of the policy: let nobody remember what either found. To be
        called when one of them is done."""
        self.control.set_policy_copy(self.control.policy_copy)

    # Numbers

    def interface_of_slot(self, slot: int) -> str:
        return self._slot_names.get(slot, "-")

    def totals(self) -> list[Total]:
        """Cells that are not zero, also of interfaces that have gone; "-" is one that had gone when this daemon started."""
        read = self.counters.totals()
        return [
            Total(self._slot_names.get(slot, "-"), family, protocol, outcome, count)
            for slot, family, protocol, outcome, count in cells(read)
        ]

    def tallies(self) -> Tallies:
        return self.counters.tallies()

    def close_window(self) -> Closed:
        """End the running window, unless one is waiting to be read since a crash; read the closed one and enter it in the ledger."""
        control = self.control
        closed = control.before if control.reading else control.close_window(self.talkers.following(control.window))
        wait_for_packets_under_way()
        totals, tallies, at = self.totals(), self.tallies(), time.time()
        flows = self.talkers.read_closed_flows(closed) if self.talkers.flows else None
        rows = talkers_of(flows) if flows is not None else self.talkers.read_closed(closed)
        sketches = self.sketches.read(closed)
        count = count_of(rows)
        control.window_read(closed, count.packets, count.bytes)
        self.sketches.clear(closed)
        before, self._lost = self._lost, self._lost_packets()
        if before != self._lost:
            # What an estimate is needed for now may need one again.
            self._busy = busiest(rows)
        return Closed(totals, tallies, at, rows, flows, sketches)

    def _lost_packets(self) -> int:
        """Those whose talker has, or had, no place in the table."""
        tallies = self.counters.tallies()
        return tallies.evicted.packets + tallies.untracked.packets

    def read_running(self) -> np.ndarray:
        """The talkers of the running window so far, one row for each source, protocol and port."""
        return self.talkers.read_running(self.control.window)

    def read_running_flows(self) -> np.ndarray:
        """The flows of the running window so far, one row for each 5-tuple. Only if flows are on."""
        return self.talkers.read_running_flows(self.control.window)

    def read_running_sketches(self) -> Sketches:
        """How many sources there were in the running window so far, about."""
        return self.sketches.read(self.control.window)

    def facts(self) -> dict[str, object]:
        """Ids and sizes for the status."""
        links = {}
        for name, attached in self._attached.items():
            link, program, _ = libbpf.link_info(attached.link)
            links[name] = {"link_id": link, "program_id": program}
        return {
            "links": links,
            "counting_since": realtime_at_monotonic_zero() + int(self.control.ledger["started"]) / 1e9,
            "talkers_capacity": self.talkers.capacity,
            "talkers_occupied": self.talkers.occupied(),
            "maps": list(costs(self.loaded.maps)),
            "policy_size": self.rules.size._asdict(),
            "rule_cells": self.build.rule_cells,
        }

    def close(self) -> None:
        """Give everything up. Where no store holds the links, this detaches."""
        self.rules.close()
        for name in list(self._attached):
            attachment = self._attached.pop(name)
            with contextlib.suppress(OSError):
                os.close(attachment.link)
        self.loaded.close()


class _Retired:
    """A talker table that was replaced by one of another size or kind, with counts that nobody has read."""

    def __init__(self, maps: Mapping[str, int]):
        self._maps = {name: maps[name] for name in TALKER_MAPS}

    @classmethod
    def of(cls, maps: Mapping[str, int]) -> _Retired | None:
        return cls(maps) if maps.keys() >= set(TALKER_MAPS) else None

    def unread(self, control: Control) -> Count:
        """What it holds of the running window, and of the one before if that was not read. Closes the table."""
        _, _, size, sets, _ = libbpf.map_info(self._maps["talkers"])
        cpus = libbpf.possible_cpus()
        table = TalkerTable(self._maps, control, cpus=cpus, sets=sets // cpus, flows=size == abi.FLOW_SET.itemsize)
        unread = count_of(table.read_running(control.window))
        if control.reading:
            unread += count_of(table.read_closed(control.before))
        loader.close(self._maps.values())
        return unread


def _replace(store: Store, kind: str, old: Mapping[str, int], new: Mapping[str, int], *, keep_open: Iterable[str]) -> None:
    """Put new descriptors in the store in place of old ones, and close what is used no more."""
    kept = set(keep_open)
    for name, fd in old.items():
        if name in new or name not in kept:
            store.forget(f"{kind}-{name}")
        if name not in kept:
            os.close(fd)
    for name, fd in new.items():
        store.keep(f"{kind}-{name}", fd)


_PROGRAM_OF_LAYER = {"ethernet": loader.ETHERNET, "ip": loader.IP}


def _ledger(maps: Mapping[str, int]) -> np.ndarray | None:
    value = np.zeros(1, abi.LEDGER)
    if "ledger" not in maps or libbpf.map_info(maps["ledger"])[2] != abi.LEDGER.itemsize:
        return None
    libbpf.lookup(maps["ledger"], np.zeros(1, "u4"), value)
    return value[0]


def _same_abi(maps: Mapping[str, int]) -> bool:
    ledger = _ledger(maps)
    return ledger is not None and int(ledger["abi_version"]) == abi.ABI_VERSION


def _keep_code(store: Store, code: loader.Code) -> None:
    store.forget("code-xdpmond")
    fd = code.keep()
    store.keep("code-xdpmond", fd)
    os.close(fd)
