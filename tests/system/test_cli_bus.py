"""xdpmonctl as a whole process against a small daemon of the tests' own on a private bus: the wire, the descriptors, the exit statuses.

The daemon behind it here is not the real one on purpose: it answers what the real one answers only when something is wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dbus_next import DBusError, Message, MessageType
from dbus_next.aio import MessageBus

from xdpmond.cli.client import INTERFACE, NAME, PATH

PYTHON = "/usr/bin/python3"
ROOT = Path(__file__).resolve().parents[2]


def memfd(lines: list[dict[str, Any]]) -> int:
    descriptor = os.memfd_create("test")
    os.write(descriptor, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return descriptor  # left at its end on purpose: the client must not rely on the position


class FakeDaemon(threading.Thread):
    """Owns the name and answers each member by a function of the message, which returns (signature, body, descriptors) or raises."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.answers: dict[str, Callable[[Message], tuple[str, list[Any], list[int]]]] = {}
        self.calls: list[tuple[str, list[Any]]] = []
        self.ready = threading.Event()
        self.loop = asyncio.new_event_loop()

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self.bus = await MessageBus(bus_address=self.address, negotiate_unix_fd=True).connect()
        self.bus.add_message_handler(self._answer)
        await self.bus.request_name(NAME)
        self.ended = asyncio.Event()
        self.ready.set()
        await self.ended.wait()
        self.bus.disconnect()

    def _answer(self, message: Message) -> Message | bool | None:
        if message.message_type is not MessageType.METHOD_CALL or message.path != PATH or message.interface != INTERFACE:
            return None
        options = [{key: item.value for key, item in part.items()} if isinstance(part, dict) else part for part in message.body]
        self.calls.append((message.member, options))
        try:
            signature, body, descriptors = self.answers[message.member](message)
        except DBusError as error:
            return Message.new_error(message, error.type, error.text)
        reply = Message.new_method_return(message, signature, body, descriptors)
        if descriptors:
            self.bus.send(reply).add_done_callback(lambda _: [os.close(descriptor) for descriptor in descriptors])
            return True  # answered here
        return reply

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(lambda: self.ended.set())
        self.join()


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = f"unix:path={tmp_path_factory.mktemp('bus')}/socket"
    command = ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address=1", f"--address={address}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait()
    process.stdout.close()


@pytest.fixture
def daemon(bus: str) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(bus)
    fake.start()
    assert fake.ready.wait(10)
    yield fake
    fake.stop()


def command_line(bus: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", "xdpmond.cli", "--bus", bus, *arguments]


def environment(**extra: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", **extra}


def ctl(bus: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environ = environment(**options.pop("environ", {}))
    return subprocess.run(command_line(bus, *arguments), env=environ, capture_output=True, text=True, timeout=120, check=False, **options)


def answer(document: object) -> Callable[[Message], tuple[str, list[Any], list[int]]]:
    return lambda _: ("s", [json.dumps(document)], [])


def refuse(name: str, text: str) -> Callable[[Message], tuple[str, list[Any], list[int]]]:
    def raises(_: Message) -> tuple[str, list[Any], list[int]]:
        raise DBusError(name, text)

    return raises


def test_the_document_comes_through_unchanged(bus: str, daemon: FakeDaemon) -> None:
    document = {"mode": "enforce", "nested": {"big": 2**63, "text": "ü\x1b[31m"}, "list": [1, None, True]}
    daemon.answers["Describe"] = answer(document)
    done = ctl(bus, "-j")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == document
    assert "\x1b" not in done.stdout


def test_options_travel_with_their_types(bus: str, daemon: FakeDaemon) -> None:
    daemon.answers["Deny"] = answer({"applied": [], "notes": []})
    arguments = ["deny", "192.0.2.0/24", "2001:DB8::1", "--for", "1h30m", "--reason", "flood", "--force"]
    done = ctl(bus, *arguments, environ={"SSH_CONNECTION": "198.51.100.7 50000 192.0.2.1 22"})
    assert done.returncode == 0, done.stderr
    options = {"seconds": 5400.0, "reason": "flood", "force": True, "peers": ["198.51.100.7"]}
    assert daemon.calls == [("Deny", [["192.0.2.0/24", "2001:db8::1/128"], options])]


def test_a_list_is_read_from_its_start(bus: str, daemon: FakeDaemon) -> None:
    rows = [{"prefix": f"10.0.{index}.0/24", "verdict": "deny", "origin": "operator", "packets": index} for index in range(200)]
    daemon.answers["List"] = lambda _: ("h", [0], [memfd(rows)])
    assert json.loads(ctl(bus, "list", "-j").stdout) == rows
    plain = ctl(bus, "list", "--no-legend").stdout.splitlines()
    assert len(plain) == 200
    assert plain[7].split()[:3] == ["10.0.7.0/24", "deny", "operator"]


@pytest.mark.parametrize("source", ["file", "pipe", "argv"])
def test_prefixes_travel_as_a_descriptor(bus: str, daemon: FakeDaemon, tmp_path: Path, source: str) -> None:
    prefixes = [f"10.{index >> 8}.{index & 255}.0/24" for index in range(3000)]
    text = "\n".join(prefixes)
    seen = []

    def read(message: Message) -> tuple[str, list[Any], list[int]]:
        with open(message.unix_fds[message.body[0]]) as stream:
            seen.append(stream.read())
        return "s", [json.dumps({"applied": 3000, "notes": ["a note"]})], []

    daemon.answers["ChangeFromFile"] = read
    path = tmp_path / "prefixes"
    path.write_text(text)
    arguments = {"file": ["--from-file", str(path)], "pipe": ["--from-file", "-"], "argv": prefixes}[source]
    done = ctl(bus, "allow", *arguments, input=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert seen == [text]
    assert done.stdout == "3,000 prefixes allowed\nnote: a note\n"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("org.xdpmond1.Error.NotAuthorized", 4), ("org.xdpmond1.Error.NoSuchEntry", 5), ("org.xdpmond1.Error.InvalidPrefix", 6),
        ("org.xdpmond1.Error.LocksYouOut", 7), ("org.xdpmond1.Error.FileEntry", 7), ("org.xdpmond1.Error.NeedsForce", 7),
        ("org.xdpmond1.Error.Usage", 2), ("org.xdpmond1.Error.Kernel", 1), ("org.xdpmond1.Error.FromTheFuture", 1),
        ("org.freedesktop.DBus.Error.AccessDenied", 4), ("org.freedesktop.DBus.Error.UnknownMethod", 1),
    ],
)  # fmt: skip
def test_errors_become_exit_statuses(bus: str, daemon: FakeDaemon, name: str, status: int) -> None:
    daemon.answers["Remove"] = refuse(name, "no \x1b[31mway\nask first")
    done = ctl(bus, "remove", "192.0.2.1", "-j")
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("xdpmonctl: ")
    assert "\x1b" not in done.stderr
    if name.startswith("org.xdpmond1"):
        assert done.stderr == "xdpmonctl: no \\x1b[31mway\n  ask first\n"


def test_without_a_daemon(bus: str) -> None:
    done = ctl(bus, "status")
    assert done.returncode == 3
    assert done.stderr == "xdpmonctl: the daemon is not running\n  start it with: systemctl start xdpmond\n"


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/socket", "tcp:host=localhost", "nonsense"])
def test_without_a_bus(address: str) -> None:
    done = ctl(address, "status")
    assert done.returncode == 3
    assert f"no message bus at {address}" in done.stderr
    assert "systemctl start dbus xdpmond" in done.stderr


def test_the_bus_is_found_by_the_environment(bus: str, daemon: FakeDaemon) -> None:
    daemon.answers["Confirm"] = answer({"mode": "enforce"})
    command = [PYTHON, "-m", "xdpmond.cli", "confirm"]
    done = subprocess.run(command, env=environment(XDPMOND_BUS=bus), capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "enforce is kept\n"


def test_following_ends_quietly_by_interrupt(bus: str, daemon: FakeDaemon) -> None:
    read, write = os.pipe()
    daemon.answers["FollowEvents"] = lambda _: ("h", [0], [read])
    process = subprocess.Popen(
        command_line(bus, "events", "-f", "-j"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    os.write(write, b'{"src_ip":"192.0.2.9"}\n')
    assert process.stdout.readline() == '{"src_ip":"192.0.2.9"}\n'  # at once, not when a buffer is full
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    os.close(write)
    assert (process.returncode, out, err) == (0, "", "")


def test_following_says_when_the_daemon_ends(bus: str, daemon: FakeDaemon) -> None:
    read, write = os.pipe()
    os.write(write, b'{"lost":7}\n')
    os.close(write)
    daemon.answers["FollowEvents"] = lambda _: ("h", [0], [read])
    done = ctl(bus, "events", "-f")
    assert done.returncode == 3
    assert "7 events lost" in done.stdout
    assert "the daemon stopped" in done.stderr


def test_a_reader_that_goes_away_is_no_error(bus: str, daemon: FakeDaemon) -> None:
    daemon.answers["List"] = lambda _: ("h", [0], [memfd([{"prefix": "10.0.0.0/8", "reason": "x" * 100}] * 5000)])
    process = subprocess.Popen(command_line(bus, "list"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_full_disk_is_an_error(bus: str, daemon: FakeDaemon) -> None:
    daemon.answers["Describe"] = answer({})
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command_line(bus, "-j"), env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert process.returncode == 1
    assert process.stderr == "xdpmonctl: cannot write the output: No space left on device\n"


def test_status_imports_nothing_heavy(bus: str, daemon: FakeDaemon) -> None:
    """Someone under attack waits for this: no loop, no drawing library, none of the daemon's parts."""
    daemon.answers["Describe"] = answer({"mode": "monitor"})
    program = "import sys; from xdpmond.cli.main import main; main(); print(*sorted(sys.modules), file=sys.stderr)"
    command = [PYTHON, "-c", program, "--bus", bus]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stderr.split())
    assert "dbus_next.message" in loaded
    assert not loaded & {"asyncio", "rich", "gi", "numpy", "dataclasses", "xdpmond.model", "xdpmond.config", "subprocess", "ssl", "inspect"}


def test_dbus_next_stays_whole_for_others() -> None:
    """The client loads parts of the library by themselves; whoever imports it afterwards gets all of it, with the same classes."""
    program = (
        "from xdpmond.cli import client; client._load_dbus_next(); from dbus_next.message import Message as part;"
        "import dbus_next; assert dbus_next.Message is part; import dbus_next.aio; assert dbus_next.aio.MessageBus;"
        "assert dbus_next.introspection"
    )
    done = subprocess.run([PYTHON, "-c", program], env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
