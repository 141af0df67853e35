"""What each entry was met by, when the daemon dies and another goes on with what it has kept: to the packet, or called a lower bound."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.stage import CONFIG, NotifySocket, Stage, stage
from tests.lab import wait_for
from tests.package.netns import open_socket

DENIED, WIDER = "203.0.113.9/32", "203.0.113.0/24"
SETTINGS = f'window = "2s"\n{CONFIG}deny = ["{WIDER}"]\n'


@pytest.fixture(scope="module")
def there() -> Iterator[Stage]:
    with stage() as made:
        yield made


def send(at: Stage, packets: int) -> None:
    """So many packets from 203.0.113.9, at the front door."""
    header = bytes.fromhex("02000000000102000000000208004500002a000000004011") + bytes(2)
    addresses = ipaddress.ip_address("203.0.113.9").packed + ipaddress.ip_address("10.0.0.1").packed
    frame = (header + addresses + bytes.fromhex("0fa0003500160000")).ljust(60, b"\0")
    with open_socket(f"/run/netns/{at.namespace}", socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.bind(("wire", 0))
        for _ in range(packets):
            wire.send(frame)


def counts(at: Stage) -> dict[str, tuple[int, bool]]:
    """Packets, and whether that is a lower bound, of the denied prefixes."""
    return {row["prefix"]: (row["packets"], row["partial"]) for row in at.ask("list") if row["prefix"] in (DENIED, WIDER)}


def windows(at: Stage) -> int:
    return at.ask("status")["window"]["number"] or 0


def next_window(at: Stage, closed: int) -> None:
    wait_for(lambda: windows(at) > closed, "a window to end")


@contextmanager
def daemon(at: Stage, manager: NotifySocket) -> Iterator[None]:
    """One that goes on with what the manager has kept, and then is killed."""
    running = at.start(manager)
    try:
        yield
    finally:
        running.kill()


def test_a_crash_costs_no_count_but_a_change_meanwhile_makes_lower_bounds(there: Stage) -> None:
    there.configure(SETTINGS)
    with NotifySocket(there.directory / "notify") as manager:
        with daemon(there, manager):
            send(there, 5)
            wait_for(lambda: counts(there) == {WIDER: (5, False)}, "the first packets")
            next_window(there, windows(there))
            send(there, 7)
        send(there, 11)  # the program goes on without the daemon
        with daemon(there, manager):
            send(there, 1)
            wait_for(lambda: counts(there) == {WIDER: (24, False)}, "all packets, over the crash")
            next_window(there, windows(there))
            assert counts(there) == {WIDER: (24, False)}
            send(there, 1)
        # The next one has another policy, and cannot know which packets of the window that goes on met it.
        there.configure(SETTINGS.replace("deny = [", f'deny = ["{DENIED}", '))
        with daemon(there, manager):
            send(there, 1)
            wait_for(lambda: counts(there)[DENIED][1], "the lower bound")
            found = counts(there)
            assert found[DENIED][0] <= 1
            assert 24 <= found[WIDER][0] <= 25 and found[WIDER][1]
            next_window(there, windows(there) + 1)
            began = counts(there)
            send(there, 3)
            wait_for(lambda: counts(there) == {DENIED: (began[DENIED][0] + 3, True), WIDER: began[WIDER]}, "packets of one policy")
