"""A message bus of our own, with the shipped bus policy, and real programs as clients of it.

The bus is configured like Debian's system bus: nobody owns a name and nobody calls a method unless a policy file says so. So what the
tests see of `dbus/org.xdpmond1.conf` is what a system will make of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).resolve().parent / "fakeservice.py"
NOBODY = 65534
NAME, PATH, MANAGER = "org.xdpmond1", "/org/xdpmond1", "org.xdpmond1.Manager"

_CONFIG = """<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
  </policy>
  {includes}
</busconfig>
"""


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Return when the condition holds; fail with what was waited for. So long it takes nowhere but where something is wrong."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain: {what}")
        time.sleep(0.02)


def run_as(uid: int, command: list[str]) -> list[str]:
    if uid == 0:
        return command
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", *command]


class PrivateBus:
    """A dbus-daemon with its directory; `stop` and `start` are a bus that goes away and comes back at the same address.

    `mounts` are shell commands run in a mount namespace of its own for every process of this bus: other files in /etc, without
    touching the machine's.
    """

    def __init__(self, policies: tuple[Path, ...] = (ROOT / "dbus/org.xdpmond1.conf",), mounts: str = ""):
        self.directory = Path(tempfile.mkdtemp(prefix="xm-bus-"))
        self.directory.chmod(0o755)
        self.address = f"unix:path={self.directory}/socket"
        self.mounts = mounts
        self._config = self.directory / "bus.conf"
        includes = "\n  ".join(f"<include>{path}</include>" for path in policies)
        self._config.write_text(_CONFIG.format(socket=self.directory / "socket", includes=includes))
        self._daemon: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("DBUS_")}
        return kept | {
            "DBUS_SYSTEM_BUS_ADDRESS": self.address, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8",
        }  # fmt: skip

    def start(self) -> None:
        command = ["dbus-daemon", f"--config-file={self._config}", "--nofork", "--nopidfile", "--print-address"]
        self._daemon = subprocess.Popen(self._inside(command), stdout=subprocess.PIPE, text=True, env=self.environment,
                                        stderr=(self.directory / "bus.log").open("a"))  # fmt: skip
        assert self._daemon.stdout is not None
        assert self._daemon.stdout.readline().startswith("unix:"), (self.directory / "bus.log").read_text()

    def stop(self) -> None:
        if self._daemon is not None:
            end(self._daemon)
            self._daemon = None
            (self.directory / "socket").unlink(missing_ok=True)

    def signal(self, number: int) -> None:
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def close(self) -> None:
        for process in reversed(self._started):
            end(process)
        self.stop()
        shutil.rmtree(self.directory)

    def spawn(self, command: list[str], *, uid: int = 0, log: str) -> subprocess.Popen[str]:
        """Start a program that lives as long as the bus; its standard error goes to the log of that name in the directory."""
        with (self.directory / log).open("a") as stream:
            process = subprocess.Popen(self._inside(run_as(uid, command)), stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=stream,
                                       text=True, env=self.environment)  # fmt: skip
        self._started.append(process)
        return process

    def run(self, command: list[str], *, uid: int = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._inside(run_as(uid, command)), capture_output=True, text=True, env=self.environment, timeout=60,
                              check=False)  # fmt: skip

    def busctl(self, *arguments: str, uid: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run(["busctl", "--system", "--no-pager", *arguments], uid=uid)

    def call(self, method: str, *arguments: str, uid: int = 0, json: bool = False) -> subprocess.CompletedProcess[str]:
        """Call a method of the Manager by busctl, without interaction."""
        options = ["--allow-interactive-authorization=no", *(["--json=short"] if json else [])]
        return self.busctl(*options, "call", NAME, PATH, MANAGER, method, *arguments, uid=uid)

    def owned(self, name: str) -> bool:
        answer = self.busctl("call", "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameHasOwner", "s", name)
        return answer.stdout.strip() == "b true"

    def log(self, name: str) -> str:
        return (self.directory / name).read_text()

    def _inside(self, command: list[str]) -> list[str]:
        if not self.mounts:
            return command
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{self.mounts}\nexec "$@"', "sh", *command]


class FakeDaemon:
    """The real bus server before the hand-written service, as a process of its own."""

    def __init__(self, bus: PrivateBus, *, uid: int = 0):
        self.process = bus.spawn([sys.executable, str(FAKE), bus.address], uid=uid, log="daemon.log")
        self._bus = bus

    def wait_line(self, line: str) -> None:
        while got := read_line(self.process):
            if got == line:
                return
        raise AssertionError(f"the daemon did not come to '{line}':\n{self.log()}")

    def log(self) -> str:
        return self._bus.log("daemon.log")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def read_line(process: subprocess.Popen[str], seconds: float = 60.0) -> str:
    """The next line of its standard output; empty if it ends, or is silent for so long that it is killed for it."""
    assert process.stdout is not None
    watch = threading.Timer(seconds, process.kill)
    watch.start()
    try:
        return process.stdout.readline().strip()
    finally:
        watch.cancel()


def end(process: subprocess.Popen[str]) -> None:
    """End one process that was started here, and reap it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


@contextlib.contextmanager
def private_bus(**options: object) -> Iterator[PrivateBus]:
    bus = PrivateBus(**options)  # type: ignore[arg-type]
    try:
        bus.start()
        yield bus
    finally:
        bus.close()
