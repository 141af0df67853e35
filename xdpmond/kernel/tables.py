"""The maps of the packet path: of which type each is, and how large. What stands in them is told in bpf/abi.h.

The compiler knows the maps by name alone; the daemon makes them, and loads the program onto them. So a table of another size needs no
other program text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import abi, libbpf

HASH, ARRAY, PERCPU_ARRAY, RINGBUF = 1, 2, 6, 27  # enum bpf_map_type
NO_PREALLOC, MMAPABLE = 1 << 0, 1 << 10  # BPF_F_NO_PREALLOC, BPF_F_MMAPABLE


class Table(NamedTuple):
    """The definition of a map, in the order of `libbpf.map_info`. `value_size` is that of one CPU."""

    type: int
    key_size: int
    value_size: int
    entries: int
    flags: int


class PolicySize(NamedTuple):
    """Elements of the policy's maps, for one of the two copies that they hold. Buckets are a power of two."""

    lines: int
    buckets4: int
    buckets6: int


SMALLEST_POLICY = PolicySize(512, 256, 64)
"""Half of the lines are the smallest top of IPv4."""

POLICY_BYTES = abi.POLICY.itemsize + abi.TOPS * 4
"""Of struct xm_policy and the array at its end."""

POLICY_MAPS = ("policy", "lines", "buckets4", "buckets6")

TALKER_MAPS = ("talkers", "details", "past")
"""The parts of one table."""

VALUES = tuple(of.name.lower() for of in abi.Value)
"""Maps of one value, whose address stands in the instructions: see xm_value in bpf/abi.h."""


def _array(kind: np.dtype, entries: int) -> Table:
    return Table(ARRAY, 4, kind.itemsize, entries, MMAPABLE)


def policy_tables(size: PolicySize) -> dict[str, Table]:
    """The maps that hold the policy, twice."""
    return {
        "policy": Table(ARRAY, 4, 2 * POLICY_BYTES, 1, MMAPABLE),
        "lines": _array(abi.LINE, 2 * size.lines),
        "buckets4": _array(abi.BUCKET4_TYPE, 2 * size.buckets4),
        "buckets6": _array(abi.BUCKET6_TYPE, 2 * size.buckets6),
    }


def tables(*, cpus: int, sets: int, rule_cells: int, ring_bytes: int, local: bool, flows: bool) -> dict[str, Table]:
    """All other maps; without events if `ring_bytes` is 0. `local`: packets to other hosts are told apart. `flows`: the talkers are."""
    found = {
        "control": _array(abi.CONTROL, 1),
        "ledger": _array(abi.LEDGER, 1),
        "rules": _array(abi.RULE_COUNT, 1 + rule_cells),  # the first one is no rule: see rulecounts
        "talkers": _array(abi.FLOW_SET if flows else abi.SET, cpus * sets),
        "details": _array(abi.DETAIL, cpus * sets * abi.WAYS),
        "past": _array(abi.PAST, cpus * sets * abi.WAYS),
        "ports": Table(ARRAY, 4, 65536, 1, MMAPABLE),
        "sketches": Table(ARRAY, 4, 2 * abi.SKETCH_CELLS * abi.SKETCH.itemsize, 1, MMAPABLE),
        "sketched": Table(ARRAY, 4, abi.SKETCHED, 1, MMAPABLE),
        "totals": Table(PERCPU_ARRAY, 4, abi.COUNT.itemsize, abi.TOTAL_CELLS, 0),
        "cpu": Table(PERCPU_ARRAY, 4, abi.CPU.itemsize, 1, 0),
    }
    if local:
        found["locals"] = Table(HASH, abi.ADDRESS.itemsize, 1, abi.LOCALS, NO_PREALLOC)
    if ring_bytes:
        found |= {
            "sampler": Table(ARRAY, 4, abi.SAMPLER_CELLS * abi.SAMPLER.itemsize, 1, 0),
            "events": Table(RINGBUF, 0, 0, ring_bytes, 0),
        }
    return found


def make(name: str, table: Table) -> int:
    """Make a map; return its descriptor."""
    return libbpf.create_map(
        table.type, name, key_size=table.key_size, value_size=table.value_size, entries=table.entries, flags=table.flags
    )
