"""This host's sockets, by inet_diag: who is connected to a port, and which ports are listened on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection
from functools import partial
from pathlib import Path

from ..model import Family, Port
from . import abi, netlink

_ESTABLISHED, _UNCONNECTED, _LISTEN = 1 << 1, 1 << 7, 1 << 10  # include/net/tcp_states.h; an unconnected UDP socket is in TCP_CLOSE
_TCP, _UDP = 6, 17
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

# include/uapi/linux/sock_diag.h and inet_diag.h
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBxxI48x")  # struct inet_diag_req_v2: family, protocol, states; any socket
_MESSAGE = struct.Struct(">4xHxx16x16s")  # struct inet_diag_msg, as far as it is read: local port, remote address


def _sockets(protocol: int, family: int, states: int) -> list[tuple[int, bytes]]:
    """Local port and remote address (16 bytes, of IPv4 the first four) of each socket in one of these states."""
    request = _REQUEST.pack(family, protocol, states)
    answer = netlink.dump("sockets", partial(netlink.ask, netlink.SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request))
    return [_MESSAGE.unpack_from(content) for content in answer]


def established_peers(ports: Collection[Port]) -> set[tuple[Family, bytes]]:
    """The remote addresses of established TCP connections to these local ports (model.Family, 4 or 16 bytes). An IPv4 peer of an IPv6
    socket is given as it is: ::ffff:a.b.c.d. Call it in a thread."""
    numbers = {port.number for port in ports if port.protocol == "tcp"}
    peers = set()
    for family, of, size in ((Family.IPV4, socket.AF_INET, 4), (Family.IPV6, socket.AF_INET6, 16)) if numbers else ():
        peers |= {(family, address[:size]) for port, address in _sockets(_TCP, of, _ESTABLISHED) if port in numbers}
    return peers


def port_flags(failsafe: Collection[Port]) -> dict[int, int]:
    """The flags of `Control.set_ports`: what is listened on, and what stays open. Call it in a thread."""
    flags: dict[int, int] = {}
    for protocol, state, flag in ((_TCP, _LISTEN, abi.PORT_TCP_LISTENS), (_UDP, _UNCONNECTED, abi.PORT_UDP_LISTENS)):
        for family in (socket.AF_INET, socket.AF_INET6):
            for number, _ in _sockets(protocol, family, state):
                flags[number] = flags.get(number, 0) | flag
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
