"""What the service answers, as dicts that JSON can hold. The keys are a contract: programs read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .config import Config, Tables
from .interfaces import InterfaceState
from .model import Count, Entry, Family, Mode, Origin, Outcome, RuleCount, Verdict, protocol_name
from .names import Name
from .policy import Policy
from .ports import PortCount, PortCounts, Unique, shown
from .rows import count_of
from .rows import talker as to_talker
from .windows import Past, Totals, Window, by_family, by_protocol, lost

Json = dict[str, Any]


def count(of: Count) -> Json:
    return {"packets": of.packets, "bytes": of.bytes}


def applied(entry: Entry, *, replaced: bool = False) -> Json:
    return {
        "prefix": str(entry.prefix),
        "verdict": entry.verdict,
        "expires": entry.expires,
        "reason": entry.reason,
        "origin": entry.origin,
        "replaced": replaced,
    }


def entry(of: Entry, effective: bool, counted: RuleCount) -> Json:
    """The counts are those of the entry that decides among those of a prefix. `partial`: at least so many."""
    return {
        "prefix": str(of.prefix),
        "family": of.prefix.family.label,
        "verdict": of.verdict,
        "origin": of.origin,
        "source": of.source,
        "reason": of.reason,
        "created": of.created or None,
        "expires": of.expires,
        "effective": effective,
        "packets": counted.packets if effective else 0,
        "bytes": counted.bytes if effective else 0,
        "partial": counted.partial and effective,
    }


def interface(state: InterfaceState, mode: Mode, facts: Mapping[str, Any]) -> Json:
    ids = facts["links"].get(state.name, {})
    return {
        "name": state.name,
        "state": state.state,
        "ifindex": state.ifindex or None,
        "attach": state.attach or None,
        "reason": state.reason,
        "layer": state.layer or None,
        "mtu": state.mtu or None,
        "up": state.up,
        "mode": mode,
        "program_id": ids.get("program_id"),
        "link_id": ids.get("link_id"),
        "notes": list(state.notes),
    }


def policy(of: Policy) -> Json:
    return {
        "entries": len(of),
        "allow": of.count(verdict=Verdict.ALLOW),
        "deny": of.count(verdict=Verdict.DENY),
        "operator": of.count(Origin.OPERATOR),
        "configuration": of.count(Origin.CONFIGURATION),
        "automatic": of.count(Origin.AUTOMATIC),
        "expiring": of.expiring(),
        "next_expiry": of.next_expiry(),
    }


def totals(of: Totals) -> Json:
    """Every frame is in exactly one of allowed, logged, denied_passed, dropped, essential and no_source."""
    everything = of.where()
    return {
        **count(everything),
        "allowed": count(of.outcomes(Outcome.ALLOWED, Outcome.DEFAULT_ALLOWED)),
        "logged": count(of.outcomes(Outcome.DEFAULT_LOGGED)),
        "denied_passed": count(of.outcomes(Outcome.DENIED_PASSED, Outcome.DEFAULT_DENIED_PASSED)),
        "dropped": count(of.dropped),
        "essential": count(of.outcomes(Outcome.ESSENTIAL_PASSED)),
        "no_source": count(of.outcomes(Outcome.NO_SOURCE)),
        "by_family": {name: count(number) for name, number in of.by(by_family).items()},
        "by_protocol": {name: count(number) for name, number in of.by(by_protocol).items()},
        "by_interface": {name: count(number) for name, number in of.by(lambda cell: cell.interface).items()},
    }


def rates(began: Totals, now: Totals) -> Json:
    """Nothing over 0 s where no time has passed, as it seems when the clock was set back."""
    seconds = now.at - began.at
    if seconds <= 0:
        return {"packets_per_second": 0.0, "bytes_per_second": 0.0, "dropped_per_second": 0.0, "interval_seconds": 0.0}
    new, dropped = now.where() - began.where(), now.dropped - began.dropped
    return {
        "packets_per_second": round(new.packets / seconds, 3),
        "bytes_per_second": round(new.bytes / seconds, 3),
        "dropped_per_second": round(dropped.packets / seconds, 3),
        "interval_seconds": round(seconds, 3),
    }


def books(before: Any, after: Any, tracked_closed: Count, running: np.ndarray) -> Json:
    """`total` = `tracked` + `evicted` + `untracked` + `elsewhere`, over packets with a readable source.

    Packets go on arriving while this is read, so the sum is held between the tallies taken before and after.
    """
    tracked = tracked_closed + count_of(running)
    least = before.sourced - after.evicted - after.untracked - after.elsewhere
    most = after.sourced - before.evicted - before.untracked - before.elsewhere
    return {
        "total": count(after.sourced),
        "tracked": count(tracked),
        "evicted": count(after.evicted),
        "untracked": count(after.untracked),
        "elsewhere": count(after.elsewhere),
        "balanced": least.packets <= tracked.packets <= most.packets and least.bytes <= tracked.bytes <= most.bytes,
    }


def window(last: Window | None, unique: Unique, wanted: float) -> Json:
    """The last full window, and how many sources it and the running one have together. If that is not `exact`, it is an estimate with the
    relative standard error `error`, or at least so many where there is none."""
    return {
        "number": last.number if last else None,
        "started": last.started if last else None,
        "length_seconds": round(last.seconds, 3) if last else None,
        "wanted_seconds": wanted,
        "late": last.late if last else False,
        "unique_sources": {"ipv4": unique.ipv4, "ipv6": unique.ipv6},
        "exact": unique.exact,
        "error": unique.error,
    }


def past(of: Past) -> Json:
    """A window that has closed. `packets` and `bytes` are of all packets."""
    return {
        "number": of.number,
        "started": round(of.started, 3),
        "ended": round(of.ended, 3),
        "length_seconds": round(of.ended - of.started, 3),
        "late": of.late,
        **count(of.count),
        "dropped": of.dropped.packets,
        "dropped_bytes": of.dropped.bytes,
        "unique_sources": {"ipv4": of.unique.ipv4, "ipv6": of.unique.ipv6},
        "exact": of.unique.exact,
        "error": of.unique.error,
    }


def port(of: PortCount, running: PortCount | None, *, local: bool) -> Json:
    """The sources of a port in the last full window, and in the running one; with the local ones or without."""
    return {
        "protocol": protocol_name(of.protocol) if of.protocol else "ip",
        "protocol_num": of.protocol,
        "port": of.port,
        "icmp_type": of.icmp_type,
        **_reached(of, running, local),
    }


def ports_total(of: PortCounts, running: PortCounts | None, *, local: bool, hidden: Mapping[Family, int], left_out: int) -> Json:
    """All ports that are shown: a source counts once. `hidden` are the local sources that do not count here, `left_out` the ports."""
    return {
        "protocol": None,
        "protocol_num": None,
        "port": None,
        "icmp_type": None,
        **_reached(of, running, local),
        "total": True,
        "hidden": {"local": hidden_sources(hidden), "ports": left_out},
    }


def hidden_sources(of: Mapping[Family, int]) -> Json:
    return {"ipv4": of.get(Family.IPV4, 0), "ipv6": of.get(Family.IPV6, 0)}


def _reached(of: PortCount | PortCounts, running: PortCount | PortCounts | None, local: bool) -> Json:
    def counted(of: PortCount | PortCounts) -> tuple[Json, Json]:
        unique = shown(of.sources, of.local, with_local=local)
        number = of.count if local else of.count - of.local_count
        return {"ipv4": unique.ipv4, "ipv6": unique.ipv6}, {**count(number), "exact": unique.exact, "error": unique.error}

    sources, rest = counted(of)
    now = counted(running) if running is not None else None
    return {"sources": sources, "running": {**now[0], **now[1]} if now else None, **rest}


def tables(facts: Mapping[str, Any], tallies: Any, of: Policy, sizes: Tables) -> Json:
    """How full the tables are. The one of talkers has a slice for each possible CPU: a card with one queue fills one of them. `exact`: no
    talker was left out since the counting began."""
    capacity, slices = facts["talkers_capacity"], facts["talkers_occupied"]
    of_slice = capacity // len(slices)
    return {
        "talkers": {
            "entries": sum(slices),
            "capacity": capacity,
            "load": round(sum(slices) / capacity, 4),
            "slices": [{"entries": entries, "capacity": of_slice, "load": round(entries / of_slice, 4)} for entries in slices],
            "evictions": tallies.evictions,
            "evicted": count(tallies.evicted),
            "untracked": count(tallies.untracked),
            "exact": not lost(tallies),
        },
        "prefixes": {"entries": len(of), "capacity": sizes.prefixes, "counters": sizes.rule_counters},
    }


def maps(facts: Mapping[str, Any]) -> Json:
    """What the tables in the kernel cost in memory, beside that of the process."""
    each = [{"name": cost.name, "entries": cost.entries, "bytes": cost.bytes} for cost in facts["maps"]]
    return {"bytes": sum(cost["bytes"] for cost in each), "each": each}


def talker(row: np.void, verdict: str, rule: str, *, partial: bool, seconds: float, name: Name, length: int | None = None) -> Json:
    """`partial`: at least so many, since the talker may have lost its entry in between. Rates are over so many seconds, or 0. With a
    `length` it is a network, and the row the sum of its sources."""
    of = to_talker(row)
    per_second = 1 / seconds if seconds > 0 else 0.0
    return {
        "source": of.source if length is None else f"{of.source}/{length}",
        "sources": int(row["sources"]) or 1,
        "family": of.family.label,
        "protocol": protocol_name(of.protocol) if of.protocol else "ip",
        "protocol_num": of.protocol,
        "port": of.port,
        "icmp_type": of.icmp_type,
        "packets": of.packets,
        "bytes": of.bytes,
        "syns": of.syns,
        "packets_per_second": round(of.packets * per_second, 3),
        "bytes_per_second": round(of.bytes * per_second, 3),
        "first_seen": round(of.first_seen, 3),
        "last_seen": round(of.last_seen, 3),
        "verdict": verdict,
        "rule": rule,
        "partial": partial,
        **named(name),
    }


def named(of: Name) -> Json:
    """What is known of an address; null where nothing is."""
    return {"country": of.country, "as_number": of.as_number, "as_name": of.as_name}


def explanation(decides: Entry | None, default: Verdict, mode: Mode) -> str:
    """Some sentences for a person."""
    if decides is None:
        said = {
            Verdict.ALLOW: 'No entry covers it, and default = "allow": its packets pass.',
            Verdict.LOG: 'No entry covers it, and default = "log": its packets pass and are reported.',
            Verdict.DENY: 'No entry covers it, and default = "deny".',
        }[default]
        verdict = default
    else:
        by = {
            Origin.OPERATOR: "added with xdpmonctl",
            Origin.CONFIGURATION: f"from {decides.source}",
            Origin.AUTOMATIC: "added automatically",
        }
        verdict = decides.verdict
        did = "allowed" if verdict is Verdict.ALLOW else "denied"
        said = f"{decides.prefix} is {did}, {by[decides.origin]}" + (f" ({decides.reason})" if decides.reason else "") + "."
        said += " It is the longest prefix that covers the address."
    if verdict is Verdict.DENY:
        if mode is Mode.MONITOR:
            said += " The mode is monitor: its packets are reported and pass."
        elif decides is None:
            said += " Its packets are dropped, but for those to failsafe ports and what keeps the link alive."
        else:
            said += " Its packets are dropped."
    return said


def restart_notes(old: Config, new: Config) -> list[str]:
    """What of a new configuration takes effect only at the next start."""
    notes = []
    if old.tables != new.tables:
        notes.append("[tables] takes effect at the next start")
    if (old.events.enable, old.events.ring_size) != (new.events.enable, new.events.ring_size):
        notes.append("events.enable and events.ring_size take effect at the next start")
    if (old.destination, old.flows.enable, old.flows.records) != (new.destination, new.flows.enable, new.flows.records):
        notes.append("destination, flows.enable and flows.records take effect at the next start")
    if old.bus != new.bus:
        notes.append("[bus] takes effect at the next start")
    return notes
