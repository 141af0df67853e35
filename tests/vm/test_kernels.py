"""What the kernel has a part in, on Debian 12's own ones, and what can only be tested with those: see `tests/vm/run.py`."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from .image import KERNELS
from .machine import Finished
from .run import GUEST_TESTS, run_tests

_SHOWN_LINES = 250
"""Lines of the guest's pytest that a failure shows, its summary being the last of them."""


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Future[Finished]]]:
    """Of all kernels that are asked for, at once: most of the time a machine uses one of the host's processors."""
    wanted = [item.callspec.params["kernel"] for item in request.session.items if item.parent is request.node]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(len(wanted)) as threads:
        yield {kernel: threads.submit(run_tests, kernel, list(GUEST_TESTS)) for kernel in wanted}


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_kernel(kernel: str, runs: Mapping[str, Future[Finished]]) -> None:
    finished = runs[kernel].result()
    shown = "\n".join(finished.output.splitlines()[-_SHOWN_LINES:])
    assert f"guest: Linux {kernel}." in finished.output, f"another kernel ran:\n{shown}"
    assert finished.status == 0, f"pytest on kernel {kernel} ended with status {finished.status}:\n{shown}"
    skipped = [f"{case.get('classname')}.{case.get('name')}" for case in ElementTree.fromstring(finished.report).iter("testcase")
               if case.find("skipped") is not None]  # fmt: skip
    assert not skipped, f"skipped on kernel {kernel}: {', '.join(skipped)}"
