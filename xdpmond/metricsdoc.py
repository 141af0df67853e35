"""The table of metrics in docs/metrics.md, made from what is measured.

    python3 -m xdpmond.metricsdoc docs/metrics.md

writes it again; a unit test fails while it is not current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from .measures import ACTIVE_USERS, FAMILIES, SERIES, Row

BEGIN = "<!-- The table up to the end mark is made by: python3 -m xdpmond.metricsdoc docs/metrics.md -->"
END = "<!-- End mark. -->"


def table(rows: Iterable[Row] = (*FAMILIES, SERIES, ACTIVE_USERS)) -> str:
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for row in rows:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {_markdown(row.help)} |")
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """With names of metrics and settings, and what is written in quotes, as code."""
    text = re.sub(r'(\w+="[^"]*"(?:, \w+="[^"]*")*|\bxdpmond_\w+|\b(?:metrics|events|tables|bus)\.\w+(?: = \w+)?)', r"`\1`", text)
    return text.replace("|", "\\|")


def with_table(page: str) -> str:
    """A page with what stands between the marks replaced."""
    before, found, rest = page.partition(f"{BEGIN}\n")
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise ValueError("the page lacks the marks")
    return f"{before}{found}\n{table()}\n{found_end}{after}"


def main(files: list[str]) -> int:
    for file in map(Path, files):
        file.write_text(with_table(file.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
