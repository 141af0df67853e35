"""The compiled packet path on disk: used again for what it was made of, and never in the place of something else."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xdpmond.errors import KernelError
from xdpmond.kernel import libbpf, loader
from xdpmond.kernel.codefile import NAME, CodeFile

from .harness import Harness


class Kept:
    """A file in a directory, and what was told of it."""

    def __init__(self, directory: Path):
        self.told: list[str] = []
        self.path = directory / NAME
        self.file = CodeFile(directory, self.told.append)

    def load(self, identity: int) -> loader.Code | None:
        return self.file.load(identity)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_boot_needs_no_compiler(datapath: Harness, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loader.load(datapath.build, keeper=kept.file)
    first.close()
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600 and [path.name for path in kept.path.parent.iterdir()] == [NAME]
    with monkeypatch.context() as context:
        context.setattr(loader, "compile_code", None)
        again = loader.load(datapath.build, keeper=kept.file)
    assert again.code == first.code
    for name in (loader.ETHERNET, loader.IP):
        assert libbpf.instruction_count(again.program(name)) == libbpf.instruction_count(datapath.loaded.program(name))
    again.close()
    # What is compiled for something else takes its place.
    other = loader.load(dataclasses.replace(datapath.build, ring_bytes=0), keeper=kept.file)
    other.close()
    assert kept.load(first.code.identity) is None
    assert kept.load(other.code.identity) == other.code
    assert not kept.told


def test_what_the_kernel_refuses_is_not_kept(datapath: Harness, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler may make something better of it."""
    sources = tmp_path / "bpf"
    shutil.copytree(loader.source_directory(), sources)
    text = (sources / "parse.h").read_text()
    (sources / "parse.h").write_text(text.replace("if ((void *)(eth + 1) > c->end) {", "if (0) {"))
    monkeypatch.setenv("XDPMOND_BPF_DIR", str(sources))
    with pytest.raises(KernelError, match="the kernel refuses"):
        loader.load(datapath.build, keeper=kept.file)
    assert not kept.path.exists() and not kept.told


def test_the_identity_is_that_of_the_kernel_too(datapath: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may refuse what this one takes, and take what is compiled anew."""
    build, directory = datapath.build, loader.source_directory()
    before = build.identity(directory)
    running = os.uname()
    other = os.uname_result((running.sysname, running.nodename, "6.1.0-99-amd64", running.version, running.machine))
    monkeypatch.setattr(os, "uname", lambda: other)
    assert build.identity(directory) != before


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "the digest": lambda data: flip(data, 3),
    "the head": lambda data: flip(data, 80),
    "an instruction": lambda data: flip(data, len(data) - 100),
    "without a digest": lambda data: data.partition(b"\n")[2],
    "very large": lambda data: data + bytes(4 << 20),
    "something else": lambda data: b"\x7fELF" + os.urandom(1000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file(datapath: Harness, kept: Kept, damage: Callable[[bytes], bytes]) -> None:
    code = datapath.loaded.code
    kept.file.save(code)
    assert kept.load(code.identity) == code and not kept.told
    kept.path.write_bytes(damage(kept.path.read_bytes()))
    assert kept.load(code.identity) is None
    (said,) = kept.told
    assert str(kept.path) in said and "damaged" in said and "compiled anew" in said
    kept.file.save(code)
    assert kept.load(code.identity) == code and len(kept.told) == 1


def link(path: Path) -> None:
    elsewhere = path.rename(path.with_name("elsewhere"))
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FOREIGN: dict[str, Callable[[Path], None]] = {
    "of another user": lambda path: os.chown(path, 1, -1),
    "writable by the group": lambda path: path.chmod(0o660),
    "writable by all": lambda path: path.chmod(0o606),
    "a link": link,
    "a pipe": pipe,
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_others_can_write(datapath: Harness, kept: Kept, change: Callable[[Path], None]) -> None:
    code = datapath.loaded.code
    kept.file.save(code)
    change(kept.path)
    assert kept.load(code.identity) is None
    assert len(kept.told) == 1 and str(kept.path) in kept.told[0]
    kept.file.save(code)
    assert kept.load(code.identity) == code and len(kept.told) == 1


def test_a_directory_in_its_place(datapath: Harness, kept: Kept) -> None:
    kept.path.mkdir()
    assert kept.load(1) is None
    kept.file.save(datapath.loaded.code)
    assert len(kept.told) == 2 and "the next boot compiles it again: Is a directory" in kept.told[1]
    assert list(kept.path.parent.iterdir()) == [kept.path]


def test_a_full_disk(datapath: Harness, small_disk: Path) -> None:
    full = Kept(small_disk)
    full.file.save(datapath.loaded.code)
    assert len(full.told) == 1 and "No space left" in full.told[0]
    assert not list(small_disk.iterdir())
    assert full.load(datapath.loaded.code.identity) is None


def test_a_disk_that_cannot_be_written(datapath: Harness, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    loaded = loader.load(datapath.build, keeper=(protected := Kept(small_disk)).file)
    loaded.close()
    assert len(protected.told) == 1 and "Read-only file system" in protected.told[0]


def test_a_start_that_was_cut_short(datapath: Harness, kept: Kept) -> None:
    beside = kept.path.with_name(f"{NAME}.new")
    beside.write_text("half of it")
    kept.file.save(datapath.loaded.code)
    assert kept.load(datapath.loaded.code.identity) == datapath.loaded.code
    assert not beside.exists() and not kept.told
