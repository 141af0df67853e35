"""What is measured: that each family is there, adds up, only grows where it counts, and names nobody."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicefakes import START, World, entry, rows, run

from xdpmond.config import Config, Metrics
from xdpmond.measures import FAMILIES, Kind, Meter, source_list
from xdpmond.messages import Message
from xdpmond.metricsdoc import with_table
from xdpmond.model import Count, Family, Origin, Outcome, PortRange, ProtocolClass, Total, Verdict
from xdpmond.policy import Policy
from xdpmond.rows import merge
from xdpmond.state import State
from xdpmond.windows import Window

ROOT = Path(__file__).parents[2]
TALKERS = merge(rows(
    ("192.0.2.1", 6, 22, 5, 500), ("192.0.2.2", 6, 22, 2, 200), ("10.0.0.1", 6, 22, 1, 60), ("2001:db8::1", 6, 22, 4, 400),
    ("192.0.2.1", 17, 53, 1, 100), ("192.0.2.3", 1, 9, 7, 700), ("192.0.2.5", 47, 0, 1, 60),
))  # fmt: skip


def total(interface="eth0", family=Family.IPV4, protocol=ProtocolClass.TCP, outcome=Outcome.DEFAULT_LOGGED, packets=1):
    return Total(interface, family, protocol, outcome, Count(packets, packets * 100))


def window(talkers=TALKERS, number=7, config=None, **more):
    return Window(number, START - 60, START, 60.0, talkers, **more).counted((config or Config()).ports)


def numbers(*cells, talkers=TALKERS, config=None, **more):
    """What a service tells, of a packet path with these totals."""

    async def ask():
        policy = Policy([entry("192.0.2.0/24"), entry("10.0.0.0/8", Verdict.ALLOW)])
        world = World(config, State(policy))
        world.kernel.cells = list(cells)
        world.kernel.facts = lambda: {"counting_since": START - 999, "talkers_occupied": [2, 0], "talkers_capacity": 1024,
                                      "maps": [SimpleNamespace(name="talkers", bytes=4096)], "links": {}}  # fmt: skip
        return await world.service.measurements()

    last = window(talkers, config=config)
    return dataclasses.replace(run(ask), window=last, **more)


def measured(of, meter=None):
    """The samples of each family by their labels, as a dict."""
    return {
        family.name: {tuple(zip(family.labels, labels, strict=True)): value for labels, value in family.samples}
        for family in (meter or Meter()).measure(of)
    }


def value(found, name, **labels):
    """The sum of the samples that have these labels."""
    return sum(number for of, number in found[name].items() if labels.items() <= dict(of).items())


def test_each_family_is_there_with_samples_of_its_labels_and_of_its_kind():
    of = numbers(total())
    told = {family.name: family for family in Meter().measure(of)}
    for row in FAMILIES:
        family = told[row.name]
        assert family.samples, row.name
        assert (family.kind is Kind.COUNTER) == row.name.endswith("_total")
        assert len({labels for labels, _ in family.samples}) == len(family.samples), f"{row.name} has a series twice"
        for labels, number in family.samples:
            assert len(labels) == len(row.labels)
            assert all(isinstance(label, str) for label in labels)
            assert number >= 0 and (isinstance(number, int) or not row.whole)
    assert told["xdpmond_series"].samples == (((), sum(len(family.samples) for family in told.values())),)


def test_names_are_those_of_the_field():
    for row in FAMILIES:
        assert re.fullmatch("xdpmond(_[a-z0-9]+)+", row.name)
        assert all(re.fullmatch("[a-z_]+", label) for label in row.labels)
        assert row.help.endswith((".", "?", ")"))
    assert len({row.name for row in FAMILIES}) == len(FAMILIES)


def test_no_address_and_no_prefix_is_a_label():
    of = numbers(total(), config=Config(metrics=Metrics(active_users=True)))
    for samples in measured(of).values():
        for labels in samples:
            for _, text in labels:
                with pytest.raises(ValueError):
                    ipaddress.ip_network(text)


CELLS = st.builds(
    total, st.sampled_from(["eth0", "eth1", "-"]), st.sampled_from(Family), st.sampled_from(ProtocolClass), st.sampled_from(Outcome),
    st.integers(1, 1 << 62),
)  # fmt: skip


@given(st.lists(CELLS, max_size=20))
def test_packets_and_bytes_are_those_of_all_cells(cells):
    found = measured(numbers(*cells))
    assert value(found, "xdpmond_packets_total") == sum(cell.count.packets for cell in cells)
    assert value(found, "xdpmond_bytes_total") == sum(cell.count.bytes for cell in cells)
    for family in Family:
        assert value(found, "xdpmond_packets_total", family=family.label) == sum(c.count.packets for c in cells if c.family is family)
    dropped = sum(cell.count.packets for cell in cells if cell.outcome.action == "DROP")
    assert value(found, "xdpmond_packets_total", action="drop") == dropped


def test_what_is_ordinary_on_an_attached_interface_is_there_before_the_first_packet():
    found = measured(numbers())["xdpmond_packets_total"]
    labels = {"interface": "eth0", "family": "ipv6", "protocol": "udp", "verdict": "deny", "action": "drop"}
    assert found[tuple(labels.items())] == 0


@given(st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=2, max_size=8))
def test_a_counter_never_goes_back_and_grows_by_what_is_added(readings):
    """As when a place in the totals changes hands."""
    meter, before, expected = Meter(), 0, None
    for packets in readings:
        found = measured(numbers(*(total(name, packets=number) for name, number in zip("abc", packets, strict=True))), meter)
        shown = [value(found, "xdpmond_packets_total", interface=name) for name in "abc"]
        if expected is None:
            expected = shown
            assert shown == packets
        else:
            expected = [old + max(now - was, 0) for old, now, was in zip(expected, packets, before, strict=True)]
            assert shown == expected
        before = packets


def test_sources_by_port_are_counted_once_for_each_port_they_reach():
    found = measured(numbers())
    ports = {(dict(of)["family"], dict(of)["protocol"], dict(of)["port"]): n for of, n in found["xdpmond_port_sources"].items()}
    assert ports == {("ipv4", "tcp", "22"): 3, ("ipv6", "tcp", "22"): 1, ("ipv4", "udp", "53"): 1, ("ipv4", "icmp", "type 8"): 1,
                     ("ipv4", "gre", "none"): 1}  # fmt: skip
    assert (value(found, "xdpmond_window_sources", family="ipv4"), value(found, "xdpmond_window_sources", family="ipv6")) == (5, 1)
    assert value(found, "xdpmond_port_packets", protocol="tcp", port="22") == 12
    assert value(found, "xdpmond_port_bytes", protocol="icmp") == 700
    assert value(found, "xdpmond_window_exact") == 1 and value(found, "xdpmond_sources_error_ratio") == 0


def test_ports_beyond_the_most_are_counted_and_only_what_can_be_added_up_is():
    found = measured(numbers(config=Config(metrics=Metrics(max_ports=1))))
    assert {dict(of)["port"] for of in found["xdpmond_port_sources"]} == {"22"}
    assert value(found, "xdpmond_port_packets", port="other") == 9
    assert value(found, "xdpmond_port_bytes", port="other") == 860
    assert found["xdpmond_ports"] == {(("state", "shown"),): 1, (("state", "left_out"),): 3, (("state", "not_listed"),): 0}


def test_a_scan_moves_no_port_out_of_its_place():
    """Of ports that have one source each, those that had series keep them."""
    config, meter = Config(metrics=Metrics(max_ports=2)), Meter()
    first = rows(("192.0.2.1", 6, 443, 1, 60), ("192.0.2.1", 6, 8080, 1, 60))
    scan = [("192.0.2.1", 6, port, 9, 540) for port in range(1, 9000)]
    assert len(measured(numbers(talkers=first, config=config), meter)["xdpmond_port_sources"]) == 2
    later = dataclasses.replace(numbers(config=config), window=window(merge(rows(*scan), first), number=8))
    found = measured(later, meter)
    assert {dict(of)["port"] for of in found["xdpmond_port_sources"]} == {"443", "8080"}
    assert value(found, "xdpmond_ports", state="left_out") == 8997
    busy = dataclasses.replace(later, window=window(merge(rows(*scan, ("192.0.2.8", 6, 25, 1, 60)), first), number=9))
    assert "25" in {dict(of)["port"] for of in measured(busy, meter)["xdpmond_port_sources"]}


def test_local_sources_and_ports_of_no_interest_are_left_out_on_request():
    config = Config(ports=(PortRange(6, 22, 22),), show_local=False)
    found = measured(numbers(config=config))
    assert value(found, "xdpmond_port_sources", family="ipv4", port="22") == 2
    assert value(found, "xdpmond_port_packets", port="22") == 11
    assert value(found, "xdpmond_ports", state="not_listed") == 3
    assert b"".join(source_list(TALKERS, config.ports, with_local=False)).count(b"192.0.2") == 2


def test_active_users_are_told_on_request_under_the_names_of_the_reference():
    assert "active_users" not in measured(numbers())
    found = measured(numbers(config=Config(metrics=Metrics(active_users=True))))["active_users"]
    assert found == {
        (("network", "IPv4"), ("transport", "TCP"), ("port", "22")): 3,
        (("network", "IPv6"), ("transport", "TCP"), ("port", "22")): 1,
        (("network", "IPv4"), ("transport", "UDP"), ("port", "53")): 1,
    }


def test_before_the_first_window_has_ended_nothing_is_told_of_it():
    found = measured(dataclasses.replace(numbers(), window=None))
    assert not any(found[name] for name in found if "port_" in name or name.startswith("xdpmond_window_s"))


def test_policy_losses_messages_and_reloads():
    of = dataclasses.replace(
        numbers(),
        losses={"queue_full": {"journal": 2}, "followers": 3, "log_disk": {"/a": 4, "/b": 5}},
        messages={Message.RELOAD_REFUSED: 6},
        decided={(Verdict.DENY, Origin.OPERATOR): Count(8, 800)},
    )
    found = measured(of)
    assert value(found, "xdpmond_policy_entries", verdict="deny", origin="operator") == 1
    assert value(found, "xdpmond_policy_entries") == 2
    assert [value(found, "xdpmond_lost_total", stage=name) for name in ("queue_full", "followers", "log_disk", "ring")] == [2, 3, 9, 0]
    assert value(found, "xdpmond_messages_total", message="reload_refused") == 6
    assert value(found, "xdpmond_messages_total") == 6
    assert len(found["xdpmond_messages_total"]) == sum(not kind.of_packet for kind in Message)
    assert value(found, "xdpmond_rule_packets_total", verdict="deny", origin="operator") == 8
    assert value(found, "xdpmond_rule_bytes_total") == 800


@pytest.mark.parametrize("number", [0, 1, 511, 512, 513, 1030])
def test_the_list_of_sources_is_valid_json_however_many_there_are(number):
    talkers = rows(*((f"10.0.{n // 250}.{n % 250}", 6, 22, 1, 60) for n in range(number)), ("192.0.2.3", 1, 9, 7, 700))
    listed = json.loads(b"".join(source_list(talkers)))
    assert listed == [{"ip": f"10.0.{n // 250}.{n % 250}", "network": "IPv4", "transport": "TCP", "port": 22} for n in range(number)]


def test_the_list_names_ipv6_udp_and_sctp():
    talkers = rows(("2001:db8::1", 17, 53, 1, 60), ("192.0.2.1", 132, 9, 1, 60), ("192.0.2.2", 6, 0, 1, 60))
    assert json.loads(b"".join(source_list(talkers))) == [
        {"ip": "2001:db8::1", "network": "IPv6", "transport": "UDP", "port": 53},
        {"ip": "192.0.2.1", "network": "IPv4", "transport": "SCTP", "port": 9},
    ]


def test_the_table_of_metrics_is_current():
    page = (ROOT / "docs/metrics.md").read_text()
    assert with_table(page) == page, "run: ./dev docs"
