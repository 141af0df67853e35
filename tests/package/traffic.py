"""A stream of datagrams into the machine from several sources, counted at both ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from .machine import ADDRESS, Machine, wait_for

PAUSE = 0.001
"""Between two datagrams, in seconds."""


class Stream:
    """Datagrams from each source in turn, until the context ends. `sent` and `received` count by source.

    They go out as whole frames on the wire, so nothing on the sending side holds one back; they are received by an ordinary socket
    behind the machine's network stack.
    """

    def __init__(self, machine: Machine, sources: Sequence[str], port: int):
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._machine = machine
        self._port = port
        self._sources = sources
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> Stream:
        self._frames = [(source, frame_to(self._machine, source, self._port)) for source in self._sources]
        self._raw = self._machine.wire.raw()
        self._inside = [self._machine.receiver(self._port, family) for family in (4, 6)]
        self._thread.start()
        self.flow()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._collect()
        self._raw.close()
        for link in self._inside:
            link.close()

    def flow(self, count: int = 200) -> None:
        """Wait until each source has sent that many more."""
        start = self.sent.copy()
        wait_for("the stream", lambda: all(self.sent[source] - start[source] >= count for source in self._sources))

    def _send(self) -> None:
        while not self._end.wait(PAUSE):
            for source, frame in self._frames:
                self._raw.send(frame)
                self.sent[source] += 1

    def _collect(self) -> None:
        """veth hands a frame over before send() returns, or soon after when the receiving CPU polls: read until half a second is silent."""
        for link in self._inside:
            link.settimeout(0.5)
            while True:
                try:
                    _, peer = link.recvfrom(2048)
                except TimeoutError:
                    break
                self.received[peer[0]] += 1


def _frame(source: str, port: int, source_mac: str, target_mac: str) -> bytes:
    header = IPv6(src=source, dst=ADDRESS[6]) if ":" in source else IP(src=source, dst=ADDRESS[4])
    return bytes(Ether(src=source_mac, dst=target_mac) / header / UDP(sport=40000, dport=port) / b"front door")


def frame_to(machine: Machine, source: str, port: int) -> bytes:
    """A datagram to the machine, as a whole frame."""
    target = machine.run("cat", "/sys/class/net/host0/address").stdout.strip()
    return _frame(source, port, machine.wire.mac(), target)


def datagrams(machine: Machine, source: str, port: int, count: int) -> int:
    """Send so many datagrams from one source; how many got in."""
    family = 6 if ":" in source else 4
    frame = frame_to(machine, source, port)
    with machine.wire.raw() as raw, machine.receiver(port, family) as inside:
        for _ in range(count):
            raw.send(frame)
        inside.settimeout(0.5)
        received = 0
        while received < count:
            try:
                inside.recv(2048)
            except TimeoutError:
                break
            received += 1
    return received


def accepts(machine: Machine, source: str, port: int) -> bool:
    """Is a TCP connection from this source made?"""
    try:
        machine.wire.connect(source, port, seconds=1.5).close()
    except (TimeoutError, ConnectionError):
        return False
    return True
