"""Events in files, a line each, with one thread a file.

The queue between the event loop and the thread is bounded; what finds no room is lost and counted. A file that cannot be written, be it
for a full disk, costs its lines and nothing else: they are counted, it is told once, and tried again until it goes well. What a write that
is cut short leaves of its last line is taken back, so a file holds whole lines.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..batch import EventBatch
from ..config import Log, LogFields, LogFormat
from ..errors import ConfigError
from ..messages import Message, Priority, Record
from .rotation import Compressor, CutShort, RotatedFile

if TYPE_CHECKING:
    from ..lines import LineFormat

PIECE = 2048
"""Events formatted and written at a time: about 700 KB, some milliseconds. Fewer where that would be more than a file may hold."""
LINE = 1024
"""Bytes that a line has at most, but for strange names of interfaces."""
RETRY = 5.0
"""Seconds until a file that could not be written is tried again."""
_MOST_BATCHES = 4096


class LogFile:
    """One log. `put` and `reopen` do not block. With `after`, it waits for that one, which had the same file, to end."""

    def __init__(
        self,
        log: Log,
        capacity: int,
        report: Callable[[Record], None],
        *,
        after: LogFile | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.log = log
        self.capacity = capacity
        self.lost_in_queue = 0
        """Events that found no room to wait."""
        self.lost_on_disk = 0
        """Events that could not be written."""
        self.written = 0
        self._report = report
        self._clock = clock
        self._monotonic = monotonic
        self._waiting: deque[EventBatch] = deque()
        self._number = 0
        """Events waiting, those that the thread has just taken included."""
        self._changed = threading.Condition()
        self._closing = self._abandoned = self._reopen = False
        self._compressor = Compressor(log) if log.compress else None
        self._failing = False
        self._retry_at = 0.0
        self._lost_before_failure = 0
        self._thread = threading.Thread(target=self._run, args=(after,), name=f"log-{Path(log.path).name}", daemon=True)
        self._thread.start()

    def put(self, batch: EventBatch) -> None:
        with self._changed:
            room = 0 if self._closing or len(self._waiting) >= _MOST_BATCHES else self.capacity - self._number
            taken = min(len(batch), room)
            self.lost_in_queue += len(batch) - taken
            if taken:
                self._waiting.append(batch if taken == len(batch) else batch[:taken].copy())
                self._number += taken
                self._changed.notify()

    def reopen(self) -> None:
        """Somebody has moved the file away; go on in a new one of its name."""
        with self._changed:
            self._reopen = True
            self._changed.notify()

    def finish(self) -> None:
        """Take no more, and end when all that waits is written."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, timeout: float = 3.0) -> None:
        """`finish`, and wait for the end; what is not written by then is lost."""
        self.finish()
        self._thread.join(timeout)
        self._abandoned = True
        if self._compressor:
            self._compressor.stop()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def losses(self) -> Counter[tuple[str, str]]:
        """Events that are not in the file, by why and by its path. What is zero is left out."""
        return +Counter({("log_queue", self.log.path): self.lost_in_queue, ("log_disk", self.log.path): self.lost_on_disk})

    # The thread

    def _run(self, after: LogFile | None) -> None:
        if after:
            after.close(timeout=10.0)
        self._format = _format(self.log)
        self._file = RotatedFile(self.log, self._format.head)
        self._attempt(self._file.open, 0)
        if self._compressor:
            self._compressor.begin()
        at_once = min(PIECE, max(1, self.log.rotate_size // LINE)) if self.log.rotate_size else PIECE
        while (batch := self._next()) is not None:
            for start in range(0, len(batch), at_once):
                piece = batch[start : start + at_once]
                if self._abandoned:
                    self.lost_on_disk += len(piece)
                else:
                    self._write(piece)
                with self._changed:
                    self._number -= len(piece)
        self._file.close()

    def _next(self) -> EventBatch | None:
        """What has waited longest; None: it is the end. Also reopens, in turn."""
        while True:
            with self._changed:
                while not self._waiting and not self._closing and not self._reopen:
                    self._changed.wait()
                reopen, self._reopen = self._reopen, False
                if not reopen:
                    return self._waiting.popleft() if self._waiting else None
            self._file.close()
            self._retry_at = 0.0
            self._attempt(self._file.open, 0)

    def _write(self, piece: EventBatch) -> None:
        if self._failing and self._monotonic() < self._retry_at:
            self.lost_on_disk += len(piece)
        elif self._attempt(lambda: self._append(piece), len(piece)):
            self.written += len(piece)

    def _append(self, piece: EventBatch) -> None:
        text = self._format.lines(piece)
        if self._file.make_room(len(text), self._clock()) and self._compressor:
            self._compressor.begin()
        self._file.append(text)

    def _attempt(self, do: Callable[[], None], events: int) -> bool:
        """Do what may fail, at the cost of so many events; tell when failing begins, and when it ends."""
        try:
            do()
        except Exception as error:  # whatever it is about these events, the next ones shall be written
            whole = error.whole_lines if isinstance(error, CutShort) else 0
            self.written += whole
            self.lost_on_disk += events - whole
            self._retry_at = self._monotonic() + RETRY
            self._file.close()
            if not self._failing:
                self._failing = True
                self._lost_before_failure = self.lost_on_disk - (events - whole)
                self._tell(f"{self.log.path} cannot be written: {_reason(error)}; its events are lost, and counted, until it can be")
            return False
        if self._failing:
            self._failing = False
            lost = self.lost_on_disk - self._lost_before_failure
            self._tell(f"{self.log.path} is written again; {lost} events were lost to it", Priority.NOTICE)
        return True

    def _tell(self, text: str, priority: int | None = None) -> None:
        self._report(Record(Message.LOG_PROBLEM, text, {"path": self.log.path, "lost": self.lost_on_disk}, priority=priority))


def _format(log: Log) -> LineFormat:
    # Its tables are a megabyte, for nothing where there is no log.
    from .. import lines

    jsonl = lines.ecs if log.fields is LogFields.ECS else lines.jsonl
    return {LogFormat.CONSOLE: lines.console, LogFormat.JSONL: jsonl, LogFormat.CSV: lines.csv}[log.format]()


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return repr(error)
    hint = f" ({_PLACES})" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else ""
    return f"{error.strerror}{hint}"


_PLACES = "the service may write below /var/log/xdpmond, and where ReadWritePaths= says: systemctl edit xdpmond"


class LogFiles:
    """All logs of the configuration. For the event loop."""

    def __init__(self, report: Callable[[Record], None]):
        self._report = report
        self._logs: dict[str, LogFile] = {}
        self._ending: list[LogFile] = []
        self._ended: Counter[tuple[str, str]] = Counter()
        """Losses by name and path of those that have written their last."""

    def configure(self, logs: Sequence[Log], capacity: int) -> None:
        """Go on with those that are the same; end and begin others."""
        for ended in [one for one in self._ending if one.ended]:
            self._ending.remove(ended)
            self._ended += ended.losses()
        before, self._logs = self._logs, {}
        for log in logs:
            old = before.pop(log.path, None)
            if old and (old.log, old.capacity) == (log, capacity):
                self._logs[log.path] = old
                continue
            if old:
                self._end(old)
            self._logs[log.path] = LogFile(log, capacity, self._report, after=old)
        for old in before.values():
            self._end(old)

    def _end(self, log: LogFile) -> None:
        log.finish()
        self._ending.append(log)

    def put(self, batch: EventBatch) -> None:
        for log in self._logs.values():
            log.put(batch)

    def reopen(self) -> None:
        for log in self._logs.values():
            log.reopen()

    def close(self) -> None:
        """Write what waits. Takes up to some seconds: call it in a thread."""
        for log in self._logs.values():
            log.finish()
        for log in self._logs.values():
            log.close()

    def losses(self) -> Mapping[str, Mapping[str, int]]:
        """Events that are in no file, by its path; also of logs that the configuration has no more."""
        total = sum((log.losses() for log in (*self._ending, *self._logs.values())), self._ended)
        return {name: {path: count for (of, path), count in total.items() if of == name} for name in ("log_queue", "log_disk")}


def require_writable(logs: Sequence[Log]) -> None:
    """Refuse logs that this process cannot write, now. Raises ConfigError."""
    for log in logs:
        path = Path(log.path)
        try:
            found = path.stat()
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise _refused(log, error.strerror or "") from None
        if found and not stat.S_ISREG(found.st_mode):
            raise _refused(log, "it is not a regular file")
        if found and not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
            raise _refused(log, "it is not permitted")
        rotates = log.rotate_size or log.rotate_age
        if not path.parent.is_dir():
            raise _refused(log, f"there is no directory {path.parent}")
        if (rotates or not found) and not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
            raise _refused(log, f"{path.parent} may not be written" + (", which rotation needs" if found else ""))


def require_within(logs: Sequence[Log], writable: Sequence[str]) -> None:
    """Refuse logs that the service, which may write below these paths, cannot write, whoever asks. Raises ConfigError."""
    for log in logs:
        if not any(Path(log.path).is_relative_to(path) for path in writable):
            raise _refused(log, "the service may not write there")


def _refused(log: Log, reason: str) -> ConfigError:
    return ConfigError(f"{log.source or 'log'}: log.path: {log.path} cannot be written: {reason}", hint=_PLACES)
