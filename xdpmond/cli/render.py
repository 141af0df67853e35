"""How things look: colours, numbers for people, tables.

Names, reasons and messages come from outside, and a terminal obeys escape sequences in them: all such text passes `safe`. Tables are
plain aligned columns; on a terminal rich draws them, if it is installed and the table is not so long that drawing would take minutes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

DRAWN_ROWS = 500
"""Longer tables are written plainly, also on a terminal: rich needs all rows at once, and about a millisecond for each."""

LEAST_WIDTH = 12
"""What the last column needs at least when rich folds its text."""

SAMPLE_ROWS = 2000
"""So many rows decide the widths of the columns of a plain table; the rest is streamed."""

Cell = str | tuple[str, str]
"""Text, or text and the name of its colour."""

VERDICT_COLOURS = {"allow": "green", "log": "yellow", "deny": "red"}
ACTION_COLOURS = {"PASS": "green", "LOG": "yellow", "DROP": "red"}


def safe(text: str) -> str:
    """The text with everything made visible that a terminal would obey, or that would make it look like other text.

    That is: control characters of both sets, line and paragraph separators, bidirectional overrides and other invisible formatting
    characters, surrogates and unassigned characters.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == " " else _visible(c) for c in text)


def _visible(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Style:
    """Paints text, or leaves it alone."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, text: str, *names: str) -> str:
        if not self.enabled:
            return text
        codes = ";".join(COLOURS[name] for name in names if name)
        return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text


def short(number: float) -> str:
    """A number in at most five places: 950, 1.23 k, 12.3 k, 123 k, 1.23 M."""
    if number < 0:
        return "-" + short(-number)
    if number < 999.5:
        return f"{number:.0f}" if number == int(number) or number >= 99.95 else f"{number:.1f}"
    for unit in "kMGTPE":
        number /= 1000
        if number < 999.5 or unit == "E":
            break
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f} {unit}"


def short_bytes(number: float) -> str:
    """The same with the unit: 950 B, 1.23 kB."""
    text = short(number)
    return text + "B" if " " in text else text + " B"


def span(seconds: float) -> str:
    """A length of time for people, in its two largest units: 45s, 4m 10s, 3h 12m, 5d 2h."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or parts:
            parts.append(f"{amount}{unit}" if amount else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part) or "0s"


def ago(seconds: float) -> str:
    """How long something is past, in its largest unit."""
    return f"{span(seconds).partition(' ')[0]} ago"


def iso(moment: float) -> str:
    """A point in time as one word, by ISO 8601, in local time."""
    text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(moment))
    return f"{text[:-2]}:{text[-2:]}"


def percent(part: float, whole: float) -> str:
    """A share that never lies at its ends: 100 % means all, 0 % means none."""
    if whole <= 0 or part <= 0:
        return "0 %"
    if part >= whole:
        return "100 %"
    share = 100 * part / whole
    return "< 1 %" if share < 0.5 else "> 99 %" if share >= 99.5 else f"{round(share)} %"


BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def bars(values: Sequence[float], *, unicode: bool = True) -> str:
    """A bar for each value, from nothing to the largest. Where there is nothing, there is no bar."""
    shapes, most = BARS if unicode else ASCII_BARS, max(values, default=0)
    return "".join(" " if value <= 0 else shapes[min(len(shapes) - 1, int(value / most * len(shapes)))] for value in values)


def plural(number: int, one: str, many: str = "") -> str:
    """`1 entry`, `12,345 entries`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class Column(NamedTuple):
    title: str
    right: bool
    """It holds numbers."""
    rank: int = 0
    """Where a table is made to fit: 0 is always shown, and of the others those of high rank are left out first."""


def columns(*titles: str) -> list[Column]:
    """Columns by their titles; `>` before one puts its cells to the right."""
    return [Column(title.lstrip(">"), title.startswith(">")) for title in titles]


def write_table(
    out: TextIO, style: Style, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], *, legend: bool = True, terminal: bool = False,
    width: int = 80,
) -> int:  # fmt: skip
    """Write a table; return the number of its rows. The cells must be safe to print."""
    stream = iter(rows)
    if terminal:
        head = list(itertools.islice(stream, DRAWN_ROWS + 1))
        if len(head) <= DRAWN_ROWS and _draw(out, style, columns, head, legend, width):
            return len(head)
        stream = itertools.chain(head, stream)
    return _write_plain(out, style, columns, stream, legend)


def fitting(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> list[int]:
    """The columns that are shown: those of the highest ranks are left out until there is room for some of the last one, of free text."""
    shown = list(range(len(columns)))
    for least in sorted({column.rank for column in columns if column.rank}, reverse=True):
        if _has_room([columns[at] for at in shown], [[row[at] for at in shown] for row in rows], width):
            break
        shown = [at for at in shown if columns[at].rank < least]
    return shown


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[int]:
    return [max([len(column.title), *(len(cell_text(row[index])) for row in rows)]) for index, column in enumerate(columns)]


def _has_room(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> bool:
    widths = _widths(columns, rows)
    return sum(widths[:-1]) + 2 * len(widths) + min(widths[-1], LEAST_WIDTH) <= width


def cell_text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _write_plain(out: TextIO, style: Style, columns: Sequence[Column], rows: Iterator[Sequence[Cell]], legend: bool) -> int:
    sample = list(itertools.islice(rows, SAMPLE_ROWS))
    widths = [len(column.title) if legend else 0 for column in columns]
    for row in sample:
        widths = [max(width, len(cell_text(cell))) for width, cell in zip(widths, row, strict=True)]
    if legend:
        out.write(format_row(style, columns, widths, [(column.title, "bold") for column in columns]) + "\n")
    total, everything = 0, itertools.chain(sample, rows)
    if style.enabled:
        for row in everything:
            out.write(format_row(style, columns, widths, row) + "\n")
            total += 1
        return total
    # The same lines by one format for all: there may be a million.
    places = [f"{{:{'>' if column.right else '<'}{width}}}" for column, width in zip(columns, widths, strict=True)]
    line = "  ".join(places if columns[-1].right else [*places[:-1], "{}"]) + "\n"
    for row in everything:
        out.write(line.format(*[(cell if isinstance(cell, str) else cell[0]) or "-" for cell in row]))
        total += 1
    return total


def format_row(style: Style, columns: Sequence[Column], widths: Sequence[int], row: Sequence[Cell]) -> str:
    """One aligned line, two spaces between the columns and none at its end. An empty cell shows as "-", so that columns can be cut."""
    parts = []
    last = len(columns) - 1
    for index, (column, width, cell) in enumerate(zip(columns, widths, row, strict=True)):
        text, colour = (cell, "") if isinstance(cell, str) else cell
        text = text or "-"
        painted = style(text, colour)
        gap = " " * (width - len(text))
        parts.append(gap + painted if column.right else painted if index == last else painted + gap)
    return "  ".join(parts)


def _draw(out: TextIO, style: Style, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], legend: bool, width: int) -> bool:
    """Let rich draw the table; False when rich is not there, or the terminal too narrow."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    if not _has_room(columns, rows, width):
        return False  # rich would cut columns off; plainly written lines are wrapped by the terminal
    widths = _widths(columns, rows)
    table = Table(box=SIMPLE_HEAD if legend else None, show_header=legend, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        # Only the last column, the one of free text, gives way: half an address is no address.
        table.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=index < len(columns) - 1, overflow="fold",
            min_width=None if index == len(columns) - 1 else widths[index],
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(cell_text(cell) or "-", style="" if isinstance(cell, str) else cell[1]) for cell in row))
    Console(file=out, width=width, force_terminal=style.enabled, no_color=not style.enabled, highlight=False).print(table)
    return True
