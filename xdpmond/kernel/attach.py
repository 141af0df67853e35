"""Attach by bpf_link: native where the driver can, generic otherwise, never over a foreign program.

A link is a descriptor: while anybody holds it (this process, or systemd's descriptor store) the program stays attached, and nobody
replaces it by accident. bpf_link gives no text with its errors, so the reason for a native refusal is asked for once more over netlink,
which does.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass

from ..errors import ForeignProgramError, KernelError
from ..model import AttachMode
from . import libbpf

# include/uapi/linux/if_arp.h
_ARPHRD_WITH_ETHERNET = frozenset({1, 772})  # ETHER, LOOPBACK
_ARPHRD_IP = frozenset({512, 768, 769, 776, 65534})  # PPP, TUNNEL, TUNNEL6, SIT, NONE (tun, wireguard)

_OF_IPSEC = frozenset({"xfrm", "vti", "vti6"})
"""Kinds of links whose packets keep, before the IP header, the link header of the frame that they came in (net/xfrm/xfrm_input.c)."""


@dataclass(frozen=True, slots=True)
class Attached:
    """One interface with our program on it. `link` is a descriptor that the holder closes."""

    link: int
    mode: AttachMode
    reason: str
    """Why it is not native; empty otherwise."""


def layer_of(arphrd: int, name: str, kind: str = "") -> str:
    """ "ethernet" or "ip": where the frames of a link start; `kind` is rtnetlink's. Raises KernelError if it is parsed neither way."""
    if arphrd in _ARPHRD_WITH_ETHERNET:
        return "ethernet"
    if arphrd in _ARPHRD_IP and kind not in _OF_IPSEC:
        return "ip"
    what = f"is a link of kind {kind}" if kind in _OF_IPSEC else f"has link type {arphrd}"
    raise KernelError(f"{name} {what}, whose frames start neither with an Ethernet nor with an IP header",
                      hint="watch the interface that carries its traffic instead")  # fmt: skip


def unfit_for_native(kind: str) -> str:
    """Why a link of this kind must not have the program in native mode, although the kernel would take it; "" if it may.

    A bond hands its program to its members (bond_xdp_set in drivers/net/bonding): each frame then says that it came in by one of these."""
    return "the frames of a bond would say that they came in by its members" if kind == "bond" else ""


def refuse_foreign(name: str, ifindex: int) -> None:
    """Raise ForeignProgramError if any XDP program is attached to the interface."""
    state = libbpf.query_xdp(ifindex)
    for mode, program in (("native", state.native), ("generic", state.generic), ("offloaded", state.offloaded)):
        if program:
            raise ForeignProgramError(
                f"{name} already has an XDP program: id {program}, {mode} mode; it is not replaced",
                hint=f"see 'bpftool prog show id {program}' and 'bpftool link', or 'ip link show dev {name}'",
            )


def _refuse_gone(name: str, ifindex: int) -> None:
    """The kernel tells a missing interface as an invalid argument."""
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        error = KernelError(f"{name} has gone")
        error.errno = errno.ENODEV
        raise error from None


def attach(program: int, name: str, ifindex: int, wanted: AttachMode, unfit: str = "") -> Attached:
    """Attach; raises ForeignProgramError, or KernelError with the kernel's reason. `unfit` says why native mode will not do."""
    refuse_foreign(name, ifindex)
    reason = ""
    if wanted is not AttachMode.GENERIC and unfit:
        if wanted is AttachMode.NATIVE:
            raise KernelError(f"{name} cannot have the program in native mode: {unfit}", hint='set attach = "auto"')
        reason = unfit
    elif wanted is not AttachMode.GENERIC:
        try:
            return Attached(libbpf.create_link(program, ifindex, libbpf.XDP_FLAGS_DRV_MODE), AttachMode.NATIVE, "")
        except KernelError as error:
            _refuse_gone(name, ifindex)
            if error.errno in (errno.EBUSY, errno.EEXIST):
                refuse_foreign(name, ifindex)
            try:
                reason = native_refusal(program, ifindex) or os.strerror(error.errno)
            except OSError:  # netlink does not answer: the number has to do
                reason = os.strerror(error.errno)
            if wanted is AttachMode.NATIVE or error.errno in (errno.EPERM, errno.ENODEV):
                raise KernelError(f"{name} does not take the program in native mode: {reason}", hint='set attach = "auto"') from None
    else:
        reason = "the configuration asks for generic"
    try:
        return Attached(libbpf.create_link(program, ifindex, libbpf.XDP_FLAGS_SKB_MODE), AttachMode.GENERIC, reason)
    except KernelError as error:
        _refuse_gone(name, ifindex)
        if error.errno in (errno.EBUSY, errno.EEXIST):
            refuse_foreign(name, ifindex)
        raise KernelError(f"{name} takes the program in neither mode: native: {reason}; generic: {os.strerror(error.errno)}") from None


_RTM_SETLINK, _NLMSG_ERROR = 19, 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_ACK_TLVS, _NLM_F_CAPPED = 1, 4, 0x200, 0x100
_NLA_F_NESTED, _IFLA_XDP, _IFLA_XDP_FD, _IFLA_XDP_FLAGS = 1 << 15, 43, 1, 3
_XDP_FLAGS_UPDATE_IF_NOEXIST = 1
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11


def native_refusal(program: int, ifindex: int) -> str:
    """The text with which the kernel refuses the program in native mode (rtnetlink's extended acknowledgement), or "" if it has none."""

    def attribute(kind: int, payload: bytes) -> bytes:
        return struct.pack("=HH", len(payload) + 4, kind) + payload

    def request(fd: int, flags: int) -> bytes:
        xdp = attribute(_IFLA_XDP_FD, struct.pack("=i", fd)) + attribute(_IFLA_XDP_FLAGS, struct.pack("=I", flags))
        body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, ifindex, 0, 0) + attribute(_IFLA_XDP | _NLA_F_NESTED, xdp)
        return struct.pack("=IHHII", 16 + len(body), _RTM_SETLINK, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + body

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(2)
        netlink.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        netlink.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        netlink.send(request(program, libbpf.XDP_FLAGS_DRV_MODE | _XDP_FLAGS_UPDATE_IF_NOEXIST))
        reply = netlink.recv(8192)
        _, kind, flags, _, _ = struct.unpack_from("=IHHII", reply)
        (code,) = struct.unpack_from("=i", reply, 16)
        if kind == _NLMSG_ERROR and code == 0:
            # The second time it was taken: undo it, the caller goes on with what it knows.
            netlink.send(request(-1, libbpf.XDP_FLAGS_DRV_MODE))
            netlink.recv(8192)
            return ""
    at = 16 + 4 + 16  # header, error code, and the request's header (capped)
    while flags & _NLM_F_ACK_TLVS and at + 4 <= len(reply):
        length, kind = struct.unpack_from("=HH", reply, at)
        if kind & 0x3FFF == _NLMSGERR_ATTR_MSG:
            return reply[at + 4 : at + length].rstrip(b"\0").decode(errors="replace")
        at += max((length + 3) & ~3, 4)
    return ""
