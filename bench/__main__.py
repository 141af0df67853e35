"""Measure, and show a table: as root, `./dev bench [--json FILE]`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

from . import packets, process
from .rows import Row, Section, table, write_json

SECTIONS: dict[str, Section] = {"packets": packets, "process": process}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Measure what xdpmond costs, beside its peers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, as a list of objects")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="measurements that each median is of (%(default)d)")
    parser.add_argument("--only", choices=SECTIONS, action="append", metavar="SECTION",
                        help=f"one of {', '.join(SECTIONS)}; may be repeated")  # fmt: skip
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("bench: needs root, to load BPF programs and to make a network namespace", file=sys.stderr)
        return 2
    print(f"Linux {platform.release()}, {os.cpu_count()} processors, {_processor()}; medians of {options.rounds} rounds\n")
    rows: list[Row] = []
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        measured = list(section.measure(options.rounds))
        print(f"{section.TITLE}\n{table(measured)}\n", flush=True)
        rows += measured
    if options.json:
        write_json(rows, options.json)
    missed = [row.row for row in rows if row.holds is False]
    print(f"{sum(row.holds is True for row in rows)} goals hold, {len(missed)} do not")
    return 0


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
