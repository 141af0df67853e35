"""A million talkers at once, or a million flows, from real packets on all CPUs: while the daemon reads them and works on them, its loop
stays free and its memory in bounds."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from statistics import median

from busfixture import ROOT
from conftest import CONFIG, World

from bench.path import Vary
from bench.stage import private_memory
from tests.lab import PYTHON, wait_for, within
from xdpmond.kernel import libbpf
from xdpmond.model import Family

MILLION = 1_000_000
MOST_LATE = 50
"""Milliseconds."""
MOST_MEMORY = 300_000_000
MOST_MEMORY_WITH_FLOWS = 750_000_000
WINDOWS = 3
AT_ONCE = 1 << 20
"""Packets of one system call."""

WATCHED = f"""
import asyncio, contextlib, os, runpy, sys, threading, time

files = {{}}

def waited():
    "Seconds that each thread of ours has waited for a processor."
    found = {{}}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            if thread not in files:
                files[thread] = open(f"/proc/self/task/{{thread}}/schedstat", "rb", buffering=0)
            files[thread].seek(0)
            found[thread] = int(files[thread].read().split()[1]) / 1e9
    return found

async def watch():
    "Tell how late this task comes to run, less what was waited for a processor: by its thread, and by the one that may have held the lock."
    own = str(threading.get_native_id())
    while True:
        before = waited()
        due = time.monotonic() + 0.002
        await asyncio.sleep(0.002)
        late = time.monotonic() - due
        waits = {{thread: seconds - before.get(thread, 0) for thread, seconds in waited().items()}}
        late -= waits.pop(own) + max(waits.values(), default=0)
        if late > 0.002:
            print(f"LATE {{late * 1000:.1f}} ms", file=sys.stderr)

async def both(main):
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch())
        await main
        watching.cancel()

run = asyncio.run
asyncio.run = lambda main: run(both(main))
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "xdpmond"
runpy.run_module("xdpmond", run_name="__main__")
"""
"""The daemon, with a task in its loop that tells when it had to wait for the daemon's other work."""


@contextmanager
def floods(program: int, namespace: str, ifindex: int) -> Iterator[None]:
    """Packets of a new source each, on every CPU, with what time the daemon leaves."""
    over = threading.Event()
    failed: list[BaseException] = []

    vary = Vary(Family.IPV4, None, program, ifindex)

    def shoot(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            while not over.is_set():
                within(namespace, partial(vary.run, AT_ONCE))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=shoot, args=[cpu]) for cpu in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
        vary.close()
    assert not failed, failed


@contextmanager
def memory_of(process: int) -> Iterator[list[int]]:
    """What a process takes, again and again."""
    found: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            found.append(private_memory(process, steady=False))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def test_a_million_talkers(world: World) -> None:
    check(world, "", [["ports", "--no-local"], ["top", "--prefix-len", "24", "--no-local"]], MOST_MEMORY)


def test_a_million_flows(world: World) -> None:
    """With a collector that takes what it gets; most flows of each window are over with it, and find no room in the cache."""
    with world.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        collector.bind(("127.0.0.1", 4739))
        settings = '[flows]\nenable = true\ninactive_timeout = "1s"\n[ipfix]\ncollector = "127.0.0.1:4739"\n'
        check(world, settings, [["flows", "--by", "packets"]], MOST_MEMORY_WITH_FLOWS)
        templates, flows = collector.recv(65536), collector.recv(65536)
        assert len(templates) < 1000 < len(flows)


def check(world: World, settings: str, questions: list[list[str]], most_memory: int) -> None:
    of_a_cpu = 1 << (MILLION // libbpf.possible_cpus()).bit_length()
    text = f'window = "2s"\nsummary_interval = "4s"\n{CONFIG}[tables]\ntalkers = {of_a_cpu}\n{settings}'
    config = world.lab.write("million.toml", text)
    log = world.lab.directory / f"million{len(settings)}.log"
    command = [PYTHON, "-c", WATCHED, "-c", str(config), "--bus", world.lab.bus.address]
    daemon = world.lab.spawn(world.host.inside(command), log)
    try:
        wait_for(lambda: " is ready" in log.read_text(), "the daemon")
        (interface,) = world.lab.status()["interfaces"]
        program = libbpf.program_by_id(interface["program_id"])
        seen: dict[int, int] = {}
        """Windows of a million, and how long the log was when they had been seen."""

        def full() -> bool:
            window = world.lab.status()["window"]
            if sum(window["unique_sources"].values()) >= MILLION and window["number"] not in seen:
                for question in questions:
                    assert world.lab.rows(*question)
                seen[window["number"]] = len(log.read_text())
            return len(seen) > WINDOWS

        with floods(program, world.host.path, interface["ifindex"]), memory_of(daemon.pid) as memory:
            wait_for(full, f"more than {WINDOWS} windows of a million talkers", 300)
        said, marks = log.read_text(), sorted(seen.values())
        late = [[float(found) for found in re.findall(r"LATE ([0-9.]+) ms", said[begin:end])] for begin, end in pairwise(marks)]
        assert any(late), "nobody watched"
        # What the daemon does it does in each window; what the machine does, such as taking its processors away, it does now and then.
        assert median(max(of_window, default=0) for of_window in late) < MOST_LATE, late
        assert max(memory) < most_memory, f"{max(memory) / 1e6:.0f} MB"
        os.close(program)
    finally:
        daemon.terminate()
        daemon.wait(60)
