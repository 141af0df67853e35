"""Answers to questions, as pure functions of what was known at one moment.

The service takes a `View` of itself and a `Reading` of the packet path, both of values that nobody changes. So an answer over a hundred
thousand talkers or a million prefixes is work for a thread, and what changes meanwhile cannot make it contradict itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import documents
from .config import Config
from .errors import UsageError
from .model import PROTOCOL_NAMES, Action, Family, Mode, Prefix, RuleCounts, Verdict, format_address
from .modes import Modes
from .policy import Policy
from .rows import WITH_PORTS, merge, of_source, strongest
from .windows import Progress, Totals, lost

Json = dict[str, Any]

MOST_ROWS = 100_000
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

    @property
    def default(self) -> Verdict:
        return self.config.default

    def talker(self, row: np.void, exact: bool) -> Json:
        return _talker(self.policy, self.default, exact, row)


def _talker(policy: Policy, default: Verdict, exact: bool, row: np.void) -> Json:
    family = Family(int(row["family"]))
    entry = policy.match(family, row["source"].tobytes()[: family.bits // 8])
    return documents.talker(row, entry.verdict if entry else default, str(entry.prefix) if entry else "default", not exact)


@dataclass(frozen=True, slots=True)
class Reading:
    """The packet path's numbers, read one after the other while it goes on: tallies, talkers of the running window, totals, tallies
    again."""

    before: Any
    running: np.ndarray
    totals: Totals
    after: Any
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which talkers, and in which order."""

    by: str
    limit: int
    port: int | None
    protocol: int | None

    @classmethod
    def parse(cls, by: str, limit: int, port: int | None, protocol: str | None) -> Wanted:
        if by not in _BY:
            raise UsageError(f"'{by:.40}' is nothing to sort by", hint="bytes, packets or syn")
        number = None
        if protocol is not None:
            number = int(protocol) if re.fullmatch("[0-9]{1,3}", protocol) else _PROTOCOLS.get(protocol)
            if number is None or number > 255:
                raise UsageError(f"'{protocol:.40}' is not a protocol", hint=f"{', '.join(_PROTOCOLS)} or a number up to 255")
        return cls(_BY[by], min(max(limit, 1), MOST_ROWS), port, number)


def settings(view: View) -> Json:
    """The part of the status that is decided, not measured."""
    return {
        "mode": view.modes.everywhere or view.config.mode,
        "file_mode": view.config.mode,
        "mode_source": "operator" if view.modes != Modes() else "file",
        "default": view.default,
        "policy": documents.policy(view.policy),
    }


def traffic(view: View, reading: Reading) -> Json:
    """The part of the status that is measured."""
    progress, after = view.progress, reading.after
    recent, exact = progress.recent(reading.running, "packets", 5), progress.exact(lost(after))
    return {
        "counting_since": reading.facts["counting_since"],
        "totals": documents.totals(reading.totals),
        "rates": documents.rates(progress.since(reading.totals.at), reading.totals),
        "books": documents.books(reading.before, after, progress.tracked, reading.running),
        "window": documents.window(progress.last, recent.unique, view.config.window, exact=exact),
        "top": [view.talker(row, exact) for row in strongest(recent.strongest, "packets", 5)],
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
    explained = [documents.entry(entry, first, counts.get(entry.prefix)) for entry, first in zip(covering, effective, strict=True)]
    return {
        "address": format_address(family, packed),
        "family": family.label,
        "verdict": verdict,
        "action": action,
        "decided_by": explained[0] if explained else None,
        "default": view.default,
        "mode": mode,
        "covering": explained,
        "talkers": [view.talker(row, exact) for row in strongest(merge(*own), "packets", 20)],
        "text": documents.explanation(covering[0] if covering else None, view.default, mode),
    }


def top(view: View, running: np.ndarray, wanted: Wanted, exact: bool) -> Iterable[Json]:
    def where(rows: np.ndarray) -> np.ndarray:
        mask = np.ones(len(rows), bool)
        if wanted.protocol is not None:
            mask &= rows["protocol"] == wanted.protocol
        if wanted.port is not None:
            mask &= (rows["port"] == wanted.port) & np.isin(rows["protocol"], WITH_PORTS)
        return mask

    found = strongest(view.progress.recent(running, wanted.by, wanted.limit, where).strongest, wanted.by, wanted.limit)
    # Whoever takes them takes his time: what he holds must not be the view, in which there are all talkers.
    return map(partial(_talker, view.policy, view.default, exact), found)
