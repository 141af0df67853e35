"""Prefixes by the million, against sets and dicts of `Prefix` objects: whatever way a line is read, the same must come of it."""

import ipaddress
import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xdpmond import prefixes
from xdpmond.errors import PrefixError, UsageError, XdpmondError
from xdpmond.model import Family, Prefix
from xdpmond.prefixes import LONGEST_LINE, PrefixReader, PrefixSet, bounds, find_one, masked


def read(text, most=1000, file="", piece=1 << 20):
    reader = PrefixReader(most, file)
    for at in range(0, len(text), piece):
        reader.feed(text[at : at + piece])
    return reader.finish()


def one_by_one(text, most=1000, file=""):
    """The same by `Prefix.parse` alone."""
    found = {}
    place = f"{file}:{{}}" if file else "line {}"
    for number, line in enumerate(text.split(b"\n"), 1):
        wanted = line.partition(b"#")[0].strip().decode("ascii", errors="replace")
        if not wanted:
            continue
        try:
            prefix = Prefix.parse(wanted)
        except PrefixError as error:
            raise PrefixError(f"{place.format(number)}: {error.message}", hint=error.hint) from None
        if file or prefix not in found:
            found[prefix] = number
        if len(found) > most:
            hint = "tables.prefixes says how many there may be"
            raise UsageError(f"{file or place.format(number)}: more than {most} prefixes", hint=hint)
    return found


def outcome(function, *arguments, **options):
    try:
        found = function(*arguments, **options)
    except XdpmondError as error:
        return type(error), error.message, error.hint
    if isinstance(found, PrefixSet):
        return {prefix: found.line_of(prefix) for prefix in found}
    return found


def near_prefixes():
    """Lines that are prefixes, or that lack little."""
    parts = st.sampled_from(
        ["0", "1", "9", "10", "99", "100", "192", "255", "256", "999", "00", "01", "010", "1000", "", "-1", "+1", " 1", "x"]
    )  # fmt: skip
    right = st.lists(st.sampled_from(["0", "10", "127", "255"]), min_size=4, max_size=4)
    addresses = (right | st.lists(parts, min_size=3, max_size=5)).map(".".join)
    lengths = st.sampled_from(
        ["", "", "/0", "/1", "/7", "/8", "/24", "/31", "/32", "/33", "/99", "/024", "/", "/8/8", "/+8", "/255.0.0.0", "/2\0"]
    )  # fmt: skip
    ends = st.sampled_from(["", "", "", "\r", " ", "\t# why", "#", " x", "\0", ".", "/"])
    return st.builds(lambda *texts: "".join(texts).encode(), st.sampled_from(["", "", "", " "]), addresses, lengths, ends)


def networks():
    def text(family, number, length):
        address = number >> (family.bits - length) << (family.bits - length) if length else 0
        packed = address.to_bytes(family.bits // 8, "big")
        return f"{ipaddress.ip_address(packed)}/{length}".encode()

    ipv4 = st.builds(text, st.just(Family.IPV4), st.integers(0, (1 << 32) - 1), st.integers(0, 32))
    ipv6 = st.builds(text, st.just(Family.IPV6), st.integers(0, (1 << 128) - 1), st.integers(0, 128))
    return ipv4 | ipv6


FILES = st.sampled_from(["", "/list"])
LINES = (
    networks()
    | near_prefixes()
    | st.sampled_from([b"", b"# all", b"::1", b"::/0", b"::ffff:10.0.0.1", b"::ffff:0:0/96", b"fe80::1%eth0", b"2001:db8::1/32", b"1:2"])
    | st.text("0123456789./:af# \t\r\0", max_size=20).map(str.encode)
    | st.binary(max_size=8).map(lambda line: line.replace(b"\n", b""))
)


@given(st.lists(LINES, max_size=12), st.sampled_from([3, 1000]), FILES, st.sampled_from([1, 7, 1 << 20]))
@example([b"1.2.3.4", b"1.2.3.4/8"], 1000, "", 1 << 20)
@example([b"1.2.3.4"] * 3 + [b"5.6.7.8"], 1000, "/list", 1)
def test_any_lines_are_read_as_one_by_one(lines, most, file, piece):
    text = b"\n".join(lines)
    assert outcome(read, text, most, file, piece) == outcome(one_by_one, text, most, file)


@given(near_prefixes())
def test_each_line_that_is_nearly_a_prefix(line):
    assert outcome(read, line) == outcome(one_by_one, line)


@given(st.lists(networks(), max_size=30), FILES)
def test_lists_of_prefixes(lines, file):
    text = b"".join(line + b"\n" for line in lines)
    assert outcome(read, text, file=file) == outcome(one_by_one, text, file=file)


def test_every_octet_and_every_length():
    rng = random.Random(4)
    texts = [f"{n}.{255 - n}.{n}.{n}" for n in range(256)] + [f"{1 << n:o}.0.0.0/32" for n in range(9)]
    for length in range(33):
        network = rng.getrandbits(32) >> (32 - length) << (32 - length)
        texts.append(str(ipaddress.IPv4Network((network, length))))
    for text in texts:
        assert outcome(read, text.encode()) == outcome(one_by_one, text.encode()), text


@pytest.mark.parametrize("file", ["", "/list"])
def test_doubles_over_many_pieces(monkeypatch, file):
    """Gathered again and again, as a file of many millions of lines would be."""
    monkeypatch.setattr(prefixes, "_ENOUGH", 50)
    rng = random.Random(5)
    lines = [f"10.0.{rng.randrange(3)}.{rng.randrange(100)}".encode() for _ in range(2000)]
    lines += [f"2001:db8::{rng.randrange(90):x}".encode() for _ in range(2000)]
    rng.shuffle(lines)
    text = b"\n".join(lines)
    for most in (1000, 388, 389, 390, 391, 100, 1):
        assert outcome(read, text, most, file, 500) == outcome(one_by_one, text, most, file), most


@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_a_line_without_an_end_is_not_gathered(piece):
    with pytest.raises(UsageError, match="line 2 is longer than 4096"):
        read(b"::1\n" + b"x" * (LONGEST_LINE * 5), piece=piece)


@given(st.lists(networks(), max_size=20), st.lists(networks(), max_size=20))
def test_sets(mine, others):
    mine, others = ({Prefix.parse(line.decode()) for line in lines} for lines in (mine, others))
    columns, other_columns = PrefixSet.of(mine), PrefixSet.of(others)
    assert list(columns) == sorted(mine, key=lambda p: (p.family, p.length, p.address))
    assert len(columns) == len(mine)
    assert columns.first(3) == list(columns)[:3]
    assert set(columns.without(other_columns)) == mine - others
    common = columns.common(other_columns)
    assert common in mine & others if mine & others else common is None
    assert columns.of_length(0) == [prefix for prefix in columns if prefix.length == 0]
    for key, addresses in columns.columns.items():
        for prefix in others:
            if prefix.family is key[0]:
                row = find_one(addresses, prefix.address)
                assert (row >= 0) == (Prefix(*key[:1], prefix.address, key[1]) in mine)


@given(networks(), st.integers(0, 128))
def test_networks_of_addresses(line, length):
    prefix = Prefix.parse(line.decode())
    length = min(length, prefix.family.bits)
    (addresses,) = PrefixSet.of([prefix]).columns.values()
    wanted = ipaddress.ip_network((prefix.address, length), strict=False)
    (found,) = PrefixSet({(prefix.family, length): masked((prefix.family, length), addresses)})
    assert found.address == wanted.network_address.packed
    network = ipaddress.ip_network((prefix.address, prefix.length))
    assert bounds(prefix) == (network[0].packed, network[-1].packed)


def test_ipv6_addresses_sort_as_numbers_whatever_octets_they_hold():
    addresses = sorted(random.Random(6).choice([0, 1, 255 << 120, 1 << 8, 1 << 120]) + n for n in range(0, 3000, 7))
    octets = sorted({n.to_bytes(16, "big") for n in addresses})
    made = PrefixSet.of(Prefix(Family.IPV6, address, 128) for address in reversed(octets)).columns[Family.IPV6, 128]
    assert made.tobytes() == b"".join(octets)
    assert np.array_equal(np.sort(made), made)
    assert [find_one(made, address) for address in octets] == list(range(len(octets)))
