"""xdpmonctl and the real bus server agree on the wire: every call, with every option, behind the shipped bus policy."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest
from busfixture import NOBODY, FakeDaemon, PrivateBus, private_bus, wait_for

PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with private_bus() as bus:
        FakeDaemon(bus).wait_line("ready")
        yield bus


def ctl(bus: PrivateBus, *words: str, uid: int = 0, peer: str = "") -> subprocess.CompletedProcess[str]:
    origin = ["env", f"SSH_CONNECTION={peer} 50000 192.0.2.1 22"] if peer else []
    return bus.run([*origin, PYTHON, "-m", "xdpmond.cli", *words], uid=uid)


def test_a_change_with_every_option(bus: PrivateBus) -> None:
    done = ctl(bus, "deny", "192.0.2.0/24", "2001:db8::1", "--for", "1h30m", "--reason", "x y", "--force", "-j", peer="192.0.2.7")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["applied"] == [
        {"prefix": "192.0.2.0/24", "verdict": "deny", "seconds": 5400.0, "reason": "x y"},
        {"prefix": "2001:db8::1/128", "verdict": "deny", "seconds": 5400.0, "reason": "x y"},
    ]
    rows = json.loads(ctl(bus, "list", "-j").stdout)
    assert [row["prefix"] for row in rows] == ["192.0.2.0/24", "2001:db8::1/128"]
    assert ctl(bus, "remove", "192.0.2.0/24", "2001:db8::1", "--force", peer="192.0.2.7").returncode == 0
    assert ctl(bus, "list", "-j").stdout == "[]\n"
    assert ctl(bus, "remove", "192.0.2.0/24").returncode == 5


def test_your_own_address_is_told(bus: PrivateBus) -> None:
    done = ctl(bus, "deny", "198.51.100.7", peer="198.51.100.7")
    assert done.returncode == 7
    assert done.stderr == "xdpmonctl: this cuts your own connection\n  use --force\n"


def test_more_prefixes_than_a_message_holds(bus: PrivateBus) -> None:
    prefixes = [f"10.{index >> 8}.{index & 255}.0/24" for index in range(5000)]
    assert ctl(bus, "allow", *prefixes).stdout == "5,000 prefixes allowed\n"
    assert len(ctl(bus, "list", "--no-legend").stdout.splitlines()) == 5000


def test_the_other_calls(bus: PrivateBus) -> None:
    select = ["--limit", "7", "--port", "22", "--proto", "udp"]
    selected = {"limit": 7, "port": 22, "protocol": "udp"}
    top = ctl(bus, "top", "--by", "syn", *select, "--interval", "--no-local", "--prefix-len", "24", "--prefix-len6", "64", "-j")
    networks = {"prefix_length": 24, "prefix_length6": 64}
    assert json.loads(top.stdout) == [{"by": "syn", **selected, "interval": True, "local": False, **networks}]
    ports = ctl(bus, "ports", *select, "--interval", "--local", "-j")
    assert json.loads(ports.stdout) == [{**selected, "interval": True, "local": True}]
    flows = ctl(bus, "flows", "--by", "packets", *select, "--address", "192.0.2.7", "-j")
    assert json.loads(flows.stdout) == [{"by": "packets", **selected, "address": "192.0.2.7"}]
    assert len(ctl(bus, "events", "--limit", "3", "-j").stdout.splitlines()) == 3
    assert json.loads(ctl(bus, "explain", "192.0.2.1", "-j").stdout) == {"address": "192.0.2.1"}
    mode = ctl(bus, "mode", "enforce", "--interface", "eth0", "--confirm", "60s", "--force", "-j", peer="192.0.2.7")
    assert json.loads(mode.stdout) == {"mode": "enforce"}
    assert json.loads(ctl(bus, "reload", "-j").stdout) == {"reloaded": True, "force": False}
    assert json.loads(ctl(bus, "reload", "--force", "-j").stdout) == {"reloaded": True, "force": True}
    assert ctl(bus, "confirm").returncode == 0
    assert ctl(bus).returncode == 0


def test_an_ordinary_user_reads_and_changes_nothing(bus: PrivateBus) -> None:
    for words in (["status"], ["list"], ["ports"], ["top"], ["flows"], ["events"], ["explain", "192.0.2.1"], ["mode"]):
        assert ctl(bus, *words, uid=NOBODY).returncode == 0
    for words in (["deny", "192.0.2.1"], ["allow", "192.0.2.1"], ["remove", "192.0.2.1"], ["mode", "monitor"], ["confirm"], ["reload"]):
        done = ctl(bus, *words, uid=NOBODY)
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.count("\n") >= 2, "it says what to do"


def test_following_leaves_nothing_behind(bus: PrivateBus) -> None:
    def followers() -> int:
        return int(json.loads(ctl(bus, "status", "-j").stdout)["followers"])

    process = bus.spawn([PYTHON, "-m", "xdpmond.cli", "events", "-f", "-j"], log="follow.log")
    wait_for(lambda: followers() == 1, "the client follows")
    bus.call("Explain", "s", "emit 3")
    assert process.stdout is not None
    assert [json.loads(process.stdout.readline())["serial"] for _ in range(3)] == [0, 1, 2]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert bus.log("follow.log") == ""
    wait_for(lambda: followers() == 0, "the daemon lets the follower go")
