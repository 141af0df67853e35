"""The bus server as other programs meet it: busctl, gdbus, and dbus_next as a client with descriptors.

The service behind it is written by hand; bus, policy file, sockets and users are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dbus_next import Message, MessageFlag, MessageType, Variant
from dbus_next.aio import MessageBus

sys.path.insert(0, str(Path(__file__).resolve().parent))

from busfixture import MANAGER, NAME, NOBODY, PATH, ROOT, FakeDaemon, PrivateBus, end, private_bus, read_line, wait_for

ERROR = "org.xdpmond1.Error."


@pytest.fixture
def bus() -> Iterator[PrivateBus]:
    with private_bus() as made:
        yield made


@pytest.fixture
def daemon(bus: PrivateBus) -> FakeDaemon:
    made = FakeDaemon(bus)
    made.wait_line("ready")
    return made


def gdbus(bus: PrivateBus, method: str, *arguments: str, uid: int = 0) -> tuple[int, str, str]:
    result = bus.run(["gdbus", "call", "--system", "--dest", NAME, "--object-path", PATH, "--method", method, *arguments], uid=uid)
    return result.returncode, result.stdout.strip(), result.stderr


class Client:
    """dbus_next as a client: an implementation of the protocol that is not ours."""

    def __init__(self, connection: MessageBus):
        self.bus = connection
        self.owner = ""

    async def ask(self, member: str, signature: str = "", body: list[Any] | None = None, fds: list[int] | None = None, *,
                  interface: str | None = MANAGER, path: str = PATH, flags: MessageFlag = MessageFlag.NONE) -> Message:  # fmt: skip
        message = Message(destination=NAME, path=path, interface=interface, member=member, signature=signature, body=body or [],
                          unix_fds=fds or [], flags=flags)  # fmt: skip
        reply = await asyncio.wait_for(self.bus.call(message), 60)
        assert reply is not None
        return reply

    async def json(self, member: str, signature: str = "", body: list[Any] | None = None, fds: list[int] | None = None) -> Any:
        reply = await self.ask(member, signature, body, fds)
        assert reply.message_type is MessageType.METHOD_RETURN, (reply.error_name, reply.body)
        return json.loads(reply.body[0])

    async def descriptor(self, member: str, options: dict[str, Variant] | None = None) -> int:
        reply = await self.ask(member, "a{sv}", [options or {}])
        assert reply.message_type is MessageType.METHOD_RETURN, (reply.error_name, reply.body)
        (descriptor,) = reply.unix_fds
        return descriptor

    async def error(self, member: str, signature: str = "", body: list[Any] | None = None, **more: Any) -> tuple[str, str]:
        reply = await self.ask(member, signature, body, **more)
        assert reply.message_type is MessageType.ERROR, reply.body
        return reply.error_name, reply.body[0]


@contextlib.asynccontextmanager
async def client_of(bus: PrivateBus) -> AsyncIterator[Client]:
    connection = await MessageBus(bus_address=bus.address, negotiate_unix_fd=True).connect()
    try:
        yield Client(connection)
    finally:
        connection.disconnect()
        await asyncio.wait_for(connection.wait_for_disconnect(), 60)
        connection._sock.close()


def with_client(bus: PrivateBus, test: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with client_of(bus) as client:
            return await test(client)

    return asyncio.run(run())


# What programs see.


def test_busctl_sees_what_the_xml_file_says(bus: PrivateBus, daemon: FakeDaemon) -> None:
    seen = bus.busctl("introspect", "--xml-interface", NAME, PATH)
    assert seen.returncode == 0, seen.stderr
    for line in (ROOT / "dbus/org.xdpmond1.Manager.xml").read_text().splitlines():
        if "<method" in line or "<signal" in line:
            assert line.split('"')[1] in seen.stdout
    tree = bus.busctl("--list", "tree", NAME)
    assert tree.stdout.split() == ["/", "/org", "/org/xdpmond1"]


def test_allow_and_deny_by_busctl_and_gdbus(bus: PrivateBus, daemon: FakeDaemon) -> None:
    done = bus.call("Allow", "asa{sv}", "2", "10.0.0.0/8", "::1", "2", "seconds", "d", "600", "reason", "s", "guests", json=True)
    assert done.returncode == 0, done.stderr
    applied = json.loads(json.loads(done.stdout)["data"][0])["applied"]
    assert [entry["prefix"] for entry in applied] == ["10.0.0.0/8", "::1/128"]
    assert {(entry["verdict"], entry["seconds"], entry["reason"]) for entry in applied} == {("allow", 600.0, "guests")}
    status, out, err = gdbus(bus, f"{MANAGER}.Deny", "['192.0.2.1']", "{'force': <true>}")
    assert status == 0, err
    assert '"verdict":"deny"' in out
    assert bus.busctl("get-property", NAME, PATH, MANAGER, "EntryCount").stdout.strip() == "u 3"


@pytest.mark.parametrize(
    ("method", "arguments", "error"),
    [
        ("Allow", ["['10.0.0.1/8']", "{}"], "InvalidPrefix"),
        ("Allow", ["['ex.ample']", "{}"], "InvalidPrefix"),
        ("Remove", ["['10.0.0.0/8']", "{}"], "NoSuchEntry"),
        ("Deny", ["['192.0.2.7']", "{'peers': <['192.0.2.7']>}"], "LocksYouOut"),
        ("Allow", ["['10.0.0.0/8']", "{'sekonds': <1.0>}"], "Usage"),
        ("Allow", ["['10.0.0.0/8']", "{'seconds': <60>}"], "Usage"),
        ("Allow", ["['10.0.0.0/8']", "{'seconds': <-1.0>}"], "Usage"),
        ("Top", ["{'limit': <'ten'>}"], "Usage"),
        ("Top", ["{'prefix_length': <uint32 24>}"], "Usage"),
        ("Ports", ["{'by': <'bytes'>}"], "Usage"),
        ("Ports", ["{'local': <'yes'>}"], "Usage"),
        ("Flows", ["{'interval': <true>}"], "Usage"),
        ("Flows", ["{'address': <1>}"], "Usage"),
        ("Windows", ["{'port': <uint16 22>}"], "Usage"),
        ("SetMode", ["panic", "{}"], "Usage"),
        ("Explain", ["crash"], "Failed"),
    ],
)
def test_errors_have_their_names(bus: PrivateBus, daemon: FakeDaemon, method: str, arguments: list[str], error: str) -> None:
    status, _, err = gdbus(bus, f"{MANAGER}.{method}", *arguments)
    assert status != 0
    assert f"GDBus.Error:{ERROR}{error}:" in err


def test_standard_errors_and_interfaces(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        standard = "org.freedesktop.DBus.Error."
        properties = "org.freedesktop.DBus.Properties"
        assert (await client.error("Allow", "s", ["x"]))[0] == standard + "InvalidArgs"
        assert (await client.error("Nothing"))[0] == standard + "UnknownMethod"
        assert (await client.error("Describe", interface="no.such"))[0] == standard + "UnknownInterface"
        assert (await client.error("Describe", path="/elsewhere"))[0] == standard + "UnknownObject"
        assert (await client.error("Describe", path="/org"))[0] == standard + "UnknownMethod"
        assert (await client.error("Get", "ss", [MANAGER, "Nothing"], interface=properties))[0] == standard + "UnknownProperty"
        assert (await client.error("Set", "ssv", [MANAGER, "Mode", Variant("s", "enforce")], interface=properties))[0] == (
            standard + "PropertyReadOnly"
        )
        assert (await client.ask("Ping", interface="org.freedesktop.DBus.Peer")).body == []
        assert (await client.ask("Describe", interface=None)).message_type is MessageType.METHOD_RETURN
        everything = (await client.ask("GetAll", "s", [MANAGER], interface=properties)).body[0]
        assert {name: value.signature for name, value in everything.items()} == {
            "Version": "s", "Mode": "s", "FileMode": "s", "Default": "s", "Interfaces": "as", "StartedTimestamp": "t", "EntryCount": "u",
            "Window": "d", "LastWindow": "t", "Flows": "b",
        }  # fmt: skip
        assert everything["Interfaces"].value == ["eth0"]

    with_client(bus, test)


def test_a_crash_inside_is_told_to_the_journal_and_not_to_the_caller(bus: PrivateBus, daemon: FakeDaemon) -> None:
    name, text = with_client(bus, lambda client: client.error("Explain", "s", ["crash"]))
    assert name == ERROR + "Failed"
    assert "secret" not in text and "Traceback" not in text and "File" not in text
    assert "an inner secret" in daemon.log() and "Traceback" in daemon.log()
    assert bus.call("Describe").returncode == 0


def test_the_service_learns_who_called(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        await client.json("Allow", "asa{sv}", [["10.0.0.0/8"], {}])
        assert (await client.json("Describe"))["caller"] == [0, client.bus.unique_name, os.getpid()]

    with_client(bus, test)


def test_signals_and_changed_properties(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> list[Message]:
        rule = f"type='signal',sender='{NAME}'"
        await client.bus.call(Message(destination="org.freedesktop.DBus", path="/org/freedesktop/DBus", interface="org.freedesktop.DBus",
                                      member="AddMatch", signature="s", body=[rule]))  # fmt: skip
        seen: list[Message] = []
        client.bus.add_message_handler(lambda message: seen.append(message) if message.message_type is MessageType.SIGNAL else None)
        await client.json("SetMode", "sa{sv}", ["enforce", {"interface": Variant("s", "eth0")}])
        await client.json("Deny", "asa{sv}", [["10.0.0.0/8"], {}])
        await client.json("Describe")  # what it is answered comes after the signals
        await client.json("Describe")
        return seen

    seen = with_client(bus, test)
    by_name = {message.member: message for message in seen if message.path == PATH and message.interface == MANAGER}
    assert by_name["ModeChanged"].body == ["enforce", "eth0", "uid 0"]
    assert by_name["PolicyChanged"].body[0]["applied"].value == ["10.0.0.0/8"]
    changes = [message.body for message in seen if message.member == "PropertiesChanged"]
    assert [{name: value.value for name, value in body[1].items()} for body in changes] == [{"Mode": "enforce"}, {"EntryCount": 1}]
    assert all(body[0] == MANAGER and body[2] == [] for body in changes)


# Who may.


def test_without_polkit_everybody_reads_and_only_root_changes(bus: PrivateBus, daemon: FakeDaemon) -> None:
    bus.call("Allow", "asa{sv}", "1", "10.0.0.0/8", "0")
    for method, arguments in (
        ("Allow", ["['10.0.0.0/8']", "{}"]),
        ("Deny", ["['10.0.0.0/8']", "{}"]),
        ("Remove", ["['10.0.0.0/8']", "{}"]),
        ("SetMode", ["enforce", "{}"]),
        ("Confirm", []),
        ("Reload", ["{}"]),
    ):
        status, _, err = gdbus(bus, f"{MANAGER}.{method}", *arguments, uid=NOBODY)
        assert status != 0 and f"{ERROR}NotAuthorized:" in err, (method, err)
        assert "sudo" in err
    assert bus.busctl("get-property", NAME, PATH, MANAGER, "Mode", "EntryCount", uid=NOBODY).stdout.split() == ["s", '"monitor"', "u", "1"]
    for method, arguments in (("Describe", []), ("Explain", ["s", "10.0.0.1"]), ("List", ["a{sv}", "0"]), ("Events", ["a{sv}", "0"])):
        assert bus.call(method, *arguments, uid=NOBODY).returncode == 0, method
    assert daemon.log().count(f"refused Deny to uid {NOBODY}") == 1


def test_an_unprivileged_user_cannot_start_a_stopped_daemon(bus: PrivateBus) -> None:
    status, _, err = gdbus(bus, f"{MANAGER}.Describe", uid=NOBODY)
    assert status != 0 and "org.freedesktop.DBus.Error.ServiceUnknown" in err
    assert not bus.owned(NAME)


def test_an_unprivileged_user_cannot_own_the_name(bus: PrivateBus) -> None:
    impostor = FakeDaemon(bus, uid=NOBODY)
    impostor.wait_line("ready")
    assert not bus.owned(NAME)
    assert f"the bus policy does not let uid {NOBODY} own org.xdpmond1" in impostor.log()


def test_a_second_daemon_is_told_who_has_the_name_and_takes_over_when_it_is_free(bus: PrivateBus, daemon: FakeDaemon) -> None:
    second = FakeDaemon(bus)
    second.wait_line("ready")
    wait_for(lambda: "taken" in bus.log("daemon.log"), "the second daemon to say why it has no name")
    assert f"the name org.xdpmond1 is taken by process {daemon.process.pid}" in daemon.log()
    end(daemon.process)
    wait_for(lambda: bus.owned(NAME), "the second daemon to take the name")


# Bulk data.


def test_list_is_a_sealed_file(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        prefixes = [f"10.{number >> 8}.{number & 255}.0/24" for number in range(1000)]
        await client.json("Allow", "asa{sv}", [prefixes, {}])
        descriptor = await client.descriptor("List")
        with open(descriptor, "rb") as file:
            rows = [json.loads(line) for line in file]
            assert [row["prefix"] for row in rows] == prefixes
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            with pytest.raises(PermissionError):
                os.write(descriptor, b"x")
        descriptor = await client.descriptor("Top", {"by": Variant("s", "syns"), "limit": Variant("u", 3), "port": Variant("q", 22)})
        with open(descriptor, "rb") as file:
            assert json.loads(file.read()) == {"by": "syns", "limit": 3, "port": 22, "protocol": None, "interval": False, "local": None,
                                               "prefix_length": None, "prefix_length6": None}  # fmt: skip
        networks = {"prefix_length": Variant("q", 24), "prefix_length6": Variant("q", 64), "local": Variant("b", False)}
        with open(await client.descriptor("Top", networks), "rb") as file:
            assert json.loads(file.read()).items() >= {("local", False), ("prefix_length", 24), ("prefix_length6", 64)}
        ports = {"limit": Variant("u", 3), "local": Variant("b", True), "interval": Variant("b", True), "protocol": Variant("s", "udp")}
        with open(await client.descriptor("Ports", ports), "rb") as file:
            assert json.loads(file.read()) == {"limit": 3, "local": True, "interval": True, "protocol": "udp", "port": None}
        flows = {"by": Variant("s", "packets"), "address": Variant("s", "192.0.2.1"), "port": Variant("q", 22)}
        with open(await client.descriptor("Flows", flows), "rb") as file:
            assert json.loads(file.read()) == {"by": "packets", "limit": 20, "port": 22, "protocol": None, "address": "192.0.2.1"}
        with open(await client.descriptor("Windows", {"limit": Variant("u", 2)}), "rb") as file:
            assert file.read() == b'{"number":0}\n{"number":1}\n'
        descriptor = await client.descriptor("Events", {"limit": Variant("u", 2)})
        with open(descriptor, "rb") as file:
            assert file.read() == b'{"serial":0}\n{"serial":1}\n'

    with_client(bus, test)


def test_change_from_file_takes_a_file_and_a_pipe(bus: PrivateBus, daemon: FakeDaemon, tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text("192.0.2.0/24\n2001:db8::/32\n")

    async def test(client: Client) -> None:
        with listed.open("rb") as file:
            assert await client.json("ChangeFromFile", "hsa{sv}", [0, "deny", {}], [file.fileno()]) == {"applied": 2, "notes": []}
        reader, writer = os.pipe()
        os.write(writer, b"198.51.100.0/24\n")
        os.close(writer)
        assert (await client.json("ChangeFromFile", "hsa{sv}", [0, "allow", {}], [reader]))["applied"] == 1
        assert (await client.error("ChangeFromFile", "hsa{sv}", [0, "perhaps", {}], fds=[reader]))[0] == ERROR + "Usage"
        assert (await client.error("ChangeFromFile", "hsa{sv}", [3, "deny", {}], fds=[reader]))[0] == ERROR + "Usage"
        os.close(reader)

    with_client(bus, test)


def read_lines(descriptor: int, count: int) -> list[dict[str, Any]]:
    with open(descriptor, "rb", closefd=False) as file:
        return [json.loads(file.readline()) for _ in range(count)]


def test_a_slow_reader_loses_events_and_is_told_how_many(bus: PrivateBus, daemon: FakeDaemon) -> None:
    sent = 5000

    async def test(client: Client) -> None:
        descriptor = await client.descriptor("FollowEvents")
        slow = await client.descriptor("FollowEvents")
        await client.json("Explain", "s", ["emit 50"])
        assert [row["serial"] for row in await asyncio.to_thread(read_lines, descriptor, 50)] == list(range(50))
        # Nobody reads `slow`: its pipe and then its queue fill. The daemon answers meanwhile.
        await client.json("Explain", "s", [f"emit {sent}"])
        await client.json("Explain", "s", [f"emit {sent}"])
        assert (await client.json("Describe"))["followers"] == 2
        seen, lost, expected = 0, 0, 50 + 2 * sent
        with open(slow, "rb") as file:
            while seen + lost < expected:
                row = json.loads(await asyncio.to_thread(file.readline))
                lost += row.get("lost", 0)
                seen += "serial" in row
                if row.get("serial") == sent - 1 or seen % 100 == 0:
                    expected += 1  # what was lost is told before the next event: make one
                    await client.json("Explain", "s", ["emit 1"])
        assert lost > 0 and seen >= 100
        os.close(descriptor)

    with_client(bus, test)


def test_a_reader_that_goes_away_ends_its_feed(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        before = daemon.descriptors()
        descriptor = await client.descriptor("FollowEvents")
        assert (await client.json("Describe"))["followers"] == 1
        os.close(descriptor)
        await asyncio.to_thread(wait_for, lambda: daemon.descriptors() == before, "the daemon to close its end of the pipe")
        assert (await client.json("Describe"))["followers"] == 0

    with_client(bus, test)


def test_followers_of_one_user_are_bounded(bus: PrivateBus, daemon: FakeDaemon) -> None:
    program = (
        "import asyncio, sys\n"
        "from dbus_next import Message\n"
        "from dbus_next.aio import MessageBus\n"
        "async def main():\n"
        "    bus = await MessageBus(bus_address=sys.argv[1], negotiate_unix_fd=True).connect()\n"
        "    for _ in range(17):\n"
        "        reply = await bus.call(Message(destination='org.xdpmond1', path='/org/xdpmond1', interface='org.xdpmond1.Manager',\n"
        "                                       member='FollowEvents', signature='a{sv}', body=[{}]))\n"
        "        print(reply.error_name or 'taken')\n"
        "asyncio.run(main())\n"
    )
    before = daemon.descriptors()
    lines = bus.run([sys.executable, "-c", program, bus.address], uid=NOBODY).stdout.split()
    assert lines == ["taken"] * 16 + [ERROR + "Failed"]
    wait_for(lambda: daemon.descriptors() == before, "the followers to end with their reader")


def test_what_one_user_keeps_of_lists_is_bounded(bus: PrivateBus, daemon: FakeDaemon) -> None:
    program = (
        "import asyncio, sys\n"
        "from dbus_next import Message\n"
        "from dbus_next.aio import MessageBus\n"
        "async def main():\n"
        "    bus = await MessageBus(bus_address=sys.argv[1], negotiate_unix_fd=True).connect()\n"
        "    kept = []\n"
        "    while True:\n"
        "        reply = await bus.call(Message(destination='org.xdpmond1', path='/org/xdpmond1', interface='org.xdpmond1.Manager',\n"
        "                                       member='List', signature='a{sv}', body=[{}]))\n"
        "        if reply.error_name:\n"
        "            break\n"
        "        kept += reply.unix_fds\n"
        "    print(len(kept), reply.error_name, flush=True)\n"
        "    sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    user = bus.spawn([sys.executable, "-c", program, bus.address], uid=NOBODY, log="user.log")
    assert read_line(user) == f"256 {ERROR}Failed", bus.log("user.log")
    assert bus.call("List", "a{sv}", "0", uid=NOBODY).returncode != 0
    assert bus.call("List", "a{sv}", "0").returncode == 0
    end(user)
    wait_for(lambda: bus.call("List", "a{sv}", "0", uid=NOBODY).returncode == 0, "what it kept to be free again")


# What must not hurt it.


def test_no_descriptor_leaks_whatever_comes(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def rounds(client: Client, count: int) -> None:
        reader, writer = os.pipe()
        for _ in range(count):
            await client.error("Describe", fds=[reader, writer], interface="no.such")
            await client.ask("Describe", fds=[reader] * 16)
            await client.error("Allow", "s", ["x"], fds=[reader])
            await client.error("ChangeFromFile", "hsa{sv}", [0, "deny", {"bad": Variant("s", "")}], fds=[reader])
            await client.error("Explain", "s", ["crash"], fds=[reader])
            await client.bus.send(Message(destination=client.owner, path="/x", interface="a.b", member="C", message_type=MessageType.SIGNAL,
                                          unix_fds=[reader]))  # fmt: skip
            os.close(await client.descriptor("List"))
            os.close(await client.descriptor("FollowEvents"))
            await client.bus.send(Message(destination=NAME, path=PATH, interface=MANAGER, member="FollowEvents", signature="a{sv}",
                                          body=[{}], flags=MessageFlag.NO_REPLY_EXPECTED))  # fmt: skip
        os.close(reader)
        os.close(writer)

    async def test(client: Client) -> None:
        owner = await client.bus.call(Message(destination="org.freedesktop.DBus", path="/org/freedesktop/DBus", member="GetNameOwner",
                                              interface="org.freedesktop.DBus", signature="s", body=[NAME]))  # fmt: skip
        assert owner is not None
        client.owner = owner.body[0]
        os.close(await client.descriptor("List"))
        await client.json("Describe")  # once this is answered, what the call before it sent is closed
        before = daemon.descriptors()
        await rounds(client, 20)
        await asyncio.to_thread(wait_for, lambda: daemon.descriptors() == before, f"{before} descriptors again")

    with_client(bus, test)


def test_clients_that_vanish_do_no_harm(bus: PrivateBus, daemon: FakeDaemon) -> None:
    before = daemon.descriptors()

    async def vanish() -> None:
        for member, signature, body in (("List", "a{sv}", [{}]), ("FollowEvents", "a{sv}", [{}]), ("Explain", "s", ["wait"])):
            connection = await MessageBus(bus_address=bus.address, negotiate_unix_fd=True).connect()
            await connection.send(Message(destination=NAME, path=PATH, interface=MANAGER, member=member, signature=signature, body=body))
            connection.disconnect()
            await connection.wait_for_disconnect()
            connection._sock.close()

    for _ in range(10):
        asyncio.run(vanish())
    assert bus.call("Confirm").returncode == 0  # lets those that wait go
    wait_for(lambda: daemon.descriptors() == before, "every descriptor to be closed")
    assert daemon.log().count("Traceback") == 0


def test_a_slow_call_delays_nobody(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        slow = asyncio.create_task(client.ask("Explain", "s", ["wait"]))
        assert (await client.json("Explain", "s", ["10.0.0.1"]))["address"] == "10.0.0.1"
        assert not slow.done()
        await client.json("Confirm")
        assert (await slow).message_type is MessageType.METHOD_RETURN

    with_client(bus, test)


def test_one_caller_cannot_have_everything_under_way(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        await client.json("Describe")  # the bus has said whose connection it is
        waiting = [asyncio.create_task(client.ask("Explain", "s", ["wait"])) for _ in range(100)]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert {task.result().error_name for task in done} == {"org.freedesktop.DBus.Error.LimitsExceeded"}
        async with client_of(bus) as other:
            await other.json("Confirm")
        replies = await asyncio.gather(*waiting)
        assert sum(reply.message_type is MessageType.METHOD_RETURN for reply in replies) == 64

    with_client(bus, test)


def test_one_user_cannot_have_everything_under_way(bus: PrivateBus, daemon: FakeDaemon) -> None:
    program = (
        "import asyncio, sys\n"
        "from dbus_next import Message, MessageType\n"
        "from dbus_next.aio import MessageBus\n"
        "def call(member, *body):\n"
        "    return Message(destination='org.xdpmond1', path='/org/xdpmond1', interface='org.xdpmond1.Manager', member=member,\n"
        "                   signature='s' * len(body), body=list(body))\n"
        "async def main():\n"
        "    buses = [await MessageBus(bus_address=sys.argv[1]).connect() for _ in range(8)]\n"
        "    for bus in buses:\n"
        "        await bus.call(call('Describe'))\n"
        "    waiting = [asyncio.ensure_future(bus.call(call('Explain', 'wait'))) for bus in buses for _ in range(64)]\n"
        "    while sum(task.done() for task in waiting) < 512 - 128:\n"
        "        await asyncio.wait([task for task in waiting if not task.done()], return_when=asyncio.FIRST_COMPLETED)\n"
        "    print('held', flush=True)\n"
        "    replies = await asyncio.gather(*waiting)\n"
        "    print(sum(reply.message_type is MessageType.METHOD_RETURN for reply in replies), flush=True)\n"
        "asyncio.run(main())\n"
    )
    user = bus.spawn([sys.executable, "-c", program, bus.address], uid=NOBODY, log="user.log")
    assert read_line(user) == "held", bus.log("user.log")
    denied = bus.call("Deny", "asa{sv}", "1", "203.0.113.9", "0")
    assert denied.returncode == 0, denied.stderr
    assert bus.call("Confirm").returncode == 0
    assert read_line(user) == "128"


def test_signals_wait_for_a_bus_that_does_not_read(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> list[int]:
        rule = f"type='signal',sender='{NAME}',member='SourceBlocked'"
        await client.bus.call(Message(destination="org.freedesktop.DBus", path="/org/freedesktop/DBus", interface="org.freedesktop.DBus",
                                      member="AddMatch", signature="s", body=[rule]))  # fmt: skip
        seen: list[int] = []
        every = asyncio.Event()

        def take(message: Message) -> None:
            if message.member == "SourceBlocked":
                seen.append(message.body[0]["serial"].value)
                if len(seen) == 900:
                    every.set()

        client.bus.add_message_handler(take)
        bus.signal(signal.SIGSTOP)
        try:
            daemon.process.send_signal(signal.SIGUSR1)
            await asyncio.to_thread(daemon.wait_line, "sent")  # more than a socket holds
        finally:
            bus.signal(signal.SIGCONT)
        await asyncio.wait_for(every.wait(), 60)
        return seen

    assert with_client(bus, test) == list(range(900))
    assert bus.call("Describe").returncode == 0
    assert "not on the bus" not in daemon.log()


def test_too_long_a_call_is_refused_and_the_next_one_is_not(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def test(client: Client) -> None:
        for count in (3000, 1_000_000):
            name, text = await client.error("Allow", "asa{sv}", [["10.0.0.0/8"] * count, {}])
            assert name == ERROR + "Usage" and "file" in text
        assert (await client.json("Allow", "asa{sv}", [["10.0.0.0/8"] * 500, {}]))["notes"] == []

    with_client(bus, test)


def raw_connection(bus: PrivateBus) -> socket.socket:
    """A socket after authentication and Hello, for messages that no library sends."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(bus.address.removeprefix("unix:path="))
    sock.sendall(f"\0AUTH EXTERNAL {b'0'.hex()}\r\n".encode())
    assert sock.recv(100).startswith(b"OK")
    hello = Message(destination="org.freedesktop.DBus", path="/org/freedesktop/DBus", interface="org.freedesktop.DBus", member="Hello",
                    serial=1)  # fmt: skip
    sock.sendall(b"BEGIN\r\n" + bytes(hello._marshall()))
    assert sock.recv(16)
    return sock


def test_messages_of_unknown_kinds_are_ignored(bus: PrivateBus, daemon: FakeDaemon) -> None:
    with contextlib.closing(raw_connection(bus)) as sock:
        for kind in (5, 77, 255):
            strange = bytearray(Message(destination=NAME, path=PATH, interface=MANAGER, member="Describe", serial=7)._marshall())
            strange[1] = kind
            sock.sendall(strange)
        sock.sendall(bytes(Message(destination=NAME, path=PATH, interface=MANAGER, member="Confirm", serial=8)._marshall()))
        while not any(b"{}" in part for part in iter(lambda: sock.recv(4096), b"")):
            pass
    assert bus.call("Describe").returncode == 0
    assert "not on the bus" not in daemon.log()


def test_the_bus_goes_away_and_comes_back(bus: PrivateBus, daemon: FakeDaemon) -> None:
    before = daemon.descriptors()
    for _ in range(3):
        bus.stop()
        wait_for(lambda: daemon.log().rstrip().splitlines()[-1].startswith("<4>not on the bus"), "the daemon to notice")
        bus.start()
        wait_for(lambda: bus.owned(NAME), "the daemon to come back")
        assert bus.call("Describe").returncode == 0
    assert daemon.process.poll() is None
    wait_for(lambda: daemon.descriptors() == before, "no descriptor to be left over")
    assert "Traceback" not in daemon.log()


def test_a_change_under_way_survives_the_bus(bus: PrivateBus, daemon: FakeDaemon) -> None:
    async def start(client: Client) -> None:
        await client.bus.send(Message(destination=NAME, path=PATH, interface=MANAGER, member="Explain", signature="s", body=["wait"]))
        await client.json("Describe")

    with_client(bus, start)
    bus.stop()
    bus.start()
    wait_for(lambda: bus.owned(NAME), "the daemon to come back")
    assert bus.call("Confirm").returncode == 0
    wait_for(lambda: '\\"waited\\":1' in bus.call("Describe").stdout, "the call from before to end")
    assert "Traceback" not in daemon.log()


def test_the_daemon_ends_when_told_to(bus: PrivateBus, daemon: FakeDaemon) -> None:
    started = time.monotonic()
    daemon.process.terminate()
    daemon.wait_line("ended")
    assert daemon.process.wait(60) == 0
    assert time.monotonic() - started < 10
    assert not bus.owned(NAME)
