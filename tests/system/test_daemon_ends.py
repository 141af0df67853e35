"""How the daemon ends by itself: with its terminal, and when a part of it fails."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from busfixture import ROOT
from conftest import CONFIG, World

from tests.lab import PYTHON, wait_for

BROKEN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import xdpmond.app
def fails(*_, **__):
    raise RuntimeError("a fault of ours")
xdpmond.app.Window = fails
sys.exit(xdpmond.app.main(sys.argv[1:]))
"""
"""The daemon, with a fault in the task that ends windows."""


def attached(world: World) -> bool:
    return "xdp" in world.host.run("ip", "link", "show", "eth0").stdout


def test_it_ends_with_its_terminal(world: World) -> None:
    """Else it would go on enforcing after it has cut off the SSH session that it was tried in. While the terminal is there, the same
    signal reads the configuration again."""
    config = world.lab.write("terminal.toml", CONFIG)
    log = world.lab.directory / "terminal.log"
    master, slave = os.openpty()
    with log.open("w") as stream:
        process = subprocess.Popen(
            world.host.inside(["setsid", "--ctty", PYTHON, "-m", "xdpmond", "-c", str(config), "--no-bus", "--enforce"]),
            stdin=slave, stdout=stream, stderr=stream, cwd=ROOT, env=world.lab.bus.environment | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    os.close(slave)
    try:
        wait_for(lambda: " is ready" in log.read_text(), "the daemon")
        assert attached(world)
        daemon = daemon_of(process.pid)
        os.kill(daemon, signal.SIGHUP)
        wait_for(lambda: "configuration read again" in log.read_text(), "the reload")
        os.close(master)
        master = -1
        wait_for(lambda: not Path(f"/proc/{daemon}").exists() or "ends and detaches" in log.read_text(), "its end")
        assert process.wait(60) == 0
        wait_for(lambda: not attached(world), "the program to be gone")
        assert log.read_text().count("configuration read again") == 1
    finally:
        if master >= 0:
            os.close(master)
        process.terminate()
        process.wait(60)


def daemon_of(pid: int) -> int:
    """The process itself, or the child that a wrapper has made."""
    while True:
        if b"\0xdpmond\0" in Path(f"/proc/{pid}/cmdline").read_bytes() and Path(f"/proc/{pid}/comm").read_text().startswith("python"):
            return pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children, "there is no daemon"
        pid = int(children[0])


def test_a_part_that_fails_ends_it_all_with_one_traceback(world: World) -> None:
    """Not half a daemon, and no hanging: systemd starts the next one, which goes on with what is kept."""
    config = world.lab.write("broken.toml", 'window = "1s"\n' + CONFIG)
    log = world.lab.directory / "broken.log"
    process = world.lab.spawn(world.host.inside([PYTHON, "-c", BROKEN, "-c", str(config), "--bus", world.lab.bus.address]), log)
    assert process.wait(60) == 1
    said = log.read_text()
    assert "xdpmond ends because a part of it failed" in said
    assert said.count("RuntimeError: a fault of ours") == 1
    assert said.rstrip().splitlines()[-2].startswith("xdpmond: ended by an internal error: RuntimeError")
    assert not attached(world)
