"""The daemon's configuration while it runs, and its command line."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from busfixture import ROOT
from conftest import DENIED4, PERMITTED4, UNLISTED4, UNLISTED6, Start, World

from tests.lab import PYTHON, wait_for

SO_RCVBUFFORCE = 33

FRONT = """\
interface = "eth0"
allow = ["10.0.0.0/24", "2001:db8:a::/64"]
deny = ["203.0.113.0/24", "2001:db8:bad::/64"]
mode = "enforce"
"""


def xdpmond(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run that ends by itself."""
    return subprocess.run([PYTHON, "-m", "xdpmond", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_sighup_applies_the_difference(world: World, start: Start) -> None:
    daemon = start(FRONT)
    assert world.passes(PERMITTED4, UNLISTED4)
    assert world.drops(DENIED4)
    counted = world.entry("10.0.0.0/24")["packets"]
    daemon.config.write_text(FRONT.replace('"203.0.113.0/24"', '"198.51.100.0/24"').replace('"2001:db8:a::/64"', '"fd00::/8"'))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("4 rules changed")
    assert world.passes(PERMITTED4, DENIED4)
    assert world.drops(UNLISTED4)
    assert [row["prefix"] for row in world.lab.rows("list")] == ["10.0.0.0/24", "198.51.100.0/24", "2001:db8:bad::/64", "fd00::/8"]
    assert world.entry("10.0.0.0/24")["packets"] == counted + 3  # what did not change goes on counting
    daemon.config.write_text(FRONT.replace("enforce", "monitor"))
    assert world.lab.json("reload")["changed"] == 4
    assert world.lab.status()["mode"] == "monitor"
    assert world.passes(DENIED4)


@contextlib.contextmanager
def stream(world: World) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Datagrams from a permitted and a denied source, until the context ends: what was sent and what has arrived, by source."""
    sent: Counter[str] = Counter()
    arrived: Counter[str] = Counter()
    end, sent_all = threading.Event(), threading.Event()
    sources = (PERMITTED4, DENIED4)
    receivers = [world.host.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in sources]
    senders = [world.net.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in sources]

    def send() -> None:
        while not end.wait(0.0005):
            for sender, ends in zip(senders, sources, strict=True):
                sender.sendto(b"gap?", (ends.host, 5353))
                sent[ends.net] += 1

    def receive(receiver: socket.socket) -> None:
        receiver.settimeout(0.3)
        while True:
            try:
                arrived[receiver.recvfrom(100)[1][0]] += 1
            except TimeoutError:
                if sent_all.is_set():
                    return

    for receiver, sender, ends in zip(receivers, senders, sources, strict=True):
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)  # what comes while its thread waits for a processor
        receiver.bind((ends.host, 5353))
        sender.bind((ends.net, 0))
    sending, *receiving = threads = [
        threading.Thread(target=send), *(threading.Thread(target=receive, args=(receiver,)) for receiver in receivers),
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    try:
        yield sent, arrived
    finally:
        end.set()
        sending.join()
        sent_all.set()
        for thread in receiving:
            thread.join()
        for sock in (*receivers, *senders):
            sock.close()


def test_a_reload_leaves_no_gap(world: World, start: Start) -> None:
    """Through reloads that move many rules about, not one denied packet gets in, and no permitted one is lost."""
    daemon = start(FRONT)
    others = [f'"100.{number // 250}.{number % 250}.0/24"' for number in range(4000)]
    with stream(world) as (sent, arrived):
        for turn in range(6):
            more = ", ".join(others[turn * 500 : turn * 500 + 1000])
            daemon.config.write_text(FRONT.replace('"203.0.113.0/24"', f'"203.0.113.{"0/24" if turn % 2 else "2/32"}", {more}'))
            assert world.lab.json("reload")["changed"] >= 1000
            for count in ("deny", "remove"):
                world.lab.ctl(count, "192.0.2.1")
    assert sent[DENIED4.net] > 500
    assert arrived[DENIED4.net] == 0
    assert arrived[PERMITTED4.net] == sent[PERMITTED4.net]


def test_a_refused_file_changes_nothing(world: World, start: Start) -> None:
    daemon = start(FRONT)
    before = world.lab.rows("list")
    broken = {
        'interface = "eth0"\nmode = "enforced"\n': ("mode", "enforce"),
        'interface = "eth0"\nalow = ["10.0.0.0/8"]\n': ("alow", "allow"),
        'interface = "eth0"\n\nallow = ["10.0.0.0/8", "10.0.0.1/8"]\n': (":3", "host bits"),
        'interface = "eth0"\nallow = [\n': ("TOML",),
        'interface = "eth0"\nwindow = 60\n': ("window", '"60s"'),
        'interface = "eth0"\nallow = ["10.0.0.0/8"]\ndeny = ["10.0.0.0/8"]\n': ("10.0.0.0/8", "allow"),
    }
    for number, (text, named) in enumerate(broken.items(), start=1):
        daemon.config.write_text(text)
        refused = world.lab.ctl("reload", status=6)
        for word in (*named, str(daemon.config)):
            assert word in refused.stderr, refused.stderr
        told = world.lab.status()["last_reload"]
        assert told["ok"] is False and named[0] in told["message"]
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_log("refused", count=2 * number)
        assert world.lab.rows("list") == [{**row, "packets": now["packets"], "bytes": now["bytes"]}
                                          for row, now in zip(before, world.lab.rows("list"), strict=True)]  # fmt: skip
    daemon.config.unlink()
    assert str(daemon.config) in world.lab.ctl("reload", status=6).stderr
    assert world.drops(DENIED4)
    assert world.passes(PERMITTED4)
    daemon.config.write_text(FRONT)
    world.lab.ctl("reload")
    assert world.lab.status()["last_reload"]["ok"] is True


def test_dropins_add_up(world: World, start: Start) -> None:
    directory = world.lab.directory / "more.toml.d"
    directory.mkdir()
    (directory / "20-deny.toml").write_text(f'deny = ["{UNLISTED4.net}"]\nmode = "monitor"\n')
    (directory / "10-mode.toml").write_text('mode = "enforce"\ndefault = "allow"\n')
    (directory / "notes.txt").write_text("not read")
    start(FRONT, name="more.toml")
    status = world.lab.status()
    assert (status["mode"], status["default"]) == ("monitor", "allow")
    assert world.entry(f"{UNLISTED4.net}/32")["source"] == f"{directory}/20-deny.toml:1"
    (directory / "20-deny.toml").unlink()
    world.lab.ctl("reload")
    assert world.lab.status()["mode"] == "enforce"
    assert not world.entry(f"{UNLISTED4.net}/32")


def test_the_command_line_is_stronger_than_the_file(world: World, start: Start) -> None:
    daemon = start('interface = "eth7"\nmode = "monitor"\ndeny = ["203.0.113.0/24"]', "-i", "eth0", "--drop-packets", "-v")
    assert world.drops(DENIED4)
    assert world.passes(UNLISTED6)
    world.lab.ctl("reload")
    assert world.drops(DENIED4)
    assert [found["name"] for found in world.lab.status()["interfaces"]] == ["eth0"]
    wait_for(lambda: DENIED4.net in daemon.log and "DROP" in daemon.log, "a readable event")


def test_check_config(tmp_path: Path) -> None:
    file = tmp_path / "front.toml"
    file.write_text(FRONT)
    good = xdpmond("-c", str(file), "--check-config")
    assert good.returncode == 0 and "2 allowed and 2 denied" in good.stdout
    file.write_text(FRONT + 'modus = "x"\n')
    bad = xdpmond("-c", str(file), "--check-config")
    assert bad.returncode == 6 and f"{file}:5" in bad.stderr and "mode" in bad.stderr
    missing = xdpmond("-c", str(tmp_path / "none.toml"), "--check-config")
    assert missing.returncode == 6 and "none.toml" in missing.stderr
    file.write_text('default = "deny"\nmode = "enforce"\n')
    refused = xdpmond("-c", str(file), "--check-config")
    assert refused.returncode == 7 and "force" in refused.stderr
    assert xdpmond("-c", str(file), "--check-config", "--force").returncode == 0
    file.write_text('default = "deny"\nmode = "enforce"\nforce_default_deny = true\n')
    assert xdpmond("-c", str(file), "--check-config").returncode == 0
    for shipped in sorted((ROOT / "conf").glob("*.toml")):
        done = xdpmond("-c", str(shipped), "--check-config")
        assert done.returncode == 0, done.stderr
    assert xdpmond("--colour").returncode == 2


def test_default_deny_does_not_start_enforcing_without_force(world: World) -> None:
    daemon = world.lab.daemon(world.host, 'interface = "eth0"\ndefault = "deny"', "--enforce", ready=False)
    assert daemon.process.wait(60) == 7
    assert "force" in daemon.log and "Traceback" not in daemon.log
    assert "xdp" not in world.host.run("ip", "link", "show", "eth0").stdout


def test_without_a_bus(world: World, start: Start) -> None:
    daemon = start(FRONT, "--no-bus")
    assert world.drops(DENIED4)
    world.lab.ctl("status", status=3)
    daemon.config.write_text(FRONT.replace("enforce", "monitor"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration read again")
    assert world.passes(DENIED4)


def test_the_bus_may_go_and_come_back(world: World, start: Start) -> None:
    daemon = start(FRONT)
    world.lab.ctl("status")
    world.lab.bus.stop()
    world.lab.ctl("status", status=3)
    assert world.drops(DENIED4)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_log("configuration read again")
    world.lab.bus.start()
    wait_for(lambda: world.lab.ctl("status", status=None).returncode == 0, "the daemon to be on the bus again")
    assert daemon.process.poll() is None
