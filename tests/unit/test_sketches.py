"""Estimates against exact sets."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sketching import observe
from xdpmond.model import Family
from xdpmond.sketches import CELLS, OVERALL_CELLS, REGISTERS, Sketches, estimate

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=300)


def registers(hashes, number=REGISTERS):
    made = np.zeros(number, "u1")
    observe(made, np.array(sorted(hashes), "u8"))
    return made


@given(HASHES)
def test_few_sources_are_told_almost_exactly(hashes):
    """A property of any hash that is one; these are what hypothesis makes of them, so that only their number is bounded."""
    different = {hash * 0x9E3779B97F4A7C15 % 2**64 for hash in hashes}
    spread = np.random.default_rng(len(different)).integers(0, 2**64, len(different), dtype="u8")
    assert estimate(registers(spread.tolist())) == pytest.approx(len(different), abs=max(1, 0.1 * len(different)))


@given(HASHES, HASHES)
def test_a_union_is_the_sketch_of_all(one, other):
    cells = np.zeros((2, CELLS, REGISTERS), "u1")
    for half, hashes in enumerate((one, other)):
        observe(cells[half, :OVERALL_CELLS], np.array(hashes, "u8"))
    both = Sketches(cells[0], {(6, 22): 0, (6, 80): 1}) | Sketches(cells[1], {(6, 22): 0, (6, 80): 2})
    everything = Sketches.empty()
    observe(everything.cells[:OVERALL_CELLS], np.array(one + other, "u8"))
    assert (both.cells == everything.cells).all()
    assert both.unique(Family.IPV4) == everything.unique(Family.IPV4)
    assert both.ports == {(6, 22): 0}


@given(HASHES)
def test_repeated_and_reordered_sources_change_nothing(hashes):
    twice = np.zeros(REGISTERS, "u1")
    observe(twice, np.array(hashes, "u8"))
    observe(twice, np.array(hashes[::-1], "u8"))
    assert (twice == registers(hashes)).all()


def test_nothing_and_everything():
    assert estimate(np.zeros(REGISTERS, "u1")) == 0
    assert estimate(np.full(REGISTERS, 51, "u1")) > 1e15
    assert registers([0])[0] == 51
    assert registers([(1 << 63) | 5])[5] == 1


@pytest.mark.parametrize(("cells", "error"), [(1, Sketches.ERROR), (OVERALL_CELLS, Sketches.UNIQUE_ERROR)])
@pytest.mark.parametrize("number", [1, 10, 100, 1000, 5000, 6000, 10_000, 40_000, 50_000, 100_000, 1_000_000])
def test_the_error_is_what_is_said(number, cells, error):
    """Over many sketches: the root of the mean square of the relative error, and no bias, at each size; the ones around 2.5 sources a
    register are where an uncorrected estimate is worst."""
    rounds = 10 if number >= 100_000 else 60
    random = np.random.default_rng(number + cells)
    found = np.empty(rounds)
    for at in range(rounds):
        made = np.zeros(cells * REGISTERS, "u1")
        for begin in range(0, number, 1 << 18):
            observe(made, random.integers(0, 2**64, min(number - begin, 1 << 18), dtype="u8"))
        found[at] = estimate(made) / number - 1
    slack = 1 + 4 / math.sqrt(2 * rounds)  # four standard errors of what is measured here
    assert math.sqrt((found**2).mean()) < error * slack
    assert abs(found.mean()) < 4 * error / math.sqrt(rounds) + 0.001


def test_who_has_a_sketch_of_his_own():
    sketches = Sketches(np.zeros((CELLS, REGISTERS), "u1"), {(6, 443): 3, (1, 9): 4})
    observe(sketches.cells[2 * OVERALL_CELLS + 7], np.random.default_rng(1).integers(0, 2**64, 50, dtype="u8"))
    assert sketches.of_port(Family.IPV6, 6, 443) == pytest.approx(50, abs=3)
    assert sketches.of_port(Family.IPV4, 6, 443) == 0
    assert sketches.of_port(Family.IPV4, 1, 9) == 0
    assert sketches.of_port(Family.IPV6, 17, 443) is None
    assert sketches.unique(Family.IPV6) == 0
