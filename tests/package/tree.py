"""A Debian tree to install the package into: made once by debootstrap, kept in a cache, never written to again.

The tree holds what an ordinary small server has (systemd, the bus, polkit, sshd, sudo) and everything that the package depends on, so
that the package itself installs without a network. A test session lays an overlay over it; what the session does ends with the overlay.
The cache's name carries a digest of the recipe below: a changed recipe makes a new tree and removes the old one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUITE = os.environ.get("XDPMOND_SUITE", "bookworm")
ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDPMOND_CACHE", "/var/cache/xdpmond-dev"))

NAMESPACE = "xm-pkg-"
"""What the names of the machines' wires begin with; the number of the process follows."""

SERVER = ("systemd-sysv", "dbus", "polkitd", "openssh-server", "sudo", "iproute2", "iputils-ping", "netcat-openbsd", "libglib2.0-bin")
"""The server, and the tools that the tests use inside it. The package needs none of them."""

NETWORK = """\
[Match]
Name=host0
[Link]
RequiredForOnline=no
[Network]
Address=10.77.0.1/24
Address=fd77::1/64
Address=2001:db8:77::1/64
Gateway=10.77.0.2
Gateway=fd77::2
IPv6AcceptRA=no
"""
"""host0, as nspawn names the machine's end of its veth. Every foreign address is behind the wire's end, so answers find their way back."""


def package_depends() -> list[str]:
    """The package names in Depends, Recommends and Suggests of debian/control, without versions, alternatives and substitutions."""
    text = (ROOT / "debian/control").read_text()
    names: list[str] = []
    for field in ("Depends", "Recommends", "Suggests"):
        found = re.search(rf"^{field}:(.*(?:\n[ \t].*)*)", text, re.MULTILINE)
        for item in (found.group(1) if found else "").split(","):
            name = item.split("|")[0].split("(")[0].split("[")[0].strip()
            if name and not name.startswith("$"):
                names.append(name)
    return names


def _mirror() -> str:
    """Where this machine has the main section of the suite from, or that of its own suite; empty where it has neither (then debootstrap's
    own default)."""
    text = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    sites = {tuple(parts[1:]): parts[0] for line in text.splitlines() if len(parts := line.split()) == 3}
    return sites.get((SUITE, "main")) or sites.get((platform.freedesktop_os_release().get("VERSION_CODENAME", ""), "main"), "")


def tree() -> Path:
    """The cached tree; made first if it is not there. One process makes it, others wait."""
    recipe = "\n".join(["5", SUITE, *SERVER, *package_depends(), NETWORK])
    path = CACHE / f"{SUITE}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            for old in CACHE.glob(f"{SUITE}-*"):
                shutil.rmtree(old)
            making = CACHE / "making"
            shutil.rmtree(making, ignore_errors=True)
            _make(making)
            making.rename(path)
    return path


def _make(path: Path) -> None:
    print(f"making a {SUITE} tree in {path.parent} (once, about two minutes)", file=sys.stderr, flush=True)
    log = path.parent / "making.log"
    with open(log, "w") as out:

        def run(*command: str) -> None:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}; the end of {log}:\n{log.read_text()[-3000:]}")

        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        mirror = _mirror()
        run("debootstrap", "--variant=minbase", SUITE, str(path), *([mirror] if mirror else []))
        shutil.copy("/etc/resolv.conf", path / "etc/resolv.conf")
        policy = path / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        run("chroot", str(path), "apt-get", "install", "-y", "--no-install-recommends", *SERVER, *package_depends())
        run("chroot", str(path), "apt-get", "clean")
        policy.unlink()
        (path / "etc/resolv.conf").unlink()
        (path / "etc/hostname").write_text("machine\n")
        (path / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 machine\n::1 localhost\n")
        (path / "etc/machine-id").write_text("")
        (path / "etc/systemd/network").mkdir(parents=True, exist_ok=True)
        (path / "etc/systemd/network/10-host0.network").write_text(NETWORK)
        run("chroot", str(path), "systemctl", "enable", "systemd-networkd.service")
        # A container has no modules to load: what fails there says nothing of the package.
        for unit in ("systemd-networkd-wait-online.service", "systemd-modules-load.service", "getty@tty1.service", "console-getty.service",
                     "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
                     "fstrim.timer"):  # fmt: skip
            run("chroot", str(path), "systemctl", "mask", unit)
        (path / "etc/systemd/journald.conf.d").mkdir(parents=True, exist_ok=True)
        (path / "etc/systemd/journald.conf.d/storage.conf").write_text("[Journal]\nStorage=persistent\n")
        run("chroot", str(path), "useradd", "-m", "-s", "/bin/bash", "ordinary")
        run("chroot", str(path), "useradd", "-m", "-s", "/bin/bash", "admin")
        (path / "etc/sudoers.d/admin").write_text("admin ALL=(ALL) NOPASSWD: ALL\n")


@dataclass(frozen=True, slots=True)
class Copy:
    """A tree to write in. `upper` holds what differs from `lower`; None where the whole was copied."""

    root: Path
    lower: Path
    upper: Path | None


def sweep() -> None:
    """Remove what killed test runs left: overlays and namespaces that carry the number of a process which is gone."""
    for namespace in Path("/run/netns").glob(f"{NAMESPACE}*"):
        if not Path("/proc", namespace.name.removeprefix(NAMESPACE).split("-")[0]).exists():
            subprocess.run(["ip", "netns", "del", namespace.name], capture_output=True, check=False)
    for base in CACHE.glob("sessions/machine-*"):
        if not Path("/proc", base.name.split("-")[1]).exists():
            subprocess.run(["umount", "-l", str(base / "root")], capture_output=True, check=False)
            shutil.rmtree(base, ignore_errors=True)


@contextlib.contextmanager
def copy() -> Iterator[Copy]:
    """The tree to write in: an overlay where the file system allows one, else a copy. Gone at the end."""
    lower = tree()
    sessions = CACHE / "sessions"
    sessions.mkdir(exist_ok=True)
    sweep()
    base = Path(tempfile.mkdtemp(prefix=f"machine-{os.getpid()}-", dir=sessions))
    root = base / "root"
    mounted = False
    try:
        for name in ("root", "upper", "work"):
            (base / name).mkdir(mode=0o755)
        options = f"lowerdir={lower},upperdir={base / 'upper'},workdir={base / 'work'}"
        mounted = subprocess.run(["mount", "-t", "overlay", "xdpmond-test", "-o", options, str(root)], capture_output=True).returncode == 0
        if not mounted:
            root.rmdir()
            subprocess.run(["cp", "-a", "--reflink=auto", str(lower), str(root)], check=True)
        yield Copy(root, lower, base / "upper" if mounted else None)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(root)], check=False)
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    print(tree())
