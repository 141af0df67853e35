"""Answers that take time or memory: who waits for whom."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from servicefakes import ROOT, World, run

from xdpmond.bus.interface import METHODS, Call, Manager
from xdpmond.bus.payload import sealed_lines
from xdpmond.bus.turns import USERS_AT_ONCE
from xdpmond.model import Caller


def user(uid: int) -> Caller:
    return Caller(uid, f":1.{uid}")


def test_changes_do_not_wait_for_lists() -> None:
    async def work() -> None:
        world, go_on = World(), threading.Event()

        def slow() -> Iterator[str]:
            go_on.wait()
            yield "{}"

        lists = [asyncio.ensure_future(sealed_lines("test", slow())) for _ in range(100)]
        await asyncio.sleep(0)  # all of them stand in line
        try:
            async with asyncio.timeout(30):
                await world.deny("203.0.113.0/24")
        finally:
            go_on.set()
            for descriptor in await asyncio.gather(*lists):
                os.close(descriptor)
        assert world.kept() == {"203.0.113.0/24": "deny"}

    run(work)


def test_a_list_that_nobody_waits_for_is_not_begun() -> None:
    async def work() -> None:
        before, go_on, begun = len(os.listdir("/proc/self/fd")), threading.Event(), []

        def slow(number: int) -> Iterator[str]:
            begun.append(number)
            go_on.wait()
            yield "{}"

        lists = [asyncio.ensure_future(sealed_lines("test", slow(number))) for number in range(10)]
        await asyncio.sleep(0)
        for task in lists:
            task.cancel()
        await asyncio.wait(lists)
        go_on.set()
        # Both threads meet here, so they have ended what they had begun.
        meeting = threading.Barrier(2)
        for descriptor in await asyncio.gather(*(sealed_lines("test", (str(meeting.wait()) for _ in "1")) for _ in range(2))):
            os.close(descriptor)
        assert set(begun) <= {0, 1} and len(os.listdir("/proc/self/fd")) == before

    run(work)


class Asked:
    """A service that answers when it is told to, and knows how many of its questions are under way, by user."""

    def __init__(self) -> None:
        self.running: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.go_on = asyncio.Event()

    async def _answer(self, uid: int) -> list[Any]:
        self.running[uid] += 1
        self.most[uid] = max(self.most[uid], self.running[uid])
        self.most[-1] = max(self.most[-1], self.running.total())
        await self.go_on.wait()
        self.running[uid] -= 1
        return []

    async def top(self, *, limit: int) -> Iterable[Any]:
        return await self._answer(limit)

    async def explain(self, address: str) -> Any:
        return await self._answer(int(address))


@pytest.mark.parametrize("method", ["Top", "Explain"])
def test_users_take_turns_and_root_does_not_wait_for_them(method: str) -> None:
    async def ask(manager: Manager, caller: Caller) -> None:
        options, arguments = ({"limit": caller.uid}, [{}]) if method == "Top" else ({}, [str(caller.uid)])
        answer = await METHODS[method].run(manager, Call(caller, arguments, options))
        if isinstance(answer, int):
            os.close(answer)

    async def work() -> None:
        service = Asked()
        manager = Manager(service)  # type: ignore[arg-type]
        asking = [asyncio.ensure_future(ask(manager, user(uid))) for uid in (1, 2, 3, 4) for _ in range(20)]
        asking += [asyncio.ensure_future(ask(manager, ROOT)) for _ in range(3)]
        while service.running[0] < 3:
            await asyncio.sleep(0)
        assert service.running.total() == USERS_AT_ONCE + 3
        service.go_on.set()
        await asyncio.gather(*asking)
        assert service.most[-1] <= USERS_AT_ONCE + 3
        assert {uid: most for uid, most in service.most.items() if uid >= 0} == {0: 3, 1: 1, 2: 1, 3: 1, 4: 1}

    run(work)
