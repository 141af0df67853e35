"""Events in bulk become the same values, and find their rule in the policy of their time, or say that it is gone."""

import numpy as np
import pytest
from eventfakes import EPOCH, DictPolicy, batch, numbered

from xdpmond.messages import event_fields
from xdpmond.model import Family, Outcome, PacketEvent, Verdict

DENIED = DictPolicy({"203.0.113.0/24": Verdict.DENY, "203.0.113.8/32": Verdict.ALLOW, "2001:db8::/32": Verdict.DENY})


def rules(*outcomes_and_sources, policy=DENIED):
    made = batch(*({"outcome": outcome, "src": source} for outcome, source in outcomes_and_sources), policy=policy)
    which, names = made.rules()
    assert [event.rule for event in made.values()] == [names[index] for index in which]
    return [names[index] for index in which]


def test_an_event_as_a_value():
    fields = {"timestamp": 1_250_999, "vlan": 7, "slot": 3, "suppressed": 2**32 - 1, "flow_hash": 2**32 - 2, "packet_size": 65549,
              "outcome": Outcome.DENIED_DROPPED}  # fmt: skip
    assert batch(fields, policy=DENIED).values() == [
        PacketEvent(
            timestamp=EPOCH / 1e9 + 0.00125, interface="eth3", vlan=7, family=Family.IPV4, src_ip="203.0.113.9", dst_ip="192.0.2.1",
            src_port=40312, dst_port=22, protocol_num=6, packet_size=65549, outcome=Outcome.DENIED_DROPPED, rule="203.0.113.0/24",
            suppressed=2**32 - 1, flow_hash=2**32 - 2,
        )
    ]  # fmt: skip


def test_what_is_unknown_is_none():
    (event,) = batch({"src": "2001:db8::1", "dst": "2001:db8::2", "has_ports": 0, "protocol": 58}).values()
    assert (event.family, event.src_ip, event.dst_ip) == (Family.IPV6, "2001:db8::1", "2001:db8::2")
    assert (event.vlan, event.src_port, event.dst_port) == (None, None, None)
    assert event_fields(event)["rule"] == "default"


def test_the_longest_prefix_is_the_rule():
    assert rules(
        (Outcome.DENIED_PASSED, "203.0.113.9"), (Outcome.DEFAULT_LOGGED, "198.51.100.1"), (Outcome.DENIED_DROPPED, "2001:db8:1::1"),
        (Outcome.ALLOWED, "203.0.113.8"), (Outcome.DENIED_DROPPED, "203.0.113.10"), (Outcome.ESSENTIAL_PASSED, "203.0.113.10"),
        (Outcome.ESSENTIAL_PASSED, "198.51.100.1"),
    ) == ["203.0.113.0/24", "default", "2001:db8::/32", "203.0.113.8/32", "203.0.113.0/24", "203.0.113.0/24", "default"]  # fmt: skip


@pytest.mark.parametrize(
    "outcome, source, rule",
    [
        (Outcome.DENIED_DROPPED, "198.51.100.1", "removed"),  # no entry covers it any more
        (Outcome.DENIED_DROPPED, "203.0.113.8", "removed"),  # the one that does now allows
        (Outcome.ALLOWED, "203.0.113.9", "removed"),
        (Outcome.DEFAULT_LOGGED, "203.0.113.9", "default"),  # an entry that came later did not decide
    ],
)
def test_a_policy_that_has_changed_meanwhile_is_not_made_up(outcome, source, rule):
    assert rules((outcome, source)) == [rule]


def test_only_events_that_an_entry_decided_are_looked_up_and_once():
    policy = DictPolicy({"203.0.113.0/24": Verdict.DENY})
    made = batch({}, {"outcome": Outcome.DENIED_PASSED}, {}, policy=policy)
    made.rules()
    made.values()
    made[1:].values()
    assert policy.asked == 1


def test_parts_and_copies():
    whole = numbered(*range(10))
    part = whole[3:6]
    assert [event.flow_hash for event in part.values()] == [3, 4, 5]
    copy = whole[-4:].copy()
    assert not np.shares_memory(copy.rows, whole.rows)
    assert [event.flow_hash for event in copy.values()] == [6, 7, 8, 9]
    assert len(whole[:0].values()) == 0
    which, names = whole[:0].rules()
    assert (len(which), names[0]) == (0, "default")
