"""Files in MaxMind's DB format, version 2.0, written by its public description: a binary search tree over the bits of an address, the
records that its leaves point to, and a map that describes the file. IPv4 addresses stand in the tree below ::/96."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

_EMPTY = None
_MARKER = b"\xab\xcd\xefMaxMind.com"
_SEPARATOR = bytes(16)


def encode(networks: Mapping[str, Any], *, kind: str, version: int = 6, record_size: int = 24) -> bytes:
    """A file with a record for each network, none of which may lie in another. `version` 4: a tree of IPv4 alone."""
    root: list[Any] = [_EMPTY, _EMPTY]
    data, places = b"", {}
    for text, record in networks.items():
        network = ipaddress.ip_network(text)
        bits, length = int(network.network_address), network.prefixlen
        width = network.max_prefixlen
        if version == 6 and network.version == 4:
            length, width = length + 96, 128
        encoded = _value(record)
        if encoded not in places:
            places[encoded] = len(data)
            data += encoded
        node = root
        for depth in range(length):
            side = bits >> (width - 1 - depth) & 1
            if depth == length - 1:
                assert node[side] is _EMPTY, f"{text} overlaps"
                node[side] = places[encoded]
            else:
                if node[side] is _EMPTY:
                    node[side] = [_EMPTY, _EMPTY]
                node = node[side]
    nodes: list[list[Any]] = []
    numbers: dict[int, int] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        numbers[id(node)] = len(nodes)
        nodes.append(node)
        waiting += [side for side in node if isinstance(side, list)]
    tree = b"".join(_node([_pointer(side, numbers, len(nodes)) for side in node], record_size) for node in nodes)
    metadata = {
        "node_count": len(nodes), "record_size": _Sized(record_size, 5), "ip_version": _Sized(version, 5), "database_type": kind,
        "languages": ["en"], "binary_format_major_version": _Sized(2, 5), "binary_format_minor_version": _Sized(0, 5),
        "build_epoch": _Sized(1_700_000_000, 9), "description": {"en": "made by a test"},
    }  # fmt: skip
    return tree + _SEPARATOR + data + _MARKER + _value(metadata)


class _Sized(int):
    """A number of a type of its own: 5 is 16 bits, 6 is 32, 9 is 64."""

    type: int

    def __new__(cls, value: int, type_: int) -> _Sized:
        made = super().__new__(cls, value)
        made.type = type_
        return made


def _pointer(side: Any, numbers: Mapping[int, int], count: int) -> int:
    if side is _EMPTY:
        return count
    return numbers[id(side)] if isinstance(side, list) else count + len(_SEPARATOR) + side


def _node(pair: list[int], record_size: int) -> bytes:
    left, right = pair
    if record_size == 28:  # the two upper halves of a byte stand in the middle
        middle = left >> 24 << 4 | right >> 24
        return (left & 0xFFFFFF).to_bytes(3, "big") + bytes([middle]) + (right & 0xFFFFFF).to_bytes(3, "big")
    return left.to_bytes(record_size // 8, "big") + right.to_bytes(record_size // 8, "big")


def _value(of: Any) -> bytes:
    if isinstance(of, dict):
        return _control(7, len(of)) + b"".join(_value(key) + _value(value) for key, value in of.items())
    if isinstance(of, list):
        return _control(11, len(of)) + b"".join(map(_value, of))
    if isinstance(of, str):
        return _control(2, len(of.encode())) + of.encode()
    assert isinstance(of, int), of
    octets = int(of).to_bytes((int(of).bit_length() + 7) // 8, "big")
    return _control(of.type if isinstance(of, _Sized) else 6, len(octets)) + octets


def _control(type_: int, size: int) -> bytes:
    more = b""
    if size >= 285:
        size, more = 30, (size - 285).to_bytes(2, "big")
    elif size >= 29:
        size, more = 29, bytes([size - 29])
    return (bytes([type_ << 5 | size]) if type_ < 8 else bytes([size, type_ - 7])) + more
