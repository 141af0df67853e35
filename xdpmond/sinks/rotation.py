"""A file of lines that is put aside when it is large or old enough, and the old ones: named, bounded in number, compressed.

An old file is NAME.20261121T135000.123456Z, by the time at which it was put aside, and with .gz behind it once it has been compressed. None
is renamed when others come, so who reads an old file is not disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import threading
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ..config import Log

_MODE = 0o640
_TAIL = 1 << 16
_CHUNK = 1 << 20
_LEVEL = 1
_NICE = 10


class CutShort(OSError):
    """Not all could be written. So many whole lines stand in the file."""

    def __init__(self, error: OSError, whole_lines: int):
        super().__init__(error.errno, error.strerror)
        self.whole_lines = whole_lines


class RotatedFile:
    """For one thread. Every call may raise OSError; the next one tries anew."""

    def __init__(self, log: Log, head: bytes = b""):
        self._path = Path(log.path)
        self._log = log
        self._head = head
        self._fd = -1

    def open(self) -> None:
        """Open the file, or make it. What a crash left of a line at its end is taken away."""
        if self._fd >= 0:
            return
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            fd = os.open(self._path, flags)
        except FileNotFoundError:
            fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, _MODE)
            os.fchmod(fd, _MODE)  # whatever the umask
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            whole = _whole_lines(fd, found.st_size)
            if whole < found.st_size:
                os.ftruncate(fd, whole)
            if not whole and self._head:
                _write_all(fd, self._head)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # what a network file system says then is too late
                os.close(fd)

    def make_room(self, size: int, now: float) -> bool:
        """Put the file aside if so many more bytes would make it too large, or it is of an earlier interval. Was it?"""
        self.open()
        found = os.fstat(self._fd)
        if not found.st_nlink:  # deleted: what is written would go with it
            self.close()
            self.open()
            return False
        log = self._log
        too_large = log.rotate_size and found.st_size + size > log.rotate_size
        too_old = log.rotate_age and now // log.rotate_age > found.st_mtime // log.rotate_age
        if found.st_size <= len(self._head) or not (too_large or too_old):
            return False
        self.close()
        if log.keep:
            os.rename(self._path, _free_name(self._path, now))
        else:
            self._path.unlink()
        self.open()
        prune(self._path, log.keep)
        return True

    def append(self, lines: bytes) -> None:
        """Write whole lines. Raises CutShort."""
        self.open()
        before = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, lines)
        except OSError as error:
            size = os.fstat(self._fd).st_size
            whole = lines.rfind(b"\n", 0, max(0, size - before)) + 1
            os.ftruncate(self._fd, before + whole)
            raise CutShort(error, lines.count(b"\n", 0, whole)) from None


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _whole_lines(fd: int, size: int) -> int:
    """How much of the file is whole lines."""
    tail = os.pread(fd, _TAIL, max(0, size - _TAIL))
    return size - len(tail) + tail.rfind(b"\n") + 1


# Old files


_STAMP = "%Y%m%dT%H%M%S.%fZ"


def _free_name(path: Path, now: float) -> Path:
    """By the time, but behind all others, as the order of the names is that in which they are deleted: the clock may have been set back."""
    moment = datetime.fromtimestamp(now, UTC)
    for old in old_files(path)[-1:]:
        stamp = old.name.removesuffix(".gz").removeprefix(f"{path.name}.")
        moment = max(moment, datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC) + timedelta(microseconds=1))
    return path.with_name(f"{path.name}.{moment.strftime(_STAMP)}")


def _compressed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def old_files(path: Path) -> list[Path]:
    """Those that were put aside, the oldest first."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9]{8}T[0-9]{6}\.[0-9]{6}Z(\.gz)?")
    return sorted(found for found in path.parent.iterdir() if pattern.fullmatch(found.name))


def prune(path: Path, keep: int) -> None:
    """Delete the oldest ones but so many."""
    found = old_files(path)
    for old in found[: max(0, len(found) - keep)]:
        old.unlink(missing_ok=True)


class Compressor:
    """Compresses old files, one at a time, in a thread of low priority that ends when there are no more. A file that is deleted meanwhile,
    as in a flood that fills them faster, stays deleted."""

    def __init__(self, log: Log):
        self._path = Path(log.path)
        self._thread: threading.Thread | None = None
        self._stopped = False

    def begin(self) -> None:
        """There may be something to do."""
        if not self._stopped and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name=f"gzip-{self._path.name}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # on Linux this is the thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        # What cannot be compressed, for a full disk, stays as it is until the next file is put aside.
        with contextlib.suppress(OSError):
            for part in self._path.parent.iterdir():
                if part.name.startswith(f"{self._path.name}.") and part.name.endswith(".gz.part"):  # left by a crash
                    part.unlink(missing_ok=True)
            while not self._stopped and (waiting := [old for old in old_files(self._path) if old.suffix != ".gz"]):
                self._compress(waiting[-1])  # the oldest may be deleted before it is done

    def _compress(self, old: Path) -> None:
        part = _compressed(old).with_suffix(".gz.part")
        try:
            with contextlib.suppress(FileNotFoundError), old.open("rb") as source:
                with part.open("xb") as target:
                    os.fchmod(target.fileno(), stat.S_IMODE(os.fstat(source.fileno()).st_mode))
                    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
                    while chunk := source.read(_CHUNK):
                        if self._stopped:
                            return
                        target.write(packer.compress(chunk))
                    target.write(packer.flush())
                shutil.copystat(old, part)
                os.rename(part, _compressed(old))
                old.unlink()
        finally:
            part.unlink(missing_ok=True)
