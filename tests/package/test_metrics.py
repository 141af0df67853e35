"""Metrics of the service as the unit confines it: over TCP and a Unix socket, in a text file, with a key that it can read or cannot. The
tests follow one another."""

from __future__ import annotations

import stat
from typing import Any

from .machine import ATTACKER, Machine, wait_for
from .traffic import datagrams

DROPIN = "/etc/xdpmond/xdpmond.toml.d/metrics.toml"
SOCKET = "/run/xdpmond/metrics.sock"
TEXTFILE = "/var/lib/prometheus/node-exporter/xdpmond.prom"

TCP = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9958/metrics').read().decode())"
UNIX = f"""import socket
s = socket.socket(socket.AF_UNIX)
s.connect({SOCKET!r})
s.sendall(b'GET /metrics HTTP/1.1\\r\\n\\r\\n')
print(s.makefile().read())"""


def configure(machine: Machine, *lines: str, refused: bool = False) -> str:
    """Reload with these settings of metrics; what it says."""
    machine.write(DROPIN, "\n".join(["[metrics]", *lines, ""]))
    done = machine.run("systemctl", "reload", "xdpmond", check=False)
    assert (done.returncode != 0) == refused, done.stderr
    return machine.run("xdpmond", "--check-config", check=False).stderr


def python(machine: Machine, program: str, **more: Any) -> str:
    return machine.run("python3", "-c", program, check=False, **more).stdout


def test_they_are_served_to_everybody_on_this_host_over_tcp(machine: Machine) -> None:
    configure(machine, "enable = true", 'refresh = "1s"')
    datagrams(machine, ATTACKER[4], 7201, 3)
    wait_for("the figures", lambda: "\nxdpmond_packets_total{" in python(machine, TCP, user="ordinary"))
    assert machine.unit("ActiveState")["ActiveState"] == "active"


def test_a_unix_socket_is_for_the_group_and_lies_where_the_service_may_write(machine: Machine) -> None:
    said = configure(machine, "enable = true", 'listen = "unix:/run/metrics.sock"', refused=True)
    assert "metrics.listen: /run/metrics.sock cannot be made" in said and "ReadWritePaths=" in said
    configure(machine, "enable = true", f'listen = "unix:{SOCKET}"')
    wait_for("the figures", lambda: "\nxdpmond_build_info{" in python(machine, UNIX))
    assert machine.run("stat", "-c", "%A %U %G", SOCKET).stdout == "srw-rw---- xdpmond xdpmond\n"
    assert python(machine, UNIX, user="ordinary") == ""
    machine.run("systemctl", "restart", "xdpmond")
    wait_for("the figures again", lambda: "\nxdpmond_build_info{" in python(machine, UNIX))


def test_a_text_file_is_refused_until_the_unit_may_write_there(machine: Machine) -> None:
    machine.run("install", "-d", "-o", "xdpmond", "-m", "755", "/var/lib/prometheus/node-exporter")
    said = configure(machine, f'textfile = "{TEXTFILE}"', refused=True)
    assert f"metrics.textfile: {TEXTFILE} cannot be written" in said and "ReadWritePaths=" in said
    machine.write("/etc/systemd/system/xdpmond.service.d/metrics.conf", "[Service]\nReadWritePaths=/var/lib/prometheus/node-exporter\n")
    machine.run("systemctl", "daemon-reload")
    assert machine.run("xdpmond", "--check-config").returncode == 0
    machine.run("systemctl", "restart", "xdpmond")
    wait_for("the file", lambda: "\nxdpmond_build_info{" in machine.run("cat", TEXTFILE, user="ordinary", check=False).stdout)
    assert machine.run("stat", "-c", "%a", TEXTFILE).stdout == f"{stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH:o}\n"
    configure(machine, "enable = false")
    wait_for("the file to go", lambda: machine.run("test", "-e", TEXTFILE, check=False).returncode != 0)


def test_the_installed_command_makes_a_user(machine: Machine) -> None:
    line = machine.run("sh", "-c", "echo tomato | xdpmond --hash-password prometheus", user="ordinary").stdout.strip()
    assert line.startswith("prometheus:scrypt:")
    configure(machine, "enable = true", f'users = ["{line}"]')
    asked = TCP.replace("urllib.request.urlopen('http://127.0.0.1:9958/metrics')",
                        "urllib.request.urlopen(urllib.request.Request('http://127.0.0.1:9958/metrics', headers={'Authorization': "
                        "'Basic ' + __import__('base64').b64encode(b'prometheus:tomato').decode()}))")  # fmt: skip
    wait_for("the figures", lambda: "\nxdpmond_build_info{" in python(machine, asked))
    assert python(machine, TCP) == ""
