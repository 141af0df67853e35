"""The main job on real packets, as a transcript to read: `sudo ./dev demo`.

A host and the net before it stand in network namespaces of their own, with a message bus and the real daemon; six sources, permitted,
denied and on no list, knock by ping, TCP and UDP, in monitor mode and then in enforce mode. What is printed below a `$` is what that
command really answered. The demo looks at what it shows, and ends with 1 if it is not what it should be.

The laboratory is that of the tests, and removes itself, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import AF_INET6, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, socket

from tests.lab import Daemon, Interrupted, Lab, Space, holds_pipe, interruptible, laboratory, wait_for

PROGRAMS = {"ip": "iproute2", "ping": "iputils-ping", "nsenter": "util-linux", "setpriv": "util-linux", "dbus-daemon": "dbus"}
MODULES = {"bcc": "python3-bpfcc", "dbus_next": "python3-dbus-next", "numpy": "python3-numpy", "pyroute2": "python3-pyroute2"}

CONFIG = """\
interface = "eth0"
allow     = ["10.0.0.0/8", "fd00::/8", "fe80::/10"]
deny      = ["203.0.113.0/24", { prefix = "2001:db8:bad::/48", reason = "sends spam" }]
"""


@dataclass(frozen=True)
class Source:
    address: str
    host: str
    """The address at which it knocks."""
    kind: str


SOURCES = (
    Source("10.0.0.2", "10.0.0.1", "permitted"),
    Source("fd00::2", "fd00::1", "permitted"),
    Source("203.0.113.9", "203.0.113.1", "denied"),
    Source("2001:db8:bad::9", "2001:db8:bad::1", "denied"),
    Source("198.51.100.7", "198.51.100.1", "unlisted"),
    Source("2001:db8:c::7", "2001:db8:c::1", "unlisted"),
)
STRANGER = SOURCES[4]
PINGS = 5
DATAGRAMS = 3
TCP_PORT, UDP_PORT = 80, 53


class Unexpected(Exception):
    """What the demo shows is not what it should be."""


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def heading(text: str) -> None:
    print(f"\n{bold(text)}\n{bold('-' * len(text))}", flush=True)


def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), 110), flush=True)


class Demo:
    def __init__(self, lab: Lab):
        self.lab = lab
        self.host, self.net = lab.space("host"), lab.space("net")
        for space in (self.host, self.net):
            # What a link says of itself while it comes up is over at once, and stays out of the picture.
            space.sysctl(ipv6__conf__default__accept_dad=0, ipv6__conf__default__mldv2_unsolicited_report_interval=1)
        lab.veth(self.host, "eth0", self.net, "net0")
        self.host.ip(*(_address(source.host, "eth0") for source in SOURCES))
        self.net.ip(*(_address(source.address, "net0") for source in SOURCES))
        self._stream = lab.directory / "events"
        self._shown = 0

    # The daemon and its client

    def start(self) -> Daemon:
        self.prompt("cat xdpmond.toml")
        print(CONFIG, end="")
        self.prompt("xdpmond -c xdpmond.toml &")
        daemon = self.lab.daemon(self.host, CONFIG)
        print(daemon.log.rstrip())
        return daemon

    def prompt(self, command: str) -> None:
        print(f"\n{bold('$ ' + command)}", flush=True)

    def ctl(self, *arguments: str, status: int = 0) -> None:
        """Show a call of xdpmonctl. It writes to where we write, so that on a terminal it looks as it does there."""
        self.prompt(f"xdpmonctl {shlex.join(arguments)}")
        command = [sys.executable, "-m", "xdpmond.cli", "--bus", self.lab.bus.address, *arguments]
        # A group of its own: Ctrl-C is for us.
        done = subprocess.run(command, env=self.lab.environment, stderr=subprocess.STDOUT, process_group=0, check=False)
        if status:
            print(f"[exit status {done.returncode}]", flush=True)
        if done.returncode != status:
            raise Unexpected(f"xdpmonctl {arguments[0]} ended with {done.returncode}, not {status}")

    def follow(self) -> None:
        """`xdpmonctl events -f`, in the background."""
        command = [sys.executable, "-m", "xdpmond.cli", "--bus", self.lab.bus.address, "--no-legend", "events", "-f"]
        client = self.lab.spawn(command, self._stream)
        # From the moment that it holds the pipe which the daemon hands out, no event passes it by.
        wait_for(lambda: holds_pipe(client.pid), "the event stream")

    def events(self, *sources: Source, action: str) -> None:
        """Show what the event stream said since the last time, when each source stands in it with each protocol."""

        def new() -> str:
            return self._stream.read_text()[self._shown :]

        def complete() -> bool:
            lines = [line for line in new().splitlines() if f" {action} " in line]
            return all(sum(f" {source.address}" in line or f"[{source.address}]" in line for line in lines) >= 3 for source in sources)

        self.prompt("xdpmonctl events -f")
        try:
            wait_for(complete, "the events", 5)
        except AssertionError:
            raise Unexpected(f"the event stream lacks sources:\n{new()}") from None
        text = new()
        self._shown += len(text)
        print(text.rstrip(), flush=True)

    # Traffic

    def knock(self, *dropped: Source) -> None:
        """All sources ping the host, connect to its web server and send it datagrams, at once. Those in `dropped` must get nothing
        through, all others everything."""
        with _services(self.host) as arrived, ThreadPoolExecutor(len(SOURCES)) as pool:
            results = list(pool.map(partial(self._knock_from, arrived), SOURCES))
        wrong = []
        print(f"\n{'SOURCE':<17}{'':<11}{'PING':<42}{'TCP/80':<13}UDP/53")
        for source, (sent, received, connected, datagrams) in zip(SOURCES, results, strict=True):
            ping = f"{sent} sent, {received} answered, {100 * (sent - received) // sent}% packet loss"
            tcp = "connected" if connected else "no answer"
            print(f"{source.address:<17}{source.kind:<11}{ping:<42}{tcp:<13}{datagrams} of {DATAGRAMS} arrived")
            wanted = (PINGS, 0, False, 0) if source in dropped else (PINGS, PINGS, True, DATAGRAMS)
            if (sent, received, connected, datagrams) != wanted:
                wrong.append(source.address)
        sys.stdout.flush()
        if wrong:
            raise Unexpected(f"not what the policy says of {', '.join(wrong)}")

    def _knock_from(self, arrived: Counter[str], source: Source) -> tuple[int, int, bool, int]:
        ping = self.net.ping(source.host, source.address, PINGS, wait=0.7)
        try:
            self.net.connect(source.address, source.host, TCP_PORT, seconds=0.7).close()
            connected = True
        except (TimeoutError, OSError):
            connected = False
        self.net.datagrams(source.address, source.host, UDP_PORT, [40] * DATAGRAMS)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: arrived[source.address] == DATAGRAMS, "the datagrams", 0.5)
        return ping.sent, ping.received, connected, arrived[source.address]

    # The story

    def tell(self) -> None:
        print(bold("xdpmond on real packets"))
        say("""
            A host with the interface eth0, and the net at the other end of its cable, each in a network namespace of its own. This
            machine's own network is not touched, and all of it is removed at the end.""")
        heading("1. The daemon starts, as shipped in monitor mode: it watches and drops nothing")
        daemon = self.start()
        self.follow()

        heading("2. Six sources knock. Everything passes, and what the lists do not permit is reported")
        self.knock()
        self.events(*SOURCES[2:], action="LOG")
        self.ctl("status")
        self.ctl("top", "--limit", "6")

        heading("3. Enforce mode: now what is denied by name is dropped")
        self.ctl("mode", "enforce")
        self.knock(*SOURCES[2:4])
        self.events(*SOURCES[2:4], action="DROP")

        heading("4. Who is this stranger? Shut it out for some seconds")
        self.ctl("explain", STRANGER.address)
        began = time.monotonic()
        self.ctl("deny", STRANGER.address, "--for", "6s", "--reason", "knocks too much")
        self.knock(*SOURCES[2:5])
        self.events(STRANGER, action="DROP")
        self.ctl("list")
        self.ctl("status")

        heading("5. Its time is over: it gets in again by itself")
        wait_for(lambda: self.net.ping(STRANGER.host, STRANGER.address, 1, wait=0.2).received, "the stranger to get in again")
        say(f"After {time.monotonic() - began:.1f} s:")
        self.knock(*SOURCES[2:4])

        heading("6. Nobody locks themselves out: somebody is logged in from 10.0.0.2, by a connection to port 22")
        with self.host.listen("10.0.0.1", 22), self.net.connect("10.0.0.2", "10.0.0.1", 22):
            self.ctl("deny", "10.0.0.0/24", status=7)

        heading("7. The daemon ends, and nothing of it stays")
        self.prompt("kill $(pidof -x xdpmond)")
        before = len(daemon.log)
        status = daemon.stop()
        print(daemon.log[before:].rstrip())
        link = self.host.run("ip", "link", "show", "eth0").stdout
        self.prompt("ip link show eth0")
        print(link.rstrip())
        if status or "xdp" in link:
            raise Unexpected(f"the daemon ended with {status}, and the interface is: {link}")


def _address(address: str, interface: str) -> str:
    return f"addr add {address}/{'64 nodad' if ':' in address else 24} dev {interface}"


@contextlib.contextmanager
def _services(host: Space) -> Iterator[Counter[str]]:
    """A web server that accepts and closes, and a name server that counts what it gets, by source."""
    arrived: Counter[str] = Counter()
    with _socket(host, SOCK_STREAM, TCP_PORT) as web, _socket(host, SOCK_DGRAM, UDP_PORT) as names, ThreadPoolExecutor(1) as pool:
        web.listen(64)
        names.settimeout(0.05)
        going = True

        def count() -> None:
            while going:
                with contextlib.suppress(TimeoutError):
                    arrived[names.recvfrom(2048)[1][0].removeprefix("::ffff:")] += 1

        counting = pool.submit(count)
        try:
            yield arrived
        finally:
            going = False
            counting.result()


def _socket(host: Space, kind: int, port: int) -> socket:
    """For both families."""
    sock = host.socket(AF_INET6, kind)
    sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    sock.bind(("::", port))
    return sock


def missing() -> Sequence[str]:
    """What the demo needs and does not find."""
    found = [f"{name} (package {package})" for name, package in PROGRAMS.items() if shutil.which(name) is None]
    found += [
        f"the Python module {name} (package {package})" for name, package in MODULES.items() if importlib.util.find_spec(name) is None
    ]
    if ctypes.util.find_library("bpf") is None:
        found.append("libbpf.so.1 (package libbpf1)")
    if not Path("/usr/include/linux/bpf.h").exists():
        found.append("the kernel's interface headers (package linux-libc-dev)")
    return found


def main() -> int:
    if os.geteuid() != 0:
        print("demo: this needs root: it makes network namespaces and loads a BPF program (sudo ./dev demo)", file=sys.stderr)
        return 2
    if lacking := missing():
        print("demo: not found:\n" + "\n".join(f"  {what}" for what in lacking), file=sys.stderr)
        print("'sudo ./dev demo' installs them on Debian", file=sys.stderr)
        return 2
    began = time.monotonic()
    try:
        with interruptible(), laboratory() as lab:
            Demo(lab).tell()
    except KeyboardInterrupt as end:
        print("\ndemo: interrupted; all that it made is removed", file=sys.stderr)
        return 128 + (end.number if isinstance(end, Interrupted) else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on; what Python still holds goes nowhere
        return 1
    except (Unexpected, AssertionError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    print(f"\nThat took {time.monotonic() - began:.0f} s. The namespaces, the bus and the daemon are removed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
