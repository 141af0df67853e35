"""Asking netlink for a list, so that what can go wrong on the way ends here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from ..errors import KernelError

T = TypeVar("T")

_TIMES = 10


def dump(what: str, ask: Callable[[], Iterable[T]]) -> list[T]:
    """All that the kernel lists. If something changed while it did, the list may have holes, and is asked for again. `KernelError` says
    `what` could not be listed."""
    for _ in range(_TIMES):
        try:
            return list(ask())
        except NetlinkDumpInterrupted:
            continue
        except (NetlinkError, OSError) as error:
            raise KernelError(f"the kernel does not list its {what}: {error}") from None
    raise KernelError(f"the kernel's {what} change faster than they can be listed")
