"""Links that not every host can make: jumbo frames over several buffers, and links whose frames start with the IP header."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from pyroute2 import WireGuard, netns

from xdpmond.model import AttachMode, Count, Outcome

from .conftest import PEER, Watch, on_peer, ping, sh

Watcher = Callable[[str, AttachMode], Watch]


@pytest.mark.parametrize("mode", [AttachMode.NATIVE, AttachMode.GENERIC])
def test_jumbo_frames(wire: str, watch: Watcher, mode: AttachMode) -> None:
    for run, name, host in ((sh, "front", 1), (on_peer, "wire", 2)):
        run(f"ip link set {name} mtu 9000")
        run(f"ip addr add 192.0.2.{host}/24 dev {name}")
    watched = watch(wire, mode)
    # The first makes the neighbour's entry, so that what follows is pings alone.
    assert ping("192.0.2.1", source="192.0.2.2", count=1)
    before = watched.count(Outcome.DEFAULT_LOGGED).bytes
    assert ping("192.0.2.1", source="192.0.2.2", size=8972)
    assert watched.count(Outcome.DEFAULT_LOGGED).bytes - before == 3 * (14 + 20 + 8 + 8972)
    watched.deny("192.0.2.2")
    assert not ping("192.0.2.1", source="192.0.2.2", size=8972)
    assert watched.count(Outcome.DENIED_DROPPED).bytes == 3 * (14 + 20 + 8 + 8972)


def test_a_bond(wire: str, watch: Watcher) -> None:
    """Of two veths, one of which is used. Its members take the program in native mode, and say that all frames are theirs."""
    sh(f"ip link add spare type veth peer name spare netns {PEER}")
    for run, names, host in ((sh, ("front", "spare"), 1), (on_peer, ("wire", "spare"), 2)):
        run("ip link add bond type bond mode active-backup miimon 100")
        for name in names:
            run(f"ip link set {name} down")
            run(f"ip link set {name} master bond")
        run("ip link set bond up")
        run(f"ip addr add 198.51.100.{host}/24 dev bond")
    watched = watch("bond", AttachMode.AUTO)
    assert watched.mode is AttachMode.GENERIC
    assert ping("198.51.100.1", source="198.51.100.2")
    assert watched.count(Outcome.DEFAULT_LOGGED).packets == 3
    watched.deny("198.51.100.2")
    assert not ping("198.51.100.1", source="198.51.100.2")
    assert watched.count(Outcome.DENIED_DROPPED).packets == 3
    sh("ip link del bond")
    sh("ip link del spare")


def test_ip_in_ip(wire: str, watch: Watcher) -> None:
    for run, name, host, other in ((sh, "front", 1, 2), (on_peer, "wire", 2, 1)):
        run(f"ip addr add 192.0.2.{host}/24 dev {name}")
        run(f"ip link add tunnel type ipip local 192.0.2.{host} remote 192.0.2.{other}")
        run("ip link set tunnel up")
        run(f"ip addr add 198.51.100.{host}/24 dev tunnel")
    watched = watch("tunnel", AttachMode.AUTO)
    _pinged_and_denied(watched)
    sh("ip link del tunnel")


def test_wireguard(wire: str, watch: Watcher) -> None:
    for run, name, host in ((sh, "front", 1), (on_peer, "wire", 2)):
        run(f"ip addr add 192.0.2.{host}/24 dev {name}")
        run("ip link add tunnel type wireguard")
    # A thread that has moved to the peer's namespace configures the peer's end.
    with ThreadPoolExecutor(1) as here, ThreadPoolExecutor(1, initializer=netns.setns, initargs=(PEER,)) as there:
        keys = [end.submit(_make_key, private_key).result() for end, private_key in ((here, _KEY_1), (there, _KEY_2))]
        here.submit(_set_peer, keys[1], 2).result()
        there.submit(_set_peer, keys[0], 1).result()
    for run, host in ((sh, 1), (on_peer, 2)):
        run("ip link set tunnel up")
        run(f"ip addr add 198.51.100.{host}/24 dev tunnel")
    watched = watch("tunnel", AttachMode.AUTO)
    _pinged_and_denied(watched)
    sh("ip link del tunnel")


_KEY_1 = "QA" + "A" * 41 + "="
_KEY_2 = "YA" + "A" * 41 + "="
"""Private keys: any 32 bytes will do, the kernel shapes them."""


def _make_key(private_key: str) -> str:
    """Set the private key of the interface `tunnel`; return the public one."""
    with WireGuard() as wireguard:
        wireguard.set("tunnel", private_key=private_key, listen_port=51820)
        (message,) = wireguard.info("tunnel")
        return message.get_attr("WGDEVICE_A_PUBLIC_KEY").decode()


def _set_peer(public_key: str, host: int) -> None:
    with WireGuard() as wireguard:
        wireguard.set("tunnel", peer={"public_key": public_key, "endpoint_addr": f"192.0.2.{host}", "endpoint_port": 51820,
                                      "allowed_ips": [f"198.51.100.{host}/32"]})  # fmt: skip


def _pinged_and_denied(watched: Watch) -> None:
    (attachment,) = watched.datapath.attachments.values()
    assert attachment.layer == "ip"
    before = watched.count(Outcome.DEFAULT_LOGGED)
    assert ping("198.51.100.1", source="198.51.100.2")
    # No Ethernet header here, and none is counted.
    assert watched.count(Outcome.DEFAULT_LOGGED) - before == Count(3, 3 * (20 + 8 + 56))
    watched.deny("198.51.100.2")
    assert not ping("198.51.100.1", source="198.51.100.2")
    assert watched.count(Outcome.DENIED_DROPPED).packets == 3
