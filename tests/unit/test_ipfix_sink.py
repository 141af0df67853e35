"""The way to the collector, over the loopback interface: all that was put arrives; one that is away is told once and gets what waited."""

import dataclasses
import socket
import time

import pytest
from test_ipfix import Collector, records

from xdpmond.config import IPFIX
from xdpmond.messages import Message, Priority
from xdpmond.model import Endpoint
from xdpmond.sinks.ipfix import IpfixSink

PATIENCE = 20.0
SETTINGS = IPFIX(observation_domain=9, template_interval=3600.0)


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.01)
    return found


class Place:
    """A port at which a collector may listen or not."""

    def __init__(self, family=socket.AF_INET, host="127.0.0.1"):
        self.family, self.host = family, host
        self.listen()
        self.port = self.socket.getsockname()[1]
        self.collector = Collector()

    def listen(self, port=0):
        self.socket = socket.socket(self.family, socket.SOCK_DGRAM)
        self.socket.bind((self.host, port))
        self.socket.settimeout(PATIENCE)

    def leave(self):
        self.socket.close()

    def come_back(self):
        """Another one, which knows nothing."""
        self.listen(self.port)
        self.collector = Collector()

    def take(self, number):
        """The records, when there are so many."""
        while len(self.collector.records) < number:
            self.collector.take(self.socket.recv(65536))
        return self.collector.records


@pytest.fixture
def place():
    made = Place()
    yield made
    made.leave()


@pytest.fixture
def begin(place):
    """Start a sink for it."""
    sinks = []

    def begin(settings=SETTINGS, host="127.0.0.1", **more):
        told, drained = [], []
        sink = IpfixSink(settings, Endpoint(host, place.port), told.append, lambda: drained.append(sink.room), **more)
        sink.told, sink.drains = told, drained
        sinks.append(sink)
        return sink

    yield begin
    for sink in sinks:
        sink.close()
        assert sink.ended


def many(number):
    return records(*({"source_port": port} for port in range(number)))


def ports(found):
    return [record["sourceTransportPort"] for record in found]


def test_all_that_is_put_arrives_in_order_and_without_a_gap(place, begin):
    sink = begin()
    for _ in range(3):
        sink.put(many(1000), {0: 3})
    assert ports(place.take(3000)) == [*range(1000)] * 3
    assert place.collector.sequence == 3000 and place.collector.domain == 9
    assert {record["ingressInterface"] for record in place.collector.records} == {3}
    until(lambda: sink.room == 65536, "room when all is sent")
    assert (sink.sent, sink.lost, sink.told) == (3000, 0, [])
    assert sink.drains[-1] == 65536


def test_a_name_is_looked_up(place, begin):
    begin(host="localhost").put(many(1), {})
    assert len(place.take(1)) == 1


def test_ipv6():
    place, told = Place(socket.AF_INET6, "::1"), []
    sink = IpfixSink(SETTINGS, Endpoint("::1", place.port), told.append, lambda: None)
    try:
        sink.put(many(2), {})
        assert len(place.take(2)) == 2 and not told
    finally:
        sink.close()
        place.leave()


def test_templates_are_sent_again_and_again(place, begin):
    begin(dataclasses.replace(SETTINGS, template_interval=0.05))
    for _ in range(5):
        place.collector.templates.clear()
        assert place.collector.take(place.socket.recv(65536)) == 0
        assert place.collector.templates


def test_room_is_what_is_left(place, begin):
    place.leave()
    sink = begin(capacity=100)
    until(lambda: sink.told, "word of the collector that is away")
    assert sink.room == 100
    sink.put(many(60), {})
    assert sink.room == 40
    sink.put(many(60), {})
    assert sink.room == 0


def test_a_collector_that_is_away_is_told_once_and_gets_what_waited_when_it_comes(place, begin):
    place.leave()
    sink = begin(retry=0.05)
    until(lambda: sink.told, "word of the collector that is away")
    sink.put(many(500), {})
    place.come_back()
    assert ports(place.take(500)) == [*range(500)], "it has the templates before the first record"
    until(lambda: len(sink.told) == 2, "word that it is there again")
    assert [record.message for record in sink.told] == [Message.IPFIX_PROBLEM] * 2
    assert f"127.0.0.1:{place.port} cannot be reached: Connection refused" in sink.told[0].text
    assert sink.told[0].severity == Priority.WARNING and sink.told[1].severity == Priority.NOTICE
    assert "0 records of flows were lost" in sink.told[1].text
    until(lambda: sink.room == 65536, "room when all is sent")
    assert (sink.sent, sink.lost) == (500, 0)


def test_what_a_collector_refused_is_counted_and_the_books_balance(place, begin):
    """It goes in the middle of many; what it had not read by then is its own loss."""
    sink = begin(retry=0.05)
    sink.put(many(1000), {})
    assert len(place.take(200)) >= 200
    place.leave()
    for _ in range(20):
        sink.put(many(1000), {})
    until(lambda: sink.told, "word of the collector that went")
    place.come_back()
    until(lambda: sink.room == 65536 and len(sink.told) % 2 == 0, "room when all is sent")
    assert sink.lost > 0
    assert sink.sent + sink.lost == 21_000


def test_the_end_waits_for_what_is_not_yet_sent(place, begin):
    sink = begin()
    sink.put(many(2000), {})
    sink.close()
    assert sink.ended and sink.sent == 2000
    assert len(place.take(2000)) == 2000
    assert sink.room == 0
    sink.put(many(5), {})
    assert sink.lost == 5, "what comes after the end"


def test_the_end_does_not_wait_for_one_that_is_away(place, begin):
    place.leave()
    sink = begin()
    until(lambda: sink.told, "word of the collector that is away")
    sink.put(many(300), {})
    sink.close()
    assert sink.ended and (sink.sent, sink.lost) == (0, 300)
