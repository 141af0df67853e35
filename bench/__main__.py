"""Measure, and show a table: as root, `./dev bench [--json FILE]`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from . import control, events, fuzz, live, packets, process, reading
from .report import machine
from .rows import Row, Section, table, write_json
from .wire import remove_leftovers

SECTIONS: dict[str, Section] = {
    "packets": packets, "live": live, "control": control, "reading": reading, "events": events, "process": process, "fuzz": fuzz,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Measure what xdpmond costs, beside its peers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too, as a list of objects")
    parser.add_argument("--packets", type=int, default=fuzz.PACKETS, metavar="N", help="packets of the fuzz run (%(default)d)")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="measurements that each median is of (%(default)d)")
    parser.add_argument("--only", choices=SECTIONS, action="append", metavar="SECTION",
                        help=f"one of {', '.join(SECTIONS)}; may be repeated")  # fmt: skip
    options = parser.parse_args(argv)
    fuzz.PACKETS = options.packets
    if os.geteuid() != 0:
        print("bench: needs root, to load BPF programs and to make a network namespace", file=sys.stderr)
        return 2
    print(f"{machine()}; medians of {options.rounds} rounds\n")
    # What was made is removed however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    remove_leftovers()
    rows: list[Row] = []
    failed: list[str] = []
    for name, section in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        measured: list[Row] = []
        started = time.monotonic()
        try:
            measured.extend(section.measure(options.rounds))
        except Exception:
            # The others can be measured all the same.
            traceback.print_exc()
            failed.append(name)
        print(f"{section.TITLE} ({time.monotonic() - started:.0f} s)\n{table(measured)}\n", flush=True)
        rows += [dataclasses.replace(row, row=f"{name}: {row.row}") for row in measured]
    if options.json:
        write_json(rows, options.json)
    missed = [row.row for row in rows if row.holds is False]
    print(f"{sum(row.holds is True for row in rows)} goals hold, {len(missed)} do not")
    if failed:
        print(f"bench: not measured to the end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
