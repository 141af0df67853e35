"""The tables and the live screen on real traffic and the real daemon, which is killed and comes back."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.lab import PYTHON, Daemon, Lab, Space, interruptible, laboratory, wait_for
from tests.unit.terminal import Console

CONFIG = 'interface = "in0"\nwindow = "2s"\ndeny = ["10.7.0.3"]\n'


@pytest.fixture
def lab() -> Iterator[Lab]:
    with interruptible(), laboratory() as made:
        yield made


@pytest.fixture
def wire(lab: Lab) -> tuple[Space, Space]:
    host, net = lab.space("host"), lab.space("net")
    lab.veth(host, "in0", net, "net0")
    host.ip("addr add 10.7.0.1/24 dev in0", "addr add fd07::1/64 nodad dev in0")
    net.ip(*(f"addr add 10.7.0.{number}/24 dev net0" for number in (2, 3)), "addr add fd07::2/64 nodad dev net0")
    return host, net


@pytest.fixture
def daemon(lab: Lab, wire: tuple[Space, Space]) -> Daemon:
    return lab.daemon(wire[0], CONFIG)


def console(lab: Lab, *words: str) -> Console:
    environ = {**lab.environment, "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    return Console([PYTHON, "-m", "xdpmond.cli", "--bus", lab.bus.address, *words], environ)


@pytest.fixture
def live(lab: Lab, daemon: Daemon) -> Iterator[Console]:
    found = console(lab, "top", "--watch", "0.3", "--proto", "udp")
    yield found
    found.close()


def cells(screen: Console, source: str) -> list[str]:
    """What stands beside a source on the screen."""
    return next((line.split() for line in screen.screen.lines if line.split()[:1] == [source]), [])


def test_a_live_screen_over_the_end_of_the_daemon(lab: Lab, wire: tuple[Space, Space], daemon: Daemon, live: Console) -> None:
    host, net = wire
    live.until(lambda screen: "q quit" in screen.text)

    def send() -> None:
        net.datagrams("10.7.0.2", "10.7.0.1", 53, [100] * 5)
        net.datagrams("10.7.0.3", "10.7.0.1", 53, [1000] * 5)

    def both(*_: object) -> bool:
        send()
        return bool(cells(live, "10.7.0.2") and cells(live, "10.7.0.3"))

    live.until(both)
    assert cells(live, "10.7.0.3")[1] == "udp/53"
    assert "deny" in cells(live, "10.7.0.3") and "log" in cells(live, "10.7.0.2")
    sources = [line.split()[0] for line in live.screen.lines if line.startswith("10.7.0.")]
    assert sources[:1] == ["10.7.0.3"], "it sends ten times the bytes"
    daemon.stop(signal.SIGKILL)
    live.until(lambda screen: "the daemon is not running, waiting for it" in screen.text)
    lab.daemon(host, CONFIG, name="again.toml")
    live.until(lambda screen: "MONITOR" in screen.text)
    live.until(both)
    live.type("q")
    assert live.ended() == 0
    assert not live.screen.alternate and live.screen.cursor and live.attributes == live.before


def test_status_fits_a_terminal(lab: Lab, wire: tuple[Space, Space], daemon: Daemon) -> None:
    _, net = wire

    def closed() -> bool:
        for source in ("10.7.0.2", "10.7.0.3"):
            net.datagrams(source, "10.7.0.1", 53, [100] * 200)
        return bool(lab.status()["window"]["number"])

    wait_for(closed, "a full window")
    assert closed()  # what was sent now is of the running window, or of the last
    shown = console(lab, "status")
    try:
        assert shown.ended() == 0
        lines = shown.screen.lines
        assert lines[0].startswith("MONITOR"), "its first line has not left the screen"
        assert any(line.startswith("windows   ") for line in lines)
        assert any(line.startswith("top sources of ") for line in lines)
        assert not lines[-1]
    finally:
        shown.close()


def test_flows_that_are_off_and_on(lab: Lab, wire: tuple[Space, Space], daemon: Daemon) -> None:
    host, net = wire
    refused = lab.ctl("flows", status=None)
    assert refused.returncode != 0
    assert "flows are off" in refused.stderr and "[flows]" in refused.stderr
    live = console(lab, "flows", "--watch")
    assert live.ended() == refused.returncode
    assert live.screen.frames == 0
    live.close()
    daemon.stop()
    lab.daemon(host, CONFIG + "[flows]\nenable = true\n", name="flows.toml")
    net.datagrams("10.7.0.2", "10.7.0.1", 53, [100] * 7)
    words = lab.ctl("flows", "--no-legend", "--address", "10.7.0.2", "--port", "53").stdout.split()
    assert words[1:4] == ["10.7.0.1:53", "udp", "7"]
    assert words[0].startswith("10.7.0.2:")
    assert lab.ctl("flows", "--no-legend", "--address", "10.7.0.9").stdout == ""
