"""A flood through a running daemon's own program, at a rate of our choosing: test runs in its namespace, each packet a new source."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np

from xdpmond.kernel import abi, libbpf
from xdpmond.model import Family

from .path import Vary, pinned
from .stage import Daemon, Stage
from .wire import within

_BURST_SECONDS = 0.005


class Flood:
    """IPv4 sources that are on no list; each CPU has sources of its own. To be used in one thread at a time for each CPU."""

    def __init__(self, at: Stage, daemon: Daemon):
        self._namespace = at.namespace
        self._cpus = daemon.descriptor("map-cpu")
        ifindex = within(at.namespace, socket.if_nametoindex, "front")
        self._vary = Vary(Family.IPV4, None, daemon.descriptor("prog-xdpmond"), ifindex)

    def close(self) -> None:
        self._vary.close()

    def burst(self, packets: int) -> None:
        """As fast as can be, on the calling thread's CPU and in its namespace."""
        self._vary.run(packets)

    def on(self, cpu: int, work: Callable[[], object]) -> None:
        """Do something on a CPU, in the namespace."""

        def there() -> None:
            with pinned(cpu, alone=False):
                work()

        within(self._namespace, there)

    def at_rate(self, per_second: int, seconds: float) -> float:
        """So many packets a second; returns the seconds that it really took."""
        started = time.monotonic()
        sent, wanted = 0, int(per_second * seconds)
        while sent < wanted:
            due = min(wanted, int((time.monotonic() - started + _BURST_SECONDS) * per_second))
            if due > sent:
                self.burst(due - sent)
                sent = due
            # This paces the packets; nothing is waited for.
            time.sleep(_BURST_SECONDS / 4)
        return time.monotonic() - started

    def tallies(self) -> dict[str, int]:
        """Events by what became of them in the packet path, since the start."""
        value = np.zeros(libbpf.possible_cpus(), abi.CPU)
        libbpf.lookup(self._cpus, np.zeros(1, "u4"), value)
        return {name: int(value["tallies"][f"events_{name}"].sum()) for name in ("made", "ring_full", "over_budget", "merged")}


@contextmanager
def flood(at: Stage, daemon: Daemon) -> Iterator[Flood]:
    with closing(Flood(at, daemon)) as made:
        yield made
