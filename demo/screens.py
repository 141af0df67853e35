"""The pictures in docs/screens: what xdpmonctl really shows, of real traffic, in colour: `sudo ./dev screens`.

A host and the net before it stand in network namespaces, as in the demo. Sources of all kinds keep talking to the host for some windows;
then each command is run on a pseudo-terminal of 80 columns and 24 lines, and what it wrote there is drawn as SVG. Nothing is drawn that was
not written by the program; addresses are those that RFC 5737 and RFC 3849 set aside for documentation.
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import math
import os
import re
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab import Lab, Space, interruptible, laboratory, wait_for

DIRECTORY = Path(__file__).resolve().parents[1] / "docs" / "screens"
COLUMNS, LINES = 80, 24

CONFIG = """\
interface = "eth0"
mode      = "enforce"
window    = "2s"
allow     = ["10.0.0.0/8", "2001:db8:a::/48", "fe80::/10"]
deny      = ["203.0.113.0/24", { prefix = "2001:db8:bad::/48", reason = "sends spam" }]
"""
WINDOWS = 24
"""So many have to end before the pictures are taken."""

HOST4, HOST6 = "192.0.2.10", "2001:db8:5::10"
WEB4 = [f"198.51.100.{index}" for index in (4, 17, 23, 58, 71, 96, 133, 180, 211)]
WEB6 = ["2001:db8:c0de:12:a4f1:33ff:fe91:7c20", "2001:db8:c0de:9::1f", "2001:db8:f00d::2"]
OFFICE = ["10.20.0.5", "10.20.0.9", "2001:db8:a::5"]
NAMES = [f"198.51.100.{index}" for index in range(120, 132)]
DENIED = ["203.0.113.9", "203.0.113.66", "2001:db8:bad::9"]
GUESSER = "198.51.100.77"


# The traffic


class Traffic:
    """Everybody talks, more and less by turns, until it is told to end."""

    def __init__(self, net: Space, host: Space) -> None:
        self._net, self._host = net, host
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Traffic:
        for port in (443, 22):
            self._start(self._serve, port)
        for index, source in enumerate([*WEB4, *WEB6]):
            self._start(self._browse, source, index)
        for source in OFFICE:
            self._start(self._datagrams, source, 123, 60, 3.0)
        for source in NAMES:
            self._start(self._datagrams, source, 53, 48, 11.0)
        for index, source in enumerate(DENIED):
            self._start(self._datagrams, source, (53, 123, 53)[index], 900, 60.0 / (index + 1))
        self._start(self._guess)
        self._start(self._ping)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=run, args=arguments))
        self._threads[-1].start()

    def _swell(self) -> float:
        """From 0.25 to 1, slowly up and down."""
        return 0.625 + 0.375 * math.sin(time.monotonic() / 6)

    def _serve(self, port: int) -> None:
        """Accept and read, on both families."""
        with self._host.socket(socket.AF_INET6, socket.SOCK_STREAM) as listening:
            listening.bind(("::", port))
            listening.listen(64)
            taken = {listening}
            while not self._ending.is_set():
                for ready in select.select(list(taken), [], [], 0.1)[0]:
                    if ready is listening:
                        taken.add(listening.accept()[0])
                        continue
                    with contextlib.suppress(OSError):
                        if ready.recv(1 << 16):
                            continue
                    taken.remove(ready)
                    ready.close()
            for one in taken - {listening}:
                one.close()

    def _browse(self, source: str, index: int) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(OSError), self._net.connect(source, _host(source), 443, 2) as connection:
                for _ in range(20):
                    connection.sendall(bytes(1400 * (index % 5 + 1)))
                    if self._ending.wait(0.05 / self._swell()):
                        return

    def _datagrams(self, source: str, port: int, size: int, per_second: float) -> None:
        with self._net.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.bind((source, 0))
            while not self._ending.wait(1 / (per_second * self._swell())):
                with contextlib.suppress(OSError):  # nobody listens: the host says so
                    sending.sendto(bytes(size), (_host(source), port))

    def _guess(self) -> None:
        """Connection after connection to port 22."""
        while not self._ending.wait(0.06):
            with contextlib.suppress(OSError):
                self._net.connect(GUESSER, HOST4, 22, 1).close()

    def _ping(self) -> None:
        while not self._ending.wait(0.5):
            self._net.ping(HOST4, OFFICE[0], 2)
            self._net.ping(HOST6, WEB6[2], 1)


def _host(source: str) -> str:
    return HOST6 if ":" in source else HOST4


# What the terminal shows


@dataclass(frozen=True, slots=True)
class Run:
    """Text of one look."""

    text: str
    codes: frozenset[str]


def runs(line: str) -> Iterator[Run]:
    """A line with SGR sequences as runs of text."""
    codes: frozenset[str] = frozenset()
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if part.startswith("\x1b"):
            for code in part[2:-1].split(";"):
                codes = frozenset() if code in ("", "0") else codes | {code}
        elif part:
            yield Run(part, codes)


def shown(command: list[str], lab: Lab, *, frames: int = 0) -> list[str]:
    """The lines that a command writes on a terminal; of a live screen those of its last frame, when it has drawn so many."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environ = {**lab.environment, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    written, asked = b"", False
    while True:
        try:
            written += os.read(ours, 65536)
        except OSError:  # nobody holds the other side any more
            break
        if frames and not asked and written.count(b"\x1b[J") > frames:
            os.write(ours, b"q")
            asked = True
    os.close(ours)
    if process.wait():
        raise AssertionError(f"{' '.join(command)} ended with {process.returncode}:\n{written.decode()}")
    text = written.decode().replace("\r\n", "\n")
    if frames:
        text = re.sub(r"\x1b\[[JK]", "", text.split("\x1b[H")[2 * frames - 1])
    return text.rstrip("\n").split("\n")


# Drawn

CELL, LEADING, SIZE, MARGIN = 8.43, 18, 14, 14
BACKGROUND, FOREGROUND, BAR = "#1b1e24", "#d6d9e0", "#2b303a"
INKS = {"31": "#f0716c", "32": "#8fc76e", "33": "#e6bd5c", "36": "#5fc4cf"}


def drawn(title: str, lines: list[str], height: int) -> str:
    """A terminal with these lines as SVG."""
    width = round(COLUMNS * CELL + 2 * MARGIN)
    top = 34
    full = top + height * LEADING + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {full}" width="{width}" height="{full}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{width}" height="{full}" rx="8" fill="{BACKGROUND}"/>',
        f'<path d="M0 {top - 10}V8a8 8 0 0 1 8-8h{width - 16}a8 8 0 0 1 8 8v{top - 18}z" fill="{BAR}"/>',
        *(f'<circle cx="{16 + 16 * index}" cy="12" r="5" fill="#565d6b"/>' for index in range(3)),
        f'<g font-family="DejaVu Sans Mono,Menlo,Consolas,monospace" font-size="{SIZE}" fill="{FOREGROUND}" xml:space="preserve">',
    ]
    for row, line in enumerate(lines):
        column, baseline = 0, top + row * LEADING + SIZE
        for run in runs(line):
            if run.text.strip():
                ink = next((f' fill="{INKS[code]}"' for code in sorted(run.codes) if code in INKS), "")
                look = ' font-weight="bold"' * ("1" in run.codes) + ' opacity="0.6"' * ("2" in run.codes)
                place = f'x="{MARGIN + column * CELL:.1f}" y="{baseline}" textLength="{len(run.text) * CELL:.1f}"'
                parts.append(f"<text {place}{ink}{look}>{html.escape(run.text)}</text>")
            column += len(run.text)
    return "\n".join([*parts, "</g>", "</svg>", ""])


# All of it


def wired(lab: Lab) -> tuple[Space, Space]:
    """The host, and the net before it in which everybody has an address."""
    host, net = lab.space("host"), lab.space("net")
    for space in (host, net):
        space.sysctl(ipv6__conf__default__accept_dad=0, ipv6__conf__default__mldv2_unsolicited_report_interval=1)
    lab.veth(host, "eth0", net, "net0")
    host.ip(f"addr add {HOST4}/32 dev eth0", f"addr add {HOST6}/128 dev eth0", "route add default dev eth0", "route add ::/0 dev eth0")
    everybody = {*WEB4, *WEB6, *OFFICE, *NAMES, *DENIED, GUESSER}
    net.ip(*(f"addr add {source}/{128 if ':' in source else 32} dev net0" for source in sorted(everybody)))
    net.ip(f"route add {HOST4}/32 dev net0", f"route add {HOST6}/128 dev net0")
    return host, net


def take(lab: Lab) -> None:
    host, net = wired(lab)
    program = [sys.executable, "-m", "xdpmond.cli", "--bus", lab.bus.address]
    DIRECTORY.mkdir(exist_ok=True)
    with Traffic(net, host):
        daemon = lab.daemon(host, CONFIG)
        wait_for(lambda: len(lab.rows("events")) > 20 and _windows(lab) >= WINDOWS, "enough windows", 120)
        for name, words, frames in SCREENS:
            if name == "flows":
                daemon.stop()
                lab.daemon(host, CONFIG + "[flows]\nenable = true\n", name="flows.toml")
                wait_for(lambda: _windows(lab) > 2, "some windows", 60)
            lines = shown([*program, *words], lab, frames=frames)
            if not frames:
                lines = [f"\x1b[2m$\x1b[0m xdpmonctl {' '.join(words)}", *lines]
            if len(lines) > LINES:
                raise AssertionError(f"xdpmonctl {' '.join(words)} needs {len(lines)} lines")
            widest = max(sum(len(run.text) for run in runs(line)) for line in lines)
            if widest > COLUMNS:
                raise AssertionError(f"xdpmonctl {' '.join(words)} needs {widest} columns")
            (DIRECTORY / f"{name}.svg").write_text(drawn(f"xdpmonctl {' '.join(words)}", lines, len(lines)))
            print(f"docs/screens/{name}.svg  xdpmonctl {' '.join(words)}", flush=True)


SCREENS = (
    ("status", ["status"], 0),
    ("ports", ["ports"], 0),
    ("top", ["top", "--limit", "16"], 0),
    ("watch", ["top", "--watch", "1"], 6),
    ("events", ["events", "--limit", "14"], 0),
    ("explain", ["explain", GUESSER], 0),
    ("flows", ["flows", "--limit", "14"], 0),
)


def _windows(lab: Lab) -> int:
    """The number of the last full one."""
    number = (lab.status().get("window") or {}).get("number")
    return number if isinstance(number, int) else 0


def run(name: str, take: Callable[[Lab], None]) -> int:
    """Let `take` have a laboratory; return an exit status."""
    try:
        with interruptible(), laboratory() as lab:
            take(lab)
    except AssertionError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run("screens", take))
