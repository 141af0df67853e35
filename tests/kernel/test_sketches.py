"""The sketches of the packet path: the registers are what the hashes of the sources make them, in the half of the right window."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP

from tests.sketching import observe
from xdpmond.kernel import abi
from xdpmond.kernel.sketchtable import Key, SketchTable, ports_of_interest
from xdpmond.model import Family, Port, PortRange, Verdict
from xdpmond.rows import count_of
from xdpmond.sketches import OVERALL_CELLS, PORT_PAIRS, Sketches, estimate

from .harness import Harness
from .packets import MAC, random_sources, tcp

TABLES = {"sets": 4}
"""Room for 16 talkers."""
BOTH_KINDS = True


@pytest.fixture
def quiet(datapath: Harness) -> Harness:
    """Windows of its own for the test, and no port with a sketch, nor one that had one lately."""
    datapath.default(Verdict.ALLOW)
    datapath.sketches.assign([], datapath.control.window)
    datapath.close_window()
    datapath.close_window()
    return datapath


def assign(datapath: Harness, *keys: Key) -> None:
    """As if in the window before, so that it holds for this one."""
    datapath.sketches.assign(keys, datapath.control.window, idle=True)


def running(datapath: Harness) -> Sketches:
    return datapath.sketches.read(datapath.control.window)


def hashes(datapath: Harness, sources: Iterable[str]) -> np.ndarray:
    """`sketch_source` once more."""
    seed = [np.uint64(number) for number in datapath.control.block["seed"]]
    found = []
    for source in sources:
        address = ipaddress.ip_address(source)
        low, high = np.frombuffer(address.packed.ljust(16, b"\0"), "u8")
        family = abi.FAMILY_IPV4 if address.version == 4 else abi.FAMILY_IPV6
        hash = seed[3]
        for word, multiplier in ((low, seed[1]), (high, seed[2]), (np.uint64(family), seed[0])):
            hash = np.uint64(int(hash ^ word) * int(multiplier) % 2**64)
            hash ^= hash >> np.uint64(32)
        found.append(hash)
    return np.array(found, "u8")


def told(datapath: Harness, *sources: str) -> int:
    """What a sketch of these sources says. Two of them may share a register: which ones, the seeds decide."""
    cells = Sketches.empty().cells[:OVERALL_CELLS]
    observe(cells, hashes(datapath, sources))
    return estimate(cells)


def test_every_register(quiet: Harness) -> None:
    """Of many more sources than the table has room for: most are untracked or evicted, and each has left its mark."""
    ipv4, ipv6 = random_sources(2000, seed=11), [f"2001:db8:{number:x}::{number * 77 % 65536:x}" for number in range(300)]
    assign(quiet, (6, 443), (6, 22))
    for source in [*ipv4, *ipv6, *ipv4[:100]]:
        quiet.send(tcp(source))
    sketches = running(quiet)
    wanted = Sketches.empty().cells
    pair = 2 * OVERALL_CELLS + 2 * sketches.ports[6, 443]
    for family, sources in enumerate((ipv4, ipv6)):
        observe(wanted[OVERALL_CELLS * family : OVERALL_CELLS * (family + 1)], hashes(quiet, sources))
        observe(wanted[pair + family], hashes(quiet, sources))
    assert (sketches.cells == wanted).all()
    assert sketches.unique(Family.IPV4) == pytest.approx(2000, rel=5 * Sketches.UNIQUE_ERROR)
    assert sketches.of_port(Family.IPV6, 6, 443) == pytest.approx(300, rel=5 * Sketches.ERROR)
    assert (sketches.of_port(Family.IPV4, 6, 22), sketches.of_port(Family.IPV4, 17, 443)) == (0, None)
    assert len(quiet.running()) <= 16


def test_the_port_is_that_of_the_protocol(quiet: Harness) -> None:
    """UDP, SCTP and ICMP by type have sketches of their own; ICMP and ICMPv6 are of one family each."""
    ip, ipv6 = IP(src="198.51.100.7", dst="192.0.2.1"), IPv6(src="2001:db8::7", dst="2001:db8::1")
    frames = {
        (Family.IPV4, 17, 53): ip / UDP(dport=53),
        (Family.IPV4, 132, 53): ip / SCTP(dport=53),
        (Family.IPV4, 1, 9): ip / ICMP(type=8),
        (Family.IPV4, 1, 256): ip / ICMP(type=255),
        (Family.IPV6, 58, 129): ipv6 / ICMPv6EchoRequest(),
        (Family.IPV6, 17, 65535): ipv6 / UDP(dport=65535),
    }
    keys = {key[1:] for key in frames} | {(6, 53), (6, 9), (17, 9), (132, 9), (1, 129), (58, 9), (132, 65535)}
    assign(quiet, *keys)
    for frame in frames.values():
        quiet.send(bytes(Ether(**MAC) / frame))
    sketches = running(quiet)
    said = {(family, *key) for family in (Family.IPV4, Family.IPV6) for key in keys if sketches.of_port(family, *key)}
    assert said == set(frames), "a type of ICMP shares its pair with the same one of ICMPv6, and each has its cell"


def test_a_known_talker_costs_nothing(quiet: Harness) -> None:
    """What it does not write, it did not look at: only the first packet in a window does."""
    frame = tcp("198.51.100.7")
    for _ in range(3):
        quiet.send(frame)
        assert running(quiet).unique(Family.IPV4) == 1
        quiet.sketches.clear(quiet.control.window)
        for _ in range(5):
            quiet.send(frame)
        assert not running(quiet).cells.any()
        quiet.close_window()


def test_each_window_has_its_own(quiet: Harness) -> None:
    sources = random_sources(12, seed=12)
    for window in range(6):
        for source in sources[window : window + 3]:
            quiet.send(tcp(source))
        closed = quiet.control.close_window()
        quiet.send(tcp(sources[0]))  # before it is read
        assert quiet.sketches.read(closed).unique(Family.IPV4) == told(quiet, *sources[window : window + 3])
        assert running(quiet).unique(Family.IPV4) == told(quiet, sources[0]) == 1
        both = running(quiet) | quiet.sketches.read(closed)
        assert both.unique(Family.IPV4) == told(quiet, sources[0], *sources[window : window + 3])
        count = count_of(quiet.talkers.read_closed(closed))
        quiet.control.window_read(closed, count.packets, count.bytes)
        quiet.sketches.clear(closed)
        quiet.close_window()
    assert not quiet.sketches.read(0).cells.any() and not quiet.sketches.read(1).cells.any()


def test_what_a_new_process_finds(quiet: Harness) -> None:
    """The running window goes on. Since when a port has a sketch is not known, so nothing is said of it before the next window."""
    assign(quiet, (6, 443))
    quiet.send(tcp("198.51.100.7"))
    window = quiet.control.window
    after = SketchTable(quiet.loaded.maps, window, reading=False)
    assert after.read(window).unique(Family.IPV4) == 1
    assert after.read(window).of_port(Family.IPV4, 6, 443) is None
    assert after.read(window + 1).ports == running(quiet).ports
    # A closed window that waits is still there; what was left of one that was read is not.
    after = SketchTable(quiet.loaded.maps, window + 1, reading=True)
    assert after.read(window).unique(Family.IPV4) == 1
    after = SketchTable(quiet.loaded.maps, window + 1, reading=False)
    assert after.read(window).unique(Family.IPV4) == 0


def test_a_port_that_comes_later(quiet: Harness) -> None:
    """Some of its sources may have been seen before: the first whole window is the next."""
    window = quiet.control.window
    quiet.sketches.assign([(6, 443)], window)
    quiet.send(tcp("198.51.100.7"))
    assert running(quiet).of_port(Family.IPV4, 6, 443) is None
    quiet.close_window()
    quiet.send(tcp("198.51.100.7"))
    assert running(quiet).of_port(Family.IPV4, 6, 443) == 1


def test_a_pair_is_not_given_on_with_what_it_holds(quiet: Harness) -> None:
    first = [(6, 1000 + number) for number in range(PORT_PAIRS)]
    assign(quiet, *first)
    for _, port in first:
        quiet.send(tcp("198.51.100.7", port))
    second = [(17, port) for _, port in first]
    quiet.sketches.assign(second, quiet.control.window)
    assert running(quiet).ports == {}
    quiet.close_window()
    quiet.sketches.assign([*second, (6, 1)], quiet.control.window)
    quiet.close_window()
    sketches = running(quiet)
    assert set(sketches.ports) == set(second), "the first ones, as many as there is room for"
    assert len(set(sketches.ports.values())) == PORT_PAIRS
    assert not any(sketches.of_port(Family.IPV4, *key) for key in second)
    quiet.sketches.assign([], quiet.control.window)


def test_registers_are_estimated_as_the_packet_path_filled_them(quiet: Harness) -> None:
    """A rank is of the 50 upper bits."""
    for source in random_sources(500, seed=13):
        quiet.send(tcp(source))
    cells = running(quiet).cells[:OVERALL_CELLS]
    assert cells.max() < 51 and estimate(cells) == running(quiet).unique(Family.IPV4)


@pytest.mark.parametrize(
    ("ports", "first"),
    [
        ((), [(6, 22), (17, 500), (6, 80), (6, 443), (17, 53)]),
        ((PortRange(6, 443, 443), PortRange(17, 1, 65535)), [(6, 443), (6, 22), (17, 500), (6, 80), (17, 53), (17, 1), (17, 2)]),
        ((PortRange(None, 9, 9),), [(6, 9), (17, 9), (132, 9), (6, 22)]),
        ((PortRange(58), PortRange(1), PortRange(89)), [(6, 22), (17, 500), (6, 80), (6, 443), (17, 53), (58, 129), (1, 9), (58, 1)]),
        ((PortRange(132, 65534),), [(6, 22), (17, 500), (6, 80), (6, 443), (17, 53), (132, 65534), (132, 65535)]),
    ],
)
def test_ports_of_interest(ports: tuple[PortRange, ...], first: list[Key]) -> None:
    flags = {80: abi.PORT_TCP_LISTENS, 443: abi.PORT_TCP_LISTENS, 53: abi.PORT_UDP_LISTENS, 22: abi.PORT_TCP_FAILSAFE}
    found = list(dict.fromkeys(ports_of_interest(ports, (Port("tcp", 22), Port("udp", 500)), flags)))
    assert found[: len(first)] == first
    assert all(port for _, port in found)
