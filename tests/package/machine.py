"""A booted Debian with the package's dependencies, and a wire to it.

The machine is a systemd-nspawn container over an overlay of the cached tree: its own systemd as process 1, its own bus, its own network
with one interface, host0. The other end of that veth is in a namespace of its own, where the test has as many source addresses as it
likes. All is made by number and taken down by number; a test run that is killed takes the machine with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from . import netns, tree

T = TypeVar("T")

ADDRESS = {4: "10.77.0.1", 6: "2001:db8:77::1"}
"""The machine's."""
PERMITTED = {4: "10.77.0.2", 6: "fd77::2"}
"""Sources at the wire's end that the shipped configuration permits; the first is the machine's gateway."""
UNLISTED = {4: "198.51.100.7", 6: "2001:db8:1::7"}
"""On no list as shipped."""
VISITOR = {4: "192.0.2.33", 6: "2001:db8:2::33"}
"""On no list as shipped; tests allow it by name."""
ATTACKER = {4: "203.0.113.9", 6: "2001:db8:bad::9"}
"""On no list as shipped; tests deny it by name."""

SO_RCVBUFFORCE = 33
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def wait_for(what: str, condition: Callable[[], T | None], seconds: float = 90.0) -> T:
    """Ask until the condition returns something true, and return it; fail with its name and last value."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s for {what}; last seen: {value!r}")
        time.sleep(0.05)


class Wire:
    """The far end of the machine's cable: a namespace with one interface and the addresses above."""

    def __init__(self, name: str):
        self.name = name
        self.namespace = f"/run/netns/{name}"
        self.interface = ""

    def create(self) -> None:
        subprocess.run(["ip", "netns", "add", self.name], check=True)

    def plug(self, interface: str) -> None:
        """Take the interface (from the caller's namespace) in, and give it the addresses."""
        subprocess.run(["ip", "link", "set", interface, "netns", self.name], check=True)
        self.interface = interface
        commands = ["link set lo up", f"link set {interface} up", f"addr add {PERMITTED[4]}/24 dev {interface}",
                    f"addr add {PERMITTED[6]}/64 dev {interface} nodad", f"addr add 2001:db8:77::2/64 dev {interface} nodad"]  # fmt: skip
        for pair in (UNLISTED, VISITOR, ATTACKER):
            commands += [f"addr add {pair[4]}/32 dev {interface}", f"addr add {pair[6]}/128 dev {interface} nodad"]
        subprocess.run(["ip", "-n", self.name, "-batch", "-"], input="\n".join(commands) + "\n", text=True, check=True)

    def destroy(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)

    def run(self, *command: str, check: bool = True, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", "netns", "exec", self.name, *command], capture_output=True, text=True, check=check, timeout=seconds)

    def ping(self, source: str, *, count: int = 1, wait: int = 1) -> int:
        """Ping the machine from one of the addresses; how many answers came."""
        target = ADDRESS[6 if ":" in source else 4]
        done = self.run("ping", "-n", "-q", "-i", "0.02", "-c", str(count), "-W", str(wait), "-I", source, target, check=False)
        return int(done.stdout.split(" received")[0].rsplit(" ", 1)[-1]) if " received" in done.stdout else 0

    def connect(self, source: str, port: int, seconds: float = 2.0) -> socket.socket:
        """A TCP connection to the machine from one of the addresses."""
        family = 6 if ":" in source else 4
        link = netns.open_socket(self.namespace, socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_STREAM)
        link.settimeout(seconds)
        try:
            link.bind((source, 0))
            link.connect((ADDRESS[family], port))
        except BaseException:
            link.close()
            raise
        return link

    def raw(self) -> socket.socket:
        """A socket that sends whole frames."""
        link = netns.open_socket(self.namespace, socket.AF_PACKET, socket.SOCK_RAW)
        netns.within(self.namespace, lambda: link.bind((self.interface, 0)))
        return link

    def mac(self) -> str:
        shown = json.loads(self.run("ip", "-j", "link", "show", self.interface).stdout)
        return str(shown[0]["address"])


class Machine:
    """The booted container. `run` runs a command in it, as root or as a user of its own."""

    def __init__(self, copy: tree.Copy, tag: str):
        self.copy = copy
        self.tag = tag
        self.wire = Wire(f"{tree.NAMESPACE}{tag}")
        self.console = copy.root.parent / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0

    @property
    def namespace(self) -> str:
        return f"/proc/{self.leader}/ns/net"

    def boot(self) -> None:
        self.wire.create()
        name = f"xmp{self.tag}"[-11:]
        command = ["systemd-nspawn", f"--directory={self.copy.root}", "--boot", f"--machine={name}", "--private-network", "--network-veth",
                   "--capability=all", "--system-call-filter=bpf perf_event_open", "--register=no", "--keep-unit", "--quiet",
                   "--console=pipe"]  # fmt: skip
        with open(self.console, "ab") as console:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
            )
        self.leader = wait_for("process 1", self._find_leader)
        wait_for("the veth", lambda: Path(f"/sys/class/net/ve-{name}").exists())
        self.wire.plug(f"ve-{name}")
        wait_for("systemd's socket", lambda: self.run("test", "-S", "/run/systemd/private", check=False).returncode == 0)
        self.run("systemctl", "is-system-running", "--wait", check=False, seconds=300)
        for family in (4, 6):
            wait_for(f"the wire to carry IPv{family}", partial(self.wire.ping, PERMITTED[family]))

    def _find_leader(self) -> int:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended:\n{self.console.read_text(errors='replace')[-3000:]}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        return next((int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "systemd\n"), 0)

    def halt(self) -> None:
        """Shut down in order; whoever does not go is ended."""
        if self._nspawn is not None:
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.leader, signal.SIGKILL)
                self._nspawn.kill()
                self._nspawn.wait()
            self._nspawn = None
        self.wire.destroy()

    def reboot(self) -> None:
        """Down in order and up again over the same files."""
        self.halt()
        self.boot()

    def popen(self, *command: str, user: str = "", **options: Any) -> subprocess.Popen[str]:
        enter = ["nsenter", "-t", str(self.leader), "-a", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root",
                 "DEBIAN_FRONTEND=noninteractive"]  # fmt: skip
        if user:
            enter += ["runuser", "-u", user, "--"]
        return subprocess.Popen([*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    def run(self, *command: str, user: str = "", check: bool = True, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run to the end; with `check` a failure shows what was printed."""
        with self.popen(*command, user=user, stdin=subprocess.DEVNULL) as process:
            try:
                out, err = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                raise AssertionError(f"{shlex.join(command)} took longer than {seconds:g} s\n{out}{err}") from None
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        if check and done.returncode:
            raise AssertionError(f"{shlex.join(command)}: exit status {done.returncode}\n{out}{err}{self._journal_end()}")
        return done

    def _journal_end(self) -> str:
        if "xdpmond" not in self.run("ls", "/lib/systemd/system", check=False).stdout:
            return ""
        return self.run("journalctl", "-u", "xdpmond", "-n", "30", "--no-pager", "-o", "cat", check=False).stdout

    def json(self, *command: str, user: str = "") -> Any:
        return json.loads(self.run(*command, user=user).stdout)

    def write(self, path: str, text: str) -> None:
        """Write a file as the administrator would, as one rename."""
        script = f"umask 022; mkdir -p {Path(path).parent}; cat >{path}.new && mv {path}.new {path}"
        with self.popen("sh", "-c", script, stdin=subprocess.PIPE) as process:
            _, err = process.communicate(text)
        assert process.returncode == 0, err

    def install(self, deb: Path) -> subprocess.CompletedProcess[str]:
        """`apt install ./FILE`, as a person does it, without a network."""
        target = self.copy.root / "root" / deb.name
        target.write_bytes(deb.read_bytes())
        try:
            return self.run("apt-get", "install", "-qy", "-oDpkg::Use-Pty=0", "--no-install-recommends", f"/root/{deb.name}", seconds=180)
        finally:
            target.unlink()

    # What tests ask of the daemon.

    def ctl(self, *arguments: str, user: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("xdpmonctl", *arguments, user=user, check=check)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.json("xdpmonctl", "status", "--json=short")
        return status

    def unit(self, *properties: str) -> dict[str, str]:
        shown = self.run("systemctl", "show", "xdpmond.service", *(f"--property={name}" for name in properties)).stdout
        return dict(line.split("=", 1) for line in shown.splitlines())

    def main_pid(self) -> int:
        return int(self.unit("MainPID")["MainPID"])

    def program(self) -> int | None:
        """The id of the XDP program on host0 as the kernel tells it, None if there is none."""
        shown = json.loads(self.run("ip", "-j", "link", "show", "host0").stdout)
        xdp = shown[0].get("xdp")
        return int(xdp["prog"]["id"]) if xdp else None

    def entries(self) -> dict[str, dict[str, Any]]:
        """`list`, by prefix."""
        listed: Sequence[dict[str, Any]] = self.json("xdpmonctl", "list", "--json=short")
        return {entry["prefix"]: entry for entry in listed if entry.get("effective", True)}

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        lines = self.run("journalctl", "-u", "xdpmond", "-o", "json", "--all", "--no-pager", *matches).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def receiver(self, port: int, family: int = 4) -> socket.socket:
        """A UDP socket inside the machine's network that sees whatever gets past the front door, and keeps minutes of it."""
        link = netns.open_socket(self.namespace, socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        link.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 256 << 20)
        if family == 6:
            link.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        link.bind(("::" if family == 6 else "0.0.0.0", port))
        return link


_count = 0


@contextlib.contextmanager
def booted() -> Iterator[Machine]:
    """A fresh booted machine; gone at the end, whatever happened."""
    global _count
    _count += 1
    with tree.copy() as copy:
        machine = Machine(copy, f"{os.getpid()}-{_count}")
        try:
            machine.boot()
            yield machine
        finally:
            machine.halt()
