"""What the package tests share: the built packages, and booted machines to put them in.

Each test module has a machine of its own, so a broken one spoils no other. Booting takes three seconds, installing two.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from . import build
from .machine import Machine, booted, wait_for

NEXT = ".post1"
"""What the upgrade test adds to the version."""


@dataclass(frozen=True, slots=True)
class Packages:
    """The package of this checkout, and the same files under a higher version."""

    current: Path
    higher: Path

    @property
    def changes(self) -> Path:
        (found,) = self.current.parent.glob("*.changes")
        return found


def version() -> str:
    namespace: dict[str, str] = {}
    exec((build.ROOT / "xdpmond/__init__.py").read_text(), namespace)
    return namespace["__version__"]


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.exit("the package tests boot machines and need root: sudo ./dev check", returncode=1)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    base = tmp_path_factory.mktemp("packages")
    with ThreadPoolExecutor() as pool:
        current = pool.submit(build.build_deb, base / "current")
        higher = pool.submit(build.build_deb, base / "higher", version() + NEXT)
        return Packages(current.result(), higher.result())


@pytest.fixture(scope="module")
def bare() -> Iterator[Machine]:
    """A booted machine without the package."""
    with booted() as machine:
        yield machine


@pytest.fixture(scope="module")
def machine(bare: Machine, packages: Packages) -> Machine:
    """A booted machine with the package installed and the daemon attached."""
    bare.install(packages.current)
    wait_for("the daemon to attach", bare.program)
    return bare


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """A failure shows the machine's journal."""
    outcome = yield
    report = outcome.get_result()
    machine = getattr(item, "funcargs", {}).get("bare")
    if report.failed and machine is not None:
        shown = machine.run("journalctl", "--boot", "--no-pager", "--lines=60", check=False).stdout
        report.sections.append(("the machine's journal", shown))
