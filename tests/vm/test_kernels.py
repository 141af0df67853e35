"""The kernel tests on Debian 12's own kernels, and what can only be tested with those: see `tests/vm/run.py`."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from .image import KERNELS
from .run import GUEST_TESTS, run_tests

_SHOWN_LINES = 250
"""Lines of the guest's pytest that a failure shows, its summary being the last of them."""


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_kernel(kernel: str) -> None:
    finished = run_tests(kernel, list(GUEST_TESTS))
    shown = "\n".join(finished.output.splitlines()[-_SHOWN_LINES:])
    assert f"guest: Linux {kernel}." in finished.output, f"another kernel ran:\n{shown}"
    assert finished.status == 0, f"pytest on kernel {kernel} ended with status {finished.status}:\n{shown}"
    skipped = [f"{case.get('classname')}.{case.get('name')}" for case in ElementTree.fromstring(finished.report).iter("testcase")
               if case.find("skipped") is not None]  # fmt: skip
    assert not skipped, f"skipped on kernel {kernel}: {', '.join(skipped)}"
