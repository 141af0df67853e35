"""What survives a reboot, and what happens to a file that cannot be read: every truncation, every flipped bit."""

import errno
import json
import math
import os
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond import state as state_module
from xdpmond.errors import StateError
from xdpmond.model import Entry, Family, Mode, Origin, Prefix, Verdict
from xdpmond.policy import Policy
from xdpmond.prefixes import Bulk, PrefixSet
from xdpmond.state import OperatorStore, State

DENY, ALLOW, OPERATOR, AUTOMATIC = Verdict.DENY, Verdict.ALLOW, Origin.OPERATOR, Origin.AUTOMATIC
ENTRY = Entry(Prefix.parse("2001:db8::/32"), DENY, OPERATOR, 1.5, 99.25, "scans ünd “quotes” \\")
STATE = State(Policy([ENTRY, Entry(Prefix.parse("10.0.0.0/8"), ALLOW, AUTOMATIC)]), Mode.ENFORCE, {"eth0.1": Mode.MONITOR})


def seen(state):
    """A state as a value that can be compared."""
    return state.policy.entries(), state.mode, dict(state.interface_modes)


NOTHING = seen(State())


def reopened(store):
    """What another daemon would find."""
    other = OperatorStore(store.path)
    try:
        return seen(other.load())
    finally:
        other.close()


def found(store):
    """What the second call gives, if the first one raises; and what that said."""
    try:
        return seen(store.load()), None
    except StateError as error:
        return seen(store.load()), error


@pytest.fixture
def store(tmp_path):
    store = OperatorStore(tmp_path / "policy.log")
    yield store
    store.close()


def entry(prefix, **more):
    return Entry(Prefix.parse(prefix), more.pop("verdict", DENY), more.pop("origin", OPERATOR), **more)


def bulk(number, family=Family.IPV4, start=0, **more):
    size, shift = family.bits // 8, 8 if family is Family.IPV4 else 64
    prefixes = (Prefix(family, ((start + n) << shift).to_bytes(size, "big"), family.bits - shift) for n in range(number))
    return Bulk(PrefixSet.of(prefixes), more.pop("verdict", DENY), OPERATOR, **more)


def test_nothing_saved_is_an_empty_state(store):
    assert seen(store.load()) == NOTHING


def test_what_is_saved_is_loaded(store):
    store.save(State())
    assert reopened(store) == NOTHING
    store.save(STATE)
    assert reopened(store) == seen(STATE)
    assert os.listdir(store.path.parent) == ["policy.log"]
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_change_is_appended_and_costs_what_it_is(store):
    many = State(Policy().with_bulk(bulk(100_000, created=5.0, reason="feed")))
    store.save(many)
    size = store.path.stat().st_size
    assert 400_000 < size < 401_000
    more = State(many.policy.with_changes([entry("192.0.2.1", reason="why")]))
    store.save(more)
    store.save(more)
    assert store.path.stat().st_size < size + 250
    less = State(more.policy.with_changes(remove=[(Prefix.parse("192.0.2.1"), OPERATOR), (Prefix.parse("0.0.9.0/24"), OPERATOR)]))
    store.save(less)
    assert store.path.stat().st_size < size + 500
    assert reopened(store) == seen(less)
    store.save(State(mode=Mode.ENFORCE))
    assert reopened(store) == seen(State(mode=Mode.ENFORCE))


def test_the_log_can_be_read_by_a_person(store):
    store.save(STATE)
    text = store.path.read_bytes()
    assert text.startswith(b"xdpmond policy log 1\n")
    for word in (b'"2001:db8::/32"', b'"scans', b'"enforce"'):
        assert word in text


TIMES = st.floats(0, 1e12)
ENTRIES = st.lists(
    st.builds(
        Entry,
        st.sampled_from([Prefix.parse(text) for text in ("::/0", "2001:db8::/64", "2001:db8:0:1::/64", "192.0.2.0/24", "192.0.3.0/24")]),
        st.sampled_from([ALLOW, DENY]),
        st.sampled_from([OPERATOR, AUTOMATIC]),
        TIMES,
        st.none() | TIMES,
        st.text(),
    )
)
STATES = st.builds(
    State, ENTRIES.map(Policy), st.none() | st.sampled_from(Mode), st.dictionaries(st.text(), st.sampled_from(Mode), max_size=2)
)


@pytest.mark.parametrize("few", [0, 1, 64])
@given(st.lists(STATES, max_size=4))
def test_any_states_one_after_the_other_read_back(tmp_path_factory, few, states):
    store = OperatorStore(tmp_path_factory.mktemp("state") / "policy.log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "_FEW", few)
        for state in states:
            store.save(state)
            assert reopened(store) == seen(state)
        if states:
            store.compact()
            assert reopened(store) == seen(states[-1])
    store.close()


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A log of every kind of record, and the states that its beginnings amount to, by their length."""
    store = OperatorStore(tmp_path_factory.mktemp("history") / "policy.log")
    policy = Policy()
    steps = [
        lambda: State(policy),
        lambda: State(policy.with_changes([ENTRY, entry("10.0.0.0/8", origin=AUTOMATIC)])),
        lambda: State(policy.with_bulk(bulk(4, created=7.0, expires=99.0, reason="feed"))),
        lambda: State(policy.with_bulk(bulk(3, Family.IPV6, verdict=ALLOW)), Mode.ENFORCE),
        lambda: State(
            policy.with_changes([entry(f"10.0.{n}.0/24", created=n, reason=f"r{n % 2}") for n in range(4)]), None, {"a": Mode.MONITOR}
        ),
        lambda: State(policy.without_expired(98.5)),
        lambda: State(policy.without_expired(99.0)),
        lambda: State(policy.with_changes(remove=[(ENTRY.prefix, OPERATOR)])),
    ]
    lengths = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "_FEW", 2)
        for step in steps:
            state = step()
            policy = state.policy
            store.save(state)
            lengths[store.path.stat().st_size] = seen(state)
    store.close()
    return store.path.read_bytes(), lengths


def test_a_log_cut_at_any_byte_is_the_changes_that_were_finished(history, tmp_path):
    """As a power cut leaves it: the change under way was never said to be kept."""
    content, lengths = history
    store = OperatorStore(tmp_path / "policy.log")
    for length in range(min(lengths), len(content) + 1):
        store.path.write_bytes(content[:length])
        state, error = found(store)
        assert state == lengths[max(whole for whole in lengths if whole <= length)]
        if length in lengths:
            assert error is None
        else:
            assert "never finished" in error.message
            assert reopened(store) == state  # and it is written down so
        assert os.listdir(tmp_path) == ["policy.log"]
    for length in range(min(lengths)):  # no power cut leaves this: the first lines are put in place whole
        store.path.write_bytes(content[:length])
        state, error = found(store)
        assert state == NOTHING
        assert error is not None
    store.close()


def test_a_log_with_any_byte_changed_is_kept_aside_and_read_up_to_there(history, tmp_path):
    content, lengths = history
    store, rng = OperatorStore(tmp_path / "policy.log"), random.Random(8)
    wholes = sorted(lengths)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, rng.randrange(1, 256)])
        store.path.write_bytes(damaged)
        state, error = found(store)
        before = [whole for whole in wholes if whole <= at]
        assert state == (lengths[before[-1]] if before else NOTHING)
        (aside,) = tmp_path.glob("*.unreadable-*")
        assert str(aside) in error.hint
        assert aside.read_bytes() == damaged
        aside.unlink()
        assert not before or reopened(store) == state
    store.close()


@given(st.binary(), st.booleans())
def test_arbitrary_bytes_are_at_worst_a_state_error(tmp_path_factory, content, begun):
    store = OperatorStore(tmp_path_factory.mktemp("state") / "policy.log")
    store.path.write_bytes(b"xdpmond policy log 1\n" * begun + content)
    found(store)
    store.save(STATE)
    assert reopened(store) == seen(STATE)
    store.close()


WORDS = """modes add remove columns everywhere on family length count origin verdict created expires reason reasons prefix""".split()
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["::/0", "deny", "operator", "enforce", "x", 4, 24])
DOCUMENTS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=9))


@given(DOCUMENTS, st.binary(max_size=40))
def test_a_record_of_arbitrary_json_is_at_worst_a_state_error(tmp_path_factory, document, columns):
    store = OperatorStore(tmp_path_factory.mktemp("state") / "policy.log")
    record = state_module._framed(json.dumps(document).encode() + b"\n" + columns)
    store.path.write_bytes(b"xdpmond policy log 1\n" + record)
    found(store)
    store.close()


def columns(**changes):
    of = {"origin": "operator", "family": 4, "length": 24, "count": 2, "verdict": "deny", "created": 1, "expires": None, "reason": "",
          "columns": []}  # fmt: skip
    return {"columns": [{key: value for key, value in {**of, **changes}.items() if value != "absent"}]}


GOOD = bytes([10, 0, 0, 0, 10, 0, 1, 0])


@pytest.mark.parametrize(
    ("document", "content"),
    [
        (columns(), GOOD[4:] + GOOD[:4]), (columns(), GOOD[:4] * 2), (columns(), GOOD[:7] + b"\1"), (columns(), GOOD[:7]),
        (columns(), GOOD + b"x"), (columns(length=33), GOOD), (columns(family=5), GOOD), (columns(count=0), b""),
        (columns(count=-1), GOOD), (columns(count=1 << 60), GOOD), (columns(origin="configuration"), GOOD), (columns(verdict="log"), GOOD),
        (columns(created=math.nan), GOOD), (columns(reason="absent"), GOOD), (columns(columns=["verdict"]), GOOD + b"\1\3"),
        (columns(columns=["created"]), GOOD + b"\xff" * 16), (columns(columns=["x"]), GOOD),
        (columns(columns=["expires"]), GOOD + b"\xff" * 16),
        (columns(columns=["reason"], reasons=["a"]), GOOD + b"\0\0\0\0\1\0\0\0"),
        ({"surprise": 1}, b""), ({"remove": [["10.0.0.0/8", "configuration"]]}, b""), ({"remove": [["10.0.0.0/8"]]}, b""), ([], b""),
    ],
    ids=repr,
)  # fmt: skip
def test_a_record_with_right_checksums_that_means_nothing(store, document, content):
    good = state_module._framed(json.dumps({**columns(), "modes": {"everywhere": "enforce", "on": {}}}).encode() + b"\n" + GOOD)
    bad = state_module._framed(json.dumps(document).encode() + b"\n" + content)
    store.path.write_bytes(b"xdpmond policy log 1\n" + good + bad)
    (entries, mode, _), error = found(store)
    assert "not understood" in error.message
    assert ([str(e.prefix) for e in entries], mode) == (["10.0.0.0/24", "10.0.1.0/24"], Mode.ENFORCE)


# --- disks that refuse


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_the_next_change_keeps_both(store, monkeypatch):
    store.save(STATE)
    policy = STATE.policy.with_changes([entry("192.0.2.1")])

    def half(descriptor, data):
        os.write(descriptor, bytes(data)[: len(data) // 2])
        full()

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_write_all", half)
        with pytest.raises(StateError, match="cannot be written: No space left"):
            store.save(State(policy))
        assert reopened(store) == seen(STATE)  # no half of a record either
    policy = policy.with_changes([entry("192.0.2.2")])
    store.save(State(policy))
    assert reopened(store) == seen(State(policy))


@pytest.mark.parametrize("name", ["fdatasync", "ftruncate"])
def test_what_may_not_have_reached_the_disk_is_written_anew(store, monkeypatch, name):
    store.save(STATE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        patch.setattr(os, name, full)
        with pytest.raises(StateError):
            store.save(State())
    inode = store.path.stat().st_ino
    store.save(State(mode=Mode.ENFORCE))
    assert store.path.stat().st_ino != inode
    assert reopened(store) == seen(State(mode=Mode.ENFORCE))


def test_a_write_that_fails_keeps_the_old_state(store):
    store.save(STATE)
    store.path.with_name("policy.log.new").mkdir()
    other = OperatorStore(store.path)
    with pytest.raises(StateError, match="cannot be written"):
        other.save(State())
    assert reopened(store) == seen(STATE)


def test_a_file_that_is_deleted_or_replaced_is_written_anew(store):
    store.save(STATE)
    store.path.unlink()
    store.save(State(STATE.policy, Mode.MONITOR))
    assert reopened(store) == seen(State(STATE.policy, Mode.MONITOR))
    store.path.with_name("other").write_bytes(b"")
    os.replace(store.path.with_name("other"), store.path)
    store.save(STATE)
    assert reopened(store) == seen(STATE)


def test_a_symbolic_link_planted_beside_is_not_followed(store, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    store.path.with_name("policy.log.new").symlink_to(victim)
    with pytest.raises(StateError):
        store.save(STATE)
    assert victim.read_text() == "precious"
    store.save(STATE)
    assert reopened(store) == seen(STATE)


def test_a_missing_directory_is_said(tmp_path):
    with pytest.raises(StateError, match="No such file or directory"):
        OperatorStore(tmp_path / "absent" / "policy.log").save(STATE)


def test_a_file_that_could_not_be_read_is_not_overwritten(store, monkeypatch):
    store.save(STATE)
    content = store.path.read_bytes()
    other = OperatorStore(store.path)
    with monkeypatch.context() as patch:
        patch.setattr(OperatorStore, "_read", full)
        with pytest.raises(StateError):
            other.load()
    other.save(State())
    assert store.path.with_name("policy.log.unreadable-1").read_bytes() == content
    assert reopened(other) == NOTHING
    other.close()


@pytest.fixture
def damaged(store):
    """A log with zeros at its end, as some file systems leave one after a power cut."""
    store.save(STATE)
    with store.path.open("ab") as log:
        log.write(bytes(64))
    return store.path.read_bytes()


def started(store):
    """What another daemon would find, with what it would say; it ends at once."""
    other = OperatorStore(store.path)
    try:
        return found(other)
    finally:
        other.close()


def names(store):
    return sorted(os.listdir(store.path.parent))


ASIDE = "policy.log.unreadable-1"


@pytest.mark.parametrize("refused", ["fsync", "replace", "link"])
def test_what_is_left_of_a_damaged_log_is_found_until_it_is_on_disk(store, damaged, monkeypatch, refused):
    aside = store.path.with_name(ASIDE)
    with monkeypatch.context() as patch:
        patch.setattr(os, refused, full)
        for _ in range(2):
            state, error = started(store)
            assert state == seen(STATE)
            assert "not kept on disk: No space left" in error.message
            assert str(store.path if refused == "link" else aside) in error.hint
            assert names(store) == ["policy.log"] + [ASIDE] * (refused != "link"), "one name more is enough"
            assert store.path.read_bytes() == damaged
        other = OperatorStore(store.path)
        found(other)
        with pytest.raises(StateError, match="No space left"):
            other.save(State())
        other.close()
        assert store.path.read_bytes() == damaged
    state, error = started(store)
    assert (state, "not kept" in error.message) == (seen(STATE), False)
    assert (names(store), aside.read_bytes()) == (["policy.log", ASIDE], damaged)
    assert started(store) == (seen(STATE), None)


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("name", ["link", "open", "fsync", "replace"])
def test_no_moment_has_the_damaged_log_gone_and_nothing_in_its_place(store, damaged, monkeypatch, name):
    def cut(*_):
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(os, name, cut)
        with pytest.raises(PowerCut):
            OperatorStore(store.path).load()
    state, error = started(store)
    assert (state, error is None) == (seen(STATE), False)
    assert started(store) == (seen(STATE), None)
    assert store.path.with_name(ASIDE).read_bytes() == damaged


def test_a_change_takes_the_place_of_a_damaged_log(store, damaged, monkeypatch):
    """Where what was left could not be written at the start, as there was no room then."""
    other = OperatorStore(store.path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        found(other)
    other.save(State(mode=Mode.MONITOR))
    other.close()
    assert (names(store), store.path.with_name(ASIDE).read_bytes()) == (["policy.log", ASIDE], damaged)
    assert started(store) == (seen(State(mode=Mode.MONITOR)), None)


def test_an_unfinished_change_on_a_full_disk_is_dropped_at_each_start(store, monkeypatch):
    store.save(STATE)
    with store.path.open("ab") as log:
        log.write(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            state, error = started(store)
            assert state == seen(STATE)
            assert "1 bytes are dropped; what is left is not kept on disk: No space left" in error.message
    assert started(store)[0] == seen(STATE)
    assert started(store) == (seen(STATE), None)


# --- compaction


def grown(store, number):
    policy = Policy()
    for n in range(number):
        policy = policy.with_changes([entry(f"192.0.2.{n % 7}", created=float(n), reason="r" * 100)])
        store.save(State(policy))
    return State(policy)


def test_a_log_that_has_grown_is_written_anew(store, monkeypatch):
    monkeypatch.setattr(state_module, "_SMALL", 10_000)
    state = grown(store, 30)
    assert not store.overgrown
    state = grown(store, 100)
    assert store.overgrown
    store.compact()
    assert not store.overgrown
    assert store.path.stat().st_size < 2500
    assert reopened(store) == seen(state)
    assert os.listdir(store.path.parent) == ["policy.log"]


def test_a_log_that_is_as_short_as_it_can_be_is_left_alone(store, monkeypatch):
    """However low the estimate of that is: else each change would be followed by a compaction."""
    monkeypatch.setattr(state_module, "_SMALL", 0)
    policy = Policy(entry(f"192.0.2.{n}", created=float(n), reason="r" * 200) for n in range(60))
    store.save(State(policy))
    assert not store.overgrown
    assert reopened(store) == seen(State(policy))
    store.save(State(policy.with_changes([ENTRY])))
    assert not store.overgrown
    other = OperatorStore(store.path)
    other.load()
    assert not other.overgrown
    other.close()


def test_what_is_gone_makes_a_log_too_long(store):
    many = State(Policy().with_bulk(bulk(200_000)))
    store.save(many)
    assert not store.overgrown
    store.save(State())
    assert store.overgrown
    store.compact()
    assert store.path.stat().st_size < 100
    assert reopened(store) == NOTHING


def test_many_records_are_written_anew_too(store, monkeypatch):
    monkeypatch.setattr(state_module, "_MOST_RECORDS", 50)
    grown(store, 60)
    assert store.overgrown


def test_changes_go_on_while_the_log_is_written_anew(store, monkeypatch):
    """And none of them is lost. The thread that writes stands still until a change was saved beside it."""
    before = grown(store, 20)
    saved, writing = threading.Event(), threading.Event()
    original = state_module._write_new

    def slow(path, state):
        writing.set()
        assert saved.wait(30)
        return original(path, state)

    monkeypatch.setattr(state_module, "_write_new", slow)
    thread = threading.Thread(target=store.compact)
    thread.start()
    assert writing.wait(30)
    after = State(before.policy.with_changes([ENTRY]), Mode.ENFORCE)
    store.save(after)
    saved.set()
    thread.join()
    assert reopened(store) == seen(after)
    assert store.path.stat().st_size < 3000
    store.save(State())
    assert reopened(store) == NOTHING


def test_a_full_disk_while_the_log_is_written_anew_leaves_the_old_one(store, monkeypatch):
    state = grown(store, 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match="written anew: No space"):
            store.compact()
    assert os.listdir(store.path.parent) == ["policy.log"]
    state = State(state.policy.with_changes([ENTRY]))
    store.save(state)
    assert reopened(store) == seen(state)


# --- the file of version 1


def old(**changes):
    entry = {"prefix": "::1/128", "verdict": "deny", "origin": "operator", "created": 0, "expires": None, "reason": "ü"}
    return {"version": 1, "mode": "enforce", "interface_modes": {"eth0": "monitor"}, "entries": [entry | changes]}


@pytest.mark.parametrize("name", ["policy.log", "mine"])
def test_the_file_of_an_older_version_is_taken_over_once(tmp_path, name):
    store = OperatorStore(tmp_path / name)
    before = tmp_path / ("state.json" if name == "policy.log" else name)
    before.write_text(json.dumps(old()))
    wanted = seen(State(Policy([entry("::1", reason="ü")]), Mode.ENFORCE, {"eth0": Mode.MONITOR}))
    assert seen(store.load()) == wanted
    assert reopened(store) == wanted
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{before.name}.imported"])
    assert json.loads((tmp_path / f"{before.name}.imported").read_text()) == old()
    store.close()


def test_a_log_wins_over_the_file_of_an_older_version(store):
    store.save(STATE)
    store.path.with_name("state.json").write_text(json.dumps(old()))
    assert reopened(store) == seen(STATE)


def test_an_import_that_cannot_be_written_counts_all_the_same(store, monkeypatch):
    store.path.with_name("state.json").write_text(json.dumps(old()))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        state = store.load()
    assert len(state.policy) == 1
    store.save(State(state.policy.with_changes([ENTRY]), state.mode))
    assert len(reopened(store)[0]) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'{"version": 1}', b"[" * 100_000, b'{"version": 1e999}', b"{" * 100_000,
        *(json.dumps(document).encode() for document in (
            {**old(), "version": 2}, {**old(), "mode": "x"}, {**old(), "mode": []}, {**old(), "interface_modes": []},
            {**old(), "entries": 5}, {**old(), "entries": [5]}, old(prefix="10.0.0.1/8"), old(prefix=5), old(verdict="maybe"),
            old(origin="?"), old(created="now"), old(created=math.nan), old(created=10**400), old(expires=math.inf),
            old(expires=True),
        )),
    ],
    ids=lambda content: repr(content[-40:]),
)  # fmt: skip
@pytest.mark.parametrize("name", ["policy.log", "state.json"])
def test_a_file_that_is_not_understood_is_kept_aside(store, content, name):
    if name == "state.json" and content[:1] != b"{":
        content = b"{" + content
    for number in (1, 2):
        store.path.unlink(missing_ok=True)
        store.path.with_name(name).write_bytes(content)
        with pytest.raises(StateError) as caught:
            store.load()
        aside = store.path.with_name(f"{name}.unreadable-{number}")
        assert str(aside) in caught.value.hint
        assert aside.read_bytes() == content
        assert seen(store.load()) == NOTHING
    store.save(STATE)
    assert reopened(store) == seen(STATE)
