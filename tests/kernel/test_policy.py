"""The policy tries against Python's ipaddress: random policies and random changes to them, adoption, counters, and a switch under fire."""

from __future__ import annotations

import errno
import ipaddress
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from xdpmond.errors import KernelError
from xdpmond.kernel import abi, libbpf, rules
from xdpmond.kernel.maps import wait_for_packets_under_way
from xdpmond.kernel.rules import RuleTries
from xdpmond.model import Family, Outcome, Prefix, Verdict

from .harness import EXAMPLES, ROUNDS, Guns, Harness
from .packets import MAC

TABLES = {"prefixes": 2048, "rule_cells": 1024}
SETTINGS = settings(max_examples=EXAMPLES, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
OUTCOMES = {Verdict.ALLOW: Outcome.ALLOWED, Verdict.DENY: Outcome.DENIED_DROPPED, None: Outcome.DEFAULT_LOGGED}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def frame_from(address: Address) -> bytes:
    network = IP(src=str(address), dst="192.0.2.1") if address.version == 4 else IPv6(src=str(address), dst="2001:db8::1")
    return bytes(Ether(**MAC) / network / UDP(sport=1, dport=9))


TEMPLATES = {version: bytearray(frame_from(ipaddress.ip_address(zero))) for version, zero in ((4, "0.0.0.0"), (6, "::"))}


def quick_frame(address: Address) -> bytes:
    """Without scapy's half millisecond. The packet path looks at no checksum."""
    frame = TEMPLATES[address.version].copy()
    at = 26 if address.version == 4 else 22
    frame[at : at + len(address.packed)] = address.packed
    return bytes(frame)


def expected(policy: dict[Prefix, Verdict], address: Address) -> Verdict | None:
    """By Python's own library."""
    best: tuple[int, Verdict] | None = None
    for prefix, verdict in policy.items():
        network = ipaddress.ip_network(str(prefix))
        if address in network and (best is None or network.prefixlen > best[0]):
            best = network.prefixlen, verdict
    return best[1] if best else None


@st.composite
def networks(draw: st.DrawFn) -> Prefix:
    """Few distinct leading bits, so that prefixes lie within and beside each other; every length."""
    family = draw(st.sampled_from([Family.IPV4, Family.IPV6]))
    length = draw(st.one_of(st.integers(0, family.bits), st.sampled_from([0, 1, 7, 8, 9, 16, 24, family.bits - 1, family.bits])))
    number = draw(st.sampled_from([0x0A, 0x0B, 0xC0, 0xFD, 0x20, 0xFF])) << (family.bits - 8)
    number |= draw(st.one_of(st.just(0), st.integers(0, (1 << (family.bits - 8)) - 1), st.just((1 << (family.bits - 8)) - 1)))
    number &= ~((1 << (family.bits - length)) - 1)
    return Prefix(family, number.to_bytes(family.bits // 8, "big"), length)


VERDICTS = st.sampled_from([Verdict.ALLOW, Verdict.DENY])
POLICIES = st.dictionaries(networks(), VERDICTS, max_size=20)


def neighbours(prefixes: Iterable[Prefix], source: random.Random) -> list[Address]:
    """Addresses at both edges of each prefix, just beside them, and one within."""
    found: list[Address] = []
    for prefix in prefixes:
        network = ipaddress.ip_network(str(prefix))
        first, last = int(network.network_address), int(network.broadcast_address)
        kind = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
        numbers = {first - 1, first, source.randint(first, last), last, last + 1}
        found += [kind(number) for number in sorted(numbers) if 0 <= number < 1 << network.max_prefixlen]
    return found


def check_lookups(datapath: Harness, policy: dict[Prefix, Verdict], addresses: Sequence[Address]) -> None:
    """One packet from each address, and the events they make."""
    datapath.drain()
    for address in addresses:
        verdict = expected(policy, address)
        action = datapath.send(quick_frame(address))
        assert (action == libbpf.XDP_DROP) == (verdict is Verdict.DENY), f"{address}: {verdict}"
        events = [(event["outcome"], event["rule"]) for event in datapath.drain()]
        if verdict is Verdict.ALLOW:
            assert events == []
        else:
            ((outcome, rule),) = events
            assert outcome == OUTCOMES[verdict]
            prefix = datapath.rules.prefix_of(int(rule))
            if verdict is None:
                assert rule == abi.RULE_DEFAULT
            else:
                assert prefix is not None and address in ipaddress.ip_network(str(prefix)) and policy[prefix] is Verdict.DENY


def tries_of(datapath: Harness) -> list[dict[Prefix, tuple[int, Verdict]]]:
    return [rules._read(datapath.loaded.maps[name]) for name in ("policy_0", "policy_1")]


def check_tries(datapath: Harness, tries: RuleTries, policy: dict[Prefix, Verdict]) -> None:
    """Both hold the policy, with one index for each prefix and no index twice."""
    assert tries.current() == policy
    assert len(tries) == len(policy)
    first, second = tries_of(datapath)
    assert first == second
    assert {prefix: verdict for prefix, (_, verdict) in first.items()} == policy
    indexes = [index for index, _ in first.values()]
    assert len(set(indexes)) == len(indexes) and abi.RULE_DEFAULT not in indexes
    assert all(tries.index_of(prefix) == index and tries.prefix_of(index) == prefix for prefix, (index, _) in first.items())


@pytest.fixture
def enforcing(datapath: Harness, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """One thread alone: nobody to wait for."""
    datapath.enforce()
    monkeypatch.setattr(datapath.rules, "_grace", lambda: None)
    return datapath


@SETTINGS
@given(policy=POLICIES, seed=st.integers(0, 1 << 32))
def test_longest_prefix(enforcing: Harness, policy: dict[Prefix, Verdict], seed: int) -> None:
    enforcing.rules.apply(policy, enforcing.rules.current().keys() - policy.keys())
    check_tries(enforcing, enforcing.rules, policy)
    check_lookups(
        enforcing, policy, [*neighbours(policy, random.Random(seed)), ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd00::1")]
    )


@SETTINGS
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_incremental_changes_and_adoption(enforcing: Harness, data: st.DataObject, seed: int) -> None:
    source = random.Random(seed)
    enforcing.rules.apply({}, list(enforcing.rules.current()))
    policy: dict[Prefix, Verdict] = {}
    tries = enforcing.rules
    for _ in range(data.draw(st.integers(1, 5))):
        removed = data.draw(st.sets(st.sampled_from(sorted(policy)), max_size=6)) if policy else set()
        added = data.draw(st.dictionaries(networks(), VERDICTS, max_size=6))
        again = data.draw(st.dictionaries(st.sampled_from(sorted(policy)), VERDICTS, max_size=3)) if policy else {}
        changed = {prefix: verdict for prefix, verdict in (added | again).items() if prefix not in removed}
        stranger = data.draw(networks())
        before = {prefix: tries.index_of(prefix) for prefix in policy}
        tries.apply(changed, removed | ({stranger} - policy.keys() - changed.keys()))
        policy = {prefix: verdict for prefix, verdict in policy.items() if prefix not in removed} | changed
        assert all(tries.index_of(prefix) == index for prefix, index in before.items() if prefix in policy), "a prefix keeps its index"
        check_tries(enforcing, tries, policy)
        if data.draw(st.booleans()):
            # The daemon starts anew on these maps.
            tries = enforcing.rules = enforcing.new_rules()
            tries.adopt()
            tries._grace = lambda: None
            check_tries(enforcing, tries, policy)
        check_lookups(enforcing, policy, neighbours(source.sample(sorted(policy), min(len(policy), 6)), source))


def test_adoption_of_a_half_made_change(datapath: Harness) -> None:
    """The daemon died between the two tries: what packets see counts, the other is made equal to it."""
    datapath.policy(allow=["10.0.0.0/8"], deny=["10.1.0.0/16"])
    policy = datapath.rules.current()
    resting = (datapath.loaded.maps["policy_0"], datapath.loaded.maps["policy_1"])[1 - datapath.control.policy_copy]
    extra = {Prefix.parse("10.2.0.0/16"): Verdict.DENY, Prefix.parse("fd00::/8"): Verdict.ALLOW}
    rules_value = np.zeros(2, abi.RULE)
    rules_value["index"], rules_value["verdict"] = [7, 8], [abi.VERDICT_DENY, abi.VERDICT_ALLOW]
    libbpf.update_batch(resting, rules._keys(list(extra)), rules_value)
    libbpf.delete(resting, rules._keys([Prefix.parse("10.1.0.0/16")]))
    datapath.rules = datapath.new_rules()
    datapath.rules.adopt()
    check_tries(datapath, datapath.rules, policy)
    datapath.policy(deny=["10.2.0.0/16"])
    check_tries(datapath, datapath.rules, {Prefix.parse("10.2.0.0/16"): Verdict.DENY})


def test_a_policy_too_large_changes_nothing(datapath: Harness) -> None:
    datapath.policy(allow=["10.0.0.0/8"], deny=["10.1.0.0/16", "fd00::/8"])
    datapath.enforce()
    policy = datapath.rules.current()
    many = {Prefix.parse(f"11.{number >> 8}.{number & 255}.0/24"): Verdict.DENY for number in range(TABLES["prefixes"])}
    many[Prefix.parse("10.0.0.0/8")] = Verdict.DENY
    with pytest.raises(KernelError):
        datapath.rules.apply(many, [Prefix.parse("10.1.0.0/16")])
    check_tries(datapath, datapath.rules, policy)
    check_lookups(datapath, policy, [ipaddress.ip_address(text) for text in ("10.9.9.9", "10.1.1.1", "11.0.0.1", "fd00::1")])
    # The room is there again, and a change works as before.
    del many[Prefix.parse("10.0.0.0/8")], many[Prefix.parse("11.0.0.0/24")]
    datapath.rules.apply(dict(list(many.items())[: TABLES["prefixes"] - 3]), [])
    assert len(datapath.rules) == TABLES["prefixes"]


@pytest.mark.parametrize("failing", [1, 2])
def test_memory_runs_out_in_the_middle(datapath: Harness, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Before the switch nothing has changed; behind it the change is in force, and the copy left behind is mended before it is used."""
    datapath.policy(allow=["10.0.0.0/8"], deny=["10.1.0.0/16"])
    old = datapath.rules.current()
    new = {Prefix.parse("10.0.0.0/8"): Verdict.DENY, Prefix.parse("12.0.0.0/8"): Verdict.ALLOW}
    real, calls = libbpf.update_batch, 0

    def update_batch(map_fd: int, keys: np.ndarray, values: np.ndarray) -> None:
        nonlocal calls
        if map_fd in (datapath.loaded.maps["policy_0"], datapath.loaded.maps["policy_1"]):
            calls += 1
            if calls == failing:
                real(map_fd, keys[:1], values[:1])
                raise libbpf.kernel_error(errno.ENOMEM, "write")
        real(map_fd, keys, values)

    monkeypatch.setattr(libbpf, "update_batch", update_batch)
    if failing == 1:
        with pytest.raises(KernelError):
            datapath.rules.apply(new, [Prefix.parse("10.1.0.0/16")])
        check_tries(datapath, datapath.rules, old)
    else:
        datapath.rules.apply(new, [Prefix.parse("10.1.0.0/16")])
        assert datapath.rules.current() == new
        first, second = tries_of(datapath)
        assert first != second, "the second write was not tried"
    datapath.enforce()
    current = datapath.rules.current()
    check_lookups(datapath, current, [ipaddress.ip_address(text) for text in ("10.9.9.9", "10.1.1.1", "12.0.0.1")])
    last = Prefix.parse("13.0.0.0/8")
    datapath.rules.apply({last: Verdict.DENY}, [])
    check_tries(datapath, datapath.rules, current | {last: Verdict.DENY})


def test_counters_of_a_rule_that_went_with_the_daemon(datapath: Harness) -> None:
    """It died between taking the rule away and clearing its counters: the next that gets the index begins at nothing."""
    prefix = Prefix.parse("10.0.0.0/8")
    datapath.policy(deny=[str(prefix)])
    index = datapath.rules.index_of(prefix)
    assert index is not None
    datapath.send(quick_frame(ipaddress.ip_address("10.0.0.1")))
    for name in ("policy_0", "policy_1"):
        libbpf.delete(datapath.loaded.maps[name], rules._keys([prefix]))
    datapath.rules = datapath.new_rules()
    datapath.rules.adopt()
    other = Prefix.parse("11.0.0.0/8")
    datapath.rules.apply({other: Verdict.DENY}, [])
    assert datapath.rules.index_of(other) == index
    assert datapath.counters.rules()[index].tolist() == [0, 0]


def test_a_full_policy_can_be_exchanged(datapath: Harness) -> None:
    """What goes makes room for what comes, in one change."""
    size = TABLES["prefixes"]
    first = {Prefix.parse(f"11.{number >> 8}.{number & 255}.0/24"): Verdict.DENY for number in range(size)}
    second = {Prefix.parse(f"12.{number >> 8}.{number & 255}.0/24"): Verdict.ALLOW for number in range(size)}
    datapath.rules.apply(first, datapath.rules.current().keys() - first.keys())
    datapath.rules.apply(second, first)
    check_tries(datapath, datapath.rules, second)


def test_counters_of_rules_are_exact(datapath: Harness) -> None:
    datapath.policy(allow=["10.0.0.0/8"], deny=["10.1.0.0/16", "2001:db8::/32"])
    default = datapath.counters.rules()[abi.RULE_DEFAULT].copy()
    sent = {"10.2.0.1": 3, "10.1.0.1": 5, "2001:db8::1": 7, "198.51.100.1": 2}
    for address, count in sent.items():
        for _ in range(count):
            datapath.send(quick_frame(ipaddress.ip_address(address)))
    counted = datapath.counters.rules()
    size4, size6 = len(TEMPLATES[4]), len(TEMPLATES[6])

    def of(prefix: str) -> list[int]:
        index = datapath.rules.index_of(Prefix.parse(prefix))
        assert index is not None
        return counted[index].tolist()

    assert of("10.0.0.0/8") == [3, 3 * size4]
    assert of("10.1.0.0/16") == [5, 5 * size4]
    assert of("2001:db8::/32") == [7, 7 * size6]
    assert (counted[abi.RULE_DEFAULT] - default).tolist() == [2, 2 * size4]


def test_a_prefix_keeps_its_counters_until_it_goes(datapath: Harness) -> None:
    prefix, other = Prefix.parse("10.0.0.0/8"), Prefix.parse("11.0.0.0/8")
    datapath.policy(allow=[str(prefix)])
    index = datapath.rules.index_of(prefix)
    assert index is not None
    frame = quick_frame(ipaddress.ip_address("10.0.0.1"))
    datapath.send(frame)
    datapath.rules.apply({prefix: Verdict.DENY}, [])
    datapath.send(frame)
    assert datapath.rules.index_of(prefix) == index
    assert datapath.counters.rules()[index][0] == 2
    datapath.rules.apply({other: Verdict.DENY}, [])
    datapath.rules.apply({}, [prefix])
    assert datapath.rules.index_of(prefix) is None and datapath.rules.prefix_of(index) is None
    assert datapath.counters.rules()[index].tolist() == [0, 0]
    datapath.rules.apply({Prefix.parse("12.0.0.0/8"): Verdict.DENY}, [])
    assert datapath.rules.index_of(Prefix.parse("12.0.0.0/8")) == index, "an index that is free is given out again"
    datapath.send(quick_frame(ipaddress.ip_address("12.0.0.1")))
    assert datapath.counters.rules()[index][0] == 1


def test_counters_go_to_those_that_come_after_a_large_policy(datapath: Harness) -> None:
    """The lowest free index is given out first: else a small policy would have no counters once a large one had gone."""
    many = {Prefix.parse(f"11.{number >> 8}.{number & 255}.0/24"): Verdict.DENY for number in range(TABLES["prefixes"])}
    datapath.rules.apply(many, datapath.rules.current().keys() - many.keys())
    datapath.rules.apply({}, many)
    few = {Prefix.parse(f"12.0.{number}.0/24"): Verdict.DENY for number in range(10)}
    datapath.rules.apply(few, [])
    assert sorted(datapath.rules.index_of(prefix) or 0 for prefix in few) == list(range(1, 11))
    datapath.rules = datapath.new_rules()
    datapath.rules.adopt()
    datapath.rules.apply({}, list(few)[:2])
    datapath.rules.apply({Prefix.parse("13.0.0.0/8"): Verdict.DENY}, [])
    assert datapath.rules.index_of(Prefix.parse("13.0.0.0/8")) == 1


def test_rules_beyond_the_counters_still_decide(datapath: Harness) -> None:
    cells = TABLES["rule_cells"]
    many = {Prefix.parse(f"11.{number >> 8}.{number & 255}.0/24"): Verdict.DENY for number in range(cells + 10)}
    datapath.rules.apply(many, datapath.rules.current().keys() - many.keys())
    datapath.enforce()
    beyond = [prefix for prefix in many if (datapath.rules.index_of(prefix) or 0) >= cells]
    assert beyond
    for prefix in beyond[:10]:
        assert datapath.run(quick_frame(ipaddress.ip_address(prefix.host))).outcome is Outcome.DENIED_DROPPED


def changes_under_fire(datapath: Harness, guns: Guns, policies: Sequence[dict[Prefix, Verdict]], seen: Callable[[], bool]) -> int:
    """Switch from one policy to the next until `seen` holds, ROUNDS times at least."""
    switches = 0
    while switches < ROUNDS or not seen():
        wanted = policies[switches % len(policies)]
        datapath.rules.apply(wanted, datapath.rules.current().keys() - wanted.keys())
        switches += 1
        assert guns.running()
        assert switches < 20_000, "packets did not meet both policies"
    return switches


def test_no_packet_meets_half_a_policy(datapath: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """Traffic on all CPUs while policies are switched. Each source is decided by another prefix under each policy, so that half a policy
    would show: as the default, or as the verdict of the wider prefix."""
    parse, allow, deny = Prefix.parse, Verdict.ALLOW, Verdict.DENY
    # 10.1.2.3 and fd00::1 are allowed under each; 192.0.2.1 is denied under each; 203.0.113.1 is denied, then allowed.
    first = {parse("10.0.0.0/8"): deny, parse("10.1.2.3/32"): allow, parse("192.0.2.0/24"): deny, parse("fd00::/16"): allow,
             parse("203.0.113.0/24"): deny}  # fmt: skip
    second = {parse("10.1.0.0/16"): allow, parse("192.0.0.0/16"): allow, parse("192.0.2.1/32"): deny, parse("fd00::1/128"): allow,
              parse("fd00::/8"): deny, parse("203.0.113.1/32"): allow}  # fmt: skip
    datapath.rules.apply(first, datapath.rules.current().keys() - first.keys())
    datapath.enforce()
    sources = ["10.1.2.3", "fd00::1", "192.0.2.1", "203.0.113.1"]
    before = datapath.totals_by_outcome()
    with shoot(datapath, [quick_frame(ipaddress.ip_address(source)) for source in sources], cpus) as guns:
        changed: set[Outcome] = set()

        def both_met() -> bool:
            datapath.drain()
            totals = datapath.totals_by_outcome()
            changed.update(outcome for outcome in totals if totals[outcome] != before[outcome])
            return changed >= {Outcome.ALLOWED, Outcome.DENIED_DROPPED}

        changes_under_fire(datapath, guns, [second, first], both_met)
        shot = guns.stop()
    after = {outcome: count - before[outcome] for outcome, count in datapath.totals_by_outcome().items() if count != before[outcome]}
    assert set(after) == {Outcome.ALLOWED, Outcome.DENIED_DROPPED}, "a verdict that neither policy gives"
    assert sum(count.packets for count in after.values()) == int(shot.sent.sum())
    sent, dropped = dict(zip(sources, shot.sent.tolist(), strict=True)), dict(zip(sources, shot.dropped.tolist(), strict=True))
    assert dropped["10.1.2.3"] == dropped["fd00::1"] == 0
    assert dropped["192.0.2.1"] == sent["192.0.2.1"] > 0
    assert 0 < dropped["203.0.113.1"] < sent["203.0.113.1"], "packets met one policy alone"
    assert after[Outcome.DENIED_DROPPED].packets == int(shot.dropped.sum())


def test_counters_under_fire(datapath: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """A rule that stays through many switches loses no packet; one that comes and goes never has more than was sent."""
    stays, comes = Prefix.parse("192.0.2.0/24"), Prefix.parse("203.0.113.0/24")
    datapath.policy(deny=[str(stays)])
    index = datapath.rules.index_of(stays)
    assert index is not None
    frames = [quick_frame(ipaddress.ip_address(source)) for source in ("192.0.2.1", "203.0.113.1")]
    before = datapath.counters.rules()[index].copy()
    with shoot(datapath, frames, cpus) as guns:

        def counted() -> bool:
            return bool(datapath.counters.rules()[index][0] > before[0])

        changes_under_fire(datapath, guns, [{stays: Verdict.DENY, comes: Verdict.ALLOW}, {stays: Verdict.DENY}], counted)
        shot = guns.stop()
    counts = datapath.counters.rules()
    assert (counts[index] - before).tolist() == [int(shot.sent[0]), int(shot.sent[0]) * len(frames[0])]
    # When it is away, its counter is clear for the next.
    datapath.rules.apply({}, datapath.rules.current().keys() & {comes})
    assert datapath.counters.rules()[datapath.rules._free[0]].tolist() == [0, 0]


def test_the_old_copy_is_left_alone_until_nobody_looks_into_it(datapath: Harness) -> None:
    """While packets may still be under way with the old policy, that trie, its default and the counters of its rules are as they were."""
    policy = {Prefix.parse("10.0.0.0/8"): Verdict.DENY, Prefix.parse("11.0.0.0/8"): Verdict.ALLOW}
    datapath.rules.apply(policy, datapath.rules.current().keys() - policy.keys(), Verdict.LOG)
    datapath.send(quick_frame(ipaddress.ip_address("10.0.0.1")))
    index = datapath.rules.index_of(Prefix.parse("10.0.0.0/8"))
    old = datapath.control.policy_copy
    waited = 0

    def grace() -> None:
        nonlocal waited
        waited += 1
        assert datapath.control.policy_copy == 1 - old
        tries = [{prefix: verdict for prefix, (_, verdict) in trie.items()} for trie in tries_of(datapath)]
        assert tries[old] == policy
        assert tries[1 - old] == {Prefix.parse("12.0.0.0/8"): Verdict.DENY}
        assert datapath.control.default_of(old) is Verdict.LOG
        assert datapath.control.default_of(1 - old) is Verdict.DENY
        assert datapath.counters.rules()[index][0] == 1

    datapath.rules._grace = grace
    try:
        datapath.rules.apply({Prefix.parse("12.0.0.0/8"): Verdict.DENY}, policy, Verdict.DENY)
    finally:
        datapath.rules._grace = wait_for_packets_under_way
    assert waited == 1
    assert datapath.control.default_of(old) is Verdict.DENY
    assert datapath.counters.rules()[index][0] == 0


def test_the_default_is_switched_with_the_lists(datapath: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """A source is allowed by name while the default denies, then by the default while its entry is gone: it is never denied."""
    listed = {Prefix.parse("203.0.113.0/24"): Verdict.ALLOW}
    datapath.rules.apply(listed, datapath.rules.current().keys() - listed.keys(), Verdict.DENY)
    datapath.enforce()
    with shoot(datapath, [quick_frame(ipaddress.ip_address("203.0.113.1"))], cpus) as guns:
        before = datapath.totals_by_outcome()
        met: set[Outcome] = set()
        switches = 0
        while switches < ROUNDS or met < {Outcome.ALLOWED, Outcome.DEFAULT_ALLOWED}:
            datapath.rules.apply({}, listed, Verdict.ALLOW)
            datapath.rules.apply(listed, [], Verdict.DENY)
            switches += 2
            totals = datapath.totals_by_outcome()
            met = {outcome for outcome in totals if totals[outcome] != before[outcome]}
            assert guns.running() and switches < 20_000
        shot = guns.stop()
    assert int(shot.dropped.sum()) == 0 < int(shot.sent.sum())
    totals = datapath.totals_by_outcome()
    assert {outcome for outcome in totals if totals[outcome] != before[outcome]} == {Outcome.ALLOWED, Outcome.DEFAULT_ALLOWED}
