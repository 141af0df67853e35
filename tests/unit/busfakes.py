"""A bus written by hand, for what a real one sends seldom or never."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dbus_next import Message, MessageType, Variant
from dbus_next._private.constants import HeaderField
from dbus_next._private.marshaller import Marshaller
from dbus_next._private.unmarshaller import Unmarshaller

CALL, RETURN, ERROR, SIGNAL = MessageType.METHOD_CALL, MessageType.METHOD_RETURN, MessageType.ERROR, MessageType.SIGNAL


def message(kind: MessageType, sender: str, signature: str = "", body: list[Any] | None = None, *, serial: int = 1, reply_serial: int = 0,
            error: str = "", path: str = "/x", interface: str = "x.y", member: str = "z") -> bytes:  # fmt: skip
    """A message that carries all that is said. dbus_next writes no sender, and of an answer no more than it needs."""
    fields = {HeaderField.PATH: Variant("o", path), HeaderField.INTERFACE: Variant("s", interface),
              HeaderField.MEMBER: Variant("s", member), HeaderField.SENDER: Variant("s", sender)}  # fmt: skip
    if reply_serial:
        fields[HeaderField.REPLY_SERIAL] = Variant("u", reply_serial)
    if signature:
        fields[HeaderField.SIGNATURE] = Variant("g", signature)
    if error:
        fields[HeaderField.ERROR_NAME] = Variant("s", error)
    data = Marshaller(signature, body or []).marshall()
    header = Marshaller("yyyyuua(yv)", [ord("l"), kind.value, 0, 1, len(data), serial, [[code.value, of] for code, of in fields.items()]])
    header.marshall()
    header.align(8)
    return bytes(header.buffer + data)


class HandBus(threading.Thread):
    """Lets one client in, and sends for each message of it what it is told to."""

    def __init__(self, place: Path, answers: Callable[[Message], list[bytes]]):
        super().__init__()
        self.address = f"unix:path={place}"
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(place))
        self._listener.listen(1)
        self._sockets = [self._listener]

    def run(self) -> None:
        sock, _ = self._listener.accept()
        self._sockets.append(sock)
        stream = sock.makefile("rb", buffering=0)
        for answer in (b"OK 00\r\n", b"AGREE_UNIX_FD\r\n", b""):
            stream.readline()
            sock.sendall(answer)
        with contextlib.suppress(EOFError, ConnectionError):
            while got := Unmarshaller(stream).unmarshall():
                for data in self._answers(got):
                    sock.sendall(data)

    def stop(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.join(60)
        assert not self.is_alive()
        for sock in self._sockets:
            sock.close()


@contextlib.contextmanager
def hand_bus(place: Path, answers: Callable[[Message], list[bytes]]) -> Iterator[str]:
    """Run one, and say its address."""
    bus = HandBus(place, answers)
    bus.start()
    try:
        yield bus.address
    finally:
        bus.stop()
