"""The compiled packet path on disk: what one boot has compiled, the next one loads.

LLVM takes more than half of a cold start, and 190 MB while it works. What it made is used again for the same sources and definitions under
the same kernel, which has accepted it before; the verifier looks at it as at any other. What else the file may hold is told, and not used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from .loader import Code

NAME = "program"

_MOST_BYTES = 1 << 20  # it is some 40 KB
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class CodeFile:
    """Blocking calls. `tell` is called when the file is of no use, or cannot be written; for the daemon neither is a reason to end."""

    def __init__(self, directory: Path, tell: Callable[[str], None]):
        self._path = directory / NAME
        self._tell = tell

    def load(self, identity: int) -> Code | None:
        """What was saved, if it has this identity."""
        try:
            code = Code.unpack(self._read())
        except FileNotFoundError:
            return None
        except OSError as error:
            self._useless(error.strerror or str(error))
            return None
        if code is None:
            self._useless("it is damaged")
            return None
        return code if code.identity == identity else None

    def _read(self) -> bytes:
        # Without waiting, if somebody has put a pipe there.
        fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _WRITABLE_BY_OTHERS:
                raise PermissionError(errno.EPERM, "it is not this daemon's alone")
            return os.pread(fd, _MOST_BYTES, 0)
        finally:
            os.close(fd)

    def save(self, code: Code) -> None:
        """Whole, or not at all."""
        beside = self._path.with_name(f"{NAME}.new")
        try:
            beside.unlink(missing_ok=True)  # of a start that was cut short
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(code.pack())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            self._tell(f"the compiled packet path is not kept in {self._path}, and the next boot compiles it again: {error.strerror}")

    def _useless(self, why: str) -> None:
        self._tell(f"{self._path} is not used, and the packet path compiled anew: {why}")
