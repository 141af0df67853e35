"""Two hosts and a wire in the machine: this one, where the packet path runs, and "peer", a network namespace that sends to it."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from kernel.harness import COMPILED  # the one that the other tests have

from xdpmond.config import Config, Tables
from xdpmond.kernel.datapath import NOTHING_KEPT, Datapath
from xdpmond.kernel.links import Link, LinkWatch
from xdpmond.model import AttachMode, Count, Entry, Mode, Origin, Outcome, Prefix, ProtocolClass, Verdict
from xdpmond.policy import Policy

PEER = "peer"


def sh(command: str) -> None:
    """Run a command that must succeed; show what it said if it does not."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"`{command}` failed: {done.stdout}"


def on_peer(command: str) -> None:
    sh(f"ip netns exec {PEER} {command}")


def ping(address: str, *, source: str, count: int = 3, size: int = 56) -> bool:
    """Ping from the peer; True if every packet was answered, False if none was."""
    command = f"ip netns exec {PEER} ping -n -c {count} -i 0.2 -W 2 -M do -s {size} -I {source} {address}"
    done = subprocess.run(command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    received = next((int(word.split()[0]) for word in done.stdout.split(", ") if word.endswith(" received")), None)
    assert received in (0, count), f"some packets were answered, some not:\n{done.stdout}"
    return received == count


def find_link(name: str) -> Link:
    with contextlib.closing(LinkWatch()) as links:
        return links.links()[name]


Counts = dict[tuple[Outcome, ProtocolClass], Count]


def counts_of(datapath: Datapath) -> Counts:
    counts: Counts = {}
    for total in datapath.totals():
        key = total.outcome, total.protocol
        counts[key] = counts.get(key, Count()) + total.count
    return counts


class NoStore:
    """No descriptor store: what is not held is gone."""

    def keep(self, name: str, fd: int) -> None: ...

    def forget(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Watch:
    """The packet path on one interface, and what it had counted before it came there."""

    datapath: Datapath
    name: str
    mode: AttachMode
    before: Counts = field(default_factory=dict)

    def deny(self, *prefixes: str) -> None:
        denied = Policy(Entry(Prefix.parse(text), Verdict.DENY, Origin.OPERATOR) for text in prefixes)
        self.datapath.apply_policy(denied, None, Verdict.LOG)

    def undo_denials(self) -> None:
        self.datapath.apply_policy(Policy(), None, Verdict.LOG)

    def count(self, outcome: Outcome, protocol: ProtocolClass = ProtocolClass.ICMP) -> Count:
        """Of one protocol, so that what a host sends unasked (neighbour discovery, group membership) does not disturb."""
        return counts_of(self.datapath).get((outcome, protocol), Count()) - self.before.get((outcome, protocol), Count())

    def events(self, source: bytes) -> np.ndarray:
        """Take the events, and return those of a source."""
        assert self.datapath.ring is not None
        events = self.datapath.ring.read()
        wanted = np.frombuffer(source.ljust(16, b"\0"), "u1")
        return events[(events["source"] == wanted).all(axis=1)]


@pytest.fixture
def peer() -> Iterator[None]:
    """An empty namespace. What a test makes on this side goes when the peer's end of it goes."""
    sh(f"ip netns add {PEER}")
    yield
    sh(f"ip netns del {PEER}")


@pytest.fixture
def wire(peer: None) -> Iterator[str]:
    """A veth pair: `front` here, `wire` on the peer; up, without addresses."""
    sh(f"ip link add front type veth peer name wire netns {PEER}")
    sh("ip link set front up")
    on_peer("ip link set wire up")
    yield "front"
    sh("ip link del front")


@pytest.fixture(scope="session")
def datapath() -> Iterator[Datapath]:
    """Loaded once: that takes seconds under emulation."""
    config = dataclasses.replace(Config(), tables=Tables(talkers=4096, prefixes=1024, rule_counters=1024))
    datapath = Datapath.open(config, NOTHING_KEPT, NoStore(), COMPILED)
    # Each packet makes an event, whatever was sampled in the test before.
    datapath.control.set_events(0, 1_000_000)
    yield datapath
    datapath.close()


@pytest.fixture
def watch(datapath: Datapath) -> Iterator[Callable[[str, AttachMode], Watch]]:
    """Call it with an interface's name and a mode: the packet path, enforcing, with an empty policy and default = log."""

    def make(name: str, mode: AttachMode) -> Watch:
        assert datapath.ring is not None
        datapath.ring.read()
        before = counts_of(datapath)
        attached = datapath.attach(find_link(name), Mode.ENFORCE, mode)
        assert mode in (AttachMode.AUTO, attached.mode), attached.reason
        return Watch(datapath, name, attached.mode, before)

    yield make
    # Interfaces first: what cannot be undone may not keep the next test from its own.
    for name in datapath.attachments:
        datapath.release(name)
    datapath.apply_policy(Policy(), None, Verdict.LOG)
