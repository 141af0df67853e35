"""Sockets in other network namespaces, opened by this process: a socket stays in the namespace where it was made.

So a test sends and receives in any namespace without a helper process in it.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def within(namespace: str, call: Callable[[], T]) -> T:
    """Run `call` in a thread of its own that has moved into the namespace (a path such as /proc/PID/ns/net), and return its value."""
    result: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(descriptor, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {namespace}")
            finally:
                os.close(descriptor)
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


def open_socket(namespace: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    return within(namespace, lambda: socket.socket(family, kind, protocol))
