"""Which message is the answer to a call. The bus is written by hand, since dbus-daemon holds back what others deliver: it sends forgeries
that carry the call's serial, and then the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from busfakes import CALL, ERROR, RETURN, SIGNAL, hand_bus, message
from dbus_next import Message, MessageType

from xdpmond.bus.connection import DAEMON, DAEMON_PATH, BusError, Connection
from xdpmond.bus.wire import Incoming
from xdpmond.cli import client
from xdpmond.errors import NotRunningError

Answers = Callable[[Message], list[bytes]]
Forgery = tuple[MessageType, str]

POLKIT, STRANGER, OWNER = "org.freedesktop.PolicyKit1", ":1.66", ":1.5"
FORGERIES = [(CALL, STRANGER), (SIGNAL, STRANGER), (RETURN, STRANGER), (ERROR, STRANGER), (CALL, DAEMON), (SIGNAL, DAEMON)]


def reply(kind: MessageType, sender: str, call: Message, text: str) -> bytes:
    error = f"org.freedesktop.DBus.Error.{text}" if kind is ERROR else ""
    return message(kind, sender, "s", [text], reply_serial=call.serial, error=error)


def forged_before(forgeries: list[Forgery], by: str = DAEMON, text: str = "true") -> Answers:
    """Each call is answered by `by` after these forgeries, Hello by the bus after all of them."""

    def answers(call: Message) -> list[bytes]:
        first, sender = (FORGERIES, DAEMON) if call.member == "Hello" else (forgeries, by)
        return [*(reply(kind, forger, call, "forged") for kind, forger in first), reply(RETURN, sender, call, text)]

    return answers


def refused_by_the_bus(error: str) -> Answers:
    def answers(call: Message) -> list[bytes]:
        return [reply(RETURN, DAEMON, call, ":1.1") if call.member == "Hello" else reply(ERROR, DAEMON, call, error)]

    return answers


def ask(place: Path, answers: Answers, destination: str) -> tuple[list[Any], list[Incoming], str]:
    """What a call is answered, what was received besides, and the unique name that Hello gave."""

    async def run(address: str) -> tuple[list[Any], list[Incoming], str]:
        connection = await Connection.open(address)
        others: list[Incoming] = []

        async def receive() -> None:
            while True:
                others.append(await connection.receive())

        receiving = asyncio.create_task(receive())
        try:
            return await connection.call(destination, DAEMON_PATH, "a.b", "C"), others, connection.unique_name
        finally:
            receiving.cancel()
            connection.close()

    with hand_bus(place / "bus", answers) as address:
        return asyncio.run(run(address))


def test_the_bus_alone_answers_for_the_bus(tmp_path: Path) -> None:
    answer, others, name = ask(tmp_path, forged_before(FORGERIES), DAEMON)
    assert (answer, name) == (["true"], "true")
    assert [(MessageType(other.kind), other.sender) for other in others] == FORGERIES


@pytest.mark.parametrize("destination", [OWNER, POLKIT])
def test_what_is_no_answer_does_not_answer_for_a_service(tmp_path: Path, destination: str) -> None:
    forgeries = [(CALL, STRANGER), (SIGNAL, STRANGER), (CALL, OWNER), (RETURN, DAEMON)]
    # Behind a well-known name it is the bus that knows whom we called.
    forgeries += [(RETURN, STRANGER), (ERROR, STRANGER)] if destination == OWNER else []
    answer, others, _ = ask(tmp_path, forged_before(forgeries, by=OWNER), destination)
    assert answer == ["true"]
    assert [(MessageType(other.kind), other.sender) for other in others] == forgeries


@pytest.mark.parametrize("destination", [DAEMON, POLKIT, OWNER])
def test_the_bus_may_say_why_there_is_no_answer(tmp_path: Path, destination: str) -> None:
    with pytest.raises(BusError, match="NameHasNoOwner"):
        ask(tmp_path, refused_by_the_bus("NameHasNoOwner"), destination)


def test_xdpmonctl_takes_no_forged_answer(tmp_path: Path) -> None:
    forgeries = [(CALL, STRANGER), (SIGNAL, STRANGER), (RETURN, DAEMON)]
    with hand_bus(tmp_path / "bus", forged_before(forgeries, by=OWNER, text='{"mode":"monitor"}')) as address:
        assert client.Daemon(address).describe() == {"mode": "monitor"}


def test_xdpmonctl_hears_from_the_bus_that_nobody_is_there(tmp_path: Path) -> None:
    with hand_bus(tmp_path / "bus", refused_by_the_bus("ServiceUnknown")) as address, pytest.raises(NotRunningError):
        client.Daemon(address).describe()
