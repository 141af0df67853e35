"""A flood in which every packet has another source: an XDP program that writes the next address into the frame and hands it to the program
under test by a tail call. With BPF_PROG_TEST_RUN's repetitions that is millions of sources a second.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass

import numpy as np

from xdpmond.kernel import libbpf
from xdpmond.kernel.maps import map_memory
from xdpmond.kernel.tables import ARRAY, MMAPABLE, Table, make

SOURCE = 26
"""Where an IPv4 header that follows a plain Ethernet header has its source."""
_CHUNK = 1 << 22
"""Packets of one system call, in which a signal waits."""

_LOAD_MAP, _LOAD_VALUE = 1, 2  # BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE
_PROG_ARRAY = 3  # BPF_MAP_TYPE_PROG_ARRAY
_TAIL_CALL = 12


@dataclass(frozen=True, slots=True)
class Flood:
    """What was sent, in seconds, and the mean for one packet as the kernel measured it."""

    packets: int
    seconds: float
    nanoseconds: float


class Spoofer:
    """Sends IPv4 frames through `program`, the first one from the address `first`, each further one from the next address."""

    def __init__(self, program: int, first: int = 0x0B000000):
        self._counter = make("counter", Table(ARRAY, 4, 8, 1, MMAPABLE))
        self._target = make("target", Table(_PROG_ARRAY, 4, 4, 1, 0))
        self._next = np.frombuffer(map_memory(self._counter, 8, write=True), "u8", 1)
        self._next[0] = first
        libbpf.update(self._target, np.zeros(1, "u4"), np.array([program], "u4"))
        self.program = libbpf.load_xdp(self._instructions(), "spoof", frags=libbpf.has_frags())

    def _instructions(self) -> bytes:
        r0, r1, r2, r3, r4, r6 = 0, 1, 2, 3, 4, 6
        return b"".join([
            _one(0xBF, r6, r1),  # r6 = context
            _two(r1, _LOAD_VALUE, self._counter),  # r1 = &counter
            _one(0x79, r4, r1),  # r4 = counter
            _one(0xBF, r0, r4),
            _one(0x07, r0, imm=1),
            _one(0x7B, r1, r0),  # counter = r4 + 1
            _one(0x61, r2, r6, 0),  # r2 = data
            _one(0x61, r3, r6, 4),  # r3 = data_end
            _one(0xBF, r0, r2),
            _one(0x07, r0, imm=SOURCE + 4),
            _one(0x2D, r0, r3, 2),  # too short: no address
            _one(0xDC, r4, imm=32),  # to network byte order
            _one(0x63, r2, r4, SOURCE),
            _one(0xBF, r1, r6),
            _two(r2, _LOAD_MAP, self._target),
            _one(0xB7, r3, imm=0),
            _one(0x85, imm=_TAIL_CALL),
            _one(0xB7, r0, imm=0),  # XDP_ABORTED: there was no program to go on with
            _one(0x95),
        ])  # fmt: skip

    def run(self, frame: bytes, packets: int, *, ifindex: int) -> Flood:
        """Send so many, as if they had come in on that interface of the calling thread's network namespace."""
        began, spent = time.monotonic(), 0.0
        for sent in range(0, packets, _CHUNK):
            some = min(_CHUNK, packets - sent)
            done = libbpf.test_run(self.program, frame, repeat=some, ifindex=ifindex)
            if done.action not in (libbpf.XDP_PASS, libbpf.XDP_DROP):
                raise AssertionError(f"the last packet came to the XDP action {done.action}")
            spent += done.nanoseconds * some
        return Flood(packets, time.monotonic() - began, spent / packets)

    @property
    def sent(self) -> int:
        """The address of the next packet: how many there were, beside the first one's."""
        return int(self._next[0])

    def close(self) -> None:
        for fd in (self.program, self._target, self._counter):
            os.close(fd)


def _one(code: int, to: int = 0, of: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return struct.pack("<BBhi", code, to | of << 4, offset, imm)


def _two(to: int, kind: int, map_fd: int) -> bytes:
    return _one(0x18, to, kind, imm=map_fd) + _one(0)
