"""The metrics in a file, for the text-file collector of Prometheus's node_exporter.

The file is replaced as a whole, so that whoever reads it finds one set of measurements, old or new. A thread writes it: a disk may stand
still. If it cannot be written, that is told once and tried again with the next measurements.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ConfigError
from ..measures import Measured
from ..messages import Message, Priority, Record
from . import exposition


class TextFile:
    def __init__(self, path: str, report: Callable[[Record], None]):
        self.path = path
        self._report = report
        self._changed = threading.Condition()
        self._latest: Sequence[Measured] | None = None
        self._closing = self._removing = self._failing = False
        self._thread = threading.Thread(target=self._run, name="metrics-file", daemon=True)
        self._thread.start()

    def put(self, families: Sequence[Measured]) -> None:
        """Write these next. What waited to be written is out of date now."""
        with self._changed:
            self._latest = families
            self._changed.notify()

    def finish(self, *, remove: bool = False) -> None:
        """End; with the file removed, if it is wanted no more."""
        with self._changed:
            self._closing, self._removing = True, remove
            self._changed.notify()

    def close(self, timeout: float = 3.0) -> None:
        """Write what waits, and end. The file stays, and its xdpmond_read_timestamp_seconds tells how old it is."""
        self.finish()
        self._thread.join(timeout)

    def _run(self) -> None:
        while (families := self._next()) is not None:
            try:
                _replace(self.path, exposition.text(families))
            except OSError as error:
                self._fail(f"{error.strerror} ({_PLACES})")
            except ImportError as error:
                self._fail(f"{error} (apt install python3-prometheus-client)")
            else:
                self._works()
        if self._removing:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _next(self) -> Sequence[Measured] | None:
        with self._changed:
            while self._latest is None and not self._closing:
                self._changed.wait()
            latest, self._latest = self._latest, None
            return None if self._removing else latest

    def _fail(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            self._tell(f"metrics.textfile: {self.path} cannot be written: {reason}")

    def _works(self) -> None:
        if self._failing:
            self._failing = False
            self._tell(f"metrics.textfile: {self.path} is written again", Priority.NOTICE)

    def _tell(self, text: str, priority: int | None = None) -> None:
        self._report(Record(Message.METRICS_PROBLEM, text, {"path": self.path}, priority=priority))


_PLACES = "the service may write where ReadWritePaths= says: systemctl edit xdpmond"


def _replace(path: str, content: bytes) -> None:
    made = f"{path}.tmp"  # the collector reads names that end in .prom
    try:
        with open(made, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
        os.replace(made, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise


def require_writable(path: str) -> None:
    """Refuse a file that this process cannot write, now. Raises ConfigError."""
    if not path:
        return
    exposition.require_library("metrics.textfile")
    directory = Path(path).parent
    if not directory.is_dir():
        raise _refused(path, f"there is no directory {directory}")
    if Path(path).is_dir():
        raise _refused(path, "it is a directory")
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise _refused(path, f"{directory} may not be written")


def require_within(path: str, writable: Sequence[str]) -> None:
    """Refuse a file that the service, which may write below these paths, cannot write, whoever asks. Raises ConfigError."""
    if path and not any(Path(path).is_relative_to(place) for place in writable):
        raise _refused(path, "the service may not write there")


def _refused(path: str, reason: str) -> ConfigError:
    return ConfigError(f"metrics.textfile: {path} cannot be written: {reason}", hint=_PLACES)
