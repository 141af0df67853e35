"""What a map costs, as computed, is what this kernel charges for it: to the byte, for every map of ours and for odd sizes."""

from __future__ import annotations

import os

import pytest

from xdpmond.kernel import costs, libbpf
from xdpmond.kernel.costs import Definition
from xdpmond.kernel.libbpf import BPF_F_MMAPABLE, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_PERCPU_ARRAY, BPF_MAP_TYPE_RINGBUF

from .harness import Harness


def test_every_map_of_ours_costs_what_was_computed(datapath: Harness) -> None:
    maps = datapath.loaded.maps
    computed = {name: costs.formula().cost(Definition.of(fd)) for name, fd in maps.items()}
    assert computed == {name: costs.charged(fd) for name, fd in maps.items()}
    assert {(cost.name, cost.bytes) for cost in costs.costs(maps)} == set(computed.items())


@pytest.mark.parametrize(
    "definition",
    [
        Definition(BPF_MAP_TYPE_ARRAY, 4, 1, 1),
        Definition(BPF_MAP_TYPE_ARRAY, 4, 13, 1001),
        Definition(BPF_MAP_TYPE_ARRAY, 4, 40, 1000, BPF_F_MMAPABLE),
        Definition(BPF_MAP_TYPE_ARRAY, 4, 64, 4096, BPF_F_MMAPABLE),
        Definition(BPF_MAP_TYPE_PERCPU_ARRAY, 4, 16, 6144),
        Definition(BPF_MAP_TYPE_PERCPU_ARRAY, 4, 5, 3),
        Definition(BPF_MAP_TYPE_RINGBUF, 0, 0, 65536),
        Definition(BPF_MAP_TYPE_RINGBUF, 0, 0, 1 << 20),
    ],
    ids=str,
)
def test_maps_of_any_size(definition: Definition) -> None:
    fd = libbpf.create_map(definition.kind, "sized", key_size=definition.key_size, value_size=definition.value_size,
                           entries=definition.entries, flags=definition.flags)  # fmt: skip
    try:
        assert Definition.of(fd) == definition
        assert costs.formula().cost(definition) == costs.charged(fd)
    finally:
        os.close(fd)


def test_a_kind_of_map_that_is_not_known_costs_what_the_kernel_says() -> None:
    fd = libbpf.create_map(1, "hash", value_size=8, entries=100)
    try:
        (cost,) = costs.costs({"hash": fd})
        assert cost.bytes == costs.charged(fd) > 100 * 12
    finally:
        os.close(fd)
