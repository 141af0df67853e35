"""Log files: all that went in stands there in whole lines or is counted as lost, whatever the disk, the rotation and other programs do."""

import gzip
import json
import os
import resource
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
from eventfakes import numbered

from xdpmond import lines
from xdpmond.config import Log, LogFields, LogFormat
from xdpmond.errors import ConfigError
from xdpmond.messages import Message, Priority
from xdpmond.sinks import logfile
from xdpmond.sinks.logfile import LogFile, LogFiles, require_within, require_writable
from xdpmond.sinks.rotation import Compressor, RotatedFile, old_files

PLAIN = {"rotate_size": 0, "compress": False}
LENGTH = len(lines.jsonl().lines(numbered(1234)))
"""Of a line with a number of four digits."""


def wait_for(condition, what):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.005)


def numbers(*paths):
    """The events in these files, by their numbers. Every line must be whole."""
    found = []
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert data == b"" or data.endswith(b"\n")
        found += [json.loads(line)["flow_hash"] for line in data.splitlines()]
    return found


class Keeper:
    """Makes logs and ends them; gathers what they report. Time stands still unless the test moves it."""

    def __init__(self, directory):
        self.path = directory / "events.jsonl"
        self.records = []
        self.now = 1_700_000_000.0
        self.monotonic = 1000.0
        self._made = []

    def log(self, capacity=100_000, **settings):
        made = LogFile(Log(str(self.path), **{**PLAIN, **settings}), capacity, self.records.append, clock=lambda: self.now,
                       monotonic=lambda: self.monotonic)  # fmt: skip
        self._made.append(made)
        return made

    def settled(self, log):
        wait_for(lambda: log._number == 0, "the queue to be empty")

    def close(self):
        for log in self._made:
            log.close()


@pytest.fixture
def keeper(tmp_path):
    made = Keeper(tmp_path)
    yield made
    made.close()


# Writing


def test_all_events_are_in_the_file_in_order(keeper):
    log = keeper.log()
    for start in range(0, 10_000, 2500):
        log.put(numbered(*range(start, start + 2500)))  # more than a piece
    log.close()
    assert numbers(keeper.path) == list(range(10_000))
    assert (log.written, log.lost_in_queue, log.lost_on_disk) == (10_000, 0, 0)
    assert keeper.records == []


def test_an_event_is_in_the_file_at_once(keeper):
    log = keeper.log()
    log.put(numbered(1))
    wait_for(lambda: keeper.path.exists() and numbers(keeper.path) == [1], "the line")


def test_a_second_run_goes_on_behind_the_first(keeper):
    for number in (1, 2):
        log = keeper.log(format=LogFormat.CSV)
        log.put(numbered(number))
        log.close()
    head, *rows = keeper.path.read_text().splitlines()
    assert head.startswith("timestamp,")
    assert [row.rpartition(",")[2] for row in rows] == ["1", "2"]


@pytest.mark.parametrize(
    ("settings", "format"),
    [
        ({}, lines.jsonl()),
        ({"fields": LogFields.ECS}, lines.ecs()),
        ({"format": LogFormat.CSV}, lines.csv()),
        ({"format": LogFormat.CONSOLE}, lines.console()),
    ],
)
def test_each_format_is_the_one_that_was_asked_for(keeper, settings, format):
    log = keeper.log(**settings)
    log.put(numbered(7))
    log.close()
    assert keeper.path.read_bytes() == format.head + format.lines(numbered(7))


def test_only_owner_and_group_may_read_it_whatever_the_umask(keeper):
    before = os.umask(0o077)
    try:
        keeper.log().close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(keeper.path.stat().st_mode) == 0o640


def test_a_line_that_a_crash_cut_short_is_taken_back(keeper):
    keeper.path.write_bytes(b'{"flow_hash":1}\n{"flow_h')
    log = keeper.log()
    log.put(numbered(2))
    log.close()
    assert numbers(keeper.path) == [1, 2]


def test_what_finds_no_room_is_lost_and_counted(keeper, monkeypatch):
    """The writer stands still, as before a disk that does."""
    go = threading.Event()
    append = RotatedFile.append
    monkeypatch.setattr(RotatedFile, "append", lambda self, lines: (go.wait(20), append(self, lines)))
    log = keeper.log(capacity=100)
    log.put(numbered(*range(60)))
    log.put(numbered(*range(60, 120)))
    log.put(numbered(*range(120, 130)))
    assert log.lost_in_queue == 30
    kept = log._waiting[-1].rows
    assert len(kept) == 40 and (kept.base is None or len(kept.base) == 40)  # not the memory of what is lost
    go.set()
    keeper.settled(log)
    log.put(numbered(130))
    log.close()
    assert numbers(keeper.path) == [*range(100), 130]
    assert (log.written, log.lost_in_queue) == (101, 30)


def test_tiny_batches_are_bounded_too(keeper, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(RotatedFile, "open", lambda self: go.wait(20))
    monkeypatch.setattr(logfile, "_MOST_BATCHES", 5)
    log = keeper.log()
    for number in range(8):
        log.put(numbered(number))
    assert log.lost_in_queue == 3
    monkeypatch.undo()
    go.set()
    log.close()
    assert numbers(keeper.path) == list(range(5))


# A disk that is full, and other trouble


@pytest.fixture
def disk():
    """Limits how large a file of this process may grow. Beyond it a write is cut short, then refused, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_lines_is_told_once_and_heals(keeper, disk):
    log = keeper.log()
    disk(LENGTH * 1000 + 100)
    log.put(numbered(*range(1000, 3000)))
    keeper.settled(log)
    assert numbers(keeper.path) == list(range(1000, 2000))
    assert (log.written, log.lost_on_disk) == (1000, 1000)
    for _ in range(3):
        log.put(numbered(1))
    keeper.settled(log)
    keeper.monotonic += logfile.RETRY
    log.put(numbered(1))  # tried again, in vain
    keeper.settled(log)
    (told,) = keeper.records
    assert told.message is Message.LOG_PROBLEM and told.severity == Priority.ERROR
    assert told.text == f"{keeper.path} cannot be written: File too large; its events are lost, and counted, until it can be"
    disk(1 << 30)
    log.put(numbered(2))
    keeper.settled(log)
    assert log.lost_on_disk == 1005  # not yet tried again
    keeper.monotonic += logfile.RETRY
    log.put(numbered(3))
    log.close()
    assert numbers(keeper.path) == [*range(1000, 2000), 3]
    assert (log.written, log.lost_in_queue, log.lost_on_disk) == (1001, 0, 1005)
    _, again = keeper.records
    assert (again.severity, again.text) == (Priority.NOTICE, f"{keeper.path} is written again; 1005 events were lost to it")


def test_a_directory_that_is_not_there_yet(keeper):
    keeper.path = keeper.path.parent / "mounted" / "events.jsonl"
    log = keeper.log()
    log.put(numbered(1))
    keeper.settled(log)
    assert (log.lost_on_disk, len(keeper.records)) == (1, 1)
    assert "No such file or directory" in keeper.records[0].text
    keeper.path.parent.mkdir()
    keeper.monotonic += logfile.RETRY
    log.put(numbered(2))
    log.close()
    assert numbers(keeper.path) == [2]
    assert "written again; 1 events were lost" in keeper.records[1].text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_never_waited_for(keeper, make):
    make(keeper.path)
    log = keeper.log()
    log.put(numbered(1))
    log.close()
    assert (log.lost_on_disk, len(keeper.records)) == (1, 1)


def test_a_file_that_was_deleted_is_made_anew(keeper):
    log = keeper.log()
    log.put(numbered(1))
    keeper.settled(log)
    keeper.path.unlink()
    log.put(numbered(2))
    log.close()
    assert numbers(keeper.path) == [2]


def test_a_file_that_was_emptied_is_written_from_its_beginning(keeper):
    """As logrotate's copytruncate does."""
    log = keeper.log()
    log.put(numbered(1))
    keeper.settled(log)
    os.truncate(keeper.path, 0)
    log.put(numbered(2))
    log.close()
    assert keeper.path.stat().st_size < 2 * LENGTH
    assert numbers(keeper.path) == [2]


def test_reopening_goes_on_in_a_new_file(keeper):
    log = keeper.log()
    log.put(numbered(1))
    keeper.settled(log)
    moved = keeper.path.with_suffix(".1")
    keeper.path.rename(moved)
    log.put(numbered(2))
    keeper.settled(log)
    log.reopen()
    wait_for(keeper.path.exists, "the new file")  # without an event
    log.put(numbered(3))
    log.close()
    assert (numbers(moved), numbers(keeper.path)) == ([1, 2], [3])


# Rotation


def test_rotation_by_size_loses_nothing_and_bounds_the_files(keeper):
    log = keeper.log(rotate_size=LENGTH * 1000 + 10, keep=3)
    for start in range(1000, 9000, 500):
        log.put(numbered(*range(start, start + 500)))
        keeper.settled(log)
        keeper.now += 1
    log.close()
    old = old_files(keeper.path)
    assert [numbers(path) for path in old] == [list(range(start, start + 1000)) for start in (5000, 6000, 7000)]
    assert numbers(keeper.path) == list(range(8000, 9000))
    assert old[0].name == "events.jsonl.20231114T221330.000000Z"
    assert log.written == 8000


def test_a_bulk_larger_than_a_file_may_be_goes_into_several(keeper):
    log = keeper.log(rotate_size=1 << 16, keep=100)
    log.put(numbered(*range(1000, 3000)))
    log.close()
    files = [*old_files(keeper.path), keeper.path]
    assert all(path.stat().st_size <= 1 << 16 for path in files) and len(files) > 10
    assert numbers(*files) == list(range(1000, 3000))


def test_files_put_aside_at_one_moment_have_different_names(keeper):
    log = keeper.log(rotate_size=LENGTH + 10, keep=100)
    for number in range(1000, 1010):
        log.put(numbered(number))
    log.close()
    assert numbers(*old_files(keeper.path), keeper.path) == list(range(1000, 1010))


def test_an_old_file_or_none_may_be_kept(keeper):
    log = keeper.log(rotate_size=LENGTH + 10, keep=0)
    for number in range(1000, 1003):
        log.put(numbered(number))
    log.close()
    assert (old_files(keeper.path), numbers(keeper.path)) == ([], [1002])


def test_rotation_by_age_also_over_a_restart(keeper):
    settings = {"rotate_age": 3600.0, "format": LogFormat.CSV}
    log = keeper.log(**settings)
    log.put(numbered(1))
    keeper.settled(log)
    os.utime(keeper.path, (keeper.now, keeper.now))
    keeper.now = keeper.now // 3600 * 3600 + 3599
    log.put(numbered(2))
    log.close()
    assert old_files(keeper.path) == []
    os.utime(keeper.path, (keeper.now, keeper.now))
    keeper.now += 1
    log = keeper.log(**settings)
    log.put(numbered(3))
    log.close()
    (old,) = old_files(keeper.path)
    assert [len(path.read_text().splitlines()) for path in (old, keeper.path)] == [3, 2]  # each with its head


def test_a_file_with_a_head_alone_is_not_put_aside(keeper):
    log = keeper.log(rotate_age=3600.0, format=LogFormat.CSV)
    keeper.settled(log)
    keeper.now += 10 * 3600
    log.put(numbered(3))
    log.close()
    assert old_files(keeper.path) == []


def test_files_of_others_are_left_alone(keeper):
    stamp = "20231114T221333.000000Z"
    names = ("events.jsonl.1", f"events.jsonl.{stamp}.bak", f"xevents.jsonl.{stamp}", "events.jsonl.gz")
    others = [keeper.path.with_name(name) for name in names]
    for other in others:
        other.write_text("x")
    log = keeper.log(rotate_size=LENGTH + 10, keep=1, compress=True)
    for number in range(1000, 1005):
        log.put(numbered(number))
    log.close()
    assert all(other.read_text() == "x" for other in others)


def test_old_files_are_compressed_and_say_the_same(keeper):
    log = keeper.log(rotate_size=LENGTH * 1000, keep=10, compress=True)
    for start in range(1000, 5000, 1000):
        log.put(numbered(*range(start, start + 1000)))
        keeper.settled(log)
    wait_for(lambda: [path.suffix for path in old_files(keeper.path)] == [".gz"] * 3, "all old files to be compressed")
    log.close()
    old = old_files(keeper.path)
    assert numbers(*old, keeper.path) == list(range(1000, 5000))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in old)
    assert sorted(keeper.path.parent.iterdir()) == sorted([keeper.path, *old])


def test_what_a_crash_left_uncompressed_is_compressed_at_the_next_start(keeper):
    old = keeper.path.with_name("events.jsonl.20231114T221333.000000Z")
    old.write_bytes(b'{"flow_hash":7}\n')
    keeper.path.with_name(old.name + ".gz.part").write_bytes(b"half")
    log = keeper.log(compress=True)
    wait_for(lambda: [path.suffix for path in old_files(keeper.path)] == [".gz"], "the old file to be compressed")
    log.close()
    assert numbers(*old_files(keeper.path)) == [7]
    assert len(list(keeper.path.parent.iterdir())) == 2


def test_a_compressor_that_is_stopped_leaves_nothing_half_done(keeper):
    old = keeper.path.with_name("events.jsonl.20231114T221333.000000Z")
    old.write_bytes(b'{"flow_hash":7}\n' * 2_000_000)
    compressor = Compressor(Log(str(keeper.path)))
    compressor.begin()
    wait_for(lambda: len(list(keeper.path.parent.iterdir())) == 2, "compressing to begin")
    compressor.stop()
    (left,) = keeper.path.parent.iterdir()
    assert left in (old, keeper.path.with_name(old.name + ".gz"))


def test_rotation_that_is_not_possible_is_told(keeper, monkeypatch):
    """Else a file would grow without bound."""
    log = keeper.log(rotate_size=LENGTH * 10)
    log.put(numbered(*range(1000, 1010)))
    keeper.settled(log)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    log.put(numbered(1010))
    keeper.settled(log)
    assert log.lost_on_disk == 1
    assert "cannot be written: Permission denied (the service may write below /var/log/xdpmond" in keeper.records[0].text
    monkeypatch.undo()
    keeper.monotonic += logfile.RETRY
    log.put(numbered(1011))
    log.close()
    assert numbers(*old_files(keeper.path), keeper.path) == [*range(1000, 1010), 1011]


# All logs together


@pytest.fixture
def logs():
    records = []
    made = LogFiles(records.append)
    yield made
    made.close()


def test_a_new_configuration_changes_only_what_is_different(logs, tmp_path):
    stays, changes, goes, comes = (Log(str(tmp_path / name), **PLAIN) for name in ("stays", "changes", "goes", "comes"))
    logs.configure([stays, changes, goes], 1000)
    thread = logs._logs[stays.path]
    logs.put(numbered(1))
    logs.configure([Log(changes.path, LogFormat.CSV), comes, Log(stays.path, source="elsewhere:3", **PLAIN)], 1000)
    assert logs._logs[stays.path] is thread
    logs.put(numbered(2))
    logs.close()
    assert numbers(Path(stays.path)) == [1, 2]
    assert numbers(Path(goes.path)) == [1]
    assert numbers(Path(comes.path)) == [2]
    # All of the old form stands there before any of the new one.
    first, *others = Path(changes.path).read_text().splitlines()
    assert json.loads(first)["flow_hash"] == 1
    assert others[-1].endswith(",2")


def test_losses_are_by_path_and_outlive_the_log(logs, tmp_path):
    absent, small = Log(str(tmp_path / "absent" / "x"), **PLAIN), Log(str(tmp_path / "small"), **PLAIN)
    assert logs.losses() == {"log_queue": {}, "log_disk": {}}
    logs.configure([absent], 1024)
    logs.put(numbered(*range(5)))
    logs.configure([small], 1024)
    wait_for(lambda: logs.losses()["log_disk"] == {absent.path: 5}, "the loss")
    logs.put(numbered(*range(2000)))
    assert logs.losses()["log_queue"] == {small.path: 976}
    logs.configure([], 1024)
    wait_for(lambda: all(log.ended for log in logs._ending), "the end of those that are configured no more")
    logs.configure([small], 2048)
    assert logs._ending == []  # nothing is kept of them but the numbers
    logs.put(numbered(*range(2050)))
    assert logs.losses() == {"log_queue": {small.path: 978}, "log_disk": {absent.path: 5}}


# Is it writable?


def refused(log):
    with pytest.raises(ConfigError) as caught:
        require_writable([log])
    return str(caught.value)


def test_a_log_that_can_be_written(tmp_path):
    require_writable([Log(str(tmp_path / "new"))])
    (tmp_path / "old").write_text("")
    require_writable([Log(str(tmp_path / "old"))])


def test_a_log_that_cannot_is_refused_and_the_way_out_named(tmp_path):
    message = refused(Log(str(tmp_path / "absent" / "x"), source="/etc/x.toml:7"))
    assert message.startswith(f"/etc/x.toml:7: log.path: {tmp_path}/absent/x cannot be written: there is no directory {tmp_path}/absent")
    assert "ReadWritePaths=" in message
    assert "is not a regular file" in refused(Log("/dev/null"))
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(Log(str(tmp_path / "file" / "x")))


def test_a_log_where_the_service_may_not_write_is_refused():
    require_within([Log("/var/log/xdpmond/a"), Log("/srv/logs/deep/b")], ["/var/log/xdpmond", "/srv/logs"])
    for path in ("/var/log/xdpmond2/a", "/srv/a", "/var/log/a"):
        with pytest.raises(ConfigError, match=f"log.path: {path} cannot be written: the service may not write there.*ReadWritePaths="):
            require_within([Log(path)], ["/var/log/xdpmond", "/srv/logs"])


@pytest.fixture
def unprivileged():
    """A directory of somebody who is not root, and the test in that one's place."""
    with tempfile.TemporaryDirectory() as name:
        directory, root = Path(name), os.geteuid() == 0
        if root:
            os.chown(directory, 65534, 65534)
            os.seteuid(65534)
        yield directory
        directory.chmod(0o700)
        if root:
            os.seteuid(0)


def test_permissions_count(unprivileged):
    path = unprivileged / "events.jsonl"
    path.write_text("")
    unprivileged.chmod(0o500)
    assert "may not be written, which rotation needs" in refused(Log(str(path)))
    require_writable([Log(str(path), **PLAIN)])
    assert f"{unprivileged} may not be written (" in refused(Log(f"{path}.new", **PLAIN))
    path.chmod(0o400)
    assert "it is not permitted" in refused(Log(str(path), **PLAIN))


def test_a_clock_that_was_set_back_does_not_make_the_newest_the_oldest(keeper):
    log = keeper.log(rotate_size=LENGTH + 10, keep=2)
    for number in range(1000, 1006):
        log.put(numbered(number))
        keeper.settled(log)
        keeper.now -= 3600
    log.close()
    assert numbers(*old_files(keeper.path), keeper.path) == [1003, 1004, 1005]
