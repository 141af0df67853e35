"""Events as lines: each has the same values, whatever stands in a name, and is read back by the standard parsers."""

import csv
import io
import json
import socket
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from eventfakes import EPOCH, INTERFACES, DictPolicy, batch
from hypothesis import given
from hypothesis import strategies as st

from xdpmond import lines
from xdpmond.batch import EventBatch
from xdpmond.cli.events import event_line
from xdpmond.kernel import abi
from xdpmond.messages import event_fields
from xdpmond.model import PROTOCOL_NAMES, Outcome, Verdict

JSONL, CSV, ECS, CONSOLE = lines.jsonl(), lines.csv(), lines.ecs(), lines.console()
POLICY = DictPolicy({"203.0.113.0/24": Verdict.DENY, "2001:db8::/32": Verdict.DENY, "0.0.0.0/1": Verdict.ALLOW})


def from_jsonl(made):
    text = JSONL.lines(made)
    assert text.endswith(b"}\n") and text.count(b"\n") == len(made)
    assert text.isascii()
    return [json.loads(line) for line in text.splitlines()]


def from_csv(made):
    text = CSV.head + CSV.lines(made)
    assert text.endswith(b"\r\n")
    return list(csv.DictReader(io.StringIO(text.decode(), newline=""), strict=True))


def from_ecs(made):
    text = ECS.lines(made)
    assert text.endswith(b"}\n") and text.count(b"\n") == len(made)
    return [json.loads(line) for line in text.splitlines()]


def in_ecs(event):
    """The fields of the contract by the names of the schema."""
    dropped = event["action"] == "DROP"
    return {
        "@timestamp": event["timestamp_iso"],
        "ecs": {"version": "8.11.0"},
        "event": {
            "kind": "event",
            "category": ["network"],
            "action": "dropped" if dropped else "logged",
            "type": ["connection", "denied" if dropped else "allowed"],
            "outcome": "success",
            "module": "xdpmond",
            "dataset": "xdpmond.events",
        },
        "source": {"ip": event["src_ip"], "port": event["src_port"]},
        "destination": {"ip": event["dst_ip"], "port": event["dst_port"]},
        "network": {
            "type": event["family"],
            "transport": "ipv6-icmp" if event["protocol"] == "icmpv6" else event["protocol"],
            "iana_number": str(event["protocol_num"]),
            "direction": "ingress",
            "bytes": event["packet_size"],
            "vlan": {"id": None if event["vlan"] is None else str(event["vlan"])},
        },
        "observer": {"type": "firewall", "product": "xdpmond", "ingress": {"interface": {"name": event["interface"]}}},
        "rule": {"name": event["rule"]},
        "xdpmond": {"verdict": event["verdict"], "suppressed": event["suppressed"], "flow_hash": event["flow_hash"]},
    }


def for_a_person(event):
    """What `xdpmonctl events` prints, behind the time."""
    context = SimpleNamespace(terminal=False, style=lambda text, _: text)
    return event_line(context, event, event["timestamp_iso"])


def check(made):
    """All formats say what the values say."""
    wanted = [event_fields(event) for event in made.values()]
    assert from_ecs(made) == [in_ecs(event) for event in wanted]
    assert CONSOLE.lines(made).decode().splitlines() == [for_a_person(event) for event in wanted]
    got = from_jsonl(made)
    assert got == wanted
    assert all(tuple(event) == lines.FIELDS for event in got)
    for row, event in zip(from_csv(made), wanted, strict=True):
        assert tuple(row) == lines.FIELDS
        assert float(row["timestamp"]) == event["timestamp"]
        del row["timestamp"], event["timestamp"]
        assert row == {name: "" if value is None else str(value) for name, value in event.items()}


def test_the_fields_are_those_of_the_contract():
    (event,) = batch({}).values()
    assert tuple(event_fields(event)) == lines.FIELDS


def test_a_line_as_it_stands_in_the_file():
    made = batch(
        {"timestamp": 1_250_999, "outcome": Outcome.DENIED_DROPPED, "suppressed": 12, "flow_hash": 4294967295, "vlan": 100, "slot": 1},
        {"timestamp": 2_000_000_000, "src": "2001:db8::1", "dst": "fe80::1", "has_ports": 0, "protocol": 58, "packet_size": 1514},
        policy=POLICY,
    )
    assert JSONL.lines(made).decode() == (
        '{"timestamp":1700000000.001250,"timestamp_iso":"2023-11-14T22:13:20.001250+00:00","interface":"eth1","vlan":100,"family":"ipv4",'
        '"src_ip":"203.0.113.9","dst_ip":"192.0.2.1","src_port":40312,"dst_port":22,"protocol":"tcp","protocol_num":6,"packet_size":60,'
        '"action":"DROP","verdict":"deny","rule":"203.0.113.0/24","suppressed":12,"flow_hash":4294967295}\n'
        '{"timestamp":1700000002.000000,"timestamp_iso":"2023-11-14T22:13:22.000000+00:00","interface":"eth0","vlan":null,"family":"ipv6",'
        '"src_ip":"2001:db8::1","dst_ip":"fe80::1","src_port":null,"dst_port":null,"protocol":"icmpv6","protocol_num":58,'
        '"packet_size":1514,"action":"LOG","verdict":"log","rule":"default","suppressed":0,"flow_hash":0}\n'
    )
    assert (CSV.head + CSV.lines(made)).decode() == (
        "timestamp,timestamp_iso,interface,vlan,family,src_ip,dst_ip,src_port,dst_port,protocol,protocol_num,packet_size,action,verdict,rule,"
        "suppressed,flow_hash\r\n"
        "1700000000.001250,2023-11-14T22:13:20.001250+00:00,eth1,100,ipv4,203.0.113.9,192.0.2.1,40312,22,tcp,6,60,DROP,deny,203.0.113.0/24,"
        "12,4294967295\r\n"
        "1700000002.000000,2023-11-14T22:13:22.000000+00:00,eth0,,ipv6,2001:db8::1,fe80::1,,,icmpv6,58,1514,LOG,log,default,0,0\r\n"
    )
    (first, _) = from_jsonl(made)
    assert datetime.fromisoformat(first["timestamp_iso"]).utcoffset().total_seconds() == 0


def test_a_line_by_the_elastic_common_schema():
    made = batch({"timestamp": 1_250_999, "outcome": Outcome.DENIED_DROPPED, "suppressed": 12, "vlan": 100, "slot": 1}, policy=POLICY)
    assert ECS.lines(made).decode() == (
        '{"@timestamp":"2023-11-14T22:13:20.001250+00:00","ecs":{"version":"8.11.0"},"event":{"kind":"event","category":["network"],'
        '"action":"dropped","type":["connection","denied"],"outcome":"success","module":"xdpmond","dataset":"xdpmond.events"},'
        '"source":{"ip":"203.0.113.9","port":40312},"destination":{"ip":"192.0.2.1","port":22},"network":{"type":"ipv4","transport":"tcp",'
        '"iana_number":"6","direction":"ingress","bytes":60,"vlan":{"id":"100"}},"observer":{"type":"firewall","product":"xdpmond",'
        '"ingress":{"interface":{"name":"eth1"}}},"rule":{"name":"203.0.113.0/24"},'
        '"xdpmond":{"verdict":"deny","suppressed":12,"flow_hash":0}}\n'
    )


def test_lines_for_a_person():
    made = batch(
        {"timestamp": 1_250_999, "outcome": Outcome.DENIED_DROPPED, "suppressed": 1200, "vlan": 100, "slot": 1},
        {"src": "2001:db8::1", "dst": "fe80::1", "has_ports": 0, "protocol": 58},
        {"src": "2001:db8::1", "dst": "fe80::1", "outcome": Outcome.DEFAULT_LOGGED},
        policy=POLICY,
    )
    assert CONSOLE.lines(made).decode().splitlines() == [
        "2023-11-14T22:13:20.001250+00:00 DROP deny  203.0.113.9:40312 > 192.0.2.1:22 tcp 60 bytes on eth1 vlan 100, rule 203.0.113.0/24,"
        " 1,200 more like it before",
        "2023-11-14T22:13:20.000001+00:00 LOG  log   2001:db8::1 > fe80::1 icmpv6 60 bytes on eth0, rule default",
        "2023-11-14T22:13:20.000002+00:00 LOG  log   [2001:db8::1]:40312 > [fe80::1]:22 tcp 60 bytes on eth0, rule default",
    ]


def test_nothing_makes_no_line():
    assert {of.lines(batch()) for of in (JSONL, CSV, ECS, CONSOLE)} == {b""}


@pytest.mark.parametrize("seed", range(8))
def test_any_events_in_any_mixture(seed):
    """Every field over its whole range, in batches of one family and of both."""
    rng = np.random.default_rng(seed)
    number = 3000
    rows = np.frombuffer(rng.bytes(number * abi.EVENT.itemsize), abi.EVENT).copy()
    rows["slot"] %= abi.MAX_SLOTS
    rows["outcome"] = rng.choice([outcome for outcome in Outcome if outcome is not Outcome.NO_SOURCE], number)
    rows["has_ports"] &= 1
    rows["timestamp"] >>= rng.integers(12, 40, number).astype("u8")
    for name in ("packet_size", "suppressed", "flow_hash"):
        rows[name] >>= rng.integers(0, 33, number).astype("u4")  # numbers of all lengths
    rows["vlan"][::2] = rng.integers(0, 4096, number // 2)
    families = rng.choice([4, 6] if seed % 2 else [4 + seed % 4], number).astype("u1")
    # Addresses with zeros in all places, which IPv6 shortens.
    for name in ("source", "destination"):
        rows[name][rng.random((number, 16)) < rng.random((number, 1))] = 0
        rows[name][families == 4, 4:] = 0
    check(EventBatch(rows, families, EPOCH, INTERFACES, POLICY.match))


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1))
def test_any_ipv6_address(addresses):
    made = batch(*({"src": "::1"} for _ in addresses))
    made.rows["source"] = np.frombuffer(b"".join(addresses), "u1").reshape(-1, 16)
    assert [event["src_ip"] for event in from_jsonl(made)] == [event.src_ip for event in made.values()]


@pytest.mark.parametrize(
    "text", ["::", "::1", "1::", "::ffff:1.2.3.4", "::1.2.3.4", "1:0:2::3", "0:1:0:1:0:1:0:1", "1::2:0:0:0", "64:ff9b::102:304"]
)
def test_shortened_addresses(text):
    made = batch({"src": "::1"}, {"src": "2001:db8:1:2:3:4:5:6"}, {"src": "::1"})
    made.rows["source"][::2] = np.frombuffer(socket.inet_pton(socket.AF_INET6, text), "u1")
    canonical = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))
    assert [event["src_ip"] for event in from_jsonl(made)] == [canonical, "2001:db8:1:2:3:4:5:6", canonical]


@given(st.lists(st.text(st.characters(blacklist_characters="\0/: \t\n\r"), min_size=1, max_size=15), min_size=16, max_size=16))
def test_hostile_interface_names_break_no_field(names):
    made = batch(*({"slot": slot} for slot in range(16)), interfaces=names)
    text = JSONL.lines(made)
    assert text.count(b"\n") == 16
    assert [json.loads(line)["interface"] for line in text.splitlines()] == names
    rows = from_csv(made)
    assert [len(row) for row in rows] == [len(lines.FIELDS)] * 16
    assert all(row["flow_hash"] == "0" and row["interface"].isprintable() for row in rows)
    assert [event["observer"]["ingress"]["interface"]["name"] for event in from_ecs(made)] == names
    shown = CONSOLE.lines(made).decode().split("\n")
    assert len(shown) == 17 and all(line.isprintable() for line in shown)


@pytest.mark.parametrize("name", ['e"},{"x":"', "e\\", 'a,b"c', "=cmd|x", "\x1b[2J", "\udcff", "\u2028", "🦊"])
def test_chosen_hostile_names(name):
    made = batch({}, {}, interfaces=[name] * 16)
    assert [event["interface"] for event in from_jsonl(made)] == [name, name]
    assert len(from_csv(made)) == 2


def test_every_protocol_is_named_as_elsewhere():
    made = batch(*({"protocol": number} for number in range(256)))
    check(made)
    assert {event["protocol"] for event in from_jsonl(made)} >= set(PROTOCOL_NAMES.values())


def test_a_source_that_is_no_address():
    made = batch({}, {})
    made.families[1] = 0
    first, second = from_jsonl(made)
    assert (first["src_ip"], second["src_ip"], second["family"]) == ("203.0.113.9", None, "other")
    check(made)
