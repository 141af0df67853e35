"""The daemon in its place: what traffic, the administrator, the journal and another user see of it. The tests follow one another."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial

import pytest

from .machine import ATTACKER, PERMITTED, UNLISTED, VISITOR, Machine, wait_for
from .traffic import accepts, datagrams, frame_to

MANAGER = ("org.xdpmond1", "/org/xdpmond1", "org.xdpmond1.Manager")
MAIN = "/etc/xdpmond/xdpmond.toml"
DROPIN = "/etc/xdpmond/xdpmond.toml.d/test.toml"


def talker(machine: Machine, source: str, port: int) -> dict[str, object] | None:
    rows = machine.json("xdpmonctl", "top", "--json=short", "--limit=500", f"--port={port}")
    return next((row for row in rows if row["source"] == source), None)


@pytest.mark.parametrize("source", [PERMITTED[4], PERMITTED[6], UNLISTED[4], UNLISTED[6]])
def test_each_source_is_counted_by_port(machine: Machine, source: str) -> None:
    port = 7001
    assert datagrams(machine, source, port, 25) == 25
    row = wait_for("the talker", lambda: talker(machine, source, port))
    assert row["packets"] == 25
    assert row["verdict"] == ("allow" if source in PERMITTED.values() else "log")


def test_explain_tells_the_permitted_from_the_unlisted(machine: Machine) -> None:
    permitted = machine.json("xdpmonctl", "explain", PERMITTED[4], "--json=short")
    assert (permitted["verdict"], permitted["decided_by"]["prefix"]) == ("allow", "10.0.0.0/8")
    assert re.fullmatch(rf"{MAIN}:\d+", permitted["decided_by"]["source"])
    unlisted = machine.json("xdpmonctl", "explain", UNLISTED[4], "--json=short")
    assert (unlisted["verdict"], unlisted["decided_by"]) == ("log", None)


def test_deny_in_monitor_mode_drops_nothing(machine: Machine) -> None:
    machine.ctl("deny", ATTACKER[4], ATTACKER[6], "--reason", "a test")
    for family in (4, 6):
        assert machine.wire.ping(ATTACKER[family], count=3) == 3


def test_deny_in_enforce_mode_drops_real_packets(machine: Machine) -> None:
    machine.ctl("mode", "enforce")
    for family in (4, 6):
        assert machine.wire.ping(ATTACKER[family], count=3) == 0
        assert datagrams(machine, ATTACKER[family], 7002, 10) == 0
        assert not accepts(machine, ATTACKER[family], 22)
        assert machine.wire.ping(UNLISTED[family], count=3) == 3
        assert accepts(machine, UNLISTED[family], 22)
    assert machine.status()["totals"]["dropped"]["packets"] >= 2 * (3 + 10 + 1)
    # The pings may be of a talker that was there before the entry was: then it has at least the other packets.
    entry = machine.entries()[f"{ATTACKER[4]}/32"]
    assert entry["packets"] >= (11 if entry["partial"] else 14)
    assert machine.entries()[f"{ATTACKER[4]}/32"]["reason"] == "a test"


def test_remove_lets_it_in_again(machine: Machine) -> None:
    machine.ctl("remove", ATTACKER[4], ATTACKER[6])
    for family in (4, 6):
        assert machine.wire.ping(ATTACKER[family], count=3) == 3


def test_the_longest_prefix_decides(machine: Machine) -> None:
    machine.ctl("deny", "192.0.2.0/24", "2001:db8:2::/48")
    machine.ctl("allow", VISITOR[4], VISITOR[6])
    for family in (4, 6):
        assert machine.wire.ping(VISITOR[family], count=3) == 3
    machine.ctl("remove", VISITOR[4], VISITOR[6])
    for family in (4, 6):
        assert machine.wire.ping(VISITOR[family], count=3) == 0
    machine.ctl("remove", "192.0.2.0/24", "2001:db8:2::/48")


def test_a_deny_for_a_time_ends_by_itself(machine: Machine) -> None:
    for seconds in (4, 8, 16):  # on a slow machine the shortest may be over before anybody has looked
        began = time.monotonic()
        machine.ctl("deny", ATTACKER[4], "--for", f"{seconds}s")
        got_in = machine.wire.ping(ATTACKER[4], count=2)
        if time.monotonic() < began + seconds:
            break
    assert got_in == 0
    wait_for("the entry to expire", lambda: machine.wire.ping(ATTACKER[4]))
    assert f"{ATTACKER[4]}/32" not in machine.entries()


def test_several_prefixes_all_or_none(machine: Machine) -> None:
    done = machine.ctl("deny", ATTACKER[4], "203.0.113.1/24", check=False)
    assert done.returncode == 6
    assert "host bits" in done.stderr
    assert f"{ATTACKER[4]}/32" not in machine.entries()


EVENT_FIELDS = (
    "INTERFACE", "FAMILY", "SRC_IP", "DST_IP", "SRC_PORT", "DST_PORT", "PROTOCOL", "PROTOCOL_NUM", "PACKET_SIZE", "ACTION", "VERDICT",
    "RULE",
)  # fmt: skip


def test_an_unlisted_visitor_stands_in_the_journal_field_by_field(machine: Machine) -> None:
    datagrams(machine, UNLISTED[4], 7003, 5)

    def found() -> dict[str, str] | None:
        events = machine.journal(f"XDPMOND_SRC_IP={UNLISTED[4]}", "XDPMOND_DST_PORT=7003")
        return events[-1] if events else None

    event = wait_for("the journal entry", found)
    assert {name: event[f"XDPMOND_{name}"] for name in EVENT_FIELDS} == {
        "INTERFACE": "host0", "FAMILY": "ipv4", "SRC_IP": UNLISTED[4], "DST_IP": "10.77.0.1", "SRC_PORT": "40000",
        "DST_PORT": "7003", "PROTOCOL": "udp", "PROTOCOL_NUM": "17", "PACKET_SIZE": str(14 + 20 + 8 + 10), "ACTION": "LOG",
        "VERDICT": "log", "RULE": "default",
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{32}", event["MESSAGE_ID"])
    assert event["MESSAGE"].isprintable() and UNLISTED[4] in event["MESSAGE"]


def test_changes_of_policy_and_mode_stand_in_the_journal(machine: Machine) -> None:
    machine.ctl("deny", "198.18.0.0/15", "--reason", "for the journal")
    machine.ctl("remove", "198.18.0.0/15")
    entries = wait_for("both entries", lambda: [e for e in machine.journal() if "198.18.0.0/15" in str(e.get("MESSAGE"))][1:])
    assert all(re.fullmatch("[0-9a-f]{32}", entry["MESSAGE_ID"]) for entry in entries)
    cursor = machine.journal()[-1]["__CURSOR"]
    for mode in ("monitor", "enforce"):
        machine.ctl("mode", mode)
        wait_for(f"{mode} in the journal", partial(found_after, machine, cursor, f"{mode} mode"))


def found_after(machine: Machine, cursor: str, text: str) -> bool:
    return any(text in str(entry.get("MESSAGE")) and "MESSAGE_ID" in entry for entry in machine.journal(f"--after-cursor={cursor}"))


def test_the_journal_budget_holds_and_what_is_held_back_is_counted(machine: Machine) -> None:
    before = machine.status()["losses"]["journal_held_back"]
    frames = [frame_to(machine, UNLISTED[4], port) for port in range(20000, 20150)]
    with machine.wire.raw() as raw:
        for frame in frames:
            raw.send(frame)
    wait_for("90 of 150 events to be held back", lambda: machine.status()["losses"]["journal_held_back"] - before >= 90)
    written = [e for e in machine.journal(f"XDPMOND_SRC_IP={UNLISTED[4]}") if 20000 <= int(e.get("XDPMOND_DST_PORT", 0)) < 20150]
    assert len(written) <= 60


@pytest.fixture
def without_procps(machine: Machine) -> Iterator[None]:
    """No kill, pkill or pgrep to be found."""
    names = ("/usr/bin/kill", "/usr/bin/pkill", "/usr/bin/pgrep")
    for name in names:
        machine.run("mv", name, f"{name}.away", check=False)
    yield
    for name in names:
        machine.run("mv", f"{name}.away", name, check=False)


def test_a_broken_configuration_is_refused_on_reload_and_nothing_changes(machine: Machine, without_procps: None) -> None:
    before, pid = machine.status(), machine.main_pid()
    machine.write(DROPIN, 'mode = "monitor"\ndeny = ["203.0.113.0/24"]\ndefalt = "deny"\n')
    done = machine.run("systemctl", "reload", "xdpmond", check=False)
    assert done.returncode != 0
    complaint = wait_for("the journal to say so", lambda: [e for e in machine.journal() if "defalt" in str(e.get("MESSAGE"))])
    assert any(DROPIN in entry["MESSAGE"] and "default" in entry["MESSAGE"] for entry in complaint)
    said = machine.ctl("reload", check=False)
    assert said.returncode == 6 and DROPIN in said.stderr and "defalt" in said.stderr
    after = machine.status()
    assert (after["mode"], after["policy"]) == (before["mode"], before["policy"])
    assert after["last_reload"]["ok"] is False
    assert machine.unit("ActiveState", "MainPID") == {"ActiveState": "active", "MainPID": str(pid)}
    assert machine.wire.ping(ATTACKER[4]) == 1


def test_a_corrected_configuration_is_taken(machine: Machine, without_procps: None) -> None:
    program = machine.program()
    machine.write(DROPIN, 'deny = ["203.0.113.0/24"]\n')
    machine.run("systemctl", "reload", "xdpmond")
    assert machine.wire.ping(ATTACKER[4]) == 0
    assert machine.entries()["203.0.113.0/24"]["source"] == f"{DROPIN}:1"
    assert machine.status()["last_reload"]["ok"] is True
    assert machine.program() == program


def test_an_entry_of_a_file_is_refused_with_file_and_line(machine: Machine) -> None:
    done = machine.ctl("remove", "203.0.113.0/24", check=False)
    assert done.returncode == 7
    assert f"{DROPIN}:1" in done.stderr


def test_a_signal_reloads_too(machine: Machine) -> None:
    machine.run("rm", DROPIN)
    machine.run("systemctl", "kill", "--signal=HUP", "--kill-who=main", "xdpmond")
    wait_for("the entry to go", lambda: machine.wire.ping(ATTACKER[4]))
    assert "203.0.113.0/24" not in machine.entries()
    assert machine.unit("ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"}


def test_an_ordinary_user_may_look_and_is_refused_changes(machine: Machine) -> None:
    assert machine.ctl("status", user="ordinary").returncode == 0
    assert machine.ctl("list", user="ordinary").returncode == 0
    for words in (["deny", "198.18.0.0/15"], ["allow", "198.18.0.0/15"], ["mode", "monitor"], ["reload"]):
        done = machine.ctl(*words, user="ordinary", check=False)
        assert done.returncode == 4, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert "198.18.0.0/15" not in machine.entries()
    assert machine.status()["mode"] == "enforce"


def test_an_ordinary_user_is_refused_with_busctl_and_gdbus(machine: Machine) -> None:
    done = machine.run("busctl", "call", *MANAGER, "Deny", "asa{sv}", "1", "198.18.0.0/15", "0", user="ordinary", check=False)
    assert done.returncode != 0 and "not authori" in done.stderr.lower()
    gdbus = ["gdbus", "call", "--system", "-d", MANAGER[0], "-o", MANAGER[1], "-m", f"{MANAGER[2]}.SetMode", "monitor", "{}"]
    done = machine.run(*gdbus, user="ordinary", check=False)
    assert done.returncode != 0 and "org.xdpmond1.Error.NotAuthorized" in done.stderr
    assert machine.status()["mode"] == "enforce"


def test_a_stopped_daemon_stays_stopped_for_an_ordinary_user(machine: Machine) -> None:
    machine.run("systemctl", "stop", "xdpmond")
    assert machine.program() is None
    assert machine.ctl("status", user="ordinary", check=False).returncode == 3
    assert machine.run("busctl", "call", *MANAGER, "Describe", user="ordinary", check=False).returncode != 0
    assert machine.run("busctl", "call", "org.freedesktop.DBus", "/", "org.freedesktop.DBus", "StartServiceByName", "su", MANAGER[0], "0",
                       user="ordinary", check=False).returncode != 0  # fmt: skip
    assert machine.run("systemctl", "--no-ask-password", "start", "xdpmond", user="ordinary", check=False).returncode != 0
    assert machine.unit("ActiveState")["ActiveState"] == "inactive"
    machine.run("systemctl", "start", "xdpmond")
    assert machine.status()["mode"] == "enforce"


def test_an_interface_that_goes_and_comes_is_attached_again(machine: Machine) -> None:
    machine.write(DROPIN, 'interface = ["host0", "spare0"]\n')
    machine.run("systemctl", "restart", "xdpmond")

    def state() -> str:
        return next((str(row["state"]) for row in machine.status()["interfaces"] if row["name"] == "spare0"), "")

    assert state() in ("absent", "waiting")
    for _ in range(2):
        machine.run("ip", "link", "add", "spare0", "type", "veth", "peer", "name", "spare1")
        wait_for("spare0 to be attached", lambda: state() == "attached")
        machine.run("ip", "link", "del", "spare0")
        wait_for("spare0 to be let go", lambda: state() in ("absent", "waiting"))
    machine.run("rm", DROPIN)
    machine.run("systemctl", "restart", "xdpmond")


def test_entries_and_mode_survive_a_reboot_and_the_daemon_is_there_early(machine: Machine) -> None:
    machine.ctl("deny", ATTACKER[4], "--for", "1h", "--reason", "over a reboot")
    machine.reboot()
    wait_for("the daemon to attach", machine.program)
    wait_for("the bus", lambda: machine.ctl("status", check=False).returncode == 0)
    assert machine.wire.ping(ATTACKER[4], count=2) == 0
    assert machine.wire.ping(PERMITTED[4], count=2) == 2
    entry = machine.entries()[f"{ATTACKER[4]}/32"]
    assert (entry["reason"], entry["origin"]) == ("over a reboot", "operator")
    assert machine.unit("ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "0"}
    ready = int(machine.unit("ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])
    network = machine.run("systemctl", "show", "systemd-networkd", "-P", "ExecMainStartTimestampMonotonic").stdout
    assert ready <= int(network), "the network came up before the filter was ready"
    assert "ordering cycle" not in machine.run("journalctl", "-b", "--no-pager").stdout


def test_the_bus_may_go_and_come(machine: Machine) -> None:
    pid = machine.main_pid()
    machine.run("systemctl", "restart", "dbus")
    wait_for("the daemon on the new bus", lambda: machine.ctl("status", check=False).returncode == 0)
    assert machine.main_pid() == pid
    assert machine.wire.ping(ATTACKER[4], count=2) == 0
