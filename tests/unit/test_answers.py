"""A list of a million entries is written by frames that many of them share; it must read as if each was written by itself."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xdpmond import answers, documents
from xdpmond.model import Entry, Family, Origin, Prefix, RuleCount, RuleCounts, Verdict
from xdpmond.policy import Policy
from xdpmond.prefixes import Bulk, PrefixSet

PREFIXES = [Prefix.parse(text) for text in ("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/9", "10.1.2.3", "::/0", "2001:db8::/32", "2001:db8::1")]
TEXTS = st.sampled_from(["", "why", 'a "quoted" \\ one', "\0", "\\u0000", "ü\u2028"])
TIMES = st.sampled_from([0.0, 1.5, 1e9])
VERDICTS = st.sampled_from([Verdict.ALLOW, Verdict.DENY])
ENTRIES = st.lists(st.builds(Entry, st.sampled_from(PREFIXES), VERDICTS, st.sampled_from(Origin), TIMES, st.none() | TIMES, TEXTS, TEXTS))
COUNTS = st.builds(RuleCount, st.integers(0, 9), st.integers(0, 99), st.booleans())


def lists(prefixes, verdict, file):
    columns = PrefixSet.of(prefixes).columns
    lines = {key: np.arange(7, 7 + len(of), dtype="u4") for key, of in columns.items()}
    return [Bulk(PrefixSet(columns, lines), verdict, Origin.CONFIGURATION, source=file)]


LISTS = st.builds(lists, st.lists(st.sampled_from(PREFIXES)), VERDICTS, st.sampled_from(["/etc/list", '/etc/"\0ü:1', "/\\u0000"]))


@given(ENTRIES, LISTS, st.dictionaries(st.sampled_from(PREFIXES), COUNTS, max_size=3), COUNTS)
def test_a_listed_entry_reads_as_if_it_was_written_alone(entries, lists, counts, others):
    policy = Policy(entries).with_configuration([], lists)
    counts = RuleCounts(counts, others)
    alone = [documents.entry(entry, effective, counts.get(entry.prefix)) for entry, effective in policy.shown()]
    assert [json.loads(line) for line in answers.entries(policy, counts)] == json.loads(json.dumps(alone))


def test_more_kinds_of_entries_than_are_remembered(monkeypatch):
    monkeypatch.setattr(answers, "_MOST_FRAMES", 3)
    many = [Prefix(Family.IPV4, number.to_bytes(4, "big"), 32) for number in range(50)]
    policy = Policy(Entry(prefix, Verdict.DENY, Origin.OPERATOR, reason=str(number % 7)) for number, prefix in enumerate(many))
    found = [json.loads(line) for line in answers.entries(policy, RuleCounts({}))]
    assert [(each["prefix"], each["reason"]) for each in found] == [(str(prefix), str(n % 7)) for n, prefix in enumerate(many)]
    assert all("\n" not in line for line in answers.entries(policy, RuleCounts({})))
