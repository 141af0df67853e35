"""What the daemon tells of traffic: events, the stream of them, top, explain, and the periodic summary."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from conftest import CONFIG, DENIED4, DENIED6, PERMITTED4, UNLISTED4, UNLISTED6, Start, World
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from tests.lab import PYTHON, holds_pipe, wait_for

CLOCK_MONOTONIC_COARSE = 6

FIELDS = {
    "timestamp", "timestamp_iso", "interface", "vlan", "family", "src_ip", "dst_ip", "src_port", "dst_port", "protocol", "protocol_num",
    "packet_size", "action", "verdict", "rule", "suppressed", "flow_hash",
}  # fmt: skip


def events(world: World, **wanted: Any) -> list[dict[str, Any]]:
    """The recent events that have these values."""
    return [event for event in world.lab.rows("events") if all(event[key] == value for key, value in wanted.items())]


def event(world: World, **wanted: Any) -> dict[str, Any]:
    """The one such event, as soon as it is there."""
    wait_for(lambda: events(world, **wanted), f"an event with {wanted}")
    (found,) = events(world, **wanted)
    return found


def test_an_event_says_all_that_is_known(world: World, start: Start) -> None:
    start(CONFIG, "--enforce")
    before = time.time()
    world.net.datagrams(DENIED4.net, DENIED4.host, 53, [20])
    dropped = event(world, src_ip=DENIED4.net)
    assert set(dropped) == FIELDS
    assert before - 1 < dropped["timestamp"] < time.time() + 1
    assert abs(datetime.fromisoformat(dropped["timestamp_iso"]).timestamp() - dropped["timestamp"]) < 0.001
    known = {
        "interface": "eth0", "vlan": None, "family": "ipv4", "dst_ip": DENIED4.host, "dst_port": 53, "protocol": "udp", "protocol_num": 17,
        "packet_size": 62, "action": "DROP", "verdict": "deny", "rule": "203.0.113.0/24", "suppressed": 0,
    }  # fmt: skip
    assert {key: dropped[key] for key in known} == known
    assert dropped["src_port"] > 0
    world.net.ping(UNLISTED4.host, UNLISTED4.net, 1)
    logged = event(world, src_ip=UNLISTED4.net)
    assert (logged["action"], logged["verdict"], logged["rule"], logged["protocol"]) == ("LOG", "log", "default", "icmp")
    assert (logged["src_port"], logged["dst_port"]) == (None, None)
    assert world.passes(PERMITTED4)
    assert not events(world, src_ip=PERMITTED4.net)  # what is permitted makes none


def test_the_next_event_says_how_many_were_held_back(world: World, start: Start) -> None:
    start(CONFIG + '[events]\ninterval = "1s"')
    world.net.datagrams(UNLISTED4.net, UNLISTED4.host, 53, [10] * 8)
    first = event(world, src_ip=UNLISTED4.net)
    assert first["suppressed"] == 0

    def second() -> bool:
        world.net.datagrams(UNLISTED4.net, UNLISTED4.host, 53, [10])
        return len(events(world, src_ip=UNLISTED4.net)) >= 2

    wait_for(second, "the next event")
    following = events(world, src_ip=UNLISTED4.net)[1]
    sent = world.lab.rows("top")
    packets = sum(row["packets"] for row in sent if row["source"] == UNLISTED4.net)
    assert 7 <= following["suppressed"] < packets
    assert following["timestamp"] - first["timestamp"] > 0.9
    # Another port is another matter, and so is another verdict.
    world.net.datagrams(UNLISTED4.net, UNLISTED4.host, 54, [10])
    assert event(world, src_ip=UNLISTED4.net, dst_port=54)["suppressed"] == 0
    world.lab.ctl("deny", UNLISTED4.net)
    world.net.datagrams(UNLISTED4.net, UNLISTED4.host, 54, [10])
    assert event(world, src_ip=UNLISTED4.net, dst_port=54, verdict="deny")["action"] == "LOG"


def test_events_are_streamed_as_they_happen(world: World, start: Start, tmp_path: Path) -> None:
    start(CONFIG, "--enforce")
    world.net.datagrams(UNLISTED4.net, UNLISTED4.host, 1, [1])  # before anybody follows
    event(world, src_ip=UNLISTED4.net)
    streams = [tmp_path / "first", tmp_path / "second"]
    clients = [
        world.lab.spawn([PYTHON, "-m", "xdpmond.cli", "--bus", world.lab.bus.address, "-j", "events", "-f"], path) for path in streams
    ]
    for client in clients:
        wait_for(lambda pid=client.pid: holds_pipe(pid), "the stream")  # type: ignore[misc]
    world.net.datagrams(DENIED4.net, DENIED4.host, 2, [1])
    world.net.datagrams(DENIED6.net, DENIED6.host, 2, [1])
    for path in streams:
        wait_for(lambda path=path: path.read_text().count('"dst_port":2') == 2, "both events in the stream")  # type: ignore[misc]
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert {one["src_ip"] for one in found if one["dst_port"] == 2} == {DENIED4.net, DENIED6.net}
        assert not any(one["dst_port"] == 1 for one in found)
    first, second = clients
    first.kill()
    world.net.datagrams(UNLISTED6.net, UNLISTED6.host, 3, [1])
    wait_for(lambda: '"dst_port":3' in streams[1].read_text(), "the event, though another reader has gone")
    second.kill()


def spoof(world: World, count: int, first: int = 0xC6120000, port: int = 9) -> None:
    """One small datagram from each of so many sources of 198.18.0.0/15."""
    ether = Ether(src=world.net.mac("wire0"), dst=world.host.mac("eth0"))
    frame = bytearray(bytes(ether / IP(src="0.0.0.0", dst=UNLISTED4.host, len=28) / UDP(dport=port)))
    with world.net.raw("wire0") as raw:
        for number in range(count):
            frame[26:30] = (first + number).to_bytes(4, "big")
            raw.send(frame)


def test_a_flood_makes_few_events_and_every_loss_is_counted(world: World, start: Start) -> None:
    start('summary_interval = "0s"\n' + CONFIG + "[events]\nper_second = 50")
    world.net.datagrams(DENIED4.net, DENIED4.host, 2, [1])
    event(world, src_ip=DENIED4.net)
    began = time.monotonic()
    spoof(world, 20_000)
    wait_for(lambda: world.totals["logged"]["packets"] >= 20_000, "the flood to be counted")
    seconds = time.monotonic() - began
    status = world.lab.status()
    made = len([row for row in world.lab.rows("events") if row["src_ip"].startswith("198.1")])
    assert 0 < made <= 50 * 64 * (seconds + 2)
    losses = status["losses"]
    assert losses["over_budget"] + losses["merged"] + losses["ring_full"] + made >= 20_000
    assert losses["over_budget"] > 10_000
    evictions = status["tables"]["talkers"]["evictions"]
    unique = status["window"]["unique_sources"]["ipv4"]
    assert unique > 19_000 and unique + evictions > 20_000
    assert status["tables"]["talkers"]["exact"] is (evictions == 0)
    assert status["books"]["balanced"] and status["books"]["evicted"]["packets"] >= evictions


@contextlib.contextmanager
def on_one_cpu() -> Iterator[None]:
    """What this process sends then arrives on one CPU. Each has talkers and a budget of its own: what is known on one is new on another."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_a_source_that_was_known_is_heard_through_a_flood(world: World, start: Start) -> None:
    """A part of the budget is kept for it. A newcomer gets nothing of that in the same second."""

    def second() -> int:
        """As the kernel counts them for the budget."""
        return time.clock_gettime_ns(CLOCK_MONOTONIC_COARSE) // 1_000_000_000

    start('summary_interval = "0s"\nwindow = "1h"\n' + CONFIG + "[events]\nper_second = 50", "--enforce")
    with on_one_cpu():
        ports = range(2, 8)
        for port in ports:
            world.net.datagrams(DENIED4.net, DENIED4.host, port, [1])
        wait_for(lambda: len(events(world, src_ip=DENIED4.net, action="DROP")) == len(ports), "the events before the flood")
        world.lab.ctl("mode", "monitor")  # another outcome: the next packet is due to be told
        for port, first in zip(ports, itertools.count(0xC6120000, 1000), strict=False):
            began = second()
            spoof(world, 500, first)
            world.net.datagrams(DENIED4.net, DENIED4.host, port, [1])
            world.net.datagrams(UNLISTED4.net, UNLISTED4.host, port, [1])
            if second() == began:
                break
        else:
            raise AssertionError("each flood took longer than a second")
    event(world, src_ip=DENIED4.net, dst_port=port, action="LOG")
    assert not events(world, src_ip=UNLISTED4.net, dst_port=port)


def test_top_and_explain_tell_who_sent_what(world: World, start: Start) -> None:
    began = time.time()
    start('window = "1h"\n' + CONFIG)
    world.net.datagrams(UNLISTED4.net, UNLISTED4.host, 5000, [100] * 30)
    world.net.datagrams(UNLISTED6.net, UNLISTED6.host, 53, [1000] * 10)
    with world.host.listen(PERMITTED4.host, 8080), world.net.connect(PERMITTED4.net, PERMITTED4.host, 8080):
        pass
    top = world.lab.rows
    rows = {(row["source"], row["protocol"], row["port"]): row for row in top("top")}
    many, large = rows[UNLISTED4.net, "udp", 5000], rows[UNLISTED6.net, "udp", 53]
    assert (many["packets"], many["bytes"], many["syns"], many["verdict"], many["rule"]) == (30, 30 * 142, 0, "log", "default")
    assert (large["packets"], large["bytes"], large["family"]) == (10, 10 * 1062, "ipv6")
    assert rows[PERMITTED4.net, "tcp", 8080]["syns"] == 1
    assert rows[PERMITTED4.net, "tcp", 8080]["rule"] == "10.0.0.0/24"
    assert began - 1 < many["first_seen"] <= many["last_seen"] < time.time() + 1
    assert top("top", "--by", "bytes", "--limit", "1")[0]["source"] == UNLISTED6.net
    assert top("top", "--by", "packets")[0]["source"] == UNLISTED4.net
    assert top("top", "--by", "syn")[0]["source"] == PERMITTED4.net
    assert {row["port"] for row in top("top", "--port", "53")} == {53}
    assert {row["protocol"] for row in top("top", "--proto", "TCP")} == {"tcp"}
    assert top("top", "--interval") == []  # no window has ended yet

    said = world.lab.json("explain", UNLISTED4.net)
    assert (said["verdict"], said["action"], said["decided_by"], said["mode"]) == ("log", "LOG", None, "monitor")
    assert said["talkers"][0]["packets"] == 30
    said = world.lab.json("explain", DENIED4.net)
    assert (said["verdict"], said["action"], said["decided_by"]["prefix"]) == ("deny", "LOG", "203.0.113.0/24")
    assert said["talkers"] == []
    world.lab.ctl("mode", "enforce")
    assert world.lab.json("explain", DENIED4.net)["action"] == "DROP"


def test_ephemeral_ports_are_one(world: World, start: Start) -> None:
    """Answers to the host's own connections do not make a talker each; a port that is listened on stays itself."""
    first, last = (int(word) for word in world.host.run("sysctl", "-n", "net.ipv4.ip_local_port_range").stdout.split())
    with world.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind((UNLISTED4.host, last - 1))
        start('window = "1h"\n' + CONFIG)
        for port in (first, first + 1, first + 700, last - 5):
            world.net.datagrams(UNLISTED4.net, UNLISTED4.host, port, [10])
        world.net.datagrams(UNLISTED4.net, UNLISTED4.host, last - 1, [10, 10])
        rows = [row for row in world.lab.rows("top") if row["source"] == UNLISTED4.net and row["protocol"] == "udp"]
    assert sorted(row["packets"] for row in rows) == [2, 4]
    assert {row["port"] for row in rows if row["packets"] == 2} == {last - 1}


def packets_in_summaries(text: str, source: str) -> int:
    """How many packets of the source the summaries in this text name."""
    return sum(int(number.replace(",", "")) for number in re.findall(rf"{re.escape(source)} ([\d,]+) packets", text))


def test_a_summary_tells_of_its_interval_alone(world: World, start: Start) -> None:
    daemon = start('window = "1s"\nsummary_interval = "1s"\n' + CONFIG)
    assert world.passes(UNLISTED4)
    wait_for(lambda: packets_in_summaries(daemon.log, UNLISTED4.net) == 3, "the summary with the first source")
    at = len(daemon.log)
    assert world.passes(DENIED4)
    wait_for(lambda: packets_in_summaries(daemon.log[at:], DENIED4.net) == 3, "the summary with the second source")
    assert packets_in_summaries(daemon.log[at:], UNLISTED4.net) == 0
    assert world.lab.status()["window"]["length_seconds"] > 0.9
    assert world.lab.status()["books"]["balanced"]
