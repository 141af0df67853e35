"""From the ring buffer to whoever wants events: taken in bulk on the event loop, turned into values, handed on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from ..model import Outcome, PacketEvent, format_address
from . import abi
from .datapath import Datapath
from .maps import FAMILY_FROM_ABI, realtime_at_monotonic_zero

_BULK = 512  # events a turn: some milliseconds of the loop
_PAUSE = 0.02  # seconds between turns, so that a burst is taken in bulk


class EventPump:
    """Owned by one task. `publish` is called for each event, on the loop; it must not block."""

    def __init__(self, datapath: Datapath, publish: Callable[[PacketEvent], None]):
        self._datapath = datapath
        self._publish = publish

    async def run(self) -> None:
        ring = self._datapath.ring
        assert ring is not None
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        try:
            while True:
                # Level-triggered, and taken out while we do not read: the ring is polled again only when we come back to it.
                loop.add_reader(ring.fileno(), readable.set)
                await readable.wait()
                loop.remove_reader(ring.fileno())
                readable.clear()
                events = ring.read(_BULK)
                epoch = realtime_at_monotonic_zero()
                for event in events:
                    self._publish(self._value(event, epoch))
                if len(events) < _BULK:
                    await asyncio.sleep(_PAUSE)
        finally:
            loop.remove_reader(ring.fileno())

    def _value(self, event: np.void, epoch: float) -> PacketEvent:
        family = FAMILY_FROM_ABI[event["family"]]
        size = family.bits // 8
        has_ports, vlan = bool(event["has_ports"]), int(event["vlan"])
        prefix = self._datapath.rules.prefix_of(int(event["rule"]))
        return PacketEvent(
            timestamp=epoch + int(event["timestamp"]) / 1e9,
            interface=self._datapath.interface_of_slot(int(event["slot"])),
            vlan=None if vlan == abi.VLAN_NONE else vlan,
            family=family,
            src_ip=format_address(family, event["source"].tobytes()[:size]),
            dst_ip=format_address(family, event["destination"].tobytes()[:size]),
            src_port=int(event["source_port"]) if has_ports else None,
            dst_port=int(event["destination_port"]) if has_ports else None,
            protocol_num=int(event["protocol"]),
            packet_size=int(event["packet_size"]),
            outcome=Outcome(int(event["outcome"])),
            rule=str(prefix) if prefix else "default" if event["rule"] == abi.RULE_DEFAULT else "removed",
            suppressed=int(event["suppressed"]),
            flow_hash=int(event["flow_hash"]),
        )
