"""Fixtures: the packet path, and the guns. A module sets the sizes of its tables by `TABLES`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from .harness import Guns, Harness, pinned, small_build
from .namespaces import Namespace

_CPUS = sorted(os.sched_getaffinity(0))  # before any fixture binds this process to one of them


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    assert os.geteuid() == 0, "the kernel tests need root"


@pytest.fixture(scope="session")
def _harnesses() -> Iterator[dict[str, Harness]]:
    """By the sizes of the tables."""
    made: dict[str, Harness] = {}
    yield made
    for harness in made.values():
        harness.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module says by BOTH_KINDS that its tests hold for a table of talkers and for one of flows."""
    if "loaded" in metafunc.fixturenames and getattr(metafunc.module, "BOTH_KINDS", False):
        metafunc.parametrize("loaded", [{"flows": False}, {"flows": True}], indirect=True, ids=["talkers", "flows"], scope="module")


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, _harnesses: dict[str, Harness]) -> Iterator[Harness]:
    """Loaded through the daemon's own loader, once for all modules with the same tables."""
    tables = {**getattr(request.module, "TABLES", {}), **getattr(request, "param", {})}
    with pinned(_CPUS[0]):
        if repr(tables) not in _harnesses:
            _harnesses[repr(tables)] = Harness(small_build(**tables))
        yield _harnesses[repr(tables)]


@pytest.fixture
def datapath(loaded: Harness) -> Harness:
    """The packet path of the module with nothing set, on one CPU."""
    loaded.reset()
    return loaded


@pytest.fixture(scope="session")
def cpus() -> list[int]:
    """The CPUs that this process may use."""
    return _CPUS


@pytest.fixture(scope="session")
def gun_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("gun") / "gun"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", str(binary), str(Path(__file__).with_name("gun.c"))], check=True)
    return binary


@pytest.fixture
def shoot(gun_binary: Path, tmp_path: Path) -> Callable[[Harness, Sequence[bytes], Iterable[int]], Guns]:
    """`with shoot(datapath, frames, cpus) as guns: ...; shot = guns.stop()`"""

    def start(harness: Harness, frames: Sequence[bytes], on: Iterable[int]) -> Guns:
        return Guns(gun_binary, harness.loaded.programs["xdpmond"], frames, on, tmp_path)

    return start


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()
