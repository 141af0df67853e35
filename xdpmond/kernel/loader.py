"""Get the packet path into the kernel: its instructions from the compiler child, or kept from before; maps made here; the program on them.

`Build` is what the configuration asks for. `Code` is the program text: its `identity` (a hash of the sources, of the definitions and of the
kernel's release) tells whether one that was kept is what would be compiled now. It knows no sizes, so that one text serves tables of any
size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..config import Config, Destination
from ..errors import KernelError
from . import abi, libbpf
from .tables import POLICY_MAPS, SMALLEST_POLICY, TALKER_MAPS, VALUES, PolicySize, Table, make, policy_tables, tables

ETHERNET, IP = "xdpmond", "xdpmond_ip"
"""The programs: for links with an Ethernet header, and for links whose frames start with the IP header."""

_COMPILE_TIMEOUT = 240.0  # seconds; it takes one, and minutes on a busy machine that is emulated


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
    """What the configuration asks of the packet path."""

    cpus: int
    sets: int
    """Sets of the talker table in each CPU's slice, a power of two."""
    rule_cells: int
    ring_bytes: int
    """0: no events, and no instruction for them."""
    frags: bool
    local: bool = False
    """Do packets to other hosts not count as talkers?"""
    flows: bool = False
    """Has the table of talkers an entry for each 5-tuple?"""

    @classmethod
    def of(cls, config: Config) -> Build:
        cpus = libbpf.possible_cpus()
        return cls(
            cpus=cpus,
            sets=config.tables.talkers_of_a_cpu(cpus) // abi.WAYS,
            rule_cells=config.tables.rule_counters,
            ring_bytes=config.events.ring_size if config.events.enable else 0,
            frags=libbpf.has_frags(),
            local=config.destination is Destination.LOCAL,
            flows=config.flows.enable,
        )

    @property
    def defines(self) -> list[str]:
        wanted = {"EVENTS": self.ring_bytes, "FLOWS": self.flows, "FRAGS": self.frags, "LOCAL": self.local}
        return [f"-DXM_{name}" for name, of in wanted.items() if of]

    @property
    def tables(self) -> dict[str, Table]:
        """The maps but for those of the policy."""
        return tables(
            cpus=self.cpus, sets=self.sets, rule_cells=self.rule_cells, ring_bytes=self.ring_bytes, local=self.local, flows=self.flows
        )

    @property
    def maps(self) -> tuple[str, ...]:
        return (*self.tables, *POLICY_MAPS)

    def identity(self, directory: Path) -> int:
        digest = hashlib.sha256(json.dumps([abi.ABI_VERSION, self.defines, os.uname().release]).encode())
        for path in sorted(directory.rglob("*.[ch]")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return int.from_bytes(digest.digest()[:8], "little")


_BPF_PSEUDO_MAP_VALUE = 2


@dataclass(frozen=True, slots=True)
class Code:
    """The instructions of which both programs are made, and what in them is only known when one is loaded."""

    identity: int
    frags: bool
    text: bytes
    loads: Sequence[tuple[int, str]]
    """Where a map is loaded: offset in bytes, name of the map."""
    values: Sequence[tuple[int, str]]
    """Where the address of a map's one value is loaded: likewise."""
    marks: Sequence[tuple[int, int]]
    """Where it is asked how frames start, or how many sets there are: offset in bytes, abi.LINK_MARK or abi.SETS_MARK."""

    def load(self, name: str, maps: Mapping[str, int]) -> int:
        """One of the programs, loaded onto these maps. Raises KernelError with what the verifier said."""
        instructions = bytearray(self.text)
        for at, of in self.loads:
            instructions[at + 4 : at + 8] = maps[of].to_bytes(4, "little")
        for at, of in self.values:
            instructions[at + 1] |= _BPF_PSEUDO_MAP_VALUE << 4
            instructions[at + 4 : at + 8] = maps[of].to_bytes(4, "little")
            instructions[at + 12 : at + 16] = bytes(4)  # from the value's beginning
        sets = libbpf.map_info(maps["talkers"])[3] // libbpf.possible_cpus()
        answers = {abi.LINK_MARK: int(name == ETHERNET), abi.SETS_MARK: sets - 1}
        for at, mark in self.marks:
            instructions[at + 4 : at + 8] = answers[mark].to_bytes(4, "little")
        return libbpf.load_xdp(bytes(instructions), name, frags=self.frags)

    def is_loaded(self, programs: Mapping[str, int], maps: Mapping[str, int]) -> bool:
        """Are these programs, made of this text, on these maps? The text is taken on trust."""
        ids = {libbpf.map_id(maps[of]) for _, of in (*self.loads, *self.values)}
        known = {ETHERNET} <= set(programs) <= {ETHERNET, IP}
        return known and all(libbpf.program_maps(fd) == ids for fd in programs.values())

    def pack(self) -> bytes:
        """As bytes, which begin with a digest of the rest."""
        head = {"identity": self.identity, "frags": self.frags, "loads": self.loads, "values": self.values, "marks": self.marks}
        packed = json.dumps(head).encode() + b"\n" + self.text
        return hashlib.sha256(packed).hexdigest().encode() + b"\n" + packed

    @classmethod
    def unpack(cls, data: bytes) -> Code | None:
        """What `pack` made; None if these bytes are something else."""
        digest, _, packed = data.partition(b"\n")
        if hashlib.sha256(packed).hexdigest().encode() != digest:
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line, _, text = packed.partition(b"\n")
            head = json.loads(line)
            return cls(head["identity"], head["frags"], text, head["loads"], head["values"], head["marks"])
        return None

    def keep(self) -> int:
        """Write it to a file in memory, for the descriptor store."""
        fd = os.memfd_create("xdpmond-code")
        with open(fd, "wb", closefd=False) as file:
            file.write(self.pack())
        return fd

    @classmethod
    def kept(cls, fd: int) -> Code | None:
        """What `keep` wrote; None if it is something else."""
        with contextlib.suppress(OSError):
            return cls.unpack(os.pread(fd, os.fstat(fd).st_size, 0))
        return None


@dataclass(slots=True)
class Loaded:
    """Descriptors of the maps and of those programs that were needed so far, and the names of the maps that were kept from before."""

    code: Code
    programs: dict[str, int]
    maps: dict[str, int]
    reused: frozenset[str]

    def program(self, name: str) -> int:
        """One of the programs, loaded now if it has not been needed before. Raises KernelError with what the verifier said."""
        if name not in self.programs:
            self.programs[name] = self.code.load(name, self.maps)
        return self.programs[name]

    def close(self) -> None:
        close({*self.programs.values(), *self.maps.values()})


class Keeper(Protocol):
    """Where a program text outlives a boot."""

    def load(self, identity: int) -> Code | None: ...

    def save(self, code: Code) -> None: ...


def load(build: Build, kept: Mapping[str, int] | None = None, policy: PolicySize = SMALLEST_POLICY, code: Code | None = None,
         programs: Mapping[str, int] | None = None, keeper: Keeper | None = None) -> Loaded:  # fmt: skip
    """Maps in `kept` whose definition is unchanged go on in use, those of the policy together and whatever their size; the others are made,
    and the program for Ethernet is loaded onto them, unless `programs`, which were made of `code`, are on these maps already. The other one
    is loaded when an interface needs it. Compiles, which takes a second, unless `code` is of these sources, or what the keeper has: call it
    in a thread.

    Raises KernelError with what clang or the verifier said.
    """
    directory = source_directory()
    identity = build.identity(directory)
    if code is None or code.identity != identity:
        code, programs = keeper.load(identity) if keeper else None, None
    compiled = code is None
    if code is None:
        code = compile_code(build, directory)
    maps, reused = _maps(build, kept or {}, policy)
    try:
        if programs is not None and reused == set(build.maps) and code.is_loaded(programs, maps):
            return Loaded(code, dict(programs), maps, reused)
        programs = {ETHERNET: code.load(ETHERNET, maps)}
    except BaseException:
        close(fd for name, fd in maps.items() if name not in reused)
        raise
    if compiled and keeper:
        keeper.save(code)
    return Loaded(code, programs, maps, reused)


def _maps(build: Build, kept: Mapping[str, int], policy: PolicySize) -> tuple[dict[str, int], frozenset[str]]:
    wanted = build.tables | policy_tables(kept_policy_size(kept) or policy)
    same = {name for name, table in wanted.items() if name in kept and libbpf.map_info(kept[name]) == table}
    for together in (POLICY_MAPS, TALKER_MAPS):
        if not same.issuperset(together):
            same -= set(together)
    maps: dict[str, int] = {}
    try:
        for name, table in wanted.items():
            maps[name] = kept[name] if name in same else make(name, table)
    except BaseException:
        close(fd for name, fd in maps.items() if name not in same)
        raise
    return maps, frozenset(same)


def kept_policy_size(maps: Mapping[str, int]) -> PolicySize | None:
    """How large the policy's maps are, if all of them are there."""
    if not set(POLICY_MAPS) <= set(maps):
        return None
    return PolicySize(*(libbpf.map_info(maps[name])[3] // 2 for name in POLICY_MAPS[1:]))


def compile_code(build: Build, directory: Path) -> Code:
    """Compile in a child. Raises KernelError with what clang said."""
    request = {"directory": str(directory), "source": "xdpmond.bpf.c", "defines": build.defines, "maps": build.maps, "program": ETHERNET,
               "marks": [abi.LINK_MARK, abi.SETS_MARK], "value_mark": abi.VALUE_MARK, "values": VALUES}  # fmt: skip
    # The child finds this package where we found it, installed or not; and nothing in the working directory, which "" would name.
    places = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-P", "-m", "xdpmond.kernel.compile"]
    import tempfile  # for this alone, which most starts do without

    try:
        # Made here, so that it goes also when the child is killed.
        with tempfile.TemporaryDirectory(prefix="xdpmond-") as scratch:
            asked = json.dumps(request | {"scratch": scratch}).encode()
            child = subprocess.run(command, input=asked, capture_output=True, timeout=_COMPILE_TIMEOUT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise KernelError(f"the compiler child gave no answer in {_COMPILE_TIMEOUT:.0f} s") from None
    except OSError as error:
        raise KernelError(f"the compiler child cannot be started: {error.strerror}") from None
    said = child.stderr.decode(errors="replace").strip()
    line, _, text = child.stdout.partition(b"\n")
    if not line:
        raise KernelError(f"the compiler child ended without an answer, by {_end(child.returncode)}", hint=_telling_lines(said))
    answer = json.loads(line)
    if "error" in answer:
        raise KernelError(answer["error"], hint=answer["hint"] or _telling_lines(said))
    for name, table in (build.tables | policy_tables(SMALLEST_POLICY)).items():
        type_, key_size, value_size, _, flags = answer["maps"][name]
        # Of a map with one value clang knows a word alone.
        expected = 8 if name in VALUES else table.value_size
        if (type_, key_size, value_size, flags) != (table.type, table.key_size, expected, table.flags):
            said = f"the map {name} is {answer['maps'][name]} in the sources, and {tuple(table)} here"
            raise KernelError(said, hint="is the package whole?")
    if not answer["marks"] or len(text) != answer["size"]:
        raise KernelError("the compiler child's answer is not whole")
    return Code(build.identity(directory), build.frags, text, answer["loads"], answer["values"], answer["marks"])


def _end(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def close(descriptors: Iterable[int]) -> None:
    """Whether they are open or not."""
    for fd in list(descriptors):
        with contextlib.suppress(OSError):
            os.close(fd)


def _telling_lines(text: str) -> str:
    """clang's first errors, of which the others follow; else the last words."""
    lines = text.splitlines()
    errors = [line for line in lines if "error:" in line]
    return " | ".join(errors[:3] or lines[-4:])
