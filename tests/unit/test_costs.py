"""The formulas by which kernels count what a map costs, on figures that were read from kernels."""

import pytest

from xdpmond.kernel.costs import Definition, Formula

NEW = Formula(2, {2: 312, 6: 312, 27: 304}, 4096)
"""Linux 6.18 with two possible CPUs."""
OLD = Formula(2, None, 4096)
"""Linux 6.1."""


@pytest.mark.parametrize(
    ("definition", "cost"),
    [
        (Definition(2, 4, 8, 1), 320),
        (Definition(2, 4, 3, 7), 368),
        (Definition(2, 4, 8, 1, 1024), 8192),
        (Definition(2, 4, 256, 16384, 1024), 4198400),
        (Definition(6, 4, 8, 1), 336),
        (Definition(6, 4, 216, 10), 4712),
        (Definition(27, 0, 0, 4096), 16728),
        (Definition(27, 0, 0, 262144), 275784),
        (Definition(1, 4, 8, 1), None),
    ],
)
def test_what_linux_6_18_said(definition, cost):
    assert NEW.cost(definition) == cost


@pytest.mark.parametrize(
    ("definition", "cost"),
    [
        (Definition(2, 4, 256, 16384, 1024), 16384 * 264),  # the key counts, and the sum is rounded to 8 bytes
        (Definition(2, 4, 8, 1), 4096),
        (Definition(6, 4, 16, 6144), -(-6144 * 40 // 4096) * 4096),
        (Definition(6, 4, 5, 1000), -(-1000 * 24 // 4096) * 4096),
        (Definition(27, 0, 0, 262144), 0),
    ],
)
def test_what_linux_6_1_tells(definition, cost):
    assert OLD.cost(definition) == cost
