"""Prefixes from a file: one a line, `#` begins a comment, read as strictly as one given by hand."""

from __future__ import annotations

import os
import stat

from .errors import UsageError
from .prefixes import PrefixReader, PrefixSet

_CHUNK = 1 << 18
"""Bytes: what is read at once stays in the processor's cache."""


def read_prefixes(fd: int, most: int) -> PrefixSet:
    """The prefixes, each once; errors name the line. Reads from the beginning, and leaves descriptor and position to the caller."""
    prefixes = _read(fd, PrefixReader(most))
    if not prefixes:
        raise UsageError("the file names no prefix")
    return prefixes


def read_list(path: str, most: int) -> PrefixSet:
    """The prefixes of a file named in the configuration, each with the last line on which it stands; errors name file and line."""
    try:
        # Without waiting for the other end, should it be a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        return _read(fd, PrefixReader(most, path))
    finally:
        os.close(fd)


def _read(fd: int, reader: PrefixReader) -> PrefixSet:
    """Only a regular file is read: another kind could keep this thread waiting for ever."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError("prefixes are read from a regular file only", hint="xdpmonctl copies others first")
        at = 0
        while chunk := os.pread(fd, _CHUNK, at):
            at += len(chunk)
            reader.feed(chunk)
    except OSError as error:
        raise UsageError(f"the file cannot be read: {error.strerror}") from None
    return reader.finish()
