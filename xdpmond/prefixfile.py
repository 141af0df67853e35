"""Prefixes from a file that a caller has opened: one a line, `#` begins a comment, read as strictly as one given by hand."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from .errors import PrefixError, UsageError
from .model import Prefix

_CHUNK = 1 << 20
_LONGEST_LINE = 4096


def read_prefixes(fd: int, most: int) -> list[Prefix]:
    """The prefixes, each once; errors name the line. Reads from the beginning, and leaves descriptor and position to the caller.

    Only a regular file is read: another kind could keep this thread waiting for ever. `most` prefixes are the end of it.
    """
    prefixes: dict[Prefix, None] = {}
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError("prefixes are read from a regular file only", hint="xdpmonctl copies others first")
        for number, line in enumerate(_lines(fd), 1):
            text = line.partition(b"#")[0].strip().decode("ascii", errors="replace")
            if not text:
                continue
            try:
                prefixes[Prefix.parse(text)] = None
            except PrefixError as error:
                raise PrefixError(f"line {number}: {error.message}", hint=error.hint) from None
            if len(prefixes) > most:
                raise UsageError(f"line {number}: more than {most} prefixes", hint="tables.prefixes says how many there may be")
    except OSError as error:
        raise UsageError(f"the file cannot be read: {error.strerror}") from None
    if not prefixes:
        raise UsageError("the file names no prefix")
    return list(prefixes)


def _lines(fd: int) -> Iterator[bytes]:
    """The lines, without keeping the whole file in memory."""
    at, rest, number = 0, b"", 0
    while chunk := os.pread(fd, _CHUNK, at):
        at += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            yield line
        if len(rest) > _LONGEST_LINE:
            raise UsageError(f"line {number + 1} is longer than {_LONGEST_LINE} characters")
    yield rest
