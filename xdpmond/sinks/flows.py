"""Records of flows between the cache that keeps them and the collector that gets them.

When a window has closed, its flows are added to the records; what has ended is then handed on in pieces, as many as the exporter has room
for. The rest waits in the cache, so that a collector that is away for a while costs no record. Without a collector what has ended is
thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import IPFIX, Config
from ..flows import FlowCache, Timeouts
from ..messages import Record
from ..model import Endpoint
from .ipfix import CAPACITY, IpfixSink

PIECE = 32_768
"""Records taken at a time, some milliseconds of work in a thread."""


class FlowExport:
    """For the event loop. `reading` is held while the cache is worked on."""

    def __init__(self, cache: FlowCache, reading: asyncio.Lock, report: Callable[[Record], None], capacity: int = CAPACITY):
        self._cache = cache
        self._reading = reading
        self._report = report
        self._capacity = capacity
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        """Something may be due, or there may be room for it."""
        self._sink: IpfixSink | None = None
        self._ending: list[IpfixSink] = []
        self._lost = 0
        """By exporters that have ended."""
        self._ifindexes: Mapping[int, int] = {}
        self._timeouts = Timeouts(300, 30)

    def configure(self, config: Config) -> None:
        """Go on with the exporter if it is the same; else end it, and begin another one."""
        self._timeouts = Timeouts(config.flows.active_timeout, config.flows.inactive_timeout)
        for ended in [one for one in self._ending if one.ended]:
            self._ending.remove(ended)
            self._lost += ended.lost
        if self._sink and self._sink.settings == config.ipfix:
            return
        if self._sink:
            self._sink.finish()
            self._ending.append(self._sink)
        collector = config.ipfix.collector
        self._sink = self._begin(config.ipfix, collector) if collector else None
        self._changed.set()

    def _begin(self, settings: IPFIX, collector: Endpoint) -> IpfixSink:
        return IpfixSink(settings, collector, self._report, self._drained, capacity=self._capacity)

    @property
    def exports(self) -> bool:
        """Is there a collector?"""
        return self._sink is not None

    def window_closed(self, flows: np.ndarray, started: float, ended: float, ifindexes: Mapping[int, int]) -> None:
        """Add the flows of a window. Takes some tenths of a second for a million: call it in a thread, with `reading` held. `ifindexes` are
        those of the interfaces by slot."""
        self._cache.close(flows, started, ended, self._timeouts)
        self._ifindexes = ifindexes
        self._drained()

    def _drained(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        """Hand on what is due. Ends by cancellation."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            while await asyncio.shield(self._hand_on()):  # what has been taken must not be lost to the end of this task
                pass

    async def _hand_on(self) -> bool:
        """One piece. Was there one?"""
        async with self._reading:
            sink = self._sink
            most = min(PIECE, sink.room) if sink else PIECE
            if not most:
                return False
            records = await asyncio.to_thread(self._cache.take, most)
            if sink and len(records):
                sink.put(records, self._ifindexes)
        return len(records) > 0

    async def close(self, timeout: float = 3.0) -> None:
        """End all records, and send them, for so many seconds at most."""
        async with self._reading:
            await asyncio.to_thread(self._cache.flush)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._sink and self._cache.due:
                    self._changed.clear()
                    if not await asyncio.shield(self._hand_on()):
                        await self._changed.wait()
        for sink in (*self._ending, *([self._sink] if self._sink else [])):
            await asyncio.to_thread(sink.close, timeout)

    def state(self) -> dict[str, Any]:
        """For the status. `waiting` of the records have ended. `reachable` is what the network says; a collector that says nothing is."""
        sink = self._sink
        return {
            "records": len(self._cache),
            "capacity": self._cache.most,
            "waiting": self._cache.due,
            "collector": str(sink.collector) if sink else None,
            "reachable": not sink.failing if sink else None,
            "exported": sink.sent if sink else 0,
        }

    def losses(self) -> Mapping[str, int]:
        """Records that nobody got: that found no room, or that the collector refused."""
        sinks = (*self._ending, *([self._sink] if self._sink else []))
        return {"flow_cache": self._cache.lost.records, "ipfix": self._lost + sum(sink.lost for sink in sinks)}
