"""Sources by port, against sets in plain Python; and what is said where they could not all be counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicefakes import rows

from xdpmond import rows as rows_module
from xdpmond.model import Count, Family, PortRange
from xdpmond.ports import PortCounts, Unique, count_ports, in_ranges, shown
from xdpmond.rows import merge, port_key

SSH, WEB, DNS = PortRange(6, 22, 22), PortRange(6, 80, 443), PortRange(17, 53, 53)
PING = port_key(1, 9)


class FakeSketches:
    """Knows of tcp/22 and of all sources together."""

    ERROR, UNIQUE_ERROR = 0.0229801, 0.0081

    def unique(self, family):
        return {Family.IPV4: 500, Family.IPV6: 0}[family]

    def of_port(self, family, protocol, port):
        return {Family.IPV4: 90, Family.IPV6: 1}[family] if (protocol, port) == (6, 22) else None


TALKERS = merge(rows(
    ("192.0.2.1", 6, 22, 5, 500), ("192.0.2.1", 6, 80, 1, 100), ("192.0.2.2", 6, 22, 2, 200), ("10.0.0.1", 6, 22, 3, 300),
    ("2001:db8::1", 6, 22, 4, 400), ("fe80::1", 58, 129, 1, 70), ("192.0.2.3", 1, 9, 7, 700), ("192.0.2.4", 6, 0, 1, 60),
    ("192.0.2.5", 47, 0, 1, 60), ("10.0.0.1", 17, 53, 1, 60),
))  # fmt: skip


def test_a_source_on_two_ports_counts_once_in_the_total_and_once_for_each():
    found = count_ports(TALKERS)
    assert found.sources == Unique(6, 2) and found.local == Unique(1, 1)
    assert found.count == Count(26, 2450) and found.local_count == Count(5, 430)
    by_key = {port.key: port for port in found}
    assert by_key[port_key(6, 22)].sources == Unique(3, 1) and by_key[port_key(6, 22)].local == Unique(1, 0)
    assert by_key[port_key(6, 80)].sources == Unique(1, 0)
    assert by_key[port_key(6, 22)].count == Count(14, 1400) and by_key[port_key(6, 22)].local_count == Count(3, 300)
    assert next(iter(found)) == by_key[port_key(6, 22)], "the port with the most sources stands first"


def test_ports_types_and_neither():
    shapes = {(port.protocol, port.port, port.icmp_type) for port in count_ports(TALKERS)}
    assert shapes == {(6, 22, None), (6, 80, None), (6, None, None), (17, 53, None), (1, None, 8), (58, None, 128), (47, None, None)}


def test_a_port_by_its_key():
    found = count_ports(TALKERS)
    assert found.of(PING).sources == Unique(1, 0) and found.of(PING).icmp_type == 8
    for nowhere in (0, port_key(6, 23), port_key(255, 65535)):
        assert found.of(nowhere).sources == Unique() and found.of(nowhere).count == Count()
    assert PortCounts().of(PING).sources == Unique() and list(PortCounts()) == []


def test_ports_that_are_not_wanted_are_left_out_and_named():
    found = count_ports(TALKERS, [SSH, DNS])
    assert {port.key for port in found} == {port_key(6, 22), port_key(17, 53)} and len(found) == 2
    assert found.sources == Unique(3, 1) and found.local == Unique(1, 0)
    assert set(found.others.tolist()) == {port_key(6, 80), port_key(6, 0), port_key(58, 129), PING, port_key(47, 0)}
    narrowed = count_ports(TALKERS, [SSH, WEB], within=[PortRange(6)])
    assert narrowed.sources == Unique(3, 1) and narrowed.others.tolist() == [port_key(6, 0)]
    assert count_ports(TALKERS, [PortRange(132)]).sources == Unique()
    assert count_ports().sources == Unique()


def test_what_was_not_all_counted_is_an_estimate_where_there_is_one():
    found = count_ports(TALKERS, exact=False, sketches=FakeSketches())
    assert found.sources == Unique(500, 2, False, 0.0081), "of each family the larger of what was counted and estimated"
    assert found.of(port_key(6, 22)).sources == Unique(90, 1, False, 0.023)
    assert found.of(port_key(6, 80)).sources == Unique(1, 0, False, None)
    assert found.of(port_key(6, 22)).local == Unique(1, 0, False), "local ones are not estimated"
    some = count_ports(TALKERS, [SSH], exact=False, sketches=FakeSketches())
    assert some.sources == Unique(3, 1, False, None), "the sketch of all sources says nothing of some ports"
    assert count_ports(TALKERS, exact=False).sources == Unique(6, 2, False, None)


def test_exact_counts_win_over_any_sketch():
    found = count_ports(TALKERS, exact=True, sketches=FakeSketches())
    assert found.sources == Unique(6, 2) and found.of(port_key(6, 22)).sources == Unique(3, 1)


def test_local_sources_are_taken_off():
    assert shown(Unique(90, 4, False, 0.023), Unique(3, 1, False), with_local=False) == Unique(87, 3, False, 0.023)
    assert shown(Unique(90, 4), Unique(3, 1), with_local=True) == Unique(90, 4)


ADDRESSES = st.sampled_from(["192.0.2.1", "192.0.2.2", "10.0.0.1", "169.254.0.9", "2001:db8::1", "fe80::1", "::1"])
ONE = st.tuples(ADDRESSES, st.sampled_from([1, 6, 17, 47, 132]), st.sampled_from([0, 22, 80, 65535]), st.integers(0, 9), st.integers(0, 99))
RANGES = st.lists(st.builds(PortRange, st.sampled_from([None, 6, 17, 1, 255]), st.sampled_from([0, 22]), st.sampled_from([22, 80, 65535])),
                  max_size=3)  # fmt: skip


def is_local(row):
    return not row[0].startswith(("192.0.2.", "2001:db8::"))


def unique(talkers):
    sources = {row[0] for row in talkers}
    return Unique(sum(":" not in source for source in sources), sum(":" in source for source in sources))


def count(talkers):
    return sum((Count(*row[3:]) for row in talkers), Count())


def wanted(protocol, port, ranges):
    return not ranges or any(
        (protocol in (6, 17, 132) if of.protocol is None else protocol == of.protocol) and of.low <= port <= of.high for of in ranges
    )


@pytest.fixture(params=[rows_module.CHUNK, 3], scope="module")
def _chunks(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "CHUNK", request.param)
        yield


@pytest.mark.usefixtures("_chunks")
@given(st.lists(ONE, max_size=20), RANGES, RANGES)
def test_against_sets(talkers, ranges, within):
    found = count_ports(merge(rows(*talkers)), ranges, within=within)
    inner = [row for row in talkers if wanted(row[1], row[2], within)]
    counted = [row for row in inner if wanted(row[1], row[2], ranges)]
    assert found.sources == unique(counted) and found.count == count(counted)
    assert found.local == unique(filter(is_local, counted)) and found.local_count == count(filter(is_local, counted))
    assert {port.key for port in found} == {port_key(row[1], row[2]) for row in counted}
    assert set(found.others.tolist()) == {port_key(row[1], row[2]) for row in inner} - {port.key for port in found}
    for port in found:
        mine = [row for row in counted if port_key(row[1], row[2]) == port.key]
        assert port.sources == unique(mine) and port.count == count(mine)
        assert port.local == unique(filter(is_local, mine)) and port.local_count == count(filter(is_local, mine))
    sizes = [port.sources.total for port in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("key", "ranges", "within"),
    [(port_key(6, 22), [SSH], True), (port_key(17, 22), [SSH], False), (port_key(17, 22), [PortRange(None, 22, 22)], True),
     (port_key(1, 22), [PortRange(None, 22, 22)], False), (PING, [PortRange(1)], True), (PING, [SSH, WEB], False), (PING, [], True)],
)  # fmt: skip
def test_a_port_within_ranges(key, ranges, within):
    assert in_ranges(count_ports(rows(("192.0.2.1", key >> 16, key & 0xFFFF, 1, 1))).cells["key"], ranges).tolist() == [within]
