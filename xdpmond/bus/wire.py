"""A message as it comes from the socket, taken in two steps.

The header is parsed first, so the receiver knows who asks for what with which signature. The body is parsed only if somebody wants it,
by dbus_next, and never if it is longer than MAX_BODY.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from dbus_next import MessageFlag, MessageType
from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.signature import SignatureTree

MAX_BODY = 32 * 1024
"""Bytes. Unmarshalling the worst body of this length holds the loop for about 30 ms."""
MAX_HEADER = 8 * 1024
"""Bytes of header fields. A name has 255, and our path few; a longer header is read away, whoever waits for an answer."""
MAX_SIGNATURES = 512
"""dbus_next keeps every signature that it ever met; past this many the callers' are forgotten again."""


@dataclass(slots=True)
class Incoming:
    """A message as received: header parsed, body not yet."""

    kind: int
    flags: int
    serial: int
    reply_serial: int = 0
    sender: str = ""
    path: str = ""
    interface: str = ""
    member: str = ""
    signature: str = ""
    error_name: str = ""
    too_long: bool = False
    descriptors: list[int] = field(default_factory=list)
    frame: bytes = b""

    @property
    def is_call(self) -> bool:
        return self.kind == MessageType.METHOD_CALL.value

    @property
    def is_error(self) -> bool:
        return self.kind == MessageType.ERROR.value

    @property
    def is_reply(self) -> bool:
        return self.is_error or self.kind == MessageType.METHOD_RETURN.value

    @property
    def is_signal(self) -> bool:
        return self.kind == MessageType.SIGNAL.value

    @property
    def wants_reply(self) -> bool:
        return self.is_call and not self.flags & MessageFlag.NO_REPLY_EXPECTED

    @property
    def may_interact(self) -> bool:
        """Did the caller allow that a person is asked for a password?"""
        return bool(self.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)

    def body(self) -> list[Any]:
        """Unmarshal the arguments; ValueError if dbus_next cannot read them."""
        if self.too_long:
            raise ValueError(f"the message is longer than {MAX_BODY} bytes")
        try:
            message = Unmarshaller(io.BytesIO(self.frame)).unmarshall()
        except Exception as error:  # dbus_next raises whatever its parser stumbles over
            raise ValueError(f"the message cannot be read: {error}") from error
        finally:
            if len(SignatureTree._cache) > MAX_SIGNATURES:
                SignatureTree._cache.clear()
        if message is None:
            raise ValueError("the message is shorter than its header says")
        return list(message.body)

    def take_descriptor(self, index: int) -> int:
        """Hand over one descriptor: the caller closes it. ValueError if the message carried none at this index."""
        if not 0 <= index < len(self.descriptors) or self.descriptors[index] < 0:
            raise ValueError("the message carries no descriptor for this argument")
        taken = self.descriptors[index]
        self.descriptors[index] = -1
        return taken

    def close(self) -> None:
        for descriptor in self.descriptors:
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptors.clear()


class Unreadable(Exception):
    """A whole message that means nothing to us; the stream goes on behind it."""


_TEXT_FIELDS = {1: "path", 2: "interface", 3: "member", 4: "error_name", 7: "sender", 8: "signature"}
_REPLY_SERIAL = 5


def read_fields(message: Incoming, header: bytes, order: str, end: int) -> None:
    """Read the header fields, an array of (code, variant), into the message. Fields that we do not know are skipped."""
    if not 1 <= message.kind <= 4:
        raise Unreadable
    at = 16
    try:
        while at < end:
            at += -at % 8
            code, signature_length = header[at], header[at + 1]
            signature = header[at + 2 : at + 2 + signature_length]
            at += 3 + signature_length
            if signature == b"u":
                at += -at % 4
                (number,) = struct.unpack_from(order + "I", header, at)
                at += 4
                if code == _REPLY_SERIAL:
                    message.reply_serial = number
                continue
            if signature == b"g":
                length, at = header[at], at + 1
            elif signature in (b"s", b"o"):
                at += -at % 4
                (length,) = struct.unpack_from(order + "I", header, at)
                at += 4
            else:
                raise Unreadable
            text = header[at : at + length].decode()
            at += length + 1
            if code in _TEXT_FIELDS:
                setattr(message, _TEXT_FIELDS[code], text)
    except (IndexError, struct.error, UnicodeDecodeError):
        raise Unreadable from None
