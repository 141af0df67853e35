"""For all layers: nothing is passed over in silence, and it does not matter from where the tests are started."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """What is started in the background has SIGINT ignored, and by nohup SIGHUP, and so would every program that a test starts and
    interrupts. A signal that is handled here is an ordinary one there."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """A test that skips itself, or is expected to fail, fails the run."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: what it needs must be installed by ./dev setup\n{report.longrepr}"
