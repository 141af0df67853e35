"""The formulas by which kernels count what a map costs, on figures that were read from kernels."""

import re
from pathlib import Path

import numpy as np
import pytest
from servicefakes import entry

from xdpmond.config import Config
from xdpmond.kernel import abi, verdicts
from xdpmond.kernel.costs import Formula
from xdpmond.kernel.tables import SMALLEST_POLICY, TALKER_MAPS, Table, policy_tables, tables
from xdpmond.model import Family, Prefix
from xdpmond.policy import Policy

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


SEED = [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F]
PAGE = " ".join(re.sub(r"\\f.|^\.\w+ ?", "", line) for line in (Path(__file__).parents[2] / "man/xdpmond.toml.5").read_text().splitlines())


def shipped(cpus, *, flows=False):
    """The tables as the shipped settings make them, but for flows perhaps, by name."""
    config = Config()
    return tables(cpus=cpus, sets=config.tables.talkers_of_a_cpu(cpus) // abi.WAYS, rule_cells=config.tables.rule_counters,
                  ring_bytes=config.events.ring_size, local=False, flows=flows)  # fmt: skip


def test_the_manual_says_what_the_shipped_tables_cost():
    numbers, figures = re.search(r"possible CPUs +([\d ]+?) +all tables +([\d. MB]+)", PAGE).groups()
    for cpus, figure in zip(map(int, numbers.split()), figures.replace("MB", "").split(), strict=True):
        made = {**shipped(cpus), **policy_tables(SMALLEST_POLICY)}
        assert sum(Formula(cpus, NEW.headers, 4096).cost(table) for table in made.values()) / 1e6 == pytest.approx(float(figure), abs=0.05)


@pytest.mark.parametrize(("cpus", "talkers", "with_flows"), [(1, 8.4, 14.7), (8, 8 * 8.39, 8 * 14.69), (64, 67.1, 117.5)])
def test_the_manual_says_what_talkers_cost(cpus, talkers, with_flows):
    def cost(*, flows):
        made = shipped(cpus, flows=flows)
        return sum(Formula(cpus, NEW.headers, 4096).cost(made[name]) for name in TALKER_MAPS) / 1e6

    assert cost(flows=False) == pytest.approx(talkers, abs=0.1)
    assert cost(flows=True) == pytest.approx(with_flows, abs=0.1)
    assert "as shipped 8.4 MB for each of up to 8 CPUs, 67.1 MB on larger hosts. 112, 14.7 MB and 117.5 MB with" in PAGE


def test_the_manual_says_what_prefixes_cost():
    random = np.random.default_rng(1)
    addresses, lengths = random.integers(0, 2**32, 10_000), random.choice([*[32] * 14, *[24] * 4, 20, 16], 10_000)
    prefixes = (Prefix(Family.IPV4, int(a >> 32 - n << 32 - n).to_bytes(4, "big"), int(n)) for a, n in zip(addresses, lengths, strict=True))
    built = verdicts.build(Policy(entry(str(prefix)) for prefix in prefixes))
    assert sum(map(NEW.cost, policy_tables(built.size(SEED)).values())) / 1e6 == pytest.approx(1.2, abs=0.1)
    assert sum(map(NEW.cost, policy_tables(SMALLEST_POLICY).values())) / 1e6 == pytest.approx(0.7, abs=0.05)
    assert "0.7 MB for an empty policy, about 1.2 MB for 10,000 IPv4 prefixes of mixed length" in PAGE
