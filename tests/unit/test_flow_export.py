"""From the cache to the collector: everything that has ended arrives, whatever the room; what ends with the daemon too."""

import asyncio
import dataclasses

import pytest
from test_flows import row, together
from test_ipfix_sink import Place

from xdpmond.config import IPFIX, Config, Flows
from xdpmond.flows import FlowCache
from xdpmond.model import Endpoint
from xdpmond.sinks.flows import FlowExport


@pytest.fixture
def place():
    made = Place()
    yield made
    made.leave()


def config(place=None, **more):
    collector = Endpoint("127.0.0.1", place.port) if place else None
    return Config(flows=Flows(enable=True, active_timeout=100.0, inactive_timeout=30.0), ipfix=IPFIX(collector=collector, **more))


class Export:
    """One that runs. `told` is what it reports."""

    def __init__(self, records=1000, **more):
        self.cache, self.reading, self.told = FlowCache(records), asyncio.Lock(), []
        self.export = FlowExport(self.cache, self.reading, self.told.append, **more)

    async def __aenter__(self):
        self.task = asyncio.create_task(self.export.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.export.close()

    async def window(self, number, *rows):
        """Of ten seconds."""
        async with self.reading:
            await asyncio.to_thread(self.export.window_closed, together(*rows), (number - 1) * 10.0, number * 10.0, {0: 7})

    async def idle(self):
        while True:
            async with self.reading:  # nobody is taking from the cache, half done
                if not self.cache.due:
                    return
            await asyncio.sleep(0)


def within(work):
    async def bounded():
        async with asyncio.timeout(30):
            await work()

    asyncio.run(bounded())


def ports(found):
    return sorted(record["sourceTransportPort"] for record in found)


def flows_of(numbers, last):
    return [row(sport=number, last=last) for number in numbers]


def test_what_has_ended_arrives_and_the_rest_when_the_daemon_ends(place):
    async def work():
        async with Export() as at:
            at.export.configure(config(place))
            assert at.export.exports
            state = {"records": 0, "capacity": 1000, "waiting": 0, "collector": f"127.0.0.1:{place.port}", "reachable": True, "exported": 0}
            assert at.export.state() == state
            await at.window(1, *flows_of(range(1, 301), 5.0))
            await at.window(4, *flows_of(range(200, 401), 39.0))
            found = await asyncio.to_thread(place.take, 199)
            assert ports(found) == [*range(1, 200)] and {record["ingressInterface"] for record in found} == {7}
            assert {record["flowEndReason"] for record in found} == {1}
            while at.export.state()["exported"] < 199:
                await asyncio.sleep(0.01)
            assert at.export.state() == {**state, "records": 201, "exported": 199}
        found = await asyncio.to_thread(place.take, 400)
        assert ports(found) == [*range(1, 401)] and {record["flowEndReason"] for record in found[199:]} == {4}
        assert at.export.losses() == {"flow_cache": 0, "ipfix": 0} and not len(at.cache)

    within(work)


def test_what_the_exporter_has_no_room_for_waits_in_the_cache(place):
    async def work():
        async with Export(capacity=7) as at:
            at.export.configure(config(place))
            await at.window(1, *flows_of(range(1, 101), 5.0))
            await at.window(4)
            assert ports(await asyncio.to_thread(place.take, 100)) == [*range(1, 101)]

    within(work)


def test_a_collector_that_is_named_later_gets_what_ends_then(place):
    async def work():
        async with Export() as at:
            at.export.configure(config())
            assert not at.export.exports and at.export.state()["collector"] is at.export.state()["reachable"] is None
            await at.window(1, *flows_of([1], 5.0))
            await at.window(4, *flows_of([2], 39.0))
            await at.idle()
            at.export.configure(config(place))
            await at.window(8)
            assert ports(await asyncio.to_thread(place.take, 1)) == [2]

    within(work)


def test_a_changed_exporter_takes_the_place_of_the_old_one(place):
    async def work():
        async with Export() as at:
            for domain in (1, 1, 2):
                at.export.configure(config(place, observation_domain=domain))
                place.collector.sequence = None
                await at.window(1, *flows_of([domain], 5.0))
                await at.window(4)
                await asyncio.to_thread(place.take, len(place.collector.records) + 1)
            assert place.collector.domain == 2

    within(work)


def test_new_timeouts_hold_from_the_next_window_on(place):
    async def work():
        async with Export() as at:
            slow = config(place)
            at.export.configure(dataclasses.replace(slow, flows=dataclasses.replace(slow.flows, inactive_timeout=3600.0)))
            await at.window(1, *flows_of([1], 5.0))
            await at.window(7)
            assert not at.cache.due
            at.export.configure(slow)
            await at.window(8)
            assert len(await asyncio.to_thread(place.take, 1)) == 1

    within(work)


def test_what_is_lost_is_told(place):
    """The collector is away, the cache is full, and the daemon ends."""

    async def work():
        place.leave()
        async with Export(records=1024) as at:
            at.export.configure(config(place))
            while not at.told:
                await asyncio.sleep(0.01)
            assert at.export.state()["reachable"] is False
            await at.window(1, *flows_of(range(1, 11), 5.0))
            at.task.cancel()
            await asyncio.gather(at.task, return_exceptions=True)
            async with asyncio.timeout(20):
                await at.export.close(timeout=0.2)
            assert at.export.losses() == {"flow_cache": 0, "ipfix": 10}

    within(work)


def test_without_a_collector_nothing_is_kept_that_has_ended():
    async def work():
        async with Export() as at:
            at.export.configure(config())
            await at.window(1, *flows_of(range(1, 101), 5.0))
            await at.window(4)
            await at.idle()
            assert not len(at.cache) and at.export.losses() == {"flow_cache": 0, "ipfix": 0}

    within(work)
