"""The package's life on one machine: install, run, remove, purge. The tests follow one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from . import filediff
from .conftest import Packages
from .machine import PERMITTED, Machine, wait_for

CAPABILITIES = (1 << 12) | (1 << 38) | (1 << 39)
"""CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF."""

OURS_AFTER_PURGE = ("/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow")
"""Where the system user stays."""

RECORDS = (
    "/var/lib/dpkg/", "/var/log/dpkg.log", "/var/log/apt/", "/var/lib/apt/", "/var/cache/apt/", "/var/cache/debconf/", "/var/log/journal/",
)  # fmt: skip
"""What dpkg, apt and the journal write whatever is installed."""

OF_THE_SYSTEM = (
    "/var/lib/systemd/timers/", "/var/lib/systemd/random-seed", "/var/lib/systemd/timesync/", "/var/log/wtmp", "/var/log/lastlog",
    "/var/log/btmp", "/run/", "/tmp/", "/var/tmp/",
)  # fmt: skip
"""What a running system writes by itself."""


@pytest.fixture(scope="module")
def before(bare: Machine) -> Iterator[dict[str, Any]]:
    yield {"files": filediff.snapshot(bare.copy)}


def test_install_says_nothing_alarming(before: dict[str, Any], bare: Machine, packages: Packages) -> None:
    done = bare.install(packages.current)
    said = (done.stdout + done.stderr).lower()
    for word in ("warning", "error", "could not", "failed", "traceback"):
        assert word not in said, done.stdout + done.stderr


def test_after_install_it_is_enabled_active_and_at_its_first_start(bare: Machine) -> None:
    assert bare.unit("ActiveState", "SubState", "UnitFileState", "NRestarts", "Type", "Result") == {
        "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled", "NRestarts": "0", "Type": "notify", "Result": "success",
    }  # fmt: skip
    assert bare.unit("StatusText")["StatusText"]
    assert bare.run("systemctl", "is-system-running", check=False).stdout == "running\n"


def test_it_runs_as_its_own_user_with_three_capabilities(bare: Machine) -> None:
    pid = bare.main_pid()
    lines = bare.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    facts = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    user = bare.run("id", "-u", "xdpmond").stdout.strip()
    assert facts["Uid"] == [user] * 4
    for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(facts[kind][0], 16) == CAPABILITIES, kind
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == (["1"], ["2"])


def test_the_daemon_has_no_compiler_in_its_memory(bare: Machine) -> None:
    maps = bare.run("cat", f"/proc/{bare.main_pid()}/maps").stdout
    assert "libbpf.so" in maps
    assert "LLVM" not in maps and "libbcc" not in maps and "clang" not in maps


def test_the_compiling_child_is_gone(bare: Machine) -> None:
    pid = bare.main_pid()
    assert bare.run("cat", f"/proc/{pid}/task/{pid}/children").stdout == ""


def test_what_was_compiled_is_kept_for_the_next_boot(bare: Machine) -> None:
    assert bare.run("stat", "-c", "%U %a", "/var/lib/xdpmond/program").stdout == "xdpmond 600\n"


def test_it_watches_the_default_routes_interface(bare: Machine) -> None:
    status = bare.status()
    assert (status["mode"], status["default"]) == ("monitor", "log")
    (interface,) = status["interfaces"]
    assert (interface["name"], interface["state"], interface["attach"]) == ("host0", "attached", "native")
    assert interface["program_id"] == bare.program()


def test_the_files_are_as_dpkg_knows_them(bare: Machine) -> None:
    assert bare.run("dpkg", "--verify", "xdpmond").stdout == ""
    conffiles = bare.run("dpkg-query", "-W", "-f", "${Conffiles}", "xdpmond").stdout.split()
    assert conffiles[0] == "/etc/xdpmond/xdpmond.toml"
    assert bare.run("xdpmond", "--check-config", user="ordinary").returncode == 0


def test_the_catalog_knows_the_daemons_messages(bare: Machine) -> None:
    known = {line.split()[0] for line in bare.run("journalctl", "--list-catalog").stdout.splitlines()}
    ours = {entry["MESSAGE_ID"] for entry in bare.journal("_SYSTEMD_UNIT=xdpmond.service") if "MESSAGE_ID" in entry}
    assert ours and ours <= known


def test_remove_stops_and_detaches_and_keeps_what_is_the_administrators(bare: Machine) -> None:
    bare.ctl("deny", "203.0.113.0/24")
    bare.run("apt-get", "remove", "-y", "xdpmond")
    assert bare.program() is None
    assert bare.run("systemctl", "is-active", "xdpmond", check=False).stdout == "inactive\n"
    assert bare.wire.ping(PERMITTED[4]) == 1
    for path in ("/etc/xdpmond/xdpmond.toml", "/var/lib/xdpmond"):
        assert bare.run("test", "-e", path, check=False).returncode == 0, path


def test_install_after_remove_has_the_entries_back(bare: Machine, packages: Packages) -> None:
    bare.install(packages.current)
    assert bare.entries()["203.0.113.0/24"]["verdict"] == "deny"
    assert bare.unit("UnitFileState")["UnitFileState"] == "enabled"


def test_purge_leaves_the_user_the_records_and_the_journal(bare: Machine, before: dict[str, Any]) -> None:
    bare.run("apt-get", "purge", "-y", "xdpmond")
    assert bare.program() is None
    wait_for("ping", lambda: bare.wire.ping(PERMITTED[4]))
    left = filediff.differences(before["files"], filediff.snapshot(bare.copy), bare.copy)
    unexpected = {
        path: what
        for path, what in left.items()
        if path.rstrip("-") not in OURS_AFTER_PURGE and not path.startswith(RECORDS) and not path.startswith(OF_THE_SYSTEM)
    }
    assert unexpected == {}
    assert bare.run("id", "xdpmond").returncode == 0
    for name in OURS_AFTER_PURGE:
        now = set(bare.run("cat", name).stdout.splitlines())
        then = set((bare.copy.lower / name[1:]).read_text().splitlines())
        assert then <= now and all(line.startswith("xdpmond:") for line in now - then), name
