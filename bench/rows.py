"""A measured row, its goal, and how rows are shown."""

from __future__ import annotations

import enum
import json
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Of(enum.StrEnum):
    """What a goal bounds."""

    RATIO = "ratio"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a row's ratio or on its value."""

    limit: float
    of: Of = Of.RATIO
    at_least: bool = False

    def holds(self, row: Row) -> bool | None:
        """None if the row has nothing to compare."""
        got = row.ratio if self.of is Of.RATIO else row.value
        if got is None:
            return None
        return got >= self.limit if self.at_least else got <= self.limit

    def text(self, unit: str) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g} {'×' if self.of is Of.RATIO else unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """`row` names what was measured, `reference` is the peer's value in the same unit."""

    row: str
    value: float
    unit: str
    reference: float | None = None
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        return self.value / self.reference if self.reference else None

    @property
    def holds(self) -> bool | None:
        return self.goal.holds(self) if self.goal else None

    def document(self) -> dict[str, Any]:
        ratio = None if self.ratio is None else round(self.ratio, 3)
        goal = self.goal.text(self.unit) if self.goal else None
        return {"row": self.row, "value": round(self.value, 3), "unit": self.unit, "reference": self.reference, "ratio": ratio,
                "goal": goal, "holds": self.holds}  # fmt: skip


class Section(Protocol):
    """A module of measurements."""

    TITLE: str

    def measure(self, rounds: int) -> Iterable[Row]: ...


Name = TypeVar("Name", bound=Hashable)


def interleaved(contestants: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, float]:
    """The median of each contestant. They take turns, one measurement each a round, so that a slow moment of the machine meets them all;
    a round before the first one warms up and does not count."""
    taken: dict[Name, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            value = run()
            if number:
                taken[name].append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


_HEADINGS = ("row", "value", "unit", "reference", "ratio", "goal", "holds")
_TEXT_COLUMNS = (0, 2, 5, 6)


def table(rows: Sequence[Row]) -> str:
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = []
    for line in cells:
        aligned = [text.ljust(width) if column in _TEXT_COLUMNS else text.rjust(width)
                   for column, (text, width) in enumerate(zip(line, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    holds = {None: "", True: "yes", False: "NO"}[row.holds]
    reference = "" if row.reference is None else number(row.reference)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return row.row, number(row.value), row.unit, reference, ratio, row.goal.text(row.unit) if row.goal else "", holds


def number(value: float) -> str:
    """For people."""
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps([row.document() for row in rows], indent=2, ensure_ascii=False) + "\n")
