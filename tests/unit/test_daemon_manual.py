"""xdpmond(8) names each option of the daemon's parser, each exit status and each journal message, and formats without complaint."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from xdpmond.app import parser
from xdpmond.messages import Message, event_fields
from xdpmond.model import Family, Outcome, PacketEvent
from xdpmond.windows import Pressure

PAGE = Path(__file__).resolve().parents[2] / "man" / "xdpmond.8"


def plain() -> str:
    """The page without font changes and escapes."""
    text = re.sub(r"\\f[A-Z]", "", PAGE.read_text()).replace("\\-", "-")
    return re.sub(r"^\.(?:B|I|BR|BI|RB|RI|IB)\s+", "", text, flags=re.MULTILINE)


def section(title: str) -> str:
    found = re.search(rf"^\.SH {title}$(.*?)(?=^\.SH)", plain(), re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def test_the_options_are_those_of_the_parser() -> None:
    described = " ".join(re.findall(r"^\.TP\n(.*)", section("OPTIONS"), re.MULTILINE))
    options = {option for action in parser()._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", described)) == options


def test_the_messages_are_those_of_the_daemon() -> None:
    listed = re.findall(r"^([0-9a-f]{32})  (\w+)$", section("JOURNAL MESSAGES"), re.MULTILINE)
    assert listed == [(message.message_id, message.name) for message in Message]


def test_the_fields_of_a_packet_are_those_of_the_daemon() -> None:
    event = PacketEvent(0.0, "eth0", None, Family.IPV4, "192.0.2.1", "192.0.2.2", 1, 2, 6, 60, Outcome.DEFAULT_LOGGED, "default", 0, 0)
    named = set(re.findall(r"\b(?:XDPMOND_)?([A-Z_]+)\b", section("JOURNAL MESSAGES").partition("fields of samples are")[2]))
    assert named == {name.upper() for name in event_fields(event)}


def test_the_fields_of_a_summary_are_those_of_the_daemon() -> None:
    text = section("JOURNAL MESSAGES").partition("counted in SUMMARY, as")[2].partition("fields of samples are")[0]
    named = set(re.findall(r"^(?:XDPMOND_)?([A-Z]{4,}[A-Z_]*)\b", text, re.MULTILINE)) - {"WARNING"}
    assert named == {"HELD_BACK", "UNWRITTEN", *(name.upper() for name in Pressure((1,), 4, 0, 0).fields(None))}


def test_it_formats_without_complaint() -> None:
    command = ["man", "--warnings", "-E", "UTF-8", "-l", str(PAGE)]
    environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    assert done.stderr == ""
    assert "--drop-packets" in done.stdout
