"""What the tests of the real daemon share. They need root, namespaces and a kernel with BPF; they pass over nothing.

The world is a host with the interface eth0, and a net at the other end of the cable, where each kind of source has an address: permitted,
denied and unlisted by `CONFIG`. Each test module has a world, each test daemons of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
for entry in (str(Path(__file__).resolve().parent), str(ROOT)):
    if entry not in sys.path:
        sys.path.insert(0, entry)

from tests.lab import Daemon, Lab, Witness, interruptible, laboratory, wait_for  # noqa: E402

CONFIG = """
interface = "eth0"
allow = ["10.0.0.0/24", "2001:db8:a::/64"]
deny = ["203.0.113.0/24", "2001:db8:bad::/64"]
"""


@dataclass(frozen=True)
class Ends:
    """A network that both ends of the cable have an address in."""

    net: str
    host: str
    length: int


PERMITTED4 = Ends("10.0.0.2", "10.0.0.1", 24)
PERMITTED6 = Ends("2001:db8:a::2", "2001:db8:a::1", 64)
DENIED4 = Ends("203.0.113.2", "203.0.113.1", 24)
DENIED6 = Ends("2001:db8:bad::2", "2001:db8:bad::1", 64)
UNLISTED4 = Ends("198.51.100.2", "198.51.100.1", 24)
UNLISTED6 = Ends("2001:db8:c::2", "2001:db8:c::1", 64)
EVERYWHERE = (PERMITTED4, PERMITTED6, DENIED4, DENIED6, UNLISTED4, UNLISTED6)


class World:
    """A host, a net, and the cable between them."""

    def __init__(self, lab: Lab, *, mtu: int = 1500):
        self.lab = lab
        self.host, self.net = lab.space("host"), lab.space("net")
        for space in (self.host, self.net):
            space.sysctl(ipv6__conf__default__accept_dad=0, ipv6__conf__default__keep_addr_on_down=1)
        self.cable(mtu=mtu)

    def cable(self, host: str = "eth0", net: str = "wire0", *, mtu: int = 1500) -> None:
        """Lay the cable; a second time after it was pulled."""
        self.lab.veth(self.host, host, self.net, net, mtu=mtu, up=False)
        self.host.ip(*_addresses(host, [ends.host for ends in EVERYWHERE]), f"link set {host} up")
        self.net.ip(*_addresses(net, [ends.net for ends in EVERYWHERE]), f"link set {net} up")
        wait_for(lambda: "LOWER_UP" in self.net.run("ip", "link", "show", net).stdout, "the cable to come up")

    def lost(self, ends: Ends, count: int = 3, wait: float = 5.0) -> int:
        """How many of so many pings get no answer."""
        return self.net.ping(ends.host, ends.net, count, wait=wait).lost

    def passes(self, *many: Ends) -> bool:
        return all(self.lost(ends) == 0 for ends in many)

    def drops(self, *many: Ends) -> bool:
        return all(self.lost(ends, wait=0.3) == 3 for ends in many)

    @property
    def totals(self) -> dict[str, Any]:
        return dict(self.lab.status()["totals"])

    def entry(self, prefix: str) -> dict[str, Any]:
        """The effective entry of a prefix, as list has it; empty if there is none."""
        return next((row for row in self.lab.rows("list") if row["prefix"] == prefix and row["effective"]), {})


def _addresses(interface: str, addresses: list[str]) -> list[str]:
    return [f"addr add {text}/64 dev {interface} nodad" if ":" in text else f"addr add {text}/24 dev {interface}" for text in addresses]


Start = Callable[..., Daemon]


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.exit("the system tests make network namespaces and need root: sudo ./dev check", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def closing_on_signals() -> Iterator[None]:
    """SIGTERM ends the tests as Ctrl-C does: with everything removed."""
    with interruptible():
        yield


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with laboratory() as lab:
        yield World(lab)


@pytest.fixture
def start(world: World) -> Iterator[Start]:
    """Start daemons on the world's host. They end with the test."""
    daemons: list[Daemon] = []

    def start(config: str = CONFIG, *options: str, **more: Any) -> Daemon:
        daemons.append(world.lab.daemon(world.host, config, *options, **more))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()
        assert "Traceback" not in daemon.log, daemon.log


@pytest.fixture
def witnessed(world: World, start: Start) -> Iterator[Callable[..., Witness]]:
    """Start a daemon, and a witness that has seen every frame that the daemon has: both begin before the cable carries one."""
    with contextlib.ExitStack() as stack:

        def both(*arguments: str) -> Witness:
            world.net.ip("link set wire0 down")
            start(*arguments)
            witness = stack.enter_context(Witness(world.net, "wire0"))
            world.net.ip("link set wire0 up")
            return witness

        yield both


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
