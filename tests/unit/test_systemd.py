"""The service manager's side, played by the test: a socket that notifications come to, and descriptors handed to a child."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from xdpmond.systemd import Notifier, stored_descriptors, writable_paths

ROOT = Path(__file__).parents[2]


class Manager:
    """An AF_UNIX datagram socket, as systemd's is."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.bind(str(path))
        self.socket.setblocking(False)  # what is sent is there at once

    def received(self):
        """The assignments of the next message, and the descriptors that came with it."""
        data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 8)
        return dict(line.split("=", 1) for line in data.decode().splitlines()), descriptors


@pytest.fixture
def manager(tmp_path, monkeypatch):
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    yield made
    made.socket.close()


def test_readiness_and_status(manager):
    notifier = Notifier()
    assert notifier.present
    notifier.ready("watching eth0")
    assert manager.received() == ({"READY": "1", "STATUS": "watching eth0"}, [])
    notifier.status("two\nlines")
    assert manager.received() == ({"STATUS": "two lines"}, [])
    notifier.stopping()
    assert manager.received() == ({"STOPPING": "1"}, [])
    notifier.watchdog()
    assert manager.received() == ({"WATCHDOG": "1"}, [])


def test_a_reload_begins_with_its_time(manager):
    notifier = Notifier()
    notifier.reloading()
    first, _ = manager.received()
    notifier.reloading()
    second, _ = manager.received()
    assert first.keys() == {"RELOADING", "MONOTONIC_USEC"}
    assert 0 < int(first["MONOTONIC_USEC"]) <= int(second["MONOTONIC_USEC"])


def test_descriptors_are_stored_and_taken_out(manager):
    reader, writer = os.pipe()
    Notifier().keep("map-talkers", writer)
    told, descriptors = manager.received()
    assert told == {"FDSTORE": "1", "FDPOLL": "0", "FDNAME": "map-talkers"}
    (stored,) = descriptors
    os.close(writer)
    os.write(stored, b"the same pipe")
    assert os.read(reader, 99) == b"the same pipe"
    os.close(stored)
    os.close(reader)
    Notifier().forget("map-talkers")
    assert manager.received() == ({"FDSTOREREMOVE": "1", "FDNAME": "map-talkers"}, [])


def test_a_manager_that_has_gone_is_no_failure_of_ours(manager, tmp_path):
    """A container's manager may be gone before its services are."""
    manager.socket.close()
    Notifier().ready("watching eth0")
    (tmp_path / "notify").unlink()
    Notifier().watchdog()


def test_without_a_manager_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    notifier = Notifier()
    assert not notifier.present
    notifier.ready("x")
    notifier.keep("x", 0)
    assert notifier.watchdog_seconds is None


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 30.0),
        ("30000000", "ours", 30.0),
        ("30000000", "1", None),
        ("", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog(manager, monkeypatch, usec, pid, seconds):
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert Notifier().watchdog_seconds == seconds


RECEIVER = """
import json, os, sys
if os.environ.get("LISTEN_PID") == "ours":
    os.environ["LISTEN_PID"] = str(os.getpid())
from xdpmond.systemd import stored_descriptors
found = stored_descriptors()
print(json.dumps({
    "found": found,
    "inheritable": [os.get_inheritable(fd) for _, fd in found],
    "read": [os.read(fd, 99).decode() for _, fd in found],
    "left": sorted(name for name in os.environ if name.startswith("LISTEN_")),
    "again": stored_descriptors(),
}))
"""


def handed(contents, **environment):
    """What a child makes of descriptors 3 and up, each a pipe with these contents."""
    pipes = [os.pipe() for _ in contents]
    for (_, writer), text in zip(pipes, contents, strict=True):
        os.write(writer, text.encode())
        os.close(writer)
    high = [os.dup2(reader, 100 + index) for index, (reader, _) in enumerate(pipes)]  # out of each other's way
    script = "".join(f" {3 + index}<&{fd}" for index, fd in enumerate(high))
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", f'exec "$0" -c "$1"{script}', sys.executable, RECEIVER], pass_fds=high, capture_output=True, text=True,
            cwd=ROOT, env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **environment}, check=True,
        )  # fmt: skip
    finally:
        for fd in [*high, *(reader for reader, _ in pipes)]:
            os.close(fd)
    return json.loads(done.stdout)


def test_stored_descriptors_come_back_by_name():
    got = handed(["one", "two"], LISTEN_PID="ours", LISTEN_FDS="2", LISTEN_FDNAMES="map-control:prog-xdpmond")
    assert got["found"] == [["map-control", 3], ["prog-xdpmond", 4]]
    assert got["read"] == ["one", "two"]
    assert got["inheritable"] == [False, False]
    assert got["left"] == got["again"] == []


def test_the_descriptors_of_another_process_are_left_alone():
    got = handed(["one"], LISTEN_PID="1", LISTEN_FDS="1", LISTEN_FDNAMES="map-control")
    assert got["found"] == got["left"] == []


@pytest.mark.parametrize(
    ("number", "names", "found"),
    [("1", None, [["", 3]]), ("1", "", [["", 3]]), ("0", "", []), ("", "", []), ("many", "x", []), (None, None, [])],
)
def test_an_environment_with_holes(number, names, found):
    given = {"LISTEN_FDS": number, "LISTEN_FDNAMES": names}
    got = handed(["one"], LISTEN_PID="ours", **{name: value for name, value in given.items() if value is not None})
    assert (got["found"], got["left"]) == (found, [])


def test_without_any():
    assert stored_descriptors() == []


# Where the unit may write


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """Puts a systemctl in the path that prints this, and ends so."""

    def make(output, status=0):
        script = tmp_path / "systemctl"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


def test_a_units_paths(systemctl):
    paths = "ReadWritePaths=-/var/log/xdpmond /srv/a +/srv/b\nStateDirectory=xdpmond\nLogsDirectory=x y\nRuntimeDirectory=xdpmond"
    systemctl(f"LoadState=loaded\nProtectSystem=strict\n{paths}")
    assert writable_paths("x.service") == [
        "/var/log/xdpmond",
        "/srv/a",
        "/srv/b",
        "/var/lib/xdpmond",
        "/var/log/x",
        "/var/log/y",
        "/run/xdpmond",
    ]


@pytest.mark.parametrize(
    "output, status",
    [("LoadState=not-found\nProtectSystem=strict", 0), ("LoadState=loaded\nProtectSystem=full", 0), ("", 0), ("LoadState=loaded", 1)],
)
def test_no_unit_no_bounds(systemctl, output, status):
    systemctl(output, status)
    assert writable_paths("x.service") is None


def test_no_systemctl_no_bounds(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert writable_paths("x.service") is None
