"""The interfaces of this host, by netlink: what there is, which one has the default route, which addresses are its own, and a word
whenever that may have changed.

A notification is only a reason to look again: a reader that reconstructs the state from single messages is wrong after the first one
that the kernel had to drop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..model import Family
from . import netlink

# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
_GETLINK, _GETADDR, _GETROUTE = 18, 22, 26
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type, flags
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, index
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_EXT_MASK, _IFLA_INFO_KIND = 3, 4, 18, 29, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
_RTA_OIF, _RTA_PRIORITY, _RTA_MULTIPATH, _RTA_TABLE = 4, 6, 9, 15
_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS
_IFF_UP, _IFF_LOWER_UP = 1, 1 << 16
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1
_GROUPS = 1 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR and _ROUTE, RTMGRP_IPV6_IFADDR and _ROUTE
_FAMILIES: dict[int, Family] = {socket.AF_INET: Family.IPV4, socket.AF_INET6: Family.IPV6}
_SETTLE_SECONDS = 0.05  # a link that comes up sends a dozen notifications; one look is enough
_NOTIFICATIONS = 100  # read in one go, before the event loop does other things


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface. `arphrd` is its link type (include/uapi/linux/if_arp.h)."""

    name: str
    ifindex: int
    arphrd: int
    mtu: int
    up: bool
    carrier: bool
    """Is there something at the other end? Meaningful while it is up."""
    kind: str
    """rtnetlink's kind: "veth", "vlan", "bridge", …; empty for hardware."""


def _number(content: bytes | None) -> int:
    """Of 32 bits; 0 if there is none."""
    return int(struct.unpack("=I", content)[0]) if content else 0


def _default_routes(family: int) -> Iterator[tuple[int, int]]:
    """Metric and ifindex of each default route. A router has a million other routes, and they are gone before the list is whole."""
    for content in netlink.ask(netlink.ROUTE, _GETROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
        _, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(content)
        if length or kind != _RTN_UNICAST:
            continue
        of = netlink.attributes(content, _ROUTE.size)
        if (_number(of.get(_RTA_TABLE)) or table) == _RT_TABLE_MAIN:
            hops = of.get(_RTA_MULTIPATH)
            yield _number(of.get(_RTA_PRIORITY)), _number(of.get(_RTA_OIF)) or (_NEXT_HOP.unpack_from(hops)[3] if hops else 0)


class LinkWatch:
    """Looks at the links, and calls back, on the event loop, when a look is worth while."""

    def __init__(self) -> None:
        self._monitor: socket.socket | None = None
        self._wake: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._wake:
            self._wake.cancel()
        if self._monitor:
            self._monitor.close()

    def links(self) -> dict[str, Link]:
        """All interfaces of this network namespace by name. Raises KernelError."""
        found = {}
        request = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + struct.pack("=HHI", 8, _IFLA_EXT_MASK, _SKIP_STATS)
        for content in netlink.dump("interfaces", partial(netlink.ask, netlink.ROUTE, _GETLINK, request)):
            _, kind, index, flags, _ = _LINK.unpack_from(content)
            of = netlink.attributes(content, _LINK.size)
            info = netlink.attributes(of.get(_IFLA_LINKINFO, b""), 0)
            name = os.fsdecode(of[_IFLA_IFNAME].rstrip(b"\0"))
            found[name] = Link(
                name, index, kind, _number(of.get(_IFLA_MTU)), bool(flags & _IFF_UP), bool(flags & _IFF_LOWER_UP),
                info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
            )  # fmt: skip
        return found

    def default_route(self, links: dict[str, Link]) -> str | None:
        """The interface of the default route of lowest metric, IPv4 before IPv6; None if there is no such route. Raises KernelError."""
        names = {link.ifindex: link.name for link in links.values()}
        for family in (socket.AF_INET, socket.AF_INET6):
            routes = netlink.dump("routes", partial(_default_routes, family))
            if best := min(((metric, names[index]) for metric, index in routes if index in names), default=None):
                return best[1]
        return None

    def addresses(self) -> set[tuple[Family, bytes]]:
        """This host's own addresses, and those by which all hosts on a link of its are meant. Raises KernelError."""
        found = set()
        request = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        for content in netlink.dump("addresses", partial(netlink.ask, netlink.ROUTE, _GETADDR, request)):
            family = _FAMILIES.get(content[0])
            of = netlink.attributes(content, _ADDRESS.size)
            # On a link from point to point IFA_ADDRESS is the other end's.
            for address in (of.get(_IFA_LOCAL) or of.get(_IFA_ADDRESS), of.get(_IFA_BROADCAST)):
                if family and address:
                    found.add((family, address))
        return found

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each burst of notifications, until cancelled."""
        loop = asyncio.get_running_loop()
        monitor = self._monitor = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, netlink.ROUTE
        )
        monitor.bind((0, _GROUPS))

        def settled() -> None:
            self._wake = None
            changed()

        def readable() -> None:
            _drain(monitor)
            if self._wake is None:
                self._wake = loop.call_later(_SETTLE_SECONDS, settled)

        loop.add_reader(monitor, readable)
        try:
            changed()  # what happened before the subscription
            await loop.create_future()
        finally:
            loop.remove_reader(monitor)


def _drain(monitor: socket.socket) -> None:
    """Read what is queued. The content does not matter; an overrun (ENOBUFS) is a notification like any other."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_NOTIFICATIONS):
            try:
                monitor.recv(1)  # a datagram, of which the rest is dropped
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
