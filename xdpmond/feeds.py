"""Events on their way to whoever follows: a short memory of the latest, and a bounded queue for each follower.

Events come in batches and stay so until somebody looks at them: what nobody follows costs the same for one event and for ten thousand.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import EventBatch
from .messages import event_fields
from .model import Action, Family, Outcome, format_address

if TYPE_CHECKING:
    from .lines import LineFormat

RECENT = 1000
_QUEUE = 4096
_PIECE = 512
"""Events that become lines at a time: half a millisecond of the loop."""

EventFields = Mapping[str, Any]


class EventFeed:
    """One follower's queue, read as lines of JSON, some at a time. A follower that is slower than the events loses the newest, and `lost`
    counts them."""

    def __init__(self, hub: EventHub, format: LineFormat):
        self._hub = hub
        self._format = format
        self._queue: deque[EventBatch] = deque()
        self._waiting = 0
        self._ready = asyncio.Event()
        self._closed = False
        self.lost = 0

    def put(self, batch: EventBatch) -> None:
        taken = min(len(batch), _QUEUE - self._waiting)
        self.lost += len(batch) - taken
        if taken:
            self._queue.append(batch if taken == len(batch) else batch[:taken].copy())
            self._waiting += taken
            self._ready.set()

    def settle(self) -> None:
        """Find the rules of what waits."""
        for batch in self._queue:
            batch.rules()

    def close(self) -> None:
        self._closed = True
        self._ready.set()
        self._hub.leave(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self._closed:
            while self._queue:
                batch = self._queue.popleft()
                for start in range(0, len(batch), _PIECE):
                    piece = batch[start : start + _PIECE]
                    self._waiting -= len(piece)
                    yield self._format.lines(piece)
                    # A reader as fast as the events would else have the loop for itself.
                    await asyncio.sleep(0)
            self._ready.clear()
            if not self._closed:
                await self._ready.wait()


class EventHub:
    """Hands each batch to all followers, and remembers the latest events."""

    def __init__(self) -> None:
        self._recent: deque[EventBatch] = deque()
        self._remembered = 0
        self._feeds: set[EventFeed] = set()
        self._lost = 0

    @property
    def lost(self) -> int:
        """What followers lost, those that have gone included."""
        return self._lost + sum(feed.lost for feed in self._feeds)

    def publish(self, batch: EventBatch) -> None:
        if self._recent and not self._recent[-1].judged_as(batch):
            # The policy has changed. What is remembered, or waits, was judged by the old one, which shall not be kept for it.
            for old in self._recent:
                old.rules()
            for feed in self._feeds:
                feed.settle()
        latest = batch[-RECENT:].copy()
        self._recent.append(latest)
        self._remembered += len(latest)
        while self._remembered - len(self._recent[0]) >= RECENT:
            self._remembered -= len(self._recent.popleft())
        for feed in self._feeds:
            feed.put(batch)

    def recent(self, limit: int) -> list[EventFields]:
        """The latest, oldest first."""
        events: deque[EventFields] = deque()
        wanted = min(limit, RECENT)
        for batch in reversed(self._recent):
            if wanted <= len(events):
                break
            events.extendleft(event_fields(event) for event in reversed(batch[len(events) - wanted :].values()))
        return list(events)

    def follow(self) -> EventFeed:
        from . import lines  # its tables are a megabyte, for nothing while nobody follows

        feed = EventFeed(self, lines.jsonl())
        self._feeds.add(feed)
        return feed

    def leave(self, feed: EventFeed) -> None:
        if feed in self._feeds:
            self._feeds.discard(feed)
            self._lost += feed.lost


_DROPPED = np.array([number in set(Outcome) and Outcome(number).action is Action.DROP for number in range(256)])
_MOST_SOURCES = 10_000
_MOST_NAMED = 100
_SOURCE = np.dtype([("family", "u1"), ("address", "V16")])


class BlockedSources:
    """Whose packets were dropped since somebody took the answer. Bounded: beyond so many sources the number is "at least"."""

    def __init__(self) -> None:
        self._sources: dict[bytes, None] = {}
        self._packets = 0
        self._partial = False

    def add(self, batch: EventBatch) -> bool:
        """Enter a batch; was anything in it dropped?"""
        dropped = _DROPPED[batch.rows["outcome"]]
        number = int(np.count_nonzero(dropped))
        if not number:
            return False
        self._packets += number + int(batch.rows["suppressed"][dropped].sum(dtype="u8"))
        if len(self._sources) >= _MOST_SOURCES:
            self._partial = True
            return True
        keys = np.empty(number, _SOURCE)
        keys["family"] = batch.families[dropped]
        keys["address"] = batch.rows["source"][dropped].view("V16")[:, 0]
        whole = keys.tobytes()
        size = _SOURCE.itemsize
        self._sources.update(dict.fromkeys(whole[at : at + size] for at in range(0, len(whole), size)))
        return True

    def take(self) -> dict[str, Any]:
        """The body of the signal SourceBlocked; and begin anew."""
        first = list(self._sources)[:_MOST_NAMED]
        body = {
            "sources": [_named(key) for key in first],
            "count": len(self._sources),
            "packets": self._packets,
            "partial": self._partial,
        }
        self._sources, self._packets, self._partial = {}, 0, False
        return body


def _named(key: bytes) -> str:
    family = Family(key[0])
    return format_address(family, key[1 : 1 + family.bits // 8])
