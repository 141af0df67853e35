"""Lists from netlink, when they fail."""

import pytest
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from xdpmond.errors import KernelError
from xdpmond.kernel.netlink import dump


class Asked:
    """Gives the answers one after the other, the last one again and again. An error comes after a part of the list, as it does."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.times = 0

    def __call__(self):
        self.times += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            yield "a part"
            raise answer
        yield from answer


def test_a_list_that_was_disturbed_is_asked_for_again():
    ask = Asked(NetlinkDumpInterrupted(), NetlinkDumpInterrupted(), ["eth0", "eth1"])
    assert dump("links", ask) == ["eth0", "eth1"]
    assert ask.times == 3


def test_a_list_that_is_always_disturbed():
    ask = Asked(NetlinkDumpInterrupted())
    with pytest.raises(KernelError, match="links change faster"):
        dump("links", ask)
    assert ask.times == 10


@pytest.mark.parametrize("error", [NetlinkError(105, "No buffer space"), OSError(105, "No buffer space")])
def test_other_failures_are_the_kernels(error):
    with pytest.raises(KernelError, match=r"links: .*No buffer space"):
        dump("links", Asked(error))
