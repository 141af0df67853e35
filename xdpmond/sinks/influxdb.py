"""The measurements of each window as points of InfluxDB, in its line protocol, over HTTP or a Unix socket.

A family is a measurement with one field, `value`; its labels are tags, and `host` is one more. What waits to be written is bounded: while
the database is away the newest windows are kept and the oldest are lost, and counted. A thread does the writing, so that nobody waits for
the other end; it tries again after pauses that grow, and tells once that it does.
"""

from __future__ import annotations

import base64
import http.client
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from ..config import InfluxDB
from ..errors import ConfigError
from ..measures import Measured
from ..messages import Message, Priority, Record

MOST_WAITING = 64
"""Windows that wait to be written."""
MOST_BYTES = 16 << 20
"""What they may take together."""
TIMEOUT = 10.0
"""Seconds that the other end may take."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
_MOST_ANSWER = 4096
_PERMANENT = (400, 413, 422)
"""Answers to points that will not be taken, however often they come."""


def lines(families: Iterable[Measured], host: str, at: float) -> list[str]:
    """Points in the line protocol. A value that is whole is an integer in every point: a field keeps the type that it had first."""
    time = f"{int(at * 1000)}000000"
    found = []
    for family in families:
        name = _escaped(family.name, ", ")
        for labels, value in family.samples:
            # A tag without a value cannot be written; it is the same as none.
            tags = sorted((key, text) for key, text in [("host", host), *zip(family.labels, labels, strict=True)] if text)
            head = ",".join([name, *(f"{_escaped(key, ',= ')}={_escaped(text, ',= ')}" for key, text in tags)])
            found.append(f"{head} value={f'{int(value)}i' if family.whole else repr(float(value))} {time}")
    return found


def _escaped(text: str, special: str) -> str:
    # A backslash needs no escaping, but as the last character it would escape the separator that follows, and nothing can prevent that.
    text = re.sub(r"\\+$", lambda match: "_" * len(match[0]), text.replace("\n", " "))
    return "".join(f"\\{character}" if character in special else character for character in text)


@dataclass(frozen=True, slots=True)
class _Batch:
    points: int
    body: bytes


class _Unwanted(Exception):
    """The other end will never take it."""


class InfluxWriter:
    """Writes to one database. It begins after the one that had its place before (`after`) has ended."""

    def __init__(self, settings: InfluxDB, report: Callable[[Record], None], *, host: str = "", first_pause: float = FIRST_PAUSE,
                 timeout: float = TIMEOUT):  # fmt: skip
        self.settings = settings
        self.lost = 0
        """Points that were not written."""
        self.written = 0
        self._report = report
        self._host = host or socket.gethostname()
        self._pauses = (first_pause, LONGEST_PAUSE)
        self._timeout = timeout
        self._waiting: deque[_Batch] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = self._failing = False
        self._thread = threading.Thread(target=self._run, name="influxdb", daemon=True)
        self._thread.start()

    def put(self, families: Sequence[Measured], at: float) -> None:
        """Take the measurements of a window that ended then."""
        found = lines(families, self._host, at)
        batch = _Batch(len(found), "\n".join(found).encode())
        with self._changed:
            if self._closing:
                self.lost += batch.points
                return
            self._waiting.append(batch)
            self._bytes += len(batch.body)
            self._make_room()
            self._changed.notify()

    def finish(self) -> None:
        """Take no more, and end when what waits is written, or cannot be."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, timeout: float = 3.0) -> None:
        """`finish`, and wait for the end; what is not written by then is lost."""
        self.finish()
        self._thread.join(timeout)
        with self._changed:
            while self._waiting:
                self._drop()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _make_room(self) -> None:
        while len(self._waiting) > 1 and (len(self._waiting) > MOST_WAITING or self._bytes > MOST_BYTES):
            self._drop()

    def _drop(self) -> None:
        oldest = self._waiting.popleft()
        self._bytes -= len(oldest.body)
        self.lost += oldest.points

    # The thread

    def _run(self) -> None:
        pause, longest = self._pauses
        while (batch := self._next()) is not None:
            try:
                self._write(batch.body)
            except _Unwanted as error:
                self.lost += batch.points
                self._fail(f"{error}; these points are lost")
            except (OSError, http.client.HTTPException) as error:
                self._fail(_reason(error))
                if not self._put_back(batch, pause):
                    return
                pause = min(pause * 2, longest)
            else:
                pause = self._pauses[0]
                self.written += batch.points
                self._works()

    def _next(self) -> _Batch | None:
        """What has waited longest; None: it is the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            batch = self._waiting.popleft()
            self._bytes -= len(batch.body)
            return batch

    def _put_back(self, batch: _Batch, pause: float) -> bool:
        """Wait with it in its place, unless there is no room any more; False: it is the end, and what waits is lost."""
        with self._changed:
            self._waiting.appendleft(batch)
            self._bytes += len(batch.body)
            self._make_room()
            if not self._changed.wait_for(lambda: self._closing, pause):
                return True
            while self._waiting:
                self._drop()
            return False

    def _write(self, body: bytes) -> None:
        of = self.settings
        query = {"bucket": of.bucket, "org": of.organization} if of.bucket else {"db": of.database, "rp": of.retention_policy}
        base = "" if of.url.startswith("unix:") else urlsplit(of.url).path.rstrip("/")
        target = f"{base}{'/api/v2' if of.bucket else ''}/write?{urlencode({key: value for key, value in query.items() if value})}"
        headers = {"Content-Type": "text/plain; charset=utf-8", "User-Agent": "xdpmond"}
        if of.token:
            headers["Authorization"] = f"Token {of.token}"
        elif of.user:
            headers["Authorization"] = "Basic " + base64.b64encode(f"{of.user}:{of.password}".encode()).decode()
        connection = _connection(of, self._timeout)
        try:
            connection.request("POST", target, body, headers)
            answer = connection.getresponse()
            said = answer.read(_MOST_ANSWER).decode(errors="replace").strip()
        finally:
            connection.close()
        if answer.status in _PERMANENT:
            raise _Unwanted(f"it answers {answer.status} {answer.reason}: {said:.300}")
        if not 200 <= answer.status < 300:
            raise OSError(f"it answers {answer.status} {answer.reason}{f': {said:.300}' if said else ''}")

    # What is told

    def _fail(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            self._lost_before = self.lost
            self._tell(f"InfluxDB at {self.settings.url} takes no points: {reason}; it is tried again")

    def _works(self) -> None:
        if self._failing:
            self._failing = False
            self._tell(f"InfluxDB at {self.settings.url} takes points again; {self.lost - self._lost_before} were lost", Priority.NOTICE)

    def _tell(self, text: str, priority: int | None = None) -> None:
        self._report(Record(Message.METRICS_PROBLEM, text, {"url": self.settings.url, "lost": self.lost}, priority=priority))


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float):
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(settings: InfluxDB, timeout: float) -> http.client.HTTPConnection:
    if settings.url.startswith("unix:"):
        return _UnixConnection(settings.url.removeprefix("unix:"), timeout)
    parts = urlsplit(settings.url)
    host, port = parts.hostname or "", parts.port or 8086
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context(cafile=settings.ca or None))
    return http.client.HTTPConnection(host, port, timeout=timeout)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or repr(error)


def require_readable(settings: InfluxDB) -> None:
    """Refuse a certificate of an authority that cannot be read. Raises ConfigError."""
    if settings.url and settings.ca:
        try:
            ssl.create_default_context(cafile=settings.ca)
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror
            raise ConfigError(f"influxdb.ca: {settings.ca}: {reason}", hint="a PEM file that the user xdpmond can read") from None
