"""What was decided at run time and has to survive a reboot: the entries that did not come from a file, and the modes set by hand.

It is a log. A change is appended as one record and synced before it counts as kept, so that its cost is that of the change, whatever
else the policy holds. A record says of itself how long it is and has checksums, of its head and of its content:

    "xdpmond policy log 1\\n"                            the file begins so
    length u4, crc32 u4, crc32 of these eight bytes u4   little endian; a record's head
    one line of JSON, then columns                       its content

Few entries stand in the JSON itself; many have their addresses in the columns, 4 bytes for an IPv4 prefix and 16 for IPv6, and of
their other properties those that are not the same for all. A change is in one record: it is kept whole or not at all.

A log that ends within a record was being written when the power went: that change was never said to be kept, and is dropped. Anything else
that does not fit is damage: the file is kept aside, never overwritten, since somebody's bans are in it, and what was read before the
damage goes on. Until that is on disk the damaged file has the log's name, too, so that the next start finds as much. When the log is much
longer than what it amounts to, it is written anew beside, synced, renamed, and the directory synced.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import StateError, XdpmondError
from .layers import CODES, VERDICTS, Layer, Rows, changes, is_same, same
from .model import Entry, Family, Mode, Origin, Prefix, Verdict
from .policy import Policy
from .prefixes import ADDRESS, Key, column, each_prefix, masked, packed

NAME = "policy.log"
_OLD_NAME = "state.json"
_OLD_VERSION = 1
_BEGINNING = b"xdpmond policy log 1\n"
_HEAD = struct.Struct("<III")
_FEW = 64
"""Entries that stand in the JSON of a record."""
_SMALL = 1 << 18
"""Bytes of a log that is never too long."""
_MOST_RECORDS = 10_000
"""As many as are read in a tenth of a second."""

_ORIGINS = (Origin.OPERATOR, Origin.AUTOMATIC)
_UNDERSTANDING = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, IndexError, XdpmondError)
"""What comes of reading what we did not write."""


@dataclass(frozen=True, slots=True)
class State:
    """`policy` has no entries of origin configuration. `mode` None: as the configuration says. `interface_modes` are those set for one
    interface."""

    policy: Policy = field(default_factory=Policy)
    mode: Mode | None = None
    interface_modes: Mapping[str, Mode] = field(default_factory=dict)


class OperatorStore:
    """Keeps a `State` in a file. All methods but `overgrown` block on the disk; `compact` may run in a thread beside the others."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._kept: State | None = None
        """What is in the file; None: not known, and the next save writes all of it."""
        self._salvaged: State | None = None
        self._unread = False
        """Is there a file that could not be read, or not to its end?"""
        self._descriptor = -1
        self._size = 0
        self._records = 0
        self._whole = 0
        """Its size when it was written anew."""
        self._appended: list[bytes] | None = None
        """Records since a compaction began."""

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._kept = -1, None

    # Reading

    def load(self) -> State:
        """The state saved last; an empty one if there is none. Raises `StateError` if anything was lost, and says what; the next call
        gives what is left."""
        with self._lock:
            if self._salvaged is not None:
                state, self._salvaged = self._salvaged, None
                return state
            self._close()
            try:
                content, old = self._read(self.path), self.path.with_name(_OLD_NAME)
                if content is None and self.path.name == NAME and (content_of_old := self._read(old)) is not None:
                    return self._import(old, content_of_old)
            except OSError as error:
                self._unread = True
                raise StateError(f"{self.path}: {error.strerror}") from None
            if content is None:
                return State()
            return self._import(self.path, content) if content[:1] == b"{" else self._replay(content)

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def _replay(self, content: bytes) -> State:
        replay = _Replay()
        end, number, whole, problem = len(_BEGINNING), 0, 0, ""
        if not content.startswith(_BEGINNING):
            problem = f"it begins with {content[:40]!r}"
        while not problem and end < len(content):
            try:
                record = _record_at(content, end)
                if record is None:
                    break
                replay.apply(record)
            except _UNDERSTANDING as error:
                problem = f"at byte {end}: {error!r:.200}"
                break
            end += _HEAD.size + len(record)
            number += 1
            whole = whole or end
        state = replay.state()
        if problem:
            left = f"; what was read before that stays: {len(state.policy)} entries" if number else ""
            raise self._damaged(state, f", {problem}{left}")
        if end < len(content):
            said = f"{self.path} ends within a change that was never finished: {len(content) - end} bytes are dropped"
            raise StateError(said + self._salvage(state)[1])
        with contextlib.suppress(OSError):  # a file that may only be read: the next save says so
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._size, self._whole, self._records, self._kept = end, whole, number, state
        return state

    def _damaged(self, state: State, why: str) -> StateError:
        """What is to be raised of a file of which this is left."""
        self._unread = True
        aside, unkept = self._salvage(state)
        return StateError(f"{self.path} is not understood{why}{unkept}", hint=f"it is kept as {aside or self.path}")

    def _salvage(self, state: State) -> tuple[Path | None, str]:
        """Put what is left in the place of the file, and hand it to who asks next. Returns where the file is kept aside, and what keeps
        this from the disk: then the file stays, and the next save tries again, or the next start."""
        self._salvaged, aside = state, None
        try:
            aside = self._keep_aside()
            self._write(state)
        except OSError as error:
            return aside, f"; what is left is not kept on disk: {error.strerror}"
        return aside, ""

    def _keep_aside(self) -> Path | None:
        """Give a file that could not be read a name that no replacement takes."""
        return _link_aside(self.path) if self._unread and os.path.lexists(self.path) else None

    def _import(self, path: Path, content: bytes) -> State:
        """Take over the file of an older version."""
        try:
            state = _decode_old(json.loads(content))
        except _UNDERSTANDING as error:
            why = f": {error!r:.200}"
            if path == self.path:
                raise self._damaged(State(), why) from None
            raise StateError(f"{path} is not understood{why}", hint=f"it is kept as {_move_aside(path)}") from None
        with contextlib.suppress(OSError):
            if path == self.path:
                os.link(path, _not_taken(path, "imported"))
            self._write(state)
            if path != self.path:
                os.rename(path, _not_taken(path, "imported"))
        return state

    # Writing

    def save(self, state: State) -> None:
        """Keep this in place of what was saved before. What is written is the difference."""
        with self._lock:
            try:
                if self._kept is None or not self._is_ours():
                    self._keep_aside()
                    self._write(state)
                else:
                    self._append(self._kept, state)
            except OSError as error:
                raise StateError(f"{self.path} cannot be written: {error.strerror}", hint="changes hold until the daemon stops") from None

    def _is_ours(self) -> bool:
        """Is the file that we append to still that of this name?"""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _append(self, before: State, after: State) -> None:
        record = _change(before, after)
        if record is None:
            self._kept = after
            return
        try:
            _write_all(self._descriptor, record)
            os.fdatasync(self._descriptor)
        except OSError:
            try:
                # What was written of it must not stand before the next record.
                os.ftruncate(self._descriptor, self._size)
                os.fdatasync(self._descriptor)
            except OSError:
                self._close()
            raise
        self._size, self._records, self._kept = self._size + len(record), self._records + 1, after
        if self._appended is not None:
            self._appended.append(record)

    def _write(self, state: State) -> None:
        """All of it, into a new file."""
        beside = self.path.with_name(f"{self.path.name}.new")
        descriptor, size = _write_new(beside, state)
        self._put_in_place(beside, descriptor, size, state)

    def _put_in_place(self, beside: Path, descriptor: int, size: int, state: State) -> None:
        try:
            os.replace(beside, self.path)
        except OSError:
            os.close(descriptor)
            beside.unlink(missing_ok=True)
            raise
        self._close()
        self._descriptor, self._size, self._whole, self._records, self._kept = descriptor, size, size, 1, state
        self._unread, self._appended = False, None
        try:
            _sync_directory(self.path.parent)
        except OSError:
            self._close()
            raise

    @property
    def overgrown(self) -> bool:
        """Is the log much longer than what it amounts to?"""
        kept = self._kept
        if kept is None:
            return False
        # The estimate may be too low: what was written anew just now is never too long.
        too_long = self._size > 1.5 * self._whole and self._size > _SMALL + 3 * _least_size(kept.policy)
        return too_long or self._records > _MOST_RECORDS

    def compact(self) -> None:
        """Write the log anew. Changes are saved meanwhile, and do not wait for it."""
        beside = self.path.with_name(f"{self.path.name}.compact")
        with self._lock:
            state = self._kept
            if state is None:
                return
            self._appended = []
        try:
            descriptor, size = _write_new(beside, state)
            with self._lock:
                if self._appended is None or self._kept is None:  # written anew by a save, or about to be
                    os.close(descriptor)
                    beside.unlink()
                    return
                rest = b"".join(self._appended)
                try:
                    _write_all(descriptor, rest)
                    os.fsync(descriptor)
                except OSError:
                    os.close(descriptor)
                    beside.unlink(missing_ok=True)
                    raise
                self._put_in_place(beside, descriptor, size + len(rest), self._kept)
        except OSError as error:
            raise StateError(f"{self.path} cannot be written anew: {error.strerror}") from None
        finally:
            self._appended = None


def _not_taken(path: Path, why: str) -> Path:
    """A name for the file that nothing has."""
    aside, number = path.with_name(f"{path.name}.{why}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{why.removesuffix('-1')}-{number}")
    return aside


def _link_aside(path: Path) -> Path:
    """A second name for the file. One that it was given before is enough."""
    for aside in path.parent.iterdir():
        if aside.name.startswith(f"{path.name}.unreadable-") and os.path.samestat(aside.lstat(), path.lstat()):
            return aside
    while True:
        aside = _not_taken(path, "unreadable-1")
        try:
            os.link(path, aside)  # unlike a rename, does not overwrite
        except FileExistsError:
            continue
        return aside


def _move_aside(path: Path) -> Path:
    try:
        aside = _link_aside(path)
        path.unlink()
    except OSError as error:
        raise StateError(f"{path} is not understood and cannot be moved aside: {error.strerror}") from None
    return aside


def _write_new(path: Path, state: State) -> tuple[int, int]:
    """A log of this state alone: its descriptor and size."""
    content = _BEGINNING + (_change(State(), state) or b"")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return descriptor, len(content)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _least_size(policy: Policy) -> int:
    """What the entries would take if they were written anew, more or less."""
    size = 0
    for segment in (segment for origin in _ORIGINS for segment in policy.layers[origin].segments.values()):
        columns = sum(of.itemsize for of in segment.base.columns if not is_same(of))
        size += segment.count * columns + len(segment.overlay) * 24
    return size


# Records


def _record_at(content: bytes, at: int) -> bytes | None:
    """The content of a record; None if the file ends within it."""
    if len(content) - at < _HEAD.size:
        return None
    length, checksum, of_head = _HEAD.unpack_from(content, at)
    if zlib.crc32(content[at : at + 8]) != of_head:
        raise ValueError("the head of a record has another checksum")
    start = at + _HEAD.size
    if len(content) - start < length:
        return None
    record = content[start : start + length]
    if zlib.crc32(record) != checksum:
        raise ValueError("a record has another checksum")
    return record


def _framed(content: bytes) -> bytes:
    head = struct.pack("<II", len(content), zlib.crc32(content))
    return head + struct.pack("<I", zlib.crc32(head)) + content


def _change(before: State, after: State) -> bytes | None:
    """The record that turns one state into another; None if they are the same."""
    document: dict[str, Any] = {}
    if (before.mode, dict(before.interface_modes)) != (after.mode, dict(after.interface_modes)):
        document["modes"] = {"everywhere": after.mode, "on": dict(after.interface_modes)}
    columns: list[bytes] = []
    for origin in _ORIGINS:
        found = changes(before.policy.layers[origin], after.policy.layers[origin])
        for key, addresses in found.removed.items():
            if len(addresses) <= _FEW:
                document.setdefault("remove", []).extend([str(prefix), origin] for prefix in each_prefix(key, addresses))
            else:
                document.setdefault("columns", []).append({**_key_to_json(origin, key, addresses), "remove": True})
                columns.append(packed(addresses))
        for key, rows in found.added.items():
            if len(rows) <= _FEW:
                document.setdefault("add", []).extend(_entry_to_json(entry) for entry in rows.entries(origin, key))
            else:
                description, content = _rows_to_columns(key, rows)
                document.setdefault("columns", []).append({**_key_to_json(origin, key, rows.addresses), **description})
                columns += [packed(rows.addresses), content]
    if not document:
        return None
    return _framed(b"".join([json.dumps(document).encode(), b"\n", *columns]))


def _key_to_json(origin: Origin, key: Key, addresses: np.ndarray) -> dict[str, Any]:
    return {"origin": origin, "family": int(key[0]), "length": key[1], "count": len(addresses)}


_DTYPES: dict[str, np.dtype] = {
    "verdict": np.dtype("u1"), "created": np.dtype("<f8"), "expires": np.dtype("<f8"), "reason": np.dtype("<u4"),
}  # fmt: skip


def _rows_to_columns(key: Key, rows: Rows) -> tuple[dict[str, Any], bytes]:
    """What is the same for all in the JSON, the names of the columns for the rest, and these."""
    first = rows.entry(Origin.OPERATOR, key, 0)
    description: dict[str, Any] = {"verdict": first.verdict, "created": first.created, "expires": first.expires, "reason": first.reason}
    columns = {"verdict": rows.verdicts, "created": rows.created, "expires": rows.expires, "reason": rows.labels}
    columns = {name: of for name, of in columns.items() if not is_same(of)}
    description = {name: value for name, value in description.items() if name not in columns} | {"columns": list(columns)}
    if "reason" in columns:
        numbers: dict[str, int] = {}
        columns["reason"] = np.array([numbers.setdefault(reason, len(numbers)) for reason, _ in rows.labels], "u4")
        description["reasons"] = list(numbers)
    return description, b"".join(of.astype(_DTYPES[name]).tobytes() for name, of in columns.items())


class _Replay:
    """Records applied one after the other. Those of few entries are gathered, as objects, until one of many comes."""

    def __init__(self) -> None:
        self._layers = {origin: Layer(origin) for origin in _ORIGINS}
        self._pending: dict[Origin, dict[Prefix, Entry | None]] = {origin: {} for origin in _ORIGINS}
        self._modes: tuple[Mode | None, Mapping[str, Mode]] = None, {}

    def state(self) -> State:
        for origin in _ORIGINS:
            self._flush(origin)
        return State(Policy.of(self._layers), *self._modes)

    def _flush(self, origin: Origin) -> None:
        pending, self._pending[origin] = self._pending[origin], {}
        if pending:
            gone = [prefix for prefix, entry in pending.items() if entry is None]
            self._layers[origin] = self._layers[origin].changed([entry for entry in pending.values() if entry], gone)

    def apply(self, record: bytes) -> None:
        """All of it, or, raising one of `_UNDERSTANDING`, nothing."""
        text, _, content = record.partition(b"\n")
        document = json.loads(text)
        unknown = document.keys() - {"modes", "add", "remove", "columns"}
        if unknown:
            raise ValueError(f"{min(unknown)!r:.40} is unknown")
        modes = _modes_from_json(**document["modes"]) if "modes" in document else self._modes
        add = [_entry_from_json(entry) for entry in document.get("add", ())]
        remove = [(Prefix.parse(prefix), Origin(origin)) for prefix, origin in document.get("remove", ())]
        if not {*(origin for _, origin in remove), *(entry.origin for entry in add)} <= set(_ORIGINS):
            raise ValueError("an entry of the configuration")
        columns = list(_columns(document.get("columns", ()), content))
        self._modes = modes
        for of in columns:
            self._flush(of.origin)
            layer = self._layers[of.origin]
            self._layers[of.origin] = layer.with_rows({of.key: of.rows}) if of.rows else layer.without({of.key: of.addresses})
        for prefix, origin in remove:
            self._pending[origin][prefix] = None
        for entry in add:
            self._pending[entry.origin][entry.prefix] = entry


class _Columns(NamedTuple):
    """Entries to add; or addresses to remove, if there are no rows."""

    origin: Origin
    key: Key
    addresses: np.ndarray
    rows: Rows | None


def _columns(descriptions: Iterable[Mapping[str, Any]], content: bytes) -> Iterator[_Columns]:
    """Read what stands after the JSON, to its last byte."""
    at = 0

    def take(dtype: np.dtype, count: int) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(content, dtype, count, at)
        at += found.nbytes
        return found

    for of in descriptions:
        origin, key, count = Origin(of["origin"]), (Family(of["family"]), of["length"]), of["count"]
        if origin not in _ORIGINS or key[0] not in ADDRESS or not 0 <= key[1] <= key[0].bits or count < 1:
            raise ValueError(f"{of!r:.100} describes no columns")
        addresses = column(key[0], take(np.dtype((np.void, key[0].bits // 8)), count).tobytes())
        if not (addresses[1:] > addresses[:-1]).all() or not (masked(key, addresses) == addresses).all():
            raise ValueError(f"the addresses of {of!r:.100} are not sorted networks")
        if of.get("remove"):
            yield _Columns(origin, key, addresses, None)
            continue
        columns = {name: take(_DTYPES[name], count) for name in of["columns"]}
        yield _Columns(origin, key, addresses, _rows_from_columns(addresses, of, columns))
    if at != len(content):
        raise ValueError(f"{len(content) - at} bytes too many")


def _rows_from_columns(addresses: np.ndarray, of: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> Rows:
    count = len(addresses)
    verdicts = columns["verdict"].copy() if "verdict" in columns else same(CODES[Verdict(of["verdict"])], count, "u1")
    created = columns["created"].astype("f8") if "created" in columns else same(_time(of["created"]), count, "f8")
    if "expires" in columns:
        expires = columns["expires"].astype("f8")
    else:
        expires = same(math.inf if of["expires"] is None else _time(of["expires"]), count, "f8")
    if "reason" in columns:
        choices = np.empty(len(of["reasons"]), "O")
        for number, reason in enumerate(of["reasons"]):
            choices[number] = (str(reason), "")
        labels = choices[columns["reason"]]
    else:
        labels = same((str(of["reason"]), ""), count, "O")
    if not np.isin(verdicts, list(VERDICTS)).all() or not np.isfinite(created).all() or not (expires > -math.inf).all():
        raise ValueError("a column holds what cannot be")
    return Rows([addresses, verdicts, created, expires, labels, same(0, count, "u4")])


def _modes_from_json(everywhere: str | None, on: Mapping[str, str]) -> tuple[Mode | None, Mapping[str, Mode]]:
    return None if everywhere is None else Mode(everywhere), {str(name): Mode(mode) for name, mode in on.items()}


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    return {
        "prefix": str(entry.prefix),
        "verdict": entry.verdict,
        "origin": entry.origin,
        "created": entry.created,
        "expires": entry.expires,
        "reason": entry.reason,
    }


def _decode_old(document: dict[str, Any]) -> State:
    """The one JSON document of version 1."""
    if document["version"] != _OLD_VERSION:
        raise ValueError(f"version {document['version']!r:.40}, where {_OLD_VERSION} is known")
    modes = _modes_from_json(document["mode"], document["interface_modes"])
    return State(Policy(_entry_from_json(entry) for entry in document["entries"]).without_configuration(), *modes)


def _entry_from_json(entry: dict[str, Any]) -> Entry:
    expires = entry["expires"]
    return Entry(
        prefix=Prefix.parse(entry["prefix"]),
        verdict=Verdict(entry["verdict"]),
        origin=Origin(entry["origin"]),
        created=_time(entry["created"]),
        expires=None if expires is None else _time(expires),
        reason=str(entry["reason"]),
    )


def _time(value: float) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a time")
    return float(value)
