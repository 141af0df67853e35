"""Loading: what is kept from before, what a feature that is off saves, and what is said when the program cannot be had."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xdpmond.errors import KernelError
from xdpmond.kernel import libbpf, loader
from xdpmond.kernel.tables import POLICY_MAPS, TALKER_MAPS
from xdpmond.model import Count, Outcome

from .harness import Harness, by_key, small_build
from .packets import tcp

FRAME = tcp("198.51.100.1", 22)


@pytest.fixture
def load() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def start(build: loader.Build, kept: dict[str, int] | None = None) -> Harness:
        # What it goes on with is its own from then on.
        own = {name: os.dup(fd) for name, fd in (kept or {}).items()}
        loaded = loader.load(build, own)
        loader.close(fd for name, fd in own.items() if name not in loaded.reused)
        made.append(Harness(build, loaded))
        return made[-1]

    yield start
    for harness in made:
        harness.reset()  # others go on with its maps
        harness.close()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the C sources, in whose place it is used."""
    copy = tmp_path / "bpf"
    shutil.copytree(loader.source_directory(), copy)
    monkeypatch.setenv("XDPMOND_BPF_DIR", str(copy))
    return copy


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is not there once"
    path.write_text(text.replace(old, new))


def test_kept_maps_go_on_with_their_contents(datapath: Harness, load: Callable[..., Harness]) -> None:
    datapath.policy(deny=["198.51.100.0/24"])
    datapath.enforce()
    datapath.send(FRAME)
    totals = datapath.totals_by_outcome()
    again = load(datapath.build, datapath.loaded.maps)
    assert again.loaded.reused == frozenset(datapath.build.maps)
    assert again.loaded.code.identity == datapath.loaded.code.identity
    assert libbpf.program_id(again.loaded.programs["xdpmond"]) != libbpf.program_id(datapath.loaded.programs["xdpmond"])
    assert again.totals_by_outcome() == totals
    again.policy(deny=["198.51.100.0/24"])
    # Both programs count in the same place, and the new one obeys the same policy.
    again.enforce()
    assert again.send(FRAME) == libbpf.XDP_DROP
    assert datapath.totals_by_outcome()[Outcome.DENIED_DROPPED] - totals[Outcome.DENIED_DROPPED] == Count(1, len(FRAME))
    assert by_key(datapath.running())["198.51.100.1", 6, 22] == (2, 2 * len(FRAME), 0)


def test_maps_of_another_size_are_new(datapath: Harness, load: Callable[..., Harness]) -> None:
    datapath.send(FRAME)
    before = datapath.totals_by_outcome()
    larger = dataclasses.replace(datapath.build, sets=2 * datapath.build.sets)
    again = load(larger, datapath.loaded.maps)
    assert set(datapath.build.maps) - again.loaded.reused == set(TALKER_MAPS)
    assert libbpf.map_info(again.loaded.maps["talkers"])[3] == larger.cpus * larger.sets
    assert not len(again.running()) and len(datapath.running())
    assert again.totals_by_outcome() == before
    assert again.loaded.code.identity == datapath.loaded.code.identity, "no size is compiled in"


def test_the_policy_s_maps_are_kept_together(datapath: Harness, load: Callable[..., Harness]) -> None:
    """One refers to the others: of these maps all are kept, whatever their size, or none."""
    kept = {name: fd for name, fd in datapath.loaded.maps.items() if name != "lines"}
    again = load(datapath.build, kept)
    assert set(datapath.build.maps) - again.loaded.reused == set(POLICY_MAPS)


def test_what_is_off_is_not_compiled_in(datapath: Harness, load: Callable[..., Harness]) -> None:
    without = load(dataclasses.replace(datapath.build, ring_bytes=0))
    assert without.ring is None
    assert not {"events", "sampler"} & set(without.loaded.maps)
    for name in (loader.ETHERNET, loader.IP):
        assert libbpf.instruction_count(without.loaded.program(name)) < libbpf.instruction_count(datapath.loaded.program(name))
    before = without.totals_by_outcome()[Outcome.DEFAULT_LOGGED]
    without.send(FRAME)
    assert without.totals_by_outcome()[Outcome.DEFAULT_LOGGED] - before == Count(1, len(FRAME))
    # And on again, on the same maps.
    again = load(datapath.build, without.loaded.maps)
    assert set(datapath.build.maps) - again.loaded.reused == {"events", "sampler"}
    assert len(again.run(FRAME).events) == 1


def test_two_programs_of_one_text(datapath: Harness) -> None:
    """Each has in the kernel what it needs of it: the verifier has taken the rest away."""
    ethernet, ip = (libbpf.instruction_count(datapath.loaded.program(name)) for name in (loader.ETHERNET, loader.IP))
    assert ip < ethernet - 10


def test_without_frames_of_several_buffers(datapath: Harness, load: Callable[..., Harness]) -> None:
    """As on a kernel before 5.18."""
    plain = load(dataclasses.replace(datapath.build, frags=False))
    frame = FRAME.ljust(1514, b"x")
    seen = plain.run(frame)
    assert (seen.size, seen.event["destination_port"]) == (len(frame), 22)


def test_the_identity_is_that_of_sources_and_definitions(sources: Path) -> None:
    build = small_build()
    first = build.identity(sources)
    assert build.identity(sources) == first
    assert dataclasses.replace(build, ring_bytes=0).identity(sources) != first
    with (sources / "parse.h").open("a") as header:
        header.write("\n")
    assert build.identity(sources) != first


def test_the_daemon_does_not_map_the_compiler(datapath: Harness) -> None:
    maps = Path("/proc/self/maps").read_text()
    assert "libbcc" not in maps and "LLVM" not in maps


def test_no_descriptor_is_inherited(datapath: Harness) -> None:
    for fd in (datapath.loaded.program(loader.ETHERNET), datapath.loaded.program(loader.IP), *datapath.loaded.maps.values()):
        assert not os.get_inheritable(fd)


def test_a_load_leaves_no_descriptor_behind(datapath: Harness, sources: Path) -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_descriptors()
    loaded = loader.load(datapath.build, datapath.loaded.maps)
    loader.close(loaded.programs.values())
    assert open_descriptors() == before
    loader.load(datapath.build, code=datapath.loaded.code).close()
    assert open_descriptors() == before
    edit(sources / "abi.h", "u8 later;", "u8 latter;")
    with pytest.raises(KernelError):
        loader.load(datapath.build)
    assert open_descriptors() == before


def test_code_that_was_kept(datapath: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be compiled again, unless the sources are other ones; and what is not ours is not taken for it."""
    code = datapath.loaded.code
    fd = code.keep()
    kept = loader.Code.kept(fd)
    assert kept == code
    with monkeypatch.context() as context:
        context.setattr(loader, "compile_code", None)
        loaded = loader.load(datapath.build, datapath.loaded.maps, code=kept)
    for name in (loader.ETHERNET, loader.IP):
        assert libbpf.instruction_count(loaded.program(name)) == libbpf.instruction_count(datapath.loaded.program(name))
        assert libbpf.program_maps(loaded.program(name)) == libbpf.program_maps(datapath.loaded.program(name))
    loader.close(loaded.programs.values())
    loaded = loader.load(datapath.build, datapath.loaded.maps, code=dataclasses.replace(code, identity=1))
    assert loaded.code.identity == code.identity
    loader.close(loaded.programs.values())
    whole = os.pread(fd, 1 << 20, 0)
    os.close(fd)
    for damaged in (b"", b"{}\n", whole[:-8], whole + b"x", b"\xff" + whole, whole.replace(b"loads", b"LOADS", 1)):
        other = os.memfd_create("damaged")
        os.write(other, damaged)
        assert loader.Code.kept(other) is None
        os.close(other)


def test_clang_s_own_words(datapath: Harness, sources: Path) -> None:
    edit(sources / "xdpmond.bpf.c", "if (!of_cpu)", "if (!of_cpu || frobnicated)")
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert "does not compile" in raised.value.message
    assert "use of undeclared identifier 'frobnicated'" in raised.value.hint


@pytest.mark.parametrize(("old", "new"), [("struct xm_count {", "struct xm_countt {"), ("u8 enforce;", "u9 enforce;")])
def test_clang_s_first_words_of_many(datapath: Harness, sources: Path, old: str, new: str) -> None:
    """A wrong header makes a cascade of errors, of which the first is the one that helps."""
    edit(sources / "abi.h", old, new)
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert "abi.h:" in raised.value.hint.split(" | ")[0]
    assert "error:" in raised.value.hint


def test_a_call_of_what_is_not_declared(datapath: Harness, sources: Path) -> None:
    """It would become a jump out of range."""
    edit(sources / "parse.h", "u32 total = bpf_ntohs(ip->tot_len);", "u32 total = ntohs(ip->tot_len);")
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert "ntohs" in raised.value.hint


def test_the_verifier_s_own_words(datapath: Harness, sources: Path) -> None:
    edit(sources / "parse.h", "if ((void *)(eth + 1) > c->end) {", "if (0) {")
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert "the kernel refuses the program xdpmond" in raised.value.message
    assert "invalid access to packet" in raised.value.hint


def test_sources_that_are_not_there(datapath: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPMOND_BPF_DIR", str(tmp_path))
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert str(tmp_path) in raised.value.message


def test_bcc_that_is_not_there(datapath: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('libbcc.so.0: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert "libbcc.so.0: no such file" in raised.value.message
    assert "python3-bpfcc" in raised.value.hint


def test_the_child_imports_what_it_needs_and_nothing_from_where_it_stands(
    datapath: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start after a boot waits for it; and who tries the daemon as root may stand in a directory of anybody's."""
    (tmp_path / "bcc.py").write_text("import sys; raise ImportError(f'a stranger, numpy {\"numpy\" in sys.modules}')")
    with monkeypatch.context() as context:
        context.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(KernelError) as raised:
            loader.load(datapath.build)
        assert "a stranger, numpy False" in raised.value.message
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert loader.compile_code(datapath.build, loader.source_directory()) == datapath.loaded.code


def test_a_compiler_that_dies(datapath: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc.py").write_text("import os, sys; sys.stderr.write('out of memory'); sys.stderr.flush(); os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(KernelError) as raised:
        loader.load(datapath.build)
    assert "out of memory" in raised.value.hint
    assert not list(scratch.iterdir())
