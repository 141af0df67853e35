"""A flood of a hundred million sources, each of one packet, through the real daemon's own program: what the daemon keeps stays within
bounds, it says what it could not keep, and no packet is missing from the totals.

The frames are run through the program by the kernel, as the interface's own, since no cable carries so many in a test.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import CONFIG, DENIED4, PERMITTED4, Start, World

from bench.path import Vary
from bench.stage import private_memory
from tests.lab import Daemon, wait_for, within
from xdpmond.kernel import libbpf
from xdpmond.model import Family

FLOOD = int(os.environ.get("XDPMOND_TEST_FLOOD", "100000000"))
MOST_MEMORY = 300_000_000
MOST_EVENTS = 100
"""A second and CPU."""
AT_ONCE = 1 << 22
"""Packets of one system call, in which a signal waits."""


def contents(state: Path) -> dict[str, bytes]:
    """Of all files that begin with the name of the state file."""
    return {path.name: path.read_bytes() for path in state.parent.iterdir() if path.name.startswith(state.name)}


class Watch(threading.Thread):
    """Looks at the daemon while the flood lasts: its memory, and how long it takes to answer."""

    def __init__(self, world: World, daemon: Daemon):
        super().__init__()
        self._world = world
        self._pid = daemon.pid
        self._over = threading.Event()
        self.memory = 0
        self.answers: list[float] = []

    def run(self) -> None:
        while not self._over.wait(0.2):
            self.memory = max(self.memory, private_memory(self._pid, steady=False))
            began = time.monotonic()
            self._world.lab.status()
            self.answers.append(time.monotonic() - began)

    def stop(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def watched(world: World, daemon: Daemon) -> Iterator[Watch]:
    watch = Watch(world, daemon)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


def windows_closed(world: World) -> int:
    return world.lab.status()["window"]["number"] or 0


def flood(world: World, packets: int) -> tuple[int, float]:
    """Send so many packets, each from another source, into eth0; return the length of each, and how many seconds it took."""
    (interface,) = world.lab.status()["interfaces"]
    program = libbpf.program_by_id(interface["program_id"])
    spoofer = Vary(Family.IPV4, None, program, interface["ifindex"])

    def send() -> float:
        began = time.monotonic()
        for sent in range(0, packets, AT_ONCE):
            spoofer.run(min(AT_ONCE, packets - sent))
        return time.monotonic() - began

    try:
        return len(spoofer.frame), within(f"/run/netns/{world.host.name}", send)
    finally:
        spoofer.close()
        os.close(program)


def test_a_hundred_million_sources(world: World, start: Start, tmp_path: Path) -> None:
    state = tmp_path / "state"
    settings = f"""
        window = "3s"
        summary_interval = "6s"
        {CONFIG}
        [events]
        per_second = {MOST_EVENTS}
        [[log]]
        path = "{tmp_path}/events.jsonl"
        rotate_size = "64K"
        keep = 2
        """
    daemon = start(settings, "--state", str(state))
    world.net.datagrams(DENIED4.net, DENIED4.host, 53, [10, 20])
    world.lab.ctl("deny", "198.51.100.77", "--reason", "kept")
    wait_for(lambda: world.entry("203.0.113.0/24")["packets"] == 2, "the packets before the flood")
    closed = windows_closed(world)
    wait_for(lambda: windows_closed(world) >= closed + 2, "the window in which they came to be over", 20)
    before, kept, log = world.lab.status(), contents(state), daemon.log
    assert before["window"]["exact"] and before["tables"]["talkers"]["exact"]

    with watched(world, daemon) as watch:
        size, seconds = flood(world, FLOOD)
    daemon.wait_log("the table of talkers is full")
    screen = world.lab.ctl("status").stdout
    # Those that are permitted and denied by name go on being told apart.
    world.net.datagrams(PERMITTED4.net, PERMITTED4.host, 53, [30])
    wait_for(lambda: world.totals["allowed"]["packets"] > before["totals"]["allowed"]["packets"], "a permitted packet after the flood")

    # Memory, files and lines
    assert 0 < watch.memory < MOST_MEMORY, f"{watch.memory / 1e6:.0f} MB"
    assert watch.answers and max(watch.answers) < 5, f"{max(watch.answers):.1f} s"
    assert contents(state) == kept
    logs = [path.stat().st_size for path in tmp_path.glob("events.jsonl*")]
    assert 1 <= len(logs) <= 4 and max(logs) < 1 << 17
    lines = daemon.log[len(log) :].splitlines()
    windows = seconds / 3 + 3
    assert len(lines) < MOST_EVENTS * os.cpu_count() * (seconds + 3) + 20 * windows
    assert max(map(len, lines)) < 1000
    assert 0 < sum("the table of talkers is full" in line for line in lines) <= windows / 2 + 1

    # What came is counted to the packet, and what could not be kept is said.
    status = world.lab.status()
    udp, udp_before = (of["totals"]["by_protocol"]["udp"] for of in (status, before))
    assert udp["packets"] - udp_before["packets"] == FLOOD + 1
    assert udp["bytes"] - udp_before["bytes"] == FLOOD * size + 42 + 30
    books = status["books"]
    assert books["balanced"]
    assert books["total"]["packets"] == books["tracked"]["packets"] + books["evicted"]["packets"] + books["untracked"]["packets"]
    talkers = status["tables"]["talkers"]
    assert talkers["entries"] <= talkers["capacity"] and not talkers["exact"]
    assert talkers["evicted"]["packets"] + talkers["untracked"]["packets"] == books["evicted"]["packets"] + books["untracked"]["packets"]
    assert talkers["evictions"] > FLOOD // 2
    assert len(talkers["slices"]) == libbpf.possible_cpus()
    assert sum(of["entries"] for of in talkers["slices"]) == talkers["entries"]
    assert status["losses"]["over_budget"] > FLOOD // 2

    # Lower bounds are called that.
    denied = world.entry("203.0.113.0/24")
    assert denied["packets"] >= 2 and denied["partial"]
    assert "≥" in world.lab.ctl("list").stdout
    assert re.search(r"^lost .*evicted", screen, re.MULTILINE)
    about = re.search(r"^top sources of about ([0-9,]+) ", screen, re.MULTILINE)
    assert about and int(about[1].replace(",", "")) > talkers["capacity"], "an estimate tells of more than the table holds"
    daemon.wait_log("; about ", " packets evicted, ")
    for packets, sources in re.findall(r"\b([0-9]+) packets, .*; about ([0-9]+) IPv4 and ", daemon.log):
        assert int(sources) < 1.05 * int(packets), "a summary tells of sources and packets of the same time"

    # After it, what is shown is exact again, and says so.
    wait_for(lambda: world.lab.status()["window"]["exact"], "two windows without losses", 20)
