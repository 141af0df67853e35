"""The journal sink against a real journald, in a mount namespace of its own: the journal of this host stays untouched.

journald runs as an instance with a name, since the nameless one would also read the kernel's log and meddle with auditing. Inside the
namespace its socket stands at the usual place.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xdpmond.messages import Message

ROOT = Path(__file__).resolve().parents[2]
JOURNALD = next((path for path in ("/usr/lib/systemd/systemd-journald", "/lib/systemd/systemd-journald") if os.path.exists(path)), "")
INSTANCE = "xmsink"

_SETUP = f"""
set -e
mount -t tmpfs -o mode=755 tmpfs /run/systemd
mount -t tmpfs -o mode=755 tmpfs /run/log
mount -t tmpfs -o mode=755 tmpfs /var/log
mount -t tmpfs -o mode=755 tmpfs /usr/lib/systemd/catalog
mount -t tmpfs -o mode=755 tmpfs /var/lib/systemd/catalog
mkdir /run/systemd/journal.{INSTANCE}
ln -s journal.{INSTANCE} /run/systemd/journal
cp "$1" /usr/lib/systemd/catalog/
journalctl --update-catalog
exec "$2" {INSTANCE}
"""

_PROLOGUE = """
import sys, threading, time
from xdpmond.messages import Message, Record, packet_record
from xdpmond.model import Family, Outcome, PacketEvent
from xdpmond.sinks.journal import JournalSink
event = PacketEvent(1700000000.25, "eth0", None, Family.IPV4, "203.0.113.9", "192.0.2.1", 40312, 22, 6, 60, Outcome.DENIED_DROPPED,
                    "203.0.113.0/24", 0, 7)
"""


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """The first true value of the condition."""
    end = time.monotonic() + 20
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)
    return value


class Journald:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SETUP, "sh", str(ROOT / "systemd/xdpmond.catalog"), JOURNALD],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_for("journald's socket", self._listens)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read().decode()
        return self.inside("test", "-S", "/run/systemd/journal/socket", check=False).returncode == 0

    def _command(self, command: tuple[str, ...]) -> list[str]:
        return ["nsenter", "--mount", "--target", str(self.process.pid), f"--wd={ROOT}", *command]

    def inside(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command(command), capture_output=True, text=True, check=check, timeout=60)

    def python(self, program: str) -> subprocess.Popen[str]:
        """A program that has the names of the prologue, with pipes to talk to it."""
        return subprocess.Popen(
            self._command((sys.executable, "-u", "-c", _PROLOGUE + program)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        lines = self.inside("journalctl", f"--namespace={INSTANCE}", "-o", "json", "--all", "--no-pager", "-q", *matches, check=False)
        return [json.loads(line) for line in lines.stdout.splitlines()]

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def journald() -> Iterator[Journald]:
    assert os.geteuid() == 0, "a mount namespace is made by root"
    assert JOURNALD and shutil.which("nsenter")
    made = Journald()
    yield made
    made.end()


def say(journald: Journald, program: str) -> None:
    process = journald.python(f"sink = JournalSink()\n{program}\nsink.close()\nsys.exit(sink.lost)")
    process.communicate()
    assert process.returncode == 0


def test_an_event_is_found_by_its_fields(journald: Journald) -> None:
    say(journald, "assert JournalSink.available(); sink.put(packet_record(event))")
    matches = ("XDPMOND_SRC_IP=203.0.113.9", "XDPMOND_DST_PORT=22", f"MESSAGE_ID={Message.PACKET_DROPPED.message_id}")
    (entry,) = wait_for("the entry", lambda: journald.entries(*matches))
    assert entry["MESSAGE"] == "DROP 203.0.113.9:40312 -> 192.0.2.1:22 tcp, 60 bytes on eth0: denied by 203.0.113.0/24"
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["_TRANSPORT"]) == ("6", "xdpmond", "journal")
    ours = {name.removeprefix("XDPMOND_").lower() for name in entry if name.startswith("XDPMOND_")}
    assert ours == set(
        "timestamp timestamp_iso interface family src_ip dst_ip src_port dst_port protocol protocol_num packet_size action verdict rule"
        " suppressed flow_hash".split()
    )


def test_the_catalog_explains_the_entry_with_its_fields(journald: Journald) -> None:
    say(journald, "sink.put(packet_record(event))")
    wait_for("the entry", lambda: journald.entries("XDPMOND_SRC_IP=203.0.113.9"))
    shown = journald.inside("journalctl", f"--namespace={INSTANCE}", "-x", "--no-pager", "XDPMOND_SRC_IP=203.0.113.9").stdout
    assert "Subject: A packet from 203.0.113.9 was dropped" in shown
    assert "`xdpmonctl explain 203.0.113.9`" in shown
    assert "@" not in shown


def test_hostile_text_forges_nothing(journald: Journald) -> None:
    program = r"""
evil = "ssh\nMESSAGE_ID=00000000000000000000000000000000\nPRIORITY=0\nFORGED=1\n"
sink.put(Record(Message.POLICY_CHANGED, "hostile " + evil, {"reason": evil, "a\nFORGED": "b", "FORGED=1\nX": "c", "lone": "\udcff\0"}))
"""
    say(journald, program)
    (entry,) = wait_for("the entry", lambda: journald.entries(f"MESSAGE_ID={Message.POLICY_CHANGED.message_id}"))
    evil = "ssh\nMESSAGE_ID=00000000000000000000000000000000\nPRIORITY=0\nFORGED=1\n"
    assert (entry["XDPMOND_REASON"], entry["MESSAGE"], entry["PRIORITY"]) == (evil, "hostile " + evil, "5")
    assert entry["XDPMOND_A_FORGED"] == "b" and entry["XDPMOND_FORGED_1_X"] == "c"
    assert not journald.entries("FORGED=1")


def test_an_entry_too_large_for_a_datagram_arrives(journald: Journald) -> None:
    say(journald, "sink.put(Record(Message.SUMMARY, 'large', {'body': 'x' * 1_000_000}))")
    (entry,) = wait_for("the entry", lambda: journald.entries("MESSAGE=large"))
    assert entry["XDPMOND_BODY"] == "x" * 1_000_000


def test_a_stopped_journald_stops_nobody_and_gets_everything_later(journald: Journald) -> None:
    """More than its queue and the socket's buffer take; meanwhile other threads of the process run."""
    journald.process.send_signal(signal.SIGSTOP)
    process = journald.python("""
sink = JournalSink()
for number in range(1500):
    sink.put(Record(Message.WARNING, f"stopped {number}"))
while len(sink._waiting) == 1500:
    time.sleep(0.01)
for tick in range(10):
    time.sleep(0.01)
print("alive", len(sink._waiting) > 0)
sys.stdin.readline()
sink.close(timeout=60)
print("lost", sink.lost)
""")
    try:
        assert process.stdin and process.stdout
        readable, _, _ = select.select([process.stdout], [], [], 30)
        assert readable, "the whole process waits for journald"
        assert process.stdout.readline() == "alive True\n"
        journald.process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "lost 0\n"
    finally:
        journald.process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
    match = f"MESSAGE_ID={Message.WARNING.message_id}"
    wait_for("all entries", lambda: len(journald.entries(match)) == 1500)
    assert [entry["MESSAGE"] for entry in journald.entries(match)] == [f"stopped {number}" for number in range(1500)]
