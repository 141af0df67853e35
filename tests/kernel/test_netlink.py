"""What this host's links, routes and sockets are, as netlink lists them: held against `ip`, and against sockets of our own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from xdpmond.kernel import abi
from xdpmond.kernel.links import LinkWatch
from xdpmond.kernel.sockets import established_peers, port_flags
from xdpmond.model import Family, Port

from .namespaces import Namespace, ip

ARPHRD = {"ether": 1, "loopback": 772, "none": 65534}


@pytest.fixture
def watch() -> Iterator[LinkWatch]:
    made = LinkWatch()
    yield made
    made.close()


def test_links(namespace: Namespace, watch: LinkWatch) -> None:
    def steps() -> None:
        ip("link", "add", "xm-kern-a", "mtu", "1400", "type", "veth", "peer", "name", "xm-kern-b")
        ip("link", "set", "xm-kern-a", "up")
        ip("tuntap", "add", "xm-kern-t", "mode", "tun")
        for number in range(100):  # more than one datagram holds
            ip("link", "add", f"xm-kern-{number}", "type", "veth", "peer", "name", f"xm-peer-{number}")
        ip("link", "set", "xm-kern-b", "up")
        listed = {link["ifname"]: link for link in json.loads(ip("-j", "-d", "link"))}
        found = watch.links()
        assert found.keys() == listed.keys() and len(found) > 200
        for name, link in found.items():
            said = listed[name]
            assert (link.name, link.ifindex, link.mtu, link.arphrd) == (name, said["ifindex"], said["mtu"], ARPHRD[said["link_type"]])
            assert (link.up, link.carrier) == ("UP" in said["flags"], "LOWER_UP" in said["flags"])
            assert link.kind == said.get("linkinfo", {}).get("info_kind", "")
        assert found["xm-kern-a"].carrier and not found["xm-kern-0"].up and found["xm-kern-t"].kind == "tun"

    namespace.call(steps)


ROUTES = {
    "none": ([], None),
    "one": (["default via 192.0.2.254"], "xm-kern-a"),
    "on a link without a gateway": (["default dev xm-kern-t"], "xm-kern-t"),
    "the lower metric": (["default via 192.0.2.254 metric 300", "default dev xm-kern-t metric 200"], "xm-kern-t"),
    "not a destination": (["10.0.0.0/8 via 192.0.2.254"], None),
    "one that leads nowhere": (["unreachable default metric 1", "default via 192.0.2.254 metric 2"], "xm-kern-a"),
    "of other tables": (["default via 192.0.2.254 table 100", "default via 192.0.2.254 table 1000"], None),
    "of several hops the first": (["default nexthop dev xm-kern-t nexthop via 192.0.2.254"], "xm-kern-t"),
    "IPv6": (["-6 default via 2001:db8::1"], "xm-kern-a"),
    "IPv4 before IPv6": (["-6 default via 2001:db8::1", "default dev xm-kern-t metric 9999"], "xm-kern-t"),
}


@pytest.mark.parametrize(("routes", "expected"), ROUTES.values(), ids=ROUTES)
def test_the_default_route(namespace: Namespace, watch: LinkWatch, routes: list[str], expected: str | None) -> None:
    def steps() -> None:
        ip("link", "add", "xm-kern-a", "type", "veth", "peer", "name", "xm-kern-b")
        ip("tuntap", "add", "xm-kern-t", "mode", "tun")
        for name in ("xm-kern-a", "xm-kern-b", "xm-kern-t"):
            ip("link", "set", name, "up")
        ip("addr", "add", "192.0.2.1/24", "dev", "xm-kern-a")
        ip("addr", "add", "2001:db8::2/64", "dev", "xm-kern-a", "nodad")
        for route in routes:
            six = ["-6"] if route.startswith("-6") else []
            ip(*six, "route", "add", *route.removeprefix("-6 ").split())
        assert watch.default_route(watch.links()) == expected

    namespace.call(steps)


def test_sockets(namespace: Namespace) -> None:
    def listening(family: int, kind: int, host: str) -> socket.socket:
        made = socket.socket(family, kind)
        made.bind((host, 0))
        if kind == socket.SOCK_STREAM:
            made.listen()
        return made

    def steps() -> None:
        any4, any6 = listening(socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"), listening(socket.AF_INET6, socket.SOCK_STREAM, "::")
        udp, connected = (listening(socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1") for _ in range(2))
        port4, port6, udp_port = (of.getsockname()[1] for of in (any4, any6, udp))
        connected.connect(udp.getsockname())
        clients = [socket.create_connection(to, source_address=(by, 0)) for to, by in (
            (("127.0.0.1", port4), "127.0.0.2"), (("127.0.0.1", port6), "127.0.0.3"), (("::1", port6), "::1"))]  # fmt: skip
        try:
            tcp4, tcp6 = Port("tcp", port4), Port("tcp", port6)
            assert port_flags([]) == {port4: abi.PORT_TCP_LISTENS, port6: abi.PORT_TCP_LISTENS, udp_port: abi.PORT_UDP_LISTENS}
            both = port_flags([tcp4, Port("udp", udp_port), Port("tcp", 1)])
            assert both == {
                port4: abi.PORT_TCP_LISTENS | abi.PORT_TCP_FAILSAFE, port6: abi.PORT_TCP_LISTENS, 1: abi.PORT_TCP_FAILSAFE,
                udp_port: abi.PORT_UDP_LISTENS | abi.PORT_UDP_FAILSAFE,
            }  # fmt: skip
            four = (Family.IPV4, socket.inet_aton("127.0.0.2"))
            six = {(Family.IPV6, socket.inet_pton(socket.AF_INET6, text)) for text in ("::1", "::ffff:127.0.0.3")}
            assert established_peers([tcp4]) == {four}
            assert established_peers([tcp6]) == six
            assert established_peers([tcp4, tcp6]) == {four} | six
            assert established_peers([Port("udp", port4)]) == established_peers([]) == set()
        finally:
            for each in (any4, any6, udp, connected, *clients):
                each.close()

    namespace.call(steps)
