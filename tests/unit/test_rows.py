"""Talkers in bulk, against sums in plain dicts."""

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xdpmond import rows as rows_module
from xdpmond.model import Count, Family, Prefix
from xdpmond.rows import (
    LOCAL,
    NO_ROWS,
    ROW,
    PortSums,
    SourceCount,
    by_source,
    chunks_of,
    count_of,
    is_local,
    merge,
    of_source,
    only,
    order_of,
    ordered_chunks,
    port_key,
    strongest,
    strongest_networks,
    survey,
    take,
    talker,
    unique_sources,
)

# Few different values, so that keys meet; some differ in one part only, or in the bytes that IPv4 leaves empty.
SOURCES = [
    (Family.IPV4, bytes([192, 0, 2, 1])), (Family.IPV4, bytes([192, 0, 2, 2])), (Family.IPV4, bytes(4)), (Family.IPV6, bytes(16)),
    (Family.IPV6, bytes([192, 0, 2, 1]) + bytes(12)), (Family.IPV6, bytes(15) + b"\1"), (Family.IPV6, b"\xff" * 16),
]  # fmt: skip


HASHES = {
    "as it is": rows_module._hash6,
    "few hashes": lambda low, high: low & np.uint64(1),
    "one for all": lambda low, high: low * np.uint64(0),
}


AS_IT_IS = ("as it is", rows_module.CHUNK, rows_module._FEW, rows_module._MOST_WAITING)


@pytest.fixture(params=[AS_IT_IS, ("few hashes", 4, 0, 3), ("one for all", 1, 2, 0)], ids=str, autouse=True, scope="module")
def _weakened(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is found must not depend on IPv6 addresses having different hashes, nor on how many rows are taken at a time, nor on what is
    sorted already."""
    of_ipv6, chunk, few, waiting = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_hash6", HASHES[of_ipv6])
        patch.setattr(rows_module, "CHUNK", chunk)
        patch.setattr(rows_module, "_FEW", few)
        patch.setattr(rows_module, "_MOST_WAITING", waiting)
        yield


NUMBERS = st.integers(0, 2**40)
TIMES = st.floats(0, 2e9)
ONE = st.tuples(
    st.sampled_from(SOURCES), st.sampled_from([0, 1, 6, 17, 132, 255]), st.sampled_from([0, 1, 22, 256, 65535]), NUMBERS, NUMBERS, NUMBERS,
    TIMES, TIMES,
)  # fmt: skip
MANY = st.lists(ONE, max_size=30)
PARTS = st.lists(MANY, min_size=1, max_size=3)


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


def summed(rows, of_source=False):
    sums = defaultdict(list)
    for (family, address), protocol, port, *numbers in rows:
        key = (int(family), address.ljust(16, b"\0"), 0 if of_source else protocol, 0 if of_source else port)
        sums[key].append(numbers)
    return {
        key: (*(sum(each[i] for each in of) for i in range(3)), min(each[3] for each in of), max(each[4] for each in of))
        for key, of in sums.items()
    }


@given(PARTS)
def test_merging_sums_what_has_the_same_key(parts):
    arrays = [array(part) for part in parts]
    before = [made.copy() for made in arrays]
    assert plain(merge(*arrays)) == summed([row for part in parts for row in part])
    assert all((made == was).all() for made, was in zip(arrays, before, strict=True))  # they belong to a window that is kept


@given(MANY)
def test_merging_by_source(rows):
    given_ = array(rows)
    before = given_.copy()
    assert plain(by_source(given_)) == summed(rows, of_source=True)
    assert (given_ == before).all()


@given(PARTS)
def test_rows_of_a_source_are_neighbours_when_merged(parts):
    merged = merge(*map(array, parts))
    sources = [(int(row["family"]), row["source"].tobytes()) for row in merged]
    changes = [here for here, before in zip(sources, [None, *sources], strict=False) if here != before]
    assert len(changes) == len(set(sources))


@given(PARTS)
def test_merging_what_is_merged(parts):
    merged = [merge(array(part)) for part in parts]
    assert plain(merge(*merged)) == summed([row for part in parts for row in part])


@given(MANY)
def test_the_sum_is_kept(rows):
    wanted = Count(sum(row[3] for row in rows), sum(row[4] for row in rows))
    assert count_of(array(rows)) == count_of(merge(array(rows))) == count_of(by_source(array(rows))) == wanted


@given(PARTS)
def test_unique_sources(parts):
    together = [row for part in parts for row in part]
    wanted = {family: len({source for source, *_ in together if source[0] is family}) for family in (Family.IPV4, Family.IPV6)}
    assert unique_sources(merge(*map(array, parts))) == survey(*map(array, parts)).unique == wanted


@given(PARTS, st.sampled_from([0, 6, 17]))
def test_unique_sources_of_those_that_are_wanted(parts, protocol):
    together = [row for part in parts for row in part if row[1] == protocol]
    wanted = {family: len({source for source, *_ in together if source[0] is family}) for family in (Family.IPV4, Family.IPV6)}
    sources = SourceCount()
    for rows in chunks_of(merge(*map(array, parts))):
        sources.add(only(rows, lambda rows: rows["protocol"] == protocol))
    assert sources.unique == wanted


# Few sources and tails, in any order, and as sorted runs: those of windows that are merged.
KEY = st.sampled_from([high << 48 | middle << 24 | tail for high in (0, 1, 2**16 - 1) for middle in range(2) for tail in range(2)])
KEYS = st.lists(KEY, max_size=20)
RUNS = st.tuples(KEYS, KEYS).map(lambda runs: sorted(runs[0]) + sorted(runs[1]))


@given(st.one_of(KEYS, RUNS))
def test_the_order_of_keys(numbers):
    keys = np.array(numbers, "u8")
    order = order_of(keys)
    assert sorted(order.tolist()) == list(range(len(keys)))
    assert keys[order].tolist() == sorted(numbers)


@given(st.one_of(KEYS, RUNS))
def test_chunks_in_the_order_of_keys(numbers):
    keys = np.array(numbers, "u8")
    chunks = list(ordered_chunks(keys))
    assert sorted(at for order, _ in chunks for at in order.tolist()) == list(range(len(keys)))
    assert [key for _, of in chunks for key in of.tolist()] == sorted(numbers)
    assert all(keys[order].tolist() == of.tolist() and len(of) for order, of in chunks)
    sources = [{key >> 24 for key in of.tolist()} for _, of in chunks]
    assert sum(map(len, sources)) == len(set().union(*sources)), "no source is in two"


def local(family: Family, address: bytes) -> bool:
    of = ipaddress.ip_address(address)
    return any(of in ipaddress.ip_network(str(prefix)) for prefix in LOCAL if prefix.family is family)


@given(PARTS)
def test_the_sources_of_each_port(parts):
    sources: dict = defaultdict(set)
    sums: dict = defaultdict(Counter)
    for (family, address), protocol, port, packets, size, *_ in (row for part in parts for row in part):
        key = port_key(protocol, port)
        sources[key].add((family, address))
        sums[key].update({"packets": packets, "bytes": size})
    found = PortSums()
    for rows in chunks_of(merge(*map(array, parts))):
        found.add(rows)
    keys, ports = found.ports()
    assert keys.tolist() == sorted(sources)
    for key, port in zip(keys.tolist(), ports, strict=True):
        families = Counter(family for family, _ in sources[key])
        assert port.item() == (families[Family.IPV4], families[Family.IPV6], sums[key]["packets"], sums[key]["bytes"])


def edges(prefix: Prefix) -> list[tuple[Family, bytes]]:
    """Its first and last address, and those beside them."""
    first, size, octets = int.from_bytes(prefix.address, "big"), 1 << prefix.family.bits - prefix.length, prefix.family.bits // 8
    numbers = (first - 1, first, first + size - 1, first + size)
    return [(prefix.family, number.to_bytes(octets, "big")) for number in numbers if 0 <= number < 256**octets]


EDGES = [edge for prefix in LOCAL for edge in edges(prefix)]


@given(st.lists(st.one_of(
    st.sampled_from(EDGES), st.tuples(st.just(Family.IPV4), st.binary(min_size=4, max_size=4)),
    st.tuples(st.just(Family.IPV6), st.binary(min_size=16, max_size=16)),
), max_size=20))  # fmt: skip
@example(EDGES)
def test_which_sources_are_local(sources):
    rows = array([(source, 6, 22, 1, 1, 0, 0.0, 0.0) for source in sources])
    assert is_local(rows).tolist() == [local(*source) for source in sources]


@given(PARTS, st.sampled_from(["packets", "bytes", "syns"]), st.integers(0, 40), st.sampled_from([None, 1, 6]))
def test_a_survey_finds_what_merging_would(parts, by, limit, protocol):
    where = None if protocol is None else lambda rows: rows["protocol"] == protocol
    found = survey(*map(array, parts), by=by, limit=limit, where=where)
    merged = merge(*map(array, parts))
    wanted = merged if protocol is None else merged[merged["protocol"] == protocol]
    assert found.unique == unique_sources(wanted)
    assert sorted(found.strongest[by].tolist()) == sorted(wanted[by].tolist())[max(len(wanted) - limit, 0) :]
    assert plain(found.strongest).items() <= plain(wanted).items()
    assert found.complete == (len(wanted) <= limit)


@given(PARTS, st.sampled_from([{}, {Family.IPV4: 24}, {Family.IPV4: 1, Family.IPV6: 127}, {Family.IPV6: 120}, {Family.IPV4: 32}]))
def test_the_sums_of_networks(parts, bits):
    def network(family, address):
        length = bits.get(family, family.bits)
        number = int.from_bytes(address, "big") >> family.bits - length << family.bits - length
        return family, number.to_bytes(family.bits // 8, "big")

    together = [row for part in parts for row in part]
    sources = defaultdict(set)
    for source, protocol, port, *_ in together:
        sources[network(*source), protocol, port].add(source)
    found = strongest_networks(*map(array, parts), bits=bits, by="packets", limit=1000)
    got = {}
    for row in found:
        family = Family(int(row["family"]))
        source = family, row["source"].tobytes()[: family.bits // 8]
        got[source, int(row["protocol"]), int(row["port"])] = int(row["sources"])
    assert got == {key: len(of) for key, of in sources.items()}
    few = strongest_networks(*map(array, parts), bits=bits, by="bytes", limit=2, where=lambda rows: rows["protocol"] == 6)
    assert sorted(few["bytes"].tolist()) == sorted(found["bytes"][found["protocol"] == 6].tolist())[-2:]
    found["sources"] = 0
    assert plain(found) == summed([(network(*row[0]), *row[1:]) for row in together])


@given(MANY, st.sampled_from(SOURCES))
def test_the_rows_of_one_source(rows, source):
    family, address = source
    found = of_source(array(rows), family, address)
    assert found.tobytes() == array([row for row in rows if row[0] == source]).tobytes()


@given(MANY, st.lists(st.integers(0, 2**16), max_size=10))
def test_taking_rows(rows, at):
    given_ = array(rows)
    indexes = np.array([number % len(rows) for number in at] if rows else [], int)
    assert (take(given_, indexes) == given_[indexes]).all()


@given(MANY, st.sampled_from(["packets", "bytes", "syns"]), st.integers(0, 40))
def test_the_strongest_are_the_strongest_in_order(rows, by, limit):
    index = {"packets": 3, "bytes": 4, "syns": 5}[by]
    found = strongest(array(rows), by, limit)
    assert found[by].tolist() == sorted((row[index] for row in rows), reverse=True)[:limit]


def test_of_nothing_there_is_nothing():
    assert len(merge(NO_ROWS)) == len(merge(NO_ROWS, NO_ROWS)) == len(by_source(NO_ROWS)) == len(strongest(NO_ROWS, "bytes", 3)) == 0
    assert count_of(NO_ROWS) == Count()
    assert unique_sources(NO_ROWS) == {Family.IPV4: 0, Family.IPV6: 0}


@pytest.mark.parametrize(
    ("protocol", "port", "shown", "icmp_type"),
    [(6, 22, 22, None), (17, 53, 53, None), (132, 9, 9, None), (6, 0, None, None), (1, 0, None, None), (1, 9, None, 8), (1, 1, None, 0),
     (58, 129, None, 128), (58, 0, None, None), (47, 22, None, None), (6, 65535, 65535, None)],
)  # fmt: skip
def test_a_row_as_a_value(protocol, port, shown, icmp_type):
    for family, address, text in (
        (Family.IPV4, bytes([192, 0, 2, 1]), "192.0.2.1"),
        (Family.IPV6, b"\x20\x01\x0d\xb8" + bytes(11) + b"\1", "2001:db8::1"),
    ):
        of = talker(array([((family, address), protocol, port, 3, 300, 1, 10.5, 11.5)])[0])
        assert (of.source, of.family, of.address, of.protocol, of.port) == (text, family, address, protocol, shown)
        assert of.icmp_type == icmp_type
        assert (of.packets, of.bytes, of.syns, of.first_seen, of.last_seen) == (3, 300, 1, 10.5, 11.5)
        assert all(type(value) in (int, float) for value in (of.packets, of.bytes, of.syns, of.first_seen))  # what JSON takes
