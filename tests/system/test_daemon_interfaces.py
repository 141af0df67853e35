"""Interfaces that come, go, refuse, or are not Ethernet; and how the program gets on and off them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from conftest import CONFIG, DENIED4, DENIED6, PERMITTED4, UNLISTED4, Start, World
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from tests.lab import Space, Witness, laboratory, wait_for, within
from xdpmond.kernel import libbpf

TWO = """
interface = ["eth0", "eth1"]
deny = ["203.0.113.0/24", "192.0.2.0/24"]
[interfaces.eth1]
mode = "enforce"
"""


def program(space: Space, interface: str) -> int:
    """The id of the XDP program on an interface; 0 if there is none."""
    link = json.loads(space.run("ip", "-json", "-details", "link", "show", interface).stdout)[0]
    return int(link.get("xdp", {}).get("prog", {}).get("id", 0))


@pytest.fixture
def second(world: World) -> Iterator[Callable[[], None]]:
    """Lays a second cable, eth1, between 192.0.2.1 on the host and 192.0.2.2 in the net."""

    def lay() -> None:
        world.lab.veth(world.host, "eth1", world.net, "wire1")
        world.host.ip("addr add 192.0.2.1/24 dev eth1")
        world.net.ip("addr add 192.0.2.2/24 dev wire1")

    yield lay
    world.host.run("ip", "link", "delete", "eth1", check=False)


def answers(world: World) -> bool:
    return world.net.ping("192.0.2.1", "192.0.2.2", 1, wait=5).received == 1


def silent(world: World) -> bool:
    return world.net.ping("192.0.2.1", "192.0.2.2", 1, wait=0.3).received == 0


def until(world: World, interface: str, state: str) -> None:
    wait_for(lambda: world.lab.interface(interface).get("state") == state, f"{interface} to be {state}")


def test_an_absent_interface_is_waited_for_let_go_and_taken_again(world: World, start: Start, second: Callable[[], None]) -> None:
    daemon = start(TWO)
    assert world.lab.interface("eth1")["state"] == "waiting"
    assert world.passes(DENIED4)  # eth0 is watched meanwhile, in monitor mode
    second()
    until(world, "eth1", "attached")
    assert program(world.host, "eth1") == world.lab.interface("eth1")["program_id"] != 0
    assert silent(world)
    dropped = world.totals["dropped"]["packets"]
    assert dropped >= 1
    world.host.ip("link delete eth1")
    until(world, "eth1", "waiting")
    assert world.lab.interface("eth1")["program_id"] is None
    assert world.totals["dropped"]["packets"] == dropped  # what was counted stays counted
    second()
    until(world, "eth1", "attached")
    assert silent(world)
    assert world.totals["dropped"]["packets"] > dropped
    assert world.totals["by_interface"]["eth1"]["packets"] > dropped
    assert daemon.log.count("watching eth1") == 2


def test_each_interface_has_its_mode(world: World, start: Start, second: Callable[[], None]) -> None:
    second()
    start(TWO)
    assert world.lab.interface("eth0")["mode"] == "monitor"
    assert world.lab.interface("eth1")["mode"] == "enforce"
    assert world.passes(DENIED4) and silent(world)
    world.lab.ctl("mode", "monitor", "--interface", "eth1")
    assert world.passes(DENIED4) and answers(world)
    world.lab.ctl("mode", "enforce")
    assert world.drops(DENIED4) and silent(world)
    world.lab.ctl("mode", "default")
    assert world.passes(DENIED4) and silent(world)
    status = world.lab.status()
    assert set(status["totals"]["by_interface"]) == {"eth0", "eth1"}
    assert sum(one["packets"] for one in status["totals"]["by_interface"].values()) == status["totals"]["packets"]


def test_an_interface_taken_out_of_the_configuration_is_let_go(world: World, start: Start, second: Callable[[], None]) -> None:
    second()
    daemon = start(TWO)
    assert program(world.host, "eth0") and program(world.host, "eth1")
    daemon.config.write_text(TWO.replace('["eth0", "eth1"]', '"eth1"'))
    world.lab.ctl("reload")
    assert program(world.host, "eth0") == 0
    assert program(world.host, "eth1")
    assert [found["name"] for found in world.lab.status()["interfaces"]] == ["eth1"]


def test_default_is_the_default_routes_interface_and_stays(world: World, start: Start, second: Callable[[], None]) -> None:
    daemon = start('interface = "default"\ndeny = ["203.0.113.0/24"]\nmode = "enforce"')
    assert world.lab.interface("default")["state"] == "waiting"
    assert world.passes(DENIED4)
    world.host.ip(f"route add default via {UNLISTED4.net}")
    until(world, "eth0", "attached")
    assert world.drops(DENIED4)
    second()
    world.host.ip("route replace default via 192.0.2.2")
    world.host.ip("route add 198.18.0.0/15 via 192.0.2.2")
    world.lab.ctl("reload")
    assert [found["name"] for found in world.lab.status()["interfaces"]] == ["eth0"]  # it does not move while attached
    assert program(world.host, "eth1") == 0
    world.host.ip("link delete eth0")
    daemon.wait_log("watching eth1")  # what it was on has gone: then the route counts again
    until(world, "eth1", "attached")
    world.host.ip("link delete eth1")
    until(world, "default", "waiting")
    world.cable()
    assert world.passes(DENIED4)


# Foreign programs

MOV_PASS_EXIT = bytes([0xB7, 0, 0, 0, libbpf.XDP_PASS, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])


@contextlib.contextmanager
def foreign(space: Space, interface: str, how: str) -> Iterator[int]:
    """Somebody else's XDP program on the interface, attached by a link or, as most programs do, by netlink."""
    fd = libbpf.load_xdp(MOV_PASS_EXIT, "somebodys", frags=True)
    index = within(space.path, lambda: socket.if_nametoindex(interface))
    flags = libbpf.XDP_FLAGS_SKB_MODE if how == "generic" else libbpf.XDP_FLAGS_DRV_MODE
    library = ctypes.CDLL("libbpf.so.1")
    if how == "link":
        link = within(space.path, lambda: libbpf.create_link(fd, index, flags))
    else:
        assert within(space.path, lambda: library.bpf_xdp_attach(index, fd, flags, None)) == 0
    try:
        yield libbpf.program_id(fd)
    finally:
        if how == "link":
            os.close(link)
        else:
            assert within(space.path, lambda: library.bpf_xdp_detach(index, flags, None)) == 0
        os.close(fd)


@pytest.mark.parametrize(("how", "mode"), [("link", "native"), ("netlink", "native"), ("generic", "generic")])
def test_a_foreign_program_is_never_replaced(world: World, start: Start, second: Callable[[], None], how: str, mode: str) -> None:
    second()
    with foreign(world.host, "eth1", how) as identity:
        daemon = start('window = "1s"\n' + TWO)
        shown = world.lab.interface("eth1")
        assert shown["state"] == "refused"
        for word in (f"id {identity}", mode, f"bpftool prog show id {identity}"):
            assert word in shown["reason"]
        assert world.lab.interface("eth0")["state"] == "attached"
        world.lab.ctl("reload")
        assert program(world.host, "eth1") == identity
        assert daemon.log.count("eth1 cannot be watched") == 1  # said once, not at each look
    # It has gone: netlink tells at once; of a link that ends the kernel says nothing, and we look once a window.
    until(world, "eth1", "attached")


def test_a_foreign_program_on_the_only_interface_ends_a_trial(world: World) -> None:
    with foreign(world.host, "eth0", "netlink") as identity:
        daemon = world.lab.daemon(world.host, CONFIG, ready=False)
        assert daemon.process.wait(60) == 1
        assert f"id {identity}" in daemon.log and "bpftool" in daemon.log and "Traceback" not in daemon.log
        assert program(world.host, "eth0") == identity


def test_a_second_daemon_leaves_the_first_alone(world: World, start: Start) -> None:
    start(CONFIG, "--enforce")
    ours = program(world.host, "eth0")
    second = world.lab.daemon(world.host, CONFIG, "--no-bus", ready=False, name="second.toml")
    assert second.process.wait(60) == 1
    assert f"id {ours}" in second.log
    assert program(world.host, "eth0") == ours
    assert world.drops(DENIED4)


def test_a_program_detached_by_force_is_attached_again(world: World, start: Start) -> None:
    daemon = start('window = "1s"\n' + CONFIG, "--enforce")
    link = world.lab.interface("eth0")["link_id"]
    world.host.run("bpftool", "link", "detach", "id", str(link))
    daemon.wait_log("attaching it again", "watching eth0 in native mode")
    until(world, "eth0", "attached")
    assert world.lab.interface("eth0")["link_id"] != link
    assert world.drops(DENIED4)


# Kinds of interface


def test_what_cannot_do_native_falls_back_with_the_kernels_reason(world: World, start: Start) -> None:
    world.host.ip("link add br0 type bridge", "link set br0 up")
    try:
        daemon = start('interface = ["br0", "lo", "eth0"]\n[interfaces.lo]\nattach = "native"')
        bridge, loopback, veth = (world.lab.interface(name) for name in ("br0", "lo", "eth0"))
        assert (bridge["state"], bridge["attach"]) == ("attached", "generic")
        assert "native mode" in bridge["reason"] and "driver" in bridge["reason"].lower()
        assert any("GRO" in note for note in bridge["notes"])
        assert loopback["state"] == "refused" and "native" in loopback["reason"] and "generic" not in loopback["reason"]
        assert (veth["attach"], veth["reason"]) == ("native", "")
        assert bridge["reason"] in daemon.log
        # What is asked for can change while it runs.
        daemon.config.write_text('interface = ["br0", "lo", "eth0"]\n[interfaces.eth0]\nattach = "generic"')
        world.lab.ctl("reload")
        assert world.lab.interface("eth0")["attach"] == "generic"
        assert world.lab.interface("lo")["attach"] == "generic"
    finally:
        world.host.run("ip", "link", "delete", "br0")


def test_jumbo_frames_are_counted_exactly_in_native_mode() -> None:
    with laboratory() as lab:
        world = World(lab, mtu=9000)
        world.net.ip("link set wire0 down")
        lab.daemon(world.host, CONFIG, "--enforce")
        with Witness(world.net, "wire0") as witness:
            world.net.ip("link set wire0 up")
            shown = lab.interface("eth0")
            assert (shown["attach"], shown["mtu"], shown["reason"]) == ("native", 9000, "")
            for size in (0, 1472, 1473, 3500, 4096, 8000, 8972):
                assert world.net.ping(PERMITTED4.host, PERMITTED4.net, 2, size=size, wait=2).lost == 0
                assert world.net.ping(DENIED4.host, DENIED4.net, 2, size=size, wait=0.3).received == 0
            ether = Ether(src=world.net.mac("wire0"), dst=world.host.mac("eth0"))
            with world.net.raw("wire0") as raw:
                for size in (5000, 8900):
                    raw.send(bytes(ether / IPv6(src=DENIED6.net, dst=DENIED6.host) / UDP(dport=9) / bytes(size)))

            def counted() -> bool:
                totals = lab.status()["totals"]
                return bool((totals["packets"], totals["bytes"]) == witness.count())

            wait_for(counted, "the totals to be the witness's")
            denied = world.entry("203.0.113.0/24")
            assert (denied["packets"], denied["bytes"]) == witness.count(DENIED4.net)
            assert denied["bytes"] > 2 * 8972
            assert lab.status()["books"]["balanced"]


@contextlib.contextmanager
def tun(space: Space, name: str) -> Iterator[int]:
    """The other end of a tun device: what is written to it arrives on the interface, from the IP header on."""

    def make() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
        return descriptor

    descriptor = within(space.path, make)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_link_without_ethernet_headers_is_read_from_the_ip_header(world: World, start: Start) -> None:
    with tun(world.host, "tun0") as wire:
        world.host.ip("addr add 192.0.2.1/24 dev tun0", "link set tun0 up")
        start('interface = "tun0"\nallow = ["192.0.2.0/24"]\ndeny = ["203.0.113.0/24", "2001:db8:bad::/64"]\nmode = "enforce"')
        shown = world.lab.interface("tun0")
        assert (shown["state"], shown["layer"], shown["attach"]) == ("attached", "ip", "generic")
        assert any("Ethernet" in note for note in shown["notes"])
        with world.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("192.0.2.1", 9))
            receiver.settimeout(5)
            before = world.totals
            for source, size in (("203.0.113.5", 100), ("192.0.2.7", 50), ("203.0.113.6", 1000)):
                os.write(wire, bytes(IP(src=source, dst="192.0.2.1") / UDP(dport=9) / bytes(size)))
            os.write(wire, bytes(IPv6(src="2001:db8:bad::5", dst="2001:db8::1") / UDP(dport=9) / bytes(10)))
            assert receiver.recvfrom(2000)[1][0] == "192.0.2.7"
            receiver.settimeout(0.3)
            with pytest.raises(TimeoutError):
                receiver.recv(2000)
        after = world.totals
        assert after["dropped"] == {"packets": 3, "bytes": 28 + 100 + 28 + 1000 + 48 + 10}
        assert after["allowed"]["packets"] == 1 and after["allowed"]["bytes"] == 28 + 50
        assert after["by_family"]["ipv6"]["packets"] - before["by_family"].get("ipv6", {"packets": 0})["packets"] == 1


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_foreground_daemon_detaches(world: World, start: Start, number: signal.Signals) -> None:
    daemon = start(CONFIG, "--enforce")
    assert program(world.host, "eth0") and world.drops(DENIED4)
    assert daemon.stop(number) == (-number if number is signal.SIGKILL else 0)
    wait_for(lambda: program(world.host, "eth0") == 0, "the program to go")
    assert world.passes(DENIED4)
