"""Answers to questions, as pure functions of what was known at one moment.

The service takes a `View` of itself and a `Reading` of the packet path, both of values that nobody changes. So an answer over a hundred
thousand talkers or a million prefixes is work for a thread, and what changes meanwhile cannot make it contradict itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from . import documents
from .config import Config
from .errors import UsageError
from .model import PROTOCOL_NAMES, Action, Family, Mode, PortRange, Prefix, RuleCounts, Verdict, format_address
from .modes import Modes
from .names import NO_NAMES, Names
from .policy import Policy
from .ports import PortCounts, Sketches, count_ports, estimated, on_ports
from .rows import NO_ROWS, WITH_PORTS, Where, is_local, merge, of_source, strongest, strongest_networks, survey
from .windows import Past, Progress, Totals, lost

Json = dict[str, Any]

MOST_ROWS = 100_000
MIXED = "mixed"
"""The verdict or the rule of a network that has several."""
SHOWN_PORTS = 5
SHOWN_WINDOWS = 60
"""In the status."""
_BY = {"bytes": "bytes", "packets": "packets", "syn": "syns", "syns": "syns"}
_PROTOCOLS = {name: number for number, name in PROTOCOL_NAMES.items()}


@dataclass(frozen=True, slots=True)
class View:
    """The service at one moment."""

    config: Config
    policy: Policy
    modes: Modes
    strictest: Mode
    """Of the modes of all interfaces."""
    progress: Progress
    now: float = 0.0
    names: Names = NO_NAMES

    @property
    def default(self) -> Verdict:
        return self.config.default

    @property
    def seconds(self) -> float:
        """What the last full window and the running one cover together."""
        last = self.progress.last
        return self.now - (last.started if last else self.progress.began.at)

    def shower(self, exact: bool, seconds: float, bits: Mapping[Family, int] | None = None) -> Shower:
        return Shower(self.policy, self.default, self.names, exact, seconds, bits or {})


@dataclass(frozen=True, slots=True)
class Shower:
    """Makes documents of rows. It knows what that takes, and not the view, in which there are all talkers."""

    policy: Policy
    default: Verdict
    names: Names
    exact: bool
    seconds: float
    bits: Mapping[Family, int]
    """How long the networks are that the rows are sums of."""
    _decided: dict[Prefix, tuple[str, str]] = field(default_factory=dict)

    def __call__(self, row: np.void) -> Json:
        family = Family(int(row["family"]))
        packed = row["source"].tobytes()[: family.bits // 8]
        length = self.bits.get(family)
        verdict, rule = self._decision(family, packed, length)
        return documents.talker(row, verdict, rule, partial=not self.exact, seconds=self.seconds, length=length,
                                name=self.names.of(family, packed, length))  # fmt: skip

    def _decision(self, family: Family, packed: bytes, length: int | None) -> tuple[str, str]:
        """Verdict and rule."""
        if length is None:
            entry = self.policy.match(family, packed)
            return (entry.verdict, str(entry.prefix)) if entry else (self.default, "default")
        prefix = Prefix(family, packed, length)
        if prefix not in self._decided:
            self._decided[prefix] = self._of_network(prefix)
        return self._decided[prefix]

    def _of_network(self, prefix: Prefix) -> tuple[str, str]:
        entry = self.policy.over(prefix)
        verdict, rule = (entry.verdict, str(entry.prefix)) if entry else (self.default, "default")
        if not self.policy.any_inside(prefix, prefix.length + 1, prefix.family.bits):
            return verdict, rule
        return MIXED if self.policy.any_other_inside(prefix, verdict) else verdict, MIXED


@dataclass(frozen=True, slots=True)
class Reading:
    """The packet path's numbers, read one after the other while it goes on: tallies, talkers of the running window, totals, tallies
    again."""

    before: Any
    running: np.ndarray
    totals: Totals
    after: Any
    facts: Mapping[str, Any]
    sketches: Sketches | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which talkers, and in which order. `local` None: as the configuration says; `bits`: the lengths of the networks to sum up."""

    by: str
    limit: int
    port: int | None
    protocol: int | None
    local: bool | None = None
    bits: Mapping[Family, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, by: str, limit: int, port: int | None, protocol: str | None, *, local: bool | None = None,
              prefix_length: int | None = None, prefix_length6: int | None = None) -> Wanted:  # fmt: skip
        if by not in _BY:
            raise UsageError(f"'{by:.40}' is nothing to sort by", hint="bytes, packets or syn")
        bits = {}
        for family, length in ((Family.IPV4, prefix_length), (Family.IPV6, prefix_length6)):
            if length is None:
                continue
            if length > family.bits:
                raise UsageError(f"{length} is no length of a prefix", hint=f"0 to {family.bits} for {family.label}")
            bits[family] = length
        return cls(_BY[by], min(max(limit, 1), MOST_ROWS), port, protocol_of(protocol, port), local, bits)

    def where(self, rows: np.ndarray) -> np.ndarray:
        return reaching(rows, self.protocol, self.port)


@dataclass(frozen=True, slots=True)
class WantedPorts:
    """Which ports. `within` none: all that the configuration names."""

    limit: int
    local: bool | None
    within: tuple[PortRange, ...]

    @classmethod
    def parse(cls, limit: int, local: bool | None, port: int | None, protocol: str | None) -> WantedPorts:
        number = protocol_of(protocol, port)
        low, high = (0, 65535) if port is None else (port, port)
        within = () if port is None and number is None else (PortRange(number, low, high),)
        return cls(min(max(limit, 1), MOST_ROWS), local, within)


def reaching(rows: np.ndarray, protocol: int | None, port: int | None) -> np.ndarray:
    """A mask of the talkers or flows of this protocol, and to this port."""
    mask = np.ones(len(rows), bool)
    if protocol is not None:
        mask &= rows["protocol"] == protocol
    if port is not None:
        mask &= (rows["port"] == port) & np.isin(rows["protocol"], WITH_PORTS)
    return mask


def protocol_of(text: str | None, port: int | None) -> int | None:
    """The number of a protocol that is named or numbered; with a port it must be one that has them."""
    if text is None:
        return None
    number = int(text) if re.fullmatch("[0-9]{1,3}", text) else _PROTOCOLS.get(text)
    if number is None or number > 255:
        raise UsageError(f"'{text:.40}' is not a protocol", hint=f"{', '.join(_PROTOCOLS)} or a number up to 255")
    if port is not None and number not in WITH_PORTS:
        raise UsageError(f"{text} has no ports", hint="leave out the port")
    return number


def settings(view: View) -> Json:
    """The part of the status that is decided, not measured."""
    return {
        "mode": view.modes.everywhere or view.config.mode,
        "file_mode": view.config.mode,
        "mode_source": "operator" if view.modes != Modes() else "file",
        "default": view.default,
        "policy": documents.policy(view.policy),
    }


def traffic(view: View, reading: Reading, history: Sequence[Past] = ()) -> Json:
    """The part of the status that is measured."""
    progress, after = view.progress, reading.after
    recent, exact = progress.recent(reading.running, "packets", 5), progress.exact(lost(after))
    unique = estimated(recent.unique, exact, progress.sketches(reading.sketches))
    shower = view.shower(exact, view.seconds)
    running = count_ports(reading.running, view.config.ports, exact=progress.running_exact(lost(after)), sketches=reading.sketches)
    return {
        "counting_since": reading.facts["counting_since"],
        "totals": documents.totals(reading.totals),
        "rates": documents.rates(progress.since(reading.totals.at), reading.totals),
        "books": documents.books(reading.before, after, progress.tracked, reading.running),
        "window": documents.window(progress.last, unique, view.config.window),
        "windows": [documents.past(of) for of in history],
        "ports": list(islice(_ports(_closed(view), running, local=view.config.show_local), SHOWN_PORTS)),
        "top": [shower(row) for row in strongest(recent.strongest, "packets", 5)],
        "tables": documents.tables(reading.facts, after, view.policy, view.config.tables),
        "maps": documents.maps(reading.facts),
        "events": {"made": after.events_made},
        "losses": {"ring_full": after.ring_full, "over_budget": after.over_budget, "merged": after.merged},
        "anomalies": {name: number for name, number in after.anomalies.items() if number},
    }


def entries(policy: Policy, counts: RuleCounts) -> Iterator[str]:
    """All entries, each as a line of JSON. Most of a million have all but the prefix in common: that is encoded once."""
    frames: dict[Any, list[str]] = {}
    for family, address, length, rest, line, effective in policy.listed():
        prefix = Prefix(family, address, length) if counts.counts else _NO_PREFIX
        if prefix in counts.counts:
            yield _encode(documents.entry(rest.entry(prefix, line), effective, counts.get(prefix)))
            continue
        alike = (family, rest, effective, line > 0)
        frame = frames.get(alike)
        if frame is None:
            if len(frames) >= _MOST_FRAMES:
                frames.clear()
            document = documents.entry(rest.entry(Prefix(family, bytes(family.bits // 8), 0)), effective, counts.others)
            # Whatever texts there are come behind these two. Neither a prefix nor a number has to be escaped.
            file, document["prefix"] = _encode(document["source"])[1:-1], _GAP
            if line:
                document["source"] = _GAP
            frame = frames[alike] = _encode(document).split(_encode(_GAP)[1:-1], 2 if line else 1)
            if line:
                frame[1] += f"{file}:"
        text = f"{frame[0]}{format_address(family, address)}/{length}{frame[1]}"
        yield f"{text}{line}{frame[2]}" if line else text


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_GAP = "\0"
_MOST_FRAMES = 1024
_NO_PREFIX = Prefix(Family.OTHER, b"", 0)


def explain(view: View, family: Family, packed: bytes, counts: RuleCounts, running: np.ndarray, exact: bool) -> Json:
    """`exact`: no talker was lost in the last window and the running one."""
    policy, mode = view.policy, view.strictest
    covering = policy.explain(family, packed)
    verdict = covering[0].verdict if covering else view.default
    reported = Action.DROP if verdict is Verdict.DENY and mode is Mode.ENFORCE else Action.LOG
    action = Action.PASS if verdict is Verdict.ALLOW else reported
    last = view.progress.last
    own = [of_source(rows, family, packed) for rows in ([last.rows] if last else []) + [running]]
    effective = [before is None or before.prefix != entry.prefix for before, entry in zip([None, *covering], covering, strict=False)]
    shower = view.shower(exact, view.seconds)
    explained = [documents.entry(entry, first, counts.get(entry.prefix)) for entry, first in zip(covering, effective, strict=True)]
    return {
        "address": format_address(family, packed),
        "family": family.label,
        **documents.named(view.names.of(family, packed)),
        "verdict": verdict,
        "action": action,
        "decided_by": explained[0] if explained else None,
        "default": view.default,
        "mode": mode,
        "covering": explained,
        "talkers": [shower(row) for row in strongest(merge(*own), "packets", 20)],
        "text": documents.explanation(covering[0] if covering else None, view.default, mode),
    }


def top(view: View, running: np.ndarray | None, wanted: Wanted, exact: bool) -> Iterator[Json]:
    """The strongest talkers, or networks; then how many local sources were left out, if any were. Without `running` of the last full window
    alone."""
    last = view.progress.last
    parts = [last.rows if last else NO_ROWS, NO_ROWS if running is None else running]
    seconds = view.seconds if running is not None else last.seconds if last else 0.0
    local = view.config.show_local if wanted.local is None else wanted.local
    hidden = {} if local else survey(*parts, where=lambda rows: wanted.where(rows) & is_local(rows)).unique
    where: Where = wanted.where if local else lambda rows: wanted.where(rows) & ~is_local(rows)
    if wanted.bits:
        found = strongest_networks(*parts, bits=wanted.bits, by=wanted.by, limit=wanted.limit, where=where)
    else:
        found = survey(*parts, by=wanted.by, limit=wanted.limit, where=where).strongest
    found = strongest(found, wanted.by, wanted.limit)
    # Whoever takes them takes his time: what he holds must not be the view, in which there are all talkers.
    return _shown(found, view.shower(exact, seconds, wanted.bits), hidden)


def _shown(rows: np.ndarray, shower: Shower, hidden: Mapping[Family, int]) -> Iterator[Json]:
    yield from map(shower, rows)
    if any(hidden.values()):
        yield {"hidden": {"local": documents.hidden_sources(hidden)}}


def ports(view: View, running: np.ndarray | None, wanted: WantedPorts, sketches: Sketches | None, exact: bool) -> Iterator[Json]:
    """The ports with the most sources, then the total of all. Without `running` of the last full window alone; `exact` is said of that."""
    local = view.config.show_local if wanted.local is None else wanted.local
    config, last, closed = view.config.ports, view.progress.last, _closed(view, wanted.within)
    now = None if running is None else count_ports(running, config, within=wanted.within, exact=exact, sketches=sketches)
    tables = [closed] if now is None else [closed, now]
    hidden: Mapping[Family, int] = {}
    if not local:
        reached = on_ports(np.concatenate([of.cells["key"] for of in tables]))
        parts = [last.rows if last else NO_ROWS, NO_ROWS if running is None else running]
        hidden = survey(*parts, where=lambda rows: reached(rows) & is_local(rows)).unique
    left_out = len(np.unique(np.concatenate([of.others for of in tables])))
    total = documents.ports_total(closed, now, local=local, hidden=hidden, left_out=left_out)
    return chain(islice(_ports(closed, now, local=local), wanted.limit), [total])


def _closed(view: View, within: tuple[PortRange, ...] = ()) -> PortCounts:
    """The ports of the last full window; counted again where it was counted by other settings."""
    last, ranges = view.progress.last, view.config.ports
    if last is None:
        return PortCounts(ranges)
    if not within and last.ports.ranges == ranges:
        return last.ports
    return count_ports(last.rows, ranges, within=within, exact=last.exact, sketches=last.sketches)


def _ports(closed: PortCounts, now: PortCounts | None, *, local: bool) -> Iterator[Json]:
    """Those with the most sources in either window first; without those that only hidden sources reached."""
    tables = [closed] if now is None else [closed, now]
    keys = np.unique(np.concatenate([of.cells["key"] for of in tables]))
    most = np.zeros(len(keys), "u8")
    for of in tables:
        number = of.cells["all"]["ipv4"] + of.cells["all"]["ipv6"]
        if not local:
            number = number - of.cells["local"]["ipv4"] - of.cells["local"]["ipv6"]
        at = np.searchsorted(keys, of.cells["key"])
        most[at] = np.maximum(most[at], number)
    order = np.lexsort((keys, most.max(initial=0) - most))
    shown = keys[order[most[order] > 0]]
    return (documents.port(closed.of(key), now.of(key) if now is not None else None, local=local) for key in map(int, shown))
