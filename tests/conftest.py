"""For all layers: nothing is passed over in silence. A test that skips itself, or is expected to fail, fails the run."""

from __future__ import annotations

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: what it needs must be installed by ./dev setup\n{report.longrepr}"
