"""Which rule packets met: never more than is true, and exactly what is true where it is not called partial, whatever changed meanwhile."""

import itertools
import os
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servicefakes import entry

from xdpmond.attribution import CHUNK, Change, RuleBook, attribute, digest
from xdpmond.kernel import abi
from xdpmond.kernel.rulecounts import RuleCountTable
from xdpmond.model import Count, Family, Origin, Prefix, RuleCount, Verdict
from xdpmond.policy import Policy
from xdpmond.rows import ROW, merge

BYTES = 60
PREFIXES = [Prefix.parse(text) for text in (
    "0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "10.2.0.0/16", "2001:db8::/32", "2001:db8::1/128",
)]  # fmt: skip
SOURCES = ["10.1.1.1", "10.1.1.2", "10.1.2.1", "10.2.0.1", "10.3.0.1", "192.0.2.1", "2001:db8::1", "2001:db8::2", "2001:db9::1"]

POLICIES = st.sets(st.sampled_from(PREFIXES)).map(lambda prefixes: Policy(entry(str(prefix)) for prefix in prefixes))


def packet(source, at, packets=1):
    """A row of one source, for packets that came at one time."""
    family = Family.IPV6 if ":" in source else Family.IPV4
    row = np.zeros(1, ROW)
    row["family"], row["source"] = family, np.frombuffer(Prefix.parse(source).address.ljust(16, b"\0"), "u1")
    row["packets"], row["bytes"], row["first_seen"], row["last_seen"] = packets, packets * BYTES, at, at
    return row


def prefixes_of(policy):
    return {each.prefix for each in policy.entries()}


def deciding(policy, source):
    address = Prefix.parse(source)
    found = policy.match(address.family, address.address)
    return found.prefix if found else None


@given(
    policies=st.lists(POLICIES, min_size=1, max_size=4),
    sent=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(SOURCES)), max_size=30),
    known=st.sets(st.sampled_from(SOURCES)),
    bulk=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_counts_are_lower_bounds_and_exact_unless_partial(policies, sent, known, bulk):
    """Packets of the n-th time meet the n-th policy. `known` sources were there before the window."""
    truth = Counter()
    parts = [packet(SOURCES[0], 0.0)[:0]]
    for number, source in sorted(sent):
        number = min(number, len(policies) - 1)
        truth[deciding(policies[number], source)] += 1
        parts.append(packet(source, 0.0 if source in known else 10.0 * number + 5))
    changes = []
    for number, (before, after) in enumerate(itertools.pairwise(policies), 1):
        touched = None if bulk[number - 1] else sorted(prefixes_of(before) ^ prefixes_of(after))
        changes.append(Change(10.0 * number, touched, before if touched is None else None))
    found = attribute(merge(*parts), policies[-1], changes)
    assert not found.all_partial
    for prefix in prefixes_of(policies[-1]):
        count = found.counts.get(prefix, Count())
        assert count.bytes == count.packets * BYTES
        assert count.packets <= truth[prefix]
        assert count.packets == truth[prefix] or prefix in found.partial, prefix
    if len({frozenset(prefixes_of(policy)) for policy in policies}) == 1:
        assert not found.partial


def test_a_change_elsewhere_makes_nothing_partial():
    before = Policy([entry("10.0.0.0/8"), entry("10.1.0.0/16"), entry("192.0.2.0/24")])
    after = before.with_changes([entry("10.1.1.0/24")])
    rows = merge(packet("10.1.1.1", 1.0), packet("10.1.2.1", 1.0), packet("10.2.0.1", 1.0), packet("192.0.2.1", 1.0))
    for change in (Change(2.0, [Prefix.parse("10.1.1.0/24")]), Change(2.0, None, before)):
        found = attribute(rows, after, [change])
        assert found.partial == {Prefix.parse("10.1.1.0/24"), Prefix.parse("10.1.0.0/16")}
        assert {str(prefix): count.packets for prefix, count in found.counts.items()} == {
            "10.1.0.0/16": 1, "10.0.0.0/8": 1, "192.0.2.0/24": 1,
        }  # fmt: skip


def test_another_verdict_for_the_same_prefix_as_part_of_a_new_list_moves_nothing():
    before, after = (Policy([entry("10.0.0.0/8", verdict)]) for verdict in (Verdict.ALLOW, Verdict.DENY))
    found = attribute(packet("10.1.1.1", 1.0), after, [Change(2.0, None, before)])
    assert not found.partial and found.counts == {Prefix.parse("10.0.0.0/8"): Count(1, BYTES)}


def test_what_held_before_is_not_known():
    policy = Policy([entry("10.0.0.0/8")])
    assert attribute(packet("10.1.1.1", 1.0), policy, [Change(2.0)]).all_partial
    found = attribute(packet("10.1.1.1", 3.0), policy, [Change(2.0)])
    assert not found.all_partial and found.counts == {Prefix.parse("10.0.0.0/8"): Count(1, BYTES)}


def test_many_rows():
    many = np.repeat(packet("10.0.0.0", 1.0, 3), 3 * CHUNK // 2)
    many["source"][:, 1:4] = np.arange(len(many), dtype=">u4").view("u1").reshape(-1, 4)[:, 1:]
    found = attribute(many, Policy([entry("10.0.0.0/8"), entry("10.1.0.0/16")]))
    assert found.counts == {Prefix.parse("10.0.0.0/8"): Count(len(many) * 3, len(many) * 3 * BYTES)}
    found = attribute(many, Policy([entry("10.0.0.0/8"), entry("10.0.128.0/17")]))
    assert {str(prefix): count.packets for prefix, count in found.counts.items()} == {
        "10.0.0.0/8": 3 * 32768, "10.0.128.0/17": 3 * (len(many) - 32768),
    }  # fmt: skip


def test_digests():
    one, other = Policy([entry("10.0.0.0/8")]), Policy([entry("10.0.0.0/9")])
    assert digest(one) == digest(Policy([entry("10.0.0.0/8", Verdict.ALLOW)])) != digest(other)
    changed = one.with_changes([entry("10.1.1.1/32")])
    assert digest(one) != digest(changed)
    assert digest(one) == digest(changed.with_changes(remove=[(Prefix.parse("10.1.1.1/32"), Origin.OPERATOR)]))
    assert len({digest(policy) for policy in (Policy(), one, other, Policy([entry("2001:db8::/32")]))}) == 4


# The book over windows, in memory that outlives it


class World:
    """A map of rule counters, as a file in memory, and the books that processes open on it one after the other."""

    def __init__(self, *texts, cells=1024):
        self.fd = os.memfd_create("rules")
        os.ftruncate(self.fd, 1 << 20)
        self.cells = cells
        self.ledger = np.zeros(1, abi.LEDGER)[0]
        self.window = 0
        self.policy = Policy(entry(text) for text in texts)
        self.start(first=True)

    def start(self, *, first=False, lost=0):
        self.table = RuleCountTable(self.fd, self.cells, self.ledger)
        self.book = RuleBook(self.table, first=first, lost=lost)
        self.apply(self.policy)

    def apply(self, policy, *touched):
        self.book.changing()
        self.policy = policy
        self.book.changed(policy, [Prefix.parse(text) for text in touched] or None)

    def add(self, *texts):
        self.apply(self.policy.with_changes([entry(text) for text in texts]), *texts)

    def remove(self, text):
        prefix = Prefix.parse(text)
        self.apply(self.policy.with_changes(remove=[(prefix, self.policy.at(prefix)[0].origin)]), text)

    def close(self, *rows, lost=0, lost_before=None, began=None):
        self.window += 1
        self.book.begin(self.window)
        began = time.monotonic() if began is None else began
        self.book.close(merge(packet("10.0.0.0", 0)[:0], *rows), began, lost=lost, lost_before=lost if lost_before is None else lost_before)

    def counts(self, *rows, lost=0):
        found = self.book.counts(merge(packet("10.0.0.0", 0)[:0], *rows), lost)
        return {str(each.prefix): (found.get(each.prefix).packets, found.get(each.prefix).partial) for each in self.policy.entries()}


@pytest.fixture
def world():
    made = World("10.0.0.0/8", "10.1.0.0/16", "192.0.2.1/32")
    yield made
    os.close(made.fd)


def test_a_change_that_was_refused_leaves_the_book_as_it_was(world):
    """A process that comes after it knows whose the talkers are that it finds."""
    held = int(world.table.digest)
    assert held
    world.book.changing()
    assert world.table.digest == 0
    world.book.unchanged()
    assert int(world.table.digest) == held


def just_now():
    return time.time() + 1


def test_windows_add_up_and_the_running_one_is_shown_with_them(world):
    assert world.counts() == {"10.0.0.0/8": (0, False), "10.1.0.0/16": (0, False), "192.0.2.1/32": (0, False)}
    world.close(packet("10.2.0.1", 1.0, 5), packet("10.1.0.1", 1.0, 2))
    world.close(packet("10.2.0.1", 1.0, 3), packet("8.8.8.8", 1.0, 100))
    expected = {"10.0.0.0/8": (8, False), "10.1.0.0/16": (2, False), "192.0.2.1/32": (0, False)}
    assert world.counts() == expected
    assert world.counts(packet("192.0.2.1", 1.0, 4)) == expected | {"192.0.2.1/32": (4, False)}
    assert world.counts() == expected  # a question adds nothing
    assert not world.ledger["attributing"]


def test_what_was_decided_is_summed_by_verdict_and_origin_and_never_falls(world):
    denied = world.policy.at(Prefix.parse("10.0.0.0/8"))[0]
    world.close(packet("10.2.0.1", 1.0, 5), packet("192.0.2.1", 1.0, 2), packet("8.8.8.8", 1.0, 100))
    world.apply(world.policy.with_changes([entry("172.16.0.0/12", Verdict.ALLOW, Origin.AUTOMATIC)]), "172.16.0.0/12")
    world.close(packet("172.16.0.1", just_now(), 3))
    expected = {(denied.verdict, denied.origin): Count(7, 7 * BYTES), (Verdict.ALLOW, Origin.AUTOMATIC): Count(3, 3 * BYTES)}
    assert world.book.decided == expected
    world.remove("10.0.0.0/8")
    world.close()
    assert world.book.decided == expected


def test_a_restart_with_the_same_policy_is_not_seen(world):
    world.close(packet("10.2.0.1", 1.0, 5))
    world.start()
    world.close(packet("10.2.0.1", 1.0, 3))
    assert world.counts() == {"10.0.0.0/8": (8, False), "10.1.0.0/16": (0, False), "192.0.2.1/32": (0, False)}


def test_a_restart_in_the_window_of_a_change_costs_no_count_of_what_came_after_it(world):
    world.add("172.16.0.0/12")
    later = just_now()
    world.start()
    world.start()
    row = packet("172.16.0.1", later, 7)
    assert world.counts(row)["172.16.0.0/12"][0] == 7
    world.close(row)
    world.close(packet("172.16.0.1", 1.0, 2))
    assert world.counts()["172.16.0.0/12"][0] == 9


def test_the_digest_follows_each_change(world):
    for change in (lambda: world.add("172.16.0.0/12", "2001:db8::/32"), lambda: world.add("2001:db8::/32", "10.9.0.0/16"),
                   lambda: world.remove("172.16.0.0/12"), lambda: world.apply(Policy([entry("10.0.0.0/9")]))):  # fmt: skip
        change()
        assert world.table.digest == digest(world.policy)


def test_a_restart_with_another_policy_leaves_lower_bounds(world):
    world.close(packet("10.2.0.1", 1.0, 5))
    world.policy = Policy([*world.policy.entries(), entry("172.16.0.0/12")])
    world.start()
    assert world.counts()["10.0.0.0/8"] == (5, False)
    world.close(packet("10.2.0.1", 1.0, 3))
    assert world.counts()["10.0.0.0/8"] == (5, True)
    world.start()
    world.close(packet("10.2.0.1", 1.0, 3))
    assert world.counts()["10.0.0.0/8"] == (8, True)


def test_a_window_that_waited_to_be_read_is_not_the_only_one_with_two_policies(world):
    ended = time.monotonic()  # and then the process died
    world.policy = Policy([*world.policy.entries(), entry("172.16.0.0/12")])
    world.start()
    world.close(began=ended)
    world.close(packet("172.16.0.1", 1.0, 3))
    assert world.counts()["172.16.0.0/12"] == (0, True)


def test_a_store_of_another_size_begins_anew_but_not_the_window(world):
    world.close(packet("10.2.0.1", 1.0, 5))
    os.ftruncate(world.fd, 0)
    os.ftruncate(world.fd, 1 << 20)
    world.start(lost=7)
    assert world.counts(lost=7)["10.0.0.0/8"] == (0, False)
    world.close(packet("10.2.0.1", 1.0, 5), packet("10.1.0.1", just_now(), 2), lost=7)  # what the first one met is not known
    assert world.counts(lost=7) == {"10.0.0.0/8": (0, True), "10.1.0.0/16": (2, True), "192.0.2.1/32": (0, True)}


def test_a_restart_after_a_change_in_the_same_window_leaves_lower_bounds(world):
    world.close()
    world.add("10.3.0.0/16")
    world.start()
    world.close(packet("10.3.0.1", 1.0, 3))
    assert world.counts()["10.3.0.0/16"] == (0, True)
    world.close(packet("10.3.0.1", 1.0, 4))
    assert world.counts()["10.3.0.0/16"] == (4, True)


def test_a_crash_while_counts_are_added_leaves_lower_bounds(world):
    world.close(packet("10.2.0.1", 1.0, 5))
    world.book.begin(2)
    world.start()
    assert world.counts() == {"10.0.0.0/8": (5, True), "10.1.0.0/16": (0, True), "192.0.2.1/32": (0, True)}
    assert not world.ledger["attributing"]


def test_a_new_rule_is_exact_for_sources_that_come_after_it(world):
    world.add("198.51.100.0/24")
    world.close(packet("198.51.100.1", just_now(), 7))
    assert world.counts()["198.51.100.0/24"] == (7, False)
    world.add("203.0.113.0/24")
    world.close(packet("203.0.113.1", 1.0, 7))  # it was there before the rule
    assert world.counts()["203.0.113.0/24"] == (0, True)
    assert world.counts()["198.51.100.0/24"] == (7, False)


def test_evicted_talkers_make_all_rules_partial_but_not_those_that_come_later(world):
    world.close(packet("10.2.0.1", 1.0, 5), lost=3, lost_before=2)
    assert world.counts(lost=3) == {"10.0.0.0/8": (5, True), "10.1.0.0/16": (0, True), "192.0.2.1/32": (0, True)}
    world.close(lost=3)  # the third was lost in this window
    world.add("198.51.100.0/24")
    world.close(packet("198.51.100.1", just_now(), 7), packet("10.1.0.1", 1.0), lost=3)
    assert world.counts(lost=3) == {
        "10.0.0.0/8": (5, True), "10.1.0.0/16": (1, True), "192.0.2.1/32": (0, True), "198.51.100.0/24": (7, False),
    }  # fmt: skip


def test_what_is_lost_in_the_running_window_is_known_after_a_restart(world):
    world.table.lost = 3
    world.start()
    assert world.counts(lost=3)["10.0.0.0/8"] == (0, False)
    assert world.counts(lost=4)["10.0.0.0/8"] == (0, True)
    world.close(lost=4)
    assert world.counts(lost=4)["10.0.0.0/8"] == (0, True)


def test_when_all_counters_are_taken_the_others_are_partial_without_numbers():
    world = World("10.0.0.0/8", "10.1.0.0/16", "192.0.2.1/32", cells=3)
    world.close(packet("10.2.0.1", 1.0), packet("10.1.0.1", 1.0, 2))
    assert world.counts() == {"10.0.0.0/8": (1, False), "10.1.0.0/16": (2, False), "192.0.2.1/32": (0, False)}
    world.close(packet("192.0.2.1", 1.0, 3), packet("10.1.0.1", 1.0, 2))
    assert world.counts() == {"10.0.0.0/8": (1, False), "10.1.0.0/16": (4, False), "192.0.2.1/32": (0, True)}
    # A rule that leaves makes room, from the next window on.
    world.remove("10.0.0.0/8")
    world.close()
    world.close(packet("192.0.2.1", 1.0, 3))
    assert world.counts() == {"10.1.0.0/16": (4, False), "192.0.2.1/32": (3, True)}
    os.close(world.fd)


def test_a_rule_that_comes_again_begins_anew(world):
    world.close(packet("192.0.2.1", 1.0, 3))
    world.remove("192.0.2.1/32")
    world.close()
    world.add("192.0.2.1/32")
    assert world.counts()["192.0.2.1/32"] == (0, False)
    world.apply(Policy([entry("2001:db8::/32")]))  # as a whole
    world.close()
    world.start()
    assert world.table.prefixes() == []


def test_both_families_are_found_again_after_a_restart(world):
    world.add("2001:db8::/32", "2001:db8::1/128")
    world.close(packet("2001:db8::1", just_now(), 3), packet("2001:db8::2", just_now(), 2))
    world.start()
    assert world.counts()["2001:db8::/32"] == (2, False) and world.counts()["2001:db8::1/128"] == (3, False)


def test_every_counter_survives_and_is_bound_to_its_prefix(world):
    world.close(packet("10.2.0.1", 1.0, 5), packet("10.1.0.1", 1.0, 2))
    before = world.table.counts()
    assert RuleCountTable(world.fd, world.cells, world.ledger).counts() == before
    assert before.get(Prefix.parse("10.1.0.0/16")) == RuleCount(2, 2 * BYTES, False)
