"""One connection to a message bus: bytes and descriptors in, messages out, and the other way round.

dbus_next marshals and unmarshals; the socket is driven here, because a daemon that anybody on the host may call has to stand what its
own connection class (0.2.3) does not: a socket buffer that fills up while a burst of signals is sent, a message type or header field
that it does not know, a bus that closes during authentication, a header or a body of 32 MB, and descriptors attached to a message that
nobody takes. Here only the header is parsed at once, and a body longer than MAX_BODY is not even kept: unmarshalling holds the loop. A
message with a header longer than MAX_HEADER is not kept at all, or the calls that are under way could be of any size.

Descriptors have one owner at any time. Those received belong to the `Incoming` until `take_descriptor`, and `close()` ends the rest.
Those given to `send` belong to the connection, which closes them once they are sent, or when the connection ends.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from dbus_next import Message

from .wire import MAX_BODY, MAX_HEADER, Incoming, Unreadable, read_fields

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
DAEMON = "org.freedesktop.DBus"
DAEMON_PATH = "/org/freedesktop/DBus"

MAX_MESSAGE = 128 * 1024 * 1024
"""Bytes; what the D-Bus specification allows. A longer one means that the stream is out of step."""
MAX_DESCRIPTORS = 16
"""A message on the system bus carries no more."""
MAX_QUEUED = 1024
"""Messages waiting for the socket; signals beyond it are dropped and counted."""

_CHUNK = 64 * 1024


class BusError(Exception):
    """The bus or a peer answered with an error. `name` is the D-Bus error name."""

    def __init__(self, name: str, text: str):
        super().__init__(f"{text} ({name})")
        self.name = name
        self.text = text


class Disconnected(Exception):
    """The connection is gone, or could not be made."""


@dataclass(slots=True)
class _Waiting:
    """A call that was sent, and its answer to come."""

    destination: str
    reply: asyncio.Future[Incoming]


@dataclass(slots=True)
class _Outgoing:
    data: memoryview
    descriptors: list[int]


class Connection:
    """A connection with its unique name, made by `Connection.open`."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._serial = 0
        self._waiting: dict[int, _Waiting] = {}
        self._queue: deque[_Outgoing] = deque()
        self._writing = False
        self._drained = asyncio.Event()
        self._drained.set()
        self.closed = False
        self.unique_name = ""
        self.signals_lost = 0

    @classmethod
    async def open(cls, address: str | None = None, *, timeout: float = 10.0) -> Connection:
        """Connect to the address (None: the system bus), authenticate, say Hello. Raise `Disconnected`, within `timeout` seconds."""
        address = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS
        problem: Exception = Disconnected(f"'{address}' names no bus: unix:path=... or unix:abstract=... is wanted")
        for place in _parse_address(address):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                # A full backlog gives EAGAIN at once on a Unix socket, which is tried again later like any other refusal.
                sock.connect(place)
                connection = cls(sock)
            except OSError as error:
                sock.close()
                problem = Disconnected(f"cannot connect to the bus at {address}: {error.strerror or error}")
                continue
            try:
                async with asyncio.timeout(timeout):
                    await connection._authenticate()
                    await connection._hello()
            except BaseException as error:
                connection.close()
                if not isinstance(error, (OSError, TimeoutError, BusError, ValueError)):
                    raise
                reason = "no answer" if isinstance(error, TimeoutError) else str(error)
                problem = Disconnected(f"the bus at {address} does not let us in: {reason}")
                continue
            return connection
        raise problem

    async def receive(self) -> Incoming:
        """The next message that is not a reply to a `call` of ours. Raise `Disconnected` at the end."""
        while True:
            message = await self._read_message()
            if message is None:
                continue
            waiting = self._waiting.get(message.reply_serial)
            if waiting is None or not _answers(message, waiting.destination):
                return message
            message.close()  # none of the calls made here is answered by a descriptor
            if not waiting.reply.done():
                waiting.reply.set_result(message)

    async def call(self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = (), *,
                   timeout: float | None = 25.0) -> list[Any]:  # fmt: skip
        """Call a method and return the answer's arguments. Raise `BusError`, `Disconnected` or TimeoutError. `receive` must be running."""
        message = Message(destination=destination, path=path, interface=interface, member=member, signature=signature, body=list(body))
        waiting = _Waiting(destination, self._loop.create_future())
        serial = self.send(message)
        self._waiting[serial] = waiting
        try:
            async with asyncio.timeout(timeout):
                reply = await waiting.reply
        finally:
            self._waiting.pop(serial, None)
        return _arguments(reply)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> int:
        """Queue a message and return its serial. The descriptors are the connection's from here on, whatever happens."""
        owned = list(descriptors)
        try:
            if self.closed:
                raise Disconnected("the connection to the bus is closed")
            self._serial = self._serial % 0xFFFFFFFF + 1
            message.serial = self._serial
            message.unix_fds = owned
            item = _Outgoing(memoryview(bytes(message._marshall(negotiate_unix_fd=True))), owned)
        except BaseException:
            _close_all(owned)
            raise
        self._queue.append(item)
        self._drained.clear()
        if not self._writing:
            self._flush()
        return self._serial

    def emit(self, message: Message) -> None:
        """Send a signal, or count it as lost if the bus does not take what is queued already."""
        if self.closed or len(self._queue) >= MAX_QUEUED:
            self.signals_lost += 1
            return
        self.send(message)

    async def drain(self) -> None:
        """Wait until all that is queued has been sent, or the connection is closed."""
        await self._drained.wait()

    def close(self) -> None:
        """Close the socket and every queued descriptor; pending calls raise `Disconnected`. May be called twice."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for item in self._queue:
            _close_all(item.descriptors)
        self._queue.clear()
        self._drained.set()
        for waiting in self._waiting.values():
            if not waiting.reply.done():
                waiting.reply.set_exception(Disconnected("the connection to the bus is closed"))
                waiting.reply.exception()  # a caller cancelled meanwhile does not look at it
        self._waiting.clear()

    # Reading. A message is read in two parts and never beyond its end, so the descriptors that come with these bytes are its own.

    async def _read_message(self) -> Incoming | None:
        descriptors: list[int] = []
        try:
            fixed = await self._read_exactly(16, descriptors)
            order = {ord("l"): "<", ord("B"): ">"}.get(fixed[0])
            if order is None or fixed[3] != 1:
                raise Disconnected("the bus sent something that is not a D-Bus message")
            body_length, serial, fields_length = struct.unpack(order + "III", fixed[4:])
            header_rest = fields_length + -fields_length % 8
            if header_rest + body_length > MAX_MESSAGE:
                raise Disconnected("the bus sent a message that is longer than the specification allows")
            if header_rest > MAX_HEADER:
                await self._skip(header_rest + body_length, descriptors)
                raise Unreadable
            header = fixed + await self._read_exactly(header_rest, descriptors)
            too_long = body_length > MAX_BODY
            body = b""
            if too_long:
                await self._skip(body_length, descriptors)
            else:
                body = await self._read_exactly(body_length, descriptors)
            message = Incoming(kind=fixed[1], flags=fixed[2], serial=serial, too_long=too_long, frame=header + body)
            read_fields(message, header, order, 16 + fields_length)
            message.descriptors, descriptors = descriptors, []
            return message
        except Unreadable:
            return None  # the specification: a message of an unknown kind is ignored; so is one whose header is a flood
        except OSError as error:
            raise Disconnected(f"the connection to the bus broke: {error.strerror or error}") from error
        finally:
            _close_all(descriptors)

    async def _read_exactly(self, length: int, descriptors: list[int]) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            parts += await self._read_some(min(length - len(parts), _CHUNK), descriptors)
        return bytes(parts)

    async def _skip(self, length: int, descriptors: list[int]) -> None:
        while length:
            length -= len(await self._read_some(min(length, _CHUNK), descriptors))
            await asyncio.sleep(0)

    async def _read_some(self, length: int, descriptors: list[int]) -> bytes:
        while True:
            if self.closed:
                raise Disconnected("the connection to the bus is closed")
            try:
                data, ancillary, _, _ = self._sock.recvmsg(length, socket.CMSG_SPACE(MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await self._readable()
                continue
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
                    descriptors.extend(received)
            if not data:
                raise Disconnected("the bus closed the connection")
            return data

    async def _readable(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._sock, _settle, future)
        try:
            await future
        finally:
            if not self.closed:
                self._loop.remove_reader(self._sock)

    # Writing.

    def _flush(self) -> None:
        try:
            while self._queue:
                item = self._queue[0]
                if item.descriptors:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", item.descriptors))]
                    sent = self._sock.sendmsg([item.data], rights, socket.MSG_NOSIGNAL)
                    _close_all(item.descriptors)
                else:
                    sent = self._sock.send(item.data, socket.MSG_NOSIGNAL)
                item.data = item.data[sent:]
                if not item.data:
                    self._queue.popleft()
        except BlockingIOError:
            if not self._writing:
                self._loop.add_writer(self._sock, self._flush)
                self._writing = True
            return
        except OSError:
            # The reader meets the end as well and reports it; what is queued cannot be sent any more.
            self._sock_failed()
            return
        if self._writing:
            self._loop.remove_writer(self._sock)
            self._writing = False
        self._drained.set()

    def _sock_failed(self) -> None:
        self._loop.remove_writer(self._sock)
        self._writing = False
        for item in self._queue:
            _close_all(item.descriptors)
        self._queue.clear()
        self._drained.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    # Getting in.

    async def _authenticate(self) -> None:
        uid = str(os.geteuid()).encode().hex()
        await self._loop.sock_sendall(self._sock, f"\0AUTH EXTERNAL {uid}\r\n".encode())
        await self._expect("OK")
        await self._loop.sock_sendall(self._sock, b"NEGOTIATE_UNIX_FD\r\n")
        await self._expect("AGREE_UNIX_FD")
        await self._loop.sock_sendall(self._sock, b"BEGIN\r\n")

    async def _expect(self, word: str) -> None:
        line = b""
        while not line.endswith(b"\r\n"):
            data = await self._loop.sock_recv(self._sock, 256)
            if not data or len(line) > 4096:
                raise ConnectionError("it closed the connection during authentication")
            line += data
        text = line.decode("ascii", "replace").strip()
        if text.split(" ")[0] != word:
            raise ConnectionError(f"it answers '{text}' where {word} is wanted")

    async def _hello(self) -> None:
        serial = self.send(Message(destination=DAEMON, path=DAEMON_PATH, interface=DAEMON, member="Hello"))
        while True:
            reply = await self._read_message()
            if reply is None:
                continue
            reply.close()
            if reply.reply_serial == serial and _answers(reply, DAEMON):
                self.unique_name = _arguments(reply)[0]
                return


def _answers(message: Incoming, destination: str) -> bool:
    """May this be the answer to a call of ours to that destination, whose serial it carries?

    Anybody may send us a call or a signal with such a serial, and not every bus holds it back. A return is delivered only from whom we
    called: that is the bus itself, a unique name, or whoever owns a well-known one. In their place the bus may send an error.
    """
    if not message.is_reply:
        return False
    if message.sender == DAEMON:
        return destination == DAEMON or message.is_error
    return destination == message.sender or (destination != DAEMON and not destination.startswith(":"))


def _arguments(reply: Incoming) -> list[Any]:
    body = reply.body() if reply.signature else []
    if reply.is_error:
        raise BusError(reply.error_name, str(body[0]) if body and isinstance(body[0], str) else "")
    return body


def _parse_address(address: str) -> list[str]:
    """The socket names in a D-Bus address list; transports other than Unix sockets cannot pass descriptors and are left out."""
    places = []
    for part in address.split(";"):
        transport, _, options = part.partition(":")
        if transport != "unix":
            continue
        values = dict(option.split("=", 1) for option in options.split(",") if "=" in option)
        if "path" in values:
            places.append(unquote(values["path"]))
        elif "abstract" in values:
            places.append("\0" + unquote(values["abstract"]))
    return places


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
