"""Who is talking to the host, asked of the installed service: ports, flows, metrics, IPFIX, inside the unit's sandbox. The tests follow one
another."""

from __future__ import annotations

import json
import struct

from tests.mmdb import encode

from .machine import UNLISTED, Machine, wait_for
from .traffic import datagrams

DROPIN = "/etc/xdpmond/xdpmond.toml.d/who.toml"
METRICS = "127.0.0.1:9958"
SOCKET = "/run/xdpmond/metrics.sock"
UNLISTED_WIRE = bytes(map(int, UNLISTED[4].split(".")))

GET = """
import http.client, socket, sys
class Local(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(sys.argv[1].removeprefix("unix:"))
where = sys.argv[1]
connection = Local("localhost") if where.startswith("unix:") else http.client.HTTPConnection(where, timeout=10)
connection.request("GET", sys.argv[2])
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode())
"""


def get(machine: Machine, where: str, path: str = "/metrics", user: str = "") -> tuple[int, str]:
    """Status and body; 0 if nobody answers."""
    done = machine.run("python3", "-c", GET, where, path, user=user, check=False)
    status, _, body = done.stdout.partition("\n")
    return int(status or 0), body if done.returncode == 0 else done.stderr


def configure(machine: Machine, text: str, how: str = "reload") -> None:
    machine.write(DROPIN, text)
    machine.run("systemctl", how, "xdpmond")


def test_ports_by_source_for_everybody(machine: Machine) -> None:
    configure(machine, 'window = "5s"\n')
    datagrams(machine, UNLISTED[4], 7201, 5)
    asked = ("xdpmonctl", "ports", "--json=short")
    wait_for("the window to end", lambda: [row for row in machine.json(*asked, user="ordinary") if row["port"] == 7201 and row["packets"]])
    row = next(row for row in machine.json(*asked) if row["port"] == 7201)
    assert (row["protocol"], row["sources"], row["packets"], row["exact"]) == ("udp", {"ipv4": 1, "ipv6": 0}, 5, True)
    assert "7201" in machine.ctl("ports", user="ordinary").stdout
    assert UNLISTED[4] in machine.ctl("top", user="ordinary").stdout


def test_metrics_over_loopback(machine: Machine) -> None:
    configure(machine, f'window = "1s"\n[metrics]\nenable = true\nlisten = "{METRICS}"\nrefresh = "1s"\n')
    wait_for("the metrics", lambda: get(machine, METRICS)[0] == 200)
    body = get(machine, METRICS, user="ordinary")[1]
    assert 'xdpmond_build_info{version="' in body and 'xdpmond_packets_total{action="log",family="ipv4",interface="host0"' in body
    assert UNLISTED[4] not in body
    assert get(machine, METRICS, "/list")[0] == 404


def test_metrics_on_a_socket_for_the_group(machine: Machine) -> None:
    configure(machine, f'window = "1s"\n[metrics]\nenable = true\nlisten = "unix:{SOCKET}"\nlist = true\n')
    wait_for("the socket", lambda: get(machine, f"unix:{SOCKET}")[0] == 200)
    assert get(machine, METRICS)[0] == 0
    assert machine.run("stat", "-c", "%A %U %G", SOCKET).stdout == "srw-rw---- xdpmond xdpmond\n"
    assert get(machine, f"unix:{SOCKET}", user="ordinary")[0] == 0

    def listed() -> bool:
        datagrams(machine, UNLISTED[4], 7203, 1)
        return any(row["ip"] == UNLISTED[4] for row in json.loads(get(machine, f"unix:{SOCKET}", "/list")[1]))

    wait_for("the source in the list", listed)


def test_a_port_that_is_taken_costs_the_metrics_alone(machine: Machine) -> None:
    taken = machine.popen("nc", "-l", "127.0.0.1", "9959")
    try:
        wait_for("nc to listen", lambda: "9959" in machine.run("ss", "-ltn").stdout)
        configure(machine, '[metrics]\nenable = true\nlisten = "127.0.0.1:9959"\n')
        wait_for("word of it", lambda: "127.0.0.1:9959" in machine.run("journalctl", "-u", "xdpmond", "-o", "cat", "-p", "warning").stdout)
        assert machine.status()["interfaces"][0]["state"] == "attached"
    finally:
        taken.terminate()
        taken.wait()
    wait_for("the metrics once the port is free", lambda: get(machine, "127.0.0.1:9959")[0] == 200)


def test_what_the_unit_may_not_write_is_refused_by_name(machine: Machine) -> None:
    machine.write(DROPIN, '[metrics]\ntextfile = "/srv/node/xdpmond.prom"\n')
    machine.run("install", "-d", "-o", "xdpmond", "/srv/node")
    for command in (["xdpmond", "--check-config"], ["systemctl", "reload", "xdpmond"]):
        assert machine.run(*command, check=False).returncode != 0, command
    said = machine.run("xdpmond", "--check-config", check=False).stderr
    assert f"{DROPIN}:2: metrics.textfile" in said and "ReadWritePaths=" in said
    assert get(machine, "127.0.0.1:9959")[0] == 200  # the refused reload has changed nothing
    machine.write("/etc/systemd/system/xdpmond.service.d/node.conf", "[Service]\nReadWritePaths=/srv/node\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "xdpmond")
    wait_for("the file", lambda: "xdpmond_build_info" in machine.run("cat", "/srv/node/xdpmond.prom", check=False).stdout)
    assert machine.run("stat", "-c", "%A", "/srv/node/xdpmond.prom").stdout == "-rw-r--r--\n"


def test_country_and_autonomous_system(machine: Machine) -> None:
    network = f"{UNLISTED[4]}/32"
    country = encode({network: {"country": {"iso_code": "NO"}}}, kind="GeoLite2-Country")
    asn = encode({network: {"autonomous_system_number": 64500, "autonomous_system_organization": "Example"}}, kind="GeoLite2-ASN")
    for name, content in (("country", country), ("asn", asn)):
        path = machine.copy.root / f"usr/share/GeoIP/{name}.mmdb"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    configure(machine, '[names]\ncountry = "/usr/share/GeoIP/country.mmdb"\nasn = "/usr/share/GeoIP/asn.mmdb"\n')
    datagrams(machine, UNLISTED[4], 7205, 1)
    row = next(row for row in machine.json("xdpmonctl", "top", "--json=short", "--limit", "100") if row["source"] == UNLISTED[4])
    assert (row["country"], row["as_number"], row["as_name"]) == ("NO", 64500, "Example")


def test_flows_and_ipfix(machine: Machine) -> None:
    assert "[flows]" in machine.ctl("flows", check=False).stderr
    with machine.receiver(4739) as collector:
        collector.settimeout(20)
        text = 'window = "1s"\n[flows]\nenable = true\ninactive_timeout = "1s"\n[ipfix]\ncollector = "127.0.0.1:4739"\n'
        configure(machine, text, "restart")
        datagrams(machine, UNLISTED[4], 7204, 3)
        asked = ("xdpmonctl", "flows", "--json=short")
        wait_for("the flow", lambda: any(flow["port"] == 7204 for flow in machine.json(*asked, user="ordinary")))
        seen = b""
        while UNLISTED_WIRE not in seen:
            message = collector.recv(65536)
            assert struct.unpack(">HH", message[:4]) == (10, len(message))
            seen += message
    machine.run("rm", DROPIN)
    machine.run("systemctl", "restart", "xdpmond")
    assert machine.status()["books"]["balanced"]
