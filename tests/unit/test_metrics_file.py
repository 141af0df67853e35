"""The metrics in a file for node_exporter."""

import os
import queue
import stat
import threading

import pytest

from xdpmond.errors import ConfigError
from xdpmond.measures import Kind, Measured
from xdpmond.messages import Priority
from xdpmond.sinks.exposition import text
from xdpmond.sinks.textfile import TextFile, require_within, require_writable


def families(number):
    return [Measured("xdpmond_events_total", Kind.COUNTER, "Events.", ("n",), True, tuple(((str(n),), number) for n in range(300)))]


@pytest.fixture
def written(tmp_path):
    records = queue.Queue()
    file = TextFile(str(tmp_path / "x.prom"), records.put)
    file.records = records
    yield file
    file.close()


def test_it_is_complete_whenever_it_is_read(written, tmp_path):
    path, whole = tmp_path / "x.prom", {text(families(number)) for number in range(200)}
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            if path.exists():
                seen.add(path.read_bytes())

    reading = threading.Thread(target=read)
    reading.start()
    for number in range(200):
        written.put(families(number))
    written.close()
    stop.set()
    reading.join()
    assert seen <= whole
    assert path.read_bytes() == text(families(199))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["x.prom"]


def test_a_file_that_cannot_be_written_is_told_once_and_written_when_it_can_be(tmp_path):
    records = queue.Queue()
    file = TextFile(str(tmp_path / "away/x.prom"), records.put)
    try:
        file.put(families(1))
        told = records.get(timeout=10)
        assert "No such file or directory (the service may write where ReadWritePaths= says" in told.text
        file.put(families(2))
        (tmp_path / "away").mkdir()
        file.put(families(3))
        again = records.get(timeout=10)
        assert "is written again" in again.text and again.severity == Priority.NOTICE
        assert records.empty()
    finally:
        file.close()


def test_it_goes_when_it_is_wanted_no_more_and_stays_when_the_daemon_ends(written, tmp_path):
    written.put(families(1))
    written.close()
    assert (tmp_path / "x.prom").exists()
    other = TextFile(str(tmp_path / "x.prom"), written.records.put)
    other.finish(remove=True)
    other._thread.join(10)
    assert not (tmp_path / "x.prom").exists()


def test_what_cannot_be_written_is_refused_before(tmp_path):
    require_writable("")
    require_writable(str(tmp_path / "x.prom"))
    with pytest.raises(ConfigError, match="there is no directory /nowhere"):
        require_writable("/nowhere/x.prom")
    with pytest.raises(ConfigError, match="it is a directory"):
        require_writable(str(tmp_path))
    require_within("/var/lib/prometheus/x.prom", ["/var/lib/prometheus"])
    with pytest.raises(ConfigError) as refused:
        require_within("/srv/x.prom", ["/var/log/xdpmond"])
    assert "ReadWritePaths=" in str(refused.value)
