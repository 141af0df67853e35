"""Millions of odd packets through the packet path, each judged a second time by the reference of the tests.

A process for each core makes frames (all kinds of headers, most of them damaged), runs each through the loaded program by itself, and
compares: the action of each frame; and for each few thousand frames the exact totals, the talkers with packets, bytes and SYNs, and the
anomalies. These are sums of what the reference says of each frame, so that one frame that is counted otherwise is a difference. The policy
changes meanwhile, as a whole and by a few prefixes.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from tests.kernel import reference
from tests.kernel.reference import View
from xdpmond.config import Config, Flows
from xdpmond.kernel import abi, libbpf
from xdpmond.kernel.datapath import Datapath
from xdpmond.model import Entry, Family, Origin, Outcome, Prefix, Verdict
from xdpmond.policy import Policy, difference

from .path import LOOPBACK, check_books, pinned, shipped_datapath
from .rows import Goal, Of, Row

TITLE = "fuzz: each packet judged by a second parser and policy"
PACKETS = 10_000_000

_BATCH = 16_384
_TEMPLATES = 3000
_EPHEMERAL = (32768, 60999)
_PORT_FLAGS = {22: abi.PORT_TCP_FAILSAFE, 53: abi.PORT_UDP_FAILSAFE, 40000: abi.PORT_TCP_LISTENS, 50000: abi.PORT_UDP_LISTENS}
_ROOT = Path(__file__).resolve().parents[1]
_TOLD = 5  # differences that are described


def measure(rounds: int) -> Iterable[Row]:
    cpus = sorted(os.sched_getaffinity(0))
    started = time.monotonic()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.fuzz", str(cpu), str(PACKETS // len(cpus))], cwd=_ROOT, stdout=subprocess.PIPE, text=True
        )
        for cpu in cpus
    ]
    found = []
    try:
        for worker in workers:
            output, _ = worker.communicate()
            if worker.returncode:
                raise AssertionError(f"a worker ended with {worker.returncode}")
            found.append(json.loads(output))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    packets, differences = (sum(each[name] for each in found) for name in ("packets", "differences"))
    for told in [told for each in found for told in each["told"]]:
        print(told, file=sys.stderr)
    changes = sum(each["policies"] for each in found)
    row = f"{packets:,} packets, under {changes:,} policies: differences from the reference"
    yield Row(row, differences, "packets", goal=Goal(0, Of.VALUE))
    yield Row("packets judged a second", packets / (time.monotonic() - started), "packets/s")


# Frames


@dataclass(frozen=True, slots=True)
class _Template:
    frame: bytes
    ip: int
    """Where the IP header begins; 0: there is none."""
    family: Family


class _Frames:
    """Makes frames: templates by scapy, then other sources and damage."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._templates = [self._template() for _ in range(_TEMPLATES)]
        self._ip_templates = [template for template in self._templates if template.ip]

    def make(self, count: int, pool: dict[Family, list[bytes]], *, ethernet: bool) -> Iterator[bytes]:
        """`pool` are sources that the policy tells apart."""
        rnd, choose, uniform = self._random, self._random.choice, self._random.random
        for _ in range(count):
            if uniform() < 0.05:
                yield self._noise(ethernet)
                continue
            template = choose(self._templates if ethernet else self._ip_templates)
            data, at = bytearray(template.frame), template.ip
            if at and uniform() < 0.8:
                source, where = choose(pool[template.family]), at + (12 if template.family is Family.IPV4 else 8)
                data[where : where + len(source)] = source
            start = 12
            if not ethernet:
                del data[:at]
                start = 0
            if uniform() < 0.7:
                for _ in range(rnd.randrange(1, 4)):
                    self._damage(data, start)
            if len(data) < 14:
                data += bytes(14 - len(data))
            yield bytes(data)

    def _noise(self, ethernet: bool) -> bytes:
        data = bytearray(self._random.randbytes(self._random.randrange(14, 120)))
        if ethernet:
            data[12:14] = self._random.choice((b"\x08\x00", b"\x86\xdd", b"\x81\x00", b"\x88\xa8"))
        return bytes(data)

    def _damage(self, data: bytearray, start: int) -> None:
        rnd = self._random
        if len(data) <= start:
            return
        at, kind = rnd.randrange(start, len(data)), rnd.randrange(8)
        if kind < 2:
            data[at] = rnd.choice((0, 1, 4, 6, 17, 43, 44, 51, 58, 60, 135, 136, 139, 140, 255))
        elif kind == 2:
            data[at] ^= 1 << rnd.randrange(8)
        elif kind < 5:
            # Near the front, where the headers are.
            data[min(at, start + (at - start) % 48)] = rnd.randrange(256)
        elif kind == 5:
            del data[max(at, 14) :]
        elif kind == 6:
            del data[at : at + rnd.randrange(1, 9)]
        else:
            data[at:at] = rnd.randbytes(rnd.randrange(1, 9))

    def _template(self) -> _Template:
        rnd = self._random
        link: Packet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
        for _ in range(rnd.choice((0, 0, 0, 1, 1, 2, 2, 3))):
            link = link / rnd.choice((Dot1Q, Dot1AD))(vlan=rnd.randrange(4096))
        kind = rnd.choice(("ipv4", "ipv4", "ipv4", "ipv6", "ipv6", "ipv6", "arp", "odd"))
        if kind == "arp":
            return _Template(bytes(link / ARP(psrc="192.0.2.1", pdst="192.0.2.2")), 0, Family.OTHER)
        if kind == "odd":
            link.lastlayer().type = rnd.choice((0x88CC, 0x8847, 0x0600, 0x9000))
            return _Template(bytes(link / Raw(rnd.randbytes(30))), 0, Family.OTHER)
        family = Family.IPV4 if kind == "ipv4" else Family.IPV6
        packet = self._ipv4() if family is Family.IPV4 else self._ipv6()
        # Frames on a wire are padded: what lies behind the packet's own length is not the packet.
        return _Template(bytes(link / packet) + b"\xee" * rnd.choice((0, 0, 1, 6, 12)), len(link), family)

    def _transport(self, v6: bool) -> tuple[Packet, int]:
        rnd = self._random
        ports = (0, 22, 53, 67, 68, 80, 443, 546, 547, *_EPHEMERAL, 40000, 50000, 65535)
        sport, dport = rnd.choice(ports), rnd.choice(ports)
        kind = rnd.choice(("tcp", "tcp", "udp", "udp", "answer", "sctp", "icmp", "icmpv6", "gre", "none") + (("nd",) if v6 else ()))
        if kind == "tcp":
            return TCP(sport=sport, dport=dport, flags=rnd.randrange(256), options=rnd.choice(([], [("MSS", 1460)]))), 6
        if kind == "udp":
            return UDP(sport=sport, dport=dport), 17
        if kind == "answer":
            sport, dport = rnd.choice(((67, 68), (68, 67), (547, 546), (546, 547)))
            return UDP(sport=sport, dport=dport), 17
        if kind == "sctp":
            return SCTP(sport=sport, dport=dport, tag=1), 132
        if kind == "icmp":
            return ICMP(type=rnd.choice((0, 3, 8))), 1
        if kind == "nd":
            return rnd.choice((ICMPv6ND_NS, ICMPv6ND_NA, ICMPv6ND_RA))(), 58
        if kind == "icmpv6":
            return (ICMPv6EchoRequest() if v6 else Raw(b"\x87\0\0\0")), 58
        return Raw(bytes(8)), 47 if kind == "gre" else 59

    def _ipv4(self) -> Packet:
        rnd = self._random
        transport, number = self._transport(v6=False)
        options = rnd.choice(([], [], [IPOption_NOP()], [IPOption_RR(routers=["0.0.0.0"] * 3)], [IPOption_NOP()] * 40))
        flags, offset = rnd.choice(((0, 0), (0, 0), (0, 0), (2, 0), (1, 0), (1, 100), (0, 185)))
        header = IP(src="192.0.2.1", dst="10.0.0.1", proto=number, ttl=rnd.choice((1, 64, 255)), flags=flags, frag=offset, options=options)
        return header / transport / Raw(rnd.randbytes(rnd.randrange(40)))

    def _ipv6(self) -> Packet:
        rnd = self._random
        chain: list[tuple[Packet, int]] = []
        for _ in range(rnd.choice((0, 0, 0, 1, 2, 3, 7, 8, 9))):
            kind = rnd.randrange(5)
            if kind < 2:
                padding = [PadN(optdata=bytes(rnd.randrange(20)))]
                chain.append((IPv6ExtHdrHopByHop(options=padding), 0) if kind else (IPv6ExtHdrDestOpt(options=padding), 60))
            elif kind == 2:
                chain.append((IPv6ExtHdrRouting(addresses=["2001:db8::9"] * rnd.randrange(3)), 43))
            elif kind == 3:
                chain.append((AH(payloadlen=4, icv=b"\1" * 12), 51))
            else:
                offset, more = rnd.choice(((0, 0), (0, 1), (1, 1), (300, 0)))
                chain.append((IPv6ExtHdrFragment(offset=offset, m=more, id=7), 44))
        transport, last = self._transport(v6=True)
        numbers = [number for _, number in chain] + [last]
        packet: Packet = IPv6(src="2001:db8::1", dst="2001:db8::2", hlim=rnd.choice((1, 64, 254, 255)), nh=numbers[0])
        for (header, _), following in zip(chain, numbers[1:], strict=True):
            header.nh = following
            packet = packet / header
        return packet / transport / Raw(rnd.randbytes(rnd.randrange(40)))


# The policy, a second time


class _Lists:
    """Random policies, nested deep, and what they say: by trying each length, the longest first."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self.policy = Policy()
        self._listed: dict[Prefix, Verdict] = {}
        self._by_length: dict[Family, dict[int, dict[int, Verdict]]] = {}
        self._known: dict[bytes, Verdict | None] = {}
        self._recent: list[bytes] = []
        self.pool: dict[Family, list[bytes]] = {}

    def replace(self) -> None:
        """A new policy; every few times a large one."""
        number = self._random.choice((0, 10, 200, 200, 1000, 20_000))
        self._listed = {self._prefix(): self._random.choice((Verdict.ALLOW, Verdict.DENY)) for _ in range(number)}
        self.policy = Policy(_entry(prefix, verdict) for prefix, verdict in self._listed.items())
        self._learn()

    def change(self) -> None:
        """Take some prefixes away, turn some, add some."""
        gone = self._random.sample(sorted(self._listed), min(len(self._listed), self._random.randrange(20)))
        for prefix in gone:
            del self._listed[prefix]
        added = {self._prefix(): self._random.choice((Verdict.ALLOW, Verdict.DENY)) for _ in range(self._random.randrange(20))}
        self._listed |= added
        self.policy = self.policy.with_changes(
            [_entry(prefix, verdict) for prefix, verdict in added.items()],
            [(prefix, Origin.OPERATOR) for prefix in gone if prefix not in added],
        )
        self._learn()

    def verdict(self, source: bytes) -> Verdict | None:
        if source not in self._known:
            self._known[source] = self._look_up(source)
        return self._known[source]

    def _look_up(self, source: bytes) -> Verdict | None:
        bits, number = len(source) * 8, int.from_bytes(source, "big")
        lengths = self._by_length[Family.IPV4 if bits == 32 else Family.IPV6]
        found = (lengths[length].get(number >> (bits - length)) for length in sorted(lengths, reverse=True))
        return next((verdict for verdict in found if verdict is not None), None)

    def _learn(self) -> None:
        self._known = {}
        self._by_length = {Family.IPV4: {}, Family.IPV6: {}}
        for prefix, verdict in self._listed.items():
            number = int.from_bytes(prefix.address, "big") >> (prefix.family.bits - prefix.length)
            self._by_length[prefix.family].setdefault(prefix.length, {})[number] = verdict
        # Addresses inside, at either end, and just outside of prefixes.
        some = self._random.sample(sorted(self._listed), min(len(self._listed), 500))
        self.pool = {
            family: [self._near(prefix) for prefix in some if prefix.family is family for _ in range(4)]
            for family in (Family.IPV4, Family.IPV6)
        }
        for family, addresses in self.pool.items():
            addresses += [self._address(family) for _ in range(100)]

    def _near(self, prefix: Prefix) -> bytes:
        bits, first = prefix.family.bits, int.from_bytes(prefix.address, "big")
        last = first + (1 << (bits - prefix.length)) - 1
        number = self._random.choice((first, last, first - 1, last + 1, self._random.randrange(first, last + 1)))
        return (number % (1 << bits)).to_bytes(bits // 8, "big")

    def _address(self, family: Family) -> bytes:
        """From few networks, so that prefixes are nested; some are link-local, multicast or zero."""
        rnd = self._random
        if family is Family.IPV4:
            return bytes(
                (rnd.choice((0, 10, 192, 198, 224)), rnd.choice((0, 1, 168, rnd.randrange(256))), rnd.randrange(256), rnd.randrange(256))
            )
        start = rnd.choice(("20010db8", "20010db8000000010002", "fe80000000000000", "fec0", "ff02", "0000", "2a00"))
        head = bytes.fromhex(start)
        return head + rnd.randbytes(16 - len(head))

    def _prefix(self) -> Prefix:
        rnd = self._random
        # Many are nested: of an address that another one was made of.
        nested = len(self._recent) > 10 and rnd.random() < 0.2
        address = rnd.choice(self._recent) if nested else self._address(rnd.choice((Family.IPV4, Family.IPV6)))
        self._recent = [*self._recent[-50:], address]
        family, bits = (Family.IPV4, 32) if len(address) == 4 else (Family.IPV6, 128)
        length = rnd.choice((bits, rnd.randrange(bits + 1), rnd.randrange(bits // 4, bits + 1), bits // 4 * 3))
        shift = bits - length
        return Prefix(family, (int.from_bytes(address, "big") >> shift << shift).to_bytes(bits // 8, "big"), length)


def _entry(prefix: Prefix, verdict: Verdict) -> Entry:
    return Entry(prefix, verdict, Origin.OPERATOR)


def decide(view: View, listed: Verdict | None, default: Verdict, enforce: bool) -> Outcome:
    """The outcome that the documents promise."""
    if view.family is Family.OTHER:
        return Outcome.UNREADABLE_DROPPED if enforce and "vlan_depth" in view.anomalies else Outcome.NO_SOURCE
    verdict = listed or default
    if verdict is Verdict.ALLOW:
        return Outcome.ALLOWED if listed else Outcome.DEFAULT_ALLOWED
    if verdict is Verdict.LOG:
        return Outcome.DEFAULT_LOGGED
    if not enforce:
        return Outcome.DENIED_PASSED if listed else Outcome.DEFAULT_DENIED_PASSED
    if view.essential == "always":
        return Outcome.ESSENTIAL_PASSED
    if listed:
        return Outcome.DENIED_DROPPED
    failsafe = {6: abi.PORT_TCP_FAILSAFE, 17: abi.PORT_UDP_FAILSAFE}.get(view.protocol, 0)
    if view.essential or (view.ports and _PORT_FLAGS.get(view.ports[1], 0) & failsafe):
        return Outcome.ESSENTIAL_PASSED
    return Outcome.DEFAULT_DENIED_DROPPED


def _talker_port(view: View) -> int:
    if view.icmp:
        return view.icmp[0] + 1
    if not view.ports:
        return 0
    port = view.ports[1]
    listens = abi.PORT_UDP_LISTENS if view.protocol == 17 else abi.PORT_TCP_LISTENS
    ephemeral = _EPHEMERAL[0] <= port <= _EPHEMERAL[1]
    return _EPHEMERAL[0] if ephemeral and not _PORT_FLAGS.get(port, 0) & listens else port


# Running and comparing


class _TestRun(c.Structure):
    """The part of union bpf_attr that BPF_PROG_TEST_RUN has."""

    _fields_ = [
        ("prog_fd", c.c_uint32), ("retval", c.c_uint32), ("data_size_in", c.c_uint32), ("data_size_out", c.c_uint32),
        ("data_in", c.c_uint64), ("data_out", c.c_uint64), ("repeat", c.c_uint32), ("duration", c.c_uint32), ("ctx_size_in", c.c_uint32),
        ("ctx_size_out", c.c_uint32), ("ctx_in", c.c_uint64), ("ctx_out", c.c_uint64), ("flags", c.c_uint32), ("cpu", c.c_uint32),
        ("batch_size", c.c_uint32), ("pad", c.c_uint32),
    ]  # fmt: skip


_SYS_BPF, _BPF_PROG_TEST_RUN = 321, 10


class _Runner:
    """Runs single frames, with as little as possible done for each."""

    def __init__(self) -> None:
        self._call = c.CDLL(None, use_errno=True).syscall
        self._context = (c.c_uint32 * 6)(0, 0, 0, LOOPBACK, 0, 0)
        self._attr = _TestRun(repeat=1, ctx_size_in=c.sizeof(self._context), ctx_in=c.addressof(self._context))
        self._arguments = (c.c_long(_SYS_BPF), c.c_long(_BPF_PROG_TEST_RUN), c.byref(self._attr), c.c_long(c.sizeof(self._attr)))

    def actions(self, program: int, frames: list[bytes]) -> list[int]:
        attr, context, call, arguments = self._attr, self._context, self._call, self._arguments
        attr.prog_fd = program
        together = b"".join(frames)
        at = c.cast(c.c_char_p(together), c.c_void_p).value or 0
        taken = []
        for frame in frames:
            size = len(frame)
            # The kernel writes the size out to where it looks for how much may be written next time.
            attr.data_in, attr.data_size_in, attr.data_size_out, context[1] = at, size, 0, size
            while call(*arguments):
                if c.get_errno() != 4:  # EINTR: a signal may end a run before it ran
                    raise OSError(c.get_errno(), os.strerror(c.get_errno()))
            taken.append(attr.retval)
            at += size
        return taken


_Key = tuple[bytes, int, int, int]
"""Of a talker: source, family, protocol, port."""


class _Judge:
    """One process' share."""

    def __init__(self, datapath: Datapath, seed: int):
        self._datapath = datapath
        self._frames, self._lists, self._runner = _Frames(seed), _Lists(seed), _Runner()
        self._random = random.Random(seed)
        self._default, self._enforce = Verdict.LOG, True
        self.packets = self.differences = self.policies = 0
        self.told: list[str] = []

    def run(self, packets: int) -> None:
        number = 0
        while self.packets < packets:
            self._change_policy(whole=number % 4 == 0)
            self._batch(min(_BATCH, packets - self.packets), ethernet=number % 8 != 7)
            number += 1

    def _change_policy(self, whole: bool) -> None:
        before = self._lists.policy
        if whole:
            self._lists.replace()
            self._enforce = self._random.random() < 0.8
            self._datapath.control.take_slot(LOOPBACK, enforce=self._enforce)
        else:
            self._lists.change()
        self._default = self._random.choice((Verdict.ALLOW, Verdict.LOG, Verdict.DENY, Verdict.DENY))
        touched = difference(before, self._lists.policy).touched
        self._datapath.apply_policy(self._lists.policy, touched, self._default)
        self.policies += 1

    def _batch(self, count: int, ethernet: bool) -> None:
        frames = list(self._frames.make(count, self._lists.pool, ethernet=ethernet))
        expected: list[Outcome] = []
        totals: Counter[tuple[int, int, int]] = Counter()
        sizes: Counter[tuple[int, int, int]] = Counter()
        anomalies: Counter[str] = Counter()
        talkers: dict[_Key, list[int]] = {}
        for frame in frames:
            view = reference.read(frame, ethernet=ethernet)
            size, family = len(frame), view.family
            outcome = decide(view, self._lists.verdict(view.source) if family else None, self._default, self._enforce)
            expected.append(outcome)
            cell = (_FAMILY[family], view.protocol_class, outcome)
            totals[cell] += 1
            sizes[cell] += size
            if view.anomalies:
                anomalies.update(view.anomalies)
            if family:
                sums = talkers.setdefault((view.source.ljust(16, b"\0"), family, view.protocol, _talker_port(view)), [0, 0, 0])
                sums[0] += 1
                sums[1] += size
                sums[2] += view.tcp_flags & 0x12 == 0x02
        before, counted = self._datapath.tallies(), self._datapath.counters.totals()
        actions = self._runner.actions(self._datapath.loaded.program("xdpmond" if ethernet else "xdpmond_ip"), frames)
        after, counted = self._datapath.tallies(), self._datapath.counters.totals() - counted

        for frame, action, outcome in zip(frames, actions, expected, strict=True):
            if action != (libbpf.XDP_DROP if outcome in _DROPPED else libbpf.XDP_PASS):
                self._differ(1, f"action {action}, not of {outcome.name}: {frame.hex()}")
        wanted = np.zeros_like(counted)
        for (family_number, class_, of), packets in totals.items():
            wanted[_SLOT, family_number, class_, of] = packets, sizes[family_number, class_, of]
        self._compare("totals", counted, wanted)
        found = {name: number - before.anomalies[name] for name, number in after.anomalies.items() if number != before.anomalies[name]}
        if found != dict(anomalies):
            self._differ(1, f"anomalies {found}, not {dict(anomalies)}")
        lost = after.evicted.packets + after.untracked.packets - before.evicted.packets - before.untracked.packets
        self._compare_talkers(talkers, lost)
        self.packets += len(frames)

    def _compare(self, what: str, found: np.ndarray, wanted: np.ndarray) -> None:
        places = np.argwhere(found != wanted)
        if len(places):
            self._differ(
                int(np.abs(found - wanted).max()),
                f"{what} at {places.tolist()}: {found[found != wanted]}, not {wanted[found != wanted]}",
            )

    def _compare_talkers(self, wanted: dict[_Key, list[int]], lost: int) -> None:
        """Talkers that lost their entry are missing or have less, by as much as the tallies say."""
        rows = self._datapath.close_window().rows
        sources = rows["source"].tobytes()
        keys = [sources[at : at + 16] for at in range(0, len(sources), 16)]
        found = dict(zip(
            zip(keys, rows["family"].tolist(), rows["protocol"].tolist(), rows["port"].tolist(), strict=True),
            map(list, zip(rows["packets"].tolist(), rows["bytes"].tolist(), rows["syns"].tolist(), strict=True)),
            strict=True,
        ))  # fmt: skip
        if not lost:
            wrong = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
        else:
            wrong = [key for key, sums in found.items() if key not in wanted or any(a > b for a, b in zip(sums, wanted[key], strict=True))]
            missing = sum(sums[0] for sums in wanted.values()) - sum(sums[0] for sums in found.values())
            if missing != lost:
                self._differ(abs(missing - lost), f"{missing} packets are in no talker, {lost} are told as evicted or untracked")
        if wrong:
            self._differ(len(wrong), f"talkers {[(key, found.get(key), wanted.get(key)) for key in wrong[:_TOLD]]} (found, wanted)")

    def _differ(self, number: int, description: str) -> None:
        self.differences += number
        if len(self.told) < _TOLD:
            self.told.append(description)


_FAMILY = {Family.OTHER: 0, Family.IPV4: abi.FAMILY_IPV4, Family.IPV6: abi.FAMILY_IPV6}
_DROPPED = (Outcome.DENIED_DROPPED, Outcome.DEFAULT_DENIED_DROPPED, Outcome.UNREADABLE_DROPPED)
_SLOT = 0


def _main() -> None:
    cpu, packets = int(sys.argv[1]), int(sys.argv[2])
    # A table of talkers on every other CPU, and one of flows.
    config = Config(flows=Flows(enable=cpu % 2 == 1))
    with pinned(cpu, alone=False), shipped_datapath(config) as datapath:
        datapath.control.set_ephemeral(*_EPHEMERAL)
        datapath.control.set_ports(_PORT_FLAGS)
        judge = _Judge(datapath, seed=cpu + 1)
        judge.run(packets)
        check_books(datapath)
    print(json.dumps({"packets": judge.packets, "differences": judge.differences, "policies": judge.policies, "told": judge.told}))


if __name__ == "__main__":
    _main()
