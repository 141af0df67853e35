"""Restart without a gap: a stream of packets runs while the daemon goes and comes, and the front door stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from .conftest import NEXT, Packages, version
from .machine import ATTACKER, VISITOR, Machine, wait_for
from .traffic import Stream, datagrams

DENIED = ("203.0.113.0/24", "2001:db8:bad::/48")
ALLOWED = ("192.0.2.0/24", "2001:db8:2::/48")
SOURCES = (ATTACKER[4], VISITOR[4], ATTACKER[6], VISITOR[6])


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the daemon says of the prefixes that only the stream uses."""

    packets: dict[str, int]
    dropped: int
    books: dict[str, Any]
    program: int | None
    link: int

    @classmethod
    def of(cls, machine: Machine) -> Ledger:
        status, entries = machine.status(), machine.entries()
        return cls(
            packets={prefix: entries[prefix]["packets"] for prefix in DENIED + ALLOWED},
            dropped=status["totals"]["dropped"]["packets"],
            books=status["books"],
            program=machine.program(),
            link=status["interfaces"][0]["link_id"],
        )


@pytest.fixture(scope="module", autouse=True)
def front_door(machine: Machine) -> Iterator[None]:
    machine.ctl("deny", *DENIED, "--for", "2h")
    machine.ctl("allow", *ALLOWED)
    machine.ctl("mode", "enforce")
    yield


def assert_no_gap(before: Ledger, after: Ledger, stream: Stream) -> None:
    """Not one denied packet got in, every allowed one did, and each is counted, once."""
    assert {source: stream.received[source] for source in SOURCES} == {
        ATTACKER[4]: 0, ATTACKER[6]: 0, VISITOR[4]: stream.sent[VISITOR[4]], VISITOR[6]: stream.sent[VISITOR[6]],
    }  # fmt: skip
    counted = {prefix: after.packets[prefix] - before.packets[prefix] for prefix in DENIED + ALLOWED}
    assert counted == {
        DENIED[0]: stream.sent[ATTACKER[4]], DENIED[1]: stream.sent[ATTACKER[6]],
        ALLOWED[0]: stream.sent[VISITOR[4]], ALLOWED[1]: stream.sent[VISITOR[6]],
    }  # fmt: skip
    assert after.dropped - before.dropped == stream.sent[ATTACKER[4]] + stream.sent[ATTACKER[6]]
    assert after.books["balanced"], after.books
    assert (after.program, after.link) == (before.program, before.link)


def answering(machine: Machine) -> bool:
    return machine.ctl("status", check=False).returncode == 0


def replaced(machine: Machine, pid: int) -> bool:
    """Is another daemon up, and does it answer?"""
    facts = machine.unit("ActiveState", "MainPID")
    return facts["ActiveState"] == "active" and int(facts["MainPID"]) not in (0, pid) and answering(machine)


def test_systemctl_restart(machine: Machine) -> None:
    before, pid = Ledger.of(machine), machine.main_pid()
    with Stream(machine, SOURCES, 8001) as stream:
        machine.run("systemctl", "restart", "xdpmond")
        wait_for("the new daemon", lambda: replaced(machine, pid))
        stream.flow()
    assert_no_gap(before, Ledger.of(machine), stream)


def test_kill_nine(machine: Machine) -> None:
    before = Ledger.of(machine)
    with Stream(machine, SOURCES, 8002) as stream:
        for _ in range(2):
            pid = machine.main_pid()
            machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "xdpmond")
            wait_for("the new daemon", partial(replaced, machine, pid))
            stream.flow()
    assert_no_gap(before, Ledger.of(machine), stream)


def test_a_crash_loop_does_not_end_detached(machine: Machine) -> None:
    before, restarts = Ledger.of(machine), int(machine.unit("NRestarts")["NRestarts"])
    dropin = "/etc/systemd/system/xdpmond.service.d/crash.conf"
    machine.write(dropin, "[Service]\nExecStart=\nExecStart=/bin/false\nRestartSec=100ms\n")
    machine.run("systemctl", "daemon-reload")
    with Stream(machine, SOURCES, 8003) as stream:
        machine.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "xdpmond")
        wait_for("ten failed starts", lambda: int(machine.unit("NRestarts")["NRestarts"]) >= restarts + 10)
        assert machine.program() == before.program
        machine.run("rm", dropin)
        machine.run("systemctl", "daemon-reload")
        wait_for("the daemon", lambda: machine.unit("ActiveState")["ActiveState"] == "active" and answering(machine))
        stream.flow()
    assert_no_gap(before, Ledger.of(machine), stream)


def test_a_broken_configuration_at_start_leaves_the_filter_on(machine: Machine) -> None:
    before = Ledger.of(machine)
    dropin = "/etc/xdpmond/xdpmond.toml.d/broken.toml"
    machine.write(dropin, "this is not TOML\n")
    with Stream(machine, SOURCES, 8004) as stream:
        machine.run("systemctl", "restart", "xdpmond", check=False)
        stream.flow()
        assert machine.program() == before.program
        machine.run("rm", dropin)
        wait_for("the daemon", lambda: machine.unit("ActiveState")["ActiveState"] == "active" and answering(machine))
        stream.flow()
    assert_no_gap(before, Ledger.of(machine), stream)


def test_a_daemon_that_hangs_is_replaced(machine: Machine) -> None:
    before = Ledger.of(machine)
    dropin = "/etc/systemd/system/xdpmond.service.d/watchdog.conf"
    machine.write(dropin, "[Service]\nWatchdogSec=2s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "xdpmond")
    pid = machine.main_pid()
    with Stream(machine, SOURCES, 8007) as stream:
        machine.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", "xdpmond")
        wait_for("the new daemon", lambda: replaced(machine, pid))
    assert any("atchdog" in entry["MESSAGE"] for entry in machine.journal("-n", "50"))
    machine.run("rm", dropin)
    machine.run("systemctl", "daemon-reload")
    assert_no_gap(before, Ledger.of(machine), stream)


def test_a_changed_program_is_swapped_on_the_same_link(machine: Machine) -> None:
    before, pid = Ledger.of(machine), machine.main_pid()
    dropin = "/etc/xdpmond/xdpmond.toml.d/ring.toml"
    machine.write(dropin, "[events]\nring_size = 524288\n")
    with Stream(machine, SOURCES, 8008) as stream:
        machine.run("systemctl", "restart", "xdpmond")
        wait_for("the new daemon", lambda: replaced(machine, pid))
        stream.flow()
    after = Ledger.of(machine)
    assert after.program not in (None, before.program)
    assert_no_gap(replace(before, program=after.program), after, stream)
    machine.run("rm", dropin)


def test_upgrade_to_a_higher_version(machine: Machine, packages: Packages) -> None:
    machine.run("systemctl", "restart", "xdpmond")
    before, pid = Ledger.of(machine), machine.main_pid()
    with Stream(machine, SOURCES, 8005) as stream:
        machine.install(packages.higher)
        wait_for("the new daemon", lambda: replaced(machine, pid))
        stream.flow()
    assert machine.status()["version"] == version() + NEXT
    assert_no_gap(before, Ledger.of(machine), stream)


def test_stop_detaches_and_start_has_the_bans_back(machine: Machine) -> None:
    expires = machine.entries()[DENIED[0]]["expires"]
    machine.run("systemctl", "stop", "xdpmond")
    assert machine.program() is None
    assert datagrams(machine, ATTACKER[4], 8006, 5) == 5
    machine.run("systemctl", "start", "xdpmond")
    assert datagrams(machine, ATTACKER[4], 8006, 5) == 0
    assert machine.entries()[DENIED[0]]["expires"] == expires
