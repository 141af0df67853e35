"""Whose word on the mode counts."""

import pytest

from xdpmond.config import Config, Interface
from xdpmond.model import Mode
from xdpmond.modes import Modes

MONITOR, ENFORCE = Mode.MONITOR, Mode.ENFORCE
FILES = Config(mode=MONITOR, interfaces={"eth1": Interface(mode=ENFORCE)})


@pytest.mark.parametrize(
    ("modes", "eth0", "eth1"),
    [
        (Modes(), MONITOR, ENFORCE),
        (Modes(MONITOR), MONITOR, MONITOR),
        (Modes(ENFORCE), ENFORCE, ENFORCE),
        (Modes(on={"eth1": MONITOR}), MONITOR, MONITOR),
        (Modes(ENFORCE, {"eth1": MONITOR}), ENFORCE, MONITOR),
    ],
)
def test_the_nearest_word_counts(modes, eth0, eth1):
    assert (modes.of(FILES, "eth0"), modes.of(FILES, "eth1")) == (eth0, eth1)


def test_setting_all_ends_what_was_set_for_one():
    one = Modes().with_change(ENFORCE, "eth0")
    assert one == Modes(None, {"eth0": ENFORCE})
    assert one.with_change(MONITOR) == Modes(MONITOR)
    assert one.with_change(None) == Modes()


def test_setting_one_leaves_the_others():
    both = Modes(MONITOR).with_change(ENFORCE, "eth0").with_change(ENFORCE, "eth1")
    assert both == Modes(MONITOR, {"eth0": ENFORCE, "eth1": ENFORCE})
    assert both.with_change(MONITOR, "eth1").of(FILES, "eth1") is MONITOR
    assert both.with_change(None, "eth0") == Modes(MONITOR, {"eth1": ENFORCE})
    assert Modes().with_change(None, "eth0") == Modes()
