"""The policy against a model that is too simple to be wrong: a list of entries, and Python's ipaddress."""

import ipaddress
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond import layers
from xdpmond.errors import FileEntryError, GuardError, LockOutError, NoSuchEntryError
from xdpmond.layers import changes
from xdpmond.model import Entry, Family, Mode, Origin, Prefix, Verdict, parse_address
from xdpmond.policy import Difference, Policy, difference, guard_peers, locked_out, refuse_everything
from xdpmond.prefixes import Bulk, PrefixSet

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


def grown(given, limit):
    """A policy of these entries that came one by one, with overlays of so many at most: some are in bases, some in overlays."""
    with mock.patch.object(layers, "LIMIT", limit):
        policy = Policy()
        for one in given:
            layer = policy.layers[one.origin]
            policy = policy.of({**policy.layers, one.origin: layer.changed([one])})
        return policy


def policies(origins=tuple(Origin)):
    """As one would come to be: by entries one at a time, of which some were removed again, over a base that came at once."""

    def build(base, later, removed, limit):
        policy = Policy(base)
        with mock.patch.object(layers, "LIMIT", 0):
            policy = policy.of({origin: layer.changed(e for e in base if e.origin is origin) for origin, layer in policy.layers.items()})
        with mock.patch.object(layers, "LIMIT", limit):
            for one in later:
                policy = policy.of({**policy.layers, one.origin: policy.layers[one.origin].changed([one])})
            for prefix, origin in [(e.prefix, e.origin) for e in (*base, *later)][:removed]:
                policy = policy.of({**policy.layers, origin: policy.layers[origin].changed(remove=[prefix])})
        return policy

    of = st.lists(entries(origins), max_size=15)
    return st.builds(build, of, of, st.integers(0, 12), st.sampled_from([0, 2, 1000]))


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
    for policy in (Policy(given_entries), *(grown(given_entries, limit) for limit in (0, 2, 1000))):
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
        over = {(e.prefix, e.origin) for e in everything if e.expires is not None and e.expires <= now}
        assert {(e.prefix, e.origin) for e in policy.expired(now)} == over


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


def related():
    """A policy and what became of it, which share segments and bases; or two that share nothing."""
    one = st.tuples(st.lists(entries([OPERATOR]), max_size=4), st.integers(0, 3), st.sampled_from([0, 4, 1000]))
    later = st.tuples(policies(), st.lists(one, max_size=3))

    def change(drawn):
        old, steps = drawn
        policy = old
        for add, removed, limit in steps:
            doomed = [(e.prefix, e.origin) for e in policy.entries() if e.origin is not CONFIGURATION][:removed]
            with mock.patch.object(layers, "LIMIT", limit):
                policy = policy.with_changes(add, doomed)
        return old, policy

    return later.map(change) | st.tuples(policies(), policies())


@given(related())
def test_a_difference_names_what_changed(pair):
    old, new = pair
    verdicts, wanted = ({prefix: e.verdict for prefix, e in policy.effective().items()} for policy in pair)
    changed = {prefix for prefix in verdicts.keys() | wanted.keys() if verdicts.get(prefix) is not wanted.get(prefix)}
    assert difference(old, new) == Difference(sorted(changed, key=lambda p: (p.family, p.length, p.address)), len(changed))


@given(related())
def test_the_changes_of_a_layer_turn_it_into_the_other(pair):
    for origin in Origin:
        old, new = (policy.layers[origin] for policy in pair)
        found = changes(old, new)
        again = old.without(found.removed).with_rows(found.added)
        assert Policy.of({origin: again}).entries() == Policy.of({origin: new}).entries()
        kept = {e.prefix: e for e in Policy.of({origin: old}).entries()}
        for key, rows in found.added.items():
            assert all(kept.get(entry.prefix) != entry for entry in rows.entries(origin, key))
        assert all(prefix in kept for prefix in PrefixSet(found.removed))


def test_many_changes_are_not_named_each():
    old = Policy([entry("10.0.0.0/8")])
    bulk = Bulk(PrefixSet.of(Prefix(Family.IPV4, n.to_bytes(4, "big"), 32) for n in range(2000)), DENY, OPERATOR, 5.0, 9.0, "feed")
    new = old.with_bulk(bulk)
    assert difference(old, new) == Difference(None, 2000)
    assert difference(new, old) == Difference(None, 2000)
    assert difference(new, new.with_bulk(bulk)) == Difference([], 0)
    assert new.at(Prefix.parse("0.0.7.207")) == [entry("0.0.7.207", created=5.0, expires=9.0, reason="feed")]
    assert (len(new), new.expiring(), new.next_expiry(), len(new.expired(9, 7)), len(new.without_expired(8))) == (2001, 2000, 9.0, 7, 2001)
    assert new.without_expired(9).entries() == old.entries()


# What the packet path is made of


@given(policies())
def test_segments_are_what_is_effective(policy):
    found = {}
    for family in (Family.IPV4, Family.IPV6):
        segments = policy.segments(family)
        assert [length for length, _, _ in segments] == sorted({length for length, _, _ in segments})
        for length, addresses, verdicts in segments:
            assert (addresses.dtype, verdicts.dtype) == (np.dtype("u4" if family is Family.IPV4 else "u8"), np.dtype("u1"))
            rows = [(address,) for address in addresses.tolist()] if family is Family.IPV4 else [tuple(row) for row in addresses.tolist()]
            assert rows == sorted(set(rows))
            for row, verdict in zip(rows, verdicts.tolist(), strict=True):
                packed = b"".join(part.to_bytes(4 if family is Family.IPV4 else 8, "big") for part in row)
                found[Prefix(family, packed, length)] = {1: ALLOW, 2: DENY}[verdict]
    assert found == {prefix: e.verdict for prefix, e in policy.effective().items()}


@given(policies(), prefixes(), st.integers(0, 128), st.integers(0, 128))
def test_what_is_inside_a_prefix(policy, outer, shortest, longest):
    wanted = [
        (prefix, e.verdict)
        for prefix, e in policy.effective().items()
        if shortest <= prefix.length <= longest and prefix.length >= outer.length and outer.covers(prefix.family, prefix.address)
    ]
    assert policy.inside(outer, shortest, longest) == sorted(wanted, key=lambda found: (found[0].length, found[0].address))
    assert policy.any_inside(outer, shortest, longest) == bool(wanted)
    longer = {
        of.verdict
        for of in policy.effective().values()
        if of.prefix.length > outer.length and outer.covers(of.prefix.family, of.prefix.address)
    }
    for verdict in (Verdict.ALLOW, Verdict.DENY, Verdict.LOG, None):
        assert policy.any_other_inside(outer, verdict) == bool(longer - {verdict})
    over = [of for of in policy.effective().values() if of.prefix.length <= outer.length and of.prefix.covers(outer.family, outer.address)]
    assert policy.over(outer) == max(over, key=lambda of: of.prefix.length, default=None)


@given(policies(), addresses(), st.integers(0, 128), st.integers(0, 128))
def test_what_covers_an_address(policy, address, shortest, longest):
    verdicts = {e.prefix.length: e.verdict for e in reversed(covering(policy, *address)) if shortest <= e.prefix.length <= longest}
    assert policy.covering(*address, shortest, longest) == (verdicts[max(verdicts)] if verdicts else None)


@given(policies(), st.lists(addresses(), max_size=20))
def test_many_addresses_are_matched_as_each_of_them(policy, wanted):
    sources = np.frombuffer(b"".join(address.ljust(16, b"\0") for _, address in wanted), "u1").reshape(-1, 16)
    matches = policy.match_rows(np.array([family for family, _ in wanted], "u1"), sources)
    assert len(matches.which) == len(wanted)
    assert len(set(matches.prefixes)) == len(matches.prefixes) == len(matches.verdicts)
    for which, address in zip(matches.which.tolist(), wanted, strict=True):
        found = policy.match(*address)
        if found is None:
            assert which == -1
        else:
            assert (matches.prefixes[which], matches.verdicts[which]) == (found.prefix, found.verdict)


@given(policies(), st.lists(entries([CONFIGURATION]), max_size=10))
def test_new_configuration_replaces_the_old_and_nothing_else(policy, configured):
    changed = policy.with_configuration(configured)
    assert {e.prefix: e for e in changed.entries() if e.origin is CONFIGURATION} == {e.prefix: e for e in configured}
    assert [e for e in changed.entries() if e.origin is OPERATOR] == [e for e in policy.entries() if e.origin is OPERATOR]
    assert [e for e in policy.entries() if e.origin is not CONFIGURATION] == policy.without_configuration().entries()
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
    assert difference(policy, back) == Difference([Prefix.parse("192.0.2.0/24")], 1)


def test_all_or_none():
    policy = Policy([entry("192.0.2.1"), entry("198.51.100.0/24", DENY, CONFIGURATION, source="/etc/x.toml:7")])
    with pytest.raises(NoSuchEntryError, match=r"192\.0\.2\.2/32"):
        policy.with_changes([entry("192.0.2.3")], [(Prefix.parse("192.0.2.1"), OPERATOR), (Prefix.parse("192.0.2.2"), OPERATOR)])
    with pytest.raises(FileEntryError, match=r"/etc/x\.toml:7"):
        policy.with_changes(remove=[(Prefix.parse("192.0.2.1"), OPERATOR), (Prefix.parse("198.51.100.0/24"), CONFIGURATION)])
    assert len(policy) == 2
    assert len(policy.with_changes(remove=[(Prefix.parse("192.0.2.1"), OPERATOR)] * 2)) == 1


def test_everything_is_refused_unless_forced():
    everything, some = PrefixSet.of(map(Prefix.parse, ["192.0.2.0/24", "::/0"])), PrefixSet.of([Prefix.parse("192.0.2.0/24")])
    with pytest.raises(GuardError, match="every ipv6 source"):
        refuse_everything(everything, forced=False)
    refuse_everything(everything, forced=True)
    refuse_everything(some, forced=False)


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


def test_a_list_in_the_configuration_names_its_lines():
    prefixes = PrefixSet({(Family.IPV4, 32): np.array([1, 5], "u4")}, {(Family.IPV4, 32): np.array([9, 3], "u4")})
    policy = Policy().with_configuration([entry("::1", ALLOW, CONFIGURATION)], [Bulk(prefixes, DENY, CONFIGURATION, source="/list")])
    assert [(str(e.prefix), e.source) for e in policy.entries()] == [("0.0.0.1/32", "/list:9"), ("0.0.0.5/32", "/list:3"), ("::1/128", "")]
    with pytest.raises(FileEntryError, match="stands in /list:3"):
        policy.with_changes(remove=[(Prefix.parse("0.0.0.5"), CONFIGURATION)])


def test_a_million_entries():
    """Correct at size; and a small change shares all columns with what was before."""
    addresses = np.arange(1_000_000, dtype="u4") << np.uint32(8)
    listed = Bulk(PrefixSet({(Family.IPV4, 24): addresses}), DENY, CONFIGURATION, source="/list")
    policy = Policy().with_configuration([], [listed])
    changed = policy.with_changes([entry("1.2.3.4", ALLOW), entry("1.2.4.0/24", ALLOW)])
    wanted = [Prefix.parse("1.2.4.0/24"), Prefix.parse("1.2.3.4")]
    assert difference(policy, changed) == Difference(wanted, 2)
    assert changed.layers[CONFIGURATION].segments[Family.IPV4, 24].base.addresses is addresses
    for n in range(0, 1_000_000, 1009):
        assert changed.match(Family.IPV4, (n << 8 | 9).to_bytes(4, "big")).prefix.address == (n << 8).to_bytes(4, "big")
    assert changed.match(*parse_address("255.2.3.4")) is None
    assert (len(changed), changed.count(verdict=ALLOW)) == (1_000_002, 2)
    gone = changed.with_changes(remove=[(prefix, OPERATOR) for prefix in wanted])
    assert difference(policy, gone) == Difference([], 0)
