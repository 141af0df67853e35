"""Lists for callers, as sealed files: root gets one of his own; users take turns, and a user who asks the same several times gets one.

It is shared among those calls that come before it is begun, since a later one may ask about what happened in between; and with nobody
else, so that it is known who keeps it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from ..model import Caller
from .held import Held
from .payload import sealed_lines
from .turns import Turns

Ask = Callable[[], Awaitable[Iterable[Mapping[str, Any] | str]]]
_Key = tuple[int, str, tuple[tuple[str, Any], ...]]


class Lists:
    def __init__(self, turns: Turns, entries: Callable[[], int]):
        self._turns = turns
        self._held = Held(entries)
        self._next: dict[_Key, _Shared] = {}
        """Not begun yet."""

    async def get(self, caller: Caller, name: str, options: Mapping[str, Any], ask: Ask) -> int:
        """A descriptor at the beginning of what is asked, which the caller closes."""
        if caller.uid == 0:
            return await sealed_lines(name, await ask())
        key = caller.uid, name, tuple(sorted(options.items()))
        shared = self._next.get(key)
        if shared is None:
            shared = self._next[key] = _Shared(self._make(key, caller, name, ask))
        try:
            return await shared.descriptor()
        finally:
            if not shared.waiting and self._next.get(key) is shared:
                del self._next[key]

    async def _make(self, key: _Key, caller: Caller, name: str, ask: Ask) -> int:
        async with self._turns.of(caller):
            del self._next[key]
            self._held.require_room(caller.uid)
            descriptor = await sealed_lines(name, await ask())
        try:
            self._held.add(caller.uid, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


class _Shared:
    """A list in the making, for several calls. It ends with the last of them."""

    def __init__(self, work: Coroutine[Any, Any, int]):
        self._made = asyncio.ensure_future(work)
        self.waiting = 0

    async def descriptor(self) -> int:
        """One with a position of its own."""
        self.waiting += 1
        try:
            return os.open(f"/proc/self/fd/{await asyncio.shield(self._made)}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            self.waiting -= 1
            if not self.waiting:
                self._made.cancel()
                self._made.add_done_callback(_close_made)


def _close_made(made: asyncio.Future[int]) -> None:
    if not made.cancelled() and not made.exception():
        os.close(made.result())
