"""What the sinks have in common: a bounded queue and a thread of its own that empties it.

The far end may stand still for seconds: a journald that is being restarted, a terminal after Ctrl-S. Then the queue fills, and what does
not fit is counted as lost. Samples of traffic get three quarters of it, so that a flood never displaces word of a change of policy.
"""

from __future__ import annotations

import abc
import threading
from collections import deque
from collections.abc import Callable

from ..batch import EventBatch
from ..messages import Record, packet_record

PATIENCE = 0.25
"""Seconds that a write waits at a time for its far end, before it looks whether it is still wanted."""


class Budget:
    """At most so many in each interval of so many seconds; one begins with the first that is asked for after the last one ended."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self.most = most
        self._seconds = seconds
        self._clock = clock
        self._began = float("-inf")
        self._taken = 0

    def take(self, wanted: int) -> int:
        """How many of so many there may be."""
        now = self._clock()
        if now - self._began >= self._seconds:
            self._began, self._taken = now, 0
        taken = max(0, min(wanted, self.most - self._taken))
        self._taken += taken
        return taken


class QueuedSink(abc.ABC):
    """Records are taken from any thread and written by one, in order."""

    name = ""

    def __init__(self, capacity: int = 2048) -> None:
        self._capacity = capacity
        self._waiting: deque[Record | EventBatch] = deque()
        self._number = 0
        """Records waiting, those that the thread has just taken included."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._abandoned = False
        self._lost = 0

    @property
    def lost(self) -> int:
        """Records that found the queue full or could not be written."""
        return self._lost

    @property
    def held_back(self) -> int:
        """Records kept back on purpose."""
        return 0

    def set_budget(self, events_per_minute: int) -> None:
        """Change how many samples of traffic a minute are written, where the sink has such a limit."""

    def put(self, record: Record) -> None:
        with self._changed:
            sample = record.message.of_packet
            if not sample or self._admit(1):
                self._enqueue(record, 1, min(1, self._room(sample)))

    def put_events(self, batch: EventBatch) -> None:
        """Take as many samples of traffic as are wanted and as there is room for, from the first on. They become records in the thread."""
        with self._changed:
            wanted = self._admit(len(batch))
            taken = min(wanted, self._room(sample=True)) if wanted else 0
            self._enqueue(batch if taken == len(batch) else batch[:taken].copy(), wanted, taken)

    def _room(self, sample: bool) -> int:
        room = (self._capacity * 3 // 4 if sample else self._capacity) - self._number
        return room if room > 0 and not self._closing and self._running() else 0

    def _enqueue(self, item: Record | EventBatch, wanted: int, taken: int) -> None:
        self._lost += wanted - taken
        if taken:
            self._waiting.append(item)
            self._number += taken
            self._changed.notify()

    def close(self, timeout: float = 3.0) -> None:
        """Write what waits, for `timeout` seconds at most; what is left then is lost."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread:
            self._thread.join(timeout)
        with self._changed:
            self._abandoned = True
            left = sum(1 if isinstance(item, Record) else len(item) for item in self._waiting)
            self._lost += left
            self._number -= left
            self._waiting.clear()

    # For the kinds of sink

    def _admit(self, events: int) -> int:
        """How many of so many samples of traffic are wanted? Called by one thread at a time."""
        return events

    @abc.abstractmethod
    def _write(self, record: Record) -> bool:
        """Write one record in the sink's thread, and say whether that was possible. Give up, if `_abandoned`, within PATIENCE."""

    def _release(self) -> None:
        """Let go of what the thread held; its last act."""

    # The thread

    def _running(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had now
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while (item := self._next()) is not None:
            for record in (item,) if isinstance(item, Record) else map(packet_record, item.values()):
                try:
                    written = self._write(record)
                except Exception:  # whatever is odd about one record, the next one shall be written
                    written = False
                with self._changed:
                    self._number -= 1
                    self._lost += not written
        self._release()

    def _next(self) -> Record | EventBatch | None:
        """What has waited longest; None: the sink is closed and there is nothing more to write."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None
