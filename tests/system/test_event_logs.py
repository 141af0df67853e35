"""Log files of the real daemon: what is in them, what a storm of events, a full disk and other programs do to them, and what of all that
the daemon notices."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from conftest import CONFIG, DENIED4, DENIED6, ROOT, UNLISTED4, UNLISTED6, Start, World

from bench.path import Vary
from bench.stage import NotifySocket, private_memory
from tests.borrowed import borrowed, environment
from tests.lab import Daemon, wait_for, within
from xdpmond.model import Family

MOST_MEMORY = 300_000_000


def log(path: Path, *settings: str) -> str:
    return "\n".join(["", "[[log]]", f'path = "{path}"', *settings, ""])


def read(path: Path) -> list[dict[str, Any]]:
    """The events in a file of JSON Lines, of which each must be whole: as soon as a write that is under way has ended."""
    text = b""

    def whole() -> bool:
        nonlocal text
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return not text or text.endswith(b"\n")

    wait_for(whole, f"the last line of {path} to be whole")
    return [json.loads(line) for line in text.splitlines()]


def ours(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what neighbours say to each other, such as multicast reports and answers."""
    return [event for event in events if event["protocol"] == "udp"]


def holds(path: Path, *sources: str) -> bool:
    return path.exists() and [event["src_ip"] for event in ours(read(path))] == list(sources)


def datagram(world: World, ends: Any, port: int) -> None:
    world.net.datagrams(ends.net, ends.host, port, [10])


def test_two_formats_hold_what_followers_are_told(world: World, start: Start, tmp_path: Path) -> None:
    jsonl, table = tmp_path / "events.jsonl", tmp_path / "events.csv"
    start(CONFIG + log(jsonl) + log(table, 'format = "csv"'), "--enforce")
    datagram(world, DENIED4, 53)
    datagram(world, DENIED6, 54)
    datagram(world, UNLISTED4, 55)
    wait_for(lambda: holds(jsonl, DENIED4.net, DENIED6.net, UNLISTED4.net), "the events in the file")
    wanted = ours(world.lab.rows("events"))
    assert ours(read(jsonl)) == wanted
    assert [(event["rule"], event["action"]) for event in wanted] == [
        ("203.0.113.0/24", "DROP"), ("2001:db8:bad::/64", "DROP"), ("default", "LOG"),
    ]  # fmt: skip

    def records() -> list[dict[str, Any]]:
        with table.open(newline="") as lines:
            return ours(list(csv.DictReader(lines, strict=True)))

    wait_for(lambda: len(records()) == 3, "the records in the table")
    assert [record["src_ip"] for record in records()] == [event["src_ip"] for event in wanted]
    assert list(records()[0]) == list(wanted[0])
    for path in (jsonl, table):
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_reload_changes_logs_and_refuses_what_cannot_be_written(world: World, start: Start, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    daemon = start(CONFIG + log(first))
    datagram(world, UNLISTED4, 1)
    wait_for(lambda: holds(first, UNLISTED4.net), "the first log")
    absent = tmp_path / "absent" / "x"
    daemon.config.write_text(CONFIG + log(first) + log(absent))
    refused = world.lab.ctl("reload", status=6)
    line = daemon.config.read_text().splitlines().index(f'path = "{absent}"')
    assert f"{daemon.config}:{line}: log.path: {absent} cannot be written: there is no directory {absent.parent}" in refused.stderr
    assert "ReadWritePaths=" in refused.stderr
    daemon.config.write_text(CONFIG + log(second, "keep = 1"))
    world.lab.ctl("reload")
    datagram(world, DENIED4, 2)
    wait_for(lambda: holds(second, DENIED4.net), "the second log")
    assert holds(first, UNLISTED4.net)


def test_sigusr1_goes_on_in_a_new_file(world: World, start: Start, tmp_path: Path) -> None:
    path, moved = tmp_path / "events.jsonl", tmp_path / "events.jsonl.1"
    daemon = start(CONFIG + log(path))
    datagram(world, UNLISTED4, 1)
    wait_for(lambda: holds(path, UNLISTED4.net), "the event")
    path.rename(moved)
    daemon.process.send_signal(signal.SIGUSR1)
    wait_for(path.exists, "the new file")
    datagram(world, DENIED4, 1)
    wait_for(lambda: holds(path, DENIED4.net), "the next event")
    assert holds(moved, UNLISTED4.net)


def test_logrotate_by_the_example(world: World, start: Start, tmp_path: Path) -> None:
    """Debian's logrotate with the example as it is, but for the directory, the user and the way to the daemon."""
    path = tmp_path / "events.jsonl"
    daemon = start(CONFIG + log(path, 'rotate_size = "0"'))
    example = (ROOT / "contrib" / "logrotate" / "xdpmond").read_text()
    for ours, here in (
        ("/var/log/xdpmond", str(tmp_path)),
        ("su xdpmond adm", "su root root"),
        ("systemctl kill --kill-whom=main --signal=SIGUSR1 xdpmond.service", f"kill -USR1 {daemon.pid}"),
    ):
        assert ours in example
        example = example.replace(ours, here)
    config = world.lab.write("logrotate.conf", example)
    config.chmod(0o644)
    tree = borrowed("logrotate")
    rotate = [tree / "usr/sbin/logrotate", "--force", "--state", world.lab.directory / "logrotate.state", config]
    for number, ends in enumerate((UNLISTED4, DENIED4, UNLISTED6), 1):
        datagram(world, ends, number)
        wait_for(lambda ends=ends: holds(path, ends.net), "the event")  # type: ignore[misc]
        done = subprocess.run(rotate, env=environment(tree), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        wait_for(lambda: path.exists() and not path.stat().st_size, "the new file")
    assert holds(tmp_path / "events.jsonl.1", UNLISTED6.net)
    older = [gzip.decompress((tmp_path / f"events.jsonl.{age}.gz").read_bytes()).decode() for age in (2, 3)]
    assert DENIED4.net in older[0] and UNLISTED4.net in older[1]


def test_a_full_disk_stops_the_log_and_nothing_else_and_heals(world: World, start: Start, small_disk: Path, tmp_path: Path) -> None:
    small, other, filler = small_disk / "events.jsonl", tmp_path / "other.jsonl", small_disk / "filler"
    filler.write_bytes(bytes(56 << 10))
    daemon = start(CONFIG + log(small) + log(other))

    def events(first: int, last: int) -> None:
        world.net.datagrams(UNLISTED4.net, UNLISTED4.host, first, [1])
        for port in range(first + 1, last):
            datagram(world, UNLISTED4, port)

    events(1, 101)  # some 35 KB where there are 8
    wait_for(lambda: other.exists() and len(ours(read(other))) == 100, "the events in the other log")
    wait_for(lambda: world.lab.status()["losses"]["log_disk"], "the loss to be counted")
    daemon.wait_log(f"{small} cannot be written: No space left on device; its events are lost, and counted, until it can be")
    lost = world.lab.status()["losses"]["log_disk"]
    assert 0 < lost[str(small)] <= len(read(other)) - len(read(small))
    assert len(read(small)) > 10
    filler.unlink()
    port = 1000

    def healed() -> bool:
        nonlocal port
        port += 1
        datagram(world, UNLISTED4, port)
        return "is written again" in daemon.log

    wait_for(healed, "the log to go on")

    def balanced() -> bool:
        return lost == {str(small): len(read(other)) - len(read(small))}

    lost = world.lab.status()["losses"]["log_disk"]
    datagram(world, UNLISTED4, 60_000)
    wait_for(lambda: all(60_000 in [event["dst_port"] for event in read(log)] for log in (small, other)), "the last event in both logs")
    wait_for(balanced, f"what one log has more than the other to be what was lost, {lost}")
    assert f"{small} is written again; {lost[str(small)]} events were lost to it" in daemon.log
    assert daemon.log.count("cannot be written") == 1
    assert "log files (not written)" in world.lab.ctl("status").stdout


class Storm(threading.Thread):
    """Packets of ever new sources, each of which is to make an event, as fast as one CPU can."""

    def __init__(self, world: World, program: int, ifindex: int):
        super().__init__()
        self._where = f"/run/netns/{world.host.name}"
        self._vary = Vary(Family.IPV4, None, program, ifindex)
        self.target = ".".join(map(str, self._vary.frame[30:34]))
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            within(self._where, lambda: self._vary.run(1 << 19))

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._vary.close()


class Manager(NotifySocket):
    """Keeps the daemon's descriptors, and counts its pings."""

    pings = 0

    def _take(self, lines: list[str], ancillary: Any) -> None:
        super()._take(lines, ancillary)
        self.pings += "WATCHDOG=1" in lines


def test_a_storm_that_outruns_the_daemon_is_counted_and_holds_nothing_up(world: World, start: Start, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    config = 'window = "1s"\nsummary_interval = "0s"\nlog_buffer_size = 8192\n' + CONFIG
    config += "[events]\nper_second = 1000000\nring_size = 131072\n" + log(path, 'rotate_size = "0"')
    with Manager(tmp_path / "notify") as manager:
        settings = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "600000"}
        daemon: Daemon = start(config, environment=settings)
        (interface,) = world.lab.status()["interfaces"]
        storm = Storm(world, dict(manager.store)["prog-xdpmond"], interface["ifindex"])
        storm.start()
        try:
            before, memory = manager.pings, 0
            windows: set[int] = set()
            statuses: list[dict[str, Any]] = []
            end = time.monotonic() + 60
            while manager.pings < before + 10 or len(windows) < 4 or not _lost_everywhere(statuses, path):
                assert time.monotonic() < end, (manager.pings - before, windows, statuses[-1]["losses"])
                statuses.append(world.lab.status())
                windows.add(statuses[-1]["window"]["number"])
                memory = max(memory, private_memory(daemon.pid, steady=False))
        finally:
            storm.stop()
        # Totals go on meanwhile.
        packets = [status["totals"]["packets"] for status in statuses]
        assert packets == sorted(set(packets))
        assert all(status["books"]["balanced"] for status in statuses)
        assert memory < MOST_MEMORY, f"{memory / 1e6:.0f} MB"

        # A change is made at once, and the next event is of the new policy.
        world.lab.ctl("deny", UNLISTED4.net)
        datagram(world, UNLISTED4, 7777)

        def last() -> dict[str, Any]:
            """The event of that packet."""
            with path.open("rb") as file:
                file.seek(-4096, os.SEEK_END)
                _, *lines, _ = file.read().split(b"\n")  # neither what is cut nor what is not yet whole
            return next((event for event in map(json.loads, lines) if event["dst_port"] == 7777), {})

        wait_for(last, "an event after the storm")
        assert (last()["rule"], last()["verdict"]) == (f"{UNLISTED4.net}/32", "deny")

        def balanced() -> bool:
            counted = subprocess.run(["wc", "-l", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
            status = world.lab.status()
            return int(counted) + status["losses"]["log_queue"][str(path)] == status["events"]["made"]

        wait_for(balanced, "every event to be in the file or among the losses")
        losses = world.lab.status()["losses"]
        assert losses["log_disk"] == {} and losses["ring_full"] > 0
        # Whole lines, and each a source once: some tens of thousands of them are enough to look at.
        with path.open("rb") as file:
            events = [json.loads(line) for line, _ in zip(file, range(50_000), strict=False)]
        sources = [event["src_ip"] for event in events if event["dst_ip"] == storm.target]
        assert len(set(sources)) == len(sources) > 1000
        assert "log files (queue full)" in world.lab.ctl("status").stdout
        daemon.stop()


def _lost_everywhere(statuses: list[dict[str, Any]], path: Path) -> bool:
    return bool(statuses) and statuses[-1]["losses"]["ring_full"] > 0 and str(path) in statuses[-1]["losses"]["log_queue"]
