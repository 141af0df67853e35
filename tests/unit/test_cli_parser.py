"""The command line: what is taken, what is refused, and what is suggested instead."""

from __future__ import annotations

import importlib

import pytest

from xdpmond.cli.parser import COMMANDS, parse, runner
from xdpmond.errors import UsageError


def test_without_a_command_it_is_status() -> None:
    assert parse([]).run == "status:status"
    assert parse(["-j"]).run == "status:status"


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_each_command_has_its_function(command: str) -> None:
    row = next(row for row in COMMANDS if row.name == command)
    module, _, name = row.run.partition(":")
    assert runner(row.run) is getattr(importlib.import_module(f"xdpmond.cli.{module}"), name)


@pytest.mark.parametrize("words", [["--json=pretty", "list"], ["list", "--json=pretty"], ["list", "--json", "pretty"]])
def test_common_options_stand_before_or_after(words: list[str]) -> None:
    found = parse(words)
    assert (found.command, found.json, found.color, found.bus, found.no_legend) == ("list", "pretty", "auto", None, False)


def test_the_later_form_wins() -> None:
    assert parse(["-j", "list", "--json=off"]).json == "off"
    assert parse(["--json=off", "list", "-j"]).json == "short"


def test_a_change() -> None:
    found = parse(["deny", "192.0.2.0/24", "2001:db8::/32", "--for", "10m", "--reason", "flood", "--force", "-j"])
    assert found.prefixes == ["192.0.2.0/24", "2001:db8::/32"]
    assert (found.duration, found.reason, found.from_file, found.force, found.json) == ("10m", "flood", None, True, "short")
    assert parse(["allow", "--from-file", "-"]).from_file == "-"


def test_numbers_are_checked() -> None:
    found = parse(["top", "--by", "syn", "--limit", "5", "--port", "0", "--proto", "UDP", "--interval"])
    assert (found.by, found.limit, found.port, found.proto, found.interval) == ("syn", 5, 0, "UDP", True)
    for words in (
        ["top", "--limit", "0"],
        ["top", "--limit", "-1"],
        ["top", "--port", "65536"],
        ["top", "--limit", "²"],
        ["top", "--port", "x"],
        ["top", "--prefix-len", "33"],
        ["top", "--prefix-len6", "129"],
        ["top", "--watch", "0"],
        ["top", "--watch", "nan"],
        ["flows", "--watch", "1m"],
        ["flows", "--by", "syn"],
    ):
        with pytest.raises(UsageError):
            parse(words)


def test_what_was_not_given_is_told_from_what_was() -> None:
    found = parse(["top"])
    assert (found.local, found.watch, found.prefix_len, found.prefix_len6) == (None, None, None, None)
    assert (parse(["top", "--local"]).local, parse(["ports", "--no-local"]).local) == (True, False)
    assert [parse(["flows", *words]).watch for words in (["--watch"], ["--watch", "0.5"], ["--watch=5s"])] == [0.0, 0.5, 5.0]
    assert parse(["top", "--prefix-len", "0", "--prefix-len6=64"]).prefix_len == 0


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["staus"], "unknown command 'staus'", "did you mean 'status'?"),
        (["ls"], "unknown command 'ls'", "did you mean 'list'?"),
        (["checkconfig"], "unknown command 'checkconfig'", "did you mean 'check-config'?"),
        (["zzz"], "unknown command 'zzz'", "known: status, allow"),
        (["--jsn", "list"], "unknown option '--jsn'", "did you mean '--json'?"),
        (["deny", "192.0.2.1", "--resaon=x"], "unknown option '--resaon'", "did you mean '--reason'?"),
        (["list", "--forse"], "unknown option '--forse'", "xdpmonctl list --help"),
        (["mode", "enforced"], "MODE does not take 'enforced'", "did you mean 'enforce'?"),
        (["list", "--json=yaml"], "--json does not take 'yaml'", "known: short, pretty, off"),
        (["top", "--by", "byte"], "--by does not take 'byte'", "did you mean 'bytes'?"),
        (["list", "everything"], "'everything' is one argument too many", "xdpmonctl list --help"),
        (["explain"], "required: ADDRESS", "xdpmonctl explain --help"),
        (["remove"], "required: PREFIX", "xdpmonctl remove --help"),
        (["list", "--json"], "expected one argument", "xdpmonctl list --help"),
        (["list", "--no-leg"], "unknown option '--no-leg'", "did you mean '--no-legend'?"),
    ],
)
def test_mistypes_are_refused_with_a_suggestion(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(words)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize("words", [["--help"], ["deny", "--help"], ["--version"], ["list", "--version"]])
def test_help_and_version_end_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(("usage: xdpmonctl", "xdpmonctl "))
