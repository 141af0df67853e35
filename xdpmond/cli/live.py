"""The live screen of `top` and `flows`: the same rows again and again, in place, with what moves now.

The daemon is asked by a thread of its own, one question at a time, so that keys, signals and a new size of the terminal are answered
while it works or does not answer at all. A daemon that needs long for an answer is asked less often.

Rates are those between two answers. The figures of a talker are of the last full window and the running one, so they fall when a window
ends: then, for one refresh, the rates before it stand. What was not there before has no rate of its own yet; the mean stands for it, dim.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import NotRunningError, XdpmondError
from . import fields, layout
from .context import Context, Daemon
from .fields import Document
from .render import safe, span
from .resolve import Resolver
from .status import Screen, told
from .talkers import Look, Rates, Subject, mean_rates, table_of
from .terminal import PAINT, Terminal

INTERVAL_SECONDS = 2.0
MOST_BUSY = 0.25
"""The part of the time that the daemon may be busy with our questions."""
SLOWEST_SECONDS = 15.0
STATUS_SECONDS = 10.0
"""The head of the screen is asked for no more often: the daemon's own figures are no newer."""
ASKED_ROWS = 200
"""So many rows are asked for and ordered by rate, though fewer may be shown: what begins to move now has not sent the most yet."""
MOST_ROWS = 10_000
WINDOWS = 60
HELP = ("q quit", "spc pause", "{} sort", "t totals", "r reverse", "+/- rows")
STEADY = 7
"""Columns of bytes are never narrower, lest the table jump with each refresh."""


class Head(NamedTuple):
    status: Document
    windows: list[Document]
    asked: float


class Answer(NamedTuple):
    rows: list[Document]
    head: Head
    window: int | None
    """The number of the last full window, if it was the same before and after the rows were read."""
    at: float
    """By the monotonic clock."""
    moment: float
    """By the wall clock."""


class Meter:
    """Rates of rows from one answer to the next."""

    def __init__(self) -> None:
        self._rates: dict[tuple[Any, ...], Rates] = {}
        self._before: dict[tuple[Any, ...], tuple[float, float, float]] = {}
        self._answer: Answer | None = None

    def take(self, answer: Answer) -> None:
        old, rates = self._answer, {}
        for row in answer.rows:
            rates[_key(row)] = self._rate(row, old, answer)
        self._rates = rates
        self._before = {_key(row): _figures(row) for row in answer.rows}
        self._answer = answer

    def of(self, row: Document) -> Rates:
        return self._rates.get(_key(row)) or mean_rates(row)

    def _rate(self, row: Document, old: Answer | None, new: Answer) -> Rates:
        if old is None or new.at <= old.at:
            return mean_rates(row)
        had = self._rates.get(_key(row))
        if new.window is None or new.window != old.window:
            return had if had is not None and had.measured else mean_rates(row)
        before = self._before.get(_key(row))
        if before is None:
            if fields.number(row, "first_seen") <= old.moment:
                return mean_rates(row)
            before = (0.0, 0.0, 0.0)
        packets, size, syns = ((now - then) / (new.at - old.at) for now, then in zip(_figures(row), before, strict=True))
        return mean_rates(row) if min(packets, size, syns) < 0 else Rates(packets, size, syns)


def _key(row: Document) -> tuple[Any, ...]:
    return tuple(
        map(row.get, ("source", "source_port", "destination", "port", "protocol", "icmp_type", "interface")),
    )


def _figures(row: Document) -> tuple[float, float, float]:
    return fields.number(row, "packets"), fields.number(row, "bytes"), fields.number(row, "syns")


class Asker:
    """Asks the daemon in a thread. `ask` may be called again when `answer` has returned something."""

    def __init__(self, connect: Callable[[], Daemon], subject: Subject, answered: Callable[[], None]) -> None:
        self._connect = connect
        self._subject = subject
        self._answered = answered
        self._daemon: Daemon | None = None
        self._head: Head | None = None
        self._questions: queue.SimpleQueue[Mapping[str, object]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer | XdpmondError | BaseException] = queue.SimpleQueue()
        self._started = False

    def ask(self, options: Mapping[str, object]) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=self._work, daemon=True).start()
        self._questions.put(options)

    def answer(self) -> Answer | BaseException | None:
        """What has come, if anything has."""
        try:
            return self._answers.get_nowait()
        except queue.Empty:
            return None

    def now(self, options: Mapping[str, object]) -> Answer:
        """Ask in this thread."""
        if self._daemon is None:
            self._daemon = self._connect()
        daemon = self._daemon
        try:
            if self._head is None or time.monotonic() - self._head.asked > STATUS_SECONDS:
                status = daemon.describe()
                self._head = Head(status, told(daemon.windows, limit=WINDOWS), time.monotonic())
            before = _last_window(daemon)
            rows = [row for row in fields.parse_lines(self._subject.ask(daemon, options)) if "source" in row]
            at, moment = time.monotonic(), time.time()
            after = _last_window(daemon)
        except NotRunningError:
            self._daemon = self._head = None  # the bus may have ended with it, and what comes back may be another daemon
            raise
        if self._subject.name != "top":
            before = after = 0  # a flow's figures do not fall when a window ends
        return Answer(rows, self._head, before if before == after else None, at, moment)

    def _work(self) -> None:
        while True:
            options = self._questions.get()
            try:
                self._answers.put(self.now(options))
            except Exception as error:
                self._answers.put(error)
            self._answered()


def _last_window(daemon: Daemon) -> int:
    return max((fields.count(row, "number") for row in told(daemon.windows, limit=1)), default=0)


class Live:
    """What is on the screen. It knows nothing of time and terminals, but is told."""

    def __init__(self, context: Context, subject: Subject, answer: Answer, resolver: Resolver) -> None:
        given = context.arguments
        self._context = context
        self._subject = subject
        self._resolver = resolver
        self._answer = answer
        self._meter = Meter()
        self._meter.take(answer)
        self.by = str(subject.options["by"])
        self._wanted: float = given.watch or INTERVAL_SECONDS
        self.seconds = self._wanted
        """From one question to the next."""
        self.limit: int | None = given.limit
        self.local: object = subject.options.get("local")
        self.names = bool(getattr(given, "resolve", False))
        # Of a window that is over nothing moves any more.
        self.totals = bool(subject.options.get("interval"))
        self.reverse = False
        self.paused = False
        self.problem: XdpmondError | None = None

    def take(self, answer: Answer) -> None:
        if self.problem is not None:
            self._meter, self.problem = Meter(), None  # another daemon may have begun to count anew
        self._meter.take(answer)
        self._answer = answer

    def pace(self, seconds: float) -> None:
        """The daemon needed so long for an answer. With a million sources that is most of a second of work: it is asked less often then."""
        self.seconds = max(self._wanted, min(seconds / MOST_BUSY, SLOWEST_SECONDS))

    @property
    def options(self) -> dict[str, object]:
        """Of the next question."""
        options = {**self._subject.options, "by": self.by, "limit": min(MOST_ROWS, max(ASKED_ROWS, 2 * (self.limit or 0)))}
        if self.local is not None:
            options["local"] = self.local
        return options

    def key(self, key: str, rows: int) -> bool:
        """Do what a key says; return whether the daemon has to be asked anew. `rows` are those on the screen."""
        by = next((name for name in self._subject.keys if name[0] == key), None)
        if by is not None:
            self.by = by
            return not self.paused
        if key == "t":
            self.totals = not self.totals
        elif key == "r":
            self.reverse = not self.reverse
        elif key == "n" and self._subject.name == "top":
            self.names = not self.names
        elif key == " ":
            self.paused = not self.paused
            return not self.paused
        elif key == "+":
            self.limit = min(MOST_ROWS, (self.limit or rows) + 5)
            return not self.paused and self.limit > len(self._answer.rows)
        elif key == "-":
            self.limit = max(1, min(self.limit or rows, rows) - 5)
        elif key == "l" and self._subject.name == "top":
            self.local = self.local is False
            return not self.paused
        return False

    def lines(self, width: int, height: int) -> tuple[list[str], int]:
        """The screen, and how many rows it shows."""
        style, legend = self._context.style, self._context.legend
        head = [clip(line, width) for line in self._head(width)] if height > 8 else []
        foot = [style(self._help(width), "dim")] if legend and height > 4 else []
        rows = self._ordered()
        shown = rows[: self.limit or height]
        if self.names:
            self._resolver.ask(fields.text(row, "source") for row in shown[:height])
        look = Look(True, self._subject.own, self._answer.moment, self._resolver.name, self._rates, live=True)
        columns, cells = table_of(self._subject.shown, shown, self.by, names=self.names, live=not self.totals)
        made = [cells(row, look) for row in shown]
        lead = self._subject.addresses
        steady = [" " * STEADY if column.title.startswith("BYTES") else "" for column in columns]
        of = layout.shape(columns, [*made, steady], width, lead, legend=legend)
        body: list[str] = []
        room, groups = height - len(head) - len(foot), -1 if legend else 0
        for group in layout.lines(style, columns, made, of, lead, width=width, legend=legend):
            if len(body) + len(group) > room:
                body = body or [clip(line, width) for line in group[:room]]
                break
            body += [clip(line, width) for line in group]
            groups += 1
        if not rows and len(body) < room:
            body.append(self._subject.nothing)
        body += [""] * (room - len(body))
        return [*head, *body, *foot], max(0, groups)

    def _rates(self, row: Document) -> Rates:
        return mean_rates(row) if self._subject.options.get("interval") else self._meter.of(row)

    def _ordered(self) -> list[Document]:
        field = "syns" if self.by == "syn" else self.by
        if self.totals:
            return sorted(self._answer.rows, key=lambda row: fields.number(row, field), reverse=not self.reverse)

        def moves(row: Document) -> tuple[float, float]:
            return getattr(self._rates(row), field), fields.number(row, field)

        return sorted(self._answer.rows, key=moves, reverse=not self.reverse)

    def _head(self, width: int) -> list[str]:
        style, answer = self._context.style, self._answer
        screen = Screen(answer.head.status, style, own=self._subject.own, width=width, now=answer.moment, unicode=self._context.unicode)
        if self.problem is None:
            first, second = screen.verdict()[0], screen.traffic()[0]
        else:
            waiting = ", waiting for it" if isinstance(self.problem, NotRunningError) else ""
            first, second = style(safe(self.problem.message) + waiting, "bold", "red"), safe(self.problem.hint.partition("\n")[0])
        order = ("syns" if self.by == "syn" else self.by) + ("" if self.totals else "/s")
        local = {True: ", local ones too", False: ", no local ones"}.get(self.local, "") if isinstance(self.local, bool) else ""
        clock = time.strftime("%H:%M:%S", time.localtime(answer.moment))
        when = f"{clock}, every {self.seconds:.2g}s" if self.seconds < 10 else f"{clock}, every {span(self.seconds)}"
        if self.paused:
            when = style("PAUSED", "bold", "yellow") + f" at {clock}"
        if self.problem is not None:
            when = style(f"as it was at {clock}", "red")
        what = style("talkers" if self._subject.name == "top" else "flows", "bold")
        third = f"{what}  {when}; by {order}{', the least first' if self.reverse else ''}{local}"
        return [first, second, *screen.history(answer.head.windows)[:1], third]

    def _help(self, width: int) -> str:
        """As many keys as there is room for."""
        keys = [*HELP, *(("n names", "l local") if self._subject.name == "top" else ())]
        text = "  ".join(keys).format("/".join(name[0] for name in self._subject.keys))
        while len(text) > width and "  " in text:
            text = text.rpartition("  ")[0]
        return text


def watch(context: Context, subject: Subject) -> int:
    """Show the live screen until somebody ends it. The first answer comes before it, so that what is refused is told as ever."""
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    terminal = Terminal(context.out, keys)
    asker = Asker(context.connect, subject, terminal.wake)
    resolver = Resolver(arrived=terminal.wake)
    live = Live(context, subject, asker.now({**subject.options, "limit": ASKED_ROWS}), resolver)
    with terminal:
        ended = _run(terminal, live, asker)
    if ended in (0, signal.SIGINT):
        return 0
    signal.signal(ended, signal.SIG_DFL)
    os.kill(os.getpid(), ended)
    return 128 + ended


def _run(terminal: Terminal, live: Live, asker: Asker) -> int:
    """Return the signal that ended it, or 0."""
    asked = time.monotonic()
    due, busy, anew = asked + live.seconds, False, False
    drawn: tuple[os.terminal_size, list[str]] | None = None
    while True:
        size = terminal.size
        lines, rows = live.lines(size.columns, size.lines)
        if drawn != (size, lines):
            terminal.draw(lines)
            drawn = size, lines
        if not busy and (anew or (not live.paused and time.monotonic() >= due)):
            asked, busy, anew = time.monotonic(), True, False
            asker.ask(live.options)
        idle = live.paused or busy
        happened = terminal.wait(None if idle else max(0.0, due - time.monotonic()))
        if happened.ended:
            return happened.ended
        if happened.stop:
            terminal.suspend()
            drawn = None
            continue
        for key in happened.keys:
            if key in "qQ":
                return 0
            if key == "\f":  # Ctrl-L: somebody else has written on the screen
                drawn = None
            anew = live.key(key, rows) or anew
        answer = asker.answer() if busy else None
        if answer is not None:
            busy = False
            live.pace(time.monotonic() - asked)
            due = asked + live.seconds
            if isinstance(answer, Answer):
                if not live.paused:
                    live.take(answer)
            elif isinstance(answer, XdpmondError):
                live.problem = answer
            else:
                raise answer


def clip(line: str, width: int) -> str:
    """As much of a line as fits, its colours not counted."""
    if len(line) <= width:
        return line
    parts, left, at = [], width, 0
    for paint in PAINT.finditer(line):
        parts += [line[at : paint.start()][:left], paint[0]]
        left -= len(parts[-2])
        at = paint.end()
    return "".join(parts) + line[at:][:left]
