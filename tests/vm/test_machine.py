"""The machine itself: what a command came to is what is reported, whichever way the command or the kernel ends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from .image import Image, prepare
from .machine import Finished, MachineError, run

KERNEL = "6.12"


@pytest.fixture(scope="module")
def image() -> Image:
    return prepare(KERNEL)


def run_shell(image: Image, project: Path, text: str, *, timeout: float = 600, environment: dict[str, str] | None = None) -> Finished:
    return run(image, ["sh", "-c", text], project=project, environment=environment or {}, timeout=timeout)


def test_status_output_report_and_sources(image: Image, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "odd name").write_bytes(b"\x00\xffcontent")
    (tmp_path / "sub" / "program").write_text("#!/bin/sh\necho ran as $(id -u) with $GREETING\n")
    (tmp_path / "sub" / "program").chmod(0o755)
    (tmp_path / "link").symlink_to("sub/odd name")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "large").write_bytes(b"left out")
    script = "ls -A; sub/program; od -An -tx1 link; echo to standard error >&2; head -c 300000 /dev/zero >/run/report; exit 7"
    finished = run_shell(image, tmp_path, script, environment={"GREETING": "it's $HOME"})
    assert finished.status == 7
    _, *lines = finished.output.splitlines()
    assert lines == ["link", "sub", "ran as 0 with it's $HOME", " 00 ff 63 6f 6e 74 65 6e 74", "to standard error"]
    assert finished.report == bytes(300000)


def test_nothing_stays_on_the_disk(image: Image, tmp_path: Path) -> None:
    # Each machine starts from the disk as it was made, also while another one writes to its own.
    assert run_shell(image, tmp_path, "test ! -e /root/left && touch /root/left && sync").status == 0
    assert run_shell(image, tmp_path, "test ! -e /root/left").status == 0


def test_a_kernel_that_panics_is_no_success(image: Image, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"(?s)without a status.*sysrq triggered crash"):
        run_shell(image, tmp_path, "echo c >/proc/sysrq-trigger")


def test_a_command_that_does_not_end_is_ended(image: Image, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(MachineError, match="did not finish within 20 s"):
        run_shell(image, tmp_path, "while :; do sleep 1; done", timeout=20)
    assert threading.active_count() == before
