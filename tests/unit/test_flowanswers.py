"""What is said of flows, and which of them; the running window counts with the records."""

import asyncio

import numpy as np
import pytest
from servicefakes import START, World, run
from test_flows import ACK, FIN, SYN, row, together

from xdpmond.config import Config, Flows
from xdpmond.errors import PrefixError, UsageError, XdpmondError
from xdpmond.flows import Timeouts
from xdpmond.model import Count, Outcome
from xdpmond.windows import Totals, Window

WITH_FLOWS = Config(flows=Flows(enable=True, inactive_timeout=30.0))


def ask(*cached, running=(), now=START, **options):
    """Ask a service that has counted these flows in windows of the last minute."""

    async def work():
        world = World(WITH_FLOWS)
        world.now = now
        world.service.flow_cache.close(together(*cached), now - 60, now - 1, Timeouts(300, 30))
        world.kernel.flows = together(*running)
        return list(await world.service.flows(**options))

    return run(work)


def test_all_that_is_known_of_a_flow():
    flow = row(packets=3, size=100, flags=SYN | ACK, first=START - 9.5, last=START - 2.25, slot=3, outcome=Outcome.DENIED_DROPPED)
    assert ask(flow) == [
        {
            "source": "192.0.2.1",
            "destination": "198.51.100.7",
            "source_port": 40000,
            "port": 443,
            "protocol": "tcp",
            "protocol_num": 6,
            "icmp_type": None,
            "interface": "eth3",
            "family": "ipv4",
            "packets": 3,
            "bytes": 300,
            "partial": False,
            "tcp_flags": "SA",
            "first_seen": START - 9.5,
            "last_seen": START - 2.25,
            "verdict": "deny",
            "action": "DROP",
            "active": True,
        }
    ]


def test_icmp_has_a_type_and_no_ports():
    (flow,) = ask(row("2001:db8::1", 0, 129, destination="2001:db8::2", protocol=58, last=START - 2))
    assert (flow["protocol"], flow["icmp_type"], flow["port"], flow["source_port"]) == ("icmpv6", 128, None, None)
    assert (flow["source"], flow["destination"], flow["family"]) == ("2001:db8::1", "2001:db8::2", "ipv6")


@pytest.mark.parametrize("protocol", [6, 1, 47])
def test_what_was_not_read_is_unknown(protocol):
    (flow,) = ask(row(sport=0, port=0, protocol=protocol, last=START - 2))
    assert flow["port"] is flow["source_port"] is flow["icmp_type"] is None


@pytest.mark.parametrize(("bits", "letters"), [(0, ""), (0xFF, "SAPURFEC"), (FIN | ACK | 8, "APF"), (4, "R")])
def test_flags(bits, letters):
    (flow,) = ask(row(flags=bits, last=START - 2))
    assert flow["tcp_flags"] == letters


@pytest.mark.parametrize(
    ("fields", "active"),
    [({"last": START - 29}, True), ({"last": START - 31}, False), ({"last": START - 2, "flags": FIN}, False),
     ({"last": START - 2, "flags": FIN, "protocol": 17}, True)],
)  # fmt: skip
def test_one_that_has_ended_is_not_active(fields, active):
    (flow,) = ask(row(**fields))
    assert flow["active"] is active


def test_records_and_running_window_count_together():
    ours, other = row(packets=2, first=START - 50, last=START - 40), row(sport=1, packets=3, last=START)
    found = ask(ours, running=[row(packets=5, first=START - 50, last=START), other], by="packets")
    assert [(flow["packets"], flow["first_seen"]) for flow in found] == [(7, START - 50), (3, START)]


FLOWS = (
    row("192.0.2.1", port=443, packets=1, size=900, last=START),
    row("192.0.2.2", port=53, packets=2, size=100, protocol=17, last=START),
    row("192.0.2.3", port=53, packets=3, size=100, last=START),
    row("192.0.2.4", port=54, packets=4, size=100, protocol=1, last=START),
    row("2001:db8::1", port=443, packets=5, size=100, destination="c000:201::", last=START),
)


@pytest.mark.parametrize(
    ("options", "packets"),
    [
        ({}, [1, 5, 4, 3, 2]),
        ({"by": "packets"}, [5, 4, 3, 2, 1]),
        ({"limit": 2}, [1, 5]),
        ({"limit": 0}, [1]),
        ({"port": 53}, [3, 2]),
        ({"port": 54}, []),
        ({"protocol": "udp"}, [2]),
        ({"protocol": "6", "by": "packets"}, [5, 3, 1]),
        ({"port": 53, "protocol": "tcp"}, [3]),
        ({"address": "192.0.2.1"}, [1]),
        ({"address": "198.51.100.7"}, [1, 4, 3, 2]),
        ({"address": "2001:0db8::1"}, [5]),
        ({"address": "c000:201::"}, [5]),
        ({"address": "203.0.113.1"}, []),
    ],
)
def test_which_flows_and_in_which_order(options, packets):
    assert [flow["packets"] for flow in ask(*FLOWS, **options)] == packets


@pytest.mark.parametrize(
    ("options", "error"),
    [({"by": "syn"}, UsageError), ({"protocol": "ftp"}, UsageError), ({"port": 7, "protocol": "icmp"}, UsageError),
     ({"address": "192.0.2.0/24"}, PrefixError)],
)  # fmt: skip
def test_what_cannot_be_asked(options, error):
    with pytest.raises(error):
        ask(**options)


def test_flows_that_are_off_say_how_they_are_turned_on():
    async def work():
        world = World()
        assert not world.service.flows_enabled
        with pytest.raises(XdpmondError) as refused:
            await world.service.flows()
        assert str(refused.value) == "flows are off (set enable = true in [flows] of the configuration, and restart xdpmond)"

    run(work)


@pytest.mark.parametrize("running", [False, True])
def test_a_flow_of_a_window_in_which_some_found_no_place_may_have_had_more(running):
    """Such a window is the one that runs, or the first of three before it."""

    async def work():
        world = World(WITH_FLOWS)
        world.service.flow_cache.close(together(row(last=START + 9, first=START + 1)), START, START + 10, Timeouts(300, 30))
        for number in range(3):
            ended = START + 10 * number + 10
            window = Window(number, ended - 10, ended, 10, exact=running or number > 0)
            world.service.window_closed(window, Totals([], ended), Count(), 0)
        world.kernel.flows = together(row(port=8443, first=START + 31, last=START + 32))
        world.now = START + 33
        if running:
            world.kernel.tally.untracked = Count(1, 60)
        found = {flow["port"]: flow["partial"] for flow in await world.service.flows()}
        assert found == {443: True, 8443: running}

    run(work)


def test_whoever_reads_slowly_sees_what_was_there_when_he_asked():
    async def work():
        world = World(WITH_FLOWS)
        cache = world.service.flow_cache
        cache.close(together(row(last=START - 5)), START - 60, START - 1, Timeouts(300, 30))
        found = await world.service.flows()
        cache.flush()
        await asyncio.to_thread(cache.take, 10)
        assert [flow["packets"] for flow in found] == [1]
        assert not list(await world.service.flows())

    run(work)


def test_the_rows_of_the_kernel_are_left_as_they_are():
    async def work():
        world = World(WITH_FLOWS)
        world.kernel.flows = together(row(first=1.0, last=2.0))
        before = world.kernel.flows.copy()
        list(await world.service.flows())
        assert np.array_equal(world.kernel.flows, before)

    run(work)
