"""Build the Debian package from this checkout without writing into it: `python3 tests/package/build.py [OUTPUT-DIRECTORY]`.

What git knows (and what is new and not ignored) is copied to a temporary directory and built there, so a dirty checkout builds as it
stands, and the checkout stays as it is. Another version can be asked for: the same files under another number, for upgrades.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sources(target: Path) -> None:
    """Copy the checkout's files, without what git ignores."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    for name in listed.decode().split("\0"):
        source = ROOT / name
        if name and (source.is_symlink() or source.is_file()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)


def set_version(tree: Path, version: str) -> None:
    """Give the copied sources another version, in its two places: the module and the changelog."""
    for path, pattern in ((tree / "xdpmond/__init__.py", r'(?<=__version__ = ")[^"]+'), (tree / "debian/changelog", r"(?<=\()[^)]+")):
        text, changed = re.subn(pattern, version, path.read_text(), count=1)
        if not changed:
            raise RuntimeError(f"{path} has no version")
        path.write_text(text)


def build_deb(output: Path, version: str | None = None) -> Path:
    """Build, and put the package with its .changes and .buildinfo into `output`; return the .deb."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="xdpmond-build-") as scratch:
        tree = Path(scratch) / "xdpmond"
        sources(tree)
        if version is not None:
            set_version(tree, version)
        # A git checkout's modes depend on the umask of whoever cloned it; the package's must not.
        environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        command = ["sh", "-c", 'umask 022; exec "$@"', "sh", "dpkg-buildpackage", "-us", "-uc", "-b"]
        done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"dpkg-buildpackage: exit status {done.returncode}\n{done.stdout[-6000:]}")
        for made in Path(scratch).glob("xdpmond_*"):
            shutil.copy(made, output)
        (deb,) = Path(scratch).glob("*.deb")
    return output / deb.name


if __name__ == "__main__":
    print(build_deb(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT.parent)))
