"""Lists from netlink: as they come, and when they fail."""

import errno
import struct

import pytest

from xdpmond.errors import KernelError
from xdpmond.kernel.netlink import DisturbedError, attributes, dump, listed


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
    ask = Asked(DisturbedError(), DisturbedError(), ["eth0", "eth1"])
    assert dump("links", ask) == ["eth0", "eth1"]
    assert ask.times == 3


def test_a_list_that_is_always_disturbed():
    ask = Asked(DisturbedError())
    with pytest.raises(KernelError, match="links change faster"):
        dump("links", ask)
    assert ask.times == 10


@pytest.mark.parametrize("error", [OSError(105, "No buffer space"), TimeoutError("No buffer space")])
def test_other_failures_are_the_kernels(error):
    with pytest.raises(KernelError, match=r"links: .*No buffer space"):
        dump("links", Asked(error))


def message(content: bytes, kind: int = 16, flags: int = 2) -> bytes:
    """As the kernel makes them: padded to four bytes, which its length does not count."""
    whole = struct.pack("=IHHII", 16 + len(content), kind, flags, 1, 4711) + content
    return whole + bytes(-len(whole) % 4)


DONE = message(bytes(4), kind=3)


def test_messages_of_several_datagrams():
    assert list(listed([message(b"one") + message(b"second"), message(b""), message(b"x") + DONE, message(b"of another")])) == [
        b"one", b"second", b"", b"x",
    ]  # fmt: skip
    assert list(listed([DONE])) == []


@pytest.mark.parametrize("end", [message(b"x", flags=0x12), message(bytes(4), kind=3, flags=0x12)], ids=["within", "at the end"])
def test_a_list_that_changed_while_it_came(end):
    with pytest.raises(DisturbedError):
        list(listed([message(b"one"), end, DONE]))


@pytest.mark.parametrize("kind", [2, 3], ids=["error", "done"])
def test_a_refusal(kind):
    with pytest.raises(PermissionError) as raised:
        list(listed([message(b"one"), message(struct.pack("=i", -errno.EPERM) + bytes(20), kind=kind)]))
    assert raised.value.errno == errno.EPERM


@pytest.mark.parametrize("datagrams", [[], [message(b"one")], [bytes(16)]], ids=["nothing", "no end", "zeros"])
def test_a_list_without_an_end(datagrams):
    with pytest.raises(OSError, match="no end"):
        list(listed(datagrams))


def test_attributes():
    packed = struct.pack("=HH5s3xHHI", 9, 3, b"eth0\0", 8, 4 | 0x8000, 1500)
    assert attributes(b"header" + packed, 6) == {3: b"eth0\0", 4: struct.pack("=I", 1500)}
    assert attributes(b"", 0) == {}
    assert attributes(bytes(8), 0) == {0: b""}
