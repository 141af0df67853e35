"""The documents that programs read: their keys, their sums, and that JSON takes them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicefakes import START, entry, file_entry, rows

from xdpmond import documents
from xdpmond.config import Bus, Config, Events, Tables
from xdpmond.interfaces import InterfaceState
from xdpmond.kernel.costs import MapCost
from xdpmond.model import Action, Count, Family, Mode, Outcome, ProtocolClass, RuleCount, Total, Verdict
from xdpmond.names import Name
from xdpmond.policy import Policy
from xdpmond.ports import Unique
from xdpmond.windows import Past, Totals, Window

CELLS = st.lists(
    st.builds(
        Total,
        st.sampled_from(["eth0", "eth1", "-"]),
        st.sampled_from(Family),
        st.sampled_from(ProtocolClass),
        st.sampled_from(Outcome),
        st.builds(Count, st.integers(0, 2**60), st.integers(0, 2**63)),
    ),
    max_size=20,
)


def plain(document):
    """As a program gets it; NaN and whatever JSON does not know raise."""
    return json.loads(json.dumps(document, allow_nan=False))


def added(parts):
    parts = list(parts)
    return {"packets": sum(part["packets"] for part in parts), "bytes": sum(part["bytes"] for part in parts)}


@given(CELLS)
def test_every_frame_is_in_exactly_one_of_the_totals(cells):
    of = plain(documents.totals(Totals(cells, START)))
    whole = {"packets": sum(cell.count.packets for cell in cells), "bytes": sum(cell.count.bytes for cell in cells)}
    assert {key: of[key] for key in ("packets", "bytes")} == whole
    assert added(of[key] for key in ("allowed", "logged", "denied_passed", "dropped", "essential", "no_source")) == whole
    for key in ("by_family", "by_protocol", "by_interface"):
        assert added(of[key].values()) == whole
    dropped = [cell for cell in cells if cell.outcome.action is Action.DROP]
    assert of["dropped"]["packets"] == sum(cell.count.packets for cell in dropped)


def test_rates():
    began = Totals([Total("eth0", Family.IPV4, ProtocolClass.TCP, Outcome.ALLOWED, Count(100, 1000))], START)
    now = Totals(
        [
            Total("eth0", Family.IPV4, ProtocolClass.TCP, Outcome.ALLOWED, Count(300, 3000)),
            Total("eth0", Family.IPV4, ProtocolClass.TCP, Outcome.DENIED_DROPPED, Count(10, 500)),
        ],
        START + 10,
    )
    assert documents.rates(began, now) == {
        "packets_per_second": 21.0, "bytes_per_second": 250.0, "dropped_per_second": 1.0, "interval_seconds": 10,
    }  # fmt: skip
    for at in (now, Totals(now.cells, START - 3600)):  # no time between them, or the clock was set back
        unknown = plain(documents.rates(began if at is not now else now, at))
        assert unknown == {"packets_per_second": 0.0, "bytes_per_second": 0.0, "dropped_per_second": 0.0, "interval_seconds": 0.0}


NONE = Count()


def tallies(sourced, evicted=NONE, untracked=NONE, elsewhere=NONE, evictions=0):
    return SimpleNamespace(sourced=sourced, evicted=evicted, untracked=untracked, elsewhere=elsewhere, evictions=evictions)


RUNNING = rows(("192.0.2.1", 6, 22, 4, 400), ("192.0.2.2", 6, 22, 3, 300))


SEVENTEEN = tallies(Count(17, 1700))
FORWARDED = tallies(Count(50, 5000), elsewhere=Count(33, 3300))
LOSSES = tallies(Count(20, 2000), Count(2, 200), Count(1, 100))


@pytest.mark.parametrize(
    ("before", "after", "closed", "balanced"),
    [
        (SEVENTEEN, SEVENTEEN, Count(10, 1000), True),
        (tallies(Count(18, 1800)), tallies(Count(18, 1800)), Count(10, 1000), False),  # one packet is nowhere
        (tallies(Count(16, 1600)), tallies(Count(16, 1600)), Count(10, 1000), False),  # one is counted twice
        (SEVENTEEN, tallies(Count(17, 1701)), Count(10, 1001), True),
        (SEVENTEEN, SEVENTEEN, Count(10, 1001), False),
        (tallies(Count(15, 1500)), tallies(Count(20, 2000)), Count(10, 1000), True),  # five came meanwhile
        (LOSSES, LOSSES, Count(10, 1000), True),
        (LOSSES, LOSSES, Count(9, 900), False),
        (FORWARDED, FORWARDED, Count(10, 1000), True),
        (FORWARDED, FORWARDED, Count(11, 1100), False),
    ],
)
def test_the_books_balance_or_say_that_they_do_not(before, after, closed, balanced):
    books = plain(documents.books(before, after, closed, RUNNING))
    assert books["balanced"] is balanced
    assert books["tracked"]["packets"] == closed.packets + 7
    assert books["total"]["packets"] == after.sourced.packets


def test_windows():
    assert plain(documents.window(None, Unique(), 60.0)) == {
        "number": None, "started": None, "length_seconds": None, "wanted_seconds": 60.0, "late": False,
        "unique_sources": {"ipv4": 0, "ipv6": 0}, "exact": True, "error": None,
    }  # fmt: skip
    last = Window(7, START, START + 90.0004, 60, RUNNING)
    assert plain(documents.window(last, Unique(2, 0, False, 0.0081), 60.0)) == {
        "number": 7, "started": START, "length_seconds": 90.0, "wanted_seconds": 60.0, "late": True,
        "unique_sources": {"ipv4": 2, "ipv6": 0}, "exact": False, "error": 0.0081,
    }  # fmt: skip


FACTS = {"links": {"eth0": {"link_id": 3, "program_id": 9}}, "talkers_capacity": 1000, "talkers_occupied": [250, 50],
         "maps": [MapCost("talkers", 250, 64000), MapCost("control", 1, 8192)]}  # fmt: skip


@pytest.mark.parametrize(
    ("tally", "exact"),
    [(tallies(NONE), True), (tallies(NONE, Count(1, 1), evictions=1), False), (tallies(NONE, NONE, Count(1, 1)), False)],
)
def test_tables(tally, exact):
    found = plain(documents.tables(FACTS, tally, Policy([entry("192.0.2.1")]), Tables(prefixes=1024, rule_counters=2048)))
    assert found["talkers"] == {
        "entries": 300, "capacity": 1000, "load": 0.3, "evictions": tally.evictions, "exact": exact,
        "slices": [{"entries": 250, "capacity": 500, "load": 0.5}, {"entries": 50, "capacity": 500, "load": 0.1}],
        "evicted": plain(documents.count(tally.evicted)), "untracked": plain(documents.count(tally.untracked)),
    }  # fmt: skip
    assert found["prefixes"] == {"entries": 1, "capacity": 1024, "counters": 2048}


def test_what_the_maps_cost():
    assert plain(documents.maps(FACTS)) == {
        "bytes": 72192,
        "each": [{"name": "talkers", "entries": 250, "bytes": 64000}, {"name": "control", "entries": 1, "bytes": 8192}],
    }


def test_interfaces():
    attached = InterfaceState("eth0", "attached", 2, "native", "", "ethernet", 1500, True, ("a note",))
    assert plain(documents.interface(attached, Mode.ENFORCE, FACTS)) == {
        "name": "eth0", "state": "attached", "ifindex": 2, "attach": "native", "reason": "", "layer": "ethernet", "mtu": 1500, "up": True,
        "mode": "enforce", "program_id": 9, "link_id": 3, "notes": ["a note"],
    }  # fmt: skip
    waiting = plain(documents.interface(InterfaceState("eth1", "waiting", reason="there is no such interface yet"), Mode.MONITOR, FACTS))
    assert {key for key, value in waiting.items() if value is None} == {"ifindex", "attach", "layer", "mtu", "program_id", "link_id"}


def test_entries():
    of = entry("192.0.2.0/24", created=START, expires=START + 60, reason="scan")
    assert plain(documents.entry(of, True, RuleCount(3, 300))) == {
        "prefix": "192.0.2.0/24", "family": "ipv4", "verdict": "deny", "origin": "operator", "source": "", "reason": "scan",
        "created": START, "expires": START + 60, "effective": True, "packets": 3, "bytes": 300, "partial": False,
    }  # fmt: skip
    hidden = documents.entry(file_entry("192.0.2.0/24"), False, RuleCount(3, 300, True))
    assert (hidden["packets"], hidden["partial"], hidden["created"]) == (0, False, None)  # the counts are those of the one that decides
    assert documents.entry(of, True, RuleCount(3, 300, True))["partial"]


@pytest.mark.parametrize(
    ("protocol", "port", "shown"),
    [(6, 22, ("tcp", 22, None)), (0, 0, ("ip", None, None)), (58, 0, ("icmpv6", None, None)), (58, 129, ("icmpv6", None, 128)),
     (200, 0, ("200", None, None))],
)  # fmt: skip
def test_talkers(protocol, port, shown):
    row, name = rows(("2001:db8::1", protocol, port, 3, 300))[0], Name("NO", 64500, "Example")
    found = plain(documents.talker(row, Verdict.DENY, "2001:db8::/32", partial=True, seconds=1.5, name=name))
    assert (found["protocol"], found["port"], found["icmp_type"]) == shown
    assert (found["source"], found["sources"], found["family"], found["packets"], found["bytes"]) == ("2001:db8::1", 1, "ipv6", 3, 300)
    assert (found["packets_per_second"], found["bytes_per_second"]) == (2.0, 200.0)
    assert (found["first_seen"], found["last_seen"], found["verdict"], found["partial"]) == (START - 10, START - 1, "deny", True)
    assert (found["country"], found["as_number"], found["as_name"]) == ("NO", 64500, "Example")


def test_a_network_among_talkers():
    row = rows(("192.0.2.0", 6, 22, 3, 300))[0].copy()
    row["sources"] = 17
    found = plain(documents.talker(row, "mixed", "mixed", partial=False, seconds=0, name=Name(), length=24))
    assert (found["source"], found["sources"], found["verdict"]) == ("192.0.2.0/24", 17, "mixed")
    assert (found["packets_per_second"], found["bytes_per_second"], found["country"]) == (0.0, 0.0, None)


def test_a_window_of_the_history():
    of = Past(7, START, START + 60.0004, True, Count(9, 900), Count(2, 200), Unique(5, 1, False, 0.0081))
    assert plain(documents.past(of)) == {
        "number": 7, "started": START, "ended": START + 60, "length_seconds": 60.0, "late": True, "packets": 9, "bytes": 900, "dropped": 2,
        "dropped_bytes": 200, "unique_sources": {"ipv4": 5, "ipv6": 1}, "exact": False, "error": 0.0081,
    }  # fmt: skip


@pytest.mark.parametrize("default", list(Verdict))
@pytest.mark.parametrize("mode", list(Mode))
def test_the_explanation_says_dropped_only_when_it_is_so(default, mode):
    of = {
        None: default,
        entry("192.0.2.1", reason="scan"): Verdict.DENY,
        entry("192.0.2.1", Verdict.ALLOW): Verdict.ALLOW,
        file_entry("192.0.2.1", line=7): Verdict.DENY,
    }
    for decides, verdict in of.items():
        said = documents.explanation(decides, default, mode)
        assert ("dropped" in said) == (verdict is Verdict.DENY and mode is Mode.ENFORCE)
        assert decides is None or "192.0.2.1/32" in said
        assert decides is None or decides.source in said
        assert decides is None or decides.reason in said


def test_what_waits_for_the_next_start():
    old = Config()
    assert documents.restart_notes(old, replace(old, window=5, events=Events(interval=5))) == []
    for new in (replace(old, tables=Tables(talkers=1024)), replace(old, events=Events(enable=False)), replace(old, bus=Bus(enable=False))):
        (note,) = documents.restart_notes(old, new)
        assert "next start" in note
