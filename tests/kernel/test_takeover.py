"""The packet path over a restart of the daemon: what is kept, what is made anew, and that the numbers stay with their names."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
from collections.abc import Callable, Iterator

import pytest

from xdpmond.config import Config, Destination, Events, Flows, Tables
from xdpmond.errors import KernelError
from xdpmond.kernel import abi, libbpf, loader
from xdpmond.kernel.datapath import NOTHING_KEPT, Datapath, Kept
from xdpmond.kernel.links import LinkWatch
from xdpmond.kernel.tables import POLICY_MAPS
from xdpmond.model import AttachMode, Count, Family, Mode, Prefix, Verdict

from .harness import LOOPBACK, pinned
from .namespaces import Namespace, ip
from .packets import random_sources, tcp
from .plainpolicy import PlainPolicy

SMALL = Config(tables=Tables(talkers=1024, rule_counters=1024), events=Events(ring_size=65536))
LISTED = Prefix.parse("198.51.100.0/24")
FRAME = tcp("198.51.100.1", 22)
STRANGER = tcp("203.0.113.1", 22)


class Store:
    """A descriptor store: what it keeps are descriptors of its own."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def keep(self, name: str, fd: int) -> None:
        self.forget(name)
        self.kept[name] = os.dup(fd)

    def forget(self, name: str) -> None:
        if name in self.kept:
            os.close(self.kept.pop(name))

    def next_start(self) -> Kept:
        """What a process started now would find: descriptors of its own of the same objects."""
        return Kept.of((name, os.dup(fd)) for name, fd in self.kept.items())


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    for name in list(made.kept):
        made.forget(name)


@pytest.fixture
def start(store: Store) -> Iterator[Callable[..., Datapath]]:
    made: list[Datapath] = []

    def open_(config: Config = SMALL, *, again: bool = False) -> Datapath:
        made.append(Datapath.open(config, store.next_start() if again else NOTHING_KEPT, store))
        made[-1].control.take_slot(LOOPBACK, enforce=True)
        return made[-1]

    yield open_
    for datapath in made:
        datapath.close()


def send(datapath: Datapath, frame: bytes, repeat: int = 1) -> int:
    return libbpf.test_run(datapath.loaded.programs["xdpmond"], frame, repeat=repeat, ifindex=LOOPBACK).action


def test_the_same_build_goes_on_with_the_same_program(start: Callable[..., Datapath]) -> None:
    before = start()
    before.apply_policy(PlainPolicy({LISTED: Verdict.DENY}), None, Verdict.LOG)
    send(before, FRAME, 5)
    after = start(again=True)
    assert libbpf.program_id(after.loaded.programs["xdpmond"]) == libbpf.program_id(before.loaded.programs["xdpmond"])
    assert after.took_over and not before.took_over
    # The policy holds before the daemon has applied its own, which may be another one.
    assert (send(after, FRAME), send(after, STRANGER)) == (libbpf.XDP_DROP, libbpf.XDP_PASS)
    after.apply_policy(PlainPolicy({LISTED: Verdict.ALLOW}), None, Verdict.DENY)
    assert (send(after, FRAME), send(after, STRANGER)) == (libbpf.XDP_PASS, libbpf.XDP_DROP)


def test_no_compiler_is_needed_for_what_was_kept(start: Callable[..., Datapath], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for tables of another size, which make another program of the same text."""
    before = start()
    monkeypatch.setattr(loader, "compile_code", None)
    start(again=True)
    after = start(dataclasses.replace(SMALL, tables=dataclasses.replace(SMALL.tables, talkers=2048)), again=True)
    assert libbpf.program_id(after.loaded.programs["xdpmond"]) != libbpf.program_id(before.loaded.programs["xdpmond"])


def test_a_program_on_other_maps_is_not_taken_for_ours(start: Callable[..., Datapath], store: Store) -> None:
    """As when the daemon died while it moved the policy."""
    before = start()
    shared = {name: fd for name, fd in before.loaded.maps.items() if name not in POLICY_MAPS}
    other = loader.load(before.build, shared, code=before.loaded.code)
    for name, fd in other.programs.items():
        store.keep(f"prog-{name}", fd)
    after = start(again=True)
    loader.close([*other.programs.values(), *(other.maps[name] for name in POLICY_MAPS)])
    assert libbpf.program_maps(after.loaded.programs["xdpmond"]) == libbpf.program_maps(before.loaded.programs["xdpmond"])


MANY = {Prefix.parse(f"11.{number >> 8}.{number & 255}.0/30"): Verdict.DENY for number in range(20_000)} | {LISTED: Verdict.DENY}


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_policy_that_outgrows_its_maps_moves(start: Callable[..., Datapath], store: Store) -> None:
    datapath = start()
    datapath.apply_policy(PlainPolicy({LISTED: Verdict.DENY}), None, Verdict.LOG)
    send(datapath, FRAME, 3)
    # Its talker's entry remembers that it passes.
    assert send(datapath, tcp("11.0.7.2", 80)) == libbpf.XDP_PASS
    size, program = datapath.rules.size, libbpf.program_id(datapath.loaded.programs["xdpmond"])
    opened = descriptors()
    datapath.apply_policy(PlainPolicy(MANY), None, Verdict.ALLOW)
    datapath.rules.settle()
    assert descriptors() == opened
    assert datapath.rules.size.buckets4 > size.buckets4
    assert libbpf.program_id(datapath.loaded.programs["xdpmond"]) != program
    for frame in (FRAME, tcp("11.0.7.2", 80), tcp("11.78.31.3", 80)):
        assert send(datapath, frame) == libbpf.XDP_DROP
    assert send(datapath, tcp("11.0.7.4", 80)) == send(datapath, STRANGER) == libbpf.XDP_PASS
    assert datapath.tallies().sourced == Count(9, 9 * len(FRAME))
    # Changes go on, the next daemon finds what it needs, and what has become small gets small maps again.
    few = {prefix: verdict for prefix, verdict in MANY.items() if prefix != LISTED}
    datapath.apply_policy(PlainPolicy(few), [LISTED], Verdict.ALLOW)
    assert send(datapath, FRAME) == libbpf.XDP_PASS
    after = start(again=True)
    assert after.rules.size == datapath.rules.size
    assert libbpf.program_id(after.loaded.programs["xdpmond"]) == libbpf.program_id(datapath.loaded.programs["xdpmond"])
    assert send(after, tcp("11.0.7.2", 80)) == libbpf.XDP_DROP


def test_a_move_that_fails_changes_nothing(start: Callable[..., Datapath], monkeypatch: pytest.MonkeyPatch) -> None:
    datapath = start()
    datapath.loaded.program(loader.IP)  # there are two programs to be loaded anew
    datapath.apply_policy(PlainPolicy({LISTED: Verdict.DENY}), None, Verdict.LOG)
    before = dict(datapath.loaded.maps), dict(datapath.loaded.programs), datapath.rules.size
    opened = descriptors()
    for broken in ("load_xdp", "create_map"):
        with monkeypatch.context() as context:
            real, calls = getattr(libbpf, broken), []

            def failing(*arguments: object, real: object = real, calls: list[int] = calls, **named: object) -> int:
                calls.append(1)
                if len(calls) == 2:
                    raise libbpf.kernel_error(errno.ENOMEM, "no")
                return real(*arguments, **named)  # type: ignore[operator, no-any-return]

            context.setattr(libbpf, broken, failing)
            with pytest.raises(KernelError):
                datapath.apply_policy(PlainPolicy(MANY), None, Verdict.DENY)
        assert (datapath.loaded.maps, datapath.loaded.programs, datapath.rules.size) == before
        assert (send(datapath, FRAME), send(datapath, STRANGER)) == (libbpf.XDP_DROP, libbpf.XDP_PASS)
        assert descriptors() == opened
    datapath.apply_policy(PlainPolicy(MANY), None, Verdict.DENY)
    assert send(datapath, STRANGER) == libbpf.XDP_DROP


def test_maps_that_are_too_large_and_cannot_be_changed(start: Callable[..., Datapath], monkeypatch: pytest.MonkeyPatch) -> None:
    """What has become small goes into them: a list is not refused for what would only save memory."""
    datapath = start()
    many = {Prefix.parse(f"11.{number >> 8 & 255}.{number & 255}.{number >> 16}/32"): Verdict.DENY for number in range(600_000)}
    datapath.apply_policy(PlainPolicy(many), None, Verdict.LOG)
    size = datapath.rules.size
    assert send(datapath, tcp("11.0.7.2")) == libbpf.XDP_DROP

    def failing(*arguments: object, **named: object) -> int:
        raise libbpf.kernel_error(errno.ENOMEM, "no")

    with monkeypatch.context() as context:
        context.setattr(libbpf, "load_xdp", failing)
        datapath.apply_policy(PlainPolicy({LISTED: Verdict.DENY}), None, Verdict.LOG)
    assert datapath.rules.size == size
    assert (send(datapath, tcp("11.0.7.2")), send(datapath, FRAME)) == (libbpf.XDP_PASS, libbpf.XDP_DROP)
    datapath.apply_policy(PlainPolicy({}), None, Verdict.LOG)
    assert datapath.rules.size.buckets4 < size.buckets4
    assert send(datapath, FRAME) == libbpf.XDP_PASS


def test_what_was_remembered_in_a_move_that_fails_half_way_is_forgotten(
    start: Callable[..., Datapath], namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that was on one link for a moment has judged by the new policy, under the number of the old one."""
    real, moved = libbpf.update_link, []

    def failing(link: int, program: int) -> None:
        moved.append(link)
        if len(moved) == 2:
            assert libbpf.test_run(program, tcp("11.0.7.2", 80), ifindex=LOOPBACK).action == libbpf.XDP_DROP
            raise libbpf.kernel_error(errno.ENOMEM, "no")
        real(link, program)

    def steps() -> None:
        ip("link", "add", "xm-kern-a", "type", "veth", "peer", "name", "xm-kern-b")
        watch = LinkWatch()
        links = watch.links()
        watch.close()
        datapath = start()
        for name in ("xm-kern-a", "xm-kern-b"):
            datapath.attach(links[name], Mode.ENFORCE, AttachMode.AUTO)
        datapath.apply_policy(PlainPolicy({LISTED: Verdict.DENY}), None, Verdict.LOG)
        monkeypatch.setattr(libbpf, "update_link", failing)
        with pytest.raises(KernelError):
            datapath.apply_policy(PlainPolicy(MANY), None, Verdict.LOG)
        assert len(moved) == 3, "two were updated, and the first one back"
        assert send(datapath, tcp("11.0.7.2", 80)) == libbpf.XDP_PASS

    namespace.call(steps)


def test_a_move_under_way_of_packets(start: Callable[..., Datapath], namespace: Namespace) -> None:
    """An attached program is exchanged: the link stays, and frames that arrive meet the new policy."""

    def steps() -> None:
        ip("link", "add", "xm-kern-a", "type", "veth", "peer", "name", "xm-kern-b")
        watch = LinkWatch()
        link = watch.links()["xm-kern-a"]
        watch.close()
        datapath = start()
        attachment = datapath.attach(link, Mode.ENFORCE, AttachMode.AUTO)
        before = libbpf.link_info(attachment.link)
        datapath.apply_policy(PlainPolicy(MANY), None, Verdict.LOG)
        after = libbpf.link_info(attachment.link)
        assert before[0] == after[0] and before[1] != after[1] == libbpf.program_id(datapath.loaded.programs["xdpmond"])
        assert datapath.is_attached("xm-kern-a")

    namespace.call(steps)


def test_the_program_for_ip_is_there_when_it_is_needed(start: Callable[..., Datapath], store: Store, namespace: Namespace) -> None:
    """Few hosts have links whose frames start with the IP header. Who has one has the program on it after a move of the policy, after a
    restart, and after a restart with another text."""

    def stored() -> int:
        return libbpf.program_id(store.kept["prog-xdpmond_ip"])

    def steps() -> None:
        ip("tuntap", "add", "xm-kern-t", "mode", "tun")
        ip("link", "set", "xm-kern-t", "up")
        watch = LinkWatch()
        present = watch.links()
        watch.close()
        datapath = start()
        assert set(datapath.loaded.programs) == {"xdpmond"} and "prog-xdpmond_ip" not in store.kept
        attached = datapath.attach(present["xm-kern-t"], Mode.MONITOR, AttachMode.AUTO)
        link, first, _ = libbpf.link_info(attached.link)
        assert first == stored()
        datapath.apply_policy(PlainPolicy(MANY), None, Verdict.LOG)
        moved = libbpf.link_info(attached.link)[1]
        assert moved == stored() != first
        wanted = {"xm-kern-t": (Mode.MONITOR, AttachMode.AUTO)}
        for config, replaced in ((SMALL, []), (WITH_FLOWS, ["xm-kern-t"])):
            kept = store.next_start()
            after = Datapath.open(config, kept, store)
            try:
                number = int(after.control.block["moment"]) % abi.POLICY_NUMBERS
                assert after.adopt_links(kept.links, present, wanted) == replaced
                # What the program before remembers of the policy, nobody does.
                assert int(after.control.block["moment"]) % abi.POLICY_NUMBERS == number + 2 * len(replaced)
                assert libbpf.link_info(after.attachments["xm-kern-t"].link)[:2] == (link, stored())
            finally:
                after.close()
        assert stored() != moved

    namespace.call(steps)


LARGER = dataclasses.replace(SMALL, tables=dataclasses.replace(SMALL.tables, talkers=2048))
WITH_FLOWS = dataclasses.replace(SMALL, flows=Flows(enable=True))


@pytest.mark.parametrize(
    ("first", "second"), [(SMALL, LARGER), (SMALL, WITH_FLOWS), (WITH_FLOWS, SMALL)], ids=["larger", "flows", "no flows"]
)
def test_what_an_old_table_held_unread_is_entered_when_it_is_another_one(
    start: Callable[..., Datapath], first: Config, second: Config
) -> None:
    before = start(first)
    send(before, FRAME, 10)
    before.close_window()
    send(before, FRAME, 7)
    after = start(second, again=True)
    assert after.lost_rows
    after.adopt_links((), {}, {})
    assert after.control.tracked == Count(17, 17 * len(FRAME))
    assert len(after.read_running()) == 0
    after.control.take_slot(LOOPBACK, enforce=True)
    send(after, FRAME, 3)
    closed = after.close_window()
    assert closed.rows["packets"].tolist() == [3]
    assert (closed.flows is None) if not second.flows.enable else closed.flows["packets"].tolist() == [3]
    assert after.control.tracked == Count(20, 20 * len(FRAME))


@pytest.mark.parametrize("second", [LARGER, WITH_FLOWS], ids=["larger", "flows"])
def test_the_old_program_does_its_work_until_it_is_replaced(start: Callable[..., Datapath], second: Config) -> None:
    """On every CPU: it shares with the new one what the daemon tells both, but not the table."""
    before = start()
    before.apply_policy(PlainPolicy({LISTED: Verdict.DENY}), None, Verdict.LOG)
    after = start(second, again=True)
    cpus = sorted(os.sched_getaffinity(0))
    for cpu in cpus:
        with pinned(cpu):
            assert (send(before, FRAME, 3), send(before, STRANGER, 2)) == (libbpf.XDP_DROP, libbpf.XDP_PASS)
    counted = Count(5 * len(cpus), 5 * len(cpus) * len(FRAME))
    tallies = after.tallies()
    assert (tallies.sourced, tallies.untracked, tallies.evicted) == (counted, Count(), Count())
    after.adopt_links((), {}, {})
    assert after.control.tracked == counted


@pytest.mark.parametrize(("first", "second"), [(SMALL, LARGER), (LARGER, SMALL)], ids=["larger", "smaller"])
def test_a_start_that_ends_early_loses_nothing_of_the_old_table(
    start: Callable[..., Datapath], store: Store, monkeypatch: pytest.MonkeyPatch, first: Config, second: Config
) -> None:
    """It has made maps of another size, which nobody has kept; the old one is in the store still."""
    before = start(first)
    sources = random_sources(300, seed=23)
    for source in sources:
        send(before, tcp(source))
    with monkeypatch.context() as context:
        context.setattr("xdpmond.kernel.datapath._replace", None)
        with pytest.raises(TypeError):
            start(second, again=True)
    after = start(second, again=True)
    after.adopt_links((), {}, {})
    tallies = after.tallies()
    sent = Count(len(sources), len(sources) * len(tcp("192.0.2.1")))
    assert (tallies.sourced, tallies.untracked) == (sent, Count())
    assert after.control.tracked + tallies.evicted == sent
    assert tallies.evictions < 10


def test_flows_go_on_over_a_restart(start: Callable[..., Datapath]) -> None:
    before = start(WITH_FLOWS)
    send(before, FRAME, 5)
    after = start(WITH_FLOWS, again=True)
    assert not after.lost_rows
    send(after, FRAME, 2)
    assert after.read_running_flows()["packets"].tolist() == [7]
    assert after.read_running_sketches().unique(Family.IPV4) == 1


def test_sketches_of_a_window_that_waits_are_not_lost(start: Callable[..., Datapath]) -> None:
    before = start()
    send(before, FRAME)
    before.control.close_window()  # and the process dies
    for frame in (FRAME, STRANGER):
        send(before, frame)
    after = start(again=True)
    assert [after.close_window().sketches.unique(Family.IPV4) for _ in range(3)] == [1, 2, 0]


def test_a_port_on_which_nobody_listens_has_a_sketch_when_many_reach_it(start: Callable[..., Datapath]) -> None:
    """More sources than the table holds, in three windows: of the third one the estimate is told."""
    datapath = start()
    datapath.control.set_ephemeral(32768, 60999)
    datapath.set_ports({})
    frames = [tcp(source, port) for source in random_sources(2000, seed=21) for port in (9999, 40000)]
    told = []
    for _ in range(3):
        with pinned(min(os.sched_getaffinity(0))):  # each CPU has a slice, which is to be too small
            for frame in frames:
                send(datapath, frame)
            for source in random_sources(20, seed=22):
                send(datapath, tcp(source, 22))
        closed = datapath.close_window()
        datapath.set_ports({})
        # 40000 is folded to the first ephemeral port.
        told.append([closed.sketches.of_port(Family.IPV4, 6, port) for port in (22, 9999, 32768, 1234)])
        assert len(closed.rows) < 1100
    assert told[:2] == [[pytest.approx(20, abs=2), None, None, None]] * 2
    assert told[2] == [pytest.approx(20, abs=2), pytest.approx(2000, rel=0.1), pytest.approx(2000, rel=0.1), None]


def test_packets_to_others_over_a_restart(start: Callable[..., Datapath]) -> None:
    """The addresses are kept as well, so that no packet finds none; and a start that wants them for the first time has none yet."""
    local = dataclasses.replace(SMALL, destination=Destination.LOCAL)
    before = start(local)
    before.set_addresses([(Family.IPV4, bytes([192, 0, 2, 1]))])
    send(before, FRAME)
    after = start(local, again=True)
    send(after, FRAME)
    assert (after.read_running()["packets"].tolist(), after.tallies().elsewhere) == ([2], Count())
    any_ = start(again=True)
    assert not any_.needs_addresses
    again = start(local, again=True)
    send(again, FRAME)
    assert again.tallies().elsewhere == Count(1, len(FRAME))


def test_a_window_that_was_not_read_before_a_crash_is_read_once(start: Callable[..., Datapath]) -> None:
    before = start()
    send(before, FRAME, 3)
    before.control.close_window()  # and the process dies
    send(before, FRAME, 2)
    after = start(again=True)
    assert [int(row["packets"]) for row in after.close_window().rows] == [3]
    assert after.control.tracked == Count(3, 3 * len(FRAME))
    assert [int(row["packets"]) for row in after.close_window().rows] == [2]
    assert after.control.tracked == Count(5, 5 * len(FRAME))


def test_a_move_when_an_interface_has_gone_or_a_link_refuses(
    start: Callable[..., Datapath], namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy goes on for the others; or, if one of them does not take the new program, is the old one on all of them."""

    def steps() -> None:
        for letter in "acd":
            ip("link", "add", f"xm-kern-{letter}", "type", "veth", "peer", "name", f"xm-kern-{letter}2")
        watch = LinkWatch()
        found = watch.links()
        watch.close()
        datapath = start()
        attached = [datapath.attach(found[f"xm-kern-{letter}"], Mode.ENFORCE, AttachMode.AUTO) for letter in "acd"]
        ip("link", "del", "xm-kern-a")

        def running() -> list[int]:
            return [libbpf.link_info(attachment.link)[1] for attachment in attached[1:]]

        def ours() -> list[int]:
            return [libbpf.program_id(datapath.loaded.programs["xdpmond"])] * 2

        real, calls, opened = libbpf.update_link, [], descriptors()

        def failing(link: int, program: int) -> None:
            calls.append(link)
            if len(calls) == 2:
                raise libbpf.kernel_error(errno.EBUSY, "no")
            real(link, program)

        before = ours()
        with monkeypatch.context() as context:
            context.setattr(libbpf, "update_link", failing)
            with pytest.raises(KernelError):
                datapath.apply_policy(PlainPolicy(MANY), None, Verdict.DENY)
        assert running() == ours() == before
        assert descriptors() == opened
        datapath.apply_policy(PlainPolicy(MANY), None, Verdict.DENY)
        assert running() == ours() != before

    namespace.call(steps)


def test_without_events_the_program_has_no_ring(start: Callable[..., Datapath]) -> None:
    datapath = start(dataclasses.replace(SMALL, events=Events(enable=False)))
    assert datapath.ring is None
    assert "events" not in datapath.loaded.maps
    assert send(datapath, STRANGER) == libbpf.XDP_PASS
