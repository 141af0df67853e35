"""Programs that the packet path is measured beside: an empty one, and xdp-filter of Debian's xdp-tools as it is shipped.

xdp-filter's objects are loaded by libbpf and are run without being attached, as ours is: its own loader wants a dispatcher in front,
whose cost is none of the filter's.
"""

from __future__ import annotations

import ctypes as c
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdpmond.kernel import libbpf
from xdpmond.model import Family

_OBJECTS = Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu") / "bpf"
_FILTER_MAPS = {Family.IPV4: "filter_ipv4", Family.IPV6: "filter_ipv6"}
_MATCH_DESTINATION_UDP = 0b1010  # xdp-filter: destination, and UDP
_MATCH_SOURCE = 1  # xdp-filter: the lowest bits of a value tell what must match, those above count


class PeerError(Exception):
    """A peer cannot be loaded; the message says which and why."""


def empty_drop() -> int:
    """The descriptor of a program that does nothing but drop."""
    drop_exit = bytes([0xB7, 0, 0, 0, libbpf.XDP_DROP, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
    return libbpf.load_xdp(drop_exit, "empty", frags=libbpf.has_frags())


@dataclass(frozen=True, slots=True)
class XdpFilter:
    """A loaded xdp-filter that passes what is not listed (its policy "allow")."""

    program: int
    maps: dict[str, int]

    def deny(self, family: Family, source: bytes) -> None:
        """List a source, as `xdp-filter ip --mode src ADDRESS` does."""
        value = np.full(libbpf.possible_cpus(), _MATCH_SOURCE, "u8")
        libbpf.update(self.maps[_FILTER_MAPS[family]], np.frombuffer(source, "u1"), value)

    def deny_destination_port(self, port: int) -> None:
        """List a UDP port in network byte order, as `xdp-filter port --mode dst --proto udp PORT` does."""
        value = np.full(libbpf.possible_cpus(), _MATCH_DESTINATION_UDP, "u8")
        libbpf.update(self.maps["filter_ports"], np.array([port], "u4"), value)


def xdp_filter(features: str) -> XdpFilter:
    """Load the object for `features`: "all", or "ip" for addresses alone."""
    path = _OBJECTS / f"xdpfilt_alw_{features}.o"
    if not path.exists():
        raise PeerError(f"{path} is missing: install the package xdp-tools")
    lib = _library()
    opened = lib.bpf_object__open_file(os.fsencode(path), None)
    if not opened:
        raise PeerError(f"libbpf cannot read {path}")
    for found in _each(lib.bpf_object__next_map, opened):
        # They would be pinned for all to share; ours live as long as this process.
        lib.bpf_map__set_pin_path(found, None)
    if (error := lib.bpf_object__load(opened)) < 0:
        raise PeerError(f"the kernel refuses {path}: {os.strerror(-error)}")
    maps = {lib.bpf_map__name(found).decode(): lib.bpf_map__fd(found) for found in _each(lib.bpf_object__next_map, opened)}
    (program,) = _each(lib.bpf_object__next_program, opened)
    return XdpFilter(lib.bpf_program__fd(program), maps)


def _each(following, opened: int) -> list[int]:  # type: ignore[no-untyped-def]
    found, at = [], following(opened, None)
    while at:
        found.append(at)
        at = following(opened, at)
    return found


def _library() -> c.CDLL:
    lib = c.CDLL("libbpf.so.1", use_errno=True)
    lib.libbpf_set_print(None)
    for name, result, arguments in (
        ("bpf_object__open_file", c.c_void_p, [c.c_char_p, c.c_void_p]), ("bpf_object__load", c.c_int, [c.c_void_p]),
        ("bpf_object__next_map", c.c_void_p, [c.c_void_p, c.c_void_p]), ("bpf_object__next_program", c.c_void_p, [c.c_void_p, c.c_void_p]),
        ("bpf_map__set_pin_path", c.c_int, [c.c_void_p, c.c_char_p]), ("bpf_map__name", c.c_char_p, [c.c_void_p]),
        ("bpf_map__fd", c.c_int, [c.c_void_p]), ("bpf_program__fd", c.c_int, [c.c_void_p]),
    ):  # fmt: skip
        getattr(lib, name).restype = result
        getattr(lib, name).argtypes = arguments
    return lib
