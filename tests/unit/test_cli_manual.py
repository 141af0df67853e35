"""xdpmonctl(1) names each command and option of the parser, under the command it belongs to, and formats without complaint."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from xdpmond.cli.parser import COMMANDS, build_parser, subparsers
from xdpmond.errors import ERRORS

PAGE = Path(__file__).resolve().parents[2] / "man" / "xdpmonctl.1"


def plain() -> str:
    """The page without font changes and escapes."""
    text = re.sub(r"\\f[A-Z]", "", PAGE.read_text()).replace("\\-", "-")
    return re.sub(r"^\.(?:B|I|BR|BI|RB|RI|IB)\s+", "", text, flags=re.MULTILINE)


def section(title: str) -> str:
    found = re.search(rf"^\.SH {title}$(.*?)(?=^\.SH)", plain(), re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def entries() -> dict[str, str]:
    """The text on each command. Commands that share a text stand above it one after the other."""
    names = "|".join(command.name for command in COMMANDS)
    found: dict[str, str] = {}
    waiting: list[str] = []
    for part in re.split(rf"^\.T[PQ]\n(?=(?:{names})(?: |$))", section("COMMANDS"), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        waiting.append(title.split()[0])
        if text:
            found.update((name, text) for name in waiting)
            waiting = []
    return found


@pytest.mark.parametrize("name", [command.name for command in COMMANDS])
def test_each_command_with_its_options(name: str) -> None:
    own = set(subparsers(build_parser())[name].options()) - set(build_parser().options())
    described = " ".join(re.findall(r"^\.TP\n(.*)", entries()[name], re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", described)) == own


def test_the_common_options() -> None:
    text = section("OPTIONS")
    for option in build_parser().options():
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option


def test_each_exit_status() -> None:
    statuses = {int(number) for number in re.findall(r"^\.TP\n(\d)$", section("EXIT STATUS"), re.MULTILINE)}
    assert statuses == {0} | {kind.exit_status for kind in ERRORS.values()}


def test_it_formats_without_complaint() -> None:
    command = ["man", "--warnings", "-E", "UTF-8", "-l", str(PAGE)]
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    assert done.stderr == ""
    assert "check-config" in done.stdout
