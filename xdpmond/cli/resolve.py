"""Names of addresses by reverse DNS, for those who ask for it.

A lookup may take many seconds, and there is no way to take one back. So lookups are made by a few threads which nobody waits for when the
program ends; names are shown when they are there. Whoever owns an address decides what its name is: it stands beside the address, never
in its place, and what a terminal would obey in it is made visible.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable

from .render import safe

THREADS = 8
MOST_WAITING = 512
"""Addresses that are waited for at a time; what is beyond is asked for when it is seen again."""
MOST_KNOWN = 10_000
PATIENCE_SECONDS = 3.0
"""How long a table that is printed once waits for names."""
LONGEST = 40
"""Characters of a name that are shown: a name may have 253, and its end tells more than its beginning."""

Lookup = Callable[[str], str]


def look_up(address: str) -> str:
    """The name by DNS or /etc/hosts; nothing if it has none. It takes as long as the resolver likes."""
    try:
        return socket.getnameinfo((address, 0), socket.NI_NAMEREQD)[0]
    except (OSError, UnicodeError):
        return ""


class Resolver:
    """Knows names, and finds out others. For one asking thread."""

    def __init__(self, lookup: Lookup = look_up, arrived: Callable[[], None] = lambda: None) -> None:
        self._lookup = lookup
        self._arrived = arrived
        self._waiting: queue.Queue[str] = queue.Queue(MOST_WAITING)
        self._known: dict[str, str | None] = {}
        """None: asked for."""
        self._changed = threading.Condition()
        self._threads = 0

    def name(self, address: str) -> str:
        """What is known now."""
        found = self._known.get(address)
        return shortened(found) if found else ""

    def ask(self, addresses: Iterable[str]) -> None:
        """Find out the names of these, unless they are known or asked for. Returns at once."""
        for address in addresses:
            if address in self._known or "/" in address:
                continue
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            try:
                self._waiting.put_nowait(address)
            except queue.Full:
                return
            self._known[address] = None
            if self._threads < THREADS:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True).start()

    def wait(self, addresses: Iterable[str], seconds: float = PATIENCE_SECONDS) -> None:
        """Until all of these are known, but no longer than that."""
        wanted = [address for address in addresses if "/" not in address]
        end = time.monotonic() + seconds
        with self._changed:
            while any(self._known.get(address) is None for address in wanted):
                left = end - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return

    def _work(self) -> None:
        while True:
            address = self._waiting.get()
            name = self._lookup(address)
            with self._changed:
                self._known[address] = name
                self._changed.notify_all()
            self._arrived()


def shortened(name: str) -> str:
    name = safe(name).replace(" ", "\\x20")  # a name of two words would look like two columns
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]
