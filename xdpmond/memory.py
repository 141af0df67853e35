"""The process's memory, given back when it is not needed any more.

Reading a million prefixes or talkers takes large arrays for a moment. The C library keeps what was freed for later, in a heap for each
thread that used it, and so a daemon that did one large thing would stay large.
"""

from __future__ import annotations

import ctypes
import functools

_M_MMAP_THRESHOLD = -3
_LARGE = 4 << 20
"""Bytes. What is larger gets pages of its own, which go back as soon as it is freed. By default this limit grows with what is freed."""


def configure() -> None:
    """Once, before anything large."""
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt:  # another C library has other ways
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Return what is free to the system. Takes milliseconds."""
    malloc_trim = getattr(_c_library(), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(ctypes.c_size_t(0))


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
