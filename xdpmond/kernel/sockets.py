"""This host's sockets, by inet_diag: who is connected to a port, and which ports are listened on.

Strangers decide how many connections there are. So the kernel is asked for those to the wanted ports alone, and its answers are read as
the bytes that they are: 100,000 objects of pyroute2 take seconds, and 400 MB.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pyroute2 import DiagSocket
from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted

from ..model import Family, Port
from . import abi
from .netlink import dump

_ESTABLISHED, _UNCONNECTED, _LISTEN = 1 << 1, 1 << 7, 1 << 10  # include/net/tcp_states.h; an unconnected UDP socket is in TCP_CLOSE
_TCP, _UDP = 6, 17
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, whose."""
_REQUEST = struct.Struct("=BBxxI48x")
"""struct inet_diag_req_v2: family, protocol, states; of any addresses."""
_MESSAGE = struct.Struct("!BxxxH18x16s32x")
"""struct inet_diag_msg: family, local port, remote address. Attributes follow."""
_ATTRIBUTE = struct.Struct("=HH")
_OPERATION = struct.Struct("=BBH")
"""struct inet_diag_bc_op: code; how far to go on if so, and if not."""
_BYTECODE = 1  # INET_DIAG_REQ_BYTECODE
_JUMP, _PORT_IS = 1, 11  # INET_DIAG_BC_JMP, INET_DIAG_BC_S_EQ
_MOST_PORTS = 1000
"""In one request: the kernel checks its program in quadratic time, and an attribute has at most 64 KB."""
_BUFFER = 1 << 16
"""The kernel sends 32 KB at once."""


class _Socket(NamedTuple):
    family: int
    port: int
    """The local one."""
    peer: bytes
    """4 or 16 bytes."""


def _program(ports: Sequence[int]) -> bytes:
    """Is the local port one of these? A socket is taken if the program goes to its end, and not if it goes beyond."""
    code = bytearray()
    for left, number in zip(reversed(range(len(ports))), ports, strict=True):
        code += _OPERATION.pack(_PORT_IS, 8, 12) + _OPERATION.pack(0, 0, number)
        if left:
            code += _OPERATION.pack(_JUMP, 4, 12 * left)
    return bytes(code)


def _request(family: int, protocol: int, states: int, ports: Sequence[int] = ()) -> bytes:
    """All such sockets; or, if there are ports, those of which it is the local one."""
    body = _REQUEST.pack(family, protocol, states)
    if ports:
        program = _program(ports)
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(program), _BYTECODE) + program
    return _HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body


def _read(answers: Iterable[bytes]) -> Iterator[_Socket]:
    """The sockets of one dump, from what the kernel sent, to its last message."""
    interrupted = 0
    for answer in answers:
        at = 0
        while at < len(answer):
            length, kind, flags, _, _ = _HEADER.unpack_from(answer.ljust(at + _HEADER.size, b"\0"), at)
            least = _HEADER.size + (_MESSAGE.size if kind == SOCK_DIAG_BY_FAMILY else 0)
            if not least <= length <= len(answer) - at:
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
            interrupted |= flags & NLM_F_DUMP_INTR
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                number = int.from_bytes(answer[at + _HEADER.size : at + _HEADER.size + 4], sys.byteorder, signed=True)
                if number:
                    raise OSError(-number, os.strerror(-number))
                if interrupted:
                    raise NetlinkDumpInterrupted
                return
            if kind == SOCK_DIAG_BY_FAMILY:
                family, port, peer = _MESSAGE.unpack_from(answer, at + _HEADER.size)
                yield _Socket(family, port, peer[:4] if family == socket.AF_INET else peer)
            at += length + 3 & ~3
    raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def _ask(request: bytes) -> list[_Socket]:
    with DiagSocket() as diag:
        diag.sendto(request, (0, 0))
        return list(_read(iter(partial(diag.recv, _BUFFER), b"")))


def _sockets(protocol: int, states: int, ports: Sequence[int] = ()) -> list[_Socket]:
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for first in range(0, max(len(ports), 1), _MOST_PORTS):
            found += dump("sockets", partial(_ask, _request(family, protocol, states, ports[first : first + _MOST_PORTS])))
    return found


def established_peers(ports: Collection[Port]) -> set[tuple[Family, bytes]]:
    """The remote addresses of established TCP connections to these local ports (model.Family, 4 or 16 bytes). An IPv4 peer of an IPv6
    socket is given as it is: ::ffff:a.b.c.d. Call it in a thread."""
    numbers = sorted({port.number for port in ports if port.protocol == "tcp"})
    if not numbers:
        return set()
    return {(Family.IPV4 if found.family == socket.AF_INET else Family.IPV6, found.peer) for found in _sockets(_TCP, _ESTABLISHED, numbers)}


def port_flags(failsafe: Collection[Port]) -> dict[int, int]:
    """The flags of `Control.set_ports`: what is listened on, and what stays open. Call it in a thread."""
    flags: dict[int, int] = {}
    for protocol, state, flag in ((_TCP, _LISTEN, abi.PORT_TCP_LISTENS), (_UDP, _UNCONNECTED, abi.PORT_UDP_LISTENS)):
        for found in _sockets(protocol, state):
            flags[found.port] = flags.get(found.port, 0) | flag
    for port in failsafe:
        flag = abi.PORT_UDP_FAILSAFE if port.protocol == "udp" else abi.PORT_TCP_FAILSAFE
        flags[port.number] = flags.get(port.number, 0) | flag
    return flags


def ephemeral_ports() -> tuple[int, int]:
    """ip_local_port_range: the first and the last port that the kernel gives to outgoing connections."""
    try:
        first, last = _PORT_RANGE.read_text().split()
        return int(first), int(last)
    except (OSError, ValueError):
        return 32768, 60999  # the kernel's own default
