"""Asking netlink for a list (rtnetlink(7), sock_diag(7)), and reading the messages in which it comes.

A library that knows all of netlink takes a third of the daemon's start to import, 13 MB, and 60 µs for each message. What is needed here
are four kinds of list.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from ..errors import KernelError

T = TypeVar("T")

ROUTE, SOCK_DIAG = 0, 4  # NETLINK_ROUTE, NETLINK_SOCK_DIAG

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_REQUEST, _DUMP, _DUMP_DISTURBED = 1, 0x300, 0x10  # NLM_F_REQUEST, NLM_F_DUMP, NLM_F_DUMP_INTR
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_TYPE_BITS = 0x3FFF  # NLA_TYPE_MASK
_DATAGRAM = 1 << 17  # bytes: the kernel sends at most half of it at once
_PATIENCE = 10.0  # seconds
_TIMES = 10


class DisturbedError(Exception):
    """Something changed while the kernel listed it: the list may have holes."""


def dump(what: str, ask: Callable[[], Iterable[T]]) -> list[T]:
    """All that the kernel lists. If something changed while it did, it is asked again. `KernelError` says `what` could not be listed."""
    for _ in range(_TIMES):
        try:
            return list(ask())
        except DisturbedError:
            continue
        except OSError as error:
            raise KernelError(f"the kernel does not list its {what}: {error}") from None
    raise KernelError(f"the kernel's {what} change faster than they can be listed")


def ask(protocol: int, kind: int, body: bytes) -> Iterator[bytes]:
    """The content of each message in the answer to a request of this type. Raises OSError or DisturbedError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as netlink:
        netlink.settimeout(_PATIENCE)
        netlink.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, 1, 0) + body)
        yield from listed(iter(partial(netlink.recv, _DATAGRAM), b""))


def listed(datagrams: Iterable[bytes]) -> Iterator[bytes]:
    """The contents of the messages that they hold, up to that which ends the list. Raises as `ask` does."""
    for datagram in datagrams:
        at = 0
        while at < len(datagram):
            length, kind, flags, _, _ = _HEADER.unpack_from(datagram, at)
            content = datagram[at + _HEADER.size : at + length]
            at += max((length + 3) & ~3, _HEADER.size)
            if flags & _DUMP_DISTURBED:
                raise DisturbedError
            if kind in (_ERROR, _DONE):
                number = -int.from_bytes(content[:4], sys.byteorder, signed=True)
                if number:
                    raise OSError(number, os.strerror(number))
                return
            yield content
    raise OSError(errno.EPIPE, "the list has no end")


def attributes(content: bytes, at: int) -> dict[int, bytes]:
    """The attributes that stand in a message from `at` on, by their type."""
    found = {}
    while at + _ATTRIBUTE.size <= len(content):
        length, kind = _ATTRIBUTE.unpack_from(content, at)
        found[kind & _TYPE_BITS] = content[at + _ATTRIBUTE.size : at + length]
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    return found
