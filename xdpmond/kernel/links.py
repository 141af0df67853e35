"""The interfaces of this host, by netlink: what there is, which one has the default route, which addresses are its own, and a word
whenever that may have changed.

A notification is only a reason to look again: a reader that reconstructs the state from single messages is wrong after the first one
that the kernel had to drop.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE, RTMGRP_LINK

from ..model import Family
from .netlink import dump

_AF_INET, _AF_INET6 = 2, 10
_IFF_UP, _IFF_LOWER_UP = 1, 1 << 16
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1
_GROUPS = RTMGRP_LINK | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
_SETTLE_SECONDS = 0.05  # a link that comes up sends a dozen notifications; one look is enough


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


class LinkWatch:
    """Looks at the links, and calls back, on the event loop, when a look is worth while."""

    def __init__(self) -> None:
        self._netlink = IPRoute()
        self._monitor = IPRoute()
        self._wake: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._wake:
            self._wake.cancel()
        self._netlink.close()
        self._monitor.close()

    def links(self) -> dict[str, Link]:
        """All interfaces of this network namespace by name. Raises KernelError."""
        found = {}
        for message in dump("interfaces", self._netlink.get_links):
            name = message.get_attr("IFLA_IFNAME")
            info = message.get_attr("IFLA_LINKINFO")
            kind = info.get_attr("IFLA_INFO_KIND") if info else None
            mtu, flags = message.get_attr("IFLA_MTU") or 0, message["flags"]
            found[name] = Link(
                name, message["index"], message["ifi_type"], mtu, bool(flags & _IFF_UP), bool(flags & _IFF_LOWER_UP), kind or ""
            )
        return found

    def default_route(self, links: dict[str, Link]) -> str | None:
        """The interface of the default route of lowest metric, IPv4 before IPv6; None if there is no such route."""
        names = {link.ifindex: link.name for link in links.values()}
        for family in (_AF_INET, _AF_INET6):
            best: tuple[int, str] | None = None
            for route in dump("routes", partial(self._netlink.get_routes, family=family, table=_RT_TABLE_MAIN)):
                if route["dst_len"] or route["type"] != _RTN_UNICAST:
                    continue
                hops = route.get_attr("RTA_MULTIPATH") or []
                index = route.get_attr("RTA_OIF") or (hops[0]["oif"] if hops else None)
                if index in names:
                    candidate = (route.get_attr("RTA_PRIORITY") or 0, names[index])
                    best = min(best, candidate) if best else candidate
            if best:
                return best[1]
        return None

    def addresses(self) -> set[tuple[Family, bytes]]:
        """This host's own addresses, and those by which all hosts on a link of its are meant. Raises KernelError."""
        found = set()
        for message in dump("addresses", self._netlink.get_addr):
            family = {_AF_INET: Family.IPV4, _AF_INET6: Family.IPV6}.get(message["family"])
            # On a link from point to point IFA_ADDRESS is the other end's.
            own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            for text in (own, message.get_attr("IFA_BROADCAST")):
                if family and text:
                    found.add((family, socket.inet_pton(message["family"], text)))
        return found

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each burst of notifications, until cancelled."""
        loop = asyncio.get_running_loop()
        self._monitor.bind(groups=_GROUPS)
        descriptor = self._monitor.fileno()

        def settled() -> None:
            self._wake = None
            changed()

        def readable() -> None:
            self._drain()
            if self._wake is None:
                self._wake = loop.call_later(_SETTLE_SECONDS, settled)

        loop.add_reader(descriptor, readable)
        try:
            changed()  # what happened before the subscription
            await loop.create_future()
        finally:
            loop.remove_reader(descriptor)

    def _drain(self) -> None:
        """Read what is queued. The content does not matter; an overrun (ENOBUFS) is a notification like any other."""
        try:
            self._monitor.get()
        except NetlinkError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise
