"""IPFIX messages, taken apart by a decoder that knows RFC 7011 and nothing of the encoder."""

import ipaddress
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdpmond import ipfix
from xdpmond.flows import ENDED, EndReason
from xdpmond.ipfix import Encoder
from xdpmond.model import Outcome

# https://www.iana.org/assignments/ipfix: number -> (name, octets of its type)
IANA = {
    1: ("octetDeltaCount", 8), 2: ("packetDeltaCount", 8), 4: ("protocolIdentifier", 1), 6: ("tcpControlBits", 2),
    7: ("sourceTransportPort", 2), 8: ("sourceIPv4Address", 4), 10: ("ingressInterface", 4), 11: ("destinationTransportPort", 2),
    12: ("destinationIPv4Address", 4), 27: ("sourceIPv6Address", 16), 28: ("destinationIPv6Address", 16), 32: ("icmpTypeCodeIPv4", 2),
    61: ("flowDirection", 1), 89: ("forwardingStatus", 1), 136: ("flowEndReason", 1), 139: ("icmpTypeCodeIPv6", 2),
    152: ("flowStartMilliseconds", 8), 153: ("flowEndMilliseconds", 8),
}  # fmt: skip


class Collector:
    """Reads messages in the order in which they come. It accepts what the RFC allows, but of the types their full size alone."""

    def __init__(self):
        self.templates = {}
        self.records = []
        self.sequence = None
        self.largest = 0

    def take(self, data):
        version, length, self.time, sequence, self.domain = struct.unpack_from("!HHIII", data)
        assert version == 10 and length == len(data)
        assert self.sequence is None or sequence == self.sequence, "a gap"
        self.largest = max(self.largest, length)
        number, at = 0, 16
        while at < length:
            kind, size = struct.unpack_from("!HH", data, at)
            assert size >= 4 and at + size <= length
            content = data[at + 4 : at + size]
            if kind == 2:
                self.take_templates(content)
            else:
                number += self.take_data(kind, content)
            at += size
        assert at == length
        self.sequence = (sequence + number) % 2**32
        return number

    def take_templates(self, content):
        at = 0
        while at < len(content):
            number, count = struct.unpack_from("!HH", content, at)
            assert number >= 256
            at += 4
            fields = [struct.unpack_from("!HH", content, at + 4 * index) for index in range(count)]
            at += 4 * count
            for element, size in fields:
                assert IANA[element][1] == size
            self.templates[number] = [(IANA[element][0], size) for element, size in fields]

    def take_data(self, kind, content):
        fields = self.templates[kind]
        width = sum(size for _, size in fields)
        assert len(content) % width == 0 and content
        for at in range(0, len(content), width):
            values = {}
            for name, size in fields:
                raw = content[at : at + size]
                values[name] = ipaddress.ip_address(raw) if name.endswith("Address") else int.from_bytes(raw, "big")
                at += size
            self.records.append(values)
        return len(content) // width


def records(*given):
    made = np.zeros(len(given), ENDED)
    for number, fields in enumerate(given):
        fields = {"src": "192.0.2.1", "dst": "198.51.100.7", "source_port": 40000, "port": 443, "protocol": 6, "packets": 3, "bytes": 300,
                  "ip_bytes": 258, "outcome": Outcome.ALLOWED, "reason": EndReason.IDLE, "first_seen": 1700000000.25,
                  "last_seen": 1700000009.875, **fields}  # fmt: skip
        for name, text in (("source", fields.pop("src")), ("destination", fields.pop("dst"))):
            address = ipaddress.ip_address(text)
            made[number][name][: len(address.packed)] = np.frombuffer(address.packed, "u1")
            made[number]["family"] = address.version
        for name, value in fields.items():
            made[number][name] = value
    return made


INTERFACES = {0: 7, 2: 9}


def collected(given, size=1400, ifindexes=INTERFACES):
    collector, encoder = Collector(), Encoder(5, size)
    collector.take(encoder.templates(100.0).data)
    for message in encoder.flows(given, ifindexes, 1700000010.9):
        assert collector.take(message.data) == message.records
    return collector


def test_a_record_says_all_that_is_known():
    collector = collected(records({"tcp_flags": 0x1B, "slot": 2, "outcome": Outcome.DENIED_DROPPED, "reason": EndReason.END_OF_FLOW}))
    assert (collector.domain, collector.time) == (5, 1700000010)
    assert collector.records == [
        {
            "sourceIPv4Address": ipaddress.ip_address("192.0.2.1"),
            "destinationIPv4Address": ipaddress.ip_address("198.51.100.7"),
            "sourceTransportPort": 40000,
            "destinationTransportPort": 443,
            "protocolIdentifier": 6,
            "tcpControlBits": 0x1B,
            "packetDeltaCount": 3,
            "octetDeltaCount": 258,
            "flowStartMilliseconds": 1700000000250,
            "flowEndMilliseconds": 1700000009875,
            "flowEndReason": 3,
            "forwardingStatus": 130,
            "ingressInterface": 9,
            "flowDirection": 0,
        }
    ]


def test_ipv6():
    (record,) = collected(records({"src": "2001:db8::1", "dst": "2001:db8::2", "protocol": 17, "slot": 1})).records
    assert str(record["sourceIPv6Address"]) == "2001:db8::1" and str(record["destinationIPv6Address"]) == "2001:db8::2"
    assert record["ingressInterface"] == 0 and record["forwardingStatus"] == 64
    assert not any("IPv4" in name for name in record)


@pytest.mark.parametrize(("src", "protocol", "name"), [("192.0.2.1", 1, "icmpTypeCodeIPv4"), ("2001:db8::1", 58, "icmpTypeCodeIPv6")])
def test_icmp_has_a_type_and_a_code_and_no_ports(src, protocol, name):
    one, unread = {"src": src, "dst": src, "protocol": protocol, "port": 4, "source_port": 13}, {"port": 0, "source_port": 0}
    known, unknown = sorted(collected(records(one, {**one, **unread})).records, key=len)
    assert known[name] == 3 << 8 | 13 and "sourceTransportPort" not in known
    assert name not in unknown and unknown["sourceTransportPort"] == unknown["destinationTransportPort"] == 0


def test_the_highest_icmp_type():
    (record,) = collected(records({"protocol": 1, "port": 256, "source_port": 255})).records
    assert record["icmpTypeCodeIPv4"] == 0xFFFF


@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_was_dropped_is_said_to_be(outcome):
    (record,) = collected(records({"outcome": outcome})).records
    dropped = (Outcome.DENIED_DROPPED, Outcome.DEFAULT_DENIED_DROPPED, Outcome.UNREADABLE_DROPPED)
    assert (record["forwardingStatus"] == 130) == (outcome in dropped)


def test_templates_fit_in_the_smallest_message_and_count_as_no_record():
    encoder = Encoder(0, ipfix.SMALLEST_MESSAGE)
    collector = Collector()
    for _ in range(2):
        assert collector.take(encoder.templates(1.0).data) == 0
    assert collector.largest <= ipfix.SMALLEST_MESSAGE
    assert set(collector.templates) == {256, 257, 258, 259}


def test_the_sequence_number_wraps():
    encoder, collector = Encoder(5, 1400), Collector()
    collector.take(encoder.templates(1.0).data)
    encoder._sequence = collector.sequence = 2**32 - 1
    for message in encoder.flows(records({}, {}), {}, 1.0):
        collector.take(message.data)
    assert collector.sequence == 1


PAIRS = st.one_of(*(st.tuples(st.ip_addresses(v=version), st.ip_addresses(v=version)) for version in (4, 6)))
RECORD = st.fixed_dictionaries(
    {
        "pair": PAIRS, "source_port": st.integers(0, 65535), "port": st.integers(0, 65535), "protocol": st.sampled_from([6, 17, 132, 47]),
        "packets": st.integers(0, 2**64 - 1), "ip_bytes": st.integers(0, 2**64 - 1), "tcp_flags": st.integers(0, 255),
        "slot": st.integers(0, 15), "reason": st.integers(1, 5),
    }
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(RECORD, max_size=60), st.integers(ipfix.SMALLEST_MESSAGE, 1500))
def test_all_records_come_through_in_messages_of_bounded_size(drawn, size):
    pairs = [of.pop("pair") for of in drawn]
    made = records(*({**of, "src": str(source), "dst": str(destination)} for of, (source, destination) in zip(drawn, pairs, strict=True)))
    collector = collected(made, size, ifindexes={slot: slot + 100 for slot in range(16)})
    assert collector.largest <= size
    same = {"source_port": "sourceTransportPort", "port": "destinationTransportPort", "protocol": "protocolIdentifier",
            "packets": "packetDeltaCount", "ip_bytes": "octetDeltaCount", "tcp_flags": "tcpControlBits",
            "reason": "flowEndReason"}  # fmt: skip
    wanted = [(*map(str, pair), of["slot"] + 100, *(of[name] for name in same)) for of, pair in zip(drawn, pairs, strict=True)]
    got = []
    for of in collector.records:
        version = "IPv4" if "sourceIPv4Address" in of else "IPv6"
        ends = str(of[f"source{version}Address"]), str(of[f"destination{version}Address"])
        got.append((*ends, of["ingressInterface"], *(of[name] for name in same.values())))
    assert sorted(got) == sorted(wanted)


def test_messages_are_filled():
    """As few as hold them: 25 records of 54 bytes in 1400."""
    messages = list(Encoder(0, 1400).flows(records(*[{"port": port} for port in range(1, 101)]), {}, 0.0))
    assert [message.records for message in messages] == [25, 25, 25, 25]
