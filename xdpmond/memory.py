"""The process's memory, given back when it is not needed any more.

Reading a million prefixes or talkers takes large arrays for a moment. The C library keeps what was freed for later, in a heap for each
thread that used it, and so a daemon that did one large thing would stay large.

Large arrays come and go with each window, and numpy asks for huge pages for them. A virtual machine may give free memory of that size
back to its host, and each such page then costs a visit there: 64 MB took up to 0.3 s of CPU. In pages of the usual size they take 0.03 s
each time.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PR_SET_THP_DISABLE = 41
_LARGE = 4 << 20
"""Bytes. What is larger gets pages of its own, which go back as soon as it is freed. By default this limit grows with what is freed."""
_SPARE = 2 << 20
"""Bytes that are kept at the end of a heap: a step of work over many rows needs as much, and the next one again."""


def configure() -> None:
    """Once, before anything large."""
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt:  # another C library has other ways
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _SPARE)
    _c_library().prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def give_back() -> None:
    """Return what is free to the system. Takes milliseconds."""
    malloc_trim = getattr(_c_library(), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(ctypes.c_size_t(0))


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
