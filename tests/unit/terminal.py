"""A small terminal: what a program writes to it becomes a screen that a test can look at.

It knows the escape sequences that xdpmonctl writes, and fails on any other.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence

_SEQUENCE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


class Screen:
    """The state of the terminal, from what was written to it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.height = columns, lines
        self.alternate, self.cursor, self.wrap = False, True, True
        self.frames = 0
        """How often a screen was drawn to its end."""
        self._drawn = [""] * lines
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._rest = ""
        self._grids: dict[bool, list[list[str]]] = {}
        self._clear()
        self._row = self._column = 0

    def _clear(self) -> None:
        self._grids[self.alternate] = [[" "] * self.columns for _ in range(self.height)]

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.height = columns, lines
        self._drawn = [""] * lines
        self._clear()

    @property
    def lines(self) -> list[str]:
        """As they are; of the alternate screen as they were when it was last drawn to its end."""
        return self._drawn if self.alternate else self._now()

    def _now(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._grid]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def _grid(self) -> list[list[str]]:
        return self._grids[self.alternate]

    def feed(self, data: bytes) -> None:
        text = self._rest + self._decode(data)
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                found = _SEQUENCE.match(text, at)
                if found is None:
                    assert len(text) - at < 16, f"an escape sequence that is not known: {text[at : at + 16]!r}"
                    break
                self._obey(*found.groups())
                at = found.end()
            else:
                self._put(text[at])
                at += 1
        self._rest = text[at:]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            if self._row == self.height - 1:
                self._grid.append([" "] * self.columns)
                del self._grid[0]
            else:
                self._row += 1
        else:
            assert character.isprintable(), repr(character)
            if self._column == self.columns:
                if self.wrap:
                    self._put("\r")
                    self._put("\n")
                else:
                    self._column -= 1
            self._grid[self._row][self._column] = character
            self._column += 1

    def _obey(self, private: str, numbers: str, letter: str) -> None:
        if private:
            on = {"h": True, "l": False}[letter]
            if numbers == "1049":
                self.alternate = on
                if on:
                    self._clear()
            elif numbers == "25":
                self.cursor = on
            elif numbers == "7":
                self.wrap = on
            else:
                raise AssertionError(f"mode {numbers} is not known")
        elif letter == "H":
            assert not numbers
            if self._column or self._row:
                self._drawn = self._now()
                self.frames += 1
            self._row = self._column = 0
        elif letter in "KJ":
            at = min(self._column, self.columns - 1)  # after the last column the cursor stands on it
            self._grid[self._row][at:] = [" "] * (self.columns - at)
            for row in self._grid[self._row + 1 :] if letter == "J" else []:
                row[:] = [" "] * self.columns
        else:
            assert letter == "m", letter


class Console:
    """A program on a pseudo-terminal of its own, which is also its controlling terminal."""

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], columns: int = 80, lines: int = 24, *, keys: bool = True
    ) -> None:
        self.screen = Screen(columns, lines)
        self._ours, self._theirs = os.openpty()
        self._set_size()
        self.before = termios.tcgetattr(self._theirs)
        stdin = self._theirs if keys else subprocess.DEVNULL
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command] if keys else list(command), env=environ, stdin=stdin, stdout=self._theirs, stderr=self._theirs
        )

    def _set_size(self) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", self.screen.height, self.screen.columns, 0, 0))

    @property
    def attributes(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(columns, lines)
        self._set_size()
        self.process.send_signal(signal.SIGWINCH)

    def read(self, seconds: float = 0.0) -> bool:
        """Take what has been written, waiting so long for something."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        self.screen.feed(os.read(self._ours, 65536))
        return True

    def until(self, holds: Callable[[Screen], object], seconds: float = 60) -> None:
        """Until the screen is so; fail with what stands on it."""
        end = time.monotonic() + seconds
        while not holds(self.screen):
            assert time.monotonic() < end, f"not seen; the screen:\n{self.screen.text}"
            self.read(0.05)

    def ended(self, seconds: float = 60) -> int:
        """The status that it ends with, when all that it wrote is on the screen."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it goes on; the screen:\n{self.screen.text}"
            self.read(0.05)
        while self.read():
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)
