"""The pages of numbers in the documentation, made from the rows of a run: `sudo ./dev bench --json FILE`, and on the same machine
`./dev docs FILE`.

docs/measurements.md is made whole by this; what is to be said beside the numbers stands here. docs/growth.md is made by `growth`.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import growth
from .rows import number

DOCS = Path(__file__).resolve().parents[1] / "docs"

_INTRODUCTION = """\
# Measurements

Made by `sudo ./dev bench --json FILE` and `./dev docs FILE`; not to be edited. {machine}.

Medians. A ratio is the value by the reference, both measured in turns in one run: machines differ, so look at ratios. "xdp-filter" is
that of Debian's xdp-tools with all its features loaded: first on one hot packet, then, live, on the same stream. What has no goal is there
for the reader. [growth.md](growth.md) says what follows from the rows.
"""

_SECTIONS = {
    "packets": "The packet path, one core, by BPF_PROG_TEST_RUN",
    "live": "Frames through a veth pair, native XDP, all of them dropped",
    "control": "The control path",
    "reading": "Reading a million talkers, and memory",
    "events": "Events into a JSONL file, the daemon on one core",
    "process": "Whole processes",
    "fuzz": "Each packet judged by a second parser and policy",
}
_HEAD = "| row | value | unit | reference | ratio | goal | holds |\n|---|--:|---|--:|--:|---|---|"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"Linux {platform.release().partition('-')[0]}, {os.cpu_count()} processors, {processor}"


def page(rows: Iterable[Mapping[str, Any]], of: str) -> str:
    """The whole page, from the rows of a run on the machine `of`."""
    parts = [_INTRODUCTION.format(machine=of)]
    for section, each in itertools.groupby(rows, lambda row: str(row["row"]).partition(": ")[0]):
        parts.append(f"## {_SECTIONS[section]}\n\n{_HEAD}\n" + "".join(f"{_line(row)}\n" for row in each))
    return "\n".join(parts)


def _line(row: Mapping[str, Any]) -> str:
    cells = (
        row["row"].partition(": ")[2], number(row["value"]), row["unit"], "" if row["reference"] is None else number(row["reference"]),
        "" if row["ratio"] is None else f"{row['ratio']:.2f}", row["goal"] or "", {None: "", True: "yes", False: "**no**"}[row["holds"]],
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text())
    (DOCS / "measurements.md").write_text(page(measured, machine()))
    (DOCS / "growth.md").write_text(growth.page(measured))
