"""Messages: ids that never change, fields by the contract, and a catalog that explains each."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.messages import Message, Priority, Record, endpoint, event_fields, packet_record, visible
from xdpmond.model import Family, Outcome, PacketEvent

CATALOG = Path(__file__).parents[2] / "systemd" / "xdpmond.catalog"
EVENT = PacketEvent(
    timestamp=1700000000.25, interface="eth0", vlan=None, family=Family.IPV4, src_ip="203.0.113.9", dst_ip="192.0.2.1", src_port=40312,
    dst_port=22, protocol_num=6, packet_size=60, outcome=Outcome.DENIED_DROPPED, rule="203.0.113.0/24", suppressed=1200,
    flow_hash=4294967295,
)  # fmt: skip
FIELDS = """timestamp timestamp_iso interface vlan family src_ip dst_ip src_port dst_port protocol protocol_num packet_size action
verdict rule suppressed flow_hash""".split()
PUBLISHED = {
    "STARTED": "51f8c6b57f670f019431a11b37b127b7",
    "STOPPING": "45aac42e6ba39214fdd5b33d2698cf51",
    "RELOADED": "5f98893aec9001deb753dfa6577bc532",
    "RELOAD_REFUSED": "8cecb4940a314ff54756ef0a7878966e",
    "POLICY_CHANGED": "ef6d977f1880a592559feb4ca15953f2",
    "ENTRY_EXPIRED": "2a6f432405f53089f02e66a1c14dd9de",
    "MODE_CHANGED": "963474c8ac7fba08299baad6ed6df24d",
    "PACKET_LOGGED": "161eca72c7a86163fcf6748aed977bfe",
    "PACKET_DROPPED": "b23f5f1abe5411a6ce0fe353e650f28c",
    "SUMMARY": "8b5cd34e7b815f23a656da631c8e3132",
    "INTERFACE_ATTACHED": "317dda6f888900f32c41ca9cc346302e",
    "INTERFACE_LOST": "5995305cf6a6f6a588947e7f16a92133",
    "INTERFACE_REFUSED": "a3375baaf7069a82dbbc3bc34c8312bf",
    "INTERFACE_WAITING": "543265bff402b78d8b833832172ce716",
    "PROGRAM_REPLACED": "3045009b986297e73cc6efb6e372c8ca",
    "TOOK_OVER": "a4dcb7d923a5ebb72beacd5be6daa22a",
    "CHANGE_REFUSED": "36223527085bdd534108a82b44dfa9be",
    "BUS_PROBLEM": "4b68b7c6e4b6e52dcdf148b558b10edc",
    "BUS_CONNECTED": "7a1c4b6fd2a94c0e9d1f3b58e6a07c42",
    "STATE_PROBLEM": "a2474bce81d257331e428acfe6e872d0",
    "LOG_PROBLEM": "0666b86fbada21892fba6f408fbc5270",
    "IPFIX_PROBLEM": "127519c89a0c3375f51b298eef4f73bf",
    "METRICS_PROBLEM": "f556d090266bd9f1bc7d04cfda2c63c1",
    "WARNING": "b89f83a4873f4a8d9d6b1afbd1a173dc",
    "INTERNAL_ERROR": "3f40337a28224f52e000d65f2f15a145",
}
"""People's rules match on these. A line is added here for a new message; none is ever changed."""


def catalog_entries() -> dict[str, str]:
    """The text of every entry by its id."""
    parts = re.split(r"^-- ([0-9a-f]{32})$", CATALOG.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_published_ids_never_change() -> None:
    assert {message.name: message.message_id for message in Message} == PUBLISHED
    assert len(set(PUBLISHED.values())) == len(PUBLISHED)


def test_a_record_has_the_severity_of_its_message_unless_it_says_otherwise() -> None:
    assert Record(Message.BUS_PROBLEM, "gone").severity == Priority.WARNING
    assert Record(Message.BUS_PROBLEM, "back", priority=6).severity == Priority.INFO


def test_an_event_has_the_fields_of_the_contract() -> None:
    fields = event_fields(EVENT)
    assert list(fields) == FIELDS
    assert json.loads(json.dumps(fields)) == {
        "timestamp": 1700000000.25, "timestamp_iso": "2023-11-14T22:13:20.250000+00:00", "interface": "eth0", "vlan": None,
        "family": "ipv4", "src_ip": "203.0.113.9", "dst_ip": "192.0.2.1", "src_port": 40312, "dst_port": 22, "protocol": "tcp",
        "protocol_num": 6, "packet_size": 60, "action": "DROP", "verdict": "deny", "rule": "203.0.113.0/24",
        "suppressed": 1200, "flow_hash": 4294967295,
    }  # fmt: skip


def test_a_whole_second_keeps_its_microseconds_in_the_text() -> None:
    assert event_fields(dataclasses.replace(EVENT, timestamp=1700000000.0))["timestamp_iso"] == "2023-11-14T22:13:20.000000+00:00"


@pytest.mark.parametrize(
    ("outcome", "rule", "message", "verdict", "end"),
    [
        (Outcome.DENIED_DROPPED, "203.0.113.0/24", "PACKET_DROPPED", "deny", "denied by 203.0.113.0/24"),
        (Outcome.DENIED_PASSED, "203.0.113.0/24", "PACKET_LOGGED", "deny", "denied by 203.0.113.0/24, passed in monitor mode"),
        (Outcome.DEFAULT_DENIED_DROPPED, "default", "PACKET_DROPPED", "deny", "on no list, denied by default"),
        (Outcome.DEFAULT_DENIED_PASSED, "default", "PACKET_LOGGED", "deny", "on no list, denied by default, passed in monitor mode"),
        (Outcome.DEFAULT_LOGGED, "default", "PACKET_LOGGED", "log", "on no list"),
        (Outcome.DEFAULT_ALLOWED, "default", "PACKET_LOGGED", "allow", "on no list, allowed by default"),
        (Outcome.ALLOWED, "10.0.0.0/8", "PACKET_LOGGED", "allow", "allowed by 10.0.0.0/8"),
        (Outcome.ESSENTIAL_PASSED, "default", "PACKET_LOGGED", "deny", "denied by default, passed because the host needs it"),
        (Outcome.NO_SOURCE, "default", "PACKET_LOGGED", None, "no readable source"),
    ],
)
def test_a_packet_is_told_by_what_was_done_and_why(outcome: Outcome, rule: str, message: str, verdict: str | None, end: str) -> None:
    record = packet_record(dataclasses.replace(EVENT, outcome=outcome, rule=rule, suppressed=0))
    action = "DROP" if message == "PACKET_DROPPED" else "LOG"
    assert (record.message.name, record.fields["action"], record.fields["verdict"]) == (message, action, verdict)
    assert record.text == f"{action} 203.0.113.9:40312 -> 192.0.2.1:22 tcp, 60 bytes on eth0: {end}"
    assert record.timestamp == EVENT.timestamp


def test_every_outcome_can_be_told() -> None:
    assert all(packet_record(dataclasses.replace(EVENT, outcome=outcome)).text for outcome in Outcome)


def test_the_sentence_names_vlan_and_what_was_suppressed_and_no_port_that_is_not_known() -> None:
    event = dataclasses.replace(EVENT, vlan=0, family=Family.IPV6, src_ip="2001:db8::1", dst_ip="2001:db8::2", src_port=None, dst_port=None,
                                protocol_num=58)  # fmt: skip
    assert packet_record(event).text == (
        "DROP 2001:db8::1 -> 2001:db8::2 icmpv6, 60 bytes on eth0 vlan 0: denied by 203.0.113.0/24, 1,200 more like it before"
    )
    assert endpoint("2001:db8::1", 0) == "[2001:db8::1]:0"


def test_an_interface_name_cannot_command_a_terminal() -> None:
    """Linux takes any byte in a name but white space, / and :."""
    assert "on e\\x1b[2J:" in packet_record(dataclasses.replace(EVENT, interface="e\x1b[2J")).text


@given(st.text())
def test_visible_text_is_printable_and_can_be_encoded(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    shown.encode()
    assert visible(shown) == shown
    assert text != "".join(c for c in text if c.isprintable()) or shown == text


def test_visible_keeps_what_it_is_told_to() -> None:
    assert visible("a\nb\tc\rd\u202ee\U000e0001", keep="\n\t") == "a\nb\tc\\x0dd\\u202ee\\U000e0001"


def test_the_catalog_explains_every_message_and_nothing_else() -> None:
    assert list(catalog_entries()) == [message.message_id for message in Message]


@pytest.mark.parametrize("message", Message, ids=lambda message: message.name)
def test_an_entry_says_what_happened_and_what_to_do(message: Message) -> None:
    entry = catalog_entries()[message.message_id]
    head, _, body = entry.strip("\n").partition("\n\n")
    assert re.fullmatch(r"Subject: \S.*\nDefined-By: xdpmond\nDocumentation: (man:[a-z0-9.]+\([158]\) ?)+", head)
    assert body.count("\n\n") >= 1, "a paragraph on what happened, and one on what to do"
    assert max(map(len, body.splitlines())) <= 80
    assert all(re.fullmatch("XDPMOND_[A-Z_]+", name) for name in re.findall("@([^@\n]*)@", entry))
    assert entry.count("@") % 2 == 0


@pytest.mark.parametrize("message", [Message.PACKET_LOGGED, Message.PACKET_DROPPED], ids=lambda message: message.name)
def test_an_entry_on_packets_uses_fields_that_exist(message: Message) -> None:
    used = set(re.findall("@XDPMOND_([A-Z_]+)@", catalog_entries()[message.message_id]))
    assert used and used <= {name.upper() for name in FIELDS}


def test_journalctl_takes_the_catalog(tmp_path: Path) -> None:
    for directory in ("usr/lib/systemd/catalog", "var/lib/systemd/catalog"):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copy(CATALOG, tmp_path / "usr/lib/systemd/catalog")
    journalctl = ["journalctl", "--root", str(tmp_path)]
    done = subprocess.run([*journalctl, "--update-catalog"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    listed = subprocess.run([*journalctl, "--list-catalog"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(PUBLISHED.values())
    assert all(line.split(" ", 2)[1] == "xdpmond:" for line in listed.splitlines())
