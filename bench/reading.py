"""Reading a million live talkers while traffic runs, and what memory that takes; and what the maps cost.

The talkers are real ones: a flood on two cores has put them in the table, and one more goes on while it is read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from xdpmond import memory
from xdpmond.config import Config, Tables
from xdpmond.kernel.datapath import Datapath
from xdpmond.model import Family
from xdpmond.ports import count_ports
from xdpmond.rows import count_of, strongest

from .flooding import flood
from .path import Vary, load_ten, pinned, shipped_datapath
from .rows import Goal, Of, Row
from .stage import CONFIG, Daemon, Stage, private_memory, stage

TITLE = "reading a million talkers, and memory"

_TALKERS = 1_000_000
_SENT = 1_010_000
"""Some find no place."""
_ENTRIES = 1 << 20
"""Of each CPU's slice: half full."""
_CONFIG = f"""{CONFIG}
window = "5s"

[tables]
talkers = {_ENTRIES}
"""


def measure(rounds: int) -> Iterable[Row]:
    memory.configure()  # as the daemon does
    yield from _reading(max(3, min(5, rounds)))
    with stage() as at:
        at.configure(_CONFIG)
        with at.daemon() as daemon:
            yield from _memory_while_reading(at, daemon)
        at.configure()
        with at.daemon() as daemon:
            yield from _map_costs(at, daemon)


def _reading(rounds: int) -> Iterable[Row]:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    config = Config(tables=dataclasses.replace(Tables(), talkers=_ENTRIES))
    with shipped_datapath(config) as datapath, closing(Vary(Family.IPV4, None, datapath.loaded.programs["xdpmond"])) as vary:
        load_ten(datapath)
        used, held, counts = [], [], []
        for _ in range(rounds):
            datapath.close_window()  # with the talkers that came while the one before it was read
            for cpu in cpus:
                with pinned(cpu):
                    vary.run(_SENT // len(cpus))
            seconds, longest, rows = _read(datapath, vary, cpus[0])
            used.append(seconds)
            held.append(longest * 1e3)
            counts.append(rows)
    yield Row(f"{min(counts):,} talkers: totals, top 20, sources by port, while traffic runs", statistics.median(used), "s of CPU",
              goal=Goal(0.5, Of.VALUE))  # fmt: skip
    yield Row(f"the same: longest that the event loop was held, median of {rounds}", statistics.median(held), "ms", goal=Goal(50, Of.VALUE))


def _read(datapath: Datapath, vary: Vary, cpu: int) -> tuple[float, float, int]:
    """CPU seconds of one reading, the longest that an event loop beside it waited for its turn, and the rows that were read."""
    stop = threading.Event()

    def traffic() -> None:
        with pinned(cpu, alone=False):
            while not stop.is_set():
                vary.run(1 << 12)

    def read() -> tuple[float, int]:
        started = time.thread_time()
        rows = datapath.close_window().rows
        count_of(rows)
        strongest(rows, "bytes", 20)
        count_ports(rows)
        return time.thread_time() - started, len(rows)

    async def watched() -> tuple[float, float, int]:
        longest = 0.0
        reading = asyncio.ensure_future(asyncio.to_thread(read))
        while not reading.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before - 0.001)
        seconds, rows = await reading
        return seconds, longest, rows

    beside = threading.Thread(target=traffic)
    beside.start()
    try:
        return asyncio.run(watched())
    finally:
        stop.set()
        beside.join()


def _memory_while_reading(at: Stage, daemon: Daemon) -> Iterable[Row]:
    """Over some windows of a million talkers each, which the daemon reads at their end, while it is asked for the top too."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    peaks: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peaks.append(private_memory(daemon.pid, steady=False))

    with flood(at, daemon) as attack:
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            for _ in range(3):
                number = at.ask("status")["window"]["number"]
                for cpu in cpus:
                    attack.on(cpu, lambda: attack.burst(_TALKERS // len(cpus)))
                at.client("top")
                _wait(lambda number=number: (at.ask("status")["window"]["number"] or 0) > (number or 0))  # type: ignore[misc]
                at.client("top", "--interval")
        finally:
            stop.set()
            watching.join()
    yield Row(f"daemon: private memory while it reads {_TALKERS:,} talkers, peak", max(peaks) / 1e6, "MB", goal=Goal(300, Of.VALUE))


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("the daemon closed no window within a minute")
        time.sleep(0.1)


def _map_costs(at: Stage, daemon: Daemon) -> Iterable[Row]:
    """What status says that the maps cost, beside what the kernel charges for them."""
    charged = sum(_memlock(fd) for name, fd in daemon.manager.store if name.startswith("map-"))
    told = at.ask("status")["maps"]["bytes"]
    yield Row("maps, default tables: cost by the status (reference: charged by the kernel)", told / 1e6, "MB", charged / 1e6, Goal(1.0))
    yield Row("maps, default tables: difference of the two", abs(told - charged), "bytes", goal=Goal(0, Of.VALUE))


def _memlock(fd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("memlock:"))
