"""Who reached which port: real traffic from many addresses, against what a witness on the wire has seen."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import re
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from busfixture import NAME, read_line
from conftest import CONFIG, PERMITTED4, UNLISTED4, UNLISTED6, Start, World
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from tests.lab import Witness, wait_for
from tests.mmdb import encode

Watch = Callable[..., Witness]
LONG = CONFIG + 'window = "1h"\n'
MORE4 = [f"198.51.100.{number}" for number in range(10, 17)]
MORE6 = [f"2001:db8:c::{number}" for number in range(10, 15)]
LOCAL4 = ["10.0.0.50", "10.0.0.51"]
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


@pytest.fixture(scope="module")
def crowd(world: World) -> World:
    """The net with more addresses."""
    world.net.ip(*(f"addr add {text}/24 dev wire0" for text in MORE4 + LOCAL4),
                 *(f"addr add {text}/64 dev wire0 nodad" for text in MORE6))  # fmt: skip
    return world


def sctp(world: World, source: str, target: str, port: int) -> None:
    """One packet; the kernels of test machines have no SCTP of their own."""
    with world.net.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_RAW, 132) as sock:
        sock.bind((source, 0))
        sock.sendto(struct.pack("!HHII", 40000, port, 0, 0) + b"\x03\0\0\x10" + bytes(12), (target, 0))


def tcp(world: World, source: str, target: str, port: int) -> None:
    with world.net.connect(source, target, port) as sock:
        sock.sendall(b"hello")


@contextlib.contextmanager
def listening(world: World, *places: tuple[str, int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(world.host.listen(*place))
        yield


def crowd_sends(world: World) -> None:
    """Each port is reached by a number of sources of its own; two of them reach two ports."""
    with listening(world, (UNLISTED4.host, 2222), (UNLISTED4.host, 8080), (UNLISTED6.host, 2222), (PERMITTED4.host, 2222)):
        for source in MORE4[:5]:
            tcp(world, source, UNLISTED4.host, 2222)
        for source in MORE4[3:5]:
            tcp(world, source, UNLISTED4.host, 8080)
        for source in MORE6[:3]:
            tcp(world, source, UNLISTED6.host, 2222)
        for source in LOCAL4:
            tcp(world, source, PERMITTED4.host, 2222)
    for source in MORE4:
        world.net.datagrams(source, UNLISTED4.host, 5300, [10, 20])
    for source in MORE6[:4]:
        world.net.datagrams(source, UNLISTED6.host, 5300, [10])
    for source in MORE4[:2]:
        sctp(world, source, UNLISTED4.host, 3868)
    for source in MORE6[:2]:
        sctp(world, source, UNLISTED6.host, 3868)
    for source in MORE4[4:7]:
        world.net.ping(UNLISTED4.host, source, 1)
    for source in MORE6[3:5]:
        world.net.ping(UNLISTED6.host, source, 1)


OURS = [("tcp", 2222), ("tcp", 8080), ("udp", 5300), ("sctp", 3868), ("icmp", 8), ("icmpv6", 128)]
WANTED = {("tcp", 2222): (7, 3), ("tcp", 8080): (2, 0), ("udp", 5300): (7, 4), ("sctp", 3868): (2, 2), ("icmp", 8): (3, 0),
          ("icmpv6", 128): (0, 2)}  # fmt: skip


def by_port(witness: Witness, *, local: bool = True) -> dict[Any, tuple[set[str], int, int]]:
    """Sources, packets and bytes of each port by what was on the wire; of all under None."""
    found: dict[Any, Any] = defaultdict(lambda: (set(), [0], [0]))
    for frame in witness.frames():
        if not frame.source or not (local or not is_local(frame.source)):
            continue
        number: int | None = None
        if frame.protocol in (6, 17, 132):
            number = struct.unpack("!H", frame.payload[2:4])[0]
        elif frame.protocol in (1, 58):
            number = frame.payload[0]
        for key in (None, (PROTOCOLS.get(frame.protocol, str(frame.protocol)), number)):
            sources, packets, size = found[key]
            sources.add(frame.source)
            packets[0] += 1
            size[0] += frame.size
    return {key: (sources, packets[0], size[0]) for key, (sources, packets, size) in found.items()}


LOCAL = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "fe80::/10", "::/127")]


def is_local(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return any(address in network for network in LOCAL)


def families(sources: set[str]) -> tuple[int, int]:
    return sum(":" not in source for source in sources), sum(":" in source for source in sources)


def ports(world: World, *options: str) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    *rows, total = world.lab.rows("ports", *options)
    assert total["total"] is True
    return {(row["protocol"], row["icmp_type"] if row["port"] is None else row["port"]): row for row in rows}, total


def reconfigure(world: World, text: str) -> None:
    world.lab.write("xdpmond.toml", text)
    world.lab.ctl("reload")


def close_window(world: World, text: str) -> dict[str, Any]:
    """End the running window by making windows short, and make them long again; what the history says of it."""
    before = world.lab.status()
    began = before["windows"][-1]["ended"] if before["windows"] else before["running_since"]
    # Another window of this length cannot pass before they are long again.
    reconfigure(world, text.replace('"1h"', f'"{int(time.time() - began) + 3}s"'))
    wait_for(lambda: len(world.lab.status()["windows"]) > len(before["windows"]), "the window to close")
    reconfigure(world, text)
    windows = world.lab.status()["windows"]
    assert len(windows) == len(before["windows"]) + 1
    return dict(windows[-1])


def becomes(get: Callable[[], Any], wanted: Callable[[], Any]) -> None:
    """Hosts send a frame of their own now and then: hence the waiting."""
    seen: list[Any] = []

    def equal() -> bool:
        seen[:] = [get(), wanted()]
        return bool(seen[0] == seen[1])

    with contextlib.suppress(AssertionError):
        wait_for(equal, "the numbers to be the witness's", 30)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("flows", ["false", "true"])
def test_sources_are_exact_in_the_running_window_and_in_the_last(crowd: World, witnessed: Watch, flows: str) -> None:
    config = LONG + f"[flows]\nenable = {flows}\n"
    witness = witnessed(config)
    crowd_sends(crowd)

    def answered(*options: str, running: bool) -> dict[Any, tuple[int, int, int, int]]:
        shown, total = ports(crowd, *options)
        assert all(row["exact"] and row["error"] is None and row["running"]["exact"] for row in (*shown.values(), total))
        rows = {key: row["running"] if running else row | row["sources"] for key, row in [*shown.items(), (None, total)]}
        return {key: (row["ipv4"], row["ipv6"], row["packets"], row["bytes"]) for key, row in rows.items()}

    def on_the_wire(**options: bool) -> dict[Any, tuple[int, int, int, int]]:
        return {key: (*families(sources), packets, size) for key, (sources, packets, size) in by_port(witness, **options).items()}

    becomes(lambda: answered(running=True), on_the_wire)
    sent = on_the_wire()
    assert {key: sent[key][:2] for key in WANTED} == WANTED, "what the test meant to send"
    used = [key for key, (sources, _, _) in by_port(witness).items() if key and MORE4[3] in sources]
    assert {("tcp", 2222), ("tcp", 8080)} <= set(used), "a source on two ports"
    assert sum(of[0] for key, of in sent.items() if key) > sent[None][0], "counts once in the total"
    becomes(lambda: answered("--no-local", running=True), lambda: on_the_wire(local=False))
    assert answered("--no-local", running=True)["tcp", 2222][:2] == (5, 3)
    hidden = ports(crowd, "--no-local")[1]["hidden"]
    local = {frame.source for frame in witness.frames() if frame.source and is_local(frame.source)}
    assert hidden == {"local": dict(zip(("ipv4", "ipv6"), families(local), strict=True)), "ports": 0} and hidden["local"]["ipv4"] >= 2

    past = close_window(crowd, config)
    now = on_the_wire()
    closed = answered(running=False)
    assert {key: closed[key] for key in WANTED} == {key: sent[key] for key in WANTED}
    assert closed[None][:2] == now[None][:2] == (past["unique_sources"]["ipv4"], past["unique_sources"]["ipv6"])
    assert past["exact"] and past["packets"] >= closed[None][2] and past["dropped"] == 0
    alone, total = ports(crowd, "--interval")
    assert total["running"] is None and alone["tcp", 2222]["sources"] == {"ipv4": 7, "ipv6": 3}
    hidden_now = answered("--no-local", running=False)
    assert hidden_now["tcp", 2222][:2] == (5, 3) and hidden_now["udp", 5300] == sent["udp", 5300]


def test_the_ports_of_the_configuration(crowd: World, start: Start) -> None:
    start(LONG + 'ports = ["tcp/2222", "udp/5000-5999", "icmp"]\nshow_local = false\n')
    crowd_sends(crowd)
    becomes(lambda: set(ports(crowd)[0]), lambda: {("tcp", 2222), ("udp", 5300), ("icmp", 8)})
    shown, total = ports(crowd)
    assert (shown["tcp", 2222]["running"]["ipv4"], shown["tcp", 2222]["running"]["ipv6"]) == (5, 3)
    assert total["hidden"]["ports"] >= 2 and total["hidden"]["local"]["ipv4"] == len(LOCAL4)
    assert ports(crowd, "--local")[0]["tcp", 2222]["running"]["ipv4"] == 7
    *talkers, hidden = crowd.lab.rows("top", "--limit", "1000", "--port", "2222")
    assert {row["source"] for row in talkers} == {*MORE4[:5], *MORE6[:3]} and hidden == {"hidden": {"local": {"ipv4": 2, "ipv6": 0}}}
    assert {row["source"] for row in crowd.lab.rows("top", "--limit", "1000", "--port", "2222", "--local")} == {
        *MORE4[:5], *MORE6[:3], *LOCAL4}  # fmt: skip
    networks = crowd.lab.rows("top", "--port", "2222", "--prefix-len", "24", "--prefix-len6", "64", "--local")
    assert {row["source"]: row["sources"] for row in networks} == {"198.51.100.0/24": 5, "2001:db8:c::/64": 3, "10.0.0.0/24": 2}
    reconfigure(crowd, LONG)
    assert ("udp", 5300) in ports(crowd)[0] and ("sctp", 3868) in ports(crowd)[0], "what is counted did not depend on it"


def test_a_window_that_closes_is_announced(crowd: World, start: Start) -> None:
    monitor = crowd.lab.bus.spawn(["stdbuf", "-oL", "gdbus", "monitor", "--system", "--dest", NAME], log="monitor.log")
    start(CONFIG + 'window = "1s"\n')
    crowd_sends(crowd)
    announced: list[dict[str, str]] = []
    last_window: set[str] = set()
    while len(announced) < 4:
        line = read_line(monitor)
        assert line, "the monitor has ended, or heard nothing"
        if ".WindowClosed (" in line:
            announced.append({key: value.split()[-1] for key, value in re.findall(r"'(\w+)': <([^<>{}]+)>", line)})
        last_window.update(re.findall(r"'LastWindow': <uint64 (\d+)>", line))
    numbers = [int(of["number"]) for of in announced]
    assert numbers == list(range(numbers[0], numbers[0] + 4)) and {str(number) for number in numbers[:3]} <= last_window
    assert {"packets", "bytes", "dropped", "ipv4", "ipv6", "started", "ended"} <= announced[0].keys()
    history = {row["number"]: row for row in crowd.lab.status()["windows"]}
    for of in announced:
        row = history[int(of["number"])]
        assert int(of["packets"]) == row["packets"] and int(of["ipv4"]) == row["unique_sources"]["ipv4"] and of["exact"] == "true"
    assert sum(row["packets"] for row in history.values()) > 30, "the crowd came in some of them"


def flood(world: World, number: int, port: int) -> None:
    """One datagram each from so many addresses."""
    frame = bytes(Ether(src=world.net.mac("wire0"), dst=world.host.mac("eth0")) / IP(src="0.0.0.0", dst=UNLISTED4.host) / UDP(dport=port))
    with world.net.raw("wire0") as sock:
        for address in random.Random(4).sample(range(0x0B000000, 0xDF000000), number):
            sock.send(frame[:26] + address.to_bytes(4, "big") + frame[30:])


def test_more_sources_than_the_table_holds_are_estimated(crowd: World, start: Start) -> None:
    start(LONG + 'ports = ["udp/5300"]\n[tables]\ntalkers = 1024\n')
    flood(crowd, 20_000, 5300)
    (only,), total = ports(crowd)[0].values(), ports(crowd)[1]
    running = only["running"]
    assert not running["exact"] and running["error"] == 0.023 and only["exact"], "the last window has nothing to estimate"
    assert abs(running["ipv4"] - 20_000) < 5 * 0.023 * 20_000
    assert not total["running"]["exact"] and total["running"]["error"] is None and total["running"]["ipv4"] < 20_000
    status = crowd.lab.status()
    assert not status["window"]["exact"] and status["window"]["error"] == 0.0081
    assert abs(status["window"]["unique_sources"]["ipv4"] - 20_000) < 5 * 0.0081 * 20_000 + 20
    lost = status["tables"]["talkers"]
    assert lost["evicted"]["packets"] + lost["untracked"]["packets"] > 0 and status["books"]["balanced"]
    past = close_window(crowd, LONG + 'ports = ["udp/5300"]\n[tables]\ntalkers = 1024\n')
    assert not past["exact"] and past["error"] == 0.0081 and abs(past["unique_sources"]["ipv4"] - 20_000) < 1000
    (only,) = ports(crowd)[0].values()
    assert not only["exact"] and only["error"] == 0.023 and abs(only["sources"]["ipv4"] - 20_000) < 5 * 0.023 * 20_000
    assert only["running"]["exact"] and only["running"]["ipv4"] == 0, "a new window begins exactly"


BEYOND4, BEYOND6 = "172.30.0.2", "2001:db8:d::2"


@pytest.fixture
def forwarding(crowd: World) -> Iterator[World]:
    """The host passes on what is for a network beyond it."""
    beyond = crowd.lab.space("beyond")
    crowd.lab.veth(crowd.host, "eth1", beyond, "wire1")
    crowd.host.ip("addr add 172.30.0.1/24 dev eth1", "addr add 2001:db8:d::1/64 dev eth1 nodad")
    beyond.ip(f"addr add {BEYOND4}/24 dev wire1", f"addr add {BEYOND6}/64 dev wire1 nodad", "route add default via 172.30.0.1",
              "route add default via 2001:db8:d::1")  # fmt: skip
    crowd.net.ip(f"route add 172.30.0.0/24 via {UNLISTED4.host}", f"route add 2001:db8:d::/64 via {UNLISTED6.host}")
    crowd.host.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    yield crowd
    crowd.host.sysctl(ipv4__ip_forward=0, ipv6__conf__all__forwarding=0)
    crowd.net.ip("route del 172.30.0.0/24", "route del 2001:db8:d::/64")
    crowd.host.ip("link del eth1")


def test_what_is_only_forwarded_is_left_out_on_request(forwarding: World, start: Start) -> None:
    world = forwarding

    def send() -> None:
        for source in MORE4[:3]:
            world.net.datagrams(source, BEYOND4, 5400, [10, 10])
        world.net.datagrams(MORE6[0], BEYOND6, 5400, [10])
        world.net.datagrams(MORE4[3], "172.30.0.1", 5400, [10])  # an address of the host's own, on another interface
        world.net.datagrams(MORE4[0], UNLISTED4.host, 5300, [10])
        assert world.net.ping(BEYOND4, MORE4[4], 2).received == 2

    def counted() -> dict[Any, tuple[int, int, int]]:
        shown, _ = ports(world)
        return {key: (row["running"]["ipv4"], row["running"]["ipv6"], row["running"]["packets"]) for key, row in shown.items()
                if key in (("udp", 5400), ("udp", 5300), ("icmp", 8))}  # fmt: skip

    daemon = start(LONG)
    send()
    becomes(counted, lambda: {("udp", 5400): (4, 1, 8), ("udp", 5300): (1, 0, 1), ("icmp", 8): (1, 0, 2)})
    assert world.lab.status()["books"]["elsewhere"]["packets"] == 0
    daemon.stop()
    start(LONG + 'destination = "local"\n')
    send()
    becomes(counted, lambda: {("udp", 5400): (1, 0, 1), ("udp", 5300): (1, 0, 1)})
    books = world.lab.status()["books"]
    assert books["elsewhere"]["packets"] == 9 and books["balanced"], "the totals have them all the same"
    assert world.totals["by_protocol"]["udp"]["packets"] == 9 and world.totals["by_protocol"]["icmp"]["packets"] == 2


def named(world: World, source: str) -> tuple[Any, ...]:
    (row,) = world.lab.rows("top", "--limit", "1000", "--port", "5300", "--proto", "udp")
    assert row["source"] == source
    return row["country"], row["as_number"], row["as_name"]


def test_names_of_talkers(crowd: World, start: Start, tmp_path: Path) -> None:
    country, asn = tmp_path / "country.mmdb", tmp_path / "asn.mmdb"
    text = LONG + f'[names]\ncountry = "{country}"\nasn = "{asn}"\n'
    daemon = start(text)  # neither file is there yet
    daemon.wait_log(f"names.country: {country}: No such file or directory")
    crowd.net.datagrams(MORE4[0], UNLISTED4.host, 5300, [10])
    becomes(lambda: named(crowd, MORE4[0]), lambda: (None, None, None))
    refused = crowd.lab.ctl("reload", status=6).stderr
    assert f"names.country: {country}: No such file or directory" in refused

    country.write_bytes(encode({"198.51.100.0/24": {"country": {"iso_code": "NO"}}}, kind="GeoLite2-Country"))
    asn.write_bytes(encode({"198.51.100.0/24": {"autonomous_system_number": 64500, "autonomous_system_organization": "Example"}},
                           kind="GeoLite2-ASN"))  # fmt: skip
    crowd.lab.ctl("reload")
    assert named(crowd, MORE4[0]) == ("NO", 64500, "Example")
    explained = crowd.lab.json("explain", MORE4[0])
    assert (explained["country"], explained["as_name"], explained["talkers"][0]["country"]) == ("NO", "Example", "NO")
    assert "  NO, AS64500 Example" in crowd.lab.ctl("explain", MORE4[0]).stdout
    assert [row["country"] for row in crowd.lab.status()["top"] if row["source"] == MORE4[0]] == ["NO"]

    country.write_bytes(b"not a database")
    assert "is not a database that can be read" in crowd.lab.ctl("reload", status=6).stderr
    assert "is not a database that can be read" in crowd.host.run(
        "env", "PYTHONPATH=" + str(Path(__file__).resolve().parents[2]), "/usr/bin/python3", "-m", "xdpmond", "-c", str(daemon.config),
        "--check-config", check=False).stderr  # fmt: skip
    assert named(crowd, MORE4[0]) == ("NO", 64500, "Example"), "what is refused changes nothing"
    country.unlink()
    country.write_bytes(encode({"198.51.100.0/25": {"country": {"iso_code": "SE"}}}, kind="GeoLite2-Country"))
    crowd.lab.ctl("reload")
    assert named(crowd, MORE4[0])[0] == "SE"
    networks = crowd.lab.rows("top", "--port", "5300", "--prefix-len", "24")
    assert [(row["source"], row["country"], row["as_number"]) for row in networks] == [("198.51.100.0/24", None, 64500)]
    assert not [warning for warning in crowd.lab.status()["configuration"]["warnings"] if "names" in warning]
