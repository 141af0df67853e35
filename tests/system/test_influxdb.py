"""Points of the real daemon in the real InfluxDB (Debian's 1.6, see tests/borrowed.py), by TCP with a password and by its Unix socket: they
are there, and their figures are those that Prometheus' format has and what was sent."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import CONFIG, DENIED4, Start, World
from test_metrics import fetch, samples, scrapable, scrape

from tests.borrowed import borrowed
from tests.lab import wait_for

PORT = 5400


class InfluxDB:
    """A real one in the host's network namespace, with a user and a database. It can be stopped and started."""

    def __init__(self, world: World):
        self._world = world
        self.directory = world.lab.directory / "influxdb"
        self.directory.mkdir(exist_ok=True)
        self.socket = self.directory / "influxdb.sock"
        self._config = world.lab.write("influxdb.conf", f"""
bind-address = "127.0.0.1:8088"
reporting-disabled = true
[meta]
dir = "{self.directory}/meta"
[data]
dir = "{self.directory}/data"
wal-dir = "{self.directory}/wal"
[http]
bind-address = "127.0.0.1:8086"
auth-enabled = true
unix-socket-enabled = true
bind-socket = "{self.socket}"
log-enabled = false
""")  # fmt: skip
        self.start()
        self.query("CREATE USER admin WITH PASSWORD 'admin' WITH ALL PRIVILEGES")

    def start(self) -> None:
        command = [str(borrowed("influxdb") / "usr/bin/influxd"), "-config", str(self._config)]
        self.process = self._world.lab.spawn(self._world.host.inside(command), self._world.lab.directory / "influxdb.log")
        wait_for(self._answers, "InfluxDB to answer", 60)

    def _answers(self) -> bool:
        try:
            return fetch(self._world.host, "http://127.0.0.1:8086/ping")[0] == 204
        except OSError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def query(self, text: str, database: str = "") -> list[dict[str, Any]]:
        """The rows of the answer, with tags and columns as keys."""
        who = urllib.parse.urlencode({"db": database, "u": "admin", "p": "admin"})
        # By POST, as statements want that change something.
        status, body = fetch(self._world.host, f"http://127.0.0.1:8086/query?{who}", urllib.parse.urlencode({"q": text}).encode())
        assert status == 200, body
        (result,) = json.loads(body)["results"]
        assert "error" not in result, result
        return [dict(zip(of["columns"], row, strict=True)) | of.get("tags", {}) for of in result.get("series", ()) for row in of["values"]]

    def latest(self, measurement: str, database: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The last value of each series by its tags."""
        rows = self.query(f'SELECT last("value") AS value FROM "{measurement}" GROUP BY *', database)
        return {tuple(sorted((k, v) for k, v in row.items() if k not in ("time", "value", "host") and v)): row["value"] for row in rows}


@pytest.fixture
def influxdb(world: World) -> Iterator[InfluxDB]:
    made = InfluxDB(world)
    yield made
    made.stop()


def settings(url: str, database: str) -> str:
    return f'\n[influxdb]\nurl = "{url}"\ndatabase = "{database}"\nuser = "admin"\npassword = "admin"\n'


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_points_of_each_window_have_the_figures_of_the_service(world: World, start: Start, influxdb: InfluxDB, kind: str) -> None:
    influxdb.query(f"CREATE DATABASE net_{kind}")
    url = "http://127.0.0.1:8086" if kind == "tcp" else f"unix:{influxdb.socket}"
    config = f'window = "1s"\n{CONFIG}\n[metrics]\nenable = true\nrefresh = "1s"\n{settings(url, f"net_{kind}")}'
    daemon = start(config, "--enforce")
    world.net.datagrams(DENIED4.net, DENIED4.host, PORT, [10] * 25)
    labels = {"interface": "eth0", "family": "ipv4", "protocol": "udp", "verdict": "deny", "action": "drop"}
    key = tuple(sorted(labels.items()))

    def dropped(what: str) -> float:
        return influxdb.latest(f"xdpmond_{what}_total", f"net_{kind}").get(key, 0)

    wait_for(lambda: (dropped("packets"), dropped("bytes")) == (25, 25 * 52), "what was dropped")
    ports = 'SELECT max("value") AS value FROM "xdpmond_port_sources" WHERE "port" = \'5400\''
    wait_for(lambda: [row["value"] for row in influxdb.query(ports, f"net_{kind}")] == [1], "the source on the port")
    found = {name: set(influxdb.latest(name, f"net_{kind}")) for name in ("xdpmond_lost_total", "xdpmond_map_bytes", "xdpmond_build_info")}
    wait_for(lambda: scrapable(world.host), "the server")
    for name, points in found.items():
        series = {line.partition("{")[2] for line in samples(scrape(world.host)) if line.startswith(f"{name}{{")}
        assert len(points) == len(series) > 0
    assert world.lab.status()["losses"]["influxdb"] == 0
    assert "InfluxDB" not in daemon.log


def test_while_it_is_away_windows_wait_and_come_later_and_it_is_told_once(world: World, start: Start, influxdb: InfluxDB) -> None:
    influxdb.query("CREATE DATABASE net_away")
    influxdb.stop()
    daemon = start(f'window = "1s"\n{CONFIG}{settings("http://127.0.0.1:8086", "net_away")}')
    daemon.wait_log("InfluxDB at http://127.0.0.1:8086 takes no points: Connection refused")
    influxdb.start()
    daemon.wait_log("takes points again; 0 were lost")

    def windows() -> list[int]:
        return [row["value"] for row in influxdb.query('SELECT "value" FROM "xdpmond_windows_total"', "net_away")]

    wait_for(lambda: len(windows()) >= 4, "the windows that waited and those after")
    assert windows() == list(range(windows()[0], windows()[0] + len(windows()))), "none is missing"
    assert daemon.log.count("takes no points") == 1


def test_a_database_that_is_missing_or_a_wrong_password_is_told(world: World, start: Start, influxdb: InfluxDB) -> None:
    daemon = start(f'window = "1s"\n{CONFIG}{settings("http://127.0.0.1:8086", "net_missing")}')
    daemon.wait_log("database not found")
    influxdb.query("CREATE DATABASE net_missing")
    daemon.wait_log("takes points again")
    daemon.config.write_text(f'window = "1s"\n{CONFIG}{settings("http://127.0.0.1:8086", "net_missing").replace("admin", "tomato", 1)}')
    world.lab.ctl("reload")
    daemon.wait_log("it answers 401 Unauthorized")
    assert "tomato" not in daemon.log
