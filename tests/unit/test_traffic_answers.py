"""Talkers, networks, ports and windows as the service answers them, from rows made by hand."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicefakes import ROOT, START, World, entry, rows, run

from xdpmond.answers import MIXED
from xdpmond.config import Config
from xdpmond.config import Names as Files
from xdpmond.errors import ConfigError, UsageError
from xdpmond.messages import Message
from xdpmond.model import Count, Family, Outcome, PortRange, ProtocolClass, Total, Verdict
from xdpmond.names import Name, Names
from xdpmond.policy import Policy
from xdpmond.ports import Unique
from xdpmond.rows import merge
from xdpmond.state import State
from xdpmond.windows import Progress, Totals, Window

LAST = merge(rows(
    ("192.0.2.1", 6, 22, 10, 1000), ("192.0.2.1", 6, 80, 1, 100), ("192.0.2.2", 6, 22, 5, 500), ("198.51.100.1", 17, 53, 2, 200),
    ("10.0.0.1", 6, 22, 100, 9000), ("2001:db8::1", 6, 22, 3, 300), ("2001:db8::2", 6, 22, 1, 100), ("192.0.2.9", 1, 9, 4, 400),
))  # fmt: skip
RUNNING = merge(rows(
    ("192.0.2.1", 6, 22, 2, 200), ("192.0.2.3", 6, 22, 1, 100), ("10.0.0.2", 6, 443, 1, 60), ("10.0.0.1", 6, 22, 1, 60),
))  # fmt: skip


class FakeNames(Names):
    """The country of a prefix is its length."""

    def of(self, family, packed, length=None):
        return Name(str(length), int(family), None)


def world(config: Config | None = None, *, entries=(), last=LAST, running=RUNNING, exact=True, sketches=None) -> World:
    """60 s after the last full window, which began at START."""
    made = World(config, State(Policy(entries)))
    made.kernel.running = running
    if sketches is not None:
        made.kernel.sketches = sketches
    service = made.service
    service.progress = Progress(Totals([], START))
    window = Window(7, START, START + 60, 60, last, exact, sketches).counted(service.config.ports)
    cells = [Total("eth0", Family.IPV4, ProtocolClass.TCP, Outcome.DENIED_DROPPED, Count(9, 900))]
    service.window_closed(window, Totals(cells, START + 60), Count(), 0)
    made.now = START + 120
    return made


def top(made: World, **options):
    return [json.loads(json.dumps(row)) for row in run(lambda: made.service.top(**options))]


def ports(made: World, **options):
    *shown, total = [json.loads(json.dumps(row)) for row in run(lambda: made.service.ports(**options))]
    assert total["total"] is True and all("total" not in row for row in shown)
    return shown, total


def sources(row):
    return (row["sources"]["ipv4"], row["sources"]["ipv6"]), (row["running"]["ipv4"], row["running"]["ipv6"])


def named(row):
    number = row["icmp_type"] if row["port"] is None else row["port"]
    return row["protocol"], number


# Ports


def test_ports_in_the_last_window_and_the_running_one():
    shown, total = ports(world())
    assert [named(row) for row in shown] == [("tcp", 22), ("icmp", 8), ("tcp", 80), ("tcp", 443), ("udp", 53)]
    ssh = shown[0]
    assert sources(ssh) == ((3, 2), (3, 0)) and (ssh["packets"], ssh["bytes"]) == (119, 10900)
    assert (ssh["running"]["packets"], ssh["running"]["bytes"]) == (4, 360)
    assert (ssh["protocol_num"], ssh["icmp_type"], ssh["exact"], ssh["error"]) == (6, None, True, None)
    assert sources(shown[3]) == ((0, 0), (1, 0)), "a port of the running window alone"
    assert sources(total) == ((5, 2), (4, 0)), "192.0.2.1 is on two ports, and one source"
    assert (total["packets"], total["port"], total["protocol"]) == (126, None, None)
    assert total["hidden"] == {"local": {"ipv4": 0, "ipv6": 0}, "ports": 0}


def test_local_sources_are_left_out_and_it_is_said():
    shown, total = ports(world(), local=False)
    assert [named(row) for row in shown] == [("tcp", 22), ("icmp", 8), ("tcp", 80), ("udp", 53)], "tcp/443 had none but local ones"
    assert sources(shown[0]) == ((2, 2), (2, 0)) and (shown[0]["packets"], shown[0]["running"]["packets"]) == (19, 3)
    assert sources(total) == ((4, 2), (2, 0)) and total["hidden"]["local"] == {"ipv4": 2, "ipv6": 0}
    assert ports(world(Config(show_local=False))) == (shown, total)
    assert ports(world(Config(show_local=False)), local=True) == ports(world())


def test_ports_of_the_configuration():
    shown, total = ports(world(Config(ports=(PortRange(6, 80, 443), PortRange(1)))))
    assert [named(row) for row in shown] == [("icmp", 8), ("tcp", 80), ("tcp", 443)]
    assert sources(total) == ((2, 0), (1, 0)) and total["hidden"]["ports"] == 2


def test_a_reload_of_the_ports_holds_at_once():
    made = world()
    made.files = Config(ports=(PortRange(17),))
    run(lambda: made.service.reload(caller=ROOT))
    shown, total = ports(made)
    assert [named(row) for row in shown] == [("udp", 53)] and total["hidden"]["ports"] == 4


def test_ports_that_are_asked_for():
    made = world(Config(ports=(PortRange(6),)))
    shown, total = ports(made, port=22)
    assert [named(row) for row in shown] == [("tcp", 22)] and sources(total) == ((3, 2), (3, 0)) and total["hidden"]["ports"] == 0
    assert [named(row) for row in ports(world(), protocol="icmp")[0]] == [("icmp", 8)]
    assert [named(row) for row in ports(world(), protocol="6", port=80)[0]] == [("tcp", 80)]
    assert ports(world(), port=9)[0] == [], "the port of ICMP is no port"
    for wrong in ({"protocol": "icmp", "port": 8}, {"protocol": "tpc"}, {"protocol": "256"}):
        with pytest.raises(UsageError):
            ports(world(), **wrong)


def test_a_limit_does_not_touch_the_total():
    shown, total = ports(world(), limit=1)
    assert len(shown) == 1 and total == ports(world())[1]


def test_the_last_window_alone():
    shown, total = ports(world(), interval=True)
    assert ("tcp", 443) not in [named(row) for row in shown] and total["sources"] == {"ipv4": 5, "ipv6": 2}
    assert all(row["running"] is None for row in [*shown, total])


def test_before_a_window_has_closed():
    made = World()
    made.kernel.running = RUNNING
    shown, total = ports(made)
    assert sources(shown[0]) == ((0, 0), (3, 0)) and sources(total) == ((0, 0), (4, 0))
    assert ports(made, interval=True)[0] == [] and list(run(lambda: made.service.windows())) == []


class FakeSketches:
    ERROR, UNIQUE_ERROR = 0.023, 0.0081

    def unique(self, family):
        return 1000

    def of_port(self, family, protocol, port):
        return 500 if (protocol, port) == (6, 22) else None

    def __or__(self, other):
        return self


def test_an_estimate_is_marked_as_one():
    made = world(exact=False, sketches=FakeSketches())
    shown, total = ports(made)
    found = {named(row): row for row in shown}
    assert sources(found["tcp", 22]) == ((500, 500), (3, 0)), "the running window is exact"
    assert (found["tcp", 22]["exact"], found["tcp", 22]["error"], found["tcp", 22]["running"]["exact"]) == (False, 0.023, True)
    assert (found["tcp", 80]["sources"], found["tcp", 80]["exact"], found["tcp", 80]["error"]) == ({"ipv4": 1, "ipv6": 0}, False, None)
    assert (total["sources"], total["error"]) == ({"ipv4": 1000, "ipv6": 1000}, 0.0081)
    assert ports(made, local=False)[0][0]["sources"] == {"ipv4": 499, "ipv6": 500}
    made.kernel.tally.untracked = Count(5, 300)
    shown, _ = ports(made)
    assert (shown[0]["running"]["ipv4"], shown[0]["running"]["exact"], shown[0]["running"]["error"]) == (500, False, 0.023)
    status = run(made.service.status)
    assert (status["window"]["unique_sources"], status["window"]["error"]) == ({"ipv4": 1000, "ipv6": 1000}, 0.0081)


# Talkers and networks


def test_talkers_over_both_windows_with_rates():
    made = world()
    found = top(made, by="packets")
    assert [(row["source"], row["packets"]) for row in found[:3]] == [("10.0.0.1", 101), ("192.0.2.1", 12), ("192.0.2.2", 5)]
    assert found[1]["packets_per_second"] == 0.1 and found[1]["bytes_per_second"] == 10.0, "over 120 s"
    assert found[1]["sources"] == 1 and found[1]["country"] is None
    assert top(made, by="packets", interval=True)[0]["packets_per_second"] == round(100 / 60, 3)
    assert [(row["protocol"], row["icmp_type"]) for row in top(made, protocol="icmp")] == [("icmp", 8)]
    assert [row["source"] for row in top(made, port=80)] == ["192.0.2.1"]


def test_local_talkers_are_left_out_and_it_is_said():
    *found, last = top(world(), local=False, by="packets")
    assert last == {"hidden": {"local": {"ipv4": 2, "ipv6": 0}}}
    assert [row["source"] for row in found][:2] == ["192.0.2.1", "192.0.2.2"] and len(found) == 8
    assert top(world(), local=False, port=80) == top(world(), port=80), "nothing was hidden there"
    assert top(world(Config(show_local=False)), by="packets") == [*found, last]
    assert "hidden" not in top(world(Config(show_local=False)), local=True)[-1]


def test_sums_of_networks():
    found = top(world(), by="packets", prefix_length=24)
    assert [(row["source"], row["port"], row["packets"], row["sources"]) for row in found[:2]] == [
        ("10.0.0.0/24", 22, 101, 1), ("192.0.2.0/24", 22, 18, 3)]  # fmt: skip
    assert ("2001:db8::1", 1) in [(row["source"], row["sources"]) for row in found], "IPv6 was not asked for"
    both = top(world(), by="packets", prefix_length=16, prefix_length6=64, port=22)
    assert [(row["source"], row["sources"]) for row in both] == [("10.0.0.0/16", 1), ("192.0.0.0/16", 3), ("2001:db8::/64", 2)]
    *rest, last = top(world(), by="packets", prefix_length=8, local=False)
    assert last == {"hidden": {"local": {"ipv4": 2, "ipv6": 0}}} and rest[0]["source"] == "192.0.0.0/8"
    everybody = top(world(), prefix_length=0, port=22)
    assert [(row["source"], row["sources"]) for row in everybody][:1] == [("0.0.0.0/0", 4)]
    for wrong in ({"prefix_length": 33}, {"prefix_length6": 129}):
        with pytest.raises(UsageError, match="is no length of a prefix"):
            top(world(), **wrong)


def decided(*entries, **options):
    found = top(world(entries=entries), by="packets", **options)
    return {row["source"]: (row["verdict"], row["rule"]) for row in found if row["port"] == 22}


def test_the_verdict_of_a_network_is_what_holds_for_all_of_it():
    assert decided(prefix_length=24)["192.0.2.0/24"] == ("log", "default")
    assert decided(entry("192.0.0.0/16"), prefix_length=24)["192.0.2.0/24"] == ("deny", "192.0.0.0/16")
    assert decided(entry("192.0.2.0/24"), prefix_length=24)["192.0.2.0/24"] == ("deny", "192.0.2.0/24")
    assert decided(entry("192.0.2.0/24"), prefix_length=16)["192.0.0.0/16"] == (MIXED, MIXED)
    twice = (entry("192.0.0.0/16"), entry("192.0.2.200"))
    assert decided(*twice, prefix_length=24)["192.0.2.0/24"] == ("deny", MIXED), "by two rules, and the same"
    allowed = (entry("192.0.0.0/16"), entry("192.0.2.200", Verdict.ALLOW))
    assert decided(*allowed, prefix_length=24)["192.0.2.0/24"] == (MIXED, MIXED)
    assert decided(*allowed, prefix_length=32)["192.0.2.1/32"] == ("deny", "192.0.0.0/16")
    assert decided(entry("2001:db8::2"), prefix_length6=64)["2001:db8::/64"] == (MIXED, MIXED)


POLICIES = st.lists(st.tuples(st.sampled_from(["192.0.2.0", "192.0.2.128", "192.0.3.0"]), st.integers(20, 32), st.sampled_from(
    [Verdict.ALLOW, Verdict.DENY])), max_size=4)  # fmt: skip


@given(POLICIES, st.integers(20, 32))
def test_a_verdict_that_is_shown_holds_for_every_address(entries, length):
    policy = []
    for address, bits, verdict in entries:
        octets = [int(part) for part in address.split(".")]
        number = int.from_bytes(bytes(octets), "big") >> 32 - bits << 32 - bits
        policy.append(entry(f"{'.'.join(map(str, number.to_bytes(4, 'big')))}/{bits}", verdict))
    (row,) = top(world(entries=policy, last=LAST[:0], running=rows(("192.0.2.77", 6, 22, 1, 1))), prefix_length=length)
    first = int.from_bytes(bytes([192, 0, 2, 77]), "big") >> 32 - length << 32 - length
    made = Policy(policy)
    every = {made.match(Family.IPV4, number.to_bytes(4, "big")) for number in range(first, first + (1 << 32 - length))}
    verdicts = {str(of.verdict) if of else "log" for of in every}
    if row["verdict"] != MIXED:
        assert verdicts == {row["verdict"]}
    if row["rule"] != MIXED:
        assert {str(of.prefix) if of else "default" for of in every} == {row["rule"]}


def test_names_of_what_is_shown():
    made = world()
    made.service._names = FakeNames()
    assert [row["country"] for row in top(made, limit=1)] == ["None"]
    assert [(row["country"], row["as_number"]) for row in top(made, limit=1, prefix_length=24)] == [("24", 4)]
    explained = run(lambda: made.service.explain("192.0.2.1"))
    assert {row["country"] for row in explained["talkers"]} == {"None"} and (explained["country"], explained["as_number"]) == ("None", 4)
    assert {row["country"] for row in run(made.service.status)["top"]} == {"None"}


# Windows


def test_the_history_and_its_signal():
    made = world()
    (past,) = made.signals("WindowClosed")
    assert past == {
        "number": 7, "started": START, "ended": START + 60, "length_seconds": 60, "late": False, "packets": 9, "bytes": 900, "dropped": 9,
        "dropped_bytes": 900, "unique_sources": {"ipv4": 5, "ipv6": 2}, "exact": True, "error": None,
    }  # fmt: skip
    assert list(run(lambda: made.service.windows())) == [past] and made.service.last_window == 7
    for number in range(8, 308):
        made.service.window_closed(Window(number, START, START, 60), Totals([], START), Count(), 0)
    numbers = [of["number"] for of in run(lambda: made.service.windows(limit=1000))]
    assert numbers == list(range(68, 308))
    assert [of["number"] for of in run(lambda: made.service.windows(limit=2))] == [306, 307]
    assert list(run(lambda: made.service.windows(limit=0))) == []


def test_the_status_has_what_a_screen_needs():
    status = json.loads(json.dumps(run(world().service.status)))
    assert [of["number"] for of in status["windows"]] == [7]
    assert [named(row) for row in status["ports"]] == [("tcp", 22), ("icmp", 8), ("tcp", 80), ("tcp", 443), ("udp", 53)]
    assert "total" not in status["ports"][-1] and status["window"]["unique_sources"] == {"ipv4": 7, "ipv6": 2}
    hidden = run(world(Config(show_local=False)).service.status)
    assert [named(row) for row in hidden["ports"]] == [("tcp", 22), ("icmp", 8), ("tcp", 80), ("udp", 53)]


def test_a_window_counts_its_ports_as_it_closes():
    made = world(Config(ports=(PortRange(6, 22, 22),)))
    counted = made.service.progress.last.ports
    assert counted.sources == Unique(3, 2) and len(counted) == 1


# Sharing


def test_those_who_ask_before_a_reading_begins_share_it():
    made = world()
    readings = []
    made.before_kernel = lambda: readings.append(1)

    async def ask():
        async with made.service.reading:
            asking = [asyncio.ensure_future(made.service.status()) for _ in range(10)]
            await asyncio.sleep(0)
        return await asyncio.gather(*asking)

    found = run(ask)
    assert len(readings) == 1 and all(one is found[0] for one in found)


def test_who_asks_after_a_reading_has_begun_gets_the_next():
    made = world()

    async def ask():
        first = asyncio.ensure_future(made.service.status())
        seen = asyncio.Event()
        made.before_kernel = seen.set
        await seen.wait()
        made.kernel.running = merge(rows(("192.0.2.1", 6, 22, 1000, 1000)))
        second = await made.service.status()
        return await first, second

    first, second = run(ask)
    assert first is not second and second["top"][0]["packets"] == 1010


def test_one_who_stops_waiting_takes_nothing_from_the_others():
    made = world()

    async def ask():
        async with made.service.reading:
            gone, stays = (asyncio.ensure_future(made.service.status()) for _ in range(2))
            await asyncio.sleep(0)
            gone.cancel()
        return await stays

    assert run(ask)["top"]


def test_a_status_that_fails_fails_for_all_and_the_next_one_does_not():
    made = world()

    async def ask():
        facts, made.kernel.facts = made.kernel.facts, None
        found = await asyncio.gather(*(made.service.status() for _ in range(3)), return_exceptions=True)
        made.kernel.facts = facts
        return found, await made.service.status()

    failed, later = run(ask)
    assert all(isinstance(one, TypeError) for one in failed) and later["top"]


def test_a_window_that_ends_waits_for_one_question_at_most():
    made = world()

    async def ask():
        service = made.service

        async def end_window():
            async with service.reading:
                return sum(task.done() for task in asking)

        async with service.reading:
            questions = (service.top, service.ports, service.entries, service.status, lambda: service.explain("192.0.2.1"))
            asking = [asyncio.ensure_future(question()) for question in questions for _ in range(2)]
            await asyncio.sleep(0)
            ending = asyncio.ensure_future(end_window())
            await asyncio.sleep(0)
        answered = await ending
        await asyncio.gather(*asking)
        return answered

    assert run(ask) <= 1


# Names: at the start and at a reload


def test_files_of_names_that_cannot_be_read():
    files = Files(country="/nowhere/country.mmdb")
    made = World(Config(names=files))

    async def begin():
        await made.service.begin()
        made.files = Config(names=files, window=120)
        with pytest.raises(ConfigError, match=r"names.country: /nowhere/country.mmdb: No such file"):
            await made.service.reload(caller=ROOT)
        refused = made.service.config.window
        made.files = Config()
        await made.service.reload(caller=ROOT)
        return refused

    assert run(begin) == 60.0, "a reload is refused whole"
    assert made.kernel.policy == {} and made.reports(Message.RELOAD_REFUSED)
    assert made.service.warnings() == []


def test_a_start_goes_on_without_names():
    made = World(Config(names=Files(asn="/nowhere/asn.mmdb")))
    run(made.service.begin)
    assert made.service.warnings() == ["names.asn: /nowhere/asn.mmdb: No such file or directory"]
