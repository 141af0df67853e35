"""Who is talking to the host, asked of the installed service: ports, names, flows, IPFIX, inside the unit's sandbox. The tests follow one
another."""

from __future__ import annotations

import socket
import struct
from typing import Any

from tests.mmdb import encode

from . import netns
from .machine import UNLISTED, Machine, wait_for
from .traffic import datagrams

DROPIN = "/etc/xdpmond/xdpmond.toml.d/who.toml"
UNLISTED_WIRE = bytes(map(int, UNLISTED[4].split(".")))


def served(machine: Machine, where: str) -> bool:
    """Does the daemon serve its metrics there?"""
    get = f"import urllib.request as u; print(u.urlopen('http://{where}/metrics', timeout=5).read().decode())"
    return "xdpmond_build_info" in machine.run("python3", "-c", get, check=False).stdout


def configure(machine: Machine, text: str, how: str = "reload") -> None:
    machine.write(DROPIN, text)
    machine.run("systemctl", how, "xdpmond")


def test_ports_by_source_for_everybody(machine: Machine) -> None:
    configure(machine, 'window = "5s"\n')
    datagrams(machine, UNLISTED[4], 7201, 5)
    asked = ("xdpmonctl", "ports", "--json=short")

    def closed() -> list[dict[str, Any]]:
        return [row for row in machine.json(*asked, user="ordinary") if row["port"] == 7201 and row["packets"]]

    (row,) = wait_for("the window to end", closed)
    assert (row["protocol"], row["sources"], row["packets"], row["exact"]) == ("udp", {"ipv4": 1, "ipv6": 0}, 5, True)
    configure(machine, 'window = "1h"\n')  # what is in it now stays shown
    datagrams(machine, UNLISTED[4], 7201, 5)
    assert "7201" in machine.ctl("ports", user="ordinary").stdout
    assert UNLISTED[4] in machine.ctl("top", user="ordinary").stdout


def test_a_port_that_is_taken_costs_the_metrics_alone(machine: Machine) -> None:
    with netns.open_socket(machine.namespace, socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 9959))
        taken.listen()
        configure(machine, '[metrics]\nenable = true\nlisten = "127.0.0.1:9959"\n')
        wait_for("word of it", lambda: "127.0.0.1:9959" in machine.run("journalctl", "-u", "xdpmond", "-o", "cat", "-p", "warning").stdout)
        assert machine.status()["interfaces"][0]["state"] == "attached"
    wait_for("the metrics once the port is free", lambda: served(machine, "127.0.0.1:9959"))


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
