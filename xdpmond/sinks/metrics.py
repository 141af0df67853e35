"""The metrics over HTTP: a small server in a thread of its own, which hands out what was measured last.

It never asks the packet path for anything, so that no reader can make it wait, and nothing here can make the daemon wait. A connection is
for one request, and is bounded in what it may send and how long it may take. There are so many at most; one more, and the oldest has to
go: whoever sends his request a letter at a time is always older than who sends it at once.

An address in use, or one that is not there yet, is tried again; the daemon goes on meanwhile, and it is told once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Metrics
from ..errors import ConfigError
from ..messages import Message, Priority, Record
from .exposition import Source, require_library
from .passwords import Users

MOST_CONNECTIONS = 32
PATIENCE = 10.0
"""Seconds for a connection, from its first packet to its last."""
LIST_PATIENCE = 60.0
"""The same when the list of sources is asked for, which may be long."""
RETRY = 5.0
"""Seconds until an address that could not be had is tried again."""
_MOST_HEADER = 16384
_BACKLOG = 16
_LINGER = 1.0
"""Seconds for a reader to take an answer before what it still sends is met with a reset."""

_TEXT = [("Content-Type", "text/plain; charset=utf-8")]


@dataclass(frozen=True, slots=True)
class _Answer:
    status: str
    headers: list[tuple[str, str]]
    body: bytes | Iterator[bytes]


def _said(status: str, text: str, *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, [*_TEXT, *headers], f"{text}\n".encode())


class _Refused(Exception):
    def __init__(self, answer: _Answer):
        super().__init__(answer.status)
        self.answer = answer


class MetricsServer:
    """One server. It begins at once, after the one that had its place before (`after`) has ended."""

    def __init__(self, settings: Metrics, source: Source, report: Callable[[Record], None], *, after: MetricsServer | None = None,
                 patience: float = PATIENCE, retry: float = RETRY):  # fmt: skip
        self.settings = settings
        self.files = _files(settings)
        """What the certificate's files were when it began."""
        self._source = source
        self._report = report
        self._patience = patience
        self._retry = retry
        self._users = Users(settings.users)
        self._failing = False
        self._puzzled = False
        """Was an error of our own told already?"""
        self._stopping = threading.Event()
        self._connections: dict[asyncio.Task[None], None] = {}
        """From the oldest to the newest."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, args=(after,), name="metrics", daemon=True)
        self._thread.start()

    def matches(self, settings: Metrics) -> bool:
        """Is it as these settings want it, with the certificate that there is now?"""
        return settings == self.settings and _files(settings) == self.files

    def finish(self) -> None:
        """Take no more connections, and end."""
        self._stopping.set()
        with contextlib.suppress(RuntimeError):  # it has ended
            if self._loop:
                self._loop.call_soon_threadsafe(self._stop.set)

    def close(self, timeout: float = 3.0) -> None:
        """`finish`, and wait for the end."""
        self.finish()
        self._thread.join(timeout)

    # The thread

    def _run(self, after: MetricsServer | None) -> None:
        if after:
            after.close()
        while not self._stopping.is_set():
            try:
                asyncio.run(self._serve())
            except Exception:
                self._tell(f"the server of metrics failed, and begins again:\n{traceback.format_exc()}", Priority.ERROR)
                self._stopping.wait(self._retry)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._looking = asyncio.Lock()
        self._listing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self._wonder(str(context)))
        if self._stopping.is_set():
            return
        stopped = asyncio.create_task(self._stop.wait())
        while not self._stop.is_set():
            try:
                context, listening = self._listen()
            except (OSError, ConfigError) as error:
                self._fail(error)
                await asyncio.wait({stopped}, timeout=self._retry)
                continue
            self._works()
            accepting = asyncio.create_task(self._accept(listening, context))
            await asyncio.wait({stopped, accepting}, return_when=asyncio.FIRST_COMPLETED)
            accepting.cancel()
            tasks = [accepting, *self._connections]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            listening.close()
            _remove_socket(self.settings)

    def _listen(self) -> tuple[ssl.SSLContext | None, socket.socket]:
        of = self.settings.listen
        require_library("metrics.enable")
        context = _context(self.settings)
        family = socket.AF_UNIX if of.path else socket.AF_INET6 if ":" in of.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if of.path:
                _make_way(of.path)
                listening.bind(of.path)
                os.chmod(of.path, 0o660)
            else:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind((of.host, of.port))
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
        return context, listening

    async def _accept(self, listening: socket.socket, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError:  # no descriptor to be had, or the other end has gone already
                await asyncio.sleep(0.1)
                continue
            if len(self._connections) >= MOST_CONNECTIONS:
                oldest = next(iter(self._connections))
                del self._connections[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._converse(connection, context))
            self._connections[task] = None
            task.add_done_callback(lambda task: self._connections.pop(task, None))

    async def _converse(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        """One connection, one request."""
        transport: asyncio.Transport | None = None
        reader = asyncio.StreamReader(limit=_MOST_HEADER)
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        try:
            # Whatever goes wrong with a connection is of no interest here: who made it sees it.
            with contextlib.suppress(TimeoutError, OSError, EOFError):
                async with asyncio.timeout(self._patience) as limit:
                    handshake: dict[str, Any] = {}
                    if context:
                        handshake = {"ssl_handshake_timeout": self._patience, "ssl_shutdown_timeout": _LINGER}
                    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context, **handshake)
                    transport.set_write_buffer_limits(1, 0)  # so that `drain` returns when all has left
                    await self._answer(reader, asyncio.StreamWriter(transport, protocol, reader, loop), limit)
        except Exception:
            self._wonder(traceback.format_exc())
        finally:
            if transport is None:
                connection.close()
            elif not transport.is_closing():
                transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: asyncio.Timeout) -> None:
        head = b""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            answer = await self._respond(head.decode("latin-1"))
        except asyncio.LimitOverrunError:
            answer = _said("431 Request Header Fields Too Large", f"a request has at most {_MOST_HEADER} bytes here")
        except _Refused as refused:
            answer = refused.answer
        lines = [f"HTTP/1.1 {answer.status}", *(f"{name}: {value}" for name, value in answer.headers)]
        if isinstance(answer.body, bytes):
            lines.append(f"Content-Length: {len(answer.body)}")
        lines += ["Connection: close", "X-Content-Type-Options: nosniff", "", ""]
        writer.write("\r\n".join(lines).encode("latin-1"))
        if not head.startswith(b"HEAD "):
            if isinstance(answer.body, bytes):
                writer.write(answer.body)
            else:
                limit.reschedule(asyncio.get_running_loop().time() + LIST_PATIENCE)
                async with self._listing:
                    await _send(writer, answer.body)
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
            # If something unread is left when the connection is closed, the other end may get a reset in place of the answer's end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while await reader.read(_MOST_HEADER):
                        pass
        else:
            writer.close()
            await writer.wait_closed()

    async def _respond(self, head: str) -> _Answer:
        request, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        method, target = _parts(request)
        fields = _fields(lines)
        await self._require_user(fields.get("authorization", ""))
        path, _, query = target.partition("?")
        paths = ["/metrics", *(["/list"] if self.settings.list else [])]
        if path not in paths:
            return _said("404 Not Found", f"not found; see {' or '.join(paths)}")
        if method not in ("GET", "HEAD"):
            return _said("405 Method Not Allowed", "GET or HEAD", ("Allow", "GET, HEAD"))
        if path == "/list":
            if self._listing.locked():
                return _said("503 Service Unavailable", "somebody else is reading the list", ("Retry-After", "5"))
            return _Answer("200 OK", [("Content-Type", "application/json")], self._source.sources())
        page = self._source.page
        if page is None:
            return _said("503 Service Unavailable", "nothing was measured yet", ("Retry-After", "1"))
        headers, body = page.answer(fields.get("accept", ""), fields.get("accept-encoding", ""), query)
        return _Answer("200 OK", headers, body)

    async def _require_user(self, authorization: str) -> None:
        if not self.settings.users or self._users.knows(authorization):
            return
        async with self._looking:
            if self._users.overwhelmed:
                raise _Refused(_said("429 Too Many Requests", "too many wrong passwords", ("Retry-After", "10")))
            if await asyncio.to_thread(self._users.check, authorization):
                return
        raise _Refused(_said("401 Unauthorized", "a name and a password are wanted", ("WWW-Authenticate", 'Basic realm="xdpmond"')))

    # What is told

    def _fail(self, error: OSError | ConfigError) -> None:
        if not self._failing:
            self._failing = True
            said = str(error)
            if isinstance(error, OSError):
                # OpenSSL's errors have a reason for a file that does not hold what it should.
                reason = getattr(error, "reason", None) or error.strerror or said
                said = f"{error.filename}: {reason}" if error.filename else reason
            self._tell(f"metrics cannot be served on {self.settings.listen}: {said}; it is tried again every {self._retry:g} s")

    def _works(self) -> None:
        if self._failing:
            self._failing = False
            self._tell(f"metrics are served on {self.settings.listen} now", Priority.NOTICE)

    def _wonder(self, error: str) -> None:
        """An error of our own, or of the library's, has ended a connection. Told once: whoever can cause it can cause it often."""
        if not self._puzzled:
            self._puzzled = True
            self._tell(f"a request for metrics failed:\n{error}", Priority.ERROR)

    def _tell(self, text: str, priority: int | None = None) -> None:
        self._report(Record(Message.METRICS_PROBLEM, text, {"listen": str(self.settings.listen)}, priority=priority))


async def _send(writer: asyncio.StreamWriter, pieces: Iterator[bytes]) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)  # others have their turn


def _parts(request: str) -> tuple[str, str]:
    """Method and target of a request line."""
    parts = request.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1.") or not parts[1].startswith("/"):
        raise _Refused(_said("400 Bad Request", "not a request of HTTP/1.1"))
    return parts[0], parts[1]


def _fields(lines: list[str]) -> dict[str, str]:
    """The header fields; what is there several times is one list."""
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _Refused(_said("400 Bad Request", "not a header field"))
        name, value = name.lower(), value.strip()
        fields[name] = f"{fields[name]},{value}" if name in fields else value
    return fields


def _files(settings: Metrics) -> tuple[tuple[int, int, int] | None, ...]:
    """What tells whether certificate and key have changed."""
    found: list[tuple[int, int, int] | None] = []
    for path in (settings.certificate, settings.key):
        try:
            of = os.stat(path)
            found.append((of.st_ino, of.st_mtime_ns, of.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


def _context(settings: Metrics) -> ssl.SSLContext | None:
    if not settings.certificate:
        return None
    for path in (settings.certificate, settings.key):
        with open(path, "rb"):  # OpenSSL does not say which one it cannot open
            pass
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.certificate, settings.key, password="")  # without this a terminal would be asked for one
    return context


def _make_way(path: str) -> None:
    """Remove a socket that nobody listens on any more: what a process that was killed has left."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:
            pass  # somebody listens, and is busy


def _remove_socket(settings: Metrics) -> None:
    if settings.listen.path:
        with contextlib.suppress(OSError):
            os.unlink(settings.listen.path)


def require_within(settings: Metrics, writable: Sequence[str]) -> None:
    """Refuse a socket that the service, which may write below these paths, cannot make, whoever asks. Raises ConfigError."""
    path = settings.listen.path
    if settings.enable and path and not any(Path(path).is_relative_to(place) for place in writable):
        raise ConfigError(f"metrics.listen: {path} cannot be made: the service may not write there", hint=_PLACES)


_PLACES = "the service may write in /run/xdpmond, and where ReadWritePaths= says: systemctl edit xdpmond"


def require_servable(settings: Metrics, *, by_us: bool = True) -> None:
    """Refuse what cannot be served, as far as can be told now. Not `by_us`: another user will serve it, and may be able to read what we
    cannot. Raises ConfigError."""
    if not settings.enable:
        return
    require_library("metrics.enable")
    directory = Path(settings.listen.path).parent
    if settings.listen.path and not directory.is_dir():
        raise ConfigError(f"metrics.listen: there is no directory {directory}")
    if settings.listen.path and by_us and not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise ConfigError(f"metrics.listen: {settings.listen.path} cannot be made: {directory} may not be written", hint=_PLACES)
    for name, path in (("certificate", settings.certificate), ("key", settings.key)):
        try:
            if path:
                with open(path, "rb"):
                    pass
        except OSError as error:
            if isinstance(error, PermissionError) and not by_us:
                return
            raise ConfigError(f"metrics.{name}: {path}: {error.strerror}", hint="the user xdpmond must be able to read it") from None
    try:
        _context(settings)
    except OSError as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(f"metrics.certificate: {settings.certificate} and {settings.key} are no pair for TLS: {reason}",
                          hint="PEM files, the key without a password") from None  # fmt: skip
