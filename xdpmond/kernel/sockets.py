"""This host's sockets, by inet_diag: who is connected to a port, and which ports are listened on."""

from __future__ import annotations

import socket
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from pyroute2 import DiagSocket

from ..model import Family, Port
from . import abi
from .netlink import dump

_ESTABLISHED, _UNCONNECTED, _LISTEN = 1 << 1, 1 << 7, 1 << 10  # include/net/tcp_states.h; an unconnected UDP socket is in TCP_CLOSE
_TCP, _UDP = 6, 17
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _sockets(protocol: int, states: int) -> list[Any]:
    found = []
    with DiagSocket() as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            found += dump("sockets", partial(diag.get_sock_stats, family=family, protocol=protocol, states=states))
    return found


def established_peers(ports: Collection[Port]) -> set[tuple[Family, bytes]]:
    """The remote addresses of established TCP connections to these local ports (model.Family, 4 or 16 bytes). An IPv4 peer of an IPv6
    socket is given as it is: ::ffff:a.b.c.d. Call it in a thread."""
    numbers = {port.number for port in ports if port.protocol == "tcp"}
    peers = set()
    for entry in _sockets(_TCP, _ESTABLISHED) if numbers else ():
        if entry["idiag_sport"] in numbers:
            family = Family.IPV4 if entry["idiag_family"] == socket.AF_INET else Family.IPV6
            peers.add((family, socket.inet_pton(entry["idiag_family"], entry["idiag_dst"])))
    return peers


def port_flags(failsafe: Collection[Port]) -> dict[int, int]:
    """The flags of `Control.set_ports`: what is listened on, and what stays open. Call it in a thread."""
    flags: dict[int, int] = {}
    for protocol, state, flag in ((_TCP, _LISTEN, abi.PORT_TCP_LISTENS), (_UDP, _UNCONNECTED, abi.PORT_UDP_LISTENS)):
        for entry in _sockets(protocol, state):
            flags[entry["idiag_sport"]] = flags.get(entry["idiag_sport"], 0) | flag
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
