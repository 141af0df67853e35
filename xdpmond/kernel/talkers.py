"""The table of talkers or flows, read through memory while the packet path writes it.

Each CPU writes a slice of its own and nothing is ever cleared. An entry is in three maps: `talkers` has what most packets need, `details`
the rest, and `past` the counts of the window before. Its state, one word, has the id of the window that its counts belong to, and what was
counted since that was last added to the details. The writer's order for the first packet of a new window is: move the counts, then store
the state, then zero them (`roll` in bpf/xdpmond.bpf.c).

So, once no packet is under way that still saw the old window, one that has closed is read exactly, without stopping anything, by copying
each entry and then looking at its id again:

- it is still that of the closed one: the writer had not zeroed the counts when the entry was copied, so that they are right;
- it is that of the running one: they had been moved before, so that what was moved is right in another copy.

This leans on stores being seen in their order, as x86 promises. An entry whose closed counts are unread is not replaced meanwhile, so that
no count is both read and counted as evicted. An entry that is replaced has the id 0 until it is whole again.

Of the running window, what an entry is adding to its details may be missing while that lasts. Nothing is found twice: the writer takes it
out of the state first, and the reader copies the state last. And nothing of the window before is found in it: in the middle of `roll` a
state has no packets, and an entry that had some when the reader began has zeroed its details.

A million entries are read in two passes. The first finds those that matter, and their keys; then the keys are sorted; the second copies
entries in that order, so that the same talker in several slices is summed on the way, and no second array of all rows is ever needed.

Where flows are on, an entry is a flow (struct xm_flow), which begins with its talker. All of the above holds for it as well; the talkers
are then made of the flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .. import flowrows
from ..errors import KernelError
from ..flowrows import FLOW, FLOW_WORDS
from ..rows import CHUNK, ROW, WORDS, assemble, collapse, ordered_chunks, sort_keys, take
from . import abi
from .maps import Control, map_memory, monotonic_ns, realtime_at_monotonic_zero

# The words of an entry's copy: the first two are those of a talker, up to eight those of a flow, then come its details
_KEY, _STATE, _TO, _PORTS, _IP_BYTES, _IP_BYTES_BEFORE, _LAST_SEEN = 0, 1, 2, 4, 5, 6, 7
_DETAILS = _HIGH = 8
_SECOND, _BYTES, _PACKETS = range(9, 12)  # with the packets, the SYNs
_WORDS = 12
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_BYTE, _FLAGS_BEFORE, _OUTCOME, _SLOT = np.uint64(0xFF), np.uint64(40), np.uint64(48), np.uint64(56)
_STATE_BYTES, _STATE_PACKETS, _STATE_SEEN, _CARRIED = (
    np.uint64(bits) for bits in (abi.STATE_BYTES, abi.STATE_PACKETS, abi.STATE_SEEN, abi.STATE_CARRIED)
)
_PACKETS_SHIFT, _SEEN_SHIFT = np.uint64(abi.STATE_PACKETS_SHIFT), np.uint64(abi.STATE_SEEN_SHIFT)
_ID_SHIFT = np.uint64(abi.STATE_MOMENT_SHIFT + abi.POLICY_BITS)

_TRIES = 3
"""To copy an entry that was not adding to its details meanwhile."""

Chunks = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class _Kind:
    """How entries become rows, of talkers or of flows."""

    named_by: tuple[int, ...]
    """The words that tell one from another, beside whatever else stands in them."""
    keys: Callable[..., np.ndarray]
    """From these words."""
    chunks: Callable[[np.ndarray], Chunks]
    rows: Callable[[np.ndarray, int], np.ndarray]
    """From a copy of entries, whose states tell when they were last seen in units of 2^n ns."""
    take: Callable[[np.ndarray, np.ndarray], np.ndarray]
    collapse: Callable[[np.ndarray, np.ndarray], np.ndarray]
    assemble: Callable[[int, Iterable[np.ndarray]], np.ndarray]


class TalkerTable:
    """The slices of all CPUs."""

    def __init__(self, maps: Mapping[str, int], control: Control, *, cpus: int, sets: int, flows: bool = False):
        """`flows`: an entry is one."""
        self.flows = flows
        self._control = control
        self._slice = sets * abi.WAYS
        self.capacity = cpus * self._slice
        self._talkers = self._map(maps["talkers"], abi.FLOW if flows else abi.TALKER)
        self._details = self._map(maps["details"], abi.DETAIL)
        self._past = self._map(maps["past"], abi.PAST)

    def _map(self, fd: int, kind: np.dtype) -> np.ndarray:
        memory = map_memory(fd, self.capacity * kind.itemsize, write=False)
        words = kind.itemsize // 8
        return np.frombuffer(memory, "u8", self.capacity * words).reshape(-1, words)

    def _column(self, chunk: slice, word: int) -> np.ndarray:
        """One word of neighbouring entries, as it is now."""
        return self._talkers[chunk, word].copy() if word < _DETAILS else self._details[chunk, word - _DETAILS].copy()

    def _take(self, at: np.ndarray) -> np.ndarray:
        """Entries as they are now, without their details: a line for each word."""
        return self._talkers.take(at, axis=0).T

    def _take_details(self, at: np.ndarray) -> np.ndarray:
        return self._details.take(at, axis=0).T

    def _copy(self, at: np.ndarray) -> np.ndarray:
        """Entries as they are now, their states last: a line for each word, which is what numpy computes with soonest."""
        copy = np.empty((_WORDS, len(at)), "u8")
        copy[_DETAILS:] = self._take_details(at)
        copy[: self._talkers.shape[1]] = self._take(at)
        return copy

    def _chunks(self) -> Iterator[slice]:
        return (slice(at, at + CHUNK) for at in range(0, self.capacity, CHUNK))

    def _find(self, kind: _Kind, matters: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The places of entries that matter, and their keys. `matters` is given states."""
        places, keys, used = np.empty(self.capacity, "u4"), np.empty(self.capacity, "u8"), 0
        for chunk in self._chunks():
            found = np.flatnonzero(matters(self._column(chunk, _STATE)))
            keys[used : used + len(found)] = kind.keys(*(self._column(chunk, word).take(found) for word in kind.named_by))
            places[used : used + len(found)] = chunk.start + found
            used += len(found)
        return places[:used], keys[:used]

    def _read(self, kind: _Kind, matters: Callable[[np.ndarray], np.ndarray],
              settle: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:  # fmt: skip
        """The entries that matter as merged rows. From their places and keys `settle` makes a copy of them whose counts are those that are
        asked for, and says which are wanted."""
        places, keys = self._find(kind, matters)
        chunks = kind.chunks(keys)
        del keys  # 8 MB

        def merged(at: np.ndarray, keys: np.ndarray) -> np.ndarray:
            entries, wanted = settle(at, keys)
            rows = kind.rows(entries, self._control.seen_shift)
            if not wanted.all():
                found = np.flatnonzero(wanted)
                rows, keys = kind.take(rows, found), keys.take(found)
            return kind.collapse(rows, keys)

        return kind.assemble(len(places), (merged(places.take(order).astype("i8"), chunk_keys) for order, chunk_keys in chunks))

    def read_closed(self, closed: int) -> np.ndarray:
        """All talkers of the window `closed`, which must be the one before the running one, as merged rows. Call it in a thread."""
        return flowrows.talkers_of(self.read_closed_flows(closed)) if self.flows else self._read_closed(_TALKERS, closed)

    def read_closed_flows(self, closed: int) -> np.ndarray:
        """All flows of that window, as merged rows."""
        return self._read_closed(_FLOWS, closed)

    def _read_closed(self, kind: _Kind, closed: int) -> np.ndarray:
        closed_id, running_id = _id(closed), _id(self._control.window)

        def matters(states: np.ndarray) -> np.ndarray:
            # What has neither id now has no counts of the closed window, whatever becomes of it while we read; and what has the
            # running one has moved them. So what is found here has unread counts, and its talker stays.
            ids = states >> _ID_SHIFT
            return (ids == closed_id) | (ids == running_id) & (states & _CARRIED > 0)

        def settle(at: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            entries = self._copy(at)  # before the ids: see above
            _add_state(entries)
            moved = np.flatnonzero(self._take(at)[_STATE] >> _ID_SHIFT != closed_id)
            if len(moved):
                again = self._copy(at.take(moved))
                again[_BYTES], again[_PACKETS] = self._past.take(at.take(moved), axis=0).T
                if kind is _FLOWS:
                    again[_IP_BYTES] = again[_IP_BYTES_BEFORE]
                    flags = again[_PORTS] >> _FLAGS_BEFORE & _BYTE
                    again[_PORTS] = again[_PORTS] & ~(_BYTE << _HALF) | flags << _HALF
                entries[:, moved] = again
            return entries, entries[_PACKETS] & _LOW > 0

        return self._read(kind, matters, settle)

    def read_running(self, running: int) -> np.ndarray:
        """All talkers of the running window so far, as merged rows. An entry that is replaced under the reader is left out."""
        return flowrows.talkers_of(self.read_running_flows(running)) if self.flows else self._read_running(_TALKERS, running)

    def read_running_flows(self, running: int) -> np.ndarray:
        """All flows of that window so far, as merged rows."""
        return self._read_running(_FLOWS, running)

    def _read_running(self, kind: _Kind, running: int) -> np.ndarray:
        running_id = _id(running)

        def matters(states: np.ndarray) -> np.ndarray:
            return states >> _ID_SHIFT == running_id

        def settle(at: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            before, entries = self._take(at), self._copy(at)
            for _ in range(_TRIES):
                added = self._take_details(at) ^ entries[_DETAILS:]
                changed = np.flatnonzero(added[_BYTES - _DETAILS] | added[_PACKETS - _DETAILS] & _LOW)
                if not len(changed):
                    break
                entries[:, changed] = self._copy(at.take(changed))
            after = self._take(at)
            same = kind.keys(*(entries[word] for word in kind.named_by)) == keys
            for look in (before, entries):
                # Without packets it is in the middle of `roll`, and its details are those of the window before.
                same &= (look[_STATE] >> _ID_SHIFT == running_id) & (look[_STATE] & _STATE_PACKETS > 0)
            for word in kind.named_by:
                if word < _DETAILS:
                    changed = after[word] ^ entries[word]
                    same &= (changed & _LOW if word == _PORTS else changed) == 0
            _add_state(entries)
            return entries, same

        return self._read(kind, matters, settle)

    def occupied(self) -> list[int]:
        """Entries of the running window or the one before it, in each slice."""
        running, before = _id(self._control.window), _id(self._control.before)
        ids = np.concatenate([self._column(chunk, _STATE) >> _ID_SHIFT for chunk in self._chunks()])
        live = (ids == running) | (ids == before)
        return [int(used) for used in np.count_nonzero(live.reshape(-1, self._slice), axis=1)]

    def following(self, running: int) -> int:
        """The number for the window after the running one: the next, unless an entry is left of a window with the same id, 2^24 windows
        ago. Odd and even numbers take turns, since sketches go by that."""
        number = running + 1
        if number < abi.WINDOW_IDS:
            return number
        used = np.zeros(abi.WINDOW_IDS, bool)
        used[0] = True  # nobody's
        for chunk in self._chunks():
            used[self._column(chunk, _STATE) >> _ID_SHIFT] = True
        first = number % abi.WINDOW_IDS
        in_turn = np.concatenate((used[first::2], used[first % 2 : first : 2]))
        free = int(in_turn.argmin())
        if in_turn[free]:
            raise KernelError("the talkers of the past have used up the numbers of windows", hint="set another size for tables.talkers")
        return number + 2 * free


def _id(number: int) -> np.uint64:
    """How the number of a window stands in the state of an entry."""
    return np.uint64(number % abi.WINDOW_IDS)


def _add_state(entries: np.ndarray) -> None:
    """Put in the place of the counts of an entry's own window those that its state makes them."""
    state = entries[_STATE]
    entries[_PACKETS] += (state & _STATE_PACKETS) >> _PACKETS_SHIFT
    entries[_BYTES] += state & _STATE_BYTES


def _source(key: np.ndarray, high: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two words of an entry's source."""
    name = (key ^ second ^ high ^ high >> _HALF) & _LOW
    return name | second << _HALF, high


def _tail(key: np.ndarray) -> np.ndarray:
    """A row's third word."""
    tail = key >> _HALF
    family = tail >> np.uint64(24)  # enum xm_family: 1 is IPv4, 2 is IPv6
    return tail & np.uint64(0xFFFFFF) | (family * np.uint64(2) + np.uint64(2)) << np.uint64(24)


def _place(key: np.ndarray, ports: np.ndarray) -> np.ndarray:
    """The word of a flow's row that has the ports, the protocol and the family."""
    return ports & _LOW | _tail(key) >> np.uint64(16) << _HALF


def _keys(key: np.ndarray, high: np.ndarray, second: np.ndarray) -> np.ndarray:
    return sort_keys(*_source(key, high, second), _tail(key))


def _flow_keys(key: np.ndarray, high: np.ndarray, second: np.ndarray, *to: np.ndarray) -> np.ndarray:
    to_low, to_high, ports = to
    return flowrows.flow_keys(*_source(key, high, second), to_low, to_high, _place(key, ports))


def _rows(entries: np.ndarray, seen_shift: int) -> np.ndarray:
    words = np.empty((entries.shape[1], WORDS), "u8")
    words[:, 0], words[:, 1] = _source(entries[_KEY], entries[_HIGH], entries[_SECOND])
    words[:, 2] = _tail(entries[_KEY])
    rows = _filled(words.view(ROW).reshape(-1), entries)
    now = monotonic_ns() >> seen_shift
    ago = np.uint64(now) - ((entries[_STATE] & _STATE_SEEN) >> _SEEN_SHIFT) & _BYTE
    rows["last_seen"] = np.maximum((now - ago.astype("f8")) * ((1 << seen_shift) / 1e9) + realtime_at_monotonic_zero(), rows["first_seen"])
    return rows


def _flow_rows(entries: np.ndarray, seen_shift: int) -> np.ndarray:
    key, ports = entries[_KEY], entries[_PORTS]
    words = np.empty((entries.shape[1], FLOW_WORDS), "u8")
    words[:, 0], words[:, 1] = _source(key, entries[_HIGH], entries[_SECOND])
    words[:, 2:4] = entries[_TO : _TO + 2].T
    words[:, 4] = _place(key, ports) | (ports >> _OUTCOME & _BYTE) << np.uint64(48) | (ports >> _HALF & _BYTE) << np.uint64(56)
    words[:, 5] = ports >> _SLOT | (key >> _HALF & np.uint64(0xFFFF)) << np.uint64(16)
    rows = _filled(words.view(FLOW).reshape(-1), entries)
    rows["ip_bytes"] = entries[_IP_BYTES]
    rows["last_seen"] = _moments(entries[_LAST_SEEN] & _LOW)
    return rows


def _filled(rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """With what rows of talkers and of flows have alike."""
    rows["packets"], rows["bytes"], rows["syns"] = entries[_PACKETS] & _LOW, entries[_BYTES], entries[_PACKETS] >> _HALF
    rows["first_seen"] = _moments(entries[_SECOND] >> _HALF)
    return rows


def _moments(seen: np.ndarray) -> np.ndarray:
    """Seconds since the epoch, of what is in units of abi.SEEN_SHIFT."""
    return seen * ((1 << abi.SEEN_SHIFT) / 1e9) + realtime_at_monotonic_zero()


_TALKERS = _Kind((_KEY, _HIGH, _SECOND), _keys, ordered_chunks, _rows, take, collapse, assemble)
_FLOWS = _Kind(
    (_KEY, _HIGH, _SECOND, _TO, _TO + 1, _PORTS), _flow_keys, flowrows.flow_chunks, _flow_rows, flowrows.take_flows,
    flowrows.collapse_flows, flowrows.assemble_flows,
)  # fmt: skip
