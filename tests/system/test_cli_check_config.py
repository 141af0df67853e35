"""`xdpmonctl check-config` runs the daemon's own check in a process of its own, without a bus and without a daemon."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = "/usr/bin/python3"
ROOT = Path(__file__).resolve().parents[2]


def check(*words: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    command = [PYTHON, "-P", "-m", "xdpmond.cli", "--bus", "unix:path=/nonexistent", "check-config", *words]
    return subprocess.run(command, env=environ, cwd=directory, capture_output=True, text=True, timeout=120, check=False)


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text('mode = "monitor"\nallow = ["192.0.2.0/24"]\n')
    done = check(str(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert str(path) in done.stdout
    assert json.loads(check("-j", str(path)).stdout)["ok"] is True


@pytest.mark.parametrize(
    ("text", "complaint"),
    [('mode = "enfroce"', "enfroce"), ("moed = 1", "mode"), ('allow = ["192.0.2.1/24"]', "192.0.2.0/24"), ("not toml", "bad.toml"),
     ('deny = ["\x7f\\u001b[31m"]', "bad.toml")],
)  # fmt: skip
def test_a_refused_file(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    done = check(str(path))
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("xdpmonctl: ")
    assert complaint in done.stderr
    assert done.stderr.replace("\n", "").isprintable()
    assert check("-j", str(path)).stderr == done.stderr


@pytest.mark.parametrize("name", ["xdpmond.toml", "strict.toml"])
def test_what_is_shipped(name: str) -> None:
    done = check(str(ROOT / "conf" / name))
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_of_the_working_directory_is_run(tmp_path: Path) -> None:
    package = tmp_path / "xdpmond"
    package.mkdir()
    (package / "__init__.py").write_text("print('hijacked')")
    (package / "__main__.py").write_text("print('hijacked')")
    path = tmp_path / "good.toml"
    path.write_text("")
    done = check("good.toml", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "hijacked" not in done.stdout
