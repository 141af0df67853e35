"""From the packet path to a file: every event is in it once, or in a counted loss, however fast they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xdpmond.batch import EventBatch
from xdpmond.config import Log
from xdpmond.kernel.pump import EventPump
from xdpmond.messages import Record, event_fields
from xdpmond.model import Entry, Origin, Outcome, Prefix, Verdict
from xdpmond.policy import Policy
from xdpmond.sinks.logfile import LogFile

from .harness import Guns, Harness
from .packets import random_sources, tcp

DENIED = "10.0.0.0/8"
POLICY = Policy([Entry(Prefix.parse(DENIED), Verdict.DENY, Origin.OPERATOR)])


class Source:
    """The packet path as the pump knows it."""

    def __init__(self, datapath: Harness):
        assert datapath.ring is not None
        self.ring = datapath.ring

    def interface_of_slot(self, slot: int) -> str:
        return f"slot{slot}"


class Chain:
    """The pump and a log, put together as in the daemon."""

    def __init__(self, datapath: Harness, file: Path, capacity: int = 1 << 20):
        datapath.policy(deny=[DENIED])
        datapath.drain()
        self.taken = 0
        self.reports: list[Record] = []
        self.log = LogFile(Log(str(file), rotate_size=0, compress=False), capacity, self.reports.append)
        self.pump = EventPump(Source(datapath), lambda: POLICY.match_rows, self._publish)
        self.latest: EventBatch | None = None

    def _publish(self, batch: EventBatch) -> None:
        self.taken += len(batch)
        self.latest = batch
        self.log.put(batch)

    async def run_until(self, done: Callable[[], bool]) -> None:
        task = asyncio.create_task(self.pump.run())
        try:
            while not done():
                await asyncio.sleep(0.005)
                assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.wait([task])


def lines_of(file: Path) -> list[dict[str, object]]:
    text = file.read_bytes()
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def test_an_event_in_the_file_is_the_event_of_the_packet(datapath: Harness, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    chain = Chain(datapath, file)
    datapath.enforce()
    for frame in (tcp("10.1.2.3", 8443), tcp("2001:db8::7", 22), tcp("198.51.100.9", 80)):
        datapath.send(frame)
    asyncio.run(chain.run_until(lambda: chain.taken == 3))
    assert chain.latest is not None
    values = [event_fields(event) for event in chain.latest.values()]
    chain.log.close()
    first, second, third = lines_of(file)
    assert [first, second, third] == values
    assert (first["src_ip"], first["dst_port"], first["rule"], first["action"]) == ("10.1.2.3", 8443, DENIED, "DROP")
    assert (second["src_ip"], second["dst_port"], second["rule"], second["action"]) == ("2001:db8::7", 22, "default", "LOG")
    assert (third["interface"], third["protocol"], third["verdict"]) == (f"slot{datapath.slot}", "tcp", "log")
    assert first["timestamp_iso"] <= second["timestamp_iso"] <= third["timestamp_iso"]  # type: ignore[operator]


@pytest.mark.parametrize("capacity", [1 << 20, 1024], ids=["wide-queue", "narrow-queue"])
def test_every_packet_of_a_storm_is_accounted_for(
    datapath: Harness, shoot: Callable[..., Guns], cpus: list[int], tmp_path: Path, capacity: int
) -> None:
    """Producers on all CPUs outrun a small ring, and the ring a narrow queue. The books balance to the packet all the same."""
    file = tmp_path / "events.jsonl"
    chain = Chain(datapath, file, capacity)
    before, untold = datapath.counters.tallies(), datapath.suppressed()
    frames = [tcp(source) for source in ["10.0.0.1", "10.9.9.9", *random_sources(2000, seed=3)]]
    with shoot(datapath, frames, cpus) as guns:

        def enough() -> bool:
            assert guns.running()
            return chain.taken >= 20_000 and (capacity > 1024 or chain.log.lost_in_queue > 0)

        asyncio.run(chain.run_until(enough))
        # Nobody reads now, so the ring overflows.
        full = datapath.counters.tallies().ring_full
        while datapath.counters.tallies().ring_full == full:
            assert guns.running()
        shot = guns.stop()
    after = datapath.counters.tallies()
    made = after.events_made - before.events_made
    asyncio.run(chain.run_until(lambda: chain.taken >= made))
    chain.log.close()
    assert chain.taken == made
    lost = chain.log.lost_in_queue
    assert lost == 0 or capacity == 1024
    lines = lines_of(file)
    assert len(lines) == chain.log.written == made - lost
    assert chain.log.lost_on_disk == 0 and chain.reports == []
    ring_full, over_budget, merged = (getattr(after, name) - getattr(before, name) for name in ("ring_full", "over_budget", "merged"))
    told = sum(int(line["suppressed"]) for line in lines)  # type: ignore[call-overload]
    if not lost:  # what lost events would have told is not known
        # Some are left in the sampler although every packet may make an event: the clocks of two CPUs may be a tick apart.
        untold = datapath.suppressed() - untold
        assert made + ring_full + over_budget + merged + told + untold == int(shot.sent.sum())
    assert ring_full > 0
    # Each line is one of a packet that was sent, judged as it was.
    sources = {"10.0.0.1", "10.9.9.9", *random_sources(2000, seed=3)}
    assert {line["src_ip"] for line in lines} <= sources
    assert {line["rule"] for line in lines if str(line["src_ip"]).startswith("10.")} == {DENIED}
    assert {line["rule"] for line in lines if not str(line["src_ip"]).startswith("10.")} == {"default"}


def test_the_pump_takes_what_waits_in_bounded_turns(datapath: Harness) -> None:
    taken: list[np.ndarray] = []
    pump = EventPump(Source(datapath), lambda: POLICY.match_rows, lambda batch: taken.append(batch.rows["outcome"]))
    assert datapath.ring is not None
    for source in random_sources(100, seed=4):
        datapath.send(tcp(source))
    assert pump.turn(datapath.ring) == 100
    assert pump.turn(datapath.ring) == 0
    (outcomes,) = taken  # nothing is published for nothing
    assert set(outcomes.tolist()) <= {Outcome.DEFAULT_LOGGED}
