"""What is asked of polkit, and what each of its answers means. The bus is a hand-written one that answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from dbus_next import Message

from xdpmond.bus.connection import BusError
from xdpmond.bus.polkit import MANAGE_POLICY, READ, Authority
from xdpmond.errors import NotAuthorizedError
from xdpmond.model import Caller

ROOT = Caller(uid=0, name=":1.1")
USER = Caller(uid=1000, name=":1.2")
YES, NO, CHALLENGE = (True, False, {}), (False, False, {}), (False, True, {})


class FakeBus:
    def __init__(self, answer: tuple[bool, bool, dict[str, str]] | BaseException | None):
        self.answer = answer
        self.asked: list[list[Any]] = []
        self.sent: list[Message] = []

    async def call(self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = (), *,
                   timeout: float | None = 25.0) -> list[Any]:  # fmt: skip
        self.asked.append([*body, timeout])
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return [self.answer]

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> int:
        self.sent.append(message)
        return 1


def refusal(bus: FakeBus, caller: Caller, action: str, *, interactive: bool = False) -> NotAuthorizedError | None:
    try:
        asyncio.run(Authority(bus).require(caller, action, interactive=interactive))
    except NotAuthorizedError as error:
        return error
    return None


def test_root_is_never_asked_about() -> None:
    bus = FakeBus(NO)
    assert refusal(bus, ROOT, MANAGE_POLICY) is None
    assert bus.asked == []


def test_the_subject_is_the_bus_name_and_a_person_is_asked_only_on_request() -> None:
    bus = FakeBus(YES)
    assert refusal(bus, USER, MANAGE_POLICY) is None
    assert refusal(bus, USER, MANAGE_POLICY, interactive=True) is None
    quiet, interactive = bus.asked
    assert quiet[0][0] == "system-bus-name" and quiet[0][1]["name"].value == ":1.2"
    assert quiet[1] == MANAGE_POLICY
    assert (quiet[3], quiet[4]) == (0, "") and quiet[5] is not None
    assert interactive[3] == 1 and interactive[4] and interactive[5] is None


@pytest.mark.parametrize(("answer", "word"), [(NO, "grant"), (CHALLENGE, "password")])
def test_a_refusal_says_what_to_do(answer: tuple[bool, bool, dict[str, str]], word: str) -> None:
    error = refusal(FakeBus(answer), USER, MANAGE_POLICY)
    assert error is not None and word in error.hint and "sudo" in error.hint


@pytest.mark.parametrize(
    "name",
    [
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.Spawn.ChildExited",
        "org.freedesktop.systemd1.UnitMasked",
    ],
)
def test_without_polkit_everybody_reads_and_nobody_else_changes(name: str) -> None:
    assert refusal(FakeBus(BusError(name, "")), USER, READ) is None
    error = refusal(FakeBus(BusError(name, "")), USER, MANAGE_POLICY)
    assert error is not None and "polkit is not running" in error.message


@pytest.mark.parametrize("answer", [BusError("org.freedesktop.PolicyKit1.Error.Failed", "Action is not registered"), TimeoutError()])
def test_a_polkit_that_fails_allows_nothing(answer: BaseException) -> None:
    for action in (READ, MANAGE_POLICY):
        assert refusal(FakeBus(answer), USER, action) is not None


@pytest.mark.parametrize("interactive", [True, False])
def test_a_question_that_nobody_waits_for_is_taken_back(interactive: bool) -> None:
    bus = FakeBus(None)

    async def run() -> None:
        task = asyncio.create_task(Authority(bus).require(USER, MANAGE_POLICY, interactive=interactive))
        while not bus.asked:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    if interactive:
        (message,) = bus.sent
        assert message.member == "CancelCheckAuthorization" and message.body == [bus.asked[0][4]]
    else:
        assert bus.sent == []
