"""What systemd is told and what it keeps: readiness, status, watchdog, and the descriptor store (sd_notify(3), sd_listen_fds(3)).

Without systemd all of it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time

try:
    from systemd import daemon  # type: ignore[attr-defined]
except ImportError:  # a trial without the package python3-systemd
    daemon = None

_FIRST_FD = 3


class Notifier:
    """Speaks to the service manager if there is one."""

    @property
    def present(self) -> bool:
        return daemon is not None and "NOTIFY_SOCKET" in os.environ

    def _send(self, text: str, fds: list[int] | None = None) -> None:
        # A manager that is gone, or too busy, misses something; nothing here gets better by ending.
        with contextlib.suppress(OSError):
            if self.present:
                daemon.notify(text, False, 0, fds or [])

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, status: str) -> None:
        self._send(f"STATUS={_one_line(status)}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    @property
    def watchdog_seconds(self) -> float | None:
        """How often the manager wants to hear of us; None if it does not."""
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return int(microseconds) / 1e6 if self.present and mine and microseconds.isdigit() else None

    # The descriptor store. FDPOLL=0: a BPF map polls as an error, which would make systemd drop it at once.

    def keep(self, name: str, fd: int) -> None:
        self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", [fd])

    def forget(self, name: str) -> None:
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")


def stored_descriptors() -> list[tuple[str, int]]:
    """(name, descriptor) of what the store gave back. The environment is cleared, so that no child takes them for its own."""
    mine = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    number, names = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not mine or not re.fullmatch("[0-9]{1,9}", number):
        return []
    found = []
    for index in range(int(number)):
        os.set_inheritable(_FIRST_FD + index, False)
        found.append((names[index] if index < len(names) else "", _FIRST_FD + index))
    return found


def writable_paths(unit: str) -> list[str] | None:
    """Where a unit may write under ProtectSystem=strict; None if there is no such unit, or it may write anywhere."""
    names = ("LoadState", "ProtectSystem", "ReadWritePaths", "StateDirectory", "LogsDirectory", "RuntimeDirectory")
    try:
        done = subprocess.run(["systemctl", "show", unit, *(f"--property={name}" for name in names)], capture_output=True, text=True,
                              timeout=10, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    if found.get("LoadState") != "loaded" or found.get("ProtectSystem") != "strict":
        return None
    paths = [path.lstrip("-+") for path in found.get("ReadWritePaths", "").split()]
    paths += [f"/var/lib/{name}" for name in found.get("StateDirectory", "").split()]
    paths += [f"/var/log/{name}" for name in found.get("LogsDirectory", "").split()]
    return paths + [f"/run/{name}" for name in found.get("RuntimeDirectory", "").split()]


def _one_line(text: str) -> str:
    return text.replace("\n", " ")
