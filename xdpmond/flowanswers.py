"""Questions about flows, answered from the records that are kept and the running window together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answers import MOST_ROWS, protocol_of, reaching
from .errors import UsageError
from .flows import OVER, TCP, FlowCache
from .model import Family, Outcome, format_address, parse_address, protocol_name
from .rows import WITH_PORTS

Json = dict[str, Any]

_BY = ("bytes", "packets")
_ICMP = (1, 58)
_FLAGS = (("S", 0x02), ("A", 0x10), ("P", 0x08), ("U", 0x20), ("R", 0x04), ("F", 0x01), ("E", 0x40), ("C", 0x80))
"""As they most often come in a connection."""


@dataclass(frozen=True, slots=True)
class WantedFlows:
    """Which flows, and in which order. `address` is that of either end."""

    by: str
    limit: int
    port: int | None
    protocol: int | None
    address: tuple[Family, bytes] | None

    @classmethod
    def parse(cls, by: str, limit: int, port: int | None, protocol: str | None, address: str | None) -> WantedFlows:
        if by not in _BY:
            raise UsageError(f"'{by:.40}' is nothing to sort flows by", hint="bytes or packets")
        ends = None if address is None else parse_address(address)
        return cls(by, min(max(limit, 1), MOST_ROWS), port, protocol_of(protocol, port), ends)

    def where(self, rows: np.ndarray) -> np.ndarray:
        mask = reaching(rows, self.protocol, self.port)
        if self.address is not None:
            family, packed = self.address
            address = np.frombuffer(packed.ljust(16, b"\0"), "u1")
            either = (rows["source"] == address).all(axis=1) | (rows["destination"] == address).all(axis=1)
            mask &= either & (rows["family"] == family)
        return mask


def flows(cache: FlowCache, running: np.ndarray, started: float, wanted: WantedFlows, *, now: float, inactive: float,
          inexact_until: float, interface: Callable[[int], str]) -> Iterator[Json]:  # fmt: skip
    """The strongest flows. `running` are the rows of the running window, which began at `started`; until `inexact_until` some packets have
    found no place in the kernel's table; `interface` names that of a slot."""
    found = cache.strongest(running, started, wanted.by, wanted.limit, wanted.where)
    # Whoever takes them takes his time: what he holds must not be the cache.
    return (flow(row, interface(int(row["slot"])), now=now, inactive=inactive, inexact_until=inexact_until) for row in found)


def flow(row: np.void, interface: str, *, now: float, inactive: float, inexact_until: float) -> Json:
    """Not `active`: TCP has said that it is over, or nothing has come for the inactive timeout; the record ends with the window. `partial`:
    there may have been more packets of it than are counted here."""
    family, protocol, port, outcome = Family(int(row["family"])), int(row["protocol"]), int(row["port"]), Outcome(int(row["outcome"]))
    has_ports, icmp = protocol in WITH_PORTS and bool(port), protocol in _ICMP and bool(port)
    over = protocol == TCP and bool(row["tcp_flags"] & OVER)
    return {
        "source": format_address(family, row["source"].tobytes()[: family.bits // 8]),
        "destination": format_address(family, row["destination"].tobytes()[: family.bits // 8]),
        "source_port": int(row["source_port"]) if has_ports else None,
        "port": port if has_ports else None,
        "protocol": protocol_name(protocol) if protocol else "ip",
        "protocol_num": protocol,
        "icmp_type": port - 1 if icmp else None,
        "interface": interface,
        "family": family.label,
        "packets": int(row["packets"]),
        "bytes": int(row["bytes"]),
        "partial": float(row["first_seen"]) < inexact_until,
        "tcp_flags": "".join(letter for letter, bit in _FLAGS if row["tcp_flags"] & bit),
        "first_seen": round(float(row["first_seen"]), 3),
        "last_seen": round(float(row["last_seen"]), 3),
        "verdict": outcome.verdict,
        "action": outcome.action,
        "active": not over and now - float(row["last_seen"]) < inactive,
    }
