"""Mirror of bpf/abi.h: the structs as numpy dtypes, the constants, the enums.

tests/kernel/test_abi.py compiles a dumper from the header and compares every name, offset, size and number with what stands here.
"""

from __future__ import annotations

import enum

import numpy as np

from .. import sketches

ABI_VERSION = 7
MAX_SLOTS = 16
WAYS = 4
PORT_NONE = 0
VLAN_NONE = 0xFFFF
SEEN_SHIFT = 24
STATE_BYTES = 0xFFFF
STATE_PACKETS_SHIFT = 16
STATE_PACKETS = 0x1F << STATE_PACKETS_SHIFT
STATE_STAY = 8
STATE_SEEN_SHIFT = 21
STATE_SEEN = 0xFF << STATE_SEEN_SHIFT
STATE_CARRIED = 1 << 29
STATE_CODE_SHIFT = 30
STATE_MOMENT_SHIFT = 32
POLICY_BITS = 8
POLICY_NUMBERS = 1 << POLICY_BITS
WINDOW_IDS = 1 << 24
SAMPLER_CELLS = 16384
SEARCH_STEPS = 16
SEARCH_ROUNDS = 4
BUCKET4 = 7
BUCKET6 = 5
DISPLACED = 3
REF_KEY_SHIFT = 40
REF_DEEPER = 1 << 44
SKETCH_REGISTERS = sketches.REGISTERS
SKETCH_OVERALL = sketches.OVERALL_CELLS
SKETCH_PAIRS = sketches.PORT_PAIRS
SKETCH_CELLS = sketches.CELLS
SKETCH_ICMP = 3 * 65536
SKETCHED = SKETCH_ICMP + 512
LOCALS = 16384
TOPS = 65536
TOP_DEEPER = 4
LINK_MARK = 0x584D4C48
SETS_MARK = 0x584D5354
VALUE_MARK = 0x584D5641

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

CODE_NONE = 0
CODE_ALLOW = 1
CODE_DENY = 2
CODE_LINE = 3

PORT_TCP_LISTENS = 1
PORT_UDP_LISTENS = 2
PORT_TCP_FAILSAFE = 4
PORT_UDP_FAILSAFE = 8


class Value(enum.IntEnum):
    """enum xm_value: maps whose one value the program is given by its address."""

    CONTROL = 0
    POLICY = 1
    PORTS = 2
    SKETCHES = 3
    SKETCHED = 4
    SAMPLER = 5


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
        ("seed", "u8", 4), ("event_interval", "u8"), ("moment", "u8"), ("before", "u4"), ("read_window", "u4"),
        ("event_budget", "u4"), ("event_reserve", "u4"), ("seen_shift", "u4"), ("ephemeral_first", "u2"),
        ("ephemeral_last", "u2"), ("slots", SLOT, MAX_SLOTS),
    ]
)  # fmt: skip
LEDGER_HALF = np.dtype([("packets", "u8"), ("bytes", "u8"), ("window", "u4"), ("pad", "u4")])
LEDGER = np.dtype(
    [
        ("abi_version", "u4"), ("generation", "u4"), ("attributing", "u4"), ("pad", "u4"),
        ("build", "u8"), ("started", "u8"), ("window_started", "u8"), ("half", LEDGER_HALF, 2),
    ]
)  # fmt: skip
STEP = np.dtype([("depth", "u1"), ("deeper", "u1"), ("shallower", "u1"), ("pad", "u1")])
POLICY = np.dtype(
    [
        ("default_verdict", "u4"), ("first_line", "u4"), ("first4", "u4"), ("mask4", "u4"), ("first6", "u4"), ("mask6", "u4"),
        ("root", "u4"), ("shift4", "u4"), ("steps", STEP, SEARCH_STEPS), ("deeper4", "u8", 4),
    ]
)  # fmt: skip
LINE = np.dtype([("codes", "u8", 8)])
BUCKET4_TYPE = np.dtype([("ref", "u8", BUCKET4), ("away", "u8")])
NODE = np.dtype([("high", "u8"), ("low", "u8"), ("ref", "u8")])
BUCKET6_TYPE = np.dtype([("node", NODE, BUCKET6), ("pad", "u8")])
RULE_COUNT = np.dtype(
    [
        ("address", "u1", 16), ("family", "u1"), ("length", "u1"), ("partial", "u1"), ("used", "u1"), ("pad", "u1", 4), ("packets", "u8"),
        ("bytes", "u8"),
    ]
)  # fmt: skip
SKETCH = np.dtype([("registers", "u1", SKETCH_REGISTERS)])
TALKER = np.dtype([("name", "u4"), ("port", "u2"), ("protocol", "u1"), ("family", "u1"), ("state", "u8")])
SET = np.dtype([("way", TALKER, WAYS)])
DETAIL = np.dtype([("high", "u8"), ("second", "u4"), ("first_seen", "u4"), ("bytes", "u8"), ("packets", "u4"), ("syns", "u4")])
PAST = np.dtype([("bytes", "u8"), ("packets", "u4"), ("syns", "u4")])
FLOW = np.dtype(
    [
        ("talker", TALKER), ("destination", "u1", 16), ("source_port", "u2"), ("destination_port", "u2"), ("tcp_flags", "u1", 2),
        ("outcome", "u1"), ("slot", "u1"), ("ip_bytes", "u8", 2), ("last_seen", "u4"), ("pad", "u4"),
    ]
)  # fmt: skip
FLOW_SET = np.dtype([("way", FLOW, WAYS)])
ADDRESS = np.dtype([("address", "u1", 16), ("family", "u4")])
TALLIES = np.dtype(
    [
        ("sourced", COUNT), ("evicted", COUNT), ("untracked", COUNT), ("elsewhere", COUNT), ("evictions", "u8"), ("events_made", "u8"),
        ("events_ring_full", "u8"), ("events_over_budget", "u8"), ("events_merged", "u8"), ("anomaly", "u8", ANOMALIES),
    ]
)  # fmt: skip
BUDGET = np.dtype([("began", "u8"), ("until", "u8"), ("spent", "u4"), ("unknown", "u4")])
CLOCK = np.dtype([("tick", "u8"), ("now", "u8"), ("seen", "u8")])
PACKET = np.dtype(
    [
        ("source", "u8", 2), ("destination", "u8", 2), ("has_ports", "u1"), ("tcp_flags", "u1"), ("protocol", "u1"), ("family", "u1"),
        ("class", "u1"), ("essential", "u1"), ("fragment", "u1"), ("later", "u1"), ("destination_port", "u2"), ("source_port", "u2"),
        ("vlan", "u2"), ("icmp", "u2"), ("left", "u4"), ("ip_size", "u4"), ("link", "u2"), ("icmp_code", "u1"), ("hop_limit", "u1"),
        ("place", "u4"),
    ]
)  # fmt: skip
CPU = np.dtype([("tallies", TALLIES), ("budget", BUDGET), ("clock", CLOCK), ("packet", PACKET)])
SAMPLER = np.dtype([("tag", "u8"), ("last", "u8"), ("suppressed", "u8"), ("pad", "u8")])
EVENT = np.dtype(
    [
        ("timestamp", "u8"), ("source", "u1", 16), ("destination", "u1", 16), ("packet_size", "u4"), ("suppressed", "u4"),
        ("flow_hash", "u4"), ("source_port", "u2"), ("destination_port", "u2"), ("vlan", "u2"), ("slot", "u1"), ("family", "u1"),
        ("protocol", "u1"), ("outcome", "u1"), ("has_ports", "u1"), ("tcp_flags", "u1"),
    ]
)  # fmt: skip

STRUCTS = {
    "xm_count": COUNT, "xm_slot": SLOT, "xm_control": CONTROL, "xm_ledger_half": LEDGER_HALF, "xm_ledger": LEDGER, "xm_step": STEP,
    "xm_policy": POLICY, "xm_line": LINE, "xm_bucket4": BUCKET4_TYPE, "xm_node": NODE, "xm_bucket6": BUCKET6_TYPE,
    "xm_rule_count": RULE_COUNT, "xm_sketch": SKETCH, "xm_talker": TALKER, "xm_set": SET, "xm_detail": DETAIL, "xm_past": PAST,
    "xm_flow": FLOW, "xm_flow_set": FLOW_SET, "xm_address": ADDRESS, "xm_tallies": TALLIES, "xm_budget": BUDGET,
    "xm_clock": CLOCK, "xm_packet": PACKET, "xm_cpu": CPU, "xm_sampler": SAMPLER, "xm_event": EVENT,
}  # fmt: skip
