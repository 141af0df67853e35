"""What callers keep of the daemon's memory.

The pages of a memfd are the daemon's for as long as anybody has it: open, mapped, by its path alone, or on its way in a socket. Nobody can
take it back. So it is counted by user, and who keeps too much gets no more. inotify tells when the last one has let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import XdpmondError

NUMBER = 256
"""How many a user may keep."""
BYTES = 32 * 1024 * 1024
BYTES_PER_ENTRY = 256
"""By so much for each entry of the policy a user may keep more: the list of all of them is the largest there is."""
USERS = 2
"""All but root may keep so many times what one may."""

_IN_DELETE_SELF = 0x400
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Memory:
    uid: int
    size: int


class Held:
    """Memory of users but root. `entries` is how many the policy has."""

    def __init__(self, entries: Callable[[], int]):
        self._entries = entries
        self._inotify = -1
        self._watched: dict[int, _Memory] = {}

    def require_room(self, uid: int) -> None:
        """Raise `XdpmondError` if the user keeps so much already that he gets no more. What he gets then may be of any size."""
        self._forget_freed()
        room = BYTES + BYTES_PER_ENTRY * self._entries()
        of_all = list(self._watched.values())
        own = [memory for memory in of_all if memory.uid == uid]
        for memories, users in ((own, 1), (of_all, USERS)):
            if len(memories) >= users * NUMBER or sum(memory.size for memory in memories) >= users * room:
                raise XdpmondError("too many lists are kept open already", hint="close some of them")

    def add(self, uid: int, descriptor: int) -> None:
        """Count this memfd to the user until nobody has it any more. The descriptor stays the caller's."""
        try:
            if self._inotify < 0:
                self._inotify = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
                weakref.finalize(self, os.close, self._inotify)
            place = f"/proc/self/fd/{descriptor}".encode()
            watch = _checked(_libc.inotify_add_watch(self._inotify, place, _IN_DELETE_SELF))
        except OSError as error:
            raise XdpmondError(f"how long this list is kept open cannot be seen: {error.strerror}", hint="run it with sudo") from error
        self._watched[watch] = _Memory(uid, os.fstat(descriptor).st_size)

    def _forget_freed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._inotify >= 0:
                told = os.read(self._inotify, 64 * _EVENT.size)
                for watch, *_ in _EVENT.iter_unpack(told):  # of a file that is watched itself no name is told
                    self._watched.pop(watch, None)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
