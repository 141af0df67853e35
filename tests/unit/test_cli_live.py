"""The live screen on a real pseudo-terminal: what it shows, what keys do, and that the terminal is left as it was however it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Console, Screen
from test_cli_commands import NOW, FakeDaemon, cells, ctl, described, talker, window

from xdpmond.cli import live
from xdpmond.cli.render import ASCII_BARS, BARS, bars
from xdpmond.cli.resolve import LONGEST, Resolver, shortened

HERE = Path(__file__).resolve().parent
PROGRAM = """
import json, sys, time
from pathlib import Path
sys.path[:0] = {paths}
from test_cli_commands import FakeDaemon
from xdpmond.cli import main, resolve
from xdpmond.errors import NotRunningError, UsageError

script = Path(sys.argv.pop(1))
class Scripted(FakeDaemon):
    '''Answers by a file, which the test writes.'''
    def _reply(self, *call):
        state = json.loads(script.read_text())
        with open(script.with_suffix(".asked"), "a") as log:
            log.write(json.dumps(call) + "\\n")
        if state.get("gone"):
            raise NotRunningError("the daemon is not running", hint="start it with: systemctl start xdpmond")
        if state.get("refused"):
            raise UsageError("no such protocol")
        if state.get("broken"):
            raise ZeroDivisionError("a fault of ours")
        while json.loads(script.read_text()).get("hangs"):
            time.sleep(0.01)
        self.rows, self.windows_rows = state["rows"], state.get("windows", [])
        return {{}}
    def top(self, options):
        self._reply("top", dict(options))
        yield from (json.dumps(row).encode() for row in self.rows)
    flows = top
resolve.look_up.__code__ = (lambda address: f"host-{{address.replace('.', '-')}}.example\\x1b[2J").__code__
sys.exit(main.run(sys.argv[1:], sys.stdout, sys.stderr, environ=__import__("os").environ, connect=lambda *_: Scripted()))
"""


class Watch:
    """xdpmonctl with a live screen, and the daemon that it asks."""

    def __init__(self, directory: Path, *words: str, **options: Any) -> None:
        self._script = directory / "state.json"
        self.rows = [talker(source=f"203.0.113.{index}", packets=100 * index, bytes=1000 * (9 - index), syns=0) for index in range(1, 9)]
        self.say()
        program = PROGRAM.format(paths=[str(HERE), str(HERE.parents[1])])
        environ = {"PATH": os.environ["PATH"], "TERM": "xterm", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        self.console = Console([sys.executable, "-c", program, str(self._script), *words], environ, **options)

    def say(self, **state: Any) -> None:
        draft = self._script.with_suffix(".draft")
        draft.write_text(json.dumps({"rows": self.rows, "windows": [window(3)], **state}))
        draft.rename(self._script)

    @property
    def calls(self) -> int:
        return self._script.with_suffix(".asked").read_text().count("\n")

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The options of each call of Top or Flows."""
        calls = map(json.loads, self._script.with_suffix(".asked").read_text().splitlines())
        return [call[1] for call in calls if call[0] == "top"]

    @property
    def screen(self) -> Screen:
        return self.console.screen

    def sources(self) -> list[str]:
        return [cells(line)[0] for line in self.screen.lines if line.startswith("203.0.113.")]

    def until(self, *texts: str) -> None:
        self.console.until(lambda screen: all(text in screen.text for text in texts))

    def until_first(self, source: str) -> None:
        self.console.until(lambda _: self.sources()[:1] == [source])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Watch]]:
    started: list[Watch] = []

    def make(*words: str, **options: Any) -> Watch:
        started.append(Watch(tmp_path, *words, **options))
        return started[-1]

    yield make
    for one in started:
        one.console.close()


def restored(watch: Watch) -> bool:
    screen = watch.screen
    return not screen.alternate and screen.cursor and screen.wrap and watch.console.attributes == watch.console.before


def test_a_screen(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "0.2")
    watch.until("q quit")
    assert watch.screen.alternate and not watch.screen.cursor and watch.console.attributes != watch.console.before
    lines = watch.screen.lines
    assert len(lines) == 24
    assert lines[0] == "MONITOR  nothing is dropped"
    assert lines[1].startswith("traffic   5 packets/s")
    assert lines[2].startswith("windows   █  most 5 packets/s in 1 window of 1m")
    assert lines[3].startswith("talkers  ") and "; by bytes/s" in lines[3]
    assert cells(lines[4])[:2] == ["SOURCE", "TO"] and {"BYTES/S", "VERDICT", "RULE", "FIRST"} <= set(cells(lines[4]))
    assert len(watch.sources()) == 8
    assert lines[-1].startswith("q quit")
    watch.console.type("q")
    assert watch.console.ended() == 0
    assert restored(watch)
    assert watch.screen.text.strip() == "", "nothing of it is left on the ordinary screen"


def test_a_line_that_fills_the_screen_keeps_its_end(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "60")
    watch.say(windows=[window(number) for number in range(1, 10)] * 8)
    watch.until("q quit")
    assert len(watch.screen.lines[2]) == 80
    assert watch.screen.lines[2].endswith("in 72 windows of 1m")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda watch: watch.console.type("\x03"), 0), (lambda watch: watch.console.process.send_signal(signal.SIGTERM), -signal.SIGTERM),
        (lambda watch: watch.console.process.send_signal(signal.SIGHUP), -signal.SIGHUP), (lambda watch: watch.say(broken=True), 1),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "a fault"],
)  # fmt: skip
@pytest.mark.parametrize("hangs", [False, True])
def test_however_it_ends_the_terminal_is_as_it_was(
    start: Callable[..., Watch], end: Callable[[Watch], None], status: int, hangs: bool
) -> None:
    watch = start("top", "--watch", "0.2")
    watch.until("q quit")
    if hangs and status != 1:
        watch.say(hangs=True)
        calls = watch.calls
        watch.console.until(lambda _: watch.calls > calls)
    end(watch)
    assert watch.console.ended() == status
    assert restored(watch)
    assert ("ZeroDivisionError: a fault of ours" in watch.screen.text) == (status == 1)


def test_what_is_refused_is_told_without_a_screen(start: Callable[..., Watch], tmp_path: Path) -> None:
    for state, status, text in (({"refused": True}, 2, "no such protocol"), ({"gone": True}, 3, "the daemon is not running")):
        watch = start("top", "--watch")
        watch.say(**state)
        assert watch.console.ended() == status
        assert watch.screen.lines[0] == f"xdpmonctl: {text}"
        assert watch.screen.frames == 0
        assert restored(watch)


def test_a_daemon_that_goes_away_and_comes_back(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "0.2")
    watch.until("q quit")
    watch.say(gone=True)
    watch.until("the daemon is not running, waiting for it", "systemctl start xdpmond", "as it was at ")
    assert len(watch.sources()) == 8, "what was known last"
    watch.rows = watch.rows[:2]
    watch.say()
    watch.until("MONITOR  nothing is dropped")
    assert len(watch.sources()) == 2
    watch.say(gone=True)
    watch.until("waiting for it")
    watch.console.type("q")
    assert watch.console.ended() == 0
    assert restored(watch)


def test_keys(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "0.2", "--limit", "6")
    watch.until_first("203.0.113.1")
    assert len(watch.sources()) == 6
    watch.console.type("p")
    watch.until("by packets/s")
    watch.until_first("203.0.113.8")
    watch.console.until(lambda _: watch.asked[-1]["by"] == "packets")
    watch.console.type("t")
    watch.until("by packets", "203.0.113.8")
    watch.console.type("r")
    watch.until("the least first")
    watch.until_first("203.0.113.1")
    watch.console.type("-")
    watch.console.until(lambda _: len(watch.sources()) == 1)
    watch.console.type("++")
    watch.console.until(lambda _: len(watch.sources()) == 8)
    watch.console.type("l")
    watch.until("no local ones")
    watch.console.until(lambda _: watch.asked[-1].get("local") is False)
    watch.console.type("\x1b[A\x1b[B")  # arrows say nothing
    watch.console.type("n")
    watch.until("NAME", "host-203-0-113-1.example\\x1b[2J")
    watch.console.type("Q")
    assert watch.console.ended() == 0


def test_pausing_asks_nothing_and_changes_nothing(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "0.2")
    watch.until("q quit")
    watch.console.type(" ")
    watch.until("PAUSED")
    watch.say(rows=[])
    watch.console.type("r")
    watch.until("the least first")
    frames = watch.screen.frames
    asked = len(watch.asked)
    watch.console.type("r")
    watch.console.until(lambda screen: screen.frames > frames and "least" not in screen.text)
    assert len(watch.asked) == asked
    assert len(watch.sources()) == 8
    watch.console.type(" ")
    watch.until("nobody has sent anything lately")
    assert "PAUSED" not in watch.screen.text


def test_a_daemon_that_needs_long_is_asked_less_often(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "0.2")
    watch.until("every 0.")
    watch.say(hangs=True)
    calls = watch.calls
    watch.console.until(lambda _: watch.calls > calls)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        watch.console.read(0.05)
    watch.say()
    watch.console.until(lambda screen: any(line.partition("every ")[2][:1] in "456789" for line in screen.lines if "every " in line))
    watch.console.type("q")
    assert watch.console.ended() == 0


@pytest.mark.parametrize("size", [(120, 40), (60, 10), (40, 6), (20, 3), (1, 1)])
def test_a_new_size(start: Callable[..., Watch], size: tuple[int, int]) -> None:
    watch = start("top", "--watch", "60")
    watch.until("q quit")
    columns, lines = size
    watch.console.resize(columns, lines)
    frames = watch.screen.frames
    watch.console.until(lambda screen: screen.frames > frames and (lines < 5 or screen.lines[-1].startswith("q quit")))
    assert len(watch.screen.lines) == lines
    if lines >= 6:
        assert len(watch.sources()) >= 1
    watch.console.type("q")
    assert watch.console.ended() == 0


def test_without_keys_it_is_watched_all_the_same(start: Callable[..., Watch]) -> None:
    watch = start("top", "--watch", "0.2", keys=False)
    watch.until("q quit")
    watch.rows = watch.rows[:3]
    watch.say()
    watch.console.until(lambda _: len(watch.sources()) == 3)
    watch.console.process.send_signal(signal.SIGINT)
    assert watch.console.ended() == 0
    assert restored(watch)


def test_flows_have_a_screen_too(start: Callable[..., Watch]) -> None:
    watch = start("flows", "--watch", "0.2")
    watch.until("flows  ", "PROTOCOL", "b/p sort")
    assert "names" not in watch.screen.text
    watch.console.type("snlq")
    assert watch.console.ended() == 0


# Where there is no such terminal


def test_a_pipe_gets_one_plain_table() -> None:
    fake = FakeDaemon()
    fake.rows = [talker()]
    done = ctl(fake, "top", "--watch")
    assert (done.status, len(done.out.splitlines())) == (0, 2)
    assert ctl(fake, "top", "--watch", terminal=True, environ={"TERM": "dumb"}).out.count("SOURCE") == 1


def test_a_pipe_gets_a_table_in_each_interval() -> None:
    class Thrice(FakeDaemon):
        def top(self, options: Any) -> Iterator[bytes]:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().top(options)

    fake = Thrice()
    fake.rows = [talker()]
    done = ctl(fake, "top", "--watch", "0.2")
    assert (done.status, done.err, done.out.count("\nSOURCE"), done.out.count("203.0.113.9")) == (0, "", 3, 3)
    fake.calls.clear()
    done = ctl(fake, "top", "--watch", "0.2", "-j")
    decoder, text, found = json.JSONDecoder(), done.out, []
    while text.strip():
        document, at = decoder.raw_decode(text.lstrip())
        found.append(document)
        text = text.lstrip()[at:]
    assert found == [fake.rows] * 3


# Rates


def answer(at: float, rows: list[dict[str, Any]], number: int | None = 1) -> live.Answer:
    return live.Answer(rows, live.Head(described(), [], 0.0), number, at, NOW + at)


def test_rates_are_those_between_two_answers() -> None:
    meter = live.Meter()
    meter.take(answer(0, [talker(packets=100, bytes=1000, syns=5)]))
    assert meter.of(talker()) == live.Rates(20.0, 1200.5, 1.0, measured=False), "the mean, as the daemon says"
    meter.take(answer(2, [talker(packets=150, bytes=2000, syns=9)]))
    assert meter.of(talker()) == live.Rates(25.0, 500.0, 2.0)


def test_when_a_window_ends_the_rates_before_it_stand_once() -> None:
    meter = live.Meter()
    meter.take(answer(0, [talker(packets=100, bytes=1000, syns=0)]))
    meter.take(answer(2, [talker(packets=150, bytes=2000, syns=4)]))
    meter.take(answer(4, [talker(packets=60, bytes=700, syns=1)], 2))
    assert meter.of(talker()) == live.Rates(25.0, 500.0, 2.0)
    meter.take(answer(6, [talker(packets=62, bytes=720, syns=1)], 2))
    assert meter.of(talker()) == live.Rates(1.0, 10.0, 0.0)
    meter.take(answer(8, [talker(packets=70, bytes=800, syns=1)], None))  # it ended while the rows were read
    assert meter.of(talker()) == live.Rates(1.0, 10.0, 0.0)


def test_a_row_that_was_not_there_before() -> None:
    meter = live.Meter()
    meter.take(answer(0, []))
    new, old = talker(first_seen=NOW + 1, packets=10, bytes=100, syns=2), talker(source="192.0.2.1", first_seen=NOW - 1)
    meter.take(answer(2, [new, old]))
    assert meter.of(new) == live.Rates(5.0, 50.0, 1.0), "all that it sent came since"
    assert not meter.of(old).measured
    less = talker(source="192.0.2.1", first_seen=NOW - 1, packets=1, bytes=1)
    meter.take(answer(4, [less]))
    assert not meter.of(less).measured, "a table that was counted anew has no rates below nothing"


def test_bars() -> None:
    assert bars([0, 1, 50, 100]) == " ▁▅█"
    assert bars([0, 1, 100], unicode=False) == f" {ASCII_BARS[0]}{ASCII_BARS[-1]}"
    assert (bars([]), bars([0, 0]), len(BARS), len(ASCII_BARS)) == ("", "  ", 8, 8)


# Names


def test_names_come_when_they_are_known() -> None:
    released, arrived = threading.Event(), threading.Event()

    def slow(address: str) -> str:
        released.wait(30)
        return "" if address == "192.0.2.2" else f"name of {address}\x1b[2J"

    resolver = Resolver(slow, arrived.set)
    began = time.monotonic()
    resolver.ask(["192.0.2.1", "192.0.2.2", "192.0.2.0/24"])
    resolver.wait(["192.0.2.1"], 0.05)
    assert resolver.name("192.0.2.1") == ""
    assert time.monotonic() - began < 10
    released.set()
    resolver.wait(["192.0.2.1", "192.0.2.2", "192.0.2.0/24"], 30)
    assert arrived.is_set()
    assert resolver.name("192.0.2.1") == "name\\x20of\\x20192.0.2.1\\x1b[2J"
    assert resolver.name("192.0.2.2") == resolver.name("192.0.2.0/24") == ""


def test_lookups_are_few_and_each_is_made_once() -> None:
    lock, released = threading.Lock(), threading.Event()
    asked: list[str] = []

    def count(address: str) -> str:
        with lock:
            asked.append(address)
        released.wait(30)
        return "x"

    resolver = Resolver(count)
    addresses = [f"10.0.{index >> 8}.{index & 255}" for index in range(2000)]
    before = threading.active_count()
    resolver.ask(addresses)
    resolver.ask(addresses)
    assert threading.active_count() - before <= 8
    released.set()
    resolver.wait(addresses[:500], 30)
    assert len(asked) == len(set(asked)) <= 8 + 512


def test_a_long_name_keeps_its_end() -> None:
    assert shortened("a" * 250 + ".example") == "…" + "a" * (LONGEST - 9) + ".example"


def test_top_with_names() -> None:
    fake = FakeDaemon()
    fake.rows = [talker(source="203.0.113.0/24")]
    assert cells(ctl(fake, "top", "--resolve").out.splitlines()[1])[:3] == ["203.0.113.0/24", "-", "tcp/22"]


def test_two_signals_end_it_where_nobody_reads_what_it_writes(start: Callable[..., Watch]) -> None:
    """The first waits for the screen to be written; a person who asks twice does not want to."""
    watch = start("top", "--watch", "0.2")
    watch.until("q quit")
    system_call = Path(f"/proc/{watch.console.process.pid}/syscall")
    numbers = {"1", "64"}  # of write, on x86 and on others
    seen = 0
    while seen < 20:  # it is in the same call for longer than the screen's interval
        seen = seen + 1 if system_call.read_text().split()[0] in numbers else 0
        time.sleep(0.02)
    end = time.monotonic() + 30
    while watch.console.process.poll() is None and time.monotonic() < end:
        watch.console.process.send_signal(signal.SIGTERM)  # one that came too soon after another would be the same to it
        time.sleep(0.02)
    assert watch.console.process.wait(30) == 128 + signal.SIGTERM
    assert watch.console.attributes == watch.console.before
