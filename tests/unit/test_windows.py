"""Windows and summaries from numbers made by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest
from servicefakes import START, rows

from tests.sketching import observe
from xdpmond import windows
from xdpmond.model import Count, Family, Outcome, ProtocolClass, Total
from xdpmond.rows import count_of, strongest
from xdpmond.sketches import OVERALL_CELLS, Sketches
from xdpmond.windows import LossWarning, Pressure, Progress, Summary, Totals, Window, by_family, by_protocol


def cell(outcome, packets, *, family=Family.IPV4, protocol=ProtocolClass.TCP, interface="eth0"):
    return Total(interface, family, protocol, outcome, Count(packets, packets * 100))


def totals(*cells, at=START):
    return Totals(cells, at)


def window(number, *talkers, started=START, seconds=60.0):
    return Window(number, started, started + seconds, 60, rows(*talkers))


@pytest.mark.parametrize(("seconds", "late"), [(60, False), (61, False), (75, False), (77, True), (600, True)])
def test_a_window_that_was_ended_late_says_so(seconds, late):
    of = window(1, seconds=seconds)
    assert (of.late, of.seconds) == (late, seconds)


def test_a_short_window_is_not_late_by_a_tick():
    assert not Window(1, START, START + 1.9, 1).late
    assert Window(1, START, START + 3, 1).late


def test_a_window_without_traffic():
    assert Window(1, START, START + 60, 60).unique_sources == {Family.IPV4: 0, Family.IPV6: 0}


def test_totals_are_summed_as_asked_for():
    of = totals(
        cell(Outcome.ALLOWED, 5), cell(Outcome.DENIED_DROPPED, 3, family=Family.IPV6), cell(Outcome.DEFAULT_DENIED_DROPPED, 2),
        cell(Outcome.NO_SOURCE, 1, family=Family.OTHER, protocol=ProtocolClass.NON_IP, interface="eth1"),
    )  # fmt: skip
    assert of.where() == Count(11, 1100)
    assert of.dropped == Count(5, 500)
    assert of.outcomes(Outcome.ALLOWED, Outcome.NO_SOURCE) == Count(6, 600)
    assert of.by(by_family) == {"ipv4": Count(7, 700), "ipv6": Count(3, 300), "other": Count(1, 100)}
    assert of.by(by_protocol) == {"tcp": Count(10, 1000), "non-ip": Count(1, 100)}
    assert totals().where() == Count()
    assert totals().by(by_family) == {}


def test_a_summary_tells_of_its_interval_alone():
    before = totals(cell(Outcome.ALLOWED, 1000), cell(Outcome.DENIED_DROPPED, 10))
    summary = Summary(START, before)
    summary.add(window(1, ("192.0.2.1", 6, 22, 5, 500), ("192.0.2.1", 6, 80, 5, 500), ("192.0.2.2", 6, 22, 6, 600)))
    summary.add(window(2, ("192.0.2.1", 6, 22, 1, 100), ("2001:db8::1", 58, 0, 2, 200)))
    now = totals(cell(Outcome.ALLOWED, 1015), cell(Outcome.DENIED_DROPPED, 14), at=START + 120)
    assert summary.text(now).splitlines() == [
        "19 packets, 1900 bytes in 120 s, 4 dropped; 2 IPv4 and 1 IPv6 sources",
        "tcp: 192.0.2.1 11 packets 1100 bytes; 192.0.2.2 6 packets 600 bytes",
        "icmpv6: 2001:db8::1 2 packets 200 bytes",
    ]


def test_a_summary_of_an_interval_with_lost_talkers_says_at_least():
    summary = Summary(START, totals())
    summary.add(replace(window(1, ("192.0.2.1", 6, 22, 5, 500)), exact=False))
    summary.add(window(2, ("192.0.2.2", 6, 22, 5, 500)))
    assert summary.text(totals(at=START + 60)).splitlines()[0].endswith("; at least 2 IPv4 and 0 IPv6 sources")


def test_a_summary_estimates_the_sources_that_its_windows_had_lost():
    summary = Summary(START, totals())
    hashes = np.random.default_rng(1).integers(0, 2**64, 300, dtype="u8")
    for number in (0, 1):  # of the 200 sources of each, 100 are in both
        sketches = Sketches.empty()
        observe(sketches.cells[:OVERALL_CELLS], hashes[100 * number : 100 * number + 200])
        summary.add(replace(window(number, ("192.0.2.1", 6, 22, 5, 500)), exact=False, sketches=sketches))
    found = re.search("; about ([0-9]+) IPv4 and 0 IPv6 sources", summary.text(totals(at=START + 120)))
    assert found and 285 <= int(found[1]) <= 315
    summary.add(replace(window(3), exact=False))  # one whose sketches are not known
    assert "; at least 1 IPv4 and 0 IPv6 sources" in summary.text(totals(at=START + 180))


@pytest.mark.parametrize(
    ("last", "lost", "exact"), [(None, 5, True), (True, 5, True), (False, 5, False), (None, 6, False), (True, 6, False)]
)
def test_what_is_shown_is_exact_if_both_windows_are(last, lost, exact):
    progress = Progress(totals(), lost=5)
    if last is not None:
        progress = progress.closed(replace(window(1), exact=last), totals(), Count(), 5)
    assert progress.exact(lost) is exact


def test_a_summary_names_the_strongest_few_of_each_protocol():
    summary = Summary(START, totals())
    summary.add(window(1, *[(f"192.0.2.{n}", 17, 53, n, n * 10) for n in range(1, 20)]))
    (_, line) = summary.text(totals(at=START + 60), top=2).splitlines()
    assert line == "udp: 192.0.2.19 19 packets 190 bytes; 192.0.2.18 18 packets 180 bytes"


def test_a_summary_of_nothing():
    assert Summary(START, totals()).text(totals(at=START + 60)) == "0 packets, 0 bytes in 60 s, 0 dropped; 0 IPv4 and 0 IPv6 sources"


def test_a_long_summary_keeps_the_strongest():
    """However long the interval and however many the sources, what it holds is bounded."""
    most = windows._KEEP_ROWS
    many = np.repeat(rows(("192.0.2.1", 6, 22, 1, 100)), most)
    many["source"][:, 4:8] = np.arange(most, dtype="u4").view("u1").reshape(-1, 4)
    many["family"] = Family.IPV6
    summary = Summary(START, totals())
    summary.add(Window(1, START, START + 60, 60, many))
    summary.add(window(2, ("198.51.100.1", 6, 22, 9, 900), ("198.51.100.2", 6, 22, 9, 901)))
    assert len(summary.rows) == most
    assert count_of(strongest(summary.rows, "bytes", 2)) == Count(18, 1801)
    assert f"at least 2 IPv4 and {most - 2} IPv6 sources" in summary.text(totals(at=START + 60))


def test_the_pressure_on_the_table_in_a_summary():
    before, now = Pressure((5, 0), 1024, 100, 10), Pressure((1000, 24), 1024, 150, 10)
    assert before.text(None) == "table of talkers: 5 of 2048 entries, 5 of 1024 on the fullest CPU; 100 packets evicted, 10 untracked"
    assert now.text(before) == "table of talkers: 1024 of 2048 entries, 1000 of 1024 on the fullest CPU; 50 packets evicted, 0 untracked"
    assert now.text(now) == "table of talkers: 1024 of 2048 entries, 1000 of 1024 on the fullest CPU"
    assert Pressure((7,), 1024, 0, 0).text(None) == "table of talkers: 7 of 1024 entries"
    assert now.fields(before) == {
        "talkers": 1024, "talkers_capacity": 2048, "talkers_fullest": 1000, "evicted": 50, "untracked": 0,
    }  # fmt: skip


def test_a_loss_of_talkers_is_told_when_it_begins_and_once_in_an_interval():
    warning = LossWarning()

    def due(minute, exact):
        return warning.due(replace(window(1, started=START + 60 * minute), exact=exact), 300)

    assert [due(minute, exact) for minute, exact in enumerate([True, False, False, True, False, False])] == [
        False, True, False, False, False, False,
    ]  # fmt: skip
    assert [due(minute, exact) for minute, exact in enumerate([True, False, False], 6)] == [False, True, False]
