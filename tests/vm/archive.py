"""A writer of cpio archives in the kernel's "newc" form, as an initramfs is made of.

Several archives, one behind the other, make one initramfs: a large one that is kept (the system), a small one for each kernel (its
modules), and one written for each run (the project's sources and the command). Everything belongs to root in the guest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_ALIGN = 4
_BLOCK = 512


class Archive:
    """Writes entries to a binary stream; `close` ends the archive and pads it, so that another one may follow."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._inode = 0
        self._written = 0
        self._directories: set[str] = set()

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory, and the directories above it that were not yet added."""
        name = name.strip("/")
        if not name or name in self._directories:
            return
        self.directory(os.path.dirname(name))
        self._directories.add(name)
        self._entry(name, stat.S_IFDIR | mode)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self.directory(os.path.dirname(name))
        self._entry(name, stat.S_IFREG | mode, content)

    def symlink(self, name: str, target: str) -> None:
        self.directory(os.path.dirname(name))
        self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        self.directory(os.path.dirname(name))
        self._entry(name, stat.S_IFCHR | mode, device=(major, minor))

    def tree(self, source: Path, name: str = "", *, wanted: Callable[[str], bool] = lambda path: True) -> None:
        """Add what lies under the directory `source`, as it is. `wanted` is asked with each path relative to it; a directory that is
        not wanted is not entered. Devices, sockets and pipes are left out."""
        with os.scandir(source) as scan:
            found = sorted(scan, key=lambda item: item.name)
        for item in found:
            path = os.path.join(name, item.name)
            if not wanted(path):
                continue
            mode = stat.S_IMODE(item.stat(follow_symlinks=False).st_mode)
            if item.is_symlink():
                self.symlink(path, os.readlink(item.path))
            elif item.is_dir():
                self.directory(path, mode)
                self.tree(Path(item.path), path, wanted=wanted)
            elif item.is_file():
                self.file(path, Path(item.path).read_bytes(), mode)

    def close(self) -> None:
        self._entry("TRAILER!!!", 0)
        self._pad(_BLOCK)

    def _entry(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = os.fsencode(name.strip("/")) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # inode, mode, uid, gid, links, mtime, size, major, minor of the file system, major, minor of a device, length of the name, checksum
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0)
        self._write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad(_ALIGN)
        self._write(content)
        self._pad(_ALIGN)

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._written += len(data)

    def _pad(self, to: int) -> None:
        self._write(bytes(-self._written % to))
