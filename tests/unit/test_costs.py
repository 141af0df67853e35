"""The formulas by which kernels count what a map costs, on figures that were read from kernels."""

import pytest

from xdpmond.kernel.costs import Formula
from xdpmond.kernel.tables import Table

NEW = Formula(2, {2: 312, 6: 312, 27: 304}, 4096)
"""Linux 6.18 with two possible CPUs."""
OLD = Formula(2, None, 4096)
"""Linux 6.1."""


@pytest.mark.parametrize(
    ("definition", "cost"),
    [
        (Table(2, 4, 8, 1, 0), 320),
        (Table(2, 4, 3, 7, 0), 368),
        (Table(2, 4, 8, 1, 1024), 8192),
        (Table(2, 4, 256, 16384, 1024), 4198400),
        (Table(6, 4, 8, 1, 0), 336),
        (Table(6, 4, 216, 10, 0), 4712),
        (Table(27, 0, 0, 4096, 0), 16728),
        (Table(27, 0, 0, 262144, 0), 275784),
        (Table(1, 4, 8, 1, 0), None),
    ],
)
def test_what_linux_6_18_said(definition, cost):
    assert NEW.cost(definition) == cost


@pytest.mark.parametrize(
    ("definition", "cost"),
    [
        (Table(2, 4, 256, 16384, 1024), 16384 * 264),  # the key counts, and the sum is rounded to 8 bytes
        (Table(2, 4, 8, 1, 0), 4096),
        (Table(6, 4, 16, 6144, 0), -(-6144 * 40 // 4096) * 4096),
        (Table(6, 4, 5, 1000, 0), -(-1000 * 24 // 4096) * 4096),
        (Table(27, 0, 0, 262144, 0), 0),
    ],
)
def test_what_linux_6_1_tells(definition, cost):
    assert OLD.cost(definition) == cost
