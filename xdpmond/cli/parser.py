"""The words of the command line.

A command is one row: name, help, what it takes, and the function that does it, named by module so that only the module of the command
given is imported. Mistyped words are usage errors that name the nearest known word. The manual page and the completions are checked
against this parser by tests.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..errors import UsageError

if TYPE_CHECKING:
    from .context import Context

PROGRAM = "xdpmonctl"
LEAST_SECONDS, MOST_SECONDS = 0.2, 3600
"""Between two refreshes of a live screen."""


class Command(NamedTuple):
    name: str
    operands: str
    """What stands after the name, for the usage line."""
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: str
    """`module:function` in this package; the function takes a Context and returns the exit status, or None for 0."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours, with the nearest known word as the hint."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, add_help=False, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see: {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        what = "command" if action.dest == "command" else "/".join(action.option_strings) or action.metavar or action.dest
        close = nearest(str(value), choices)
        raise UsageError(
            f"unknown command '{value}'" if what == "command" else f"{what} does not take '{value}'",
            hint=f"did you mean '{close}'?" if close else f"known: {', '.join(choices)}",
        )

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


class _Formatter(argparse.HelpFormatter):
    """Help with room for the longest command's name before its text. argparse makes one of these for each argument that is added, and
    would import shutil to learn the width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=_help_width())


def _help_width() -> int:
    try:
        columns = os.get_terminal_size(1).columns
    except (OSError, ValueError):
        columns = 0
    return min(columns or 80, 100) - 2


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that was probably meant, or nothing. Dashes in front make no two words alike."""
    import difflib

    names = {item.lstrip("-"): item for item in known}
    return next((names[name] for name in difflib.get_close_matches(word.lstrip("-"), names, n=1, cutoff=0.5)), "")


def build_parser(words: Collection[str] | None = None) -> Parser:
    """The whole parser; or, to save time, one that has the arguments of those commands alone that stand among the words."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [OPTION...] [COMMAND ...]",
        description="Show and control what xdpmond does with the traffic of this host. Without a command: status.",
        epilog="See xdpmonctl(1) for the exit statuses, and COMMAND --help for one command.",
    )
    commands = parser.add_subparsers(prog=PROGRAM, dest="command", metavar="COMMAND", title="commands", parser_class=Parser, required=False)
    _common(parser, top=True)
    for command in COMMANDS:
        usage = " ".join(filter(None, [PROGRAM, command.name, "[OPTION...]", command.operands]))
        child = commands.add_parser(command.name, usage=usage, help=command.help, description=_sentence(command.help))
        child.set_defaults(run=command.run)
        if words is None or command.name in words:
            command.arguments(child)
            _common(child, top=False)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line; raise UsageError. `--help` and `--version` print and end the process, as argparse has it."""
    words = list(arguments)
    parser = build_parser(words)
    found, surplus = parser.parse_known_args(words)
    if found.command is None:
        found.run = COMMANDS[0].run
    if surplus:
        raise _surplus(parser, found.command, surplus[0])
    return found


def subparsers(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """The parsers of the commands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _surplus(parser: Parser, command: str | None, word: str) -> UsageError:
    where = f"{PROGRAM} {command}" if command else PROGRAM
    if not word.startswith("-"):
        return UsageError(f"'{word}' is one argument too many", hint=f"see: {where} --help")
    name = word.partition("=")[0]
    known = subparsers(parser)[command].options() if command else parser.options()
    close = nearest(name, known)
    return UsageError(f"unknown option '{name}'", hint=f"did you mean '{close}'?" if close else f"see: {where} --help")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _common(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """The options that every command takes, before it or after it. Only the top parser has defaults, or a command's would hide them."""

    def default(value: Any) -> Any:
        return value if top else argparse.SUPPRESS

    group = parser.add_argument_group("options everywhere")
    group.add_argument(
        "--json", choices=("short", "pretty", "off"), default=default("off"), metavar="FORM", help="JSON output: short, pretty, off"
    )
    group.add_argument("-j", dest="json", action="store_const", const="short", default=argparse.SUPPRESS, help="the same as --json=short")
    group.add_argument("--no-legend", action="store_true", default=default(False), help="no table headers, hints and closing lines")
    group.add_argument("--color", choices=("auto", "always", "never"), default=default("auto"), metavar="WHEN", help="auto, always, never")
    group.add_argument("--bus", default=default(None), metavar="ADDRESS", help="the message bus to use, instead of the system's")
    group.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this help and exit")
    group.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from .. import __version__

        print(f"{PROGRAM} {__version__}")
        parser.exit()


def _none(parser: argparse.ArgumentParser) -> None:
    pass


def _force(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--force", action="store_true", help=what)


def _change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="such as 192.0.2.0/24, 2001:db8::/32, or one address")
    parser.add_argument("--for", dest="duration", metavar="TIME", help="until then, such as 90s, 10m, 1h30m, 2d; else for good")
    parser.add_argument("--reason", default="", metavar="TEXT", help="kept with the entry and shown in lists")
    parser.add_argument("--from-file", metavar="FILE", help="read the prefixes from a file, one a line; - is standard input")
    _force(parser, "even if it cuts off an SSH connection, or the prefix is /0")


def _reload(parser: argparse.ArgumentParser) -> None:
    _force(parser, "even if it cuts off an SSH connection")


def _remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="as shown by list")
    _force(parser, "even if it cuts off an SSH connection")


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="one IPv4 or IPv6 address")


def _mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "mode", nargs="?", choices=("monitor", "enforce", "default"), metavar="MODE",
        help="monitor drops nothing, enforce drops what is denied, default is the configuration's; without it: show the mode",
    )  # fmt: skip
    parser.add_argument("--interface", default="", metavar="IF", help="on this interface alone")
    parser.add_argument("--confirm", metavar="TIME", help="go back after this time unless `xdpmonctl confirm` is run")
    _force(parser, "even if it cuts off an SSH connection, or denies all unlisted sources")


def _select(parser: argparse.ArgumentParser, rows: str) -> None:
    """What is asked of ports, talkers and flows alike."""
    parser.add_argument("--limit", type=_whole, metavar="N", help=f"so many {rows}; 20 unless given")
    parser.add_argument("--port", type=_port, metavar="P", help="only what goes to this port")
    parser.add_argument("--proto", metavar="P", help="only this protocol, by name or number")


def _local(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--local", action=argparse.BooleanOptionalAction, help="with or without sources in private networks; else as show_local says"
    )


def _watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=0.0, metavar="SECONDS", help="a live screen, refreshed every 2 seconds unless given"
    )


def _ports(parser: argparse.ArgumentParser) -> None:
    _select(parser, "ports")
    _local(parser)
    parser.add_argument("--interval", action="store_true", help="only the last full window, not the running one")


def _top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=("bytes", "packets", "syn"), default="bytes", metavar="KEY", help="order by bytes, packets or syn")
    _select(parser, "rows")
    parser.add_argument("--prefix-len", type=_length(32), metavar="N", help="sum up IPv4 sources by prefixes of this length, such as 24")
    parser.add_argument("--prefix-len6", type=_length(128), metavar="N", help="the same for IPv6, such as 64")
    _local(parser)
    parser.add_argument("--interval", action="store_true", help="only what came in the last full window, not since")
    parser.add_argument("--resolve", action="store_true", help="show the names that DNS has for the sources")
    _watch(parser)


def _flows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=("bytes", "packets"), default="bytes", metavar="KEY", help="order by bytes or packets")
    _select(parser, "flows")
    parser.add_argument("--address", metavar="A", help="only flows from or to this address")
    _watch(parser)


def _events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="show events as they happen")
    parser.add_argument("--limit", type=_whole, metavar="N", help="the last N events; with -f end after N")


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="this file with its FILE.d/*.toml, instead of the system's configuration")


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 32):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port: 0 to 65535")
    return int(text)


def _length(most: int) -> Callable[[str], int]:
    def length(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) <= most):
            raise argparse.ArgumentTypeError(f"'{text}' is not a prefix length: 0 to {most}")
        return int(text)

    return length


def _seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from {LEAST_SECONDS} to {MOST_SECONDS}")
    return seconds


COMMANDS: tuple[Command, ...] = (
    Command("status", "", "what is going on: mode, rates, drops, top sources, losses", _none, "status:status"),
    Command("allow", "PREFIX... | --from-file FILE", "let sources in", _change, "policy:allow"),
    Command(
        "deny",
        "PREFIX... | --from-file FILE",
        "shut sources out; dropped in enforce mode, only reported in monitor mode",
        _change,
        "policy:deny",
    ),
    Command("remove", "PREFIX...", "take out entries that allow or deny have put in", _remove, "policy:remove"),
    Command("list", "", "all entries of the policy with their counters", _none, "policy:list_entries"),
    Command("explain", "ADDRESS", "what happens to a source, which entry decides, and what it sent", _explain, "policy:explain"),
    Command("mode", "[monitor | enforce | default]", "show or set the mode", _mode, "control:mode"),
    Command("confirm", "", "keep the mode that was set with --confirm", _none, "control:confirm"),
    Command("ports", "", "from how many sources each port was reached", _ports, "ports:ports"),
    Command("top", "", "who sends the most, to which port; once or live", _top, "talkers:top"),
    Command("flows", "", "which conversations there are, and how large", _flows, "talkers:flows"),
    Command("events", "", "the packets that were reported, last or live", _events, "events:events"),
    Command("reload", "", "read the configuration again", _reload, "control:reload"),
    Command("check-config", "[FILE]", "check the configuration without touching the daemon", _check, "control:check_config"),
)
"""The first one is what xdpmonctl does without a command."""


def runner(name: str) -> Callable[[Context], int | None]:
    """The function of a command, imported now."""
    import importlib

    module, _, function = name.partition(":")
    found: Callable[[Context], int | None] = getattr(importlib.import_module(f".{module}", __package__), function)
    return found
