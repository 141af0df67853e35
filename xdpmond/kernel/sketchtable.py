"""The sketches of the packet path, and which ports have one.

There are two halves, for windows of even number and of odd, so that packets write to one while the daemon reads the other. A half is
zeroed when its window has been read, which is before the next window that will write to it begins. A few ports have a pair of cells of
their own, for IPv4 and IPv6. A pair that is taken from one port is given to another only in a later window, when both halves of it have
been zeroed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from ..model import Port, PortRange
from ..rows import PortSums, chunks_of
from ..sketches import CELLS, PORT_PAIRS, REGISTERS, Sketches
from . import abi
from .maps import map_memory

Key = tuple[int, int]
"""Protocol number and port; of ICMP and ICMPv6 the type + 1."""

_TCP, _UDP, _SCTP, _ICMP, _ICMPV6 = 6, 17, 132, 1, 58
_BEGINS = {_TCP: 0, _UDP: 65536, _SCTP: 2 * 65536, _ICMP: 3 * 65536, _ICMPV6: 3 * 65536}
"""Where the ports of a protocol stand in the map `sketched`. ICMP is that of IPv4 and ICMPv6 that of IPv6, so that they share a pair."""
_TYPES = 256
_MANY = 64
"""Sources that make a port one that may need an estimate."""
_ECHO = {_ICMP: 8 + 1, _ICMPV6: 128 + 1}
"""The request that everybody knows."""


class SketchTable:
    """Not for two threads at once."""

    def __init__(self, maps: Mapping[str, int], window: int, *, reading: bool):
        """`window` is the running one, and `reading` says whether the one before it waits to be read."""
        memory = map_memory(maps["sketches"], 2 * CELLS * REGISTERS, write=True)
        self._halves = np.frombuffer(memory, "u1", 2 * CELLS * REGISTERS).reshape(2, CELLS, REGISTERS)
        self._pairs = np.frombuffer(map_memory(maps["sketched"], abi.SKETCHED, write=True), "u1", abi.SKETCHED)
        # What the last process left. Since when it is so, is not known: in this window, what is said of single ports may be too little.
        self._since = {int(place): window for place in np.flatnonzero(self._pairs)}
        used = {int(self._pairs[place]) - 1 for place in self._since}
        self._freed = {pair: window for pair in range(PORT_PAIRS) if pair not in used}
        if not self._halves.any():
            self._freed = dict.fromkeys(range(PORT_PAIRS), window - 1)
        if not reading:
            self.clear(window - 1)

    def assign(self, wanted: Iterable[Key], window: int, *, idle: bool = False) -> None:
        """Give pairs to these ports, the first ones first, and take them from all others. `window` is the running one; `idle`: no packet
        has been counted in it."""
        places: dict[int, None] = {}
        for key in wanted:
            places[_place(key)] = None
            if len(places) == PORT_PAIRS:
                break
        for place in set(self._since).difference(places):
            self._freed[int(self._pairs[place]) - 1] = window
            self._pairs[place] = 0
            del self._since[place]
        free = [pair for pair, freed in self._freed.items() if freed < window]
        for place, pair in zip([place for place in places if place not in self._since], free, strict=False):
            del self._freed[pair]
            self._since[place] = window - 1 if idle else window
            self._pairs[place] = pair + 1

    def read(self, window: int) -> Sketches:
        """Those of the running window, or of a closed one that was not yet cleared. A port that was given its pair in it is left out."""
        ports = {key: int(self._pairs[place]) - 1 for place, since in self._since.items() if since < window for key in _keys(place)}
        return Sketches(self._halves[window & 1].copy(), ports)

    def clear(self, window: int) -> None:
        """Zero those of a window that has been read."""
        self._halves[window & 1] = 0


def _place(key: Key) -> int:
    protocol, port = key
    return _BEGINS[protocol] + port


def _keys(place: int) -> Sequence[Key]:
    if place >= _BEGINS[_ICMP]:
        return [(protocol, place - _BEGINS[_ICMP]) for protocol in (_ICMP, _ICMPV6)]
    return [((_TCP, _UDP, _SCTP)[place >> 16], place & 0xFFFF)]


def busiest(rows: np.ndarray) -> list[Key]:
    """The ports that many sources reached, those with the most first: of merged rows."""
    counted = PortSums()
    for chunk in chunks_of(rows):
        counted.add(chunk)
    ports, sums = counted.ports()
    sources = sums["ipv4"] + sums["ipv6"]
    order = sources.argsort(kind="stable")[::-1]
    keys = [(int(key) >> 16, int(key) & 0xFFFF) for key in ports[order[sources[order] >= _MANY]][: 2 * PORT_PAIRS]]
    return [(protocol, port) for protocol, port in keys if port and protocol in _BEGINS][:PORT_PAIRS]


def ports_of_interest(
    ports: Sequence[PortRange], failsafe: Sequence[Port], flags: Mapping[int, int], busy: Iterable[Key] = ()
) -> Iterator[Key]:
    """Ports that are to have sketches, the most important first, more than there is room for: what is named one by one in the setting
    `ports`, failsafe ports, what is listened on, what is `busy`, and then the ranges of the setting. `flags` are those of
    `sockets.port_flags`."""
    for of in ports:
        if of.low == of.high:
            yield from _within(of)
    for port in failsafe:
        yield (_UDP if port.protocol == "udp" else _TCP), port.number
    for protocol, listens in ((_TCP, abi.PORT_TCP_LISTENS), (_UDP, abi.PORT_UDP_LISTENS)):
        for number, flag in sorted(flags.items()):
            if flag & listens:
                yield protocol, number
    yield from busy
    for of in ports:
        if of.protocol in _ECHO:
            yield of.protocol, _ECHO[of.protocol]
    for of in ports:
        yield from _within(of)


def _within(of: PortRange) -> Iterator[Key]:
    for protocol in (_TCP, _UDP, _SCTP) if of.protocol is None else (of.protocol,):
        if protocol in _BEGINS:
            last = _TYPES if protocol in _ECHO else 65535
            for port in range(max(of.low, 1), min(of.high, last) + 1):
                yield protocol, port
