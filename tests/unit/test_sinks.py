"""Sinks: what arrives at a journald's socket and on a terminal, what is held back, what is lost, and that nothing ever waits or raises.

The far ends are real: a datagram socket as journald binds it, pipes and a pseudo-terminal.
"""

import dataclasses
import fcntl
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.messages import Message, Record, packet_record
from xdpmond.model import Family, Outcome, PacketEvent
from xdpmond.sinks.console import ConsoleSink
from xdpmond.sinks.journal import JournalSink, encode, entry_fields

ROOT = Path(__file__).parents[2]
EVENT = PacketEvent(
    timestamp=1700000000.25, interface="eth0", vlan=None, family=Family.IPV4, src_ip="203.0.113.9", dst_ip="192.0.2.1", src_port=40312,
    dst_port=22, protocol_num=6, packet_size=60, outcome=Outcome.DENIED_DROPPED, rule="203.0.113.0/24", suppressed=0, flow_hash=7,
)  # fmt: skip
PACKET = packet_record(EVENT)
CHANGE = Record(Message.POLICY_CHANGED, "deny 203.0.113.0/24 by uid 0", {"prefix": "203.0.113.0/24"})


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.005)


def wait_for_end(thread: str) -> None:
    wait_for(lambda: thread not in {one.name for one in threading.enumerate()}, f"the end of {thread}")


def parse_entry(entry: bytes) -> list[tuple[str, bytes]]:
    """Read the native protocol as https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ describes it."""
    fields = []
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields.append((name.decode(), value))
        entry = rest
    return fields


class Journald:
    """The receiving end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(20)

    def receive(self) -> dict[str, bytes]:
        data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, 1)
        for descriptor in descriptors:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            assert seals & fcntl.F_SEAL_WRITE and seals & fcntl.F_SEAL_SHRINK and seals & fcntl.F_SEAL_GROW and seals & fcntl.F_SEAL_SEAL
            assert data == b""
            with open(descriptor, "rb") as file:
                data = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        return dict(parse_entry(data))

    def vanish(self) -> None:
        self.socket.close()
        self.path.unlink()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    made = Journald(tmp_path / "socket")
    yield made
    made.socket.close()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# The journal: what an entry looks like


def test_an_event_arrives_field_by_field(journald: Journald) -> None:
    sink = JournalSink(path=journald.path)
    sink.put(PACKET)
    entry = journald.receive()
    sink.close()
    assert entry == {
        "MESSAGE": b"DROP 203.0.113.9:40312 -> 192.0.2.1:22 tcp, 60 bytes on eth0: denied by 203.0.113.0/24",
        "MESSAGE_ID": Message.PACKET_DROPPED.message_id.encode(),
        "PRIORITY": b"6", "SYSLOG_IDENTIFIER": b"xdpmond", "SYSLOG_FACILITY": b"3",
        "XDPMOND_TIMESTAMP": b"1700000000.250000", "XDPMOND_TIMESTAMP_ISO": b"2023-11-14T22:13:20.250000+00:00",
        "XDPMOND_INTERFACE": b"eth0", "XDPMOND_FAMILY": b"ipv4", "XDPMOND_SRC_IP": b"203.0.113.9", "XDPMOND_DST_IP": b"192.0.2.1",
        "XDPMOND_SRC_PORT": b"40312", "XDPMOND_DST_PORT": b"22", "XDPMOND_PROTOCOL": b"tcp", "XDPMOND_PROTOCOL_NUM": b"6",
        "XDPMOND_PACKET_SIZE": b"60", "XDPMOND_ACTION": b"DROP", "XDPMOND_VERDICT": b"deny", "XDPMOND_RULE": b"203.0.113.0/24",
        "XDPMOND_SUPPRESSED": b"0", "XDPMOND_FLOW_HASH": b"7",
    }  # fmt: skip  # and no XDPMOND_VLAN, since it is not known


def test_values_of_every_kind() -> None:
    fields: dict[str, object] = {"yes": True, "no": False, "none": None, "many": ["a", "b"], "map": {"a": 1}, "raw": b"\0\xff"}
    fields["verdict"] = Outcome.ALLOWED.verdict
    record = Record(Message.WARNING, "all kinds", fields, timestamp=12.5, priority=3)
    got = list(entry_fields(record))
    assert got[2] == ("PRIORITY", b"3")
    assert got[5:] == [
        ("XDPMOND_TIMESTAMP", b"12.500000"), ("XDPMOND_YES", b"true"), ("XDPMOND_NO", b"false"), ("XDPMOND_MANY", b"a"),
        ("XDPMOND_MANY", b"b"), ("XDPMOND_MAP", b'{"a": 1}'), ("XDPMOND_RAW", b"\0\xff"), ("XDPMOND_VERDICT", b"allow"),
    ]  # fmt: skip


def test_hostile_names_and_values_forge_no_field(journald: Journald) -> None:
    evil = "ssh\nMESSAGE_ID=00000000000000000000000000000000\nPRIORITY=0\n_UID=0"
    binary = "\nXDPMOND_SRC_IP\n" + struct.pack("<Q", 7).decode() + "1.1.1.1\n"
    sink = JournalSink(path=journald.path)
    sink.put(Record(Message.POLICY_CHANGED, f"deny because {evil}\x1b[2J\0", {
        "reason": evil, "other": binary, "lone": "\udcff", evil: "x", "_PID": 1, "=": "=", "": "", "x" * 100: "long",
    }))  # fmt: skip
    entry = journald.receive()
    sink.close()
    assert entry.pop("MESSAGE") == f"deny because {evil}\\x1b[2J\\x00".encode()
    assert entry.pop("MESSAGE_ID").decode() == Message.POLICY_CHANGED.message_id
    assert entry.pop("PRIORITY") == b"5"
    assert (entry.pop("SYSLOG_IDENTIFIER"), entry.pop("SYSLOG_FACILITY")) == (b"xdpmond", b"3")
    assert entry.pop("XDPMOND_REASON") == evil.encode()
    assert entry.pop("XDPMOND_OTHER") == binary.encode()
    assert entry.pop("XDPMOND_LONE") == b"\\udcff"
    assert entry.pop("XDPMOND__PID") == b"1"
    assert entry.pop("XDPMOND_" + "X" * 56) == b"long"
    assert all(name.startswith("XDPMOND_") and name.replace("_", "").isalnum() and len(name) <= 64 for name in entry), entry


@given(st.lists(st.tuples(st.from_regex("[A-Z][A-Z0-9_]{0,63}", fullmatch=True), st.binary())))
def test_any_values_can_be_read_back(fields: list[tuple[str, bytes]]) -> None:
    assert parse_entry(encode(fields)) == fields


@given(st.text(), st.dictionaries(st.text(), st.text() | st.binary() | st.integers() | st.floats() | st.none() | st.lists(st.text())))
def test_no_record_escapes_its_namespace(text: str, fields: dict[str, object]) -> None:
    entry = parse_entry(encode(entry_fields(Record(Message.WARNING, text, fields))))
    fixed = ["MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "SYSLOG_FACILITY"]
    assert [name for name, _ in entry[:5]] == fixed
    assert all(name.startswith("XDPMOND_") and len(name) <= 64 for name, _ in entry[5:])


def test_an_entry_too_large_for_a_datagram_travels_sealed(journald: Journald) -> None:
    sink = JournalSink(path=journald.path)
    sink.put(Record(Message.SUMMARY, "large", {"body": "x" * 3_000_000}))
    assert journald.receive()["XDPMOND_BODY"] == b"x" * 3_000_000
    sink.close()
    assert sink.lost == 0


# The journal: the budget


def test_only_packets_have_a_budget_and_it_is_by_the_minute(journald: Journald) -> None:
    clock = Clock()
    sink = JournalSink(3, path=journald.path, clock=clock)
    for _ in range(5):
        sink.put(PACKET)
        sink.put(CHANGE)
    assert [journald.receive()["PRIORITY"] for _ in range(8)] == [b"6", b"5"] * 3 + [b"5"] * 2
    assert sink.held_back == 2
    clock.now += 59.9
    sink.put(PACKET)
    assert sink.held_back == 3
    clock.now += 0.1
    for _ in range(4):
        sink.put(PACKET)
    assert [journald.receive()["PRIORITY"] for _ in range(3)] == [b"6"] * 3
    sink.close()
    assert (sink.held_back, sink.lost) == (4, 0)


def test_the_budget_can_be_changed_within_the_minute(journald: Journald) -> None:
    sink = JournalSink(0, path=journald.path, clock=Clock())
    sink.put(PACKET)
    assert sink.held_back == 1
    sink.set_budget(2)
    for _ in range(3):
        sink.put(PACKET)
    assert sink.held_back == 2
    sink.set_budget(0)
    sink.put(PACKET)
    sink.close()
    assert (sink.held_back, sink.lost) == (3, 0)
    journald.receive()
    journald.receive()


# The journal: a journald that does not read, goes, comes


def test_a_journald_that_does_not_read_delays_nobody_and_every_loss_is_counted(journald: Journald) -> None:
    sink = JournalSink(10**6, path=journald.path, capacity=40)
    for number in range(200):
        sink.put(dataclasses.replace(PACKET, text=f"packet {number}"))
    held = sink.lost
    assert held > 0
    sink.put(CHANGE)
    assert sink.lost == held, "a flood of packets leaves room for other words"
    read = [journald.receive()["MESSAGE"] for _ in range(201 - held)]
    assert read[-1] == CHANGE.text.encode()
    numbers = [int(text.split()[1]) for text in read[:-1]]
    assert numbers == sorted(set(numbers))
    sink.close()
    assert sink.lost == held


def test_closing_gives_up_on_a_journald_that_does_not_read(journald: Journald) -> None:
    sink = JournalSink(path=journald.path)
    for _ in range(1000):
        sink.put(CHANGE)
    sink.close(timeout=0.05)
    wait_for_end("sink-journal")
    journald.socket.setblocking(False)
    received = 0
    try:
        while True:
            journald.receive()
            received += 1
    except BlockingIOError:
        pass
    assert received > 0
    assert sink.lost + received == 1000


def test_without_a_journald_records_are_lost_until_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert not JournalSink.available(path)
    sink = JournalSink(path=path)
    sink.put(CHANGE)
    wait_for(lambda: sink.lost == 1, "the loss")
    for _ in range(2):
        journald = Journald(path)
        assert JournalSink.available(path)
        sink.put(CHANGE)
        assert journald.receive()["MESSAGE"] == CHANGE.text.encode()
        journald.vanish()
    path.write_text("a file is no journald")
    assert not JournalSink.available(path)
    sink.put(CHANGE)
    wait_for(lambda: sink.lost == 2, "the loss")
    sink.close()


def test_closing_writes_what_waits_and_takes_nothing_more(journald: Journald) -> None:
    sink = JournalSink(path=journald.path)
    for _ in range(5):
        sink.put(CHANGE)
    sink.close()
    sink.put(CHANGE)
    sink.close()
    assert sink.lost == 1
    assert [journald.receive()["MESSAGE"] for _ in range(5)] == [CHANGE.text.encode()] * 5
    wait_for_end("sink-journal")


def test_a_record_that_cannot_be_written_is_lost_alone(journald: Journald) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("no text")

    sink = JournalSink(path=journald.path)
    sink.put(Record(Message.WARNING, "odd", {"odd": Odd()}))
    sink.put(CHANGE)
    assert journald.receive()["MESSAGE"] == CHANGE.text.encode()
    sink.close()
    assert sink.lost == 1


# The console


class Pipe:
    def __init__(self) -> None:
        self.out, self.fd = os.pipe()

    def end(self) -> str:
        """All that was written, after the writing end is closed."""
        os.close(self.fd)
        with open(self.out, "rb") as file:
            return file.read().decode()


def shown(*records: Record, verbose: bool = False) -> str:
    pipe = Pipe()
    sink = ConsoleSink(verbose, fd=pipe.fd, clock=lambda: 1700000000.0, environ={})
    for record in records:
        sink.put(record)
    sink.close()
    assert sink.lost == 0
    return pipe.end()


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
def test_a_person_reads_lines() -> None:
    logged = packet_record(dataclasses.replace(EVENT, outcome=Outcome.DEFAULT_LOGGED, rule="default", suppressed=12))
    summary = Record(Message.SUMMARY, "60 s: 7 packets\n1.2.3.4  5\n::1  2", timestamp=1700000060)
    assert shown(PACKET, logged, CHANGE, Record(Message.WARNING, "hm"), Record(Message.STATE_PROBLEM, "disk full"), summary) == (
        "22:13:20 DROP 203.0.113.9:40312 -> 192.0.2.1:22 tcp, 60 bytes on eth0: denied by 203.0.113.0/24\n"
        "22:13:20 LOG  203.0.113.9:40312 -> 192.0.2.1:22 tcp, 60 bytes on eth0: on no list, 12 more like it before\n"
        "22:13:20 deny 203.0.113.0/24 by uid 0\n"
        "22:13:20 warning: hm\n"
        "22:13:20 error: disk full\n"
        "22:14:20 60 s: 7 packets\n"
        "         1.2.3.4  5\n"
        "         ::1  2\n"
    )


@pytest.mark.usefixtures("utc")
def test_verbose_adds_kind_and_fields() -> None:
    record = Record(Message.POLICY_CHANGED, "deny", {"prefix": ["::1/128", "10.0.0.0/8"], "reason": "a b\n", "vlan": None, "empty": ""})
    assert shown(record, verbose=True) == (
        "22:13:20 deny\n         POLICY_CHANGED prefix=::1/128,10.0.0.0/8 reason='a b\\\\x0a' empty=''\n"
    )


def test_nothing_from_outside_commands_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\r\x9b2J\u202e\udcff"
    text = shown(Record(Message.WARNING, evil, {evil: evil}), dataclasses.replace(PACKET, text=evil), verbose=True)
    assert text.count("\n") == 4
    assert text.replace("\n", "").isprintable()


@given(st.text(), st.dictionaries(st.text(), st.text()))
def test_whatever_is_said_is_printable(text: str, fields: dict[str, object]) -> None:
    rendered = ConsoleSink(True, fd=-1).render(Record(Message.WARNING, text, fields))
    assert rendered.replace("\n", "").replace("\t", "").isprintable()
    lines = rendered.splitlines()
    assert len(lines) == text.count("\n") + 2 and all(line.startswith(" " * 9) for line in lines[1:])


def on_terminal(environ: dict[str, str]) -> bytes:
    leader, follower = pty.openpty()
    settings = termios.tcgetattr(follower)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(follower, termios.TCSANOW, settings)
    sink = ConsoleSink(fd=follower, environ=environ)
    sink.put(PACKET)
    sink.close()
    text = os.read(leader, 4096)
    os.close(leader)
    os.close(follower)
    return text


@pytest.mark.parametrize(
    ("environ", "coloured"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_colour_on_terminals_that_want_it(environ: dict[str, str], coloured: bool) -> None:
    text = on_terminal(environ)
    assert (b"\x1b[31mDROP\x1b[0m 203.0.113.9" in text) is coloured
    assert (b"\x1b" in text) is coloured


def test_a_reader_that_goes_away_harms_nobody() -> None:
    pipe = Pipe()
    os.close(pipe.out)
    sink = ConsoleSink(fd=pipe.fd)
    for _ in range(3):
        sink.put(CHANGE)
    sink.close()
    assert sink.lost == 3
    os.close(pipe.fd)


def test_a_terminal_that_stands_still_delays_nobody_and_is_told_what_it_missed() -> None:
    pipe = Pipe()
    fcntl.fcntl(pipe.fd, fcntl.F_SETPIPE_SZ, 4096)
    sink = ConsoleSink(fd=pipe.fd, capacity=20)
    for _ in range(500):
        sink.put(CHANGE)
    missed = sink.lost
    assert missed > 0
    lines: list[str] = []

    def read() -> None:
        with open(pipe.out) as file:
            lines.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    sink.close(timeout=20)
    os.close(pipe.fd)
    reader.join()
    assert sink.lost == missed
    notes = [line for line in lines if "lost here" in line]
    assert len(lines) - len(notes) + missed == 500
    assert sum(int(note.split("lost here: ")[1].split()[0]) for note in notes) == missed


def test_closing_gives_up_on_a_terminal_that_stands_still() -> None:
    pipe = Pipe()
    fcntl.fcntl(pipe.fd, fcntl.F_SETPIPE_SZ, 4096)
    sink = ConsoleSink(fd=pipe.fd)
    for _ in range(500):
        sink.put(CHANGE)
    sink.close(timeout=0.05)
    wait_for_end("sink-console")
    assert sink.lost > 0
    complete = [line for line in pipe.end().split("\n")[:-1] if "lost here" not in line]
    assert len(complete) + sink.lost == 500


def test_without_a_standard_output_nothing_is_written_to_what_has_its_number(tmp_path: Path) -> None:
    """The first file that a program opens then has the number 1."""
    program = """
import os, sys
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
assert file == 1, file
from xdpmond.messages import Message, Record
from xdpmond.sinks.console import ConsoleSink
sink = ConsoleSink()
sink.put(Record(Message.STARTED, "up"))
sink.close()
sys.exit(40 + sink.lost)
"""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (41, "")
    assert (tmp_path / "file").read_text() == ""
