"""The page on growth: what the measured rows say of larger hosts. docs/growth.md is made whole by this, with the numbers of a run.

The text is `growth.md.in`. A number in it is either a row's, named in `_ROWS`, or follows from one, in `_derived`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ROWS = {
    "reference": "packets: xdp-filter, all features, drops IPv4 UDP",
    "one": "packets: 10 prefixes, one source: drops IPv4 UDP",
    "few": "packets: 10 prefixes, 1,024 sources",
    "many": "packets: 10 prefixes, 65,536 sources",
    "thousand": "packets: 1,000 IPv4 prefixes, 65,536 sources, hit",
    "hundred_thousand": "packets: 100,000 IPv4 prefixes, 65,536 sources, hit",
    "million": "packets: 1,000,000 IPv4 prefixes, 65,536 sources, hit",
    "million_miss": "packets: 1,000,000 IPv4 prefixes, 65,536 sources, miss",
    "ipv6": "packets: 100,000 IPv6 prefixes, 65,536 sources, hit",
    "ipv6_miss": "packets: 100,000 IPv6 prefixes, 65,536 sources, miss",
    "flood": "packets: flood, each packet a new source, 10 prefixes, IPv4",
    "flood_million": "packets: flood, each packet a new source, 1,000,000 prefixes, IPv4",
    "scan": "packets: linear scan of 256 prefixes, LRU table, one source",
    "trie": "packets: LPM trie of 1,000,000 prefixes and three LRU tables, 65,536 sources",
    "events_one": "packets: events: one unlisted source",
    "flows_one": "packets: flows: one unlisted source",
    "flows_many": "packets: flows: 65,536 unlisted sources",
    "live": "live: ours, 2 prefixes, one core (reference: bare XDP_DROP)",
    "live_million": "live: ours, 1,000,000 prefixes, one core (reference: bare XDP_DROP)",
    "two_cores": "live: ours, 2 prefixes, two cores",
    "one_queue": "live: ours, 2 prefixes, one queue, two cores sending",
    "load": "control: xdpmonctl deny --from-file: 1,000,000 prefixes (reference: ipset restore)",
    "policy_memory": "control: maps of the policy with 1,000,000 prefixes",
    "process_memory": "control: daemon: private memory with 1,000,000 prefixes",
    "change": "control: adding one among 1,000,000 prefixes",
    "read": "reading: ",
    "read_memory": "reading: daemon: private memory while it reads",
    "event": "events: CPU time of the daemon for an event",
}
"""Name in the text: how the row begins."""

_TEMPLATE = Path(__file__).with_name("growth.md.in")


class MissingRowError(Exception):
    """The run does not have what the page tells of."""


def page(rows: Iterable[Mapping[str, Any]]) -> str:
    found = _find(list(rows))
    return _TEMPLATE.read_text().format(**{name: row["value"] for name, row in found.items()}, **_derived(found))


def _find(rows: list[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found = {}
    for name, begins in _ROWS.items():
        row = next((row for row in rows if str(row["row"]).startswith(begins)), None)
        if row is None:
            raise MissingRowError(f"no row begins with {begins!r}: run all sections")
        found[name] = row
    return found


_CORES, _SMALLEST, _LARGE = 64, 148.8e6, 8.13e6  # packets a second at 100 Gbit/s, by size


def _derived(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    million, flood = found["million"]["value"], found["flood_million"]["value"]
    return {
        "read_share": 100 * found["read"]["value"] / 60,
        "two_cores_ratio": found["two_cores"]["ratio"],
        "events_added": max(0.0, found["events_one"]["value"] - found["events_one"]["reference"]),
        "flows_added": max(0.0, found["flows_one"]["value"] - found["flows_one"]["reference"]),
        "flows_ratio": found["flows_many"]["ratio"],
        "share": 100 * million * 1e-9 * _SMALLEST / _CORES,
        "share_large": 100 * million * 1e-9 * _LARGE / _CORES,
        "flood_share": 100 * flood * 1e-9 * _SMALLEST / _CORES,
        "flood_share_large": 100 * flood * 1e-9 * _LARGE / _CORES,
        "cores": million * 1e-9 * _SMALLEST,
        "cores_large": million * 1e-9 * _LARGE,
        "budget_16": 16 / _SMALLEST * 1e9,
    }
