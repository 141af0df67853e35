"""Get the packet path into the kernel: from the descriptor store if it is there and unchanged, else through the compiler child.

`Build` is what the configuration asks of the program, and its `identity` (a hash of the sources and of the definitions) tells whether a
program that is already loaded is that one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..errors import KernelError
from . import abi, libbpf

PROGRAMS = ("xdpmond", "xdpmond_ip")
"""For links with an Ethernet header, and for links whose frames start with the IP header."""

_ALWAYS = ("control", "ledger", "talkers", "ports", "policy_0", "policy_1", "totals", "rules", "tallies", "packet")
_WITH_EVENTS = ("budget", "sampler", "events")
_TOGETHER = (("policy_0", "policy_1", "rules"),)
"""Maps that are kept all or none: a rule's counter is found by an index that the tries hold."""
_COMPILE_TIMEOUT = 60.0  # seconds; it takes one, and half a minute under emulation


def source_directory() -> Path:
    """Where the C sources are: $XDPMOND_BPF_DIR, else beside the package in a checkout, else installed by the package or in a venv."""
    named = os.environ.get("XDPMOND_BPF_DIR")
    places = [Path(__file__).parents[2] / "bpf", Path("/usr/share/xdpmond/bpf"), Path(sys.prefix) / "share/xdpmond/bpf"]
    candidates = [Path(named)] if named else places
    for candidate in candidates:
        if (candidate / "xdpmond.bpf.c").is_file():
            return candidate
    raise KernelError(f"the packet path's source is not in {' or '.join(map(str, candidates))}", hint="reinstall the package xdpmond")


@dataclass(frozen=True, slots=True)
class Build:
    """What is compiled in."""

    cpus: int
    sets: int
    """Sets of the talker table in each CPU's slice, a power of two."""
    prefixes: int
    rule_cells: int
    ring_pages: int
    """0: no events, and no instruction for them."""
    frags: bool

    @classmethod
    def of(cls, config: Config) -> Build:
        return cls(
            cpus=libbpf.possible_cpus(),
            sets=config.tables.talkers // abi.WAYS,
            prefixes=config.tables.prefixes,
            rule_cells=config.tables.rule_counters,
            ring_pages=config.events.ring_size // 4096 if config.events.enable else 0,
            frags=libbpf.has_frags(),
        )

    @property
    def defines(self) -> list[str]:
        defines = [
            f"-DXM_CPUS={self.cpus}",
            f"-DXM_SETS={self.sets}",
            f"-DXM_PREFIXES={self.prefixes}",
            f"-DXM_RULE_CELLS={self.rule_cells}",
        ]
        if self.ring_pages:
            defines += ["-DXM_EVENTS", f"-DXM_RING_PAGES={self.ring_pages}"]
        if self.frags:
            defines.append("-DXM_FRAGS")
        return defines

    @property
    def maps(self) -> tuple[str, ...]:
        return _ALWAYS + (_WITH_EVENTS if self.ring_pages else ())

    def identity(self, directory: Path) -> int:
        digest = hashlib.sha256(json.dumps([abi.ABI_VERSION, self.defines]).encode())
        for path in sorted(directory.rglob("*.[ch]")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return int.from_bytes(digest.digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Descriptors of the loaded programs and their maps, and the names of the maps that were kept from before."""

    programs: dict[str, int]
    maps: dict[str, int]
    reused: frozenset[str]
    identity: int

    def close(self) -> None:
        for fd in {*self.programs.values(), *self.maps.values()}:
            with contextlib.suppress(OSError):
                os.close(fd)


def load(build: Build, kept: dict[str, int] | None = None) -> Loaded:
    """Compile and load in a child; maps in `kept` whose definition is unchanged go on in use. Takes a second: call it in a thread.

    Raises KernelError with what clang or the verifier said.
    """
    kept = kept or {}
    directory = source_directory()
    request = {
        "directory": str(directory), "source": "xdpmond.bpf.c", "defines": build.defines, "maps": build.maps, "programs": PROGRAMS,
        "kept": list(kept), "together": _TOGETHER,
    }  # fmt: skip
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The child finds this package where we found it, installed or not.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "xdpmond.kernel.compile", str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
        ) as child,
    ):
        theirs.close()
        ours.settimeout(_COMPILE_TIMEOUT)
        try:
            socket.send_fds(ours, [json.dumps(request).encode()], list(kept.values()))
            message, descriptors, _, _ = socket.recv_fds(ours, 1 << 16, 64)
        except (TimeoutError, OSError) as error:
            message, descriptors = b"", []
            reason = f"the compiler child does not answer: {error}"
        else:
            reason = "the compiler child ended without an answer"
        if not message:
            child.kill()
        said = child.stderr.read().decode(errors="replace").strip() if child.stderr else ""
    if not message:
        raise KernelError(reason, hint=_telling_lines(said))
    reply = json.loads(message)
    if "error" in reply:
        raise KernelError(reply["error"], hint=reply["hint"] or _telling_lines(said))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    programs = dict(zip(PROGRAMS, descriptors, strict=False))
    maps = dict(zip(build.maps, descriptors[len(PROGRAMS) :], strict=True))
    return Loaded(programs, maps, frozenset(reply["reused"]), build.identity(directory))


def _telling_lines(text: str) -> str:
    """clang's first errors, of which the others follow; else the last words."""
    lines = text.splitlines()
    errors = [line for line in lines if "error:" in line]
    return " | ".join(errors[:3] or lines[-4:])
