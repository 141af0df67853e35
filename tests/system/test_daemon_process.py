"""The daemon as a process: what it maps, holds and leaks, whether its loop stays free, and how it fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from busfixture import ROOT
from conftest import CONFIG, DENIED4, PERMITTED4, UNLISTED4, Start, World
from test_daemon_events import spoof

from tests.lab import NOBODY, PYTHON, wait_for

MEASURED = f"""
import asyncio.events, runpy, sys, time
run = asyncio.events.Handle._run
def measured(handle):
    began = time.thread_time()
    run(handle)
    used = time.thread_time() - began
    if used > 0.05:
        what = getattr(getattr(handle._callback, "__self__", None), "get_coro", lambda: handle)()
        print(f"BLOCKED {{used * 1000:.0f}} ms {{what!r}}", file=sys.stderr)
asyncio.events.Handle._run = measured
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = "xdpmond"
runpy.run_module("xdpmond", run_name="__main__")
"""
"""The daemon, with every callback of its loop measured. In time of the loop's thread, so that a busy machine blames nobody."""


def test_the_compiler_stays_out_of_the_daemon(world: World, start: Start) -> None:
    daemon = start()
    world.lab.ctl("reload")
    maps = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "libbpf" in maps
    for library in ("LLVM", "clang", "libbcc"):
        assert library not in maps
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    assert children == []


def test_nothing_piles_up(world: World, start: Start, tmp_path: Path) -> None:
    """Descriptors and threads are as many after a lot of work as before it."""
    daemon = start('window = "1s"\n' + CONFIG, "--state", str(tmp_path / "policy.log"))

    def work() -> None:
        for command in (["deny", UNLISTED4.net], ["top"], ["list"], ["events"], ["status"], ["explain", UNLISTED4.net], ["reload"],
                        ["remove", UNLISTED4.net], ["mode", "enforce"], ["mode", "default"], ["deny", "192.0.2.1/24"]):  # fmt: skip
            world.lab.ctl(*command, status=None)

    def held() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{daemon.pid}/fd")), len(os.listdir(f"/proc/{daemon.pid}/task"))

    work()
    work()
    before = held()
    work()
    work()
    wait_for(lambda: held()[0] <= before[0], f"no more descriptors than {before[0]}")
    assert held()[1] <= before[1] + 2  # the pool of threads grows to its size


def test_the_loop_stays_free(world: World, tmp_path: Path) -> None:
    """Lists of many thousand prefixes and a flood are work for threads: nobody waits for them."""
    config = world.lab.write("measured.toml", 'window = "1s"\nsummary_interval = "1s"\n' + CONFIG)
    log = world.lab.directory / "measured.log"
    command = [PYTHON, "-c", MEASURED, "-c", str(config), "--bus", world.lab.bus.address, "--state", str(tmp_path / "policy.log")]
    process = world.lab.spawn(world.host.inside(command), log)
    try:
        wait_for(lambda: " is ready" in log.read_text(), "the daemon")
        started = len(log.read_text())
        many = tmp_path / "many"
        many.write_text("".join(f"100.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}\n" for n in range(40_000)))
        ctl = world.lab.ctl
        ctl("deny", "--from-file", str(many))
        for command in (
            ["status"],
            ["deny", UNLISTED4.net, "--for", "1s"],
            ["list", "-j"],
            ["explain", "100.0.0.7"],
            ["remove", "100.0.0.7"],
        ):
            ctl(*command)
        with many.open() as lines:
            prefixes = ", ".join(f'"{line.strip()}"' for line in list(lines)[:10_000])
        config.write_text(config.read_text().replace("deny = [", f"deny = [{prefixes}, "))
        ctl("reload")
        spoof(world, 20_000)
        wait_for(lambda: (world.lab.status()["window"]["number"] or 0) > 5, "windows to end")
        ctl("top", "--limit", "100000", "-j")
        wait_for(lambda: UNLISTED4.net + "/32 has ended" in log.read_text(), "an entry to end")
        blocked = [line for line in log.read_text()[started:].splitlines() if line.startswith("BLOCKED")]
        assert blocked == [], "\n".join(blocked)
    finally:
        process.terminate()
        process.wait(60)


def test_a_long_list_is_taken_and_enforced(world: World, start: Start, tmp_path: Path) -> None:
    start(CONFIG, "--enforce")
    many = tmp_path / "many"
    many.write_text("".join(f"100.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}\n" for n in range(200_000)) + UNLISTED4.net + "\n")
    assert world.lab.json("deny", "--from-file", str(many))["applied"] == 200_001
    assert world.drops(UNLISTED4)
    assert world.passes(PERMITTED4)


# How it fails


def failing(world: World, *options: str, uid: int = 0, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and words of a daemon that does not come up."""
    config = world.lab.write("failing.toml", CONFIG)
    command = [PYTHON, "-m", "xdpmond", "-c", str(config), "--no-bus", *options]
    if uid:
        command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--", *command]
        environment = {"PYTHONPATH": str(world.lab.readable()), **(environment or {})}
    done = subprocess.run(world.host.inside(command), cwd="/", capture_output=True, text=True, timeout=120, check=False,
                          env={**world.lab.environment, **(environment or {})})  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_program_that_does_not_compile(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "bpf"
    shutil.copytree(ROOT / "bpf", broken)
    source = broken / "xdpmond.bpf.c"
    source.write_text(source.read_text().replace("int xdpmond(", "int xdpmond((", 1))
    status, said = failing(world, environment={"XDPMOND_BPF_DIR": str(broken)})
    assert status == 1 and "does not compile" in said and "error: expected" in said and "Traceback" not in said
    status, said = failing(world, environment={"XDPMOND_BPF_DIR": str(tmp_path / "nothing")})
    assert status == 1 and str(tmp_path / "nothing") in said and "Traceback" not in said
    assert "xdp" not in world.host.run("ip", "link", "show", "eth0").stdout


def test_a_later_boot_needs_no_compiler(world: World, start: Start, tmp_path: Path) -> None:
    """What one start has compiled, the next one loads; if it cannot, that is told once."""
    state, without = tmp_path / "state", tmp_path / "without"
    state.mkdir()
    without.mkdir()
    (without / "bcc.py").write_text("raise ImportError('there is no compiler')")
    usual, bare = {"STATE_DIRECTORY": str(state)}, {"STATE_DIRECTORY": str(state), "PYTHONPATH": f"{ROOT}:{without}"}
    status, said = failing(world, environment=bare)
    assert status == 1 and "there is no compiler" in said
    assert start(CONFIG, environment=usual).stop() == 0
    again = start(CONFIG, "--enforce", environment=bare)
    assert world.drops(DENIED4)
    assert again.stop() == 0
    kept = state / "program"
    kept.write_bytes(kept.read_bytes()[:-1])
    damaged = start(CONFIG, environment=usual)
    assert damaged.log.count("it is damaged") == 1
    assert damaged.stop() == 0
    healed = start(CONFIG, environment=bare)
    assert str(kept) not in again.log + healed.log


def test_an_ordinary_user_is_told_what_is_missing(world: World) -> None:
    status, said = failing(world, uid=NOBODY, environment={"XDPMOND_BPF_DIR": str(world.lab.readable() / "bpf")})
    assert status == 1 and "Traceback" not in said
    assert re.search(r"root|CAP_BPF|not permitted", said)


def test_a_bus_that_is_not_there_is_waited_for(world: World, start: Start) -> None:
    """The packets do not wait for a message bus."""
    world.lab.bus.stop()
    try:
        daemon = start(CONFIG, "--enforce")
        assert world.drops(DENIED4)
        assert "bus" in daemon.log
    finally:
        world.lab.bus.start()
    wait_for(lambda: world.lab.ctl("status", status=None).returncode == 0, "the daemon to come to the bus")


@pytest.mark.parametrize("moment", ["starting", "changing"])
def test_killed_at_any_moment_it_leaves_nothing_attached(world: World, moment: str) -> None:
    daemon = world.lab.daemon(world.host, CONFIG, "--enforce", ready=moment != "starting")
    if moment == "changing":
        clients = [subprocess.Popen([PYTHON, "-m", "xdpmond.cli", "--bus", world.lab.bus.address, "deny", f"192.0.2.{n}"], cwd=ROOT,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for n in range(6)]  # fmt: skip
        wait_for(lambda: any(client.poll() is not None for client in clients), "the first change")
    else:
        wait_for(lambda: "xdp" in world.host.run("ip", "link", "show", "eth0").stdout, "the program to be attached")
    daemon.stop(signal.SIGKILL)
    wait_for(lambda: "xdp" not in world.host.run("ip", "link", "show", "eth0").stdout, "the program to go")
    assert world.passes(DENIED4)
    if moment == "changing":
        for client in clients:
            assert client.wait(60) in (0, 1, 3)  # told, not left to wait
