"""Events for followers of any speed."""

import asyncio
from contextlib import aclosing

from servicefakes import run

from xdpmond import feeds
from xdpmond.feeds import RECENT, EventHub


async def take(feed, number):
    """The next events, until there are so many."""
    taken = []
    async with aclosing(aiter(feed)) as events:
        async for event in events:
            taken.append(event["number"])
            if len(taken) == number:
                break
    return taken


def publish(hub, *numbers):
    for number in numbers:
        hub.publish({"number": number})


def test_the_latest_are_remembered_oldest_first():
    hub = EventHub()
    assert hub.recent(5) == []
    publish(hub, *range(RECENT + 10))
    assert [event["number"] for event in hub.recent(3)] == [RECENT + 7, RECENT + 8, RECENT + 9]
    assert len(hub.recent(10 * RECENT)) == RECENT
    assert hub.recent(0) == []


def test_each_follower_gets_what_comes_after_it_came():
    async def work():
        hub = EventHub()
        publish(hub, 1)
        first = hub.follow()
        publish(hub, 2)
        second = hub.follow()
        publish(hub, 3)
        assert await take(first, 2) == [2, 3]
        assert await take(second, 1) == [3]

    run(work)


def test_a_slow_follower_loses_the_newest_and_no_other_does():
    async def work():
        hub = EventHub()
        slow, quick = hub.follow(), hub.follow()
        most = feeds._QUEUE
        publish(hub, *range(most))
        assert len(await take(quick, most)) == most
        publish(hub, "lost", "lost too")
        assert (slow.lost, quick.lost) == (2, 0)
        assert await take(quick, 2) == ["lost", "lost too"]
        assert await take(slow, most) == list(range(most))
        publish(hub, "after")
        assert await take(slow, 1) == ["after"]

    run(work)


def test_a_follower_that_waits_is_woken():
    async def work():
        hub = EventHub()
        feed = hub.follow()
        taking = asyncio.create_task(take(feed, 1))
        await asyncio.sleep(0)  # it waits now
        publish(hub, 1)
        assert await taking == [1]

    run(work)


def test_closing_ends_the_waiting_and_the_feeding():
    async def work():
        hub = EventHub()
        feed = hub.follow()
        taking = asyncio.create_task(take(feed, 10))
        await asyncio.sleep(0)
        feed.close()
        feed.close()
        assert await taking == []
        publish(hub, *range(2 * feeds._QUEUE))
        assert feed.lost == 0  # nobody feeds it

    run(work)
