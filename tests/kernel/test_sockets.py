"""This host's sockets as inet_diag lists them: real connections, of both families, beside many others."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest
from pyroute2 import DiagSocket
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

from xdpmond.errors import KernelError
from xdpmond.kernel import abi, sockets
from xdpmond.kernel.netlink import dump
from xdpmond.kernel.sockets import established_peers, port_flags
from xdpmond.model import Family, Port, parse_address

from .namespaces import Namespace, ip

MANY = 2000
SSH, WEB, OTHER, OUTGOING = 22, 8443, 80, 1022
HERE4, HERE6 = "192.0.2.1", "2001:db8::1"


def connect(listener: socket.socket, host: str, source: str, keep: contextlib.ExitStack) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = keep.enter_context(socket.socket(family))
    client.bind((source, 0))
    client.connect((host, listener.getsockname()[1]))
    keep.enter_context(listener.accept()[0])


def crowd(keep: contextlib.ExitStack) -> None:
    """Connections to four ports, to one of them many, and one from a port of its own."""
    for number in range(1, 9):
        ip("address", "add", f"192.0.2.{number}/32", "dev", "lo")
        ip("address", "add", f"2001:db8::{number}/128", "dev", "lo", "nodad")
    ssh, web, other = (
        keep.enter_context(socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)) for port in (SSH, WEB, OTHER)
    )
    only4 = keep.enter_context(socket.create_server((HERE4, 2222)))
    connect(ssh, HERE6, "2001:db8::2", keep)
    connect(ssh, HERE4, "192.0.2.3", keep)
    connect(ssh, HERE4, "192.0.2.3", keep)
    connect(web, HERE4, "192.0.2.4", keep)
    connect(only4, HERE4, "192.0.2.5", keep)
    for number in range(MANY):
        connect(other, HERE6 if number & 1 else HERE4, "2001:db8::7" if number & 1 else "192.0.2.7", keep)
    outgoing = keep.enter_context(socket.socket())
    outgoing.bind(("192.0.2.8", OUTGOING))
    outgoing.connect((HERE4, OTHER))
    keep.enter_context(other.accept()[0])


@pytest.fixture(scope="module")
def crowded() -> Iterator[Namespace]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * MANY + 1000), hard))
    with contextlib.ExitStack() as keep:
        namespace = Namespace()
        keep.callback(namespace.close)
        namespace.call(crowd, keep)
        yield namespace
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def by_ss(numbers: set[int]) -> set[tuple[Family, bytes]]:
    """The same question, answered by iproute2."""
    found = set()
    for line in subprocess.run(["ss", "-Htn", "state", "established"], capture_output=True, text=True, check=True).stdout.splitlines():
        local, remote = line.split()[2:4]
        if int(local.rpartition(":")[2]) in numbers:
            address = remote.rpartition(":")[0].strip("[]")
            found.add(parse_address(address.removeprefix("::ffff:")))
    return found


def unmapped(peers: set[tuple[Family, bytes]]) -> set[tuple[Family, bytes]]:
    texts = (socket.inet_ntop(socket.AF_INET if family is Family.IPV4 else socket.AF_INET6, address) for family, address in peers)
    return {parse_address(text.removeprefix("::ffff:")) for text in texts}


@pytest.mark.parametrize("numbers", [{SSH}, {SSH, WEB, 2222}, {WEB, OTHER}, {OUTGOING}, {9}, {0, 65535}, {*range(20, 2520)}], ids=len)
def test_the_peers_of_some_ports(crowded: Namespace, numbers: set[int]) -> None:
    peers = crowded.call(established_peers, [Port("tcp", number) for number in numbers])
    assert unmapped(peers) == crowded.call(by_ss, numbers)


def test_peers_are_given_as_their_sockets_have_them(crowded: Namespace) -> None:
    peers = crowded.call(established_peers, [Port("tcp", SSH), Port("tcp", 2222), Port("tcp", OUTGOING), Port("udp", OTHER)])
    mapped = socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.3")
    assert peers == {parse_address("2001:db8::2"), (Family.IPV6, mapped), parse_address("192.0.2.5"), parse_address(HERE4)}
    assert crowded.call(established_peers, [Port("udp", OTHER)]) == set()


def received(family: int, numbers: list[int]) -> tuple[int, int]:
    """How many bytes and sockets come in answer to a question."""
    sizes = []
    with DiagSocket() as diag:
        diag.sendto(sockets._request(family, sockets._TCP, sockets._ESTABLISHED, numbers), (0, 0))

        def receive() -> bytes:
            sizes.append(len(answer := diag.recv(sockets._BUFFER)))
            return answer

        found = list(sockets._read(iter(receive, b"")))
    return sum(sizes), len(found)


def test_what_comes_from_the_kernel_does_not_grow_with_connections_to_other_ports(crowded: Namespace) -> None:
    for family, connections in ((socket.AF_INET, 1), (socket.AF_INET6, 3)):
        size, number = crowded.call(received, family, [SSH, 2222])
        assert number == connections
        assert size < 200 * (number + 1)
    size, number = crowded.call(received, socket.AF_INET6, [OTHER])  # a listener on :: has all as IPv6
    assert number >= MANY
    assert size > 2 * sockets._BUFFER, "not a dump of several parts"


def test_what_is_listened_on(namespace: Namespace) -> None:
    def listening() -> dict[int, int]:
        with (
            socket.create_server(("127.0.0.1", 53)), socket.create_server(("::1", 8080), family=socket.AF_INET6),
            socket.socket(type=socket.SOCK_DGRAM) as dns, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as connected,
        ):  # fmt: skip
            dns.bind(("127.0.0.1", 53))
            connected.bind(("::1", 123))
            connected.connect(("::1", 5353))
            return port_flags([Port("tcp", SSH), Port("udp", 53)])

    assert namespace.call(listening) == {
        53: abi.PORT_TCP_LISTENS | abi.PORT_UDP_LISTENS | abi.PORT_UDP_FAILSAFE,
        8080: abi.PORT_TCP_LISTENS,
        SSH: abi.PORT_TCP_FAILSAFE,
    }


# What the kernel may say besides


def message(kind: int, body: bytes = b"", flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body + bytes(-len(body) % 4)


PEER = message(20, struct.pack("!BxxxH18x16s32x", socket.AF_INET, SSH, socket.inet_aton("192.0.2.9")) + b"\5\0\x08\0\1")
DONE, NOOP = message(3, bytes(4)), message(1)
INTERRUPTED = 0x10


def test_messages_of_other_kinds_and_in_any_number_of_parts() -> None:
    for answers in ([PEER + NOOP + PEER, DONE], [PEER, PEER, NOOP, DONE], [PEER + PEER + message(3)]):
        assert list(sockets._read(answers)) == [(socket.AF_INET, SSH, socket.inet_aton("192.0.2.9"))] * 2


@pytest.mark.parametrize("answers", [[PEER, message(3, bytes(4), INTERRUPTED)], [message(1, flags=INTERRUPTED), PEER + DONE]])
def test_a_list_with_holes_is_refused_when_it_has_come_to_its_end(answers: list[bytes]) -> None:
    left = iter(answers)
    with pytest.raises(NetlinkDumpInterrupted):
        list(sockets._read(left))
    assert next(left, None) is None


@pytest.mark.parametrize(
    ("answers", "number"),
    [
        ([PEER, message(2, struct.pack("=i", -errno.ENOBUFS))], errno.ENOBUFS),
        ([PEER, message(3, struct.pack("=i", -errno.EINVAL))], errno.EINVAL),
        ([PEER], errno.ENODATA), ([], errno.ENODATA),
    ],
)  # fmt: skip
def test_a_list_that_fails_is_no_list(answers: list[bytes], number: int) -> None:
    with pytest.raises(OSError) as refused:
        list(sockets._read(answers))
    assert refused.value.errno == number


@pytest.mark.parametrize("cut", [PEER[:length] for length in (1, 15, 16, 50, 88)] + [message(20, bytes(71)), bytes(16)])
def test_a_message_that_is_cut_off_ends_the_reading(cut: bytes) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADMSG)):
        list(sockets._read([PEER + cut, DONE]))


def test_a_kernel_that_refuses_is_said() -> None:
    with pytest.raises(KernelError, match="does not list its sockets"):
        dump("sockets", partial(sockets._ask, sockets._request(250, sockets._TCP, sockets._ESTABLISHED)))
