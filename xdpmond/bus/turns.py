"""Who is next, where an answer takes time.

A question over a million entries takes a second of a processor. Whoever asks sixty of them at once shall wait for himself: users take turns
with each question, a few of them at a time, and root does not wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

from ..model import Caller

USERS_AT_ONCE = 2


class Turns:
    def __init__(self) -> None:
        self._users: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        """Of those who ask now."""
        self._others = asyncio.Semaphore(USERS_AT_ONCE)

    @contextlib.asynccontextmanager
    async def of(self, caller: Caller) -> AsyncIterator[None]:
        if caller.uid == 0:
            yield
            return
        own = self._users.setdefault(caller.uid, asyncio.Lock())
        async with own, self._others:
            yield
