"""The tools that people measure with, against the daemon: what it counts is what the sender says that it sent, to the packet and the byte,
also of what is dropped.

The sender's segmentation offloads are off: with them on, a frame of the sender is many packets or none of the wire's (docs/counting.md).
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import CONFIG, DENIED4, DENIED6, PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6, Ends, Start, World

from tests.lab import Witness, wait_for, within

ETHERNET, IPV4, IPV6, UDP, TCP, ICMP = 14, 20, 40, 8, 20, 8
ALL = 'window = "1h"\nsummary_interval = "0s"\n' + CONFIG


@pytest.fixture(autouse=True)
def segments_are_frames(world: World) -> None:
    for space, interface in ((world.net, "wire0"), (world.host, "eth0")):
        space.run("ethtool", "-K", interface, "tso", "off", "gso", "off", "gro", "off")


@pytest.fixture
def witness(world: World, witnessed: Callable[..., Witness]) -> Witness:
    return witnessed(ALL, "--enforce")


def sent_by_the_interface(world: World) -> tuple[int, int]:
    """Packets and bytes that the sender's interface says it has sent. The bytes are those of a veth pair whose other end has a program:
    they are counted there, behind the Ethernet header (drivers/net/veth.c, veth_xdp_rcv)."""
    sent = json.loads(world.net.run("ip", "-json", "-stats", "link", "show", "wire0").stdout)[0]["stats64"]["tx"]
    return sent["packets"], sent["bytes"] + ETHERNET * sent["packets"]


def lost_in_the_cable(world: World) -> int:
    """Packets that the sender's stack has handed over, and that found the ring of the other end full."""
    stats = json.loads(world.net.run("ip", "-json", "-stats", "link", "show", "wire0").stdout)[0]["stats64"]
    return int(stats["tx"]["dropped"])


def talker(world: World, source: str, protocol: str, port: int | None) -> tuple[int, int]:
    """Packets and bytes of a source on a port; of a protocol without ports, of all its types."""
    rows = [row for row in world.lab.rows("top", "--limit", "1000") if row["source"] == source and row["protocol"] == protocol]
    rows = [row for row in rows if row["port"] == port]
    return sum(row["packets"] for row in rows), sum(row["bytes"] for row in rows)


def counts(world: World, expected: tuple[int, int], of: Callable[[], tuple[int, int]]) -> None:
    """They come to be so, and nothing more comes after."""
    seen: list[Any] = []

    def equal() -> bool:
        seen[:] = [of()]
        return bool(seen[0] == expected)

    with contextlib.suppress(AssertionError):
        wait_for(equal, "the counts", 30)
    assert seen[0] == expected


def everything_is_counted(world: World, witness: Witness) -> None:
    """The totals are what was seen to leave the sender, dropped packets included."""
    assert lost_in_the_cable(world) == 0
    counts(world, (0, 0), lambda: difference(totals(world), witness.count()))
    status = world.lab.status()
    assert status["books"]["balanced"]
    assert status["books"]["evicted"]["packets"] == status["books"]["untracked"]["packets"] == 0


def totals(world: World) -> tuple[int, int]:
    of = world.totals
    return of["packets"], of["bytes"]


def difference(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] - b[0], a[1] - b[1]


@pytest.mark.parametrize(("ends", "header"), [(PERMITTED4, IPV4), (UNLISTED6, IPV6), (DENIED4, IPV4)])
def test_ping(world: World, witness: Witness, ends: Ends, header: int) -> None:
    ping = world.net.ping(ends.host, ends.net, 25, size=100, wait=0.5 if ends is DENIED4 else 5.0)
    assert ping.sent == 25
    assert ping.lost == (25 if ends is DENIED4 else 0)
    size = ETHERNET + header + ICMP + 100
    echoes = [frame for frame in witness.frames() if frame.size == size and frame.source == ends.net]
    assert len(echoes) == 25
    rows = [row for row in world.lab.rows("top", "--limit", "1000") if row["source"] == ends.net and row["packets"] == 25]
    assert [(row["bytes"], row["protocol"], row["icmp_type"]) for row in rows] == [
        (25 * size, "icmpv6", 128) if header == IPV6 else (25 * size, "icmp", 8)
    ]
    everything_is_counted(world, witness)


@pytest.mark.parametrize("ends", [UNLISTED4, DENIED4], ids=["passed", "dropped"])
def test_hping3(world: World, witness: Witness, ends: Ends) -> None:
    before = world.totals["dropped"]
    said = world.net.run("hping3", "-q", "-c", "300", "-i", "u500", "-S", "-p", "81", "-d", "17", "-a", ends.net, ends.host, check=False)
    found = re.search(r"(\d+) packets transmitted, (\d+) packets received", said.stdout + said.stderr)
    assert found, said
    assert int(found[1]) == 300
    size = ETHERNET + IPV4 + TCP + 17
    rows = [row for row in world.lab.rows("top", "--port", "81", "--limit", "10")]
    # the host answers with a reset, hping3's kernel says nothing to that
    assert [(row["source"], row["packets"], row["bytes"], row["syns"]) for row in rows] == [(ends.net, 300, 300 * size, 300)]
    dropped = world.totals["dropped"]
    wanted = (300, 300 * size) if ends is DENIED4 else (0, 0)
    assert difference((dropped["packets"], dropped["bytes"]), (before["packets"], before["bytes"])) == wanted
    everything_is_counted(world, witness)


@pytest.mark.parametrize("ends", [PERMITTED4, DENIED4, UNLISTED6, DENIED6], ids=["passed", "dropped", "passed6", "dropped6"])
def test_nping(world: World, witness: Witness, ends: Ends) -> None:
    ipv6 = ":" in ends.host
    # Over IPv6 its own sockets cannot learn the neighbour by themselves.
    macs = ["--source-mac", world.net.mac("wire0"), "--dest-mac", world.host.mac("eth0")]
    way = [*(["-6", *macs] if ipv6 else []), "-e", "wire0", "-S", ends.net]
    options = ["--udp", "-p", "5353", "-c", "120", "--rate", "400", "--data-length", "333", "-N", *way]
    said = world.net.run("nping", *options, ends.host, check=False).stdout
    found = re.search(r"Raw packets sent: (\d+) \(([\d.]+)(B|KB|MB)\)", said)
    assert found, said
    assert int(found[1]) == 120
    size = (IPV6 if ipv6 else IPV4) + UDP + 333
    own = float(found[2]) * {"B": 1, "KB": 1000, "MB": 1e6}[found[3]]
    frames = 120 * (ETHERNET + size)
    assert min(abs(own - frames), abs(own - 120 * size)) <= 1000, said  # rounded; with the link header or without, by how it was sent
    counts(world, (120, frames), lambda: talker(world, ends.net, "udp", 5353))
    everything_is_counted(world, witness)


def iperf3(world: World, ends: Ends, *options: str) -> dict[str, Any]:
    """One run from the net to the host; what the client says."""
    log = world.lab.directory / "iperf3.log"
    log.write_text("")
    server = world.lab.spawn(world.host.inside(["iperf3", "--server", "--one-off", "--bind", ends.host, "--forceflush"]), log)
    wait_for(lambda: "listening" in log.read_text(), "iperf3 to listen")
    said = world.net.run("iperf3", "--json", "--client", ends.host, "--bind", ends.net, *options)
    server.wait(60)
    return dict(json.loads(said.stdout)["end"])


@pytest.mark.parametrize("ends", [PERMITTED4, UNLISTED6])
def test_iperf3_over_tcp(world: World, witness: Witness, ends: Ends) -> None:
    # In small steps: the ring of a veth pair has 256 places.
    end = iperf3(world, ends, "--bytes", "5M", "--parallel", "2", "--length", "16K", "--fq-rate", "80M")
    assert end["sum_sent"]["bytes"] >= 5 << 20
    everything_is_counted(world, witness)
    frames = [frame for frame in witness.frames() if frame.source == ends.net and frame.protocol == 6]
    assert len(frames) > 3000
    counts(world, (len(frames), sum(frame.size for frame in frames)), lambda: talker(world, ends.net, "tcp", 5201))


@pytest.mark.parametrize("ends", [PERMITTED4, UNLISTED6])
def test_iperf3_over_udp(world: World, witness: Witness, ends: Ends) -> None:
    end = iperf3(world, ends, "--udp", "--bitrate", "40M", "--time", "1", "--length", "1000")
    packets, size = end["sum"]["packets"], ETHERNET + (IPV6 if ":" in ends.host else IPV4) + UDP
    assert packets > 100
    # and the one of 4 bytes by which a client of UDP makes itself known
    counts(world, (packets + 1, packets * (size + 1000) + size + 4), lambda: talker(world, ends.net, "udp", 5201))
    everything_is_counted(world, witness)


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = bytes(700_000)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def serving(world: World, server: Callable[[], http.server.HTTPServer]) -> Iterator[None]:
    web = within(world.host.path, server)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def test_curl(world: World, witness: Witness) -> None:
    with serving(world, lambda: http.server.HTTPServer((PERMITTED4.host, 8080), _Page)):
        for _ in range(3):
            said = world.net.run("curl", "--silent", "--fail", "--output", "/dev/null", "--write-out", "%{size_download} %{size_request}",
                                 "--interface", PERMITTED4.net, f"http://{PERMITTED4.host}:8080/")  # fmt: skip
            assert said.stdout.split()[0] == "700000"
    everything_is_counted(world, witness)
    counts(world, witness.count(PERMITTED4.net), lambda: add_up(world, PERMITTED4.net))
    row = next(row for row in world.lab.rows("top", "--port", "8080") if row["source"] == PERMITTED4.net)
    assert row["syns"] == 3


def add_up(world: World, source: str) -> tuple[int, int]:
    rows = [row for row in world.lab.rows("top", "--limit", "1000") if row["source"] == source]
    return sum(row["packets"] for row in rows), sum(row["bytes"] for row in rows)


def test_dig(world: World, witness: Witness) -> None:
    """Ten questions, each answered by whoever holds the port."""
    with world.host.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind((PERMITTED6.host, 53))
        server.settimeout(10)
        sizes = []

        def answer() -> None:
            for _ in range(10):
                question, client = server.recvfrom(4096)
                sizes.append(len(question))
                server.sendto(question[:2] + struct.pack(">H", 0x8183) + question[4:], client)

        thread = threading.Thread(target=answer)
        thread.start()
        for number in range(10):
            name = "x" * (number + 1)
            said = world.net.run("dig", f"@{PERMITTED6.host}", "-b", PERMITTED6.net, "+tries=1", "+timeout=5", f"{name}.example", "A")
            assert "NXDOMAIN" in said.stdout
        thread.join()
    counts(world, (10, sum(sizes) + 10 * (ETHERNET + IPV6 + UDP)), lambda: talker(world, PERMITTED6.net, "udp", 53))
    everything_is_counted(world, witness)


def test_the_interface_says_the_same(world: World, start: Start) -> None:
    """What a person compares with first: the sender's `ip -s link`, before and after."""
    start(ALL, "--enforce")
    before, own = totals(world), sent_by_the_interface(world)
    for ends in (PERMITTED4, DENIED4):
        world.net.datagrams(ends.net, ends.host, 9, [0, 1, 100, 1400] * 25)
    counts(world, (0, 0), lambda: difference(difference(totals(world), before), difference(sent_by_the_interface(world), own)))
    assert totals(world)[0] - before[0] >= 200
