"""Debian packages whose programs the tests talk to, fetched and unpacked but not installed: no service of theirs starts on a developer's
machine, and nothing is left on it but a directory.

    root = borrowed("prometheus")
    subprocess.run([root / "usr/bin/promtool", "check", "metrics"], env=environment(root))

They are kept in `borrowed` under the directory that the environment variable XDPMOND_CACHE names (default /var/cache/xdpmond-dev). A tree
is complete or absent, and a lock keeps two makers apart. To have newer ones, delete that directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_SLOW = 600
"""Seconds after which a download is given up."""


class BorrowError(Exception):
    """A package cannot be had; the message names the command that failed and its last lines."""


def borrowed(package: str) -> Path:
    """The directory into which a package was unpacked, with the libraries that it needs and that are not installed here."""
    cache = Path(os.environ.get("XDPMOND_CACHE", "/var/cache/xdpmond-dev")) / "borrowed"
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / package
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            _fetch(package, cache, tree)
    return tree


def environment(root: Path) -> dict[str, str]:
    """This process's environment, so that a program in the tree finds its libraries there."""
    directories = [str(root / directory) for directory in ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib")]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(directories)}


def _fetch(package: str, cache: Path, tree: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        work.chmod(0o755)  # apt fetches as its own user, which must be able to enter
        _run("apt-get", "download", "--quiet", package, *_libraries(package), directory=work)
        unpacked = work / "tree"
        for deb in sorted(work.glob("*.deb")):
            _run("dpkg-deb", "--extract", str(deb), str(unpacked))
        unpacked.rename(tree)
    finally:
        shutil.rmtree(work)


def _libraries(package: str) -> list[str]:
    """What apt would install with it. What is for all architectures holds no library: pages and fonts for a browser."""
    plan = _run("apt-get", "--simulate", "--no-install-recommends", "install", package)
    return [name for name, about in re.findall(r"^Inst (\S+) (.*)$", plan, re.MULTILINE) if name != package and "[all]" not in about]


def _run(*command: str, directory: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=_SLOW, check=False, env=os.environ | {"LC_ALL": "C"})  # fmt: skip
    except FileNotFoundError:
        raise BorrowError(f"{command[0]} is not installed: this needs Debian") from None
    except subprocess.TimeoutExpired:
        raise BorrowError(f"`{' '.join(command)}` took longer than {_SLOW} s") from None
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise BorrowError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{tail}\n(was `apt-get update` run?)")
    return done.stdout
