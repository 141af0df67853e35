"""Log files of the service: who may read them, where they may be, and what other programs do to them. The tests follow one another."""

from __future__ import annotations

import json

from .machine import ATTACKER, UNLISTED, Machine, wait_for
from .traffic import datagrams

DROPIN = "/etc/xdpmond/xdpmond.toml.d/log.toml"
LOG = "/var/log/xdpmond/events.jsonl"


def sources(machine: Machine, path: str) -> list[str]:
    done = machine.run("cat", path, check=False)
    return [json.loads(line)["src_ip"] for line in done.stdout.splitlines()]


def test_a_log_is_for_the_group_adm(machine: Machine) -> None:
    machine.write(DROPIN, f'[[log]]\npath = "{LOG}"\n')
    machine.run("systemctl", "reload", "xdpmond")
    datagrams(machine, UNLISTED[4], 7101, 1)
    wait_for("the event in the log", lambda: UNLISTED[4] in sources(machine, LOG))
    assert machine.run("stat", "-c", "%A %U %G", LOG).stdout == "-rw-r----- xdpmond adm\n"
    assert machine.run("stat", "-c", "%A %U %G", "/var/log/xdpmond").stdout == "drwxr-s--- xdpmond adm\n"
    assert machine.run("cat", LOG, user="ordinary", check=False).returncode != 0


def test_another_place_is_refused_until_the_unit_may_write_there(machine: Machine) -> None:
    machine.run("install", "-d", "-o", "xdpmond", "-g", "adm", "-m", "2750", "/srv/logs")
    machine.write(DROPIN, '[[log]]\npath = "/srv/logs/events.jsonl"\n')
    for command in (["xdpmond", "--check-config"], ["systemctl", "reload", "xdpmond"]):
        assert machine.run(*command, check=False).returncode != 0, command
    said = machine.run("xdpmond", "--check-config", check=False).stderr
    assert f"{DROPIN}:1: log.path: /srv/logs/events.jsonl cannot be written" in said and "ReadWritePaths=" in said
    # The refused reload has changed nothing.
    datagrams(machine, ATTACKER[4], 7102, 1)
    wait_for("the event in the old log", lambda: ATTACKER[4] in sources(machine, LOG))
    machine.write("/etc/systemd/system/xdpmond.service.d/logs.conf", "[Service]\nReadWritePaths=/srv/logs\n")
    machine.run("systemctl", "daemon-reload")
    assert machine.run("xdpmond", "--check-config").returncode == 0
    machine.run("systemctl", "restart", "xdpmond")
    datagrams(machine, UNLISTED[4], 7103, 1)
    wait_for("the event in the new place", lambda: UNLISTED[4] in sources(machine, "/srv/logs/events.jsonl"))


def test_logrotate_s_signal(machine: Machine) -> None:
    machine.run("mv", "/srv/logs/events.jsonl", "/srv/logs/moved")
    machine.run("systemctl", "kill", "--kill-whom=main", "-s", "USR1", "xdpmond")
    wait_for("the new file", lambda: machine.run("test", "-e", "/srv/logs/events.jsonl", check=False).returncode == 0)
    assert machine.unit("ActiveState")["ActiveState"] == "active"
