"""Flows on their way to a collector: Debian's nfcapd receives them, nfdump reads them back, and they are what left the sender: the same
flows, to the packet and the byte of the IP packets.

The sender is the net at the other end of the cable. The collector is at the end of another one, so that the sender can fall silent before
the daemon ends.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import CONFIG, DENIED4, DENIED6, PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6, Ends, Start, World

from tests.borrowed import borrowed, environment
from tests.lab import Daemon, Sent, Space, Witness, wait_for, within

PORT = 4739
AT4, AT6 = "192.168.77.2", "fd77::2"
"""The collector."""
FLOWS = (
    CONFIG.replace('interface = "eth0"', 'interface = "eth0"\nwindow = "1s"\nsummary_interval = "0s"')
    + """
[flows]
enable = true
active_timeout = "{active}"
inactive_timeout = "2s"
[ipfix]
collector = "{collector}:4739"
template_interval = "1s"
"""
)
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58


class Flow(NamedTuple):
    """`ports`: source and destination; of ICMP type and code."""

    source: str
    destination: str
    protocol: int
    ports: tuple[int, int]


class Wire(Witness):
    """Knows the flows of all frames that the net has sent: by reading them itself."""

    def __init__(self, world: World):
        self._sums: Counter[tuple[Flow, str]] = Counter()
        super().__init__(world.net, "wire0")

    def _understand(self, frame: bytes, size: int) -> Sent:
        sent = super()._understand(frame, size)
        if sent.source:
            ipv4 = frame[12:14] == b"\x08\x00"
            family, at, width = (socket.AF_INET, 30, 4) if ipv4 else (socket.AF_INET6, 38, 16)
            length = int.from_bytes(frame[16:18], "big") if ipv4 else 40 + int.from_bytes(frame[18:20], "big")
            protocol, head = sent.protocol, sent.payload
            ports = (0, 0)
            if protocol in (TCP, UDP):
                ports = int.from_bytes(head[:2], "big"), int.from_bytes(head[2:4], "big")
            elif protocol in (ICMP, ICMPV6):
                ports = head[0], head[1]
            flow = Flow(sent.source, socket.inet_ntop(family, frame[at : at + width]), protocol, ports)
            self._sums[flow, "packets"] += 1
            self._sums[flow, "bytes"] += length
        return sent

    @property
    def flows(self) -> dict[Flow, tuple[int, int]]:
        """Packets and bytes of IP of each."""
        with contextlib.suppress(OSError):  # told once that the interface has gone down; what was sent before can still be read
            self.frames()
        self.frames()
        return {flow: (self._sums[flow, "packets"], self._sums[flow, "bytes"]) for flow, _ in self._sums}


class Collector:
    """nfcapd."""

    def __init__(self, world: World, space: Space, directory: Path, address: str):
        self._world, self._space, self._address = world, space, address
        self.files = directory / f"flows-{address.replace(':', '-')}"
        self.files.mkdir(exist_ok=True)
        self._tree = borrowed("nfdump")
        self._log = directory / "nfcapd.log"

    def start(self) -> None:
        nfcapd = [str(self._tree / "usr/bin/nfcapd"), "-6" if ":" in self._address else "-4", "-b", self._address, "-p", str(PORT),
                  "-w", str(self.files), "-t", "3600"]  # fmt: skip
        self._process = self._world.lab.spawn(self._space.inside(nfcapd), self._log, environment=environment(self._tree))
        wait_for(lambda: self._waiting() is not None or self._process.poll() is not None, "nfcapd to listen")
        assert self._process.poll() is None, self._log.read_text()

    def _waiting(self) -> int | None:
        """Bytes in its socket's queue; None: there is no such socket."""
        name = "udp6" if ":" in self._address else "udp"
        table = within(self._space.path, Path("/proc/thread-self/net", name).read_text)
        rows = [row.split() for row in table.splitlines()[1:]]
        return next((int(row[4].split(":")[1], 16) for row in rows if row[1].endswith(f":{PORT:04X}")), None)

    def stop(self) -> None:
        """When it has read all that came."""
        wait_for(lambda: self._waiting() == 0, "nfcapd to read what came")
        self._process.terminate()
        self._process.wait(60)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(60)

    def _dump(self, *options: str) -> str:
        nfdump = [str(self._tree / "usr/bin/nfdump"), "-R", str(self.files), *options]
        return subprocess.run(nfdump, env=environment(self._tree), capture_output=True, text=True, check=True, timeout=120).stdout

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(json.loads(self._dump("-o", "json")))

    @property
    def flows(self) -> dict[Flow, tuple[int, int]]:
        """Packets and bytes of each flow, over all its records."""
        sums: Counter[tuple[Flow, str]] = Counter()
        for record in self.records:
            family = "4" if "src4_addr" in record else "6"
            icmp = "icmp_type" in record
            ports = (record["icmp_type"], record["icmp_code"]) if icmp else (record.get("src_port", 0), record.get("dst_port", 0))
            flow = Flow(record[f"src{family}_addr"], record[f"dst{family}_addr"], record["proto"], ports)
            sums[flow, "packets"] += record["in_packets"]
            sums[flow, "bytes"] += record["in_bytes"]
        return {flow: (sums[flow, "packets"], sums[flow, "bytes"]) for flow, _ in sums}

    @property
    def sequence_failures(self) -> int:
        found = re.search(r"Sequence failures: (\d+)", self._dump("-I"))
        assert found
        return int(found[1])


@pytest.fixture(scope="module")
def elsewhere(world: World) -> Space:
    """Where the collector is."""
    space = world.lab.space("elsewhere")
    world.lab.veth(world.host, "eth1", space, "wire1")
    world.host.ip("addr add 192.168.77.1/24 dev eth1", "addr add fd77::1/64 dev eth1 nodad")
    space.ip(f"addr add {AT4}/24 dev wire1", f"addr add {AT6}/64 dev wire1 nodad")
    return space


@pytest.fixture
def collector(world: World, elsewhere: Space, tmp_path: Path) -> Iterator[Callable[[str], Collector]]:
    with contextlib.ExitStack() as made:
        yield lambda address: made.enter_context(contextlib.closing(Collector(world, elsewhere, tmp_path, address)))


def begin(world: World, start: Start, collector: str, *options: str, active: str = "1m") -> tuple[Daemon, Wire]:
    """A daemon, and somebody who has seen every frame that it has."""
    world.net.run("ethtool", "-K", "wire0", "tso", "off", "gso", "off")
    world.net.ip("link set wire0 down")
    address = f"[{collector}]" if ":" in collector else collector
    daemon = start(FLOWS.format(collector=address, active=active), *options)
    wire = Wire(world)
    world.net.ip("link set wire0 up")
    wait_for(lambda: "LOWER_UP" in world.net.run("ip", "link", "show", "wire0").stdout, "the cable to come up")
    assert world.passes(PERMITTED4, PERMITTED6)
    return daemon, wire


def end(world: World, daemon: Daemon, wire: Wire) -> dict[Flow, tuple[int, int]]:
    """Let the sender fall silent, and then end the daemon, with all that has not ended yet. Returns what was sent."""
    world.net.ip("link set wire0 down")
    sent = wire.flows
    assert daemon.stop() == 0
    world.net.ip("link set wire0 up")
    return sent


def talk(world: World, ends: Ends, sizes: range, port: int) -> None:
    """A connection in which so much is said in each segment, and its end."""
    with world.host.listen(ends.host, port) as listening, world.net.connect(ends.net, ends.host, port) as client:
        server, _ = listening.accept()
        with server:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for size in sizes:
                client.sendall(bytes(size))
                left = size
                while left:
                    left -= len(server.recv(left))
            server.sendall(b"that was all")
            assert client.recv(100)


def traffic(world: World) -> None:
    """Of all kinds; what is denied is dropped."""
    for ends in (PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6):
        talk(world, ends, range(1, 1400, 97), 5001)
        talk(world, ends, range(500, 520), 5001)
    for ends in (PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6, DENIED4, DENIED6):
        for port in (53, 5353, 40000):
            world.net.datagrams(ends.net, ends.host, port, range(0, 1400, 131))
        world.net.ping(ends.host, ends.net, 5, size=300, wait=0.3)


@pytest.mark.parametrize("address", [AT4, AT6], ids=["over IPv4", "over IPv6"])
def test_the_collector_has_the_same_flows_to_the_byte(
    world: World, start: Start, collector: Callable[[str], Collector], address: str
) -> None:
    nfcapd = collector(address)
    nfcapd.start()
    daemon, wire = begin(world, start, address, "--enforce")
    with wire:
        traffic(world)
        known = world.lab.rows("flows", "--limit", "1000")
        assert {(row["source"], row["verdict"], row["action"]) for row in known if row["port"] == 5353} == {
            *((ends.net, "allow", "PASS") for ends in (PERMITTED4, PERMITTED6)),
            *((ends.net, "log", "LOG") for ends in (UNLISTED4, UNLISTED6)),
            *((ends.net, "deny", "DROP") for ends in (DENIED4, DENIED6)),
        }
        losses = world.lab.status()["losses"]
        assert (losses["flow_cache"], losses["ipfix"]) == (0, 0)
        state = world.lab.status()["flows"]
        assert state["collector"] == (f"[{address}]:{PORT}" if ":" in address else f"{address}:{PORT}") and state["reachable"]
        assert 0 < state["records"] <= state["capacity"] == 262144
        sent = end(world, daemon, wire)
    nfcapd.stop()
    assert len(sent) >= 30
    assert nfcapd.flows == sent
    assert nfcapd.sequence_failures == 0


def test_a_record_says_when_how_and_where(world: World, start: Start, collector: Callable[[str], Collector]) -> None:
    nfcapd = collector(AT4)
    nfcapd.start()
    daemon, wire = begin(world, start, AT4)
    with wire:
        began = time.time()
        talk(world, PERMITTED4, range(100, 110), 5001)
        ended = time.time()
        index = world.lab.interface("eth0")["ifindex"]
        # It has ended by itself, and so has its record, before the daemon does.
        wait_for(lambda: not [row for row in world.lab.rows("flows") if row["port"] == 5001], "the record to end")
        end(world, daemon, wire)
    nfcapd.stop()
    (record,) = [record for record in nfcapd.records if record.get("dst_port") == 5001]
    assert record["tcp_flags"].replace(".", "") == "APSF", "those of all packets"
    assert record["input_snmp"] == index and record["direction"] == 0
    assert record["ip4_router"] == "192.168.77.1"
    first, last, received = (datetime.fromisoformat(record[key]).timestamp() for key in ("first", "last", "received"))
    # The kernel keeps them in units of 17 ms, by a clock that ticks every few.
    assert began - 0.1 < first <= last < ended + 0.1 and last < received < time.time() + 1


def test_a_flow_that_goes_on_makes_a_record_now_and_then(world: World, start: Start, collector: Callable[[str], Collector]) -> None:
    nfcapd = collector(AT4)
    nfcapd.start()
    daemon, wire = begin(world, start, AT4, active="2s")
    with wire, world.net.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((PERMITTED4.net, 0))
        seen: list[float] = []

        def goes_on() -> bool:
            sock.sendto(b"still here", (PERMITTED4.host, 5005))
            rows = [row for row in world.lab.rows("flows") if row["port"] == 5005]
            began = rows[0]["first_seen"] if rows else None
            if began is not None and (not seen or began > seen[-1]):
                seen.append(began)
            return len(seen) == 3

        wait_for(goes_on, "the third record to begin")
        sent = end(world, daemon, wire)
    nfcapd.stop()
    assert len([record for record in nfcapd.records if record.get("dst_port") == 5005]) >= 3
    assert nfcapd.flows == sent


def test_a_collector_that_comes_late_gets_what_waited(world: World, start: Start, collector: Callable[[str], Collector]) -> None:
    daemon, wire = begin(world, start, AT4)
    with wire:
        daemon.wait_log(f"the IPFIX collector {AT4}:{PORT} cannot be reached: Connection refused")
        talk(world, PERMITTED4, range(100, 110), 5001)
        wait_for(lambda: not [row for row in world.lab.rows("flows") if row["port"] == 5001], "the record to end")
        nfcapd = collector(AT4)
        nfcapd.start()
        daemon.wait_log(f"the IPFIX collector {AT4}:{PORT} is there again; 0 records of flows were lost to it")
        sent = end(world, daemon, wire)
    nfcapd.stop()
    assert daemon.log.count("cannot be reached") == 1
    assert nfcapd.flows == sent


def test_flows_that_are_off_say_so(world: World, start: Start) -> None:
    start()
    refused = world.lab.ctl("flows", status=1)
    assert "flows are off" in refused.stderr and "enable = true in [flows]" in refused.stderr
