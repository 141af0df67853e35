"""What a map costs, as computed, is what this kernel charges for it: to the byte, for every map of ours and for odd sizes."""

from __future__ import annotations

import os

import pytest

from xdpmond.kernel import costs, libbpf
from xdpmond.kernel.tables import ARRAY, MMAPABLE, PERCPU_ARRAY, RINGBUF, Table, make

from .harness import Harness

BOTH_KINDS = True


def test_every_map_of_ours_costs_what_was_computed(datapath: Harness) -> None:
    maps = datapath.loaded.maps
    computed = {name: costs.formula().cost(Table(*libbpf.map_info(fd))) for name, fd in maps.items()}
    assert computed == {name: costs.charged(fd) for name, fd in maps.items()}
    assert {(cost.name, cost.bytes) for cost in costs.costs(maps)} == set(computed.items())


@pytest.mark.parametrize(
    "definition",
    [
        Table(ARRAY, 4, 1, 1, 0),
        Table(ARRAY, 4, 13, 1001, 0),
        Table(ARRAY, 4, 40, 1000, MMAPABLE),
        Table(ARRAY, 4, 64, 4096, MMAPABLE),
        Table(PERCPU_ARRAY, 4, 16, 6144, 0),
        Table(PERCPU_ARRAY, 4, 5, 3, 0),
        Table(RINGBUF, 0, 0, 65536, 0),
        Table(RINGBUF, 0, 0, 1 << 20, 0),
    ],
    ids=str,
)
def test_maps_of_any_size(definition: Table) -> None:
    fd = make("sized", definition)
    try:
        assert Table(*libbpf.map_info(fd)) == definition
        assert costs.formula().cost(definition) == costs.charged(fd)
    finally:
        os.close(fd)


def test_a_type_of_map_that_is_not_known_costs_what_the_kernel_says() -> None:
    fd = make("hash", Table(1, 4, 8, 100, 0))
    try:
        (cost,) = costs.costs({"hash": fd})
        assert cost.bytes == costs.charged(fd) > 100 * 12
    finally:
        os.close(fd)
