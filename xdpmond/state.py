"""What was decided at run time and has to survive a reboot: the entries that did not come from a file, and the modes set by hand.

It is one JSON file, replaced as a whole: written beside, synced, renamed, and the directory synced, so that a power cut leaves the old
state or the new one. A file that cannot be understood is moved aside, never overwritten: somebody's bans are in it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import StateError, XdpmondError
from .model import Entry, Mode, Origin, Prefix, Verdict

VERSION = 1
DEFAULT_PATH = Path("/var/lib/xdpmond/state.json")


@dataclass(frozen=True, slots=True)
class State:
    """`mode` None: as the configuration says. `interface_modes` are those set for one interface."""

    entries: tuple[Entry, ...] = ()
    mode: Mode | None = None
    interface_modes: Mapping[str, Mode] = field(default_factory=dict)


class OperatorStore:
    """Keeps a `State` in a file. Both methods block on the disk."""

    def __init__(self, path: Path = DEFAULT_PATH):
        self.path = path

    def load(self) -> State:
        """The state saved last; an empty one if there is none. A file that is damaged, or of a newer version, is moved aside and
        `StateError` names its new place: the next call starts from nothing."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise StateError(f"{self.path}: {error.strerror}") from None
        try:
            return _decode(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, XdpmondError) as error:
            aside = self._move_aside()
            raise StateError(f"{self.path} is not understood: {error!r:.200}", hint=f"it is kept as {aside}") from None

    def save(self, state: State) -> None:
        beside = self.path.with_name(f"{self.path.name}.new")
        try:
            try:
                descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(_encode(state))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, self.path)
            except OSError:
                beside.unlink(missing_ok=True)
                raise
            self._sync_directory()
        except OSError as error:
            raise StateError(f"{self.path} cannot be written: {error.strerror}", hint="changes hold until the daemon stops") from None

    def _sync_directory(self) -> None:
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _move_aside(self) -> Path:
        number = 1
        while True:
            aside = self.path.with_name(f"{self.path.name}.unreadable-{number}")
            try:
                os.link(self.path, aside)  # unlike a rename, does not overwrite
                self.path.unlink()
                return aside
            except FileExistsError:
                number += 1
            except OSError as error:
                raise StateError(f"{self.path} is not understood and cannot be moved aside: {error.strerror}") from None


def _encode(state: State) -> str:
    """JSON, one entry a line: a person may have to read it."""
    head = {"version": VERSION, "mode": state.mode, "interface_modes": dict(state.interface_modes)}
    entries = ",\n".join(json.dumps(_entry_to_json(entry)) for entry in state.entries)
    return f'{json.dumps(head)[:-1]}, "entries": [\n{entries}\n]}}\n'


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    return {
        "prefix": str(entry.prefix),
        "verdict": entry.verdict,
        "origin": entry.origin,
        "created": entry.created,
        "expires": entry.expires,
        "reason": entry.reason,
    }


def _decode(document: dict[str, Any]) -> State:
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']!r:.40}, where {VERSION} is known")
    mode = document["mode"]
    return State(
        entries=tuple(_entry_from_json(entry) for entry in document["entries"]),
        mode=None if mode is None else Mode(mode),
        interface_modes={str(name): Mode(mode) for name, mode in document["interface_modes"].items()},
    )


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
