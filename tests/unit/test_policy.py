"""The policy against a model that is too simple to be wrong: a list of entries, and Python's ipaddress."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.errors import FileEntryError, GuardError, LockOutError, NoSuchEntryError
from xdpmond.model import Entry, Family, Mode, Origin, Prefix, Verdict, parse_address
from xdpmond.policy import Policy, difference, guard_peers, locked_out, refuse_everything

ALLOW, DENY = Verdict.ALLOW, Verdict.DENY
OPERATOR, CONFIGURATION, AUTOMATIC = Origin.OPERATOR, Origin.CONFIGURATION, Origin.AUTOMATIC


def entry(prefix, verdict=DENY, origin=OPERATOR, **more):
    return Entry(Prefix.parse(prefix), verdict, origin, **more)


def decides(policy, address):
    found = policy.match(*parse_address(address))
    return found and (str(found.prefix), found.verdict, found.origin)


# Few distinct bits, so that random prefixes cover each other and random addresses hit them.
def addresses():
    def build(family, bits):
        number = sum(bit << shift for bit, shift in zip(bits, (0, 1, 7, 8, 15, 16, 24, 31), strict=True))
        return family, number.to_bytes(4, "big") if family is Family.IPV4 else (number << 96 | 1).to_bytes(16, "big")

    return st.builds(build, st.sampled_from([Family.IPV4, Family.IPV6]), st.lists(st.integers(0, 1), min_size=8, max_size=8))


def prefixes():
    def build(address, length):
        family, packed = address
        length = min(length, family.bits)
        shift = family.bits - length
        return Prefix(family, (int.from_bytes(packed, "big") >> shift << shift).to_bytes(family.bits // 8, "big"), length)

    return st.builds(build, addresses(), st.sampled_from([0, 1, 7, 8, 9, 16, 17, 24, 25, 31, 32, 64, 128]))


def entries(origins=tuple(Origin)):
    verdicts, expiries = st.sampled_from([ALLOW, DENY]), st.none() | st.integers(1, 9).map(float)
    return st.builds(Entry, prefixes(), verdicts, st.sampled_from(origins), expires=expiries)


def policies(origins=tuple(Origin)):
    return st.lists(entries(origins), max_size=25).map(Policy)


def network(prefix):
    return ipaddress.ip_network((prefix.address, prefix.length))


def covering(policy, family, address):
    """The model: every entry whose network holds the address, the longest first, the strongest first."""
    host = ipaddress.ip_address(address)
    found = [e for e in policy.entries() if e.prefix.family is family and host in network(e.prefix)]
    return sorted(found, key=lambda e: (-e.prefix.length, e.origin.rank))


@given(policies(), addresses())
def test_longest_match_is_that_of_ipaddress(policy, address):
    expected = covering(policy, *address)
    assert policy.explain(*address) == expected
    assert policy.match(*address) == (expected[0] if expected else None)


@given(st.lists(entries(), max_size=25))
def test_a_repeated_entry_replaces_the_earlier_one(given_entries):
    last = {(e.prefix, e.origin): e for e in given_entries}
    policy = Policy(given_entries)
    assert set(policy.entries()) == set(last.values())
    assert len(policy) == len(last)


@given(policies())
def test_entries_are_sorted_and_one_a_prefix_is_effective(policy):
    keys = [(e.prefix.family, e.prefix.address, e.prefix.length, e.origin.rank) for e in policy.entries()]
    assert keys == sorted(keys)
    effective = policy.effective()
    assert effective.keys() == {e.prefix for e in policy.entries()}
    for prefix, strongest in effective.items():
        assert strongest == policy.at(prefix)[0]
        assert strongest.origin.rank == min(e.origin.rank for e in policy.entries() if e.prefix == prefix)


def assert_counts(policy):
    everything = policy.entries()
    for origin in (None, *Origin):
        for verdict in (None, ALLOW, DENY):
            chosen = [e for e in everything if origin in (None, e.origin) and verdict in (None, e.verdict)]
            assert policy.count(origin, verdict) == len(chosen)
    ends = [e.expires for e in everything if e.expires is not None]
    assert policy.expiring() == len(ends)
    assert policy.next_expiry() == min(ends, default=None)
    for now in (0.0, 4.0, 4.5, 9.0):
        assert {(e.prefix, e.origin) for e in policy.expired(now)} == {
            (e.prefix, e.origin) for e in everything if e.expires is not None and e.expires <= now
        }


@given(policies(), st.lists(entries([OPERATOR]), max_size=6), st.data())
def test_a_change_makes_the_policy_that_says_so_and_leaves_the_old_one(policy, add, data):
    before = policy.entries()
    removable = [(e.prefix, e.origin) for e in before if e.origin is not CONFIGURATION]
    remove = data.draw(st.lists(st.sampled_from(removable), max_size=4)) if removable else []
    changed = policy.with_changes(add, remove)
    assert policy.entries() == before
    wanted = {(e.prefix, e.origin): e for e in before if (e.prefix, e.origin) not in remove} | {(e.prefix, e.origin): e for e in add}
    kept = {(e.prefix, e.origin): e for e in changed.entries()}
    dropped = {key: e for key, e in wanted.items() if key not in kept}
    assert kept.items() <= wanted.items()
    assert all(e.origin is AUTOMATIC and e.verdict is DENY and changed.inside_allow(e.prefix) for e in dropped.values())
    assert_counts(changed)


@given(policies(), policies())
def test_a_difference_turns_one_policy_into_the_other(old, new):
    changes = difference(old, new)
    verdicts = {prefix: e.verdict for prefix, e in old.effective().items()}
    wanted = {prefix: e.verdict for prefix, e in new.effective().items()}
    assert all(verdicts.get(prefix) is not verdict for prefix, verdict in changes.set.items())
    assert changes.delete <= verdicts.keys()
    verdicts = {prefix: verdict for prefix, verdict in verdicts.items() if prefix not in changes.delete} | dict(changes.set)
    assert verdicts == wanted


@given(policies(), st.lists(entries([CONFIGURATION]), max_size=10))
def test_new_configuration_replaces_the_old_and_nothing_else(policy, configured):
    changed = policy.with_configuration(configured)
    assert {e.prefix: e for e in changed.entries() if e.origin is CONFIGURATION} == {e.prefix: e for e in configured}
    assert [e for e in changed.entries() if e.origin is OPERATOR] == [e for e in policy.entries() if e.origin is OPERATOR]
    assert_counts(changed)


@given(policies([OPERATOR, CONFIGURATION]), st.lists(entries() | st.lists(entries([CONFIGURATION]), max_size=3), max_size=6))
def test_no_change_leaves_an_automatic_ban_inside_an_allow(policy, steps):
    for step in steps:
        try:
            policy = policy.with_configuration(step) if isinstance(step, list) else policy.with_changes([step])
        except GuardError:
            assert step.origin is AUTOMATIC
        allows = [e.prefix for e in policy.effective().values() if e.verdict is ALLOW]
        bans = [e.prefix for e in policy.entries() if e.origin is AUTOMATIC and e.verdict is DENY]
        assert not any(allow.length <= ban.length and allow.covers(ban.family, ban.address) for ban in bans for allow in allows)


def test_an_automatic_ban_inside_an_allow_is_refused_and_named():
    policy = Policy([entry("10.0.0.0/8", ALLOW, CONFIGURATION)])
    with pytest.raises(GuardError, match=r"10\.1\.2\.3/32 .* 10\.0\.0\.0/8 is allowed"):
        policy.with_changes([entry("10.1.2.3", DENY, AUTOMATIC)])
    wider = policy.with_changes([entry("0.0.0.0/1", DENY, AUTOMATIC)])
    assert decides(wider, "10.1.2.3") == ("10.0.0.0/8", ALLOW, CONFIGURATION)
    overridden = policy.with_changes([entry("10.0.0.0/8", DENY, OPERATOR)])
    assert len(overridden.with_changes([entry("10.1.2.3", DENY, AUTOMATIC)])) == 3


def test_an_allow_lifts_automatic_bans_inside_it():
    policy = Policy([entry("203.0.113.9", DENY, AUTOMATIC), entry("203.0.113.7", DENY, OPERATOR)])
    allowed = policy.with_changes([entry("203.0.113.0/24", ALLOW)])
    assert decides(allowed, "203.0.113.9") == ("203.0.113.0/24", ALLOW, OPERATOR)
    assert decides(allowed, "203.0.113.7") == ("203.0.113.7/32", DENY, OPERATOR)


def test_the_stronger_origin_wins_for_one_prefix_and_length_wins_over_origin():
    configured = [entry("192.0.2.0/24", ALLOW, CONFIGURATION), entry("192.0.2.8/29", ALLOW, CONFIGURATION)]
    policy = Policy([*configured, entry("192.0.2.0/24", DENY, OPERATOR)])
    assert decides(policy, "192.0.2.1") == ("192.0.2.0/24", DENY, OPERATOR)
    assert decides(policy, "192.0.2.9") == ("192.0.2.8/29", ALLOW, CONFIGURATION)
    back = policy.with_changes(remove=[(Prefix.parse("192.0.2.0/24"), OPERATOR)])
    assert decides(back, "192.0.2.1") == ("192.0.2.0/24", ALLOW, CONFIGURATION)
    assert difference(policy, back) == ({Prefix.parse("192.0.2.0/24"): ALLOW}, set())


def test_all_or_none():
    policy = Policy([entry("192.0.2.1"), entry("198.51.100.0/24", DENY, CONFIGURATION, source="/etc/x.toml:7")])
    with pytest.raises(NoSuchEntryError, match=r"192\.0\.2\.2/32"):
        policy.with_changes([entry("192.0.2.3")], [(Prefix.parse("192.0.2.1"), OPERATOR), (Prefix.parse("192.0.2.2"), OPERATOR)])
    with pytest.raises(FileEntryError, match=r"/etc/x\.toml:7"):
        policy.with_changes(remove=[(Prefix.parse("192.0.2.1"), OPERATOR), (Prefix.parse("198.51.100.0/24"), CONFIGURATION)])
    assert len(policy) == 2
    assert len(policy.with_changes(remove=[(Prefix.parse("192.0.2.1"), OPERATOR)] * 2)) == 1


def test_everything_is_refused_unless_forced():
    everything = [Prefix.parse("192.0.2.0/24"), Prefix.parse("::/0")]
    with pytest.raises(GuardError, match="every ipv6 source"):
        refuse_everything(everything, forced=False)
    refuse_everything(everything, forced=True)
    refuse_everything(everything[:1], forced=False)


PEER = parse_address("203.0.113.9")


def test_only_a_deny_entry_in_enforce_mode_locks_out():
    denied = Policy([entry("203.0.113.0/24")])
    assert locked_out(denied, Mode.MONITOR, [PEER]) == []
    assert locked_out(denied, Mode.ENFORCE, [PEER]) == [(PEER, entry("203.0.113.0/24"))]
    assert locked_out(Policy(), Mode.ENFORCE, [PEER]) == []
    assert locked_out(denied.with_changes([entry("203.0.113.9", ALLOW)]), Mode.ENFORCE, [PEER]) == []


def test_an_ipv4_peer_of_a_dual_stack_server_is_known_by_its_ipv4_address():
    mapped = (Family.IPV6, bytes(10) + b"\xff\xff" + PEER[1])
    assert [peer for peer, _ in locked_out(Policy([entry("203.0.113.9")]), Mode.ENFORCE, [mapped, PEER])] == [PEER]


def test_the_guard_names_peer_and_entry_for_every_kind_of_change():
    open_, closed = Policy(), Policy([entry("203.0.113.0/24", source="/etc/x.toml:7")])
    with pytest.raises(LockOutError, match=r"203\.0\.113\.9, .* 203\.0\.113\.0/24 is denied \(/etc/x\.toml:7\)"):
        guard_peers(open_, Mode.ENFORCE, closed, Mode.ENFORCE, [PEER])
    with pytest.raises(LockOutError, match="and 1 more"):
        guard_peers(closed, Mode.MONITOR, closed, Mode.ENFORCE, [PEER, parse_address("203.0.113.10")])
    guard_peers(open_, Mode.MONITOR, closed, Mode.MONITOR, [PEER])
    guard_peers(closed, Mode.ENFORCE, open_, Mode.ENFORCE, [PEER])


def test_a_peer_that_is_outside_already_does_not_stand_in_the_way():
    closed = Policy([entry("203.0.113.0/24")])
    guard_peers(closed, Mode.ENFORCE, closed.with_changes([entry("192.0.2.1")]), Mode.ENFORCE, iter([PEER]))


def test_a_million_entries():
    """Correct at size; and a small change does not walk through them all: it shares the configuration's layer."""
    configured = (Entry(Prefix(Family.IPV4, (n << 8).to_bytes(4, "big"), 24), DENY, CONFIGURATION) for n in range(1_000_000))
    policy = Policy(configured)
    changed = policy.with_changes([entry("1.2.3.4", ALLOW)])
    assert difference(policy, changed) == ({Prefix.parse("1.2.3.4"): ALLOW}, set())
    for n in range(0, 1_000_000, 1009):
        assert changed.match(Family.IPV4, (n << 8 | 9).to_bytes(4, "big")).prefix.address == (n << 8).to_bytes(4, "big")
    assert changed.match(*parse_address("255.2.3.4")) is None
    assert len(changed) == 1_000_001
