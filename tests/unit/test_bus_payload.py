"""Answers that take time or memory: who waits for whom."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
from servicefakes import ROOT, World, run

from xdpmond.bus import held
from xdpmond.bus.interface import METHODS, Call, Manager
from xdpmond.bus.payload import sealed_lines
from xdpmond.bus.turns import USERS_AT_ONCE
from xdpmond.errors import XdpmondError
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
        self.asked: Counter[int] = Counter()
        self.go_on = asyncio.Event()

    async def _answer(self, uid: int) -> list[Any]:
        self.asked[uid] += 1
        self.running[uid] += 1
        self.most[uid] = max(self.most[uid], self.running[uid])
        self.most[-1] = max(self.most[-1], self.running.total())
        await self.go_on.wait()
        self.running[uid] -= 1
        return ["a", "b"]

    entry_count = 0

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
        while service.running.total() < USERS_AT_ONCE + 3:
            await asyncio.sleep(0)
        service.go_on.set()
        await asyncio.gather(*asking)
        assert service.most[-1] == USERS_AT_ONCE + 3
        assert {uid: most for uid, most in service.most.items() if uid >= 0} == {0: 3, 1: 1, 2: 1, 3: 1, 4: 1}

    run(work)


def start(manager: Manager, caller: Caller) -> asyncio.Future[Any]:
    return asyncio.ensure_future(METHODS["Top"].run(manager, Call(caller, [{}], {"limit": 1})))  # type: ignore[arg-type]


def test_who_asks_the_same_before_it_is_begun_shares_it() -> None:
    async def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        service = Asked()
        manager = Manager(service)  # type: ignore[arg-type]

        first = start(manager, user(1))
        while not service.running[1]:
            await asyncio.sleep(0)
        later = [start(manager, user(1)) for _ in range(20)]
        other, roots = start(manager, user(2)), [start(manager, ROOT) for _ in range(2)]
        await asyncio.sleep(0)
        later.pop().cancel()
        service.go_on.set()
        shared = await asyncio.gather(*later)
        alone = await asyncio.gather(first, other, *roots)
        assert service.asked[1] == 5
        assert len({os.fstat(descriptor).st_ino for descriptor in shared}) == 1
        assert len({os.fstat(descriptor).st_ino for descriptor in [*alone, shared[0]]}) == 5
        for descriptor in [*shared, *alone]:
            assert os.read(descriptor, 100) == b"a\nb\n"  # nobody has moved another one's position
            with pytest.raises(OSError):
                os.write(descriptor, b"x")
            os.close(descriptor)
        del manager
        assert len(os.listdir("/proc/self/fd")) == before

    run(work)


def test_a_question_that_is_given_up_is_asked_anew_by_the_next() -> None:
    async def work() -> None:
        service = Asked()
        manager = Manager(service)  # type: ignore[arg-type]

        first = start(manager, user(1))
        while not service.running[1]:
            await asyncio.sleep(0)
        given_up = start(manager, user(1))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait({given_up})
        last = start(manager, user(1))
        service.go_on.set()
        for descriptor in (await first, await last):
            os.close(descriptor)

    run(work)


class Lines:
    """A service whose every answer is one line of so many bytes."""

    def __init__(self, size: int, entries: int = 0):
        self._line = "x" * (size - 1)
        self.entry_count = entries

    async def entries(self) -> list[str]:
        return [self._line]


async def keep(manager: Manager, caller: Caller, number: int) -> list[int]:
    """So many lists of this caller's, or as many as he gets."""
    kept: list[int] = []
    with contextlib.suppress(XdpmondError):
        for _ in range(number):
            descriptor = await METHODS["List"].run(manager, Call(caller, [{}]))
            assert isinstance(descriptor, int)
            kept.append(descriptor)
    return kept


@pytest.mark.parametrize(("size", "entries", "most", "second"), [
    (1, 0, held.NUMBER, held.NUMBER), (10 << 20, 0, 4, 3), (40 << 20, 0, 1, 1), (10 << 20, 40_000, 5, 4),
])  # fmt: skip
def test_what_users_keep_is_bounded(size: int, entries: int, most: int, second: int) -> None:
    """`second` is what is left by one who keeps the most for the next; a third one gets nothing, and root what he wants."""

    async def work() -> None:
        manager = Manager(Lines(size, entries))  # type: ignore[arg-type]
        kept = {uid: await keep(manager, user(uid), most + 1) for uid in (1, 2, 3)}
        assert [len(of) for of in kept.values()] == [most, second, 0]
        kept[0] = await keep(manager, ROOT, 2)
        assert len(kept[0]) == 2
        for descriptor in kept[1]:
            os.close(descriptor)
        kept[1] = await keep(manager, user(1), most + 1)
        assert len(kept[1]) == most
        for descriptor in [*kept[0], *kept[1], *kept[2]]:
            os.close(descriptor)

    run(work)


def duplicated(descriptor: int) -> Callable[[], object]:
    return partial(os.close, os.dup(descriptor))


def opened(flags: int) -> Callable[[int], Callable[[], object]]:
    return lambda descriptor: partial(os.close, os.open(f"/proc/self/fd/{descriptor}", flags))


def mapped(descriptor: int) -> Callable[[], object]:
    return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ).close


def on_its_way(descriptor: int) -> Callable[[], object]:
    ends = socket.socketpair()
    socket.send_fds(ends[0], [b"x"], [descriptor])
    return lambda: [end.close() for end in ends]


@pytest.mark.parametrize("way", [duplicated, opened(os.O_RDWR), opened(os.O_PATH), mapped, on_its_way])
def test_it_is_kept_until_the_last_way_to_it_is_gone(way: Callable[[int], Callable[[], object]]) -> None:
    async def work() -> None:
        manager = Manager(Lines(33 << 20))  # type: ignore[arg-type]
        (descriptor,) = await keep(manager, user(1), 1)
        let_go = way(descriptor)
        os.close(descriptor)
        assert await keep(manager, user(1), 1) == []
        let_go()
        (descriptor,) = await keep(manager, user(1), 1)
        os.close(descriptor)

    run(work)
