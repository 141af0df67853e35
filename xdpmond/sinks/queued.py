"""What the sinks have in common: a bounded queue and a thread of its own that empties it.

The far end may stand still for seconds: a journald that is being restarted, a terminal after Ctrl-S. Then the queue fills, and what does
not fit is counted as lost. Samples of traffic get three quarters of it, so that a flood never displaces word of a change of policy.
"""

from __future__ import annotations

import abc
import threading
from collections import deque

from ..messages import Record

PATIENCE = 0.25
"""Seconds that a write waits at a time for its far end, before it looks whether it is still wanted."""


class QueuedSink(abc.ABC):
    """Records are taken from any thread and written by one, in order."""

    name = ""

    def __init__(self, capacity: int = 2048) -> None:
        self._capacity = capacity
        self._waiting: deque[Record] = deque()
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
            if not self._admit(record):
                return
            room = self._capacity * 3 // 4 if record.message.of_packet else self._capacity
            if self._closing or len(self._waiting) >= room or not self._running():
                self._lost += 1
                return
            self._waiting.append(record)
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
            self._lost += len(self._waiting)
            self._waiting.clear()

    # For the kinds of sink

    def _admit(self, record: Record) -> bool:
        """Is the record wanted at all? Called by `put`, one at a time."""
        return True

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
        while (record := self._next()) is not None:
            try:
                written = self._write(record)
            except Exception:  # whatever is odd about one record, the next one shall be written
                written = False
            if not written:
                with self._changed:
                    self._lost += 1
        self._release()

    def _next(self) -> Record | None:
        """The oldest record; None: the sink is closed and there is nothing more to write."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None
