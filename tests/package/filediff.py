"""The files of a machine's tree, to compare before and after.

Over an overlay only what was written is read; a file that is not in the upper layer is the cached tree's.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from . import tree

Fingerprint = tuple[int, int, int, str]
"""Mode, user, group, and what it holds: a digest, a link's target, or nothing."""


def snapshot(copy: tree.Copy) -> dict[str, Fingerprint]:
    """Path, from the root, to fingerprint."""
    found: dict[str, Fingerprint] = {}
    for folder, _, names in os.walk(copy.root):
        for path in [Path(folder), *(Path(folder, name) for name in names)]:
            inner = "/" + str(path.relative_to(copy.root)).removeprefix(".")
            found[inner] = _fingerprint(path, copy, inner)
    return found


def _fingerprint(path: Path, copy: tree.Copy, inner: str) -> Fingerprint:
    try:
        status = path.lstat()
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            written = copy.upper is None or os.path.lexists(str(copy.upper) + inner)
            content = _digest(path) if written else "as in the cache"
    except FileNotFoundError:
        return (0, 0, 0, "gone while looking")
    return (status.st_mode, status.st_uid, status.st_gid, content)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(before: dict[str, Fingerprint], after: dict[str, Fingerprint], copy: tree.Copy) -> dict[str, str]:
    """Path to what became of it: new, gone or changed."""
    found: dict[str, str] = {}
    for path in before.keys() | after.keys():
        old, new = before.get(path), after.get(path)
        if old is None or new is None:
            found[path] = "new" if old is None else "gone"
        elif old != new:
            if old[3] == "as in the cache" and old[:3] == new[:3] and _digest(Path(str(copy.lower) + path)) == new[3]:
                continue
            found[path] = "changed"
    return found
