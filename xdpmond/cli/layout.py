"""Tables that fit the terminal: which columns are shown in the width that there is.

Each column has a rank. Those of rank 0 always stand; the others are taken in the order of their ranks while there is room. The first
columns of a table hold addresses, and half an address is none: where a long one would push out what matters, it gets a line of its own,
and its figures stand below it, in their columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

from .render import SAMPLE_ROWS, Cell, Column, Style, cell_text, format_row, write_table

GAP = 2
SHORT_ADDRESS = 21
"""Holds any IPv4 address, with a port or without. Longer ones get a line of their own where room is scarce."""
MATTERS = 2
"""Columns up to this rank are worth that line."""
INDENT = "  "


class Shape(NamedTuple):
    """How a table is laid out."""

    shown: list[int]
    """The columns after those of addresses."""
    widths: list[int]
    """Of all columns; 0 for those of addresses if each stands on a line of its own."""
    whole: bool
    """Each row is one line."""


def shape(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int, lead: int, *, legend: bool = True) -> Shape:
    """The best shape for these rows. `lead` is the number of columns with addresses, which come first."""
    natural = [len(column.title) if legend else 0 for column in columns]
    for row in rows:
        natural = [max(had, len(cell_text(cell) or "-")) for had, cell in zip(natural, row, strict=True)]
    # As they are; else with short addresses, if that brings in more of what matters, or must be; else with addresses apart.
    kept, least = _counted(columns, taken := _taken(columns, natural, lead, width), lead)
    if least and kept == _matter(columns, lead):
        return Shape(taken, natural, True)
    for longest in (SHORT_ADDRESS, 0):
        widths = [*(_widest(rows, at, longest, len(columns[at].title) if legend else 0) for at in range(lead)), *natural[lead:]]
        shown = _taken(columns, widths, lead, width)
        more, enough = _counted(columns, shown, lead)
        if enough or not longest:
            break
    return Shape(shown, widths, False) if more > kept or not least else Shape(taken, natural, True)


def _widest(rows: Sequence[Sequence[Cell]], at: int, longest: int, least: int) -> int:
    """Of the cells of a column that are no longer than that."""
    return max([min(least, longest), *(length for row in rows if (length := len(cell_text(row[at]))) <= longest)])


def _matter(columns: Sequence[Column], lead: int) -> int:
    return sum(column.rank <= MATTERS for column in columns[lead:])


def _counted(columns: Sequence[Column], shown: Sequence[int], lead: int) -> tuple[int, bool]:
    """How many of the columns that matter are shown, and whether all of those that must be."""
    return sum(columns[at].rank <= MATTERS for at in shown), all(at in shown or columns[at].rank for at in range(lead, len(columns)))


def _taken(columns: Sequence[Column], widths: Sequence[int], lead: int, width: int) -> list[int]:
    """The columns after the leading ones that are shown, by rank; those of rank 0 only if there is room for them, too."""
    room = width - (sum(widths[:lead]) + GAP * (lead - 1) if widths[0] else len(INDENT) - GAP)
    taken = []
    for at in sorted(range(lead, len(columns)), key=lambda at: columns[at].rank):
        if widths[at] + GAP <= room:
            taken.append(at)
            room -= widths[at] + GAP
    return sorted(taken)


def lines(
    style: Style, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], of: Shape, lead: int, *, width: int, legend: bool = True
) -> Iterator[list[str]]:
    """The lines of the header, unless there is none, and of each row."""
    if legend:
        yield _lines(style, columns, [(column.title, "bold") for column in columns], of, lead, width)
    for row in rows:
        yield _lines(style, columns, row, of, lead, width)


def _lines(style: Style, columns: Sequence[Column], row: Sequence[Cell], of: Shape, lead: int, width: int) -> list[str]:
    addresses = [cell_text(cell) or "-" for cell in row[:lead]]

    def formatted(shown: Sequence[int]) -> str:
        return format_row(style, [columns[at] for at in shown], [of.widths[at] for at in shown], [row[at] for at in shown])

    if all(len(text) <= had for text, had in zip(addresses, of.widths, strict=False)):
        return [formatted([*range(lead), *of.shown])]
    painted = [style(text, "" if isinstance(cell, str) else cell[1]) for text, cell in zip(addresses, row, strict=False)]
    together = sum(map(len, addresses)) + GAP * (lead - 1) <= width
    above = [(" " * GAP).join(painted)] if together else [painted[0], *(INDENT + text for text in painted[1:])]
    indent = " " * (sum(of.widths[:lead]) + GAP * lead) if of.widths[0] else INDENT
    return [*above, indent + formatted(of.shown)]


def write_fitting(
    out: TextIO,
    style: Style,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    *,
    width: int,
    lead: int,
    legend: bool,
    drawn: bool,
) -> int:
    """Write a table on a terminal; return the number of its rows."""
    stream = iter(rows)
    sample = list(itertools.islice(stream, SAMPLE_ROWS))
    everything = itertools.chain(sample, stream)
    of = shape(columns, sample, width - GAP, lead, legend=legend)  # rich ends its lines with a gap
    if of.whole:
        shown = [*range(lead), *of.shown]
        kept = ([row[at] for at in shown] for row in everything)
        return write_table(out, style, [columns[at] for at in shown], kept, legend=legend, terminal=drawn, width=width)
    of = shape(columns, sample, width, lead, legend=legend)
    total = -1 if legend else 0
    for group in lines(style, columns, everything, of, lead, width=width, legend=legend):
        out.write("\n".join(group) + "\n")
        total += 1
    return total
