"""Points for InfluxDB: how they are written down, and what becomes of them while the database is away. The real one is in tests/system."""

from __future__ import annotations

import http.server
import queue
import re
import socket
import socketserver
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.config import InfluxDB
from xdpmond.errors import ConfigError
from xdpmond.measures import Kind, Measured
from xdpmond.messages import Priority
from xdpmond.sinks import influxdb
from xdpmond.sinks.influxdb import MOST_WAITING, InfluxWriter, lines, require_readable


def family(value=1, name="xdpmond_packets_total", labels=("interface",), texts=("eth0",), whole=True):
    return Measured(name, Kind.COUNTER, "", labels, whole, ((texts, value),))


def test_a_point_is_a_measurement_with_tags_one_field_and_a_time():
    assert lines([family(5), family(60.5, "xdpmond_window_seconds", (), (), whole=False)], "web 1", 1_700_000_000.25) == [
        "xdpmond_packets_total,host=web\\ 1,interface=eth0 value=5i 1700000000250000000",
        "xdpmond_window_seconds,host=web\\ 1 value=60.5 1700000000250000000",
    ]


def test_a_field_keeps_its_type():
    assert " value=60.0 " in lines([family(60, whole=False)], "h", 1.0)[0]
    assert f" value={1 << 62}i " in lines([family(1 << 62)], "h", 1.0)[0]


@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n")), min_size=1, max_size=4))
def test_whatever_a_label_holds_the_point_reads_back(texts):
    names = tuple(f"label{number}" for number in range(len(texts)))
    (line,) = lines([family(3, labels=names, texts=tuple(texts))], "host", 1.0)
    # By the rules of the line protocol: a separator counts unless a backslash stands before it.
    head, field, time = re.split(r"(?<!\\) ", line)
    measurement, *tags = re.split(r"(?<!\\),", head)
    found = dict(re.split(r"(?<!\\)=", tag) for tag in tags)
    read = {key: re.sub(r"\\([,= ])", r"\1", text) for key, text in found.items()}
    expected = {name: re.sub(r"\\+$", lambda end: "_" * len(end[0]), text) for name, text in zip(names, texts, strict=True) if text}
    assert read == {"host": "host"} | expected
    assert (measurement, field, time) == ("xdpmond_packets_total", "value=3i", "1000000000")


def test_no_label_can_end_a_point():
    (line,) = lines([family(texts=("a\nxdpmond_packets_total value=9i",))], "h", 1.0)
    assert "\n" not in line


class Database(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Takes points, or answers as it is told."""

    daemon_threads = True

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = queue.Queue()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.answers.pop(0) if self.server.answers else 204
        self.server.requests.put((status, self.path, self.headers.get("Authorization"), body.decode()))
        self.send_response(status)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"said")

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def run():
    """Databases and writers that end with the test."""
    ending = []

    class Run:
        records = queue.Queue()

        def database(self, *answers):
            made = Database(*answers)
            threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}).start()
            ending.append(lambda: (made.shutdown(), made.server_close()))
            return made

        def nobody(self):
            """The URL of an address where nobody listens."""
            taken = socket.socket()
            taken.bind(("127.0.0.1", 0))
            ending.append(taken.close)
            return f"http://127.0.0.1:{taken.getsockname()[1]}"

        def writer(self, **settings):
            made = InfluxWriter(InfluxDB(**settings), self.records.put, host="h", first_pause=0.01, timeout=5)
            ending.append(made.close)
            return made

        def told(self):
            return self.records.get(timeout=10)

    yield Run()
    for end in reversed(ending):
        end()


def test_points_go_to_the_database_with_user_or_token(run):
    database = run.database()
    run.writer(url=database.url, database="net", retention_policy="year", user="u", password="p").put([family()], 1.0)
    assert database.requests.get(timeout=10) == (
        204, "/write?db=net&rp=year", "Basic dTpw", "xdpmond_packets_total,host=h,interface=eth0 value=1i 1000000000",
    )  # fmt: skip
    run.writer(url=f"{database.url}/below", bucket="b c", organization="o", token="t").put([family()], 1.0)
    assert database.requests.get(timeout=10)[1:3] == ("/below/api/v2/write?bucket=b+c&org=o", "Token t")


def test_what_the_database_does_not_take_now_is_tried_again_in_order_and_told_once(run):
    database = run.database(503, 429, 404, 500)
    writer = run.writer(url=database.url, database="net")
    writer.put([family(1)], 1.0)
    writer.put([family(2)], 2.0)
    told = run.told()
    assert told.text == f"InfluxDB at {database.url} takes no points: it answers 503 Service Unavailable: said; it is tried again"
    again = run.told()
    assert again.text.endswith("takes points again; 0 were lost") and again.severity == Priority.NOTICE
    writer.close()
    taken = [request[3] for request in [database.requests.get() for _ in range(6)] if request[0] == 204]
    assert ["value=1i" in taken[0], "value=2i" in taken[1]] == [True, True]
    assert (writer.written, writer.lost) == (2, 0)
    assert run.records.empty()


def test_what_the_database_will_never_take_is_lost_and_counted(run):
    database = run.database(400)
    writer = run.writer(url=database.url, database="net")
    writer.put([family(1), family(2)], 1.0)
    writer.put([family(3)], 2.0)
    assert "these points are lost" in run.told().text
    assert run.told().text.endswith("takes points again; 0 were lost")
    assert (writer.written, writer.lost) == (1, 2)


def test_while_the_database_is_away_the_newest_windows_wait_and_the_rest_is_counted(run):
    writer = run.writer(url=run.nobody(), database="net")
    for number in range(MOST_WAITING + 10):
        writer.put([family(number)], float(number))
    assert "Connection refused" in run.told().text
    writer.close()
    assert (writer.written, writer.lost) == (0, MOST_WAITING + 10)


def test_the_queue_is_bounded_in_bytes(run, monkeypatch):
    monkeypatch.setattr(influxdb, "MOST_BYTES", 1000)
    writer = run.writer(url=run.nobody(), database="net")
    for number in range(100):
        writer.put([family(texts=("x" * 300,))], float(number))
    assert writer._bytes <= 1000 and writer.lost >= 97 - 1
    writer.close()
    assert writer.lost == 100


def test_an_authority_that_cannot_be_read_is_refused_before(tmp_path):
    require_readable(InfluxDB())
    with pytest.raises(ConfigError, match=r"influxdb\.ca: /nowhere: No such file"):
        require_readable(InfluxDB(url="https://h", database="d", ca="/nowhere"))
    (tmp_path / "ca").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"influxdb\.ca"):
        require_readable(InfluxDB(url="https://h", database="d", ca=str(tmp_path / "ca")))
