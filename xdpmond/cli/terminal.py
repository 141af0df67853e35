"""The terminal, while a live screen has it.

A live screen is drawn on the terminal's alternate screen, with the cursor hidden and keys read one by one; all of that is put back however
the program ends. Signals only set a flag and wake the one place that waits, so that no signal can interrupt the putting back. If the
program does not get there, because nobody reads its output, the second signal puts back what it can and ends it on the spot.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import termios
import tty
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple, TextIO

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""The alternate screen, no cursor, no wrapping."""
LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"

PAINT = re.compile(r"\x1b\[[0-9;]*m")
_OTHER_KEYS = re.compile(r"\x1b(\[[0-9;]*[ -/]*[@-~]|O.|)")
"""Arrows and the like, of which we know none."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Happened(NamedTuple):
    """What there is to do after a wait."""

    keys: str
    ended: int
    """The signal that ends us, or 0. SIGHUP too if the terminal has gone."""
    stop: bool
    """Ctrl-Z: to be answered by `suspend`."""


class Terminal:
    """Use it in a `with`. `keys` is the descriptor that keys are read from; None: nobody is there to type."""

    def __init__(self, out: TextIO, keys: int | None) -> None:
        self._out = out
        self._keys = keys
        self._attributes: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._ended = 0
        self._stop = False

    def __enter__(self) -> Terminal:
        self._woken, self._waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)
        for number in (*_ENDING, signal.SIGWINCH, signal.SIGTSTP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._signalled)
        try:
            if self._keys is not None:
                self._attributes = termios.tcgetattr(self._keys)
            self._take()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before)
        # The descriptors of the pipe stay open: a thread that we do not wait for may still wake us.

    @property
    def size(self) -> os.terminal_size:
        try:
            size = os.get_terminal_size(self._out.fileno())
        except OSError:
            size = os.terminal_size((0, 0))
        return size if size.columns and size.lines else os.terminal_size((80, 24))

    def draw(self, lines: Sequence[str]) -> None:
        """Write a whole screen at once. Of the one before, only what is right of shorter lines is cleared, and what is below: after a line
        that fills the screen, the cursor stands on its last character."""
        columns = self.size.columns
        ended = [line + CLEAR_LINE if len(PAINT.sub("", line)) < columns else line for line in lines]
        self._out.write(HOME + "\n".join([*ended[:-1], CLEAR_BELOW + ended[-1]]) + HOME)
        self._out.flush()

    def wake(self) -> None:
        """End the wait, from any thread."""
        with contextlib.suppress(BlockingIOError):  # so full that it wakes in any case
            os.write(self._waking, b"\0")

    def wait(self, seconds: float | None) -> Happened:
        """Until a key, a signal, a new size, or somebody wakes us."""
        if not self._ended and not self._stop:
            watched = [self._woken] if self._keys is None else [self._woken, self._keys]
            ready, _, _ = select.select(watched, [], [], seconds)
        else:
            ready = []
        with contextlib.suppress(BlockingIOError):
            while os.read(self._woken, 512):
                pass
        return Happened(self._typed() if self._keys in ready else "", self._ended, self._stop)

    def _typed(self) -> str:
        assert self._keys is not None
        try:
            data = os.read(self._keys, 512)
        except OSError:
            data = b""
        if not data:
            self._ended = self._ended or signal.SIGHUP
        return _OTHER_KEYS.sub("", data.decode("ascii", "ignore"))

    def suspend(self) -> None:
        """Stop, as Ctrl-Z asks, with the terminal as it was; return when we are continued."""
        self._stop = False
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._signalled)
        self._take()

    def _take(self) -> None:
        if self._keys is not None:
            tty.setcbreak(self._keys, termios.TCSADRAIN)
        self._out.write(ENTER)
        self._out.flush()

    def _give_back(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has gone
            self._out.write(LEAVE)
            self._out.flush()
        self._restore(termios.TCSADRAIN)

    def _restore(self, when: int) -> None:
        if self._keys is not None and self._attributes is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._keys, when, self._attributes)

    def _signalled(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGTSTP:
            self._stop = True
        elif number != signal.SIGWINCH:
            if self._ended:
                self._restore(termios.TCSANOW)
                os._exit(128 + number)
            self._ended = number
