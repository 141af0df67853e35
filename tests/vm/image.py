"""What a virtual machine starts from, made once and kept: the disk of a Debian 12 system, and Debian 12's kernels with the modules that
the tests need.

Everything is kept in `vm` under the directory that the environment variable XDPMOND_CACHE names (default /var/cache/xdpmond-dev). A file
is complete or absent: it is made under another name and then renamed, and a lock keeps two makers apart. A name holds a digest of the
recipe, so that a changed recipe makes a new one. The kernels stay as they are until `refresh`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .archive import Archive

KERNELS = {"6.1": "linux-image-cloud-amd64", "6.12": "linux-image-6.12-cloud-amd64"}
"""Debian 12's kernels by version, with the package that depends on the newest build of each."""

PACKAGES = (
    "busybox-static", "ethtool", "gcc", "iproute2", "iputils-ping", "kmod", "libbpf1", "libc6-dev", "linux-libc-dev", "python3",
    "python3-bpfcc", "python3-dbus-next", "python3-hypothesis", "python3-numpy", "python3-pyroute2", "python3-pytest", "python3-scapy",
    "python3-systemd",
)  # fmt: skip
"""What the guest's system holds above debootstrap's smallest set."""

MODULES = (
    "8021q", "act_mirred", "bonding", "bridge", "cls_bpf", "cls_matchall", "dummy", "ifb", "inet_diag", "ipip", "ipvlan", "macvlan",
    "nlmon", "sch_ingress", "sctp", "tcp_diag", "tun", "udp_diag", "veth", "virtio_net", "virtio_rng", "vxlan", "wireguard",
)  # fmt: skip
"""Modules that the guest has, with those that they need. A kernel that has one built in is content."""

FIRST_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
"""Modules without which there is no disk and no way to speak."""

_DROPPED = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists")
"""Directories of the tree that only cost room."""

_ROOM_MIB = 512
"""Free room on the disk, for what the tests write. Each machine sees the disk as it was made."""

_SUITE = "bookworm"
_MIRROR = [mirror] if (mirror := os.environ.get("XDPMOND_MIRROR")) else []  # else debootstrap's own
_SLOW = 1800
"""Seconds after which a download or debootstrap is given up."""


class ImageError(Exception):
    """A part of the image cannot be made; the message names the command that failed and its last lines."""


@dataclass(frozen=True, slots=True)
class Image:
    """Files that a machine starts from. `start` is an archive of the modules and of the program that mounts the disk."""

    kernel: Path
    start: Path
    disk: Path


def cache_directory() -> Path:
    return Path(os.environ.get("XDPMOND_CACHE", "/var/cache/xdpmond-dev")) / "vm"


def prepare(kernel: str, *, refresh: bool = False, say: Callable[[str], None] = lambda text: None) -> Image:
    """Make what is not there yet, or everything with `refresh`, and return the image for one of `KERNELS`."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    system = cache / f"system-{_digest(_SUITE, PACKAGES, _DROPPED, _ROOM_MIB)}"
    directory = cache / f"kernel-{kernel}-{_digest(MODULES, FIRST_MODULES)}"
    with _locked(cache):
        if refresh or not system.exists():
            say(f"making the guest's system with debootstrap (once, about two minutes) in {cache}")
            _make_system(cache, system)
        if refresh or not directory.exists():
            say(f"fetching Debian's kernel {kernel} ({KERNELS[kernel]})")
            _make_kernel(cache, KERNELS[kernel], system / "busybox", directory)
    return Image(directory / "vmlinuz", directory / "start.cpio", system / "disk")


def _digest(*recipe: object) -> str:
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    # apt fetches as its own user, which must be able to enter.
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _make_system(cache: Path, target: Path) -> None:
    if os.geteuid() != 0:
        raise ImageError("debootstrap needs root")
    with _workspace(cache) as work:
        tree = work / "tree"
        # In a mount namespace of its own: what debootstrap mounts in the tree goes with it, also if it is killed halfway.
        _run("unshare", "--mount", "--propagation", "private", "debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}",
             _SUITE, str(tree), *_MIRROR)  # fmt: skip
        for dropped in _DROPPED:
            shutil.rmtree(tree / dropped)
        size = int(_run("du", "--summarize", "--block-size=1M", str(tree)).split()[0])
        made = work / "made"
        made.mkdir()
        _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(tree), str(made / "disk"),
             f"{size * 5 // 4 + _ROOM_MIB}M")  # fmt: skip
        shutil.copyfile(tree / "bin/busybox", made / "busybox")
        _replace(made, target)


def _make_kernel(cache: Path, package: str, busybox: Path, target: Path) -> None:
    depends = _run("apt-cache", "depends", "--important", package)
    named = re.search(r"Depends: (linux-image-\S+)", depends)
    if named is None:
        raise ImageError(f"apt knows no package {package}; is this Debian 12, and was `apt-get update` run?")
    with _workspace(cache) as work:
        _run("apt-get", "download", "--quiet", named[1], directory=work)
        (deb,) = work.glob("*.deb")
        tree, chosen, made = work / "tree", work / "chosen", work / "made"
        _run("dpkg-deb", "--extract", str(deb), str(tree))
        (release,) = (path.name for path in (tree / "lib/modules").iterdir())
        _run("depmod", "--basedir", str(tree), release)
        _choose_modules(tree / "lib/modules" / release, chosen / "lib/modules" / release)
        _run("depmod", "--basedir", str(chosen), release)
        made.mkdir()
        shutil.copyfile(tree / "boot" / f"vmlinuz-{release}", made / "vmlinuz")
        with (made / "start.cpio").open("wb") as stream:
            archive = Archive(stream)
            # The kernel opens it for the first process, before anything is mounted.
            archive.character_device("dev/console", 5, 1)
            archive.file("bin/busybox", busybox.read_bytes(), 0o755)
            archive.tree(chosen)
            archive.close()
        _replace(made, target)


def _choose_modules(base: Path, target: Path) -> None:
    """Copy the modules wanted, those that they need, and depmod's input. They are uncompressed, so that any modprobe can load them."""
    needs: dict[str, list[str]] = {}
    for line in (base / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {_module_name(path): path for path in needs}
    built_in = {_module_name(path) for path in (base / "modules.builtin").read_text().split()}
    names = [_module_name(name) for name in (*FIRST_MODULES, *MODULES)]
    missing = [name for name in names if name not in by_name and name not in built_in]
    if missing:
        raise ImageError(f"the kernel has no module {', '.join(missing)}")
    # ext4 asks for these two by alias, so that they are no dependency in the list.
    names += [name for name in ("crc32c_generic", "crc32c_intel", "crc32c_cryptoapi") if name in by_name]
    wanted = {path for name in names if name in by_name for path in (by_name[name], *needs[by_name[name]])}
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo", *sorted(wanted)):
        content = (base / name).read_bytes()
        copy = target / name.removesuffix(".xz")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(lzma.decompress(content) if name.endswith(".xz") else content)


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _replace(made: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    made.rename(target)


def _run(*command: str, directory: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=_SLOW, check=False)  # fmt: skip
    except FileNotFoundError:
        raise ImageError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ImageError(f"`{' '.join(command)}` took longer than {_SLOW} s") from None
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise ImageError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{tail}")
    return done.stdout
