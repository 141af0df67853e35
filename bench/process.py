"""Daemon and client as whole processes: start to READY=1, from nothing and from the descriptor store; private memory; a status call.

The daemon runs as under systemd, with a notify socket of ours that keeps its descriptors, on a veth pair in a network namespace and on a
message bus of its own. Private memory is USS without mappings of BPF maps: what the process alone would give back.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xdpmond.kernel import libbpf

from .rows import Goal, Of, Row

TITLE = "whole processes"
_ROOT = Path(__file__).resolve().parents[1]
_READY_TIMEOUT = 60.0
_CONFIG = """interface = "front"
allow = ["127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7", "fe80::/10"]
"""
_BUS_CONFIG = """<busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow eavesdrop="false"/></policy></busconfig>
"""
_MOST_DESCRIPTORS = 16  # in one message
_PARKED = 300  # where descriptors wait before they are put to 3 and following


def measure(rounds: int) -> Iterable[Row]:
    rounds = max(3, rounds // 2)
    with _stage() as stage:
        cold, taken_over, memory, status = [], [], [], []
        for _ in range(rounds):
            with NotifySocket(stage.directory / "notify") as manager:
                daemon, seconds = stage.start_daemon(manager)
                cold.append(seconds)
                memory.append(private_memory(daemon))
                status.append(stage.status_call())
                attached = manager.attached_programs()
                # A crash: what the store holds is all that is left.
                _kill(daemon)
                daemon, seconds = stage.start_daemon(manager)
                taken_over.append(seconds)
                _kill(daemon)
                if not attached or manager.attached_programs() != attached:
                    raise AssertionError(f"program {attached} was attached, after the second start {manager.attached_programs()}")
    yield Row("daemon: start to READY, nothing kept", statistics.median(cold), "s", goal=Goal(2.0, Of.VALUE))
    yield Row("daemon: start to READY, from the descriptor store", statistics.median(taken_over), "s", goal=Goal(0.7, Of.VALUE))
    yield Row("daemon: private memory at rest", statistics.median(memory) / 1e6, "MB", goal=Goal(45, Of.VALUE))
    yield Row("xdpmonctl status", statistics.median(status), "s", goal=Goal(0.25, Of.VALUE))


def private_memory(pid: int) -> int:
    """USS in bytes without mappings of BPF maps, once it no longer changes."""
    before, steady = -1, time.monotonic() + 10
    while (now := _private_memory(pid)) != before and time.monotonic() < steady:
        before = now
        time.sleep(0.5)
    return now


def _private_memory(pid: int) -> int:
    private, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = "anon_inode:bpf" not in line
        elif counts and line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1]) * 1024
    return private


@dataclass
class NotifySocket:
    """The service manager's side of sd_notify(3): waits for READY=1, and keeps what FDSTORE=1 brings."""

    path: Path
    store: list[tuple[str, int]] = field(default_factory=list)

    def __enter__(self) -> NotifySocket:
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(self.path))
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
        for _, fd in self.store:
            os.close(fd)

    def attached_programs(self) -> set[int]:
        """Ids of the programs on the stored links."""
        return {libbpf.link_info(fd)[1] for name, fd in self.store if name.startswith("link-")}

    def drain(self) -> None:
        """Take what an earlier process left in the socket."""
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take()

    def wait_ready(self, daemon: int) -> None:
        end = time.monotonic() + _READY_TIMEOUT
        while True:
            self._socket.settimeout(0.5)
            try:
                if "READY=1" in self._take():
                    return
            except TimeoutError:
                if os.waitpid(daemon, os.WNOHANG)[0]:
                    raise AssertionError("the daemon ended before it was ready") from None
                if time.monotonic() > end:
                    raise AssertionError(f"the daemon was not ready within {_READY_TIMEOUT:.0f} s") from None

    def _take(self) -> list[str]:
        data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS))
        lines = data.decode().splitlines()
        name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "")
        for _, _, packed in ancillary:
            descriptors = array.array("i", packed[: len(packed) // 4 * 4])
            self.store += [(name, fd) for fd in descriptors]
        if "FDSTOREREMOVE=1" in lines:
            for entry in [entry for entry in self.store if entry[0] == name]:
                self.store.remove(entry)
                os.close(entry[1])
        return lines


@dataclass(frozen=True, slots=True)
class _Stage:
    """Where the daemon runs."""

    directory: Path
    namespace: str
    bus: str

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")}
        return kept | {"PYTHONPATH": str(_ROOT), "XDPMOND_BUS": self.bus}

    def start_daemon(self, manager: NotifySocket) -> tuple[int, float]:
        """Start it with what the manager has stored; return its process id and the seconds until it was ready."""
        manager.drain()
        names = ":".join(name for name, _ in manager.store)
        environment = self.environment() | {
            "NOTIFY_SOCKET": str(manager.path), "STATE_DIRECTORY": str(self.directory), "LISTEN_FDS": str(len(manager.store)),
            "LISTEN_FDNAMES": names,
        }  # fmt: skip
        command = ["nsenter", f"--net=/run/netns/{self.namespace}", "sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", sys.executable, "-m",
                   "xdpmond", "-c", str(self.directory / "xdpmond.toml")]  # fmt: skip
        started = time.monotonic()
        daemon = _spawn(command, environment, [fd for _, fd in manager.store], self.directory / "daemon.log")
        try:
            manager.wait_ready(daemon)
        except AssertionError as error:
            _kill(daemon)
            raise AssertionError(f"{error}:\n{(self.directory / 'daemon.log').read_text()[-2000:]}") from None
        return daemon, time.monotonic() - started

    def status_call(self) -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "xdpmond.cli", "status"], env=self.environment(), stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - started


def _spawn(command: list[str], environment: Mapping[str, str], descriptors: list[int], log: Path) -> int:
    """Start a process that has the descriptors as 3 and following."""
    parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PARKED) for fd in descriptors]
    try:
        actions: list[tuple] = [(os.POSIX_SPAWN_DUP2, fd, 3 + number) for number, fd in enumerate(parked)]
        actions.append((os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        actions.append((os.POSIX_SPAWN_DUP2, 2, 1))
        return os.posix_spawnp(command[0], command, dict(environment), file_actions=actions)
    finally:
        for fd in parked:
            os.close(fd)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def _stage() -> Iterator[_Stage]:
    namespace = f"xm-bench-{os.getpid()}"
    directory = Path(tempfile.mkdtemp(prefix="xm-bench-"))
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, directory)
        subprocess.run(["ip", "netns", "add", namespace], check=True)
        undo.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
        for command in ("link add front type veth peer name wire", "link set front up", "link set wire up", "link set lo up"):
            subprocess.run(["ip", "-n", namespace, *command.split()], check=True)
        (directory / "xdpmond.toml").write_text(_CONFIG)
        (directory / "bus.conf").write_text(_BUS_CONFIG.format(directory / "bus"))
        bus = subprocess.Popen(["dbus-daemon", "--nofork", "--print-address", f"--config-file={directory / 'bus.conf'}"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        undo.callback(bus.wait)
        undo.callback(bus.kill)
        assert bus.stdout is not None
        yield _Stage(directory, namespace, bus.stdout.readline().strip())
