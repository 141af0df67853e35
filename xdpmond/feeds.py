"""Events on their way to whoever follows: a short memory of the latest, and a bounded queue for each follower."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

RECENT = 1000
_QUEUE = 4096

EventFields = Mapping[str, Any]


class EventFeed:
    """One follower's queue. A follower that is slower than the events loses the newest, and `lost` counts them."""

    def __init__(self, hub: EventHub):
        self._hub = hub
        self._queue: deque[EventFields] = deque()
        self._ready = asyncio.Event()
        self._closed = False
        self.lost = 0

    def put(self, event: EventFields) -> None:
        if len(self._queue) >= _QUEUE:
            self.lost += 1
            return
        self._queue.append(event)
        self._ready.set()

    def close(self) -> None:
        self._closed = True
        self._ready.set()
        self._hub.leave(self)

    async def __aiter__(self) -> AsyncIterator[EventFields]:
        while not self._closed:
            while self._queue:
                yield self._queue.popleft()
            self._ready.clear()
            if not self._closed:
                await self._ready.wait()


class EventHub:
    """Hands each event to all followers, and remembers the latest."""

    def __init__(self) -> None:
        self._recent: deque[EventFields] = deque(maxlen=RECENT)
        self._feeds: set[EventFeed] = set()

    def publish(self, event: EventFields) -> None:
        self._recent.append(event)
        for feed in self._feeds:
            feed.put(event)

    def recent(self, limit: int) -> list[EventFields]:
        """The latest, oldest first."""
        events = list(self._recent)
        return events[-limit:] if limit else []

    def follow(self) -> EventFeed:
        feed = EventFeed(self)
        self._feeds.add(feed)
        return feed

    def leave(self, feed: EventFeed) -> None:
        self._feeds.discard(feed)
