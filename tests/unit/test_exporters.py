"""Which exporters there are, as the configuration changes."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading

import pytest

from xdpmond.config import Config, InfluxDB, Metrics
from xdpmond.measures import Kind, Measured
from xdpmond.model import Listen
from xdpmond.sinks.exporters import Exporters

FAMILIES = [Measured("xdpmond_events_total", Kind.COUNTER, "Events.", (), True, (((), 5),))]


@pytest.fixture
def exporters():
    records = queue.Queue()
    made = Exporters(records.put, lambda: iter([b"[]"]))
    made.records = records
    yield made
    made.close()
    for thread in threading.enumerate():
        if thread.name in ("metrics", "metrics-file", "influxdb"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def nobody():
    """The URL of an address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_nothing_is_measured_for_nobody(exporters):
    exporters.configure(Config())
    assert (exporters.wanted, exporters.refreshing, exporters.lost) == (False, False, 0)


def test_what_stays_as_it_was_goes_on_and_the_rest_ends_and_begins(exporters, tmp_path, nobody):
    listen = Listen(path=str(tmp_path / "socket"))
    metrics = Metrics(enable=True, listen=listen, textfile=str(tmp_path / "a.prom"))
    exporters.configure(Config(metrics=metrics, influxdb=InfluxDB(url=nobody, database="a")))
    first = (exporters._server, exporters._file, exporters._influx)
    exporters.configure(Config(metrics=metrics, influxdb=InfluxDB(url=nobody, database="a"), window=5.0))
    assert first == (exporters._server, exporters._file, exporters._influx)
    exporters.configure(Config(metrics=Metrics(enable=True, listen=listen, list=True), influxdb=InfluxDB(url=nobody, database="b")))
    assert exporters._server is not first[0] and exporters._influx is not first[2]
    assert exporters._file is None
    exporters.configure(Config(influxdb=InfluxDB(url=nobody, database="b")))
    assert exporters.wanted and not exporters.refreshing


def test_influxdb_gets_windows_and_the_file_gets_everything(exporters, tmp_path, nobody):
    path = tmp_path / "a.prom"
    exporters.configure(Config(metrics=Metrics(textfile=str(path)), influxdb=InfluxDB(url=nobody, database="a")))
    exporters.publish(FAMILIES, None)
    exporters._file.close()
    assert "xdpmond_events_total 5.0" in path.read_text()
    assert exporters._influx.lost == 0
    exporters.publish(FAMILIES, 60.0)
    assert "takes no points" in exporters.records.get(timeout=10).text
    exporters.configure(Config(influxdb=InfluxDB(url=nobody, database="b")))
    exporters.publish(FAMILIES, 120.0)
    exporters.close()
    assert exporters.lost == 2, "those of a writer that has ended count on"


def test_what_nobody_wants_is_not_imported():
    program = "import sys, xdpmond.app; print([name for name in sys.modules if name.startswith(('prometheus_client', 'xdpmond.sinks.'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not [name for name in ("prometheus_client", "sinks.metrics", "influxdb", "textfile", "passwords") if name in done.stdout]
