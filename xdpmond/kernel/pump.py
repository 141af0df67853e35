"""From the ring buffer to whoever wants events: taken in bulk on the event loop, and handed on in bulk.

A turn takes what has gathered, up to a bound: there is no work here for an event by itself. Then the pump pauses, so that the next turn
is worth its while, and so that no more is taken than can be written: what is lost in the ring is counted by the packet path and costs the
daemon nothing, where an event that is taken in vain takes the time in which another one is written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..batch import EventBatch, Match
from . import abi
from .events import EventRing
from .maps import FAMILY_FROM_ABI

_BULK = 16384
"""Events a turn: 1 MB, a millisecond of the loop."""
_PAUSE = 0.02
_SHORT_PAUSE = 0.002
"""Seconds between turns; the short one where the ring was found more than half full."""
_MOST = 500_000
"""Events a second."""

_FAMILIES = np.array(FAMILY_FROM_ABI, "u1")


class Source(Protocol):
    """What the pump needs of the packet path."""

    @property
    def ring(self) -> EventRing | None: ...
    def interface_of_slot(self, slot: int) -> str: ...


class EventPump:
    """Owned by one task. `publish` is called for each batch, on the loop; it must not block. `policy` gives the policy that holds now."""

    def __init__(self, source: Source, policy: Callable[[], Match], publish: Callable[[EventBatch], None]):
        self._source = source
        self._policy = policy
        self._publish = publish

    async def run(self) -> None:
        ring = self._source.ring
        assert ring is not None
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        try:
            while True:
                # Level-triggered, and taken out while we do not read: the ring is polled again only when we come back to it.
                loop.add_reader(ring.fileno(), readable.set)
                await readable.wait()
                loop.remove_reader(ring.fileno())
                readable.clear()
                taken = self.turn(ring)
                await asyncio.sleep(max(_SHORT_PAUSE if taken > ring.capacity // 2 else _PAUSE, taken / _MOST))
        finally:
            loop.remove_reader(ring.fileno())

    def turn(self, ring: EventRing) -> int:
        """Take what is there; return how many it were."""
        events = ring.read(_BULK)
        if len(events):
            epoch = time.time_ns() - time.monotonic_ns()
            interfaces = [self._source.interface_of_slot(slot) for slot in range(abi.MAX_SLOTS)]
            self._publish(EventBatch(events, _FAMILIES[events["family"]], epoch, interfaces, self._policy()))
        return len(events)
