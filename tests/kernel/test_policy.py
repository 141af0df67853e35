"""The structure of the policy against Python's ipaddress: random policies and random changes to them, large ones, ones that do not
fit, and a switch under fire."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from xdpmond.kernel import abi, libbpf, loader, verdicts
from xdpmond.kernel.maps import wait_for_packets_under_way
from xdpmond.kernel.rules import PolicyTable, PolicyTooLarge
from xdpmond.kernel.tables import SMALLEST_POLICY, PolicySize, make, policy_tables
from xdpmond.model import Family, Outcome, Prefix, Verdict

from .harness import EXAMPLES, ROUNDS, Guns, Harness
from .packets import MAC
from .plainpolicy import PlainPolicy

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
    """Two packets from each address, of which the second is judged by what the talker's entry remembers; and what they would meet in the
    copy at rest, too, when that has followed."""
    datapath.rules.settle()
    active = datapath.control.policy_copy
    wanted = [expected(policy, address) for address in addresses]
    for copy in (active, 1 - active):
        datapath.control.set_policy_copy(copy)
        before = datapath.totals_by_outcome()
        for address, verdict in zip(addresses, wanted, strict=True):
            datapath.send(quick_frame(address))
            dropped = datapath.send(quick_frame(address)) == libbpf.XDP_DROP
            assert dropped == (verdict is Verdict.DENY), f"{address}: {verdict}, copy {copy}"
        after = datapath.totals_by_outcome()
        # What passes is either allowed or by the default.
        for verdict, outcome in OUTCOMES.items():
            assert (after[outcome] - before[outcome]).packets == 2 * wanted.count(verdict), f"{outcome.name}, copy {copy}"
    datapath.control.set_policy_copy(active)


@pytest.fixture
def enforcing(datapath: Harness, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """One thread alone: nobody to wait for."""
    datapath.enforce()
    monkeypatch.setattr(datapath.rules, "_grace", lambda: None)
    return datapath


STRANGERS = [ipaddress.ip_address(text) for text in ("10.0.0.1", "fd00::1", "2001:db8::1", "198.51.100.1")]


@pytest.mark.parametrize(("known", "stranger"), [("198.51.100.1", "198.51.100.2"), ("2001:db8::1", "2001:db8::2")])
def test_what_the_entry_of_a_talker_remembers(enforcing: Harness, known: str, stranger: str) -> None:
    """What the policy said, until its number is another one or the window ends: so codes are changed here behind the back of both."""

    def passes(source: str) -> bool:
        return enforcing.send(quick_frame(ipaddress.ip_address(source))) == libbpf.XDP_PASS

    enforcing.apply({}, list(enforcing.prefixes), whole=True)
    assert passes(known)
    head = enforcing.rules._copies[enforcing.control.policy_copy]
    deny_all = np.uint64(0xAAAAAAAAAAAAAAAA)
    head.lines[: verdicts.top_lines(16)] = deny_all
    head.ipv6[:] = abi.CODE_DENY
    assert passes(known) and not passes(stranger)
    enforcing.close_window()
    assert not passes(known)
    head.lines[: verdicts.top_lines(16)] = 0
    head.ipv6[:] = abi.CODE_NONE
    assert not passes(known)
    enforcing.control.set_policy_copy(enforcing.control.policy_copy)
    assert passes(known) and passes(stranger)


def test_more_changes_than_a_window_has_numbers(enforcing: Harness) -> None:
    """When all have been used in a window, nobody remembers anything until the next."""
    source = quick_frame(ipaddress.ip_address("198.51.100.1"))
    denied = {Prefix.parse("198.51.100.0/24"): Verdict.DENY}
    control, entries = enforcing.control, enforcing.talker_memory()
    enforcing.apply({}, list(enforcing.prefixes), whole=True)
    enforcing.close_window()
    control._set_moment(control.window, abi.POLICY_NUMBERS - 8 + control.policy_copy)
    numbers, codes = [], []
    for change in [denied, {}] * 20:
        enforcing.apply(change, [] if change else list(denied))
        moment = int(control.block["moment"]) & 0xFFFFFFFF
        numbers.append(moment % abi.POLICY_NUMBERS)
        wanted = libbpf.XDP_DROP if change else libbpf.XDP_PASS
        assert [enforcing.send(source), enforcing.send(source)] == [wanted, wanted]
        (state,) = entries["state"][entries["state"] >> np.uint64(abi.STATE_MOMENT_SHIFT) == moment]
        codes.append(int(state) >> abi.STATE_CODE_SHIFT & 3)
    remembered = [number for number in numbers if number > 1]
    assert 2 <= len(remembered) < 8 and remembered == sorted(set(remembered)) == numbers[: len(remembered)], "none came twice"
    assert codes == [[abi.CODE_DENY, abi.CODE_LINE][at % 2] if at < len(remembered) else abi.CODE_NONE for at in range(len(codes))]
    enforcing.close_window()
    for change in [denied, {}] * 2:
        enforcing.apply(change, [] if change else list(denied))
        assert int(control.block["moment"]) % abi.POLICY_NUMBERS > 1
        wanted = libbpf.XDP_DROP if change else libbpf.XDP_PASS
        assert [enforcing.send(source), enforcing.send(source)] == [wanted, wanted]


@SETTINGS
@given(policy=POLICIES, seed=st.integers(0, 1 << 32))
def test_longest_prefix(enforcing: Harness, policy: dict[Prefix, Verdict], seed: int) -> None:
    enforcing.apply(policy, enforcing.prefixes.keys() - policy.keys(), whole=True)
    check_lookups(enforcing, policy, [*neighbours(policy, random.Random(seed)), *STRANGERS])


@SETTINGS
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_changes_point_by_point(enforcing: Harness, data: st.DataObject, seed: int) -> None:
    """What a change leaves behind is what was meant, at the prefixes that it touched and at those around them."""
    source = random.Random(seed)
    policy = data.draw(POLICIES)
    enforcing.apply(policy, list(enforcing.prefixes), whole=True)
    for _ in range(data.draw(st.integers(1, 5))):
        removed = data.draw(st.sets(st.sampled_from(sorted(policy)), max_size=6)) if policy else set()
        added = data.draw(st.dictionaries(networks(), VERDICTS, max_size=6))
        again = data.draw(st.dictionaries(st.sampled_from(sorted(policy)), VERDICTS, max_size=3)) if policy else {}
        changed = {prefix: verdict for prefix, verdict in (added | again).items() if prefix not in removed}
        enforcing.apply(changed, removed)
        policy = {prefix: verdict for prefix, verdict in policy.items() if prefix not in removed} | changed
        touched = [*changed, *removed]
        others = source.sample(sorted(policy), min(len(policy), 6))
        check_lookups(enforcing, policy, [*neighbours(touched + others, source), *STRANGERS])


@pytest.mark.parametrize("bits", verdicts.TOP_BITS)
@settings(SETTINGS, max_examples=EXAMPLES // 5)
@given(policy=st.dictionaries(networks(), VERDICTS, min_size=1, max_size=30), data=st.data())
def test_what_was_changed_is_as_if_built_anew(
    monkeypatch: pytest.MonkeyPatch, bits: int, policy: dict[Prefix, Verdict], data: st.DataObject
) -> None:
    """Prefix by prefix, there and back: the same codes, references and nodes as from the beginning, wherever they lie; nothing is left."""
    monkeypatch.setattr(verdicts, "TOP_BITS", (bits,))
    copy = scratch_copy(PolicySize(verdicts.top_lines(bits) + 256, 1024, 256))
    copy.write(verdicts.build(PlainPolicy(policy)))
    order = data.draw(st.permutations(sorted(policy)))
    left = dict(policy)
    for prefix in order:
        del left[prefix]
        copy.change(PlainPolicy(left), [prefix])
        anew = scratch_copy(copy.size)
        # The depths to search do not shrink with a policy.
        depths = sorted(copy._paths)
        anew.write(verdicts.build(PlainPolicy(left)))
        if sorted(anew._paths) == depths:
            assert content(copy) == content(anew)
    top = verdicts.top_lines(bits)
    assert not copy.lines[:top].any() and not copy.ipv6.any() and not copy.buckets4.any()
    assert set(copy.buckets6[:, 2::3].flat) <= {0, verdicts._TOMBSTONE}
    assert sorted(copy._free_lines) == list(range(top, copy._next_line)), "a line that nobody uses was not given back"
    for prefix in order:
        left[prefix] = policy[prefix]
        copy.change(PlainPolicy(left), [prefix])
    anew = scratch_copy(copy.size)
    anew.write(verdicts.build(PlainPolicy(policy)))
    assert content(copy) == content(anew)


@pytest.fixture
def roomy(loaded: Harness, monkeypatch: pytest.MonkeyPatch, bits: int) -> Iterator[Harness]:
    """With a top of IPv4 of so many bits, enforcing."""
    monkeypatch.setattr(verdicts, "TOP_BITS", (bits,))
    size = PolicySize(verdicts.top_lines(bits) + 1024, 2048, 64)
    harness = Harness(loaded.build, loader.load(loaded.build, policy=size, code=loaded.loaded.code))
    monkeypatch.setattr(harness.rules, "_grace", lambda: None)
    harness.enforce()
    yield harness
    harness.close()


@pytest.mark.parametrize("bits", verdicts.TOP_BITS)
def test_the_lengths_at_which_levels_meet(roomy: Harness, bits: int) -> None:
    """Alone, within and beside each other, whole and point by point: the longest prefix of the top, those that are written to each /24, and
    those within one."""
    source = random.Random(bits)
    lengths = sorted({bits - 1, bits, bits + 1, 23, 24, 25, 26, 31, 32})
    policy: dict[Prefix, Verdict] = {}
    for leading in (0x00, 0x0A, 0xFF):
        inner = leading << 24 | source.getrandbits(24)
        for length in lengths:
            for number in (inner, source.getrandbits(24) | leading << 24, leading << 24, leading << 24 | 0xFFFFFF):
                masked = number >> 32 - length << 32 - length
                policy[Prefix(Family.IPV4, masked.to_bytes(4, "big"), length)] = source.choice((Verdict.ALLOW, Verdict.DENY))
    roomy.apply(policy, list(roomy.prefixes), whole=True)
    assert roomy.rules._copies[roomy.control.policy_copy].head["shift4"] == 32 - bits
    check_lookups(roomy, policy, [*neighbours(policy, source), *STRANGERS])
    for _ in range(6):
        changed = {prefix: source.choice((Verdict.ALLOW, Verdict.DENY)) for prefix in source.sample(sorted(policy), 3)}
        removed = [prefix for prefix in source.sample(sorted(policy), 4) if prefix not in changed]
        roomy.apply(changed, removed)
        policy = {prefix: verdict for prefix, verdict in (policy | changed).items() if prefix not in removed}
        check_lookups(roomy, policy, [*neighbours([*changed, *removed, *source.sample(sorted(policy), 5)], source), *STRANGERS])
        for copy in roomy.rules._copies:
            check_buckets(copy)


def of_one_home(seed: Sequence[int], buckets: int, number: int) -> list[Prefix]:
    """Addresses whose /24 all belong into one bucket."""
    keys = np.arange(1 << 16, 1 << 24, dtype="u8")
    homes, _ = verdicts._homes4(verdicts._hashes4(keys, seed), buckets)
    found = np.random.default_rng(1).choice(keys[homes == homes[0]], number, replace=False)
    return [Prefix(Family.IPV4, (int(key) << 8 | 9).to_bytes(4, "big"), 32) for key in found]


def test_many_with_one_home(enforcing: Harness) -> None:
    """More references than a bucket holds: the others are in their other buckets, from which they come and go alone."""
    source = random.Random(4)
    seed = [int(word) for word in enforcing.control.block["seed"]]
    alike = of_one_home(seed, enforcing.rules.size.buckets4, 60)
    strangers, alike = alike[50:], alike[:50]
    for whole in (True, False):
        enforcing.apply({}, list(enforcing.prefixes), whole=True)
        policy = {prefix: source.choice((Verdict.ALLOW, Verdict.DENY)) for prefix in alike}
        for at in range(0, len(alike), 50 if whole else 5):
            enforcing.apply({prefix: policy[prefix] for prefix in alike[at : at + (50 if whole else 5)]}, whole=whole)
        addresses = neighbours([*alike, *strangers], source)
        check_lookups(enforcing, policy, addresses)
        while policy:
            gone = source.sample(sorted(policy), min(len(policy), 6))
            enforcing.apply({}, gone)
            policy = {prefix: verdict for prefix, verdict in policy.items() if prefix not in gone}
            check_lookups(enforcing, policy, addresses)
            for copy in enforcing.rules._copies:
                check_buckets(copy)
        assert not enforcing.rules._copies[0].buckets4.any()


def test_too_many_with_one_home() -> None:
    """Neither of their buckets has room; in more buckets they have."""
    copy = scratch_copy(PolicySize(1024, 512, 64))
    policy = dict.fromkeys(of_one_home(copy.seed, 512, 2000), Verdict.DENY)
    built = verdicts.build(PlainPolicy(policy))
    with pytest.raises(verdicts.DoesNotFit):
        copy.write(built)
    copy.write(verdicts.build(PlainPolicy({})))
    with pytest.raises(verdicts.DoesNotFit):
        for prefix in policy:
            copy.change(PlainPolicy({prefix: Verdict.DENY}), [prefix])
    check_buckets(copy)
    assert int(copy.buckets4[:, abi.BUCKET4].sum()) > 200
    size = built.size(copy.seed)
    larger = scratch_copy(size)
    larger.write(built)
    assert size.buckets4 > 512 and len(check_buckets(larger)) == len(policy)


def test_the_top_that_costs_least() -> None:
    def bits(**numbers: int) -> int:
        return verdicts.choose_top_bits({int(length[1:]): number for length, number in numbers.items()})

    assert bits() == bits(_8=2, _12=1, _16=1, _24=1, _32=1) == 16
    assert bits(_24=200_000, _32=700_000, **{f"_{length}": 12_500 for length in range(16, 24)}) == 20
    for length in range(8, 25):
        numbers = {length: min(1_000_000, 1 << length)}
        chosen = verdicts.choose_top_bits(numbers)
        references = numbers[length] << 24 - length if length > chosen else 0
        assert verdicts.top_lines(chosen) * 64 + 16 * references < 33e6, f"/{length}"


def scratch_copy(size: PolicySize) -> verdicts.Copy:
    return verdicts.Copy(
        np.zeros(1, abi.POLICY)[0], np.zeros(abi.TOPS, "u4"), np.zeros((size.lines, 8), "u8"),
        np.zeros((size.buckets4, 8), "u8"), np.zeros((size.buckets6, 16), "u8"), [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F],
    )  # fmt: skip


def content(copy: verdicts.Copy) -> dict[object, object]:
    """All that a copy says, without where it says it."""

    def codes(ref: int) -> tuple[int, ...]:
        four = [ref >> shift & 3 for shift in (32, 34, 36, 38)]
        if four == [abi.CODE_LINE] * 4:
            return tuple(verdicts.unpack(copy.lines[ref & 0xFFFFFFFF]).tolist())
        (first, mask), (other_first, other_mask) = ((ref >> shift & 255, ref >> shift + 8 & 255) for shift in (0, 16))
        return tuple(four[(place & mask != first) + 2 * (place & other_mask != other_first)] for place in range(256))

    found: dict[object, object] = {}
    bits = 32 - int(copy.head["shift4"])
    for index in np.nonzero(copy.lines[: verdicts.top_lines(bits)].any(axis=1))[0].tolist():
        found[4, bits, index] = tuple(verdicts.unpack(copy.lines[index]).tolist())
    found |= {(6, top): int(copy.ipv6[top]) for top in np.nonzero(copy.ipv6)[0].tolist()}
    refs = copy.buckets4[:, : abi.BUCKET4]
    for ref in refs[refs != 0].tolist():
        found["reference", ref >> 40] = codes(ref)
    for bucket in copy.buckets6.tolist():
        for at in range(abi.BUCKET6):
            high, low, ref = bucket[3 * at : 3 * at + 3]
            if ref not in (0, verdicts._TOMBSTONE):
                found["node", high, low, ref >> 40] = codes(ref)
    return found


def check_buckets(copy: verdicts.Copy) -> set[int]:
    """Each reference is once in one of its two buckets, and each bucket knows how many of its own are not there. Returns the keys."""
    away = np.zeros(len(copy.buckets4), "i8")
    seen: set[int] = set()
    for bucket, place in np.argwhere(copy.buckets4[:, : abi.BUCKET4]).tolist():
        key = int(copy.buckets4[bucket, place]) >> 40
        home, other = verdicts.homes4(key, copy.seed, len(copy.buckets4))
        assert bucket in (home, other) and key not in seen
        away[home] += bucket != home
        seen.add(key)
    assert copy.buckets4[:, abi.BUCKET4].tolist() == away.tolist()
    return seen


def crowd(source: random.Random, number: int) -> dict[Prefix, Verdict]:
    """Prefixes of all lengths, some of them close together."""
    found: dict[Prefix, Verdict] = {}
    while len(found) < number:
        family = source.choice((Family.IPV4, Family.IPV6))
        length = source.randint(8, family.bits)
        leading = source.choice((0x0A, 0x0A01, 0xC0A8, 0x2001, 0xFD))
        value = leading << family.bits - 16 | source.getrandbits(source.choice((12, 20, family.bits - 16)))
        value = value >> family.bits - length << family.bits - length
        found[Prefix(family, value.to_bytes(family.bits // 8, "big"), length)] = source.choice((Verdict.ALLOW, Verdict.DENY))
    return found


def quickly_expected(policy: dict[Prefix, Verdict], address: Address) -> Verdict | None:
    """The same as `expected`, by looking at each length once."""
    family = Family(address.version)
    for length in range(family.bits, -1, -1):
        masked = int(address) >> family.bits - length << family.bits - length
        verdict = policy.get(Prefix(family, masked.to_bytes(family.bits // 8, "big"), length))
        if verdict is not None:
            return verdict
    return None


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd(enforcing: Harness, seed: int) -> None:
    """Full buckets, and those beyond them; then most of them go again, point by point and at once."""
    source = random.Random(seed)
    policy = crowd(source, min(3000, 15 * EXAMPLES))
    enforcing.apply(policy, list(enforcing.prefixes), whole=True)

    def check() -> None:
        some = source.sample(sorted(policy), min(300, len(policy)))
        for address in [*neighbours(some, source), *STRANGERS]:
            verdict = quickly_expected(policy, address)
            assert (enforcing.send(quick_frame(address)) == libbpf.XDP_DROP) == (verdict is Verdict.DENY), f"{address}: {verdict}"

    check()
    for _ in range(20):
        some = source.sample(sorted(policy), 10)
        enforcing.apply({}, some)
        policy = {prefix: verdict for prefix, verdict in policy.items() if prefix not in some}
        more = crowd(source, 5)
        enforcing.apply(more)
        policy |= more
    check()
    check_buckets(enforcing.rules._copies[enforcing.control.policy_copy])
    enforcing.apply({}, source.sample(sorted(policy), len(policy) * 2 // 3), whole=True)
    policy = enforcing.prefixes
    check()


@pytest.fixture
def small(datapath: Harness) -> Iterator[Callable[[PolicySize], PolicyTable]]:
    """Tables of other sizes, which no packet looks into; one thread alone."""
    made: list[PolicyTable] = []
    opened: list[int] = []

    def of(size: PolicySize) -> PolicyTable:
        maps = {name: make(name, table) for name, table in policy_tables(size).items()}
        opened.extend(maps.values())
        made.append(PolicyTable.new(maps, size, datapath.control, lambda: None))
        return made[-1]

    copy = datapath.control.policy_copy
    yield of
    datapath.control.set_policy_copy(copy)
    for table in made:
        table.close()
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize("size", [PolicySize(264, 4096, 4096), PolicySize(4096, 16, 4096), PolicySize(4096, 4096, 16)])
def test_a_policy_that_does_not_fit(small: Callable[[PolicySize], PolicyTable], size: PolicySize) -> None:
    """The old one holds; it is said what the new one needs; and a later one that fits goes in as ever."""
    table = small(size)
    few = {Prefix.parse("10.0.0.0/8"): Verdict.DENY, Prefix.parse("10.1.2.3"): Verdict.ALLOW, Prefix.parse("fd00::/20"): Verdict.DENY}
    table.apply(PlainPolicy(few), None, Verdict.DENY)
    table.settle()
    held = content(table._copies[table._control.policy_copy])
    for touched in (None, list(few)):
        with pytest.raises(PolicyTooLarge) as raised:
            table.apply(PlainPolicy(few | crowd(random.Random(1), 2000)), touched, Verdict.LOG)
        assert any(wanted > have for wanted, have in zip(raised.value.size, size, strict=True))
        assert content(table._copies[table._control.policy_copy]) == held
        assert table.default is Verdict.DENY
    table.apply(PlainPolicy(few), [], Verdict.LOG)
    table.settle()
    assert [content(copy) for copy in table._copies] == [held, held]
    larger = small(raised.value.size)
    larger.apply(PlainPolicy(few | crowd(random.Random(1), 2000)), None, Verdict.LOG)


class Columns:
    """Prefixes of IPv4 and IPv6 by the hundred thousand: what `verdicts.build` asks for."""

    def __init__(self, segments: dict[Family, list[tuple[int, np.ndarray]]]):
        self._segments = segments

    def segments(self, family: Family) -> list[tuple[int, np.ndarray, np.ndarray]]:
        return [(length, addresses, np.full(len(addresses), 2, "u1")) for length, addresses in self._segments.get(family, [])]


def test_a_list_fits_whatever_the_seed() -> None:
    """A secret seed must not decide whether somebody's list is refused, nor addresses that are close together."""
    numbers = np.random.default_rng(5)
    scattered = np.unique(numbers.integers(0, 1 << 32, 70_000, dtype="u8")).astype("u4")
    networks24 = np.unique(numbers.integers(0, 1 << 24, 20_000, dtype="u8")).astype("u4") << np.uint32(8)
    near = np.arange(0x0A000000, 0x0A000000 + 256 * 40_000, 256, dtype="u4") + np.uint32(7)
    high = np.full(50_000, 0x20010DB8_00000000, "u8")
    in_one_64 = np.stack([high, np.arange(50_000, dtype="u8") << np.uint64(32)], axis=1)
    hosts = np.stack([high, np.arange(50_000, dtype="u8") << np.uint64(8)], axis=1)
    for segments in (
        {Family.IPV4: [(24, networks24), (32, scattered)]},
        {Family.IPV4: [(32, near)]},
        {Family.IPV6: [(96, in_one_64)]},
        {Family.IPV6: [(128, hosts)]},
    ):
        built = verdicts.build(Columns(segments))  # type: ignore[arg-type]
        for number in range(8):
            seed = [int(word) | 1 for word in np.random.default_rng(number).integers(0, 1 << 64, 4, dtype="u8")]
            size = built.size(seed)
            assert built.places4(size.buckets4, seed) is not None and built.places6(size.buckets6, seed) is not None
            assert size.buckets4 <= max(len(built.refs4), SMALLEST_POLICY.buckets4)
            assert size.buckets6 <= max(2 * len(built.nodes6), SMALLEST_POLICY.buckets6)


def test_points_that_do_not_fit_are_built_anew(small: Callable[[PolicySize], PolicyTable], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that are used up, buckets that are full, a depth that nobody searched so far."""
    monkeypatch.setattr(verdicts, "TOP_BITS", (16,))
    table = small(PolicySize(320, 16, 16))
    policy: dict[Prefix, Verdict] = {}
    source = random.Random(7)
    with pytest.raises(PolicyTooLarge):
        for _ in range(2000):
            some = crowd(source, 1)
            policy |= some
            table.apply(PlainPolicy(policy), list(some), Verdict.LOG)
            table.settle()
            anew = scratch_copy(PolicySize(4096, 1024, 4096))
            anew.write(verdicts.build(PlainPolicy(policy)))
            assert content(table._copies[0]) == content(table._copies[1]) == content(anew)


@pytest.mark.parametrize(("outer", "others"), [("0.0.0.0/0", "1{0}.{1}.0.0/16"), ("10.0.0.0/17", "10.0.{0}.{1}/32")])
def test_what_touches_too_much_is_built_anew(small: Callable[[PolicySize], PolicyTable], outer: str, others: str) -> None:
    """So that a change takes no longer than to build all, whatever lies below it."""
    prefix = Prefix.parse(outer)
    for number, whole in ((1600, True), (200, False)):
        inner = {Prefix.parse(others.format(at // 200, at % 200)): Verdict.DENY for at in range(number)}
        copy = small(PolicySize(4096, 4096, 4096))._copies[0]
        copy.write(verdicts.build(PlainPolicy(inner)))
        with pytest.raises(verdicts.NeedsWhole) if whole else contextlib.nullcontext():
            copy.change(PlainPolicy(inner | {prefix: Verdict.ALLOW}), [prefix])


def test_depths_are_found_by_the_search() -> None:
    """For every set of depths: the way to each of them is short, and passes nodes on its own path alone."""
    for number in range(1 << 14):
        depths = [depth for depth in range(2, 16) if number >> (depth - 2) & 1]
        steps, ways = verdicts.search_steps(depths), verdicts.paths(depths)
        assert set(ways) == set(depths)
        for wanted in depths:
            at, found, rounds = 0, 0, 0
            while at < len(steps):
                depth, deeper, shallower = steps[at]
                there = depth in ways[wanted]
                found, at, rounds = (depth, deeper, rounds + 1) if there else (found, shallower, rounds + 1)
            assert found == wanted
            assert rounds <= abi.SEARCH_ROUNDS


def changes_under_fire(datapath: Harness, guns: Guns, policies: Sequence[dict[Prefix, Verdict]], seen: Callable[[], bool]) -> int:
    """Switch from one policy to the next until `seen` holds, ROUNDS times at least."""
    switches = 0
    while switches < ROUNDS or not seen():
        wanted = policies[switches % len(policies)]
        datapath.apply(wanted, datapath.prefixes.keys() - wanted.keys())
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
    datapath.apply(first, datapath.prefixes.keys() - first.keys())
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


def test_the_old_copy_is_left_alone_until_nobody_looks_into_it(datapath: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """While packets may still be under way with the old policy, that copy and its default are as they were."""
    policy = {Prefix.parse("10.0.0.0/8"): Verdict.DENY, Prefix.parse("11.0.0.0/24"): Verdict.ALLOW, Prefix.parse("fd00::/64"): Verdict.DENY}
    datapath.apply(policy, datapath.prefixes.keys() - policy.keys(), Verdict.LOG)
    datapath.rules.settle()
    old = datapath.control.policy_copy
    before = content(datapath.rules._copies[old])
    seen: list[bool] = []

    def grace() -> None:
        wait_for_packets_under_way()
        seen.append(datapath.control.policy_copy == 1 - old and content(datapath.rules._copies[old]) == before
                    and datapath.rules._copies[old].head["default_verdict"] == abi.VERDICT_LOG)  # fmt: skip

    monkeypatch.setattr(datapath.rules, "_grace", grace)
    for whole in (False, True):
        datapath.apply({Prefix.parse("12.0.0.0/24"): Verdict.DENY}, policy, Verdict.DENY, whole=whole)
        assert datapath.rules.default is Verdict.DENY
        datapath.rules.settle()
        assert seen == [True]
        assert content(datapath.rules._copies[0]) == content(datapath.rules._copies[1]) != before
        assert datapath.rules._copies[old].head["default_verdict"] == abi.VERDICT_DENY
        seen.clear()
        datapath.apply(policy, [Prefix.parse("12.0.0.0/24")], Verdict.LOG)
        datapath.rules.settle()
        assert seen == [False], "the other copy was at rest this time"
        seen.clear()
        old = datapath.control.policy_copy
        before = content(datapath.rules._copies[old])


def test_the_default_is_switched_with_the_lists(datapath: Harness, shoot: Callable[..., Guns], cpus: list[int]) -> None:
    """A source is allowed by name while the default denies, then by the default while its entry is gone: it is never denied."""
    listed = {Prefix.parse("203.0.113.0/24"): Verdict.ALLOW}
    datapath.apply(listed, datapath.prefixes.keys() - listed.keys(), Verdict.DENY)
    datapath.enforce()
    with shoot(datapath, [quick_frame(ipaddress.ip_address("203.0.113.1"))], cpus) as guns:
        before = datapath.totals_by_outcome()
        met: set[Outcome] = set()
        switches = 0
        while switches < ROUNDS or met < {Outcome.ALLOWED, Outcome.DEFAULT_ALLOWED}:
            datapath.apply({}, listed, Verdict.ALLOW)
            datapath.apply(listed, [], Verdict.DENY)
            switches += 2
            totals = datapath.totals_by_outcome()
            met = {outcome for outcome in totals if totals[outcome] != before[outcome]}
            assert guns.running() and switches < 20_000
        shot = guns.stop()
    assert int(shot.dropped.sum()) == 0 < int(shot.sent.sum())
    totals = datapath.totals_by_outcome()
    assert {outcome for outcome in totals if totals[outcome] != before[outcome]} == {Outcome.ALLOWED, Outcome.DEFAULT_ALLOWED}
