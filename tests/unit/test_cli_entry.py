"""Ctrl-C ends xdpmonctl quietly from its first line to its last, also where nothing of ours runs yet or any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

INTERRUPT = """
import os, signal, sys

class Interrupt:
    '''Ctrl-C at the moment when this module is looked for.'''
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(Interrupt)
            os.kill(os.getpid(), signal.SIGINT)
        return None

sys.meta_path.insert(0, Interrupt)
"""
AT_EXIT = """
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
"""


def run(directory: Path, customised: str) -> subprocess.CompletedProcess[str]:
    (directory / "sitecustomize.py").write_text(customised)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{directory}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "xdpmond.cli", "--version"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["xdpmond.cli.main", "xdpmond.errors", "xdpmond.cli.parser", "argparse", "xdpmond.cli.render"])
def test_while_it_imports(tmp_path: Path, module: str) -> None:
    done = run(tmp_path, INTERRUPT.format(module=module))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_while_the_interpreter_ends(tmp_path: Path) -> None:
    done = run(tmp_path, AT_EXIT)
    assert done.returncode == -signal.SIGINT
    assert done.stdout.startswith("xdpmonctl ")
    assert done.stderr == ""


def test_the_installed_program_begins_there() -> None:
    assert '\nxdpmonctl = "xdpmond.cli.entry:main"\n' in (ROOT / "pyproject.toml").read_text()
