"""Run tests of the working tree on one of Debian 12's kernels, in a virtual machine: as root,

    /usr/bin/python3 -m tests.vm.run --kernel 6.1 -- -x tests/kernel

What stands behind `--` goes to pytest; without it, the kernel tests and those for guests alone run. `--command` runs something else, for
example `--command 'ip -d link'`. The exit status is that of pytest or of the command; 125 when the machine itself failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .image import KERNELS, ImageError, prepare
from .machine import Finished, MachineError, run

PROJECT = Path(__file__).resolve().parents[2]
_KERNEL = "tests/kernel/test_"
GUEST_TESTS = (
    "tests/vm/guest",
    *(f"{_KERNEL}{name}.py" for name in ("attach", "costs", "events", "pauses", "windows")),
    f"{_KERNEL}flows.py::test_flows_of_one_source_under_fire",
    f"{_KERNEL}locals.py::test_the_books_balance",
    f"{_KERNEL}policy.py::test_longest_prefix",
    f"{_KERNEL}policy.py::test_no_packet_meets_half_a_policy",
    f"{_KERNEL}policy.py::test_the_default_is_switched_with_the_lists",
    f"{_KERNEL}pump.py::test_every_packet_of_a_storm_is_accounted_for[narrow-queue]",
    f"{_KERNEL}talkers.py::test_the_books_balance_under_fire",
    f"--deselect={_KERNEL}events.py::test_two_sources_in_one_cell",
    f"--deselect={_KERNEL}windows.py::test_counts_that_outgrow_the_state_of_an_entry",
)
"""What is run when nothing is named: what the kernel has a part in. That its verifier takes each program, what its maps cost, links and
their packets, the ring, and all that many processors do at once. What is of the program alone (how it parses, what a policy says, who makes
room in a table) is the same on any kernel, takes a second on the host, and a minute under emulation."""

TIMEOUT = 2400.0
"""Seconds that a machine may take as a whole: software emulation is some ten times slower than the processor."""

_MACHINE_FAILED = 125
_PASSED_ON = ("CI", "XDPMOND_TEST_EXAMPLES")
_EXAMPLES = "25"
"""Examples of a property test, unless the environment says otherwise: the host's run tries many more of the same program."""


def pytest_command(arguments: list[str]) -> list[str]:
    return ["/usr/bin/python3", "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--junit-xml=/run/report", *arguments]


def guest_environment() -> dict[str, str]:
    """XDPMOND_GUEST tells the tests under tests/vm/guest that they are in a machine made for them."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {"XDPMOND_GUEST": "1", "XDPMOND_TEST_EXAMPLES": _EXAMPLES, "COLUMNS": "140", "PYTHONUNBUFFERED": "1", **passed_on}


def run_tests(kernel: str, arguments: list[str], *, timeout: float = TIMEOUT) -> Finished:
    """Run pytest on `kernel`, quietly; raise `ImageError` or `MachineError`."""
    return run(prepare(kernel), pytest_command(arguments), project=PROJECT, environment=guest_environment(), timeout=timeout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.vm.run", description="Run tests on one of Debian 12's kernels, in a virtual machine.")
    parser.add_argument("--kernel", choices=sorted(KERNELS, key=lambda version: [int(part) for part in version.split(".")]), default="6.1")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="for the whole run (%(default)g)")
    parser.add_argument("--refresh", action="store_true", help="make the system anew and fetch the newest kernel")
    parser.add_argument("--command", metavar="TEXT", help="a shell command to run in place of pytest")
    parser.add_argument("pytest", nargs="*", metavar="PYTEST_ARGUMENT", help="behind --")
    options = parser.parse_args(argv)
    arguments = ["sh", "-c", options.command] if options.command else pytest_command(options.pytest or list(GUEST_TESTS))

    def show(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    try:
        image = prepare(options.kernel, refresh=options.refresh, say=lambda text: print(text, flush=True))
        finished = run(image, arguments, project=PROJECT, environment=guest_environment(), timeout=options.timeout, on_output=show)
    except (ImageError, MachineError) as error:
        print(error, file=sys.stderr)
        return _MACHINE_FAILED
    return finished.status


if __name__ == "__main__":
    sys.exit(main())
