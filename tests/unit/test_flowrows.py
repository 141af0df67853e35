"""Flows in bulk, against sums in plain dicts."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond import flowrows as module
from xdpmond import rows as rows_module
from xdpmond.flowrows import FLOW, NO_FLOWS, merge_flows, take_flows, talkers_of
from xdpmond.model import Family

ADDRESSES = [
    (Family.IPV4, bytes([192, 0, 2, 1])), (Family.IPV4, bytes(4)), (Family.IPV6, bytes(16)), (Family.IPV6, bytes(15) + b"\1"),
    (Family.IPV6, b"\xff" * 16),
]  # fmt: skip
FLOW_KEYS = module.flow_keys
SUMS = ("packets", "bytes", "ip_bytes", "syns")


def same_for_all(*columns):
    return FLOW_KEYS(*columns) * np.uint64(0)


@pytest.fixture(params=[("as it is", rows_module.CHUNK), ("few keys", 4), ("one for all", 1)], ids=str, autouse=True, scope="module")
def _weakened(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is found must not depend on flows having different keys, nor on how many rows are taken at a time."""
    of, chunk = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(rows_module, "CHUNK", chunk)
        if of == "few keys":
            patch.setattr(module, "flow_keys", lambda *columns: FLOW_KEYS(*columns) & np.uint64(3 << 40 | 1))
        elif of == "one for all":
            patch.setattr(module, "flow_keys", same_for_all)
        yield


PORTS = st.sampled_from([0, 1, 22, 443, 65535])
NUMBERS = st.integers(0, 2**40)
TIMES = st.floats(0, 2e9)
ONE = st.tuples(
    st.sampled_from(ADDRESSES), st.sampled_from(ADDRESSES), PORTS, PORTS, st.sampled_from([0, 6, 17, 255]), st.integers(0, 8),
    st.integers(0, 255), st.integers(0, 15), st.lists(NUMBERS, min_size=4, max_size=4), TIMES, TIMES,
)  # fmt: skip
PARTS = st.lists(st.lists(ONE, max_size=25), min_size=1, max_size=3)


def array(flows):
    made = np.zeros(len(flows), FLOW)
    for place, of in zip(made, flows, strict=True):
        (family, source), (_, destination), source_port, port, protocol, outcome, tcp_flags, slot, sums, first, last = of
        place["source"] = np.frombuffer(source.ljust(16, b"\0"), "u1")
        place["destination"] = np.frombuffer(destination.ljust(16, b"\0"), "u1")
        place["source_port"], place["port"], place["protocol"], place["family"] = source_port, port, protocol, family
        place["outcome"], place["tcp_flags"], place["slot"] = outcome, tcp_flags, slot
        place["talker_port"] = port & 0xFF  # as if some were folded
        for name, number in zip(SUMS, sums, strict=True):
            place[name] = number
        place["first_seen"], place["last_seen"] = first, last
    return made


def five_tuple(flow):
    return (
        int(flow["family"]), flow["source"].tobytes(), flow["destination"].tobytes(), int(flow["source_port"]), int(flow["port"]),
        int(flow["protocol"]),
    )  # fmt: skip


@given(PARTS)
def test_equal_flows_are_summed(parts):
    arrays = [array(part) for part in parts]
    wanted: dict = {}
    for flow in np.concatenate(arrays):
        kept = wanted.setdefault(five_tuple(flow), {**dict.fromkeys(SUMS, 0), "tcp_flags": 0, "first": 1e99, "last": -1.0, "ends": set()})
        for name in SUMS:
            kept[name] += int(flow[name])
        kept["tcp_flags"] |= int(flow["tcp_flags"])
        kept["first"] = min(kept["first"], float(flow["first_seen"]))
        if flow["last_seen"] > kept["last"]:
            kept["last"], kept["ends"] = float(flow["last_seen"]), set()
        if flow["last_seen"] == kept["last"]:
            kept["ends"].add((int(flow["outcome"]), int(flow["slot"])))
    merged = merge_flows(*arrays)
    assert len(merged) == len(wanted)
    for flow in merged:
        of = wanted.pop(five_tuple(flow))
        assert {name: int(flow[name]) for name in (*SUMS, "tcp_flags")} == {name: of[name] for name in (*SUMS, "tcp_flags")}
        assert (float(flow["first_seen"]), float(flow["last_seen"])) == (of["first"], of["last"])
        assert (int(flow["outcome"]), int(flow["slot"])) in of["ends"]
    assert not wanted


@given(PARTS)
def test_talkers_are_sums_of_flows(parts):
    flows = np.concatenate([array(part) for part in parts])
    wanted: dict = {}
    for flow in flows:
        key = (int(flow["family"]), flow["source"].tobytes(), int(flow["protocol"]), int(flow["talker_port"]))
        before = wanted.get(key, (0, 0, 0, 1e99, -1.0))
        sums = tuple(old + int(flow[name]) for old, name in zip(before, ("packets", "bytes", "syns"), strict=False))
        wanted[key] = (*sums, min(before[3], float(flow["first_seen"])), max(before[4], float(flow["last_seen"])))
    rows = talkers_of(flows)
    found = {
        (int(row["family"]), row["source"].tobytes(), int(row["protocol"]), int(row["port"])): tuple(
            row[name].item() for name in ("packets", "bytes", "syns", "first_seen", "last_seen")
        )
        for row in rows
    }
    assert len(found) == len(rows)
    assert found == wanted
    assert not rows["sources"].any(), "one source each"


@given(PARTS)
def test_of_merged_flows_the_talkers_are_the_same(parts):
    """But for the port of a flow that was folded in one part and not in another, which these are not."""
    flows = [array(part) for part in parts]
    before, after = talkers_of(np.concatenate(flows)), talkers_of(merge_flows(*flows))
    assert (np.sort(before.view("V64")) == np.sort(after.view("V64"))).all() if len(before) == len(after) else False


def test_nothing():
    assert len(merge_flows(NO_FLOWS)) == len(merge_flows()) == len(talkers_of(NO_FLOWS)) == 0
    assert take_flows(array([]), np.zeros(0, int)).dtype == FLOW


def test_a_source_with_very_many_flows_is_worked_on_in_pieces(monkeypatch):
    """A scan from one address: all keys have the same source."""
    monkeypatch.setattr(module, "CHUNK", 8192)
    monkeypatch.setattr(module, "flow_keys", FLOW_KEYS)
    number = 200_000
    flows = np.zeros(number, FLOW)
    flows["family"], flows["protocol"], flows["packets"] = Family.IPV4, 6, 1
    flows["source_port"], flows["port"] = np.arange(number) % 50_000, np.arange(number) // 50_000
    other = flows[::-1].copy()
    tracemalloc.start()
    merged = merge_flows(other, flows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(merged) == number
    assert (merged["packets"] == 2).all()
    assert peak < 2 * flows.nbytes + 2 * number * 40, "the result, room for as many as went in, keys, and little else"
