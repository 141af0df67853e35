"""A network namespace that lives as long as a thread: no name, and nothing to remove."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def unshare_network() -> None:
    """Put the calling thread, and the processes that it starts, in a new network namespace."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare the network namespace")
    ip("link", "set", "lo", "up")


def ip(*arguments: str) -> str:
    """Run iproute2's `ip` in the namespace of the calling thread."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


class Namespace:
    """Calls functions within a new network namespace, one at a time; `close` ends it with all interfaces in it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=unshare_network)

    def call(self, function: Callable[..., T], *arguments: object, **named: object) -> T:
        return self._thread.submit(function, *arguments, **named).result()

    def close(self) -> None:
        self._thread.shutdown()
