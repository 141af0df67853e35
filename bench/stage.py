"""A real daemon on a stage of its own: a network namespace with a veth pair, a private message bus, and a notify socket.

The daemon runs as under systemd: the notify socket keeps its descriptors, so that its programs and maps can be reached from here, and so
that a second start takes over from the first; and it is an ordinary user with three capabilities. (For root, BCC reads all the kernel's
symbols first.) It is installed as the package does it, with the bytecode beside the Python: each start and each call would otherwise
compile all of it, where a checkout has none, or only what somebody happened to run.
"""

from __future__ import annotations

import array
import compileall
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdpmond.kernel import libbpf

from .wire import namespace

CONFIG = """interface = "front"
allow = ["127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1", "fc00::/7", "fe80::/10"]
"""
"""What the shipped file says, but for the interface."""

WATCHDOG_SECONDS = 2
"""After which a service manager would take the daemon for dead. That of the unit is more patient."""

_USER = 65534  # nobody
_CAPABILITIES = "+bpf,+net_admin,+perfmon"  # those of the unit
_ROOT = Path(__file__).resolve().parents[1]
_READY_TIMEOUT = 60.0
_BUS_CONFIG = """<busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow eavesdrop="false"/></policy></busconfig>
"""
_MOST_DESCRIPTORS = 16  # in one message
_STOP, _MARK = "bench: stop", "bench: mark "  # messages of our own
_PARKED = 300  # where descriptors wait before they are put to 3 and following


def private_memory(pid: int, *, steady: bool = True) -> int:
    """USS in bytes without mappings of BPF maps: what the process alone would give back. At once, or when it no longer changes."""
    now, before, patience = _private(pid), -1, time.monotonic() + 10
    while steady and now != before and time.monotonic() < patience:
        time.sleep(0.5)
        now, before = _private(pid), now
    return now


def _private(pid: int) -> int:
    private, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = "anon_inode:bpf" not in line
        elif counts and line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1]) * 1024
    return private


class NotifySocket:
    """The service manager's side of sd_notify(3): waits for READY=1, and keeps what FDSTORE=1 brings.

    A thread reads it all the time, as a service manager does: a daemon that sends more than the socket holds would wait.
    """

    def __init__(self, path: Path):
        self.path = path
        self._store: list[tuple[str, int]] = []
        self._lock = threading.Condition()
        self._ready = False
        self.signs_of_life: list[float] = []
        """When the watchdog was told of one, by CLOCK_MONOTONIC."""
        self._reading = threading.Thread(target=self._read)

    def __enter__(self) -> NotifySocket:
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(self.path))
        self.path.chmod(0o666)
        self._reading.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._send(_STOP)
        self._reading.join()
        self._socket.close()
        for _, fd in self._store:
            os.close(fd)

    @property
    def store(self) -> list[tuple[str, int]]:
        """Name and descriptor of what was sent so far."""
        self._catch_up()
        with self._lock:
            return list(self._store)

    def attached_programs(self) -> set[int]:
        """Ids of the programs on the stored links."""
        return {libbpf.link_info(fd)[1] for name, fd in self.store if name.startswith("link-")}

    def expect(self) -> None:
        """Forget what an earlier process said of being ready."""
        self._catch_up()
        with self._lock:
            self._ready = False

    def wait_ready(self, daemon: int) -> None:
        end = time.monotonic() + _READY_TIMEOUT
        with self._lock:
            while not self._lock.wait_for(lambda: self._ready, 0.5):
                if os.waitpid(daemon, os.WNOHANG)[0]:
                    raise AssertionError("the daemon ended before it was ready")
                if time.monotonic() > end:
                    raise AssertionError(f"the daemon was not ready within {_READY_TIMEOUT:.0f} s")

    def _catch_up(self) -> None:
        """Return when all that was sent before has been read."""
        mark = f"{_MARK}{time.monotonic_ns()}"
        with self._lock:
            self._send(mark)
            self._lock.wait_for(lambda: self._marked == mark)

    _marked = ""

    def _send(self, text: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sending:
            sending.sendto(text.encode(), str(self.path))

    def _read(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS))
            text = data.decode()
            with self._lock:
                if text == _STOP:
                    return
                if text.startswith(_MARK):
                    self._marked = text
                else:
                    self._take(text.splitlines(), ancillary)
                self._lock.notify_all()

    def _take(self, lines: list[str], ancillary: list[tuple[int, int, bytes]]) -> None:
        name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "")
        for _, _, packed in ancillary:
            descriptors = array.array("i", packed[: len(packed) // 4 * 4])
            self._store += [(name, fd) for fd in descriptors]
        if "FDSTOREREMOVE=1" in lines:
            for entry in [entry for entry in self._store if entry[0] == name]:
                self._store.remove(entry)
                os.close(entry[1])
        self._ready = self._ready or "READY=1" in lines
        if "WATCHDOG=1" in lines:
            self.signs_of_life.append(time.monotonic())


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running one. `pid` is its process, `manager` holds its descriptors."""

    pid: int
    manager: NotifySocket
    seconds: float
    """From its start to READY=1."""

    def descriptor(self, name: str) -> int:
        """One that it stored: a program or a map, by its name in the descriptor store."""
        return next(fd for stored, fd in self.manager.store if stored == name)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the daemon runs."""

    directory: Path
    namespace: str
    bus: str

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")}
        return kept | {"PYTHONPATH": str(self.directory / "installed"), "PYTHONSAFEPATH": "1", "XDPMOND_BUS": self.bus}

    def configure(self, text: str = CONFIG) -> None:
        (self.directory / "xdpmond.toml").write_text(text)

    def forget(self) -> None:
        """Remove what a daemon keeps for the next one: the operator's entries."""
        shutil.rmtree(self.state)
        self.make_state()

    def make_state(self) -> None:
        self.state.mkdir()
        os.chown(self.state, _USER, _USER)

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @contextlib.contextmanager
    def daemon(self, cpu: int | None = None) -> Iterator[Daemon]:
        """One daemon from its start, with nothing kept, to its end; on one CPU if told so."""
        with NotifySocket(self.directory / "notify") as manager:
            daemon = self.start(manager, cpu)
            try:
                yield daemon
            finally:
                daemon.kill()

    def start(self, manager: NotifySocket, cpu: int | None = None) -> Daemon:
        """Start one with what the manager has stored."""
        manager.expect()
        kept = manager.store
        names = ":".join(name for name, _ in kept)
        environment = self.environment() | {
            "NOTIFY_SOCKET": str(manager.path), "STATE_DIRECTORY": str(self.state), "LISTEN_FDS": str(len(kept)),
            "LISTEN_FDNAMES": names, "WATCHDOG_USEC": str(WATCHDOG_SECONDS * 1_000_000),
        }  # fmt: skip
        pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
        as_user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", f"--inh-caps={_CAPABILITIES}",
                   f"--ambient-caps={_CAPABILITIES}", f"--bounding-set=-all,{_CAPABILITIES}", "--"]  # fmt: skip
        command = ["nsenter", f"--net=/run/netns/{self.namespace}", *pinned, *as_user, "sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh",
                   sys.executable, "-m", "xdpmond", "-c", str(self.directory / "xdpmond.toml")]  # fmt: skip
        started = time.monotonic()
        pid = _spawn(command, environment, [fd for _, fd in kept], self.directory / "daemon.log")
        try:
            manager.wait_ready(pid)
        except AssertionError as error:
            Daemon(pid, manager, 0).kill()
            raise AssertionError(f"{error}:\n{(self.directory / 'daemon.log').read_text()[-2000:]}") from None
        return Daemon(pid, manager, time.monotonic() - started)

    def client(self, *arguments: str | Path) -> float:
        """Run xdpmonctl, which must succeed; the seconds from its start to its exit."""
        started = time.monotonic()
        done = subprocess.run(self._client(arguments), env=self.environment(), capture_output=True, text=True, check=False)
        seconds = time.monotonic() - started
        if done.returncode:
            raise AssertionError(f"xdpmonctl {' '.join(map(str, arguments))} ended with {done.returncode}: {done.stderr}")
        return seconds

    def ask(self, *arguments: str) -> Any:
        """What xdpmonctl says in JSON."""
        command = self._client([*arguments, "--json=short"])
        return json.loads(subprocess.run(command, env=self.environment(), capture_output=True, check=True).stdout)

    def _client(self, arguments: Sequence[str | Path]) -> list[str]:
        return [sys.executable, "-m", "xdpmond.cli", *map(str, arguments)]

    def within(self, *command: str | Path) -> float:
        """Run a command in the network namespace, which must succeed; the seconds that it took."""
        started = time.monotonic()
        subprocess.run(["nsenter", f"--net=/run/netns/{self.namespace}", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
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


def _install(directory: Path) -> None:
    for part in ("xdpmond", "bpf"):
        shutil.copytree(_ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(directory, quiet=2)


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    with contextlib.ExitStack() as undo:
        # On a disk, as the state of a daemon is: /tmp may be memory.
        directory = Path(tempfile.mkdtemp(prefix="xm-bench-", dir="/var/tmp"))
        undo.callback(shutil.rmtree, directory)
        # Log files come here too.
        os.chown(directory, _USER, _USER)
        directory.chmod(0o755)
        _install(directory / "installed")
        name = undo.enter_context(namespace("stage"))
        for command in ("link add front type veth peer name wire", "link set front up", "link set wire up", "link set lo up"):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        (directory / "bus.conf").write_text(_BUS_CONFIG.format(directory / "bus"))
        bus = subprocess.Popen(["dbus-daemon", "--nofork", "--print-address", f"--config-file={directory / 'bus.conf'}"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        undo.callback(bus.wait)
        undo.callback(bus.kill)
        assert bus.stdout is not None
        undo.callback(bus.stdout.close)
        made = Stage(directory, name, bus.stdout.readline().strip())
        made.make_state()
        made.configure()
        yield made
