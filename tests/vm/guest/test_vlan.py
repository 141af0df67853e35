"""Real 802.1Q and 802.1ad subinterfaces, on a veth pair.

A sender with VLAN offload (as network cards have, and veth too) hands the tag over beside the frame, so that XDP never sees it; without,
the tag stands in the frame. Either way the source's verdict applies and the packet that passes arrives on its subinterface; only the
event's vlan differs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from xdpmond.kernel import abi
from xdpmond.model import AttachMode, Outcome, ProtocolClass

from .conftest import Watch, on_peer, ping, sh

SOURCE = "192.0.2.2"
SOURCE6 = "2001:db8:10::2"
OFFLOADS = ("tx-vlan-hw-insert", "tx-vlan-stag-hw-insert")
BOTH_MODES = pytest.mark.parametrize("mode", [AttachMode.NATIVE, AttachMode.GENERIC])
BOTH_FAMILIES = pytest.mark.parametrize(
    ("target", "source", "protocol"),
    [("192.0.2.1", SOURCE, ProtocolClass.ICMP), ("2001:db8:10::1", SOURCE6, ProtocolClass.ICMPV6)],
)
Watcher = Callable[[str, AttachMode], Watch]


def set_offload(state: str) -> None:
    for offload in OFFLOADS:
        on_peer(f"ethtool -K wire {offload} {state}")


def subinterfaces(*tags: tuple[str, int]) -> None:
    """Stack one VLAN interface on the other, outermost first, on both sides, and give the innermost ones addresses."""
    for run, bottom, host in ((sh, "front", 1), (on_peer, "wire", 2)):
        below = bottom
        for protocol, number in tags:
            above = f"{bottom}.{number}"
            run(f"ip link add link {below} name {above} type vlan protocol {protocol} id {number}")
            run(f"ip link set {above} up")
            below = above
        run(f"ip addr add 192.0.2.{host}/24 dev {below}")
        run(f"ip addr add 2001:db8:10::{host}/64 dev {below} nodad")


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


@BOTH_MODES
@BOTH_FAMILIES
def test_tag_in_the_frame(wire: str, watch: Watcher, mode: AttachMode, target: str, source: str, protocol: ProtocolClass) -> None:
    set_offload("off")
    subinterfaces(("802.1Q", 10))
    watched = watch(wire, mode)
    assert ping(target, source=source)
    events = watched.events(packed(source))
    assert len(events)
    assert set(events["vlan"]) == {10}

    watched.deny(source)
    assert not ping(target, source=source)
    assert watched.count(Outcome.DENIED_DROPPED, protocol).packets >= 3
    assert {int(vlan) for vlan in watched.events(packed(source))["vlan"]} == {10}

    watched.undo_denials()
    assert ping(target, source=source)


@BOTH_MODES
def test_two_tags_in_the_frame(wire: str, watch: Watcher, mode: AttachMode) -> None:
    set_offload("off")
    subinterfaces(("802.1ad", 300), ("802.1Q", 20))
    watched = watch(wire, mode)
    assert ping("192.0.2.1", source=SOURCE)
    # The outer tag's number is what is told.
    assert {int(vlan) for vlan in watched.events(packed(SOURCE))["vlan"]} == {300}
    watched.deny("192.0.2.0/24")
    assert not ping("192.0.2.1", source=SOURCE)


@BOTH_MODES
def test_three_tags_in_the_frame(wire: str, watch: Watcher, mode: AttachMode) -> None:
    set_offload("off")
    subinterfaces(("802.1ad", 300), ("802.1ad", 301), ("802.1Q", 20))
    watched = watch(wire, mode)
    assert ping("192.0.2.1", source=SOURCE)
    assert {int(vlan) for vlan in watched.events(packed(SOURCE))["vlan"]} == {300}
    watched.deny("192.0.2.0/24")
    assert not ping("192.0.2.1", source=SOURCE)
    assert watched.count(Outcome.DENIED_DROPPED).packets >= 3


@BOTH_MODES
@BOTH_FAMILIES
def test_stripped_tag_is_null_and_the_verdict_applies(
    wire: str, watch: Watcher, mode: AttachMode, target: str, source: str, protocol: ProtocolClass
) -> None:
    set_offload("on")
    subinterfaces(("802.1Q", 10))
    watched = watch(wire, mode)
    assert ping(target, source=source)
    events = watched.events(packed(source))
    assert len(events)
    assert set(events["vlan"]) == {abi.VLAN_NONE}

    watched.deny(source)
    assert not ping(target, source=source)
    assert watched.count(Outcome.DENIED_DROPPED, protocol).packets >= 3

    watched.undo_denials()
    assert ping(target, source=source)


@BOTH_MODES
def test_priority_tag_is_vlan_zero_not_null(wire: str, watch: Watcher, mode: AttachMode) -> None:
    # A tag with number 0 carries a priority alone: it stands in the frame, so it is 0 and not null.
    set_offload("off")
    subinterfaces(("802.1Q", 0))
    watched = watch(wire, mode)
    ping("192.0.2.1", source=SOURCE)
    assert {int(vlan) for vlan in watched.events(packed(SOURCE))["vlan"]} == {0}


def test_on_a_subinterface_itself(wire: str, watch: Watcher) -> None:
    # A VLAN interface has no native XDP: auto falls back and names the reason.
    subinterfaces(("802.1Q", 10))
    watched = watch("front.10", AttachMode.AUTO)
    assert watched.mode is AttachMode.GENERIC
    (attachment,) = watched.datapath.attachments.values()
    assert attachment.reason
    assert ping("192.0.2.1", source=SOURCE)
    watched.deny(SOURCE)
    assert not ping("192.0.2.1", source=SOURCE)
    assert watched.count(Outcome.DENIED_DROPPED).packets >= 3
