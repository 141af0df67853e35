"""Real traffic through the real daemon: what passes, what is dropped, and that every count is what a witness on the wire has seen."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from conftest import CONFIG, DENIED4, DENIED6, EVERYWHERE, PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6, Ends, Start, World
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet

from tests.lab import Sent, Witness, wait_for

Watch = Callable[..., Witness]

ALLOWED = [ipaddress.ip_network(text) for text in ("10.0.0.0/24", "2001:db8:a::/64")]
DENIED = [ipaddress.ip_network(text) for text in ("203.0.113.0/24", "2001:db8:bad::/64")]
CLASSES = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


def outcome(frame: Sent, enforce: bool) -> str:
    """What the daemon should have made of a frame, by the policy of `CONFIG`."""
    if not frame.source:
        return "no_source"
    address = ipaddress.ip_address(frame.source)
    if any(address in network for network in ALLOWED):
        return "allowed"
    if not any(address in network for network in DENIED):
        return "logged"
    if not enforce:
        return "denied_passed"
    return "essential" if frame.is_neighbour_discovery else "dropped"


def tally(pairs: Iterable[tuple[str, int]]) -> dict[str, dict[str, int]]:
    packets: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for name, length in pairs:
        packets[name] += 1
        size[name] += length
    return {name: {"packets": packets[name], "bytes": size[name]} for name in packets}


def expected(frames: list[Sent], enforce: bool) -> dict[str, Any]:
    """The totals of the status that these frames must have made."""

    def family(frame: Sent) -> str:
        return "other" if not frame.source else "ipv6" if ":" in frame.source else "ipv4"

    def protocol(frame: Sent) -> str:
        return CLASSES.get(frame.protocol, "other") if frame.source else "arp"

    verdicts = {name: {"packets": 0, "bytes": 0} for name in ("allowed", "logged", "denied_passed", "dropped", "essential", "no_source")}
    return {
        "packets": len(frames),
        "bytes": sum(frame.size for frame in frames),
        **verdicts,
        **tally((outcome(frame, enforce), frame.size) for frame in frames),
        "by_family": tally((family(frame), frame.size) for frame in frames),
        "by_protocol": tally((protocol(frame), frame.size) for frame in frames),
        "by_interface": tally(("eth0", frame.size) for frame in frames),
    }


def counts_exactly(world: World, witness: Witness, *, enforce: bool) -> None:
    """The status' totals come to be those of the witness, and its books balance. (Hosts send a frame of their own now and then: hence
    the waiting.)"""
    seen: list[Any] = []

    def equal() -> bool:
        status = world.lab.status()
        seen[:] = [status["totals"], expected(list(witness.frames()), enforce), status["books"]]
        return bool(seen[0] == seen[1])

    with contextlib.suppress(AssertionError):
        wait_for(equal, "the totals to be the witness's", 30)
    assert seen[0] == seen[1]
    books = seen[2]
    assert books["balanced"]
    with_source = seen[1]["packets"] - seen[1]["no_source"]["packets"]
    assert books["total"]["packets"] == with_source
    assert sum(books[part]["packets"] for part in ("tracked", "evicted", "untracked")) == with_source
    for prefix in (*ALLOWED, *DENIED):
        sources = [frame.source for frame in witness.frames() if frame.source and ipaddress.ip_address(frame.source) in prefix]
        entry = world.entry(str(prefix))
        assert (entry["packets"], entry["bytes"], entry["partial"]) == (*(witness.count(*set(sources)) if sources else (0, 0)), False)


def transfer(world: World, ends: Ends, size: int) -> int:
    """Send so many bytes to the host over TCP; how many arrive."""
    data = bytes(size)
    with world.host.listen(ends.host, 8080) as listener, world.net.connect(ends.net, ends.host, 8080) as sender:
        accepted, _ = listener.accept()

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        with accepted:
            accepted.settimeout(60)
            received = 0
            while chunk := accepted.recv(1 << 18):
                received += len(chunk)
        thread.join()
        return received


def refuses_tcp(world: World, ends: Ends) -> bool:
    with world.host.listen(ends.host, 8080), pytest.raises(TimeoutError):
        world.net.connect(ends.net, ends.host, 8080, seconds=1.2).close()
    return True


def arriving(world: World, ends: Ends, sizes: list[int], port: int = 5353, wait: float = 10) -> list[int]:
    """Send datagrams of these sizes; the sizes of those that arrive. What does not is waited for so long."""
    family = socket.AF_INET6 if ":" in ends.host else socket.AF_INET
    with world.host.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind((ends.host, port))
        world.net.datagrams(ends.net, ends.host, port, sizes)
        receiver.settimeout(wait)
        found = []
        with contextlib.suppress(TimeoutError):
            while len(found) < len(sizes):
                found.append(len(receiver.recv(65536)))
        return found


def test_monitor_mode_drops_nothing_and_counts_everything(world: World, witnessed: Watch) -> None:
    witness = witnessed()
    assert world.passes(*EVERYWHERE)
    for ends in (PERMITTED4, DENIED4, UNLISTED6, DENIED6):
        assert transfer(world, ends, 300_000) == 300_000
        assert arriving(world, ends, [1, 1000, 0, 5000]) == [1, 1000, 0, 5000]
    counts_exactly(world, witness, enforce=False)
    assert world.totals["dropped"] == {"packets": 0, "bytes": 0}
    assert world.totals["denied_passed"]["packets"] > 100


def test_enforce_mode_drops_what_is_denied_and_nothing_else(world: World, witnessed: Watch) -> None:
    witness = witnessed(CONFIG, "--enforce")
    assert world.passes(PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6)
    assert world.drops(DENIED4, DENIED6)
    for ends in (DENIED4, DENIED6):
        assert refuses_tcp(world, ends)
        assert arriving(world, ends, [10, 20, 30], wait=0.5) == []
    for ends in (PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6):
        assert transfer(world, ends, 300_000) == 300_000
        assert arriving(world, ends, [10, 4000, 30]) == [10, 4000, 30]
    counts_exactly(world, witness, enforce=True)
    totals = world.totals
    assert totals["dropped"]["packets"] >= 6 + 2 + 6
    assert totals["essential"]["packets"] > 0  # the denied IPv6 neighbour still finds us, or the link would break


def test_enforce_drops_whole_flows_under_way(world: World, start: Start) -> None:
    """A connection that is open does not outlive a deny."""
    start(CONFIG, "--enforce")
    with world.host.listen(UNLISTED4.host, 8080) as listener, world.net.connect(UNLISTED4.net, UNLISTED4.host, 8080) as sender:
        accepted, _ = listener.accept()
        with accepted:
            sender.sendall(b"before")
            assert accepted.recv(100) == b"before"
            world.lab.ctl("deny", UNLISTED4.net)
            sender.sendall(b"after")
            accepted.settimeout(0.7)
            with pytest.raises(TimeoutError):
                accepted.recv(100)
            world.lab.ctl("remove", UNLISTED4.net)
            accepted.settimeout(60)
            assert accepted.recv(100) == b"after"  # TCP sends it again


def frames(world: World) -> list[Packet]:
    """One of each kind, from denied, permitted and unlisted sources."""
    ether = Ether(src=world.net.mac("wire0"), dst=world.host.mac("eth0"))
    found: list[Packet] = [ether / ARP(pdst=PERMITTED4.host, psrc=DENIED4.net)]
    for port, link in enumerate((ether, ether / Dot1Q(vlan=100), ether / Dot1AD(vlan=7) / Dot1Q(vlan=4094)), start=1000):
        for ends in EVERYWHERE:
            ip = IPv6(src=ends.net, dst=ends.host) if ":" in ends.net else IP(src=ends.net, dst=ends.host)
            echo = ICMPv6EchoRequest() if ":" in ends.net else ICMP()
            found += [link / ip / UDP(dport=port) / b"0123456789", link / ip / TCP(dport=port, flags="S"), link / ip / echo]
    return found


def test_vlan_frames_are_judged_by_the_source_inside(world: World, witnessed: Watch) -> None:
    witness = witnessed(CONFIG, "--enforce")
    sent = frames(world)
    with world.net.raw("wire0") as raw:
        for frame in sent:
            raw.send(bytes(frame))
    counts_exactly(world, witness, enforce=True)
    # 3 protocols, 3 ways to tag them, 2 denied sources
    assert world.totals["dropped"]["packets"] == 18
    wait_for(lambda: {event["vlan"] for event in world.lab.rows("events")} >= {None, 100, 7}, "events with each tag")


def test_a_deny_for_a_time_comes_back_by_itself(world: World, start: Start) -> None:
    start(CONFIG, "--enforce")
    assert world.passes(UNLISTED4)
    for seconds in (2, 4, 8, 16):  # on a slow machine the shortest may be over before anybody has looked
        began = time.time()
        ends = world.lab.json("deny", UNLISTED4.net, "--for", f"{seconds}s", "--reason", "a short one")["applied"][0]["expires"]
        assert began + seconds < ends < time.time() + seconds
        held = world.drops(UNLISTED4)
        if time.time() < ends:
            break
    assert held
    wait_for(lambda: world.lost(UNLISTED4, 1, 0.3) == 0, "the source to get in again")
    assert time.time() > ends
    assert not world.entry(f"{UNLISTED4.net}/32")


def test_the_longest_prefix_decides_in_both_directions(world: World, start: Start) -> None:
    start('interface = "eth0"\ndeny = ["198.51.100.0/24"]\nallow = ["10.0.0.0/8"]\nmode = "enforce"')
    assert world.drops(UNLISTED4)
    assert world.passes(PERMITTED4)
    world.lab.ctl("allow", UNLISTED4.net)  # inside the wider deny
    world.lab.ctl("deny", "10.0.0.0/24")  # inside the wider allow
    assert world.passes(UNLISTED4)
    assert world.drops(PERMITTED4)
    world.lab.ctl("allow", "10.0.0.2")  # and once more inside
    assert world.passes(PERMITTED4)
    assert world.lab.json("explain", "10.0.0.2")["decided_by"]["prefix"] == "10.0.0.2/32"
    assert [entry["prefix"] for entry in world.lab.json("explain", "10.0.0.2")["covering"]] == ["10.0.0.2/32", "10.0.0.0/24", "10.0.0.0/8"]


def test_default_deny_keeps_the_host_reachable(world: World, start: Start) -> None:
    """SSH, neighbour discovery and ARP pass. Answers to the host's own connections do not, as the daemon says when it starts."""
    daemon = start('interface = "eth0"\ndefault = "deny"\nmode = "enforce"\nallow = ["10.0.0.0/24"]', "--force")
    assert "answers" in daemon.log
    world.net.ip("neigh flush dev wire0")
    assert world.passes(PERMITTED4)
    assert world.drops(UNLISTED4, UNLISTED6, PERMITTED6)
    for ends in (UNLISTED4, UNLISTED6):
        with world.host.listen(ends.host, 22), world.net.connect(ends.net, ends.host, 22):
            pass
    totals = world.totals
    assert totals["essential"]["packets"] >= 6
    assert totals["no_source"]["packets"] >= 1  # ARP
    # A connection of the host's own to an unlisted server: the answer does not come in.
    with world.net.listen(UNLISTED4.net, 8080), pytest.raises(TimeoutError):
        world.host.connect(UNLISTED4.host, UNLISTED4.net, 8080, seconds=1.2)


def test_generic_mode_does_the_same(world: World, witnessed: Watch) -> None:
    witness = witnessed('attach = "generic"\n' + CONFIG, "--enforce")
    shown = world.lab.interface("eth0")
    assert shown["attach"] == "generic"
    assert shown["reason"] and any("GRO" in note for note in shown["notes"])
    assert world.passes(PERMITTED4, UNLISTED6)
    assert world.drops(DENIED4, DENIED6)
    with world.net.raw("wire0") as raw:
        for frame in frames(world):
            raw.send(bytes(frame))
    counts_exactly(world, witness, enforce=True)


def test_kernel_and_client_agree_under_many_sources(world: World, witnessed: Watch) -> None:
    """A few thousand sources, windows that end meanwhile, and not a packet too few or too many."""
    witness = witnessed('window = "1s"\nsummary_interval = "0s"\n' + CONFIG)
    ether = Ether(src=world.net.mac("wire0"), dst=world.host.mac("eth0"))
    head, tail = bytes(ether), bytes(IP(src="0.0.0.0", dst=UNLISTED4.host, len=38) / UDP(dport=9) / b"0123456789")
    number = 0
    with world.net.raw("wire0") as raw:
        first = world.lab.status()["window"]["number"] or 0
        while (world.lab.status()["window"]["number"] or 0) < first + 3:
            for _ in range(1000):
                number += 1
                source = (0xC6120000 + number % 4096).to_bytes(4, "big")  # 198.18.0.0/15
                raw.send(head + tail[:12] + source + tail[16:])
    wait_for(lambda: world.totals["packets"] == witness.count()[0], "every frame to be counted")
    status = world.lab.status()
    assert status["books"]["balanced"]
    assert status["books"]["tracked"]["packets"] == status["books"]["total"]["packets"]
    assert status["books"]["evicted"]["packets"] == status["books"]["untracked"]["packets"] == 0
