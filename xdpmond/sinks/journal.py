"""Records as structured entries of journald.

This speaks journald's native protocol itself (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/: a datagram of fields, or a sealed memfd that
holds what no datagram can). `systemd.journal.send` keeps Python's interpreter lock while it waits for journald: with a stopped journald
it would stop every thread of the daemon, the watchdog's too.

A field with a line break in its value is sent with its length, so no name or reason can begin a field of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ..messages import Record, visible
from .queued import PATIENCE, Budget, QueuedSink

SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "xdpmond"
_DAEMON_FACILITY = 3
_LONGEST_NAME = 64
_NOT_OF_A_NAME = re.compile("[^A-Z0-9_]")
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def encode(fields: Iterable[tuple[str, bytes]]) -> bytes:
    """Fields as the bytes of one entry."""
    parts: list[bytes] = []
    for name, value in fields:
        if b"\n" in value:
            parts += [name.encode(), b"\n", struct.pack("<Q", len(value)), value, b"\n"]
        else:
            parts += [name.encode(), b"=", value, b"\n"]
    return b"".join(parts)


def entry_fields(record: Record) -> Iterator[tuple[str, bytes]]:
    """The journal's fields of a record: ours begin with XDPMOND_; None is left out; of a list each item is a field."""
    yield "MESSAGE", _bytes(visible(record.text, keep="\n\t"))
    yield "MESSAGE_ID", record.message.message_id.encode()
    yield "PRIORITY", b"%d" % record.severity
    yield "SYSLOG_IDENTIFIER", IDENTIFIER.encode()
    yield "SYSLOG_FACILITY", b"%d" % _DAEMON_FACILITY
    if record.timestamp and "timestamp" not in record.fields:
        yield "XDPMOND_TIMESTAMP", _bytes(record.timestamp)
    for key, value in record.fields.items():
        name = f"XDPMOND_{_NOT_OF_A_NAME.sub('_', key.upper())}"[:_LONGEST_NAME]
        for item in value if isinstance(value, (list, tuple, set, frozenset)) else (value,):
            if item is not None:
                yield name, _bytes(item)


def _bytes(value: object) -> bytes:
    match value:
        case bytes():
            return value
        case bool():
            return b"true" if value else b"false"
        case float():
            return b"%.6f" % value
        case Mapping():
            return json.dumps(dict(value), default=str).encode()
    return str(value).encode("utf-8", "backslashreplace")


class JournalSink(QueuedSink):
    """The journal of this host. Samples of traffic are written up to a budget; what goes beyond it is held back, and counted."""

    name = "journal"

    def __init__(
        self, events_per_minute: int = 60, *, clock: Callable[[], float] = time.monotonic, path: Path = SOCKET, capacity: int = 2048
    ) -> None:
        super().__init__(capacity)
        self._budget = Budget(events_per_minute, 60, clock)
        self._held_back = 0
        self._path = path
        self._socket: socket.socket | None = None

    @staticmethod
    def available(path: Path = SOCKET) -> bool:
        """Is there a journald to write to?"""
        try:
            return stat.S_ISSOCK(path.stat().st_mode)
        except OSError:
            return False

    @property
    def held_back(self) -> int:
        return self._held_back

    def set_budget(self, events_per_minute: int) -> None:
        with self._changed:
            self._budget.most = events_per_minute

    def _admit(self, events: int) -> int:
        taken = self._budget.take(events)
        self._held_back += events - taken
        return taken

    def _write(self, record: Record) -> bool:
        """Wait for a journald that stands still; but one that is not there, or refuses twice, has lost the record."""
        entry = encode(entry_fields(record))
        refused = False
        while not self._abandoned:
            try:
                self._send(entry)
            except TimeoutError:
                continue
            except OSError:  # perhaps journald has made its socket anew
                self._release()
                if refused:
                    return False
                refused = True
            else:
                return True
        return False

    def _send(self, entry: bytes) -> None:
        connection = self._connected()
        try:
            connection.send(entry)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            with _sealed(entry) as descriptor:
                socket.send_fds(connection, [b""], [descriptor])

    def _connected(self) -> socket.socket:
        """A socket connected to journald's: only then does waiting for room in its queue sleep."""
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                connection.connect(str(self._path))
            except OSError:
                connection.close()
                raise
            connection.settimeout(PATIENCE)
            self._socket = connection
        return self._socket

    def _release(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None


@contextlib.contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A file in memory that can no longer be changed, as journald wants it."""
    descriptor = os.memfd_create("xdpmond-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        yield descriptor
    finally:
        os.close(descriptor)
