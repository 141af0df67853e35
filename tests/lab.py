"""A laboratory: network namespaces joined by veth pairs, a message bus of its own, and the real daemon and client in them.

Everything that is made here is removed when the laboratory closes, however that comes about: it is registered before it is made, its
removal does not mind if it is missing, and a second signal does not stop the removal. Programs that run in the background die with this
process even if it is killed. What a killed process cannot remove, its empty namespaces, the next laboratory does.

Sockets of this process can be in any namespace (`Space.socket`), so a test needs no helper program to send and receive.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.package.netns import open_socket, within
from tests.system.busfixture import NOBODY, PrivateBus, end, run_as, wait_for

__all__ = [
    "NOBODY", "PYTHON", "Daemon", "Interrupted", "Lab", "Ping", "Sent", "Space", "Witness", "holds_pipe", "interruptible", "laboratory",
    "sweep", "wait_for", "within",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
PREFIX = "xm-lab"
_NETNS = Path("/run/netns")
_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_numbers = itertools.count()


class Ping(NamedTuple):
    """What ping(8) counted."""

    sent: int
    received: int
    text: str

    @property
    def lost(self) -> int:
        return self.sent - self.received


class Sent(NamedTuple):
    """One frame as it left: the length without FCS; source address ("" if it is no IP packet), protocol number, and what follows the IP
    headers."""

    size: int
    source: str
    protocol: int
    payload: bytes

    @property
    def is_neighbour_discovery(self) -> bool:
        return self.protocol == 58 and 133 <= self.payload[0] <= 137


class Witness:
    """Sees every frame that an interface sends, from another place than the daemon: what the daemon must have counted."""

    _OUTGOING = 4  # PACKET_OUTGOING
    _SNAP = 128

    def __init__(self, space: Space, interface: str):
        self._socket = space.raw(interface)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.setblocking(False)
        while True:  # what was seen between its making and its binding
            try:
                self._socket.recv(self._SNAP)
            except BlockingIOError:
                break
            except OSError as error:  # told once, if the interface is still down
                if error.errno != errno.ENETDOWN:
                    raise
        self._frames: list[Sent] = []

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def frames(self) -> list[Sent]:
        """All since the beginning."""
        while True:
            try:
                size, _, _, address = self._socket.recvmsg_into([buffer := bytearray(self._SNAP)], 0, socket.MSG_TRUNC)
            except BlockingIOError:
                return self._frames
            if address[2] == self._OUTGOING:
                self._frames.append(self._understand(bytes(buffer), size))

    def _understand(self, frame: bytes, size: int) -> Sent:
        return _sent(frame, size)

    def count(self, *sources: str) -> tuple[int, int]:
        """Packets and bytes, of these sources or of all."""
        sizes = [frame.size for frame in self.frames() if not sources or frame.source in sources]
        return len(sizes), sum(sizes)


def _sent(frame: bytes, size: int) -> Sent:
    at, kind = 14, frame[12:14]
    while kind in (b"\x81\x00", b"\x88\xa8"):
        kind, at = frame[at + 2 : at + 4], at + 4
    if kind == b"\x08\x00":
        return Sent(size, socket.inet_ntop(socket.AF_INET, frame[at + 12 : at + 16]), frame[at + 9], frame[at + 20 :])
    if kind == b"\x86\xdd":
        protocol, rest = frame[at + 6], frame[at + 40 :]
        if protocol == 0:  # hop-by-hop options, as in each MLD report
            protocol, rest = rest[0], rest[8 + 8 * rest[1] :]
        elif protocol == 44:  # a fragment
            protocol, rest = rest[0], rest[8:]
        return Sent(size, socket.inet_ntop(socket.AF_INET6, frame[at + 8 : at + 24]), protocol, rest)
    return Sent(size, "", -1, b"")


class Space:
    """A network namespace."""

    def __init__(self, name: str):
        self.name = name
        self.path = str(_NETNS / name)

    def inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--", *command]

    def run(self, *command: str, check: bool = True, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; fail with what it said."""
        done = subprocess.run(self.inside(command), capture_output=True, text=True, timeout=seconds, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def ip(self, *lines: str) -> None:
        """Run lines of ip(8) in one go."""
        done = subprocess.run(self.inside(["ip", "-batch", "-"]), input="\n".join(lines), capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"ip in {self.name}: {done.stderr}")

    def sysctl(self, **settings: int) -> None:
        """Settings of net.*, with two underscores for a dot."""

        def write() -> None:
            for name, value in settings.items():
                Path("/proc/sys/net", *name.split("__")).write_text(str(value))

        within(self.path, write)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        return open_socket(self.path, family, kind, protocol)

    def raw(self, interface: str) -> socket.socket:
        """A socket whose `send` puts a whole frame on the wire, and whose `recv` sees all that come and go."""
        sock = self.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        within(self.path, lambda: sock.bind((interface, 0)))
        return sock

    def mac(self, interface: str) -> str:
        return str(json.loads(self.run("ip", "-json", "link", "show", interface).stdout)[0]["address"])

    def ping(self, target: str, source: str = "", count: int = 3, size: int = 56, wait: float = 5.0) -> Ping:
        """ping(8), fast. What is lost is waited for no longer than `wait` after the last one."""
        options = ["-c", str(count), "-i", "0.02", "-s", str(size), "-W", str(wait), *(["-I", source] if source else [])]
        done = self.run("ping", "-n", "-q", *options, target, check=False)
        found = re.search(r"(\d+) packets transmitted, (\d+) received", done.stdout)
        if found is None:
            raise AssertionError(f"ping {target}: {done.stdout}{done.stderr}")
        return Ping(int(found[1]), int(found[2]), done.stdout)

    def listen(self, address: str, port: int) -> socket.socket:
        """A listening TCP socket."""
        sock = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        return sock

    def connect(self, source: str, target: str, port: int, seconds: float = 10) -> socket.socket:
        sock = self.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(seconds)
        try:
            sock.bind((source, 0))
            sock.connect((target, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def datagrams(self, source: str, target: str, port: int, sizes: Sequence[int]) -> None:
        """Send datagrams with payloads of these sizes."""
        with self.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((source, 0))
            for size in sizes:
                sock.sendto(bytes(size), (target, port))


class Daemon:
    """A running xdpmond."""

    def __init__(self, lab: Lab, space: Space, config: Path, options: Sequence[str], environment: Mapping[str, str]):
        self.config = config
        self.log_file = lab.directory / f"daemon{next(_numbers)}.log"
        self.options = options
        command = space.inside([PYTHON, "-m", "xdpmond", "-c", str(config), "--bus", lab.bus.address, *options])
        self.process = lab.spawn(command, self.log_file, environment=environment)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_ready(self) -> None:
        wait_for(lambda: " is ready" in self.log or self.process.poll() is not None, "the daemon to be ready")
        if self.process.poll() is not None:
            raise AssertionError(f"xdpmond ended with {self.process.returncode}:\n{self.log}")

    def wait_log(self, *texts: str, count: int = 1, seconds: float = 60) -> None:
        """Until each text stands in the log that often."""
        for text in texts:
            try:
                wait_for(lambda text=text: self.log.count(text) >= count, f"{text!r} in the log", seconds)  # type: ignore[misc]
            except AssertionError as error:
                raise AssertionError(f"{error}:\n{self.log}") from None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


class _Bus(PrivateBus):
    """One that dies with us, even if we are killed."""

    def _inside(self, command: list[str]) -> list[str]:
        return [*_WITH_US, *super()._inside(command)]


class Lab:
    """Use it by `laboratory()`."""

    def __init__(self, *, bus: PrivateBus | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self._tag = f"{PREFIX}{os.getpid()}-{next(_numbers)}-"
        self._processes: list[subprocess.Popen[str]] = []
        self.spaces: list[Space] = []
        self.directory = Path(tempfile.mkdtemp(prefix="xm-lab-"))
        self.directory.chmod(0o755)
        self._stack.callback(self._delete_directory)
        self._stack.callback(self._delete_spaces)
        self.bus = bus or _Bus()
        self._stack.callback(self.bus.close)
        self._stack.callback(self._end_processes)

    @property
    def environment(self) -> dict[str, str]:
        """For programs in it. What Python compiles is kept here: not compiling it at each start saves a third of the tests' time."""
        return self.bus.environment | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.directory / "pycache")}

    # What is in it

    def space(self, name: str) -> Space:
        """A new network namespace with its loopback up."""
        space = Space(self._tag + name)
        self.spaces.append(space)
        _ip("netns", "add", space.name)
        space.ip("link set lo up")
        return space

    def veth(self, a: Space, name_a: str, b: Space, name_b: str, *, mtu: int = 1500, up: bool = True) -> None:
        """A cable between two namespaces."""
        options = ["mtu", str(mtu)]
        _ip("link", "add", name_a, *options, "netns", a.name, "type", "veth", "peer", "name", name_b, *options, "netns", b.name)
        if up:
            a.ip(f"link set {name_a} up")
            b.ip(f"link set {name_b} up")

    def write(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    def spawn(self, command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program that ends with the laboratory. It does not get the terminal's Ctrl-C: we end it, in our order."""
        with log.open("a") as stream:
            process = subprocess.Popen(
                [*_WITH_US, *command], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, text=True,
                start_new_session=True, env={**self.environment, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )  # fmt: skip
        self._processes.append(process)
        return process

    def daemon(self, space: Space, config: str, *options: str, ready: bool = True, name: str = "xdpmond.toml",
               environment: Mapping[str, str] | None = None) -> Daemon:  # fmt: skip
        """The real daemon in the foreground."""
        daemon = Daemon(self, space, self.write(name, config), options, environment or {})
        if ready:
            daemon.wait_ready()
        return daemon

    def ctl(self, *arguments: str, status: int | None = 0, uid: int = 0, input: str | None = None,
            environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run xdpmonctl on the laboratory's bus; fail if it ends otherwise than expected (None: however it likes)."""
        command = run_as(uid, [PYTHON, "-m", "xdpmond.cli", "--bus", self.bus.address, *arguments])
        where = {} if uid == 0 else {"PYTHONPATH": str(self.readable())}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, input=input, check=False, cwd="/",
                              env={**self.environment, **where, **(environment or {})})  # fmt: skip
        if status is not None and done.returncode != status:
            raise AssertionError(f"xdpmonctl {' '.join(arguments)} ended with {done.returncode}, not {status}:\n{done.stdout}{done.stderr}")
        return done

    def readable(self) -> Path:
        """A copy of the program that everybody may read: the checkout may lie in somebody's home."""
        copy = self.directory / "readable"
        if not copy.exists():
            for part in ("xdpmond", "bpf"):
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
        return copy

    def json(self, *arguments: str, input: str | None = None) -> Any:
        return json.loads(self.ctl("--json=short", *arguments, input=input).stdout)

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """What a listing command answers: an array, or JSON Lines."""
        answer = self.ctl("--json=short", *arguments).stdout
        return json.loads(answer) if answer.startswith("[") else [json.loads(line) for line in answer.splitlines()]  # type: ignore[no-any-return]

    def status(self) -> dict[str, Any]:
        return dict(self.json("status"))

    def interface(self, name: str) -> dict[str, Any]:
        """What the status says of one interface; empty if it does not name it."""
        return next((found for found in self.status()["interfaces"] if found["name"] == name), {})

    # Its end

    def close(self) -> None:
        with _deaf():
            self._stack.close()

    def _end_processes(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    process.terminate()
        for process in self._processes:
            end(process)

    def _delete_directory(self) -> None:
        """A child of a program that was killed may write to it to its own end, a moment later."""

        def gone() -> bool:
            shutil.rmtree(self.directory, ignore_errors=True)
            return not self.directory.exists()

        wait_for(gone, f"{self.directory} to be deleted")

    def _delete_spaces(self) -> None:
        for name in _space_names():
            if name.startswith(self._tag):
                _ip("netns", "delete", name, check=False)


@contextlib.contextmanager
def laboratory(**options: Any) -> Iterator[Lab]:
    sweep()
    lab: Lab | None = None
    try:
        with _later():
            lab = Lab(**options)
            lab.bus.start()
        yield lab
    finally:
        while lab is not None:
            with contextlib.suppress(Interrupted):
                lab.close()
                lab = None


def holds_pipe(pid: int) -> bool:
    """Has the process a pipe open? A client that follows events has one as soon as the daemon knows of it."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(path).startswith("pipe:"):
                return True
    return False


def sweep() -> None:
    """Delete the namespaces of laboratories whose process is dead."""
    for name in _space_names():
        found = re.match(rf"{PREFIX}(\d+)-", name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _ip("netns", "delete", name, check=False)


def _space_names() -> list[str]:
    return sorted(path.name for path in _NETNS.glob(f"{PREFIX}*"))


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"ip {' '.join(arguments)}: {done.stderr}")


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP become the exception `Interrupted`, so that what is open closes."""

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(number)

    with _handling(interrupt):
        yield


@contextlib.contextmanager
def _later() -> Iterator[None]:
    """A signal that comes meanwhile is heeded at the end: what is being made is then known."""
    came: list[int] = []
    with _handling(lambda number, _: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Signals are ignored: removing what was made is the answer to them. (Not SIG_IGN, which children would inherit.)"""
    with _handling(lambda *_: None):
        yield


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
