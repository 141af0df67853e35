"""Calls as they come from a bus that is written by hand: of strangers about whom it says nothing, and of users whom it knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

from busfakes import CALL, ERROR, RETURN, hand_bus, message
from dbus_next import Message, MessageType, Variant
from servicefakes import World

from xdpmond.bus.connection import DAEMON
from xdpmond.bus.interface import INTERFACE, PATH
from xdpmond.bus.server import BusServer
from xdpmond.bus.session import CALLS, UNKNOWN_CALLS


class Bus:
    """Says who `known` callers are, and of others nothing. Once the daemon has its name, these calls come to it, each with the serial of
    its place among them. `answered` are the kinds of the answers, by that."""

    def __init__(self, calls: list[tuple[str, str]], known: dict[str, int]):
        self._calls = [message(CALL, sender, serial=serial, path=PATH, interface=INTERFACE, member=member)
                       for serial, (sender, member) in enumerate(calls, 1)]  # fmt: skip
        self._known = known
        self._wanted = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.answered: dict[int, MessageType] = {}

    def answers(self, got: Message) -> list[bytes]:
        match got.member:
            case "Hello":
                return [message(RETURN, DAEMON, "s", [":1.0"], reply_serial=got.serial)]
            case "RequestName":
                return [message(RETURN, DAEMON, "u", [1], reply_serial=got.serial), *self._calls]
            case "GetConnectionCredentials" if got.body[0] in self._known:
                credentials = {"UnixUserID": Variant("u", self._known[got.body[0]])}
                return [message(RETURN, DAEMON, "a{sv}", [credentials], reply_serial=got.serial)]
        if got.message_type in (RETURN, ERROR):
            self._loop.call_soon_threadsafe(self._take, got)
        return []

    def _take(self, got: Message) -> None:
        self.answered[got.reply_serial] = got.message_type
        self._wanted.set()

    async def answer(self, serial: int) -> MessageType:
        while serial not in self.answered:
            self._wanted.clear()
            await self._wanted.wait()
        return self.answered[serial]


def test_a_call_with_a_header_of_megabytes_is_passed_over(tmp_path: Path) -> None:
    async def run() -> None:
        bus = Bus([(":1.7", "Describe"), (":1.7", "x" * (4 << 20)), (":1.7", "Describe")], {":1.7": 0})
        with hand_bus(tmp_path / "bus", bus.answers) as address:
            serving = asyncio.create_task(BusServer(World().service, address, lambda priority, text: None).run())
            async with asyncio.timeout(60):
                assert await bus.answer(1) is RETURN and await bus.answer(3) is RETURN
            serving.cancel()
            await asyncio.wait({serving})
        assert 2 not in bus.answered

    asyncio.run(run())


def test_strangers_do_not_take_the_place_of_root(tmp_path: Path) -> None:
    strangers = [f":1.{number}" for number in range(1000, 1000 + CALLS // UNKNOWN_CALLS + 1)]
    calls = [(name, "Describe") for name in strangers for _ in range(UNKNOWN_CALLS + 1)]
    calls.append((":1.7", "Describe"))

    async def run() -> None:
        bus = Bus(calls, {":1.7": 0})
        with hand_bus(tmp_path / "bus", bus.answers) as address:
            serving = asyncio.create_task(BusServer(World().service, address, lambda priority, text: None).run())
            async with asyncio.timeout(60):
                assert await bus.answer(len(calls)) is RETURN
            serving.cancel()
            await asyncio.wait({serving})
        one_too_many = list(range(UNKNOWN_CALLS + 1, len(calls), UNKNOWN_CALLS + 1))
        assert [serial for serial, kind in bus.answered.items() if kind is ERROR] == one_too_many

    asyncio.run(run())
