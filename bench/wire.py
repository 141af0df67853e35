"""A veth pair between two network namespaces, and what is done within each: all of it is gone at the end.

A thread enters a namespace by setns(2), which changes the network alone: `ip netns exec` would mount another /sys and hide bpffs.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

_CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def enter(namespace: str) -> None:
    """Put the calling thread in a named network namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"enter the network namespace {namespace}")


def within(namespace: str, function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a thread that is in the namespace."""
    with ThreadPoolExecutor(1, initializer=enter, initargs=(namespace,)) as thread:
        return thread.submit(function, *arguments).result()


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace with this name and our process id in it."""
    name = f"xm-bench-{name}-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@dataclass(frozen=True, slots=True)
class Wire:
    """`front` is the end that is watched, `wire` the one that sends."""

    front_namespace: str
    wire_namespace: str
    front: int
    wire: int

    def received(self) -> int:
        """Packets that reached `front`, by its driver's own counter: those that an XDP program drops too."""
        command = ["ip", "-j", "-s", "-n", self.front_namespace, "link", "show", "front"]
        shown = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return int(shown[0]["stats64"]["rx"]["packets"])


@contextmanager
def wire(queues: int) -> Iterator[Wire]:
    """A veth pair whose ends have so many queues each: a frame sent on a core arrives on a queue of its own while there are enough."""
    with ExitStack() as held:
        front, far = held.enter_context(namespace("front")), held.enter_context(namespace("wire"))
        each = ["numrxqueues", str(queues), "numtxqueues", str(queues)]
        pair = ["link", "add", "front", *each, "type", "veth", "peer", "name", "wire", "netns", far, *each]
        subprocess.run(["ip", "-n", front, *pair], check=True)
        for where, name in ((front, "front"), (far, "wire")):
            # Otherwise IPv6 sends of its own accord.
            within(where, _write, f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
            subprocess.run(["ip", "-n", where, "link", "set", name, "up"], check=True)
        yield Wire(front, far, within(front, socket.if_nametoindex, "front"), within(far, socket.if_nametoindex, "wire"))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def remove_leftovers() -> None:
    """Namespaces of a run that was killed: their process is no more."""
    listed = subprocess.run(["ip", "-j", "netns", "list"], capture_output=True, text=True, check=True).stdout or "[]"
    for found in json.loads(listed):
        name = found["name"]
        if name.startswith("xm-bench-") and not os.path.exists(f"/proc/{name.rpartition('-')[2]}"):
            print(f"bench: removing the namespace {name} of an earlier run", file=sys.stderr)
            subprocess.run(["ip", "netns", "del", name], check=True)
