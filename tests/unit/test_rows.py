"""Talkers in bulk, against sums in plain dicts."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.model import Count, Family
from xdpmond.rows import NO_ROWS, ROW, count_of, merge, strongest, talker, unique_sources

# Few different values, so that keys meet; some differ in one part only, or in the bytes that IPv4 leaves empty.
SOURCES = [
    (Family.IPV4, bytes([192, 0, 2, 1])), (Family.IPV4, bytes([192, 0, 2, 2])), (Family.IPV4, bytes(4)), (Family.IPV6, bytes(16)),
    (Family.IPV6, bytes([192, 0, 2, 1]) + bytes(12)), (Family.IPV6, bytes(15) + b"\1"), (Family.IPV6, b"\xff" * 16),
]  # fmt: skip
NUMBERS = st.integers(0, 2**40)
TIMES = st.floats(0, 2e9)
ONE = st.tuples(
    st.sampled_from(SOURCES), st.sampled_from([0, 1, 6, 17, 132, 255]), st.sampled_from([0, 1, 22, 256, 65535]), NUMBERS, NUMBERS, NUMBERS,
    TIMES, TIMES,
)  # fmt: skip
MANY = st.lists(ONE, max_size=30)


def array(rows):
    made = np.zeros(len(rows), ROW)
    for place, ((family, address), protocol, port, packets, size, syns, first, last) in zip(made, rows, strict=True):
        place["source"] = np.frombuffer(address.ljust(16, b"\0"), "u1")
        place["family"], place["protocol"], place["port"] = family, protocol, port
        place["packets"], place["bytes"], place["syns"] = packets, size, syns
        place["first_seen"], place["last_seen"] = first, last
    return made


def plain(rows):
    """Rows as a dict; a key that stands twice would be an error of `merge`."""
    found = {}
    for row in rows:
        key = (int(row["family"]), row["source"].tobytes(), int(row["protocol"]), int(row["port"]))
        assert key not in found
        found[key] = tuple(row[name].item() for name in ("packets", "bytes", "syns", "first_seen", "last_seen"))
    return found


def summed(rows, by_source=False):
    sums = defaultdict(list)
    for (family, address), protocol, port, *numbers in rows:
        key = (int(family), address.ljust(16, b"\0"), 0 if by_source else protocol, 0 if by_source else port)
        sums[key].append(numbers)
    return {
        key: (*(sum(each[i] for each in of) for i in range(3)), min(each[3] for each in of), max(each[4] for each in of))
        for key, of in sums.items()
    }


@given(st.lists(MANY, min_size=1, max_size=3), st.booleans())
def test_merging_sums_what_has_the_same_key(parts, by_source):
    arrays = [array(part) for part in parts]
    before = [made.copy() for made in arrays]
    assert plain(merge(*arrays, by_source=by_source)) == summed([row for part in parts for row in part], by_source)
    assert all((made == was).all() for made, was in zip(arrays, before, strict=True))  # they belong to a window that is kept


@given(MANY)
def test_merging_twice_changes_nothing(rows):
    once = merge(array(rows))
    assert plain(merge(once)) == plain(once)


@given(MANY)
def test_the_sum_is_kept(rows):
    wanted = Count(sum(row[3] for row in rows), sum(row[4] for row in rows))
    assert count_of(array(rows)) == count_of(merge(array(rows))) == count_of(merge(array(rows), by_source=True)) == wanted


@given(MANY)
def test_unique_sources(rows):
    wanted = {family: len({source for source, *_ in rows if source[0] is family}) for family in (Family.IPV4, Family.IPV6)}
    assert unique_sources(array(rows)) == wanted


@given(MANY, st.sampled_from(["packets", "bytes", "syns"]), st.integers(1, 40))
def test_the_strongest_are_the_strongest_in_order(rows, by, limit):
    index = {"packets": 3, "bytes": 4, "syns": 5}[by]
    found = strongest(array(rows), by, limit)
    assert found[by].tolist() == sorted((row[index] for row in rows), reverse=True)[:limit]


def test_of_nothing_there_is_nothing():
    assert len(merge(NO_ROWS)) == len(merge(NO_ROWS, NO_ROWS, by_source=True)) == len(strongest(NO_ROWS, "bytes", 3)) == 0
    assert count_of(NO_ROWS) == Count()
    assert unique_sources(NO_ROWS) == {Family.IPV4: 0, Family.IPV6: 0}


@pytest.mark.parametrize(
    ("protocol", "port", "shown"),
    [(6, 22, 22), (17, 53, 53), (132, 9, 9), (6, 0, None), (1, 0, None), (1, 8, None), (47, 22, None), (6, 65535, 65535)],
)
def test_a_row_as_a_value(protocol, port, shown):
    for family, address, text in (
        (Family.IPV4, bytes([192, 0, 2, 1]), "192.0.2.1"),
        (Family.IPV6, b"\x20\x01\x0d\xb8" + bytes(11) + b"\1", "2001:db8::1"),
    ):
        of = talker(array([((family, address), protocol, port, 3, 300, 1, 10.5, 11.5)])[0])
        assert (of.source, of.family, of.address, of.protocol, of.port) == (text, family, address, protocol, shown)
        assert (of.packets, of.bytes, of.syns, of.first_seen, of.last_seen) == (3, 300, 1, 10.5, 11.5)
        assert all(type(value) in (int, float) for value in (of.packets, of.bytes, of.syns, of.first_seen))  # what JSON takes
