"""`./dev demo`: it shows what it promises, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import sweep, wait_for

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """A demo under way. All its processes carry a mark in their environment."""

    def __init__(self, directory: Path, environment: dict[str, str] | None = None):
        self._mark = f"XM_MARK={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        self.output = directory / "output"
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.temporary.chmod(0o755)
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "demo"], cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True,
                env=os.environ | {name: value, "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.temporary)} | (environment or {}),
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text()

    def left(self) -> list[str]:
        """Processes, namespaces and files that are still there."""
        found = [path.name for path in Path("/run/netns").glob(f"xm-lab{self.process.pid}-*")]
        found += [path.name for path in self.temporary.iterdir()]
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in path.read_bytes():
                    found.append((path.parent / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    tmp_path.chmod(0o755)
    run = Run(tmp_path)
    yield run
    run.close()


def test_the_demo_shows_the_main_job_and_removes_itself(run: Run) -> None:
    assert run.process.wait(120) == 0, run.text
    assert run.left() == []
    text = run.text
    for shown in ("$ xdpmonctl status", "$ xdpmonctl list", "$ xdpmonctl top", "$ xdpmonctl explain", "$ xdpmonctl events -f",
                  "MONITOR  nothing is dropped", "ENFORCE  dropping", "0% packet loss", "100% packet loss", "permitted", "denied",
                  "unlisted", "203.0.113.0/24", "2001:db8:bad::/48", "DROP deny", "xdpmond ends and detaches"):  # fmt: skip
        assert shown in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("real packets", signal.SIGINT),
        ("is ready", signal.SIGTERM),
        ("$ xdpmonctl top", signal.SIGINT),
        ("3. Enforce", signal.SIGHUP),
    ],
)
def test_an_interrupted_demo_leaves_nothing(run: Run, moment: str, number: signal.Signals) -> None:
    wait_for(lambda: moment in run.text or run.process.poll() is not None, moment, 60)
    assert run.process.poll() is None, run.text
    os.killpg(run.process.pid, number)  # as a terminal does: everybody in the foreground gets it
    assert run.process.wait(60) == 128 + number, run.text
    assert run.left() == []
    assert "interrupted" in run.text and "Traceback" not in run.text


def test_a_killed_demo_leaves_no_process(run: Run) -> None:
    """Nobody can remove namespaces after SIGKILL; the next laboratory does. The daemon dies at once, and with it its program goes."""
    wait_for(lambda: "is ready" in run.text or run.process.poll() is not None, "the daemon", 60)
    run.process.kill()
    run.process.wait()
    wait_for(lambda: not any(" " in what for what in run.left()), "all processes to die")
    sweep()
    assert not any(what.startswith("xm-lab") and str(run.process.pid) in what for what in run.left())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, {"PATH": "/nonexistent"})
    try:
        assert run.process.wait(60) == 2
        assert "ping (package iputils-ping)" in run.text and "dbus-daemon (package dbus)" in run.text
        assert "Traceback" not in run.text
    finally:
        run.close()
