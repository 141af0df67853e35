"""destination = "local": packets to other hosts have a verdict and a place in the totals, and count by no talker."""

from __future__ import annotations

import asyncio
import dataclasses
import socket

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from xdpmond.errors import KernelError
from xdpmond.kernel import abi, libbpf, loader
from xdpmond.kernel.links import LinkWatch
from xdpmond.kernel.locals import Address, LocalAddresses
from xdpmond.model import Count, Family, Verdict
from xdpmond.rows import count_of

from .harness import Books, Harness, by_key
from .namespaces import Namespace, ip
from .packets import MAC

TABLES = {"sets": 64, "local": True}

OWN = ["192.0.2.1", "192.0.2.255", "2001:db8::1"]
FOR_US = [*OWN, "224.0.0.251", "239.255.255.250", "255.255.255.255", "127.0.0.1", "127.255.0.9", "ff02::1", "ff0e::101"]
ELSEWHERE = ["192.0.2.2", "198.51.100.1", "223.255.255.255", "240.0.0.1", "126.0.0.1", "128.0.0.1", "0.0.0.0", "2001:db8::2", "::", "::1",
             "fe80::1", "fe00::1", "c000:201::"]  # fmt: skip


def address(text: str) -> Address:
    family = Family.IPV6 if ":" in text else Family.IPV4
    return family, socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def frame(destination: str, source: str = "198.51.100.7") -> bytes:
    network = IPv6(src="2001:db8:7::7", dst=destination) if ":" in destination else IP(src=source, dst=destination)
    return bytes(Ether(**MAC) / network / TCP(dport=443, flags="S"))


@pytest.fixture
def local(datapath: Harness) -> Harness:
    LocalAddresses(datapath.loaded.maps["locals"]).set(map(address, OWN))
    datapath.close_window()
    return datapath


@pytest.mark.parametrize("destination", FOR_US)
def test_what_is_for_this_host(local: Harness, destination: str) -> None:
    before = local.counters.tallies()
    seen = local.run(frame(destination))
    assert seen.sourced.packets == 1 and len(seen.events) == 1
    assert local.counters.tallies().elsewhere == before.elsewhere
    assert sum(packets for packets, _, _ in by_key(local.running()).values()) == 1


@pytest.mark.parametrize("destination", ELSEWHERE)
def test_what_is_not(local: Harness, destination: str) -> None:
    before = local.counters.tallies()
    sent = frame(destination)
    seen = local.run(sent)
    assert (seen.sourced, seen.size, len(seen.events)) == (Count(1, len(sent)), len(sent), 1)
    assert local.counters.tallies().elsewhere - before.elsewhere == Count(1, len(sent))
    assert not len(local.running())
    assert not local.sketches.read(local.control.window).cells.any()


def test_a_packet_cut_off_before_its_destination_is_for_nobody(local: Harness) -> None:
    before = local.counters.tallies()
    local.send(frame("192.0.2.1")[:30])
    assert local.counters.tallies().elsewhere.packets - before.elsewhere.packets == 1


def test_the_verdict_is_that_of_the_source(local: Harness) -> None:
    local.policy(deny=["198.51.100.0/24"])
    local.enforce()
    assert [local.send(frame(to)) for to in ("192.0.2.1", "198.51.100.1")] == [libbpf.XDP_DROP] * 2
    assert len(local.running()) == 1


def test_the_books_balance(local: Harness) -> None:
    local.default(Verdict.ALLOW)
    start, tracked = local.counters.tallies(), local.control.tracked
    for number, destination in enumerate([*FOR_US, *ELSEWHERE] * 3):
        local.send(frame(destination, f"203.0.113.{number % 200}"))
        if number % 10 == 0:
            local.close_window()
    after = local.counters.tallies()
    books = Books(
        after.sourced - start.sourced, local.control.tracked - tracked + count_of(local.running()), after.evicted - start.evicted,
        after.untracked - start.untracked, after.elsewhere - start.elsewhere,
    )  # fmt: skip
    assert books.balanced
    assert books.elsewhere.packets == 3 * len(ELSEWHERE)


def test_addresses_that_come_and_go(local: Harness) -> None:
    def counts(destination: str) -> bool:
        before = local.counters.tallies().elsewhere
        local.send(frame(destination))
        return local.counters.tallies().elsewhere == before

    addresses = LocalAddresses(local.loaded.maps["locals"])  # as another process finds them
    assert counts("192.0.2.1") and not counts("198.51.100.9")
    addresses.set(map(address, ["198.51.100.9", "2001:db8::1"]))
    assert not counts("192.0.2.1") and counts("198.51.100.9") and counts("2001:db8::1")
    with pytest.raises(KernelError, match="16385 addresses"):
        addresses.set((Family.IPV4, number.to_bytes(4, "big")) for number in range(abi.LOCALS + 1))
    assert counts("198.51.100.9")


def test_what_is_off_is_not_compiled_in(local: Harness) -> None:
    without = Harness(dataclasses.replace(local.build, local=False))
    try:
        assert "locals" not in without.loaded.maps
        for name in (loader.ETHERNET, loader.IP):
            assert libbpf.instruction_count(without.loaded.program(name)) < libbpf.instruction_count(local.loaded.program(name))
        without.send(frame("198.51.100.1"))
        assert len(without.running()) == 1 and without.counters.tallies().elsewhere == Count()
    finally:
        without.close()


def test_the_addresses_of_a_host(namespace: Namespace) -> None:
    """As netlink lists them, with a word when they change."""

    async def changes(watch: LinkWatch) -> None:
        changed = asyncio.Event()
        task = asyncio.create_task(watch.watch(changed.set))
        await changed.wait()
        for command in (("add", "198.51.100.1/24"), ("add", "2001:db8::9/64"), ("del", "198.51.100.1/24")):
            changed.clear()
            ip("addr", command[0], command[1], "dev", "xm-kern-a", *(["nodad"] if ":" in command[1] else []))
            await asyncio.wait_for(changed.wait(), 30)
        task.cancel()

    def steps() -> None:
        ip("link", "set", "lo", "up")
        ip("link", "add", "xm-kern-a", "type", "veth", "peer", "name", "xm-kern-b")
        ip("link", "set", "xm-kern-a", "addrgenmode", "none", "up")
        ip("addr", "add", "192.0.2.1/24", "brd", "+", "dev", "xm-kern-a")
        ip("addr", "add", "203.0.113.1", "peer", "203.0.113.2", "dev", "xm-kern-a")
        watch = LinkWatch()
        try:
            at_first = {"127.0.0.1", "::1", "192.0.2.1", "192.0.2.255", "203.0.113.1"}
            assert watch.addresses() == set(map(address, at_first))
            asyncio.run(changes(watch))
            assert watch.addresses() == set(map(address, at_first | {"2001:db8::9"}))
        finally:
            watch.close()

    namespace.call(steps)
