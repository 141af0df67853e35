"""Attaching, in namespaces with interfaces made for it: native or generic and why, and never over a foreign program."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from xdpmond.errors import ForeignProgramError, KernelError
from xdpmond.kernel import libbpf
from xdpmond.kernel.attach import Attached, attach, layer_of, native_refusal, refuse_foreign, unfit_for_native
from xdpmond.kernel.maps import cells
from xdpmond.model import AttachMode, Count, Family, Outcome, ProtocolClass

from .harness import Harness
from .namespaces import Namespace, ip

NOTHING = libbpf.XdpState(native=0, generic=0, offloaded=0)
PASS = bytes([0xB7, 0, 0, 0, libbpf.XDP_PASS, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
"""A program of two instructions: return XDP_PASS."""

NAME = "xm-kern-a"


def veth(own: str = "", peer: str = "") -> int:
    """Make a pair and return the ifindex of our end; what is given stands before "type veth" and behind "peer"."""
    ip("link", "add", NAME, *own.split(), "type", "veth", "peer", "name", "xm-kern-b", *peer.split())
    return socket.if_nametoindex(NAME)


@pytest.fixture
def stranger() -> Iterator[int]:
    """Somebody else's program."""
    fd = libbpf.load_xdp(PASS, "stranger", frags=True)
    yield fd
    os.close(fd)


def attached(datapath: Harness, ifindex: int, wanted: AttachMode, program: str = "xdpmond") -> Attached:
    return attach(datapath.loaded.program(program), NAME, ifindex, wanted)


def test_native_where_the_driver_can(datapath: Harness, namespace: Namespace) -> None:
    def steps() -> None:
        ifindex = veth()
        ours = libbpf.program_id(datapath.loaded.programs["xdpmond"])
        for wanted in (AttachMode.AUTO, AttachMode.NATIVE):
            done = attached(datapath, ifindex, wanted)
            assert (done.mode, done.reason) == (AttachMode.NATIVE, "")
            assert libbpf.query_xdp(ifindex) == libbpf.XdpState(native=ours, generic=0, offloaded=0)
            assert libbpf.link_info(done.link)[1:] == (ours, ifindex)
            # The link is the descriptor: nothing else holds the program there.
            os.close(done.link)
            assert libbpf.query_xdp(ifindex) == NOTHING

    namespace.call(steps)


def test_generic_where_it_is_asked_for(datapath: Harness, namespace: Namespace) -> None:
    def steps() -> None:
        ifindex = veth()
        done = attached(datapath, ifindex, AttachMode.GENERIC)
        ours = libbpf.program_id(datapath.loaded.programs["xdpmond"])
        assert done.mode is AttachMode.GENERIC and "configuration" in done.reason
        assert libbpf.query_xdp(ifindex) == libbpf.XdpState(native=0, generic=ours, offloaded=0)
        os.close(done.link)

    namespace.call(steps)


def test_too_few_queues(datapath: Harness, namespace: Namespace) -> None:
    """A veth whose peer sends on more queues than it receives on: the kernel says so only over netlink."""

    def steps() -> None:
        ifindex = veth("numrxqueues 1 numtxqueues 1", "numrxqueues 4 numtxqueues 4")
        done = attached(datapath, ifindex, AttachMode.AUTO)
        assert done.mode is AttachMode.GENERIC
        assert "rx queues" in done.reason
        os.close(done.link)
        with pytest.raises(KernelError) as raised:
            attached(datapath, ifindex, AttachMode.NATIVE)
        assert NAME in raised.value.message and "rx queues" in raised.value.message
        assert "auto" in raised.value.hint
        assert libbpf.query_xdp(ifindex) == NOTHING

    namespace.call(steps)


def test_an_mtu_too_large_for_one_buffer(datapath: Harness, namespace: Namespace, stranger: int) -> None:
    """Ours takes frames of several buffers and is attached natively at MTU 9000; one that does not is refused with the reason."""

    def steps() -> None:
        ifindex = veth("mtu 9000", "mtu 9000")
        done = attached(datapath, ifindex, AttachMode.AUTO)
        assert (done.mode, done.reason) == (AttachMode.NATIVE, "")
        os.close(done.link)
        single = libbpf.load_xdp(PASS, "single", frags=False)
        try:
            done = attach(single, NAME, ifindex, AttachMode.AUTO)
            assert done.mode is AttachMode.GENERIC and "MTU" in done.reason
            os.close(done.link)
        finally:
            os.close(single)

    namespace.call(steps)


def test_a_native_refusal_that_is_none(datapath: Harness, namespace: Namespace) -> None:
    """Asked of an interface that takes the program, it has nothing to say, and leaves nothing attached."""

    def steps() -> None:
        ifindex = veth()
        assert native_refusal(datapath.loaded.programs["xdpmond"], ifindex) == ""
        assert libbpf.query_xdp(ifindex) == NOTHING

    namespace.call(steps)


def attach_as_a_stranger(ifindex: int, program: int, how: str) -> Callable[[], None]:
    """By a link, or over netlink as iproute2 does; returns what takes it away."""
    flags = libbpf.XDP_FLAGS_SKB_MODE if "generic" in how else libbpf.XDP_FLAGS_DRV_MODE
    if "link" in how:
        link = libbpf.create_link(program, ifindex, flags)
        return lambda: os.close(link)
    assert libbpf._lib().bpf_xdp_attach(ifindex, program, flags, None) == 0
    return lambda: libbpf._lib().bpf_xdp_attach(ifindex, -1, flags, None)


@pytest.mark.parametrize("wanted", AttachMode)
@pytest.mark.parametrize("how", ["native link", "generic link", "native netlink", "generic netlink"])
def test_a_foreign_program_stays(datapath: Harness, namespace: Namespace, stranger: int, how: str, wanted: AttachMode) -> None:
    def steps() -> None:
        ifindex = veth()
        take_away = attach_as_a_stranger(ifindex, stranger, how)
        before = libbpf.query_xdp(ifindex)
        with pytest.raises(ForeignProgramError) as raised:
            attached(datapath, ifindex, wanted)
        mode, number = how.split()[0], libbpf.program_id(stranger)
        assert NAME in raised.value.message and f"id {number}" in raised.value.message and f"{mode} mode" in raised.value.message
        assert f"bpftool prog show id {number}" in raised.value.hint
        assert libbpf.query_xdp(ifindex) == before, "it was touched"
        take_away()
        os.close(attached(datapath, ifindex, wanted).link)

    namespace.call(steps)


@pytest.mark.parametrize("how", ["native link", "generic netlink"])
def test_a_program_that_comes_between(
    datapath: Harness, namespace: Namespace, stranger: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody attaches after we looked and before we did: the kernel keeps us off, and the error is the same."""

    def steps() -> None:
        ifindex = veth()
        looked = 0

        def look(name: str, index: int) -> None:
            nonlocal looked
            looked += 1
            if looked == 1:
                attach_as_a_stranger(ifindex, stranger, how)
            else:
                refuse_foreign(name, index)

        monkeypatch.setattr("xdpmond.kernel.attach.refuse_foreign", look)
        with pytest.raises(ForeignProgramError) as raised:
            attached(datapath, ifindex, AttachMode.AUTO)
        assert f"id {libbpf.program_id(stranger)}" in raised.value.message

    namespace.call(steps)


def test_a_program_is_replaced_without_a_gap(datapath: Harness, namespace: Namespace, stranger: int) -> None:
    def steps() -> None:
        ifindex = veth()
        link = libbpf.create_link(stranger, ifindex, libbpf.XDP_FLAGS_DRV_MODE)
        number = libbpf.link_info(link)[0]
        libbpf.update_link(link, datapath.loaded.programs["xdpmond"])
        ours = libbpf.program_id(datapath.loaded.programs["xdpmond"])
        assert libbpf.link_info(link) == (number, ours, ifindex)
        assert libbpf.query_xdp(ifindex).native == ours
        os.close(link)

    namespace.call(steps)


def test_a_link_outlives_its_interface(datapath: Harness, namespace: Namespace) -> None:
    def steps() -> None:
        ifindex = veth()
        done = attached(datapath, ifindex, AttachMode.AUTO)
        ip("link", "del", NAME)
        assert libbpf.link_info(done.link)[2] == 0
        os.close(done.link)
        for wanted in AttachMode:
            with pytest.raises(KernelError, match=f"{NAME} has gone"):
                attached(datapath, ifindex, wanted)

    namespace.call(steps)


TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000


def tun() -> tuple[int, int]:
    """A link whose frames start with the IP header: its ifindex, and a descriptor to which a packet that it receives is written."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", NAME.encode(), IFF_TUN | IFF_NO_PI))
    ip("link", "set", NAME, "up")
    return socket.if_nametoindex(NAME), fd


@pytest.mark.parametrize("wanted", [AttachMode.AUTO, AttachMode.GENERIC])
def test_real_packets_that_start_with_the_ip_header(datapath: Harness, namespace: Namespace, wanted: AttachMode) -> None:
    datapath.policy(deny=["198.51.100.0/24", "2001:db8:bad::/48"])

    def steps() -> None:
        ifindex, fd = tun()
        slot = datapath.control.take_slot(ifindex, enforce=True)
        done = attached(datapath, ifindex, wanted, "xdpmond_ip")
        try:
            before = datapath.counters.totals()
            packets = {
                (Family.IPV4, Outcome.DENIED_DROPPED): IP(src="198.51.100.1", dst="192.0.2.1") / UDP(dport=53),
                (Family.IPV6, Outcome.DENIED_DROPPED): IPv6(src="2001:db8:bad::1", dst="2001:db8::1") / UDP(dport=53),
                (Family.IPV4, Outcome.DEFAULT_LOGGED): IP(src="203.0.113.1", dst="192.0.2.1") / UDP(dport=53),
                (Family.IPV6, Outcome.DEFAULT_LOGGED): IPv6(src="2001:db8::2", dst="2001:db8::1") / UDP(dport=53),
            }
            for packet in packets.values():
                os.write(fd, bytes(packet))
            changed = {(family, outcome): count for at, family, protocol, outcome, count in cells(datapath.counters.totals() - before)
                       if (at, protocol) == (slot, ProtocolClass.UDP)}  # fmt: skip
            assert changed == {key: Count(1, len(packet)) for key, packet in packets.items()}
        finally:
            os.close(done.link)
            datapath.control.free_slot(slot)
            os.close(fd)

    namespace.call(steps)


@pytest.mark.parametrize(
    ("number", "layer"), [(1, "ethernet"), (772, "ethernet"), (512, "ip"), (768, "ip"), (769, "ip"), (776, "ip"), (65534, "ip")]
)
def test_layers(number: int, layer: str) -> None:
    assert layer_of(number, "any0") == layer


@pytest.mark.parametrize("number", [32, 778, 801, 803, 823, 824, 65535])
def test_links_that_start_with_something_else(number: int) -> None:
    """InfiniBand, GRE, wireless in monitor mode, netlink monitors: refused with the link's name and type."""
    with pytest.raises(KernelError) as raised:
        layer_of(number, "odd0")
    assert "odd0" in raised.value.message and str(number) in raised.value.message


@pytest.mark.parametrize(("number", "kind"), [(65534, "xfrm"), (768, "vti"), (769, "vti6")])
def test_links_of_ipsec(number: int, kind: str) -> None:
    with pytest.raises(KernelError) as raised:
        layer_of(number, "odd0", kind)
    assert "odd0" in raised.value.message and kind in raised.value.message


def test_native_where_it_would_not_do(datapath: Harness, namespace: Namespace) -> None:
    """The driver can, and we know better: generic if that is left to us, else an error."""

    def steps() -> None:
        ifindex, program = veth(), datapath.loaded.program("xdpmond")
        done = attach(program, NAME, ifindex, AttachMode.AUTO, unfit_for_native("bond"))
        assert done.mode is AttachMode.GENERIC and "members" in done.reason
        os.close(done.link)
        with pytest.raises(KernelError, match="members") as raised:
            attach(program, NAME, ifindex, AttachMode.NATIVE, unfit_for_native("bond"))
        assert raised.value.hint
        assert libbpf.query_xdp(ifindex) == NOTHING
        assert not unfit_for_native("veth") and not unfit_for_native("")

    namespace.call(steps)


def test_the_layers_of_real_links(namespace: Namespace) -> None:
    """What the kernel says of the links of this host, by their kind."""

    def steps() -> None:
        veth()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

            def arphrd(name: str) -> int:
                answer = fcntl.ioctl(any_socket, 0x8927, struct.pack("256s", name.encode()))  # SIOCGIFHWADDR
                return struct.unpack_from("=H", answer, 16)[0]

            assert layer_of(arphrd("lo"), "lo") == "ethernet"
            assert layer_of(arphrd(NAME), NAME) == "ethernet"
            ip("link", "del", NAME)
            _, fd = tun()
            assert layer_of(arphrd(NAME), NAME) == "ip"
            os.close(fd)

    namespace.call(steps)
