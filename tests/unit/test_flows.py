"""Records of flows against a plain model of them: whatever windows come, nothing is counted twice and nothing is gone unsaid."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdpmond import flows
from xdpmond.flowrows import FLOW, NO_FLOWS
from xdpmond.flows import EndReason, FlowCache, Timeouts
from xdpmond.model import Family, Outcome, parse_address

TIMEOUTS = Timeouts(active=300.0, inactive=30.0)
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10


def row(source="192.0.2.1", sport=40000, port=443, *, destination="198.51.100.7", protocol=6, packets=1, size=100, flags=0, first=0.0,
        last=0.0, slot=0, outcome=Outcome.ALLOWED):  # fmt: skip
    made = np.zeros(1, FLOW)
    family, packed = parse_address(source)
    made["source"][0, : len(packed)] = np.frombuffer(packed, "u1")
    packed = parse_address(destination)[1]
    made["destination"][0, : len(packed)] = np.frombuffer(packed, "u1")
    values = {"family": family, "source_port": sport, "port": port, "protocol": protocol, "packets": packets, "bytes": packets * size,
              "ip_bytes": packets * (size - 14), "tcp_flags": flags, "slot": slot, "outcome": outcome, "first_seen": first,
              "last_seen": last, "syns": int(flags & SYN > 0), "talker_port": port, "pad": 77}  # fmt: skip
    for name, value in values.items():
        made[name] = value
    return made


def together(*rows):
    return np.concatenate([NO_FLOWS, *rows])


def close(cache, number, *rows, timeouts=TIMEOUTS, seconds=10.0):
    """The window `number`, from 1 on."""
    cache.close(together(*rows), (number - 1) * seconds, number * seconds, timeouts)


def taken(cache, most=1000):
    found = []
    while len(some := cache.take(most)):
        assert len(some) <= most
        found += list(some)
    return found


def test_a_record_is_the_sum_of_its_windows():
    cache = FlowCache(10)
    close(cache, 1, row(packets=3, first=4.0, last=8.5, flags=SYN, slot=1))
    close(cache, 2, row(packets=5, first=4.0, last=19.0, flags=ACK, slot=2, outcome=Outcome.DENIED_PASSED))
    assert (len(cache), cache.due) == (1, 0)
    close(cache, 5)
    assert cache.due == 1
    (record,) = taken(cache)
    assert record["packets"] == 8 and record["bytes"] == 800 and record["ip_bytes"] == 688 and record["syns"] == 1
    assert (record["first_seen"], record["last_seen"]) == (4.0, 19.0)
    assert record["tcp_flags"] == SYN | ACK
    assert record["slot"] == 2 and record["outcome"] == Outcome.DENIED_PASSED
    assert record["reason"] == EndReason.IDLE
    assert record["talker_port"] == 443 and record["source_port"] == 40000 and record["family"] == Family.IPV4
    assert (len(cache), cache.due) == (0, 0) and not cache.lost.records


@pytest.mark.parametrize(
    ("change"),
    [{"source": "192.0.2.2"}, {"destination": "198.51.100.8"}, {"sport": 40001}, {"port": 444}, {"protocol": 17},
     {"source": "c000:201::", "destination": "c633:6407::"}],
)  # fmt: skip
def test_what_differs_in_one_part_is_another_flow(change):
    """The last one has the same bytes in another family."""
    cache = FlowCache(10)
    close(cache, 1, row(), row(**change))
    close(cache, 2, row(packets=2), row(packets=4, **change))
    assert len(cache) == 2
    close(cache, 9)
    assert sorted(record["packets"] for record in taken(cache)) == [3, 5]


def test_a_flow_that_goes_on_ends_by_the_active_timeout_and_begins_anew():
    cache = FlowCache(10)
    for number in range(1, 32):
        close(cache, number, row(first=2.0, last=number * 10 - 1))
        if number == 31:
            assert cache.due == 1
            break
        assert cache.due == 0, number
    (record,) = taken(cache)
    assert record["reason"] == EndReason.ACTIVE and record["packets"] == 31 and record["first_seen"] == 2.0
    close(cache, 32, row(first=2.0, last=319.0))
    cache.flush()
    (record,) = taken(cache)
    assert record["packets"] == 1 and record["first_seen"] == 310.0, "it began with the window, as far as is known"


def test_the_times_of_a_record_lie_within_its_windows():
    """A row is read after its window has ended, when the flow may have gone on."""
    cache = FlowCache(10)
    close(cache, 3, row(first=1.0, last=33.0))
    cache.flush()
    (record,) = taken(cache)
    assert (record["first_seen"], record["last_seen"]) == (20.0, 30.0)


@pytest.mark.parametrize("flags", [FIN | ACK, RST, FIN | RST])
def test_tcp_says_that_it_is_over(flags):
    cache = FlowCache(10)
    close(cache, 1, row(flags=flags, last=7.9))
    (record,) = taken(cache)
    assert record["reason"] == EndReason.END_OF_FLOW


def test_what_ended_a_moment_ago_is_waited_on_for_its_last_packet():
    cache = FlowCache(10)
    close(cache, 1, row(flags=FIN | ACK, last=9.9))
    assert cache.due == 0
    close(cache, 2, row(flags=ACK, last=10.1))
    (record,) = taken(cache)
    assert record["packets"] == 2 and record["reason"] == EndReason.END_OF_FLOW


def test_the_flags_of_another_protocol_end_nothing():
    cache = FlowCache(10)
    close(cache, 1, row(protocol=17, flags=FIN | RST, last=1.0))
    assert cache.due == 0


def test_what_finds_no_room_ends_at_once():
    cache = FlowCache(2)
    close(cache, 1, *(row(sport=port, last=9.0, packets=port) for port in (1, 2, 3, 4)))
    assert (len(cache), cache.due) == (2, 2)
    refused = taken(cache)
    assert {record["reason"] for record in refused} == {EndReason.LACK_OF_RESOURCES}
    cache.flush()
    assert sorted(record["packets"] for record in [*refused, *taken(cache)]) == [1, 2, 3, 4]
    assert not cache.lost.records


def test_what_has_ended_makes_room_before_others_are_refused():
    cache = FlowCache(3)
    close(cache, 1, *(row(sport=port, last=1.0) for port in (1, 2, 3)))
    close(cache, 4, row(sport=4, last=39.0), row(sport=5, last=39.0))
    assert len(cache) == 3, "one that has ended has kept its place, since nobody needed it"
    assert sorted((record["source_port"], record["reason"]) for record in taken(cache)) == [(1, 1), (2, 1), (3, 1)]
    assert len(cache) == 2


def test_what_nobody_takes_is_lost_when_its_place_was_needed_and_counted():
    cache = FlowCache(2)
    close(cache, 1, *(row(sport=port, packets=2, size=114) for port in (1, 2, 3, 4)))
    assert cache.lost == flows.Lost()
    close(cache, 2)
    assert cache.lost == flows.Lost(records=2, packets=4, octets=400)
    close(cache, 9)
    assert cache.due == 2, "in the cache they wait for as long as it takes"


def test_a_clock_that_is_set_back_leaves_nothing_behind_for_ever():
    cache = FlowCache(4)
    close(cache, 100, row(last=999.0))
    close(cache, 2)
    (record,) = taken(cache)
    assert record["reason"] == EndReason.IDLE


def test_two_flows_with_the_same_key_are_not_taken_for_one(monkeypatch):
    monkeypatch.setattr(flows, "_hash", lambda words: np.zeros(len(words), "u8"))
    cache = FlowCache(10)
    close(cache, 1, row(sport=1, packets=1), row(sport=2, packets=2))
    close(cache, 2, row(sport=1, packets=4), row(sport=2, packets=8))
    cache.flush()
    by_port = {}
    for record in taken(cache):
        by_port.setdefault(record["source_port"], []).append(int(record["packets"]))
    lost = cache.lost.packets
    assert sum(by_port[1]) == 5 and sum(by_port.get(2, [])) + lost == 10


def test_memory_of_a_flood_is_given_back(monkeypatch):
    monkeypatch.setattr(flows, "_LITTLE", 10)
    cache = FlowCache(1000)
    many = [row(sport=port, last=1.0, packets=port) for port in range(1, 101)]
    close(cache, 1, *many)
    close(cache, 4, row(sport=5, last=39.0, packets=1000), row(sport=77, last=39.0, packets=2000))
    assert len(taken(cache, 30)) == 98
    close(cache, 5, row(sport=77, last=49.0), row(sport=200, last=49.0))
    cache.flush()
    assert {int(record["source_port"]): int(record["packets"]) for record in taken(cache)} == {5: 1005, 77: 2078, 200: 1}


# The strongest


def everything(rows):
    return np.ones(len(rows), bool)


def test_the_strongest_are_those_of_records_and_running_window_together():
    cache = FlowCache(10)
    close(cache, 1, row(sport=1, packets=10, first=3.0, last=9.0), row(sport=2, packets=7), row(sport=3, packets=1))
    running = together(row(sport=2, packets=7, first=0.0, last=12.0), row(sport=4, packets=5, first=0.0, last=13.0))
    found = cache.strongest(running, 10.0, "packets", 3, everything)
    assert [(int(of["source_port"]), int(of["packets"])) for of in found] == [(2, 14), (1, 10), (4, 5)]
    assert found["first_seen"].tolist() == [0.0, 3.0, 10.0] and found["last_seen"][0] == 12.0
    assert len(cache) == 3 and cache.strongest(NO_FLOWS, 10.0, "packets", 1, everything)["packets"] == 10, "nothing has changed"


def test_only_what_is_wanted():
    cache = FlowCache(10)
    close(cache, 1, row(sport=1, packets=10), row(sport=2, packets=7, port=53))
    found = cache.strongest(together(row(sport=9, port=53)), 10.0, "bytes", 5, lambda rows: rows["port"] == 53)
    assert found["source_port"].tolist() == [2, 9]


def test_an_empty_cache_has_nothing():
    assert not len(FlowCache(4).strongest(NO_FLOWS, 0.0, "bytes", 5, everything))


# Any sequence of windows


@dataclass
class Plain:
    packets: int
    first: float
    last: float
    flags: int


class Model:
    """What the cache ought to do, a flow at a time; without bounds."""

    def __init__(self):
        self.records = {}
        self.ended = []

    def close(self, rows, started, ended):
        for of in rows:
            name = (int(of["source_port"]), int(of["protocol"]))
            last = min(max(float(of["last_seen"]), started), ended)
            first = min(max(float(of["first_seen"]), started), last)
            held = self.records.setdefault(name, Plain(0, first, last, 0))
            held.packets += int(of["packets"])
            held.last, held.flags = max(held.last, last), held.flags | int(of["tcp_flags"])
        for name, held in list(self.records.items()):
            reason = self.reason(name, held, ended)
            if reason:
                self.ended.append((name, held.packets, held.first, held.last, held.flags, reason))
                del self.records[name]

    def reason(self, name, held, now):
        if name[1] == 6 and held.flags & (FIN | RST) and now - held.last >= flows.LINGER:
            return 3
        if now - held.last >= TIMEOUTS.inactive:
            return 1
        return 2 if now - held.first >= TIMEOUTS.active else 0


PACKETS = st.tuples(st.integers(1, 12), st.sampled_from([6, 17]), st.integers(1, 9), st.sampled_from([0, SYN, ACK, FIN, RST]),
                    st.floats(0, 60), st.floats(0, 60))  # fmt: skip
WINDOWS = st.lists(st.lists(PACKETS, max_size=12, unique_by=lambda of: of[:2]), max_size=12)


def windows_of(drawn):
    for number, window in enumerate(drawn):
        started = number * 45.0
        yield started, started + 45.0, together(
            *(row(sport=sport, protocol=protocol, packets=packets, flags=flags, first=started + early - 30, last=started + late)
              for sport, protocol, packets, flags, early, late in window)
        )  # fmt: skip


@settings(deadline=None)
@given(WINDOWS, st.integers(1, 5))
def test_records_are_those_of_the_model(drawn, most):
    cache, model, ended = FlowCache(64), Model(), []
    for started, until, rows in windows_of(drawn):
        cache.close(rows, started, until, TIMEOUTS)
        model.close(rows, started, until)
        ended += [((int(of["source_port"]), int(of["protocol"])), int(of["packets"]), float(of["first_seen"]), float(of["last_seen"]),
                   int(of["tcp_flags"]), int(of["reason"])) for of in taken(cache, most)]  # fmt: skip
        assert len(cache) == len(model.records)
    assert sorted(ended) == sorted(model.ended)


@settings(deadline=None)
@given(WINDOWS, st.integers(1, 8), st.integers(0, 6), st.integers(1, 5))
def test_the_books_balance_whatever_the_room_and_whoever_takes(drawn, room, take, chunk):
    """What came in is what was taken, what is there and what is said to be lost."""
    before, flows.CHUNK = flows.CHUNK, chunk
    try:
        cache, came, went = FlowCache(room), np.zeros(3, "u8"), np.zeros(3, "u8")
        for started, until, rows in windows_of(drawn):
            came += [rows["packets"].sum(), rows["bytes"].sum(), rows["ip_bytes"].sum()]
            cache.close(rows, started, until, TIMEOUTS)
            assert len(cache) <= room
            gone = cache.take(take)
            assert len(gone) <= take and gone["reason"].all()
            went += [gone["packets"].sum(), gone["bytes"].sum(), gone["ip_bytes"].sum()]
        cache.flush()
        while len(gone := cache.take(3)):
            went += [gone["packets"].sum(), gone["bytes"].sum(), gone["ip_bytes"].sum()]
        assert (len(cache), cache.due) == (0, 0)
        assert came[0] == went[0] + cache.lost.packets and came[2] == went[2] + cache.lost.octets
    finally:
        flows.CHUNK = before
