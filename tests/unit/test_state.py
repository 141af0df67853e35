"""What survives a reboot, and what happens to a file that cannot be read."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.errors import StateError
from xdpmond.model import Entry, Mode, Origin, Prefix, Verdict
from xdpmond.state import OperatorStore, State

ENTRY = Entry(Prefix.parse("2001:db8::/32"), Verdict.DENY, Origin.OPERATOR, 1.5, 99.25, "scans ünd “quotes” \\")
STATE = State((ENTRY, Entry(Prefix.parse("10.0.0.0/8"), Verdict.ALLOW, Origin.AUTOMATIC)), Mode.ENFORCE, {"eth0.1": Mode.MONITOR})


@pytest.fixture
def store(tmp_path):
    return OperatorStore(tmp_path / "state.json")


def test_nothing_saved_is_an_empty_state(store):
    assert store.load() == State()


def test_what_is_saved_is_loaded(store):
    store.save(State())
    assert store.load() == State()
    store.save(STATE)
    assert OperatorStore(store.path).load() == STATE
    assert os.listdir(store.path.parent) == ["state.json"]
    assert store.path.stat().st_mode & 0o777 == 0o600


@given(
    st.lists(
        st.builds(
            Entry,
            st.sampled_from([Prefix.parse("::/0"), Prefix.parse("192.0.2.0/24")]),
            st.sampled_from([Verdict.ALLOW, Verdict.DENY]),
            st.sampled_from([Origin.OPERATOR, Origin.AUTOMATIC]),
            st.floats(0, 1e12),
            st.none() | st.floats(0, 1e12),
            st.text(),
        )
    ),
    st.none() | st.sampled_from(Mode),
)
def test_any_state_reads_back(tmp_path_factory, entries, mode):
    store = OperatorStore(tmp_path_factory.mktemp("state") / "state.json")
    store.save(State(tuple(entries), mode))
    assert store.load() == State(tuple(entries), mode)


def good(**changes):
    entry = {"prefix": "::1/128", "verdict": "deny", "origin": "operator", "created": 0, "expires": None, "reason": ""}
    return {"version": 1, "mode": None, "interface_modes": {}, "entries": [entry | changes]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'{"version": 1}', b"[" * 100_000, b'{"version": 1e999}',
        *(json.dumps(document).encode() for document in (
            {**good(), "version": 2}, {**good(), "mode": "x"}, {**good(), "mode": []}, {**good(), "interface_modes": []},
            {**good(), "entries": 5}, {**good(), "entries": [5]}, good(prefix="10.0.0.1/8"), good(prefix=5), good(verdict="maybe"),
            good(origin="?"), good(created="now"), good(created=math.nan), good(created=10**400), good(expires=math.inf),
            good(expires=True),
        )),
    ],
    ids=lambda content: repr(content[-40:]),
)  # fmt: skip
def test_a_file_that_is_not_understood_is_kept_aside(store, content):
    for number in (1, 2):
        store.path.write_bytes(content)
        with pytest.raises(StateError) as caught:
            store.load()
        aside = store.path.with_name(f"state.json.unreadable-{number}")
        assert str(aside) in caught.value.hint
        assert aside.read_bytes() == content
        assert store.load() == State()
    store.save(STATE)
    assert store.load() == STATE


@given(st.binary())
def test_arbitrary_bytes_are_at_worst_a_state_error(tmp_path_factory, content):
    store = OperatorStore(tmp_path_factory.mktemp("state") / "state.json")
    store.path.write_bytes(content)
    try:
        store.load()
    except StateError:
        assert not store.path.exists()


def test_a_write_that_fails_keeps_the_old_state(store):
    store.save(STATE)
    beside = store.path.with_name("state.json.new")
    beside.mkdir()
    with pytest.raises(StateError, match="cannot be written"):
        store.save(State())
    assert store.load() == STATE


def test_a_symbolic_link_planted_beside_is_not_followed(store, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    store.path.with_name("state.json.new").symlink_to(victim)
    with pytest.raises(StateError):
        store.save(STATE)
    assert victim.read_text() == "precious"
    store.save(STATE)
    assert store.load() == STATE


def test_a_missing_directory_is_said(tmp_path):
    with pytest.raises(StateError, match="No such file or directory"):
        OperatorStore(tmp_path / "absent" / "state.json").save(STATE)
