"""Metrics of the real daemon, read by the real Prometheus (Debian's, see tests/borrowed.py): what it says of them, that its figures are
those of a witness on the wire, and that each panel of the dashboard and each alert finds what it asks for."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIG, DENIED4, DENIED6, EVERYWHERE, PERMITTED4, UNLISTED4, UNLISTED6, Start, World

from bench.stage import CONFIG as STAGE_CONFIG
from bench.stage import NotifySocket, Stage, stage
from tests.borrowed import borrowed
from tests.lab import Space, Witness, wait_for, within
from xdpmond.measures import FAMILIES
from xdpmond.sinks.passwords import hashed

CONTRIB = Path(__file__).resolve().parents[2] / "contrib"
DASHBOARD = json.loads((CONTRIB / "grafana/xdpmond.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]

METRICS = """
[metrics]
enable = true
refresh = "1s"
active_users = true
list = true
"""
PORT = 5300


def fetch(space: Space, url: str, data: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of what a GET brings, or a POST of the data."""

    def ask() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(url, data, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    found: tuple[int, bytes] = within(space.path, ask)
    return found


def scrape(space: Space, url: str = "http://127.0.0.1:9958/metrics") -> str:
    status, body = fetch(space, url)
    assert status == 200, body
    return body.decode()


def scrapable(space: Space, url: str = "http://127.0.0.1:9958/metrics") -> bool:
    with contextlib.suppress(OSError):
        return fetch(space, url)[0] == 200
    return False


def samples(text: str) -> dict[str, float]:
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")}


def promtool(*arguments: str | Path, input: str | None = None) -> str:
    """Run promtool, which must have nothing to complain of."""
    command = [borrowed("prometheus") / "usr/bin/promtool", *map(str, arguments)]
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """A real one, in a network namespace, that reads the daemon every second."""

    def __init__(self, world: World, job: str = 'static_configs: [{targets: ["127.0.0.1:9958"]}]'):
        """`job`: what it reads, in YAML."""
        self._space = world.host
        data = tempfile.mkdtemp(dir=world.lab.directory)  # what another one has read is not for this one
        jobs = f"scrape_configs: [{{job_name: xdpmond, {job}}}]"
        config = world.lab.write("prometheus.yml", f"global: {{scrape_interval: 1s}}\n{jobs}\n")
        command = [str(borrowed("prometheus") / "usr/bin/prometheus"), f"--config.file={config}", "--log.level=warn",
                   f"--storage.tsdb.path={data}", "--web.listen-address=127.0.0.1:9090"]  # fmt: skip
        self.log = world.lab.directory / "prometheus.log"
        self.process = world.lab.spawn(self._space.inside(command), self.log)
        wait_for(lambda: scrapable(self._space, "http://127.0.0.1:9090/-/ready"), "Prometheus to be ready", 60)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The answer to an instant query."""
        url = f"http://127.0.0.1:9090/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        status, body = fetch(self._space, url)
        assert status == 200, f"{expression}: {body.decode()}"
        found: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return found

    def number(self, expression: str) -> float | None:
        found = self.query(expression)
        assert len(found) <= 1, f"{expression} has {len(found)} answers"
        return float(found[0]["value"][1]) if found else None


@pytest.fixture
def prometheus(world: World) -> Iterator[Prometheus]:
    made = Prometheus(world)
    yield made
    made.process.terminate()
    made.process.wait(60)
    assert "err=" not in made.log.read_text(), made.log.read_text()


def test_promtool_finds_nothing_to_complain_of(world: World, start: Start) -> None:
    start(f'window = "1s"\n{CONFIG}{METRICS}')
    world.net.datagrams(UNLISTED4.net, UNLISTED4.host, PORT, [10])
    wait_for(lambda: "xdpmond_port_sources{" in scrape(world.host) if scrapable(world.host) else False, "a window")
    text = scrape(world.host)
    promtool("check", "metrics", input=text)
    for row in FAMILIES:
        assert f"# TYPE {row.name} {row.kind}\n" in text
    assert not re.search(r"\b(198\.51\.100|203\.0\.113|10\.0\.0)\.|2001:db8", text), "an address"


def test_promtool_takes_the_rules_and_they_do_as_their_tests_say() -> None:
    promtool("check", "rules", CONTRIB / "prometheus/xdpmond.rules.yml")
    promtool("test", "rules", CONTRIB / "prometheus/xdpmond.tests.yml")
    promtool("check", "config", CONTRIB / "prometheus/prometheus.yml")


def test_alerts_and_panels_ask_for_nothing_that_is_not_there() -> None:
    names = {row.name for row in FAMILIES} | {"xdpmond_series"}
    rules = (CONTRIB / "prometheus/xdpmond.rules.yml").read_text()
    asked = set(re.findall(r"\bxdpmond_[a-z_]+", " ".join([*QUERIES, *re.findall(r"expr:(.*?)(?=\n +(?:for|labels):)", rules, re.DOTALL)])))
    assert len(asked) > 20
    assert asked <= names


class Traffic:
    """Datagrams from each kind of source, until it is told to stop."""

    def __init__(self, world: World):
        self._world = world
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        for size in itertools.count(1):
            for ends in EVERYWHERE:
                self._world.net.datagrams(ends.net, ends.host, PORT, [size % 1000])
            if self._stop.wait(0.05):
                return

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_prometheus_has_the_witness_s_figures_and_answers_each_panel(
    world: World, witnessed: Callable[..., Witness], prometheus: Prometheus
) -> None:
    witness = witnessed(f'window = "2s"\n{CONFIG}{METRICS}', "--enforce")

    def asked(expression: str) -> str:
        for variable, value in (("$__rate_interval", "1m"), ("$job", ".*"), ("$instance", ".*")):
            expression = expression.replace(variable, value)
        assert "$" not in expression
        return expression

    with Traffic(world):
        wait_for(lambda: prometheus.query("xdpmond_messages_total"), "the first figures")
        world.lab.ctl("reload")  # of which a message tells
        for expression in map(asked, QUERIES):
            wait_for(lambda expression=expression: prometheus.query(expression), f"an answer to {expression}")  # type: ignore[misc]
        for family in ("ipv4", "ipv6"):
            of_port = f'xdpmond_port_sources{{family="{family}", protocol="udp", port="{PORT}"}}'
            wait_for(lambda of_port=of_port: prometheus.number(of_port) == 3, f"three {family} sources on the port")  # type: ignore[misc]
        users = f'active_users{{network="IPv4",transport="UDP",port="{PORT}"}}'
        wait_for(lambda: prometheus.number(users) == 3, "the same as active users")

    def count(*sources: str) -> tuple[int, int]:
        sizes = [frame.size for frame in witness.frames() if frame.protocol == 17 and frame.source in sources]
        return len(sizes), sum(sizes)

    def shown(what: str, **labels: str) -> float | None:
        wanted = ",".join(f'{name}="{value}"' for name, value in labels.items())
        return prometheus.number(f"sum(xdpmond_{what}_total{{{wanted}}})")

    for ends, labels in (
        (DENIED4, {"family": "ipv4", "verdict": "deny", "action": "drop"}),
        (DENIED6, {"family": "ipv6", "verdict": "deny", "action": "drop"}),
        (UNLISTED4, {"family": "ipv4", "verdict": "log", "action": "log"}),
        (UNLISTED6, {"family": "ipv6", "verdict": "log", "action": "log"}),
        (PERMITTED4, {"family": "ipv4", "verdict": "allow", "action": "pass"}),
    ):
        wanted = count(ends.net)
        assert wanted[0] > 10
        wait_for(
            lambda labels=labels, wanted=wanted: (shown("packets", protocol="udp", **labels), shown("bytes", protocol="udp", **labels))
            == wanted,
            f"{wanted[0]} packets and {wanted[1]} bytes of {ends.net}",
        )  # type: ignore[misc]
    wait_for(
        lambda: (shown("packets"), shown("bytes")) == (len(witness.frames()), sum(frame.size for frame in witness.frames())),
        "every frame on the wire, and no other",
    )

    def denied() -> int:  # a neighbour goes on asking for us
        return len([frame for frame in witness.frames() if frame.source in (DENIED4.net, DENIED6.net)])

    decided = {"verdict": "deny", "origin": "configuration"}
    wait_for(lambda: shown("rule_packets", **decided) == denied(), "what the entries decided on, when the window has ended")
    wait_for(
        lambda: prometheus.number('sum(xdpmond_talker_packets_total{state="tracked"}) == sum(xdpmond_sourced_packets_total)'),
        "the books to balance when windows have ended",
    )


def test_prometheus_reads_from_elsewhere_by_tls_with_a_password(world: World, start: Start, tmp_path: Path) -> None:
    certificate, key = tmp_path / "metrics.crt", tmp_path / "metrics.key"
    # As docs/metrics.md has it.
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "365", "-subj",
                    "/CN=web.example.net", "-addext", "subjectAltName=DNS:web.example.net", "-keyout", key, "-out", certificate],
                   check=True, capture_output=True)  # fmt: skip
    listen = f"{PERMITTED4.host}:9958"
    user = hashed("prometheus", "tomato")
    start(f'{CONFIG}{METRICS}listen = "{listen}"\ncertificate = "{certificate}"\nkey = "{key}"\nusers = ["{user}"]\n')
    tls = f'scheme: https, tls_config: {{ca_file: "{certificate}", server_name: web.example.net}}'
    password = "basic_auth: {username: prometheus, password: tomato}"
    made = Prometheus(world, f'{tls}, {password}, static_configs: [{{targets: ["{listen}"]}}]')
    wait_for(lambda: made.number("up") == 1 and made.number("count(xdpmond_build_info)") == 1, "a scrape")
    made.process.terminate()
    made.process.wait(60)


def test_node_exporter_takes_the_text_file(world: World, start: Start, tmp_path: Path) -> None:
    start(f'{CONFIG}\n[metrics]\nrefresh = "1s"\ntextfile = "{tmp_path / "xdpmond.prom"}"\n')
    command = [str(borrowed("prometheus-node-exporter") / "usr/bin/prometheus-node-exporter"), "--web.listen-address=127.0.0.1:9100",
               "--collector.disable-defaults", "--collector.textfile", f"--collector.textfile.directory={tmp_path}"]  # fmt: skip
    exporter = world.lab.spawn(world.host.inside(command), tmp_path / "node_exporter.log")
    url = "http://127.0.0.1:9100/metrics"
    wait_for(lambda: scrapable(world.host, url) and "xdpmond_build_info" in scrape(world.host, url), "our figures among those of the node")
    found = samples(scrape(world.host, url))
    assert found["node_textfile_scrape_error"] == 0
    assert found["xdpmond_last_reload_successful"] == 1
    exporter.terminate()
    exporter.wait(60)


def test_the_list_has_the_shape_of_the_reference(world: World, start: Start) -> None:
    start(f'window = "1s"\n{CONFIG}{METRICS}')
    wait_for(lambda: scrapable(world.host), "the server")

    def listed() -> list[dict[str, Any]]:
        world.net.datagrams(UNLISTED4.net, UNLISTED4.host, PORT, [10])
        world.net.datagrams(DENIED6.net, DENIED6.host, PORT, [10])
        found: list[dict[str, Any]] = json.loads(fetch(world.host, "http://127.0.0.1:9958/list")[1])
        return [source for source in found if source["port"] == PORT]

    wanted = [{"ip": UNLISTED4.net, "network": "IPv4", "transport": "UDP", "port": PORT},
              {"ip": DENIED6.net, "network": "IPv6", "transport": "UDP", "port": PORT}]  # fmt: skip
    wait_for(lambda: sorted(listed(), key=lambda source: source["network"]) == wanted, "both sources in the list")


def test_a_reload_moves_the_server_and_an_address_in_use_is_told_once(world: World, start: Start, tmp_path: Path) -> None:
    daemon = start(f"{CONFIG}{METRICS}")
    wait_for(lambda: scrapable(world.host), "the server")
    path = tmp_path / "xdpmond.prom"
    with world.host.listen("127.0.0.1", 9959):
        daemon.config.write_text(f'{CONFIG}{METRICS}listen = "127.0.0.1:9959"\ntextfile = "{path}"\n')
        world.lab.ctl("reload")
        daemon.wait_log("metrics cannot be served on 127.0.0.1:9959: Address already in use")
        assert not scrapable(world.host)
        wait_for(path.exists, "the text file")
        promtool("check", "metrics", input=path.read_text())
    daemon.wait_log("metrics are served on 127.0.0.1:9959 now")
    assert daemon.log.count("metrics cannot be served") == 1
    assert scrapable(world.host, "http://127.0.0.1:9959/metrics")

    def told(series: str) -> float:
        return samples(scrape(world.host, "http://127.0.0.1:9959/metrics"))[series]

    assert told('xdpmond_reloads_total{result="good"}') == 1
    wait_for(lambda: told('xdpmond_messages_total{message="metrics_problem"}') == 2, "both messages to be counted")
    daemon.config.write_text(CONFIG)
    world.lab.ctl("reload")
    wait_for(lambda: not scrapable(world.host, "http://127.0.0.1:9959/metrics"), "the server to end")
    wait_for(lambda: not path.exists(), "the text file to go, which would be out of date")


def test_what_cannot_work_is_refused_by_a_check_and_by_a_reload(world: World, start: Start, tmp_path: Path) -> None:
    daemon = start(CONFIG)
    for text, message in (
        ('listen = "0.0.0.0:9958"', "metrics.listen: 0.0.0.0:9958 can be reached by others than this host"),
        ('certificate = "/nowhere"\nkey = "/nowhere"', "metrics.certificate: /nowhere: No such file or directory"),
        ('textfile = "/nowhere/x.prom"', "metrics.textfile: /nowhere/x.prom cannot be written: there is no directory /nowhere"),
    ):
        daemon.config.write_text(f"{CONFIG}\n[metrics]\nenable = true\n{text}\n")
        assert message in world.lab.ctl("reload", status=6).stderr
        if "textfile" not in text:
            assert message in world.lab.ctl("check-config", str(daemon.config), status=6).stderr
    daemon.config.write_text(CONFIG)


def test_totals_go_on_over_a_restart_and_what_is_the_process_s_own_begins_anew(tmp_path: Path) -> None:
    with stage() as at, NotifySocket(at.directory / "notify") as manager:
        at.configure(f'window = "1s"\n{STAGE_CONFIG}{METRICS}')
        space = Space(at.namespace)
        at.within("ip", "addr", "add", "10.9.0.1/24", "dev", "front")
        daemon = at.start(manager)
        try:
            send(at, 100)
            key = "xdpmond_packets_total{" + 'action="pass",family="ipv4",interface="front",protocol="udp",verdict="allow"}'
            wait_for(lambda: scrapable(space) and samples(scrape(space))[key] == 100, "the packets")
            before = samples(scrape(space))
        finally:
            daemon.kill()
        send(at, 11)
        daemon = at.start(manager)
        try:
            wait_for(lambda: scrapable(space) and samples(scrape(space))[key] == 111, "those before, between and after")
            after = samples(scrape(space))
        finally:
            daemon.kill()
    assert after["xdpmond_counting_since_timestamp_seconds"] == pytest.approx(before["xdpmond_counting_since_timestamp_seconds"], abs=1)
    assert after["xdpmond_start_timestamp_seconds"] > before["xdpmond_start_timestamp_seconds"]
    assert after['xdpmond_messages_total{message="took_over"}'] == 1


def send(at: Stage, number: int) -> None:
    """Frames through the other end of the wire: UDP over IPv4 from a permitted source."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    frame = bytes(Ether(dst="ff:ff:ff:ff:ff:ff") / IP(src="10.9.0.2", dst="10.9.0.1") / UDP(sport=1, dport=PORT) / b"xdpmond")
    with Space(at.namespace).raw("wire") as wire:
        for _ in range(number):
            wire.send(frame)
