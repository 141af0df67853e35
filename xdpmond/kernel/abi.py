"""Mirror of bpf/abi.h: the structs as numpy dtypes, the constants, the enums.

tests/kernel/test_abi.py compiles a dumper from the header and compares every name, offset, size and number with what stands here.
"""

from __future__ import annotations

import enum

import numpy as np

ABI_VERSION = 1
MAX_SLOTS = 16
WAYS = 4
PORT_NONE = 0
VLAN_NONE = 0xFFFF
SEEN_SHIFT = 24
SAMPLER_CELLS = 16384
RULE_DEFAULT = 0

CLASSES = 8
FAMILIES = 3
OUTCOMES = 16
ANOMALIES = 16
TOTAL_CELLS = MAX_SLOTS * FAMILIES * CLASSES * OUTCOMES

FAMILY_IPV4 = 1
FAMILY_IPV6 = 2

VERDICT_ALLOW = 1
VERDICT_LOG = 2
VERDICT_DENY = 3

PORT_TCP_LISTENS = 1
PORT_UDP_LISTENS = 2
PORT_TCP_FAILSAFE = 4
PORT_UDP_FAILSAFE = 8


class Anomaly(enum.IntEnum):
    """enum xm_anomaly: what was odd about a frame."""

    SHORT_FRAME = 0
    VLAN_DEPTH = 1
    SHORT_IP = 2
    IP_VERSION = 3
    IP_LENGTH = 4
    EXTENSION_DEPTH = 5
    SHORT_EXTENSION = 6
    SHORT_TRANSPORT = 7
    LATER_FRAGMENT = 8
    UNKNOWN_SLOT = 9


COUNT = np.dtype([("packets", "u8"), ("bytes", "u8")])
SLOT = np.dtype([("ifindex", "u4"), ("enforce", "u1"), ("number", "u1"), ("pad", "u1", 2)])
CONTROL = np.dtype(
    [
        ("seed", "u8", 4), ("event_interval", "u8"), ("window", "u4"), ("read_window", "u4"), ("policy", "u4"),
        ("default_verdict", "u4", 2), ("event_budget", "u4"), ("event_reserve", "u4"), ("ephemeral_first", "u2"), ("ephemeral_last", "u2"),
        ("slots", SLOT, MAX_SLOTS),
    ]
)  # fmt: skip
LEDGER_HALF = np.dtype([("packets", "u8"), ("bytes", "u8"), ("window", "u4"), ("pad", "u4")])
LEDGER = np.dtype(
    [
        ("abi_version", "u4"), ("cpus", "u4"), ("sets", "u4"), ("generation", "u4"), ("build", "u8"), ("started", "u8"),
        ("window_started", "u8"), ("half", LEDGER_HALF, 2),
    ]
)  # fmt: skip
PREFIX = np.dtype([("length", "u4"), ("family", ">u4"), ("address", "u1", 16)])
RULE = np.dtype([("index", "u4"), ("verdict", "u4")])
TALKER = np.dtype(
    [
        ("source", "u1", 16), ("port", "u2"), ("protocol", "u1"), ("family", "u1"), ("window", "u4"), ("bytes", "u8", 2),
        ("packets", "u4", 2), ("syns", "u4", 2), ("first_seen", "u4"), ("last_seen", "u4"),
    ]
)  # fmt: skip
SET = np.dtype([("way", TALKER, WAYS)])
TALLIES = np.dtype(
    [
        ("sourced", COUNT), ("evicted", COUNT), ("untracked", COUNT), ("evictions", "u8"), ("events_made", "u8"),
        ("events_ring_full", "u8"), ("events_over_budget", "u8"), ("events_merged", "u8"), ("anomaly", "u8", ANOMALIES),
    ]
)  # fmt: skip
BUDGET = np.dtype([("second", "u4"), ("spent", "u4"), ("unknown", "u4"), ("pad", "u4")])
SAMPLER = np.dtype([("tag", "u8"), ("last", "u8"), ("suppressed", "u8"), ("pad", "u8")])
EVENT = np.dtype(
    [
        ("timestamp", "u8"), ("source", "u1", 16), ("destination", "u1", 16), ("rule", "u4"), ("packet_size", "u4"), ("suppressed", "u4"),
        ("flow_hash", "u4"), ("source_port", "u2"), ("destination_port", "u2"), ("vlan", "u2"), ("slot", "u1"), ("family", "u1"),
        ("protocol", "u1"), ("outcome", "u1"), ("has_ports", "u1"), ("tcp_flags", "u1"), ("pad", "u1", 4),
    ]
)  # fmt: skip

STRUCTS = {
    "xm_count": COUNT, "xm_slot": SLOT, "xm_control": CONTROL, "xm_ledger_half": LEDGER_HALF, "xm_ledger": LEDGER, "xm_prefix": PREFIX,
    "xm_rule": RULE, "xm_talker": TALKER, "xm_set": SET, "xm_tallies": TALLIES, "xm_budget": BUDGET, "xm_sampler": SAMPLER,
    "xm_event": EVENT,
}  # fmt: skip
