"""Events for followers of any speed, and what is told of dropped ones."""

import asyncio
import json
from contextlib import aclosing

from eventfakes import DictPolicy, batch, numbered
from servicefakes import run

from xdpmond import feeds
from xdpmond.feeds import RECENT, BlockedSources, EventHub
from xdpmond.model import Outcome, Verdict


async def take(feed, number):
    """The next events, until there are so many."""
    taken = []
    async with aclosing(aiter(feed)) as events:
        async for lines in events:
            taken += [json.loads(line)["flow_hash"] for line in lines.splitlines()]
            if len(taken) >= number:
                break
    return taken


def recent(hub, limit):
    return [event["flow_hash"] for event in hub.recent(limit)]


def test_the_latest_are_remembered_oldest_first():
    hub = EventHub()
    assert hub.recent(5) == []
    hub.publish(numbered(*range(RECENT - 5)))
    for number in range(RECENT - 5, RECENT + 10):
        hub.publish(numbered(number))
    assert recent(hub, 3) == [RECENT + 7, RECENT + 8, RECENT + 9]
    assert recent(hub, 10 * RECENT) == list(range(10, RECENT + 10))
    assert hub.recent(0) == []
    hub.publish(numbered(*range(3 * RECENT)))
    assert recent(hub, RECENT) == list(range(2 * RECENT, 3 * RECENT))


def test_no_more_is_kept_than_is_remembered():
    hub = EventHub()
    for _ in range(50):
        hub.publish(numbered(*range(700)))
    assert len(hub._recent) <= 3
    assert all(kept.rows.base is None or len(kept.rows.base) == len(kept.rows) for kept in hub._recent)


def test_rules_are_those_of_the_policy_that_held():
    hub = EventHub()
    denied = {"outcome": Outcome.DENIED_PASSED}
    wide, narrow = DictPolicy({"203.0.113.0/24": Verdict.DENY}), DictPolicy({"203.0.113.9/32": Verdict.DENY})
    hub.publish(batch(denied, denied, policy=wide))
    hub.publish(batch(denied, policy=wide))
    assert wide.asked == 0  # nobody has asked
    hub.publish(batch(denied, policy=narrow))
    assert wide.asked == 3  # before the old policy is forgotten
    assert [event["rule"] for event in hub.recent(9)] == ["203.0.113.0/24"] * 3 + ["203.0.113.9/32"]
    assert wide.asked == 3


def test_what_waits_for_a_follower_holds_no_old_policy():
    async def work():
        hub = EventHub()
        feed = hub.follow()
        policies = [DictPolicy({"203.0.113.0/24": Verdict.DENY}) for _ in range(3)]
        for policy in policies:
            hub.publish(batch({"outcome": Outcome.DENIED_PASSED, "flow_hash": 1}, policy=policy))
        assert [policy.asked for policy in policies] == [2, 2, 0]  # for the memory, and for the follower
        assert await take(feed, 3) == [1, 1, 1]

    run(work)


def test_each_follower_gets_what_comes_after_it_came():
    async def work():
        hub = EventHub()
        hub.publish(numbered(1))
        first = hub.follow()
        hub.publish(numbered(2))
        second = hub.follow()
        hub.publish(numbered(3))
        assert await take(first, 2) == [2, 3]
        assert await take(second, 1) == [3]

    run(work)


def test_a_slow_follower_loses_the_newest_and_no_other_does():
    async def work():
        hub = EventHub()
        slow, quick = hub.follow(), hub.follow()
        most = feeds._QUEUE
        hub.publish(numbered(*range(most - 1)))
        assert len(await take(quick, most - 1)) == most - 1
        hub.publish(numbered(most - 1, 77, 78))
        assert (slow.lost, quick.lost, hub.lost) == (2, 0, 2)
        assert await take(quick, 3) == [most - 1, 77, 78]
        assert await take(slow, most) == list(range(most))
        hub.publish(numbered(99))
        assert await take(slow, 1) == [99]
        slow.close()
        assert hub.lost == 2  # also when it has gone

    run(work)


def test_a_full_queue_holds_no_more_memory_than_its_events():
    """Of a batch of which little fits, that little is kept, not the batch."""
    hub = EventHub()
    feed = hub.follow()
    hub.publish(numbered(*range(feeds._QUEUE - 1)))
    hub.publish(numbered(*range(5000)))
    kept = feed._queue[-1].rows
    assert len(kept) == 1 and (kept.base is None or len(kept.base) == 1)


def test_a_follower_as_fast_as_the_events_leaves_the_loop_to_others():
    async def work():
        hub = EventHub()
        feed = hub.follow()
        hub.publish(numbered(*range(feeds._QUEUE)))
        taking = asyncio.create_task(take(feed, feeds._QUEUE))
        turns = 0
        while not taking.done():
            await asyncio.sleep(0)
            turns += 1
        assert taking.result() == list(range(feeds._QUEUE))
        assert turns >= feeds._QUEUE // feeds._PIECE

    run(work)


def test_a_follower_that_waits_is_woken():
    async def work():
        hub = EventHub()
        feed = hub.follow()
        taking = asyncio.create_task(take(feed, 1))
        await asyncio.sleep(0)  # it waits now
        hub.publish(numbered(1))
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
        hub.publish(numbered(*range(2 * feeds._QUEUE)))
        assert feed.lost == 0  # nobody feeds it

    run(work)


# Blocked sources


def test_blocked_sources_are_told_once_each_with_all_their_packets():
    blocked = BlockedSources()
    assert not blocked.add(batch({"outcome": Outcome.DENIED_PASSED}, {}))
    drop = {"outcome": Outcome.DENIED_DROPPED}
    assert blocked.add(batch({**drop, "suppressed": 4}, {}, {**drop, "src": "2001:db8::1"}))
    assert blocked.add(batch({**drop, "suppressed": 2**32 - 1}, {"outcome": Outcome.DEFAULT_DENIED_DROPPED, "src": "198.51.100.1"}))
    assert blocked.take() == {
        "sources": ["203.0.113.9", "2001:db8::1", "198.51.100.1"], "count": 3, "packets": 5 + 1 + 2**32 + 1, "partial": False,
    }  # fmt: skip
    assert blocked.take() == {"sources": [], "count": 0, "packets": 0, "partial": False}


def test_a_flood_of_sources_is_counted_in_bounds():
    blocked = BlockedSources()
    flood = batch(*({"outcome": Outcome.DENIED_DROPPED, "src": f"10.1.{number // 256}.{number % 256}"} for number in range(4000)))
    for third in range(1, 9):
        flood.rows["source"][:, 1] = third
        blocked.add(flood)
    told = blocked.take()
    assert len(told["sources"]) == 100
    assert (told["count"], told["packets"], told["partial"]) == (12_000, 32_000, True)
