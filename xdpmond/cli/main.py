"""xdpmonctl's entry: parse, do one command, turn every error into one message and one exit status.

Exit statuses: 0 done, 1 failed, 2 usage, 3 the daemon is not running, 4 not authorised, 5 no such entry, 6 invalid configuration or
prefix, 7 refused by a guard. Each error class carries its own; nothing else chooses one. A reader that goes away (`| head`) and Ctrl-C
end it quietly.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import XdpmondError
from .context import Context
from .parser import PROGRAM, parse, runner
from .render import Style, safe

if TYPE_CHECKING:
    from .context import Daemon

    Connect = Callable[[str | None, Mapping[str, str]], Daemon]
    """From the --bus option and the environment to the daemon."""

INTERRUPTED = 130
IN_ASCII = {"≥": ">=", "±": "+-", "…": "...", "─": "-"}
"""What we write ourselves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run xdpmonctl; return its exit status."""
    return run(sys.argv[1:] if arguments is None else arguments, sys.stdout, sys.stderr, environ=os.environ, connect=_connect)


def run(
    arguments: Sequence[str],
    out: TextIO,
    err: TextIO,
    *,
    environ: Mapping[str, str],
    connect: Connect,
    clock: Callable[[], float] = time.time,
) -> int:
    """The same with everything from outside passed in."""
    status = 0
    try:
        try:
            _prepare(out)
            options = parse(arguments)
            terminal = out.isatty()
            context = Context(
                options, out, daemon=lambda: connect(options.bus, environ), environ=environ, clock=clock, terminal=terminal,
                colour=_coloured(options.color, terminal, environ), width=_width(environ) if terminal else 80,
            )  # fmt: skip
            status = runner(options.run)(context) or 0
        finally:
            out.flush()
    except XdpmondError as error:
        status = error.exit_status
        _complain(err, error.message, error.hint, environ)
    except BrokenPipeError:
        _forget(out)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except OSError as error:
        status = XdpmondError.exit_status
        _complain(
            err, f"{error.filename}: {error.strerror}" if error.filename else f"cannot write the output: {error.strerror}", "", environ
        )
        _forget(out)
    return status


def _connect(bus: str | None, environ: Mapping[str, str]) -> Daemon:
    from .client import Daemon as Client
    from .client import bus_address

    return Client(bus_address(bus, environ), interactive=sys.stdin is not None and sys.stdin.isatty())


def _coloured(choice: str, terminal: bool, environ: Mapping[str, str]) -> bool:
    if choice != "auto":
        return choice == "always"
    return terminal and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"


def _width(environ: Mapping[str, str]) -> int:
    columns = environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _prepare(out: TextIO) -> None:
    """What the locale cannot write is shown in ASCII or as an escape, not as a traceback."""
    import codecs

    codecs.register_error("xdpmonctl", _in_ascii)
    reconfigure: Any = getattr(out, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="xdpmonctl")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    import codecs

    if isinstance(error, UnicodeEncodeError):
        characters = error.object[error.start : error.end]
        if all(character in IN_ASCII for character in characters):
            return "".join(IN_ASCII[character] for character in characters), error.end
    return codecs.backslashreplace_errors(error)


def _complain(err: TextIO, message: str, hint: str, environ: Mapping[str, str]) -> None:
    style = Style(_coloured("auto", err.isatty(), environ))
    lines = [f"{style(PROGRAM + ':', 'red')} {safe(message)}"]
    lines += [f"  {safe(line.strip())}" for line in hint.splitlines() if line.strip()]
    try:
        err.write("\n".join(lines) + "\n")
        err.flush()
    except (OSError, ValueError):
        pass  # nobody is left to be told; the exit status says it


def _forget(out: TextIO) -> None:
    """Lead standard output away, or the interpreter complains when it flushes it at the end."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, out.fileno())
        os.close(descriptor)
    except (OSError, ValueError):
        pass
