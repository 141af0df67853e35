"""Events from the ring to a file: what a daemon on one core keeps up with, and what it does when more come.

A flood through its own program makes them, on the other core: each packet a new source on no list, and no limit on events.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .flooding import flood
from .rows import Goal, Of, Row
from .stage import CONFIG, WATCHDOG_SECONDS, Stage, stage

TITLE = "events into a JSONL file, daemon on one core"

_RATE = 205_000
"""A little more than is asked for, so that what is kept up with lies above it."""
_SECONDS = 8.0
_FLOOD = 700_000
_CONFIG = """{}
[events]
interval = "1h"
per_second = 1000000
ring_size = 16777216

[journal]
events_per_minute = 0

[[log]]
path = "{}"
rotate_size = "0"
"""


def measure(rounds: int) -> Iterable[Row]:
    cpus = sorted(os.sched_getaffinity(0))
    with stage() as at:
        file = at.directory / "events.jsonl"
        at.configure(_CONFIG.format(CONFIG, file))
        yield from _kept_up(at, file, cpus)
        file.unlink()
        yield from _too_many(at, file, cpus)


def _kept_up(at: Stage, file: Path, cpus: list[int]) -> Iterable[Row]:
    with at.daemon(cpu=cpus[-1]) as daemon, flood(at, daemon) as attack:
        used = _cpu_seconds(daemon.pid)
        started = time.time()
        attack.on(cpus[0], lambda: attack.at_rate(_RATE, _SECONDS))
        made = attack.tallies()
        lines = _lines_once_written(file, made["made"])
        seconds = file.stat().st_mtime - started
        used = _cpu_seconds(daemon.pid) - used
    lost = made["made"] - lines + made["ring_full"]
    yield Row(f"written, of {_RATE:,} made a second for {_SECONDS:.0f} s", lines / seconds, "events/s",
              goal=Goal(200_000, Of.VALUE, at_least=True))  # fmt: skip
    yield Row("the same: lost", lost, "events", goal=Goal(0, Of.VALUE))
    yield Row("CPU time of the daemon for an event", used / lines * 1e6, "µs")


def _too_many(at: Stage, file: Path, cpus: list[int]) -> Iterable[Row]:
    with at.daemon(cpu=cpus[-1]) as daemon, flood(at, daemon) as attack:
        status: list[float] = []
        flooding = threading.Thread(target=attack.on, args=(cpus[0], lambda: attack.at_rate(_FLOOD, _SECONDS)))
        started = time.time()
        flooding.start()
        while flooding.is_alive():
            status.append(at.client("status"))
        flooding.join()
        beats = daemon.manager.signs_of_life
        silence = max(later - earlier for earlier, later in itertools.pairwise(beats))
        made = attack.tallies()
        # What was made is in the file or among the losses that the daemon names.
        lines = _lines_once_written(file, made["made"])
        seconds = file.stat().st_mtime - started
        told = _queue_losses(at)
    rest = made["made"] - lines - told
    yield Row(f"{_FLOOD:,} packets a second that each want an event: written a second", lines / seconds, "events/s")
    yield Row(f"the same: neither in the file ({lines:,}) nor told as lost (ring full {made['ring_full']:,}, queue full {told:,})", rest,
              "events", goal=Goal(0, Of.VALUE))  # fmt: skip
    yield Row("the same: longest between two signs of life to the watchdog", silence, "s", goal=Goal(WATCHDOG_SECONDS, Of.VALUE))
    yield Row("the same: xdpmonctl status meanwhile, worst", max(status), "s", goal=Goal(1.0, Of.VALUE))


def _queue_losses(at: Stage) -> int:
    """Events that the daemon took from the ring and could not keep in the file."""
    return sum(at.ask("status")["losses"]["log_queue"].values())


def _lines_once_written(file: Path, wanted: int) -> int:
    """Lines in the file, when there are as many as wanted, or when for a second no more have come."""
    lines, changed = 0, time.monotonic()
    for found in _counted(file):
        if found != lines:
            lines, changed = found, time.monotonic()
        if lines >= wanted or time.monotonic() - changed > 1:
            return lines
    raise AssertionError("unreachable")


def _counted(file: Path) -> Iterator[int]:
    """Lines so far, again and again."""
    lines = 0
    with file.open("rb") as reading:
        while True:
            while chunk := reading.read(1 << 20):
                lines += chunk.count(b"\n")
            yield lines
            time.sleep(0.01)


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
