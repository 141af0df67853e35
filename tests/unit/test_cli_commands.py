"""Each command against a daemon written by hand: what it asks, what it prints, and the status it ends with."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from xdpmond.cli import main as entry
from xdpmond.cli.parser import COMMANDS
from xdpmond.errors import ERRORS, LockOutError, XdpmondError

NOW = 1_700_000_000.0
ESCAPE = "\x1b[31mred"
try:
    SSH = socket.getservbyport(22, "tcp")
except OSError:
    SSH = "-"
"""What this system calls port 22: /etc/services belongs to a package that need not be installed."""


def row(**values: Any) -> dict[str, Any]:
    return {"prefix": "203.0.113.0/24", "family": "ipv4", "verdict": "deny", "origin": "operator", "source": "", "reason": "",
            "created": NOW, "expires": None, "packets": 12, "bytes": 1234, "partial": False, "effective": True, **values}  # fmt: skip


def talker(**values: Any) -> dict[str, Any]:
    return {"source": "203.0.113.9", "family": "ipv4", "protocol": "tcp", "port": 22, "packets": 1200, "bytes": 72000, "syns": 3,
            "first_seen": NOW - 60, "last_seen": NOW - 5, "verdict": "log", "rule": "default", "icmp_type": None,
            "packets_per_second": 20.0, "bytes_per_second": 1200.5, "country": None, "as_number": None, "as_name": None,
            **values}  # fmt: skip


def port(**values: Any) -> dict[str, Any]:
    running = {"ipv4": 12, "ipv6": 3, "packets": 5, "bytes": 300, "exact": True, "error": None}
    return {"protocol": "tcp", "protocol_num": 6, "port": 22, "icmp_type": None, "sources": {"ipv4": 1234, "ipv6": 56}, "running": running,
            "packets": 1234567, "bytes": 7654321, "exact": True, "error": None, **values}  # fmt: skip


def flow(**values: Any) -> dict[str, Any]:
    return {"source": "203.0.113.9", "destination": "192.0.2.1", "source_port": 40312, "port": 22, "protocol": "tcp", "protocol_num": 6,
            "icmp_type": None, "interface": "eth0", "family": "ipv4", "packets": 1200, "bytes": 72000, "tcp_flags": "SPA",
            "first_seen": NOW - 60, "last_seen": NOW - 5, "verdict": "log", "action": "PASS", "active": True, **values}  # fmt: skip


def window(number: int, **values: Any) -> dict[str, Any]:
    return {"number": number, "started": NOW - 60 * (9 - number), "ended": NOW - 60 * (8 - number), "packets": 100 * number,
            "bytes": 6000 * number, "dropped": 0, "unique": {"ipv4": 3, "ipv6": 1}, "exact": True, "late": False, **values}  # fmt: skip


def event(**values: Any) -> dict[str, Any]:
    return {"timestamp": NOW, "interface": "eth0", "vlan": None, "family": "ipv4", "src_ip": "203.0.113.9", "dst_ip": "192.0.2.1",
            "src_port": 40312, "dst_port": 22, "protocol": "tcp", "packet_size": 60, "action": "DROP", "verdict": "deny",
            "rule": "203.0.113.0/24", "suppressed": 0, **values}  # fmt: skip


def described(**values: Any) -> dict[str, Any]:
    return {
        "version": "0.1.0", "uptime_seconds": 4000, "mode": "monitor", "file_mode": "monitor", "mode_source": "file", "default": "log",
        "interfaces": [{"name": "eth0", "state": "attached", "attach": "native", "reason": "", "mode": "monitor", "notes": []}],
        "policy": {"entries": 9, "allow": 7, "deny": 2, "expiring": 0, "next_expiry": None},
        "totals": {"packets": 10, "dropped": {"packets": 0}, "logged": {"packets": 3}, "allowed": {"packets": 7},
                   "denied_passed": {"packets": 0}, "essential": {"packets": 0}},
        "rates": {"packets_per_second": 5, "bytes_per_second": 500, "dropped_per_second": 0, "interval_seconds": 10},
        "books": {"evicted": {"packets": 0}, "untracked": {"packets": 0}, "balanced": True},
        "window": {"started": NOW - 70, "length_seconds": 60, "late": False, "unique_sources": {"ipv4": 3, "ipv6": 1}}, "top": [talker()],
        "losses": {"ring_full": 0, "over_budget": 0, "merged": 0, "queue_full": {"journal": 0}, "journal_held_back": 0},
        "anomalies": {"truncated": 0}, "last_reload": None,
        "tables": {"talkers": {"entries": 12, "capacity": 262144, "load": 0.0, "exact": True,
                               "slices": [{"entries": entries, "capacity": 131072, "load": entries / 131072} for entries in (3, 9)]}},
        "maps": {"bytes": 17_500_000, "each": []}, **values,
    }  # fmt: skip


class FakeDaemon:
    """Answers from attributes and remembers what it was asked. With `error` it raises that instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answer: dict[str, Any] = {"notes": []}
        self.rows: list[dict[str, Any]] = []
        self.ports_rows: list[dict[str, Any]] = []
        self.windows_rows: list[dict[str, Any]] = []
        self.status = described()
        self.error: XdpmondError | None = None
        self.interrupt = False

    def _reply(self, *call: Any) -> dict[str, Any]:
        self.calls.append(call)
        if self.error:
            raise self.error
        return self.answer

    def _lines(self, *call: Any, rows: list[dict[str, Any]] | None = None) -> Iterator[bytes]:
        self._reply(*call)
        for item in self.rows if rows is None else rows:
            yield json.dumps(item).encode() + b"\n"
        if self.interrupt:
            raise KeyboardInterrupt

    def describe(self) -> dict[str, Any]:
        self._reply("describe")
        return self.status

    def change(self, verdict: str, prefixes: Sequence[str], options: Mapping[str, object]) -> dict[str, Any]:
        return self._reply("change", verdict, list(prefixes), dict(options))

    def change_from_file(self, verdict: str, descriptor: int, options: Mapping[str, object]) -> dict[str, Any]:
        return self._reply("change_from_file", verdict, os.pread(descriptor, 1 << 20, 0).decode(), dict(options))

    def remove(self, prefixes: Sequence[str], options: Mapping[str, object]) -> dict[str, Any]:
        return self._reply("remove", list(prefixes), dict(options))

    def explain(self, address: str) -> dict[str, Any]:
        return self._reply("explain", address)

    def set_mode(self, mode: str, options: Mapping[str, object]) -> dict[str, Any]:
        return self._reply("set_mode", mode, dict(options))

    def confirm(self) -> dict[str, Any]:
        return self._reply("confirm")

    def reload(self, options: Mapping[str, object]) -> dict[str, Any]:
        return self._reply("reload", dict(options))

    def entries(self) -> Iterator[bytes]:
        return self._lines("entries")

    def top(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._lines("top", dict(options))

    def ports(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._lines("ports", dict(options), rows=self.ports_rows)

    def windows(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._lines("windows", dict(options), rows=self.windows_rows)

    def flows(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._lines("flows", dict(options))

    def events(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._lines("events", dict(options))

    def follow_events(self) -> Iterator[bytes]:
        return self._lines("follow_events")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def ctl(fake: FakeDaemon, *words: str, environ: Mapping[str, str] | None = None, terminal: bool = False) -> Result:
    out, err = Terminal() if terminal else io.StringIO(), io.StringIO()
    surroundings = {"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "80", **(environ or {})}
    status = entry.run(words, out, err, environ=surroundings, connect=lambda bus, _: fake, clock=lambda: NOW)
    return Result(status, out.getvalue(), err.getvalue())


@pytest.fixture
def fake() -> FakeDaemon:
    return FakeDaemon()


def unpainted(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# Exit statuses and messages


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_each_error_has_its_status(fake: FakeDaemon, code: str) -> None:
    fake.error = ERRORS[code]("what is wrong", hint="what to do\nand then")
    done = ctl(fake, "status")
    assert done.status == ERRORS[code].exit_status
    assert (done.out, done.err) == ("", "xdpmonctl: what is wrong\n  what to do\n  and then\n")


@pytest.mark.parametrize("words", [["staus"], ["list", "--nonsense"], ["list", "--json=no"], ["mode", "fast"], ["top", "--limit", "x"]])
def test_usage_errors_ask_nothing(fake: FakeDaemon, words: list[str]) -> None:
    done = ctl(fake, *words)
    assert (done.status, done.out, fake.calls) == (2, "", [])
    assert done.err.startswith("xdpmonctl: ")
    assert done.err.count("\n") >= 2


@pytest.mark.parametrize("command", [command.name for command in COMMANDS if command.name != "check-config"])
def test_errors_are_text_also_with_json(fake: FakeDaemon, command: str) -> None:
    fake.error = LockOutError(ESCAPE, hint=ESCAPE)
    operands = {"allow": ["192.0.2.1"], "deny": ["192.0.2.1"], "remove": ["192.0.2.1"], "explain": ["192.0.2.1"], "mode": ["enforce"]}
    done = ctl(fake, command, *operands.get(command, []), "-j")
    assert (done.status, done.out, done.err) == (7, "", "xdpmonctl: \\x1b[31mred\n  \\x1b[31mred\n")


@pytest.mark.parametrize("command", ["allow", "deny", "remove"])
@pytest.mark.parametrize(
    "prefix", ["192.0.2.1/24", "::ffff:192.0.2.1", "fe80::1%eth0", "example.org", "10.1", "010.0.0.1", "192.0.2.0/255.255.255.0"]
)
def test_prefixes_are_checked_before_the_call(fake: FakeDaemon, command: str, prefix: str) -> None:
    done = ctl(fake, command, "192.0.2.1", prefix)
    assert (done.status, done.out, fake.calls) == (6, "", [])
    assert prefix in done.err
    assert "\n  " in done.err


# Changes


def test_deny_says_what_was_done(fake: FakeDaemon) -> None:
    applied = row(expires=NOW + 600, reason=ESCAPE, replaced=True)
    fake.answer = {"applied": [applied, row(prefix="2001:db8::/32")], "mode": "monitor", "notes": ["nothing is dropped in monitor mode"]}
    done = ctl(fake, "deny", "203.0.113.0/24", "2001:db8::/32", "--for", "10m")
    until = time.strftime("%H:%M:%S", time.localtime(NOW + 600))
    assert done.out.splitlines() == [
        f"203.0.113.0/24 denied for 10m, until {until}: \\x1b[31mred (in place of an older entry)",
        "2001:db8::/32 denied",
        "note: nothing is dropped in monitor mode",
    ]
    assert fake.calls == [("change", "deny", ["203.0.113.0/24", "2001:db8::/32"], {"seconds": 600.0})]


def test_allow_carries_all_options(fake: FakeDaemon) -> None:
    environ = {"SSH_CONNECTION": "2001:db8::7%eth0 1 2001:db8::1 22"}
    assert ctl(fake, "allow", "192.0.2.1", "--reason", "mine", "--force", environ=environ).status == 0
    assert fake.calls == [("change", "allow", ["192.0.2.1/32"], {"force": True, "reason": "mine", "peers": ["2001:db8::7"]})]


@pytest.mark.parametrize(
    ("connection", "peers"),
    [
        ("", []),
        ("192.0.2.7 1 192.0.2.1 22", ["192.0.2.7"]),
        ("::ffff:192.0.2.7 1 x 22", ["192.0.2.7"]),
        ("rm -rf x y", []),
        ("\x1b[m 1 2 3", []),
    ],
)
def test_only_an_address_is_a_peer(fake: FakeDaemon, connection: str, peers: list[str]) -> None:
    ctl(fake, "remove", "192.0.2.1", environ={"SSH_CONNECTION": connection})
    assert fake.calls == [("remove", ["192.0.2.1/32"], {"peers": peers} if peers else {})]


@pytest.mark.parametrize(
    "words", [["deny"], ["deny", "192.0.2.1", "--from-file", "x"], ["deny", "192.0.2.1", "--for", "10"], ["allow", "::1", "--for", "0s"]]
)
def test_changes_that_mean_nothing(fake: FakeDaemon, words: list[str]) -> None:
    done = ctl(fake, *words)
    assert (done.status, fake.calls) == (2, [])


def test_prefixes_from_a_file(fake: FakeDaemon, tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("192.0.2.1\n# comment\n")
    fake.answer = {"applied": 1, "notes": []}
    done = ctl(fake, "deny", "--from-file", str(path), "--for", "1d")
    assert done.out == "1 prefix denied\n"
    assert fake.calls == [("change_from_file", "deny", "192.0.2.1\n# comment\n", {"seconds": 86400.0})]


@pytest.mark.parametrize("name", ["/nonexistent", "/"])
def test_a_file_that_cannot_be_read(fake: FakeDaemon, name: str) -> None:
    done = ctl(fake, "deny", "--from-file", name)
    assert (done.status, fake.calls) == (1, [])
    assert f"cannot read '{name}'" in done.err


def test_very_many_prefixes_travel_as_a_file(fake: FakeDaemon) -> None:
    prefixes = [f"10.{index >> 8}.{index & 255}.0/24" for index in range(1000)]
    fake.answer = {"applied": 1000, "notes": []}
    assert ctl(fake, "allow", *prefixes).out == "1,000 prefixes allowed\n"
    assert fake.calls == [("change_from_file", "allow", "\n".join(prefixes), {})]


def test_remove(fake: FakeDaemon) -> None:
    assert ctl(fake, "remove", "203.0.113.0/24", "--force").out == "203.0.113.0/24 removed\n"
    assert fake.calls == [("remove", ["203.0.113.0/24"], {"force": True})]


# Mode


def test_mode_is_shown(fake: FakeDaemon) -> None:
    assert ctl(fake, "mode").out == "monitor\n"
    fake.status = described(mode="enforce", mode_source="operator")
    assert ctl(fake, "mode").out.splitlines() == [
        "enforce (set by xdpmonctl; the files say monitor, to which `xdpmonctl mode default` goes back)", "monitor on eth0",
    ]  # fmt: skip
    assert ctl(fake, "mode", "--interface", "eth0").out == "monitor\n"
    shown = json.loads(ctl(fake, "mode", "-j").out)
    assert shown["interfaces"] == [{"name": "eth0", "mode": "monitor"}]
    assert (shown["mode"], shown["file_mode"], shown["mode_source"], shown["default"]) == ("enforce", "monitor", "operator", "log")


def test_mode_of_no_interface(fake: FakeDaemon) -> None:
    assert ctl(fake, "mode", "--interface", "eth7").status == 5
    assert ctl(fake, "mode", "--confirm", "60s").status == 2


def test_mode_is_set(fake: FakeDaemon) -> None:
    fake.answer = {"mode": "enforce", "notes": ["a note"]}
    done = ctl(fake, "mode", "enforce", "--interface", "eth0", "--confirm", "1m", "--force")
    assert done.out.splitlines() == ["enforce on eth0", "it goes back in 1m unless you run: xdpmonctl confirm", "note: a note"]
    assert fake.calls == [("set_mode", "enforce", {"force": True, "interface": "eth0", "confirm": 60.0})]


def test_confirm_and_reload(fake: FakeDaemon) -> None:
    fake.answer = {"mode": "enforce"}
    assert ctl(fake, "confirm").out == "enforce is kept\n"
    fake.answer = {"message": "2 entries more", "notes": []}
    assert ctl(fake, "reload").out == "2 entries more\n"
    assert json.loads(ctl(fake, "reload", "-j").out) == fake.answer
    ctl(fake, "reload", "--force")
    assert fake.calls == [("confirm",), ("reload", {}), ("reload", {}), ("reload", {"force": True})]


# Lists


def test_list_in_a_pipe_is_exact(fake: FakeDaemon) -> None:
    fake.rows = [
        row(prefix="10.0.0.0/8", verdict="allow", origin="configuration", source="/etc/x.toml:12", packets=1234567, bytes=7654321),
        row(expires=NOW + 60, reason=ESCAPE, partial=True), row(prefix="2001:db8::/32", effective=False),
    ]  # fmt: skip
    lines = ctl(fake, "list").out.splitlines()
    assert [re.split("  +", line) for line in lines[1:4]] == [
        ["10.0.0.0/8", "allow", "configuration", "-", "1234567", "7654321", "/etc/x.toml:12"],
        [
            "203.0.113.0/24",
            "deny",
            "operator",
            datetime.fromtimestamp(NOW + 60).astimezone().isoformat(timespec="seconds"),
            "≥12",
            "≥1234",
            "\\x1b[31mred",
        ],
        ["2001:db8::/32", "deny", "operator", "-", "12", "1234", "(hidden by a stronger entry)"],
    ]
    assert lines[-1] == "3 entries"
    assert len(ctl(fake, "list", "--no-legend").out.splitlines()) == 3


def test_list_on_a_terminal(fake: FakeDaemon) -> None:
    fake.rows = [row(expires=NOW + 60, packets=1234567, bytes=7654321), row(partial=True)]
    done = ctl(fake, "list", terminal=True, environ={"COLUMNS": "120"})
    assert "─" in done.out
    for text in ("in 1m", " 1,234,567", " 7.65 MB", "≥ 12 ", "≥ 1.23 kB"):
        assert text in done.out
    assert done.out.count("≥") == 2


@pytest.mark.parametrize(("width", "missing"), [(120, set()), (80, {"ORIGIN"}), (60, {"ORIGIN", "BYTES", "PACKETS"})])
@pytest.mark.parametrize("command", [["list"], ["explain", "203.0.113.9"]])
def test_entries_fit_the_terminal(fake: FakeDaemon, command: list[str], width: int, missing: set[str]) -> None:
    reason = "knocks at each door there is " * 5
    fake.rows = [row(prefix="2001:db8:1234:5678::/64", expires=NOW + 3000, reason=reason), row()]
    fake.answer = {"address": "203.0.113.9", "verdict": "deny", "action": "DROP", "text": reason, "covering": fake.rows}
    lines = unpainted(ctl(fake, *command, terminal=True, environ={"COLUMNS": str(width)}).out).splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    (titles,) = [line.split() for line in lines if "PREFIX" in line]
    assert {"PREFIX", "VERDICT", "ORIGIN", "EXPIRES", "PACKETS", "BYTES", "REASON"} - set(titles) == missing
    assert " ".join(lines).count("knocks") >= 5, "the text is whole"


def test_an_empty_list(fake: FakeDaemon) -> None:
    assert "no entries" in ctl(fake, "list").out
    assert ctl(fake, "list", "-j").out == "[]\n"
    assert ctl(fake, "list", "--no-legend").out == ""


@pytest.mark.parametrize("command", ["list", "top", "flows"])
def test_lists_as_json_are_the_daemons_rows(fake: FakeDaemon, command: str) -> None:
    fake.rows = [row(reason=ESCAPE + "\x7f\x9b\u202e"), row(), {"unknown": {"to": ["this", "client"]}}]
    for form in ("short", "pretty"):
        done = ctl(fake, command, f"--json={form}")
        assert json.loads(done.out) == fake.rows
        assert done.out.isascii()
        assert done.out.replace("\n", "").isprintable()


def cells(line: str) -> list[str]:
    return re.split("  +", line)


def moment(when: float) -> str:
    return datetime.fromtimestamp(when).astimezone().isoformat(timespec="seconds")


def test_top(fake: FakeDaemon) -> None:
    fake.rows = [
        talker(),
        talker(source="2001:db8::9", protocol="icmpv6", port=None, icmp_type=128, verdict="deny", rule="2001:db8::/32", partial=True),
    ]
    words = ["--by", "syn", "--limit", "5", "--port", "22", "--proto", "TCP", "--prefix-len", "24", "--prefix-len6", "48", "--no-local"]
    lines = ctl(fake, "top", "--interval", *words).out.splitlines()
    first, seen = moment(NOW - 60), moment(NOW - 5)
    assert [cells(line) for line in lines] == [
        ["SOURCE", "TO", "PACKETS", "PACKETS/S", "BYTES", "BYTES/S", "SYNS", "SYNS/S", "VERDICT", "RULE", "FIRST", "SEEN"],
        ["203.0.113.9", "tcp/22", "1200", "20", "72000", "1200.5", "3", "0.05", "log", "default", first, seen],
        ["2001:db8::9", "icmpv6 echo-request", "≥1200", "20", "≥72000", "1200.5", "≥3", "0.05", "deny", "2001:db8::/32", first, seen],
    ]
    asked = {"by": "syn", "limit": 6, "port": 22, "protocol": "tcp", "interval": True, "local": False}
    assert fake.calls == [("top", asked | {"prefix_length": 24, "prefix_length6": 48})]
    ctl(fake, "top", "--local")
    assert fake.calls[-1] == ("top", {"by": "bytes", "limit": 21, "local": True})
    ctl(fake, "top", "-j")
    assert fake.calls[-1] == ("top", {"by": "bytes", "limit": 20})


@pytest.mark.parametrize("command", ["top", "flows", "ports"])
def test_a_table_says_that_there_is_more(fake: FakeDaemon, command: str) -> None:
    total = port(protocol=None, port=None, total=True)
    fake.rows, fake.ports_rows = [flow(port=number) for number in (1, 2, 3)], [*(port(port=number) for number in (1, 2, 3)), total]
    said = "only the first 2; --limit shows more"
    hidden = {"hidden": {"local": {"ipv4": 2, "ipv6": 1}}}
    for extra in ([], [hidden] if command == "top" else []):
        fake.rows += extra
        lines = ctl(fake, command, "--limit", "2").out.splitlines()
        rest = ["total"] * (command == "ports") + ["only"] + ["without"] * len(extra)
        assert said in lines and [line.split()[0] for line in lines[3:]] == rest
    assert said not in ctl(fake, command, "--limit", "3").out
    assert len(ctl(fake, command, "--limit", "2", "--no-legend").out.splitlines()) == 2


def test_top_of_prefixes_says_how_many_sources_each_has(fake: FakeDaemon) -> None:
    fake.rows = [talker(source="203.0.113.0/24", sources=7, verdict="mixed", rule="mixed"), talker(sources=1)]
    assert [cells(line)[:3] for line in ctl(fake, "top").out.splitlines()[:2]] == [
        ["SOURCE", "SOURCES", "TO"],
        ["203.0.113.0/24", "7", "tcp/22"],
    ]
    fake.rows = [talker(sources=1)]
    assert cells(ctl(fake, "top").out.splitlines()[0])[:2] == ["SOURCE", "TO"]


def test_top_says_that_local_sources_are_hidden(fake: FakeDaemon) -> None:
    fake.rows = [talker(), {"hidden": {"local": {"ipv4": 2, "ipv6": 1}}}]
    lines = ctl(fake, "top").out.splitlines()
    assert len(lines) == 3
    assert lines[-1] == "without 3 local sources; --local shows them"
    assert len(ctl(fake, "top", "--no-legend").out.splitlines()) == 1


def test_top_names_the_owner_of_an_address_where_that_is_known(fake: FakeDaemon) -> None:
    fake.rows = [talker(), talker(country="DE", as_number=64500, as_name=f"Net {ESCAPE}")]
    lines = ctl(fake, "top").out.splitlines()
    assert [cells(line)[-2:] for line in lines] == [["COUNTRY", "AS"], ["-", "-"], ["DE", "AS64500 Net \\x1b[31mred"]]


LONG = "2001:db8:1234:5678:9abc:def0:1234:567"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("command", ["top", "flows"])
@pytest.mark.parametrize("colour", ["always", "never"])
def test_tables_of_traffic_fit_the_terminal_and_keep_the_addresses(fake: FakeDaemon, command: str, width: int, colour: str) -> None:
    sources = ["203.0.113.9", *(f"{LONG}{index}" for index in range(3))]
    if command == "top":
        fake.rows = [talker(source=source, protocol="icmpv6", port=None, icmp_type=135, packets=10**8) for source in sources]
    else:
        fake.rows = [flow(source=source, destination=f"{LONG}f", source_port=65535) for source in sources]
    done = ctl(fake, command, f"--color={colour}", terminal=True, environ={"COLUMNS": str(width)})
    lines = unpainted(done.out).splitlines()
    assert all(len(line) <= width or (LONG in line and len(line.split()) == 1) for line in lines), "only an address is ever wider"
    for source in sources:
        assert sum(source in line for line in lines) == 1
    key = next(at for at, line in enumerate(lines) if "BYTES" in line)
    assert width < 80 or ("VERDICT" in lines[key] if command == "top" else "PROTOCOL" in lines[key])


def test_top_on_a_terminal_shows_what_matters_in_80_columns(fake: FakeDaemon) -> None:
    fake.rows = [talker(source=f"203.0.113.{index}", packets=123456, bytes=10**9) for index in range(100, 120)]
    lines = screen(fake, "top", SSH_CONNECTION="203.0.113.101 1 192.0.2.1 22")
    assert cells(lines[0].strip()) == ["SOURCE", "TO", "BYTES", "BYTES/S", "SYNS", "VERDICT", "RULE", "FIRST"]
    assert cells(lines[3].strip())[0] == "203.0.113.101 (you)"
    assert len(lines) == 22, "with the prompt and the command they are a screen"


def test_flows(fake: FakeDaemon) -> None:
    fake.rows = [
        flow(), flow(source="2001:db8::9", destination="2001:db8::1", protocol="icmpv6", port=None, source_port=None, icmp_type=128,
                     tcp_flags="", verdict="deny", action="DROP"),
    ]  # fmt: skip
    words = ["--by", "packets", "--limit", "7", "--port", "22", "--proto", "tcp", "--address", "203.0.113.9"]
    lines = ctl(fake, "flows", *words).out.splitlines()
    assert [cells(line)[:9] for line in lines] == [
        ["SOURCE", "DESTINATION", "PROTOCOL", "PACKETS", "PACKETS/S", "BYTES", "BYTES/S", "FLAGS", "VERDICT"],
        ["203.0.113.9:40312", "192.0.2.1:22", "tcp", "1200", "21.818", "72000", "1309.091", "SPA", "log"],
        ["2001:db8::9", "2001:db8::1", "icmpv6 echo-request", "1200", "21.818", "72000", "1309.091", "-", "DROP"],
    ]
    assert fake.calls == [("flows", {"by": "packets", "limit": 8, "port": 22, "protocol": "tcp", "address": "203.0.113.9"})]
    fake.rows = []
    assert ctl(fake, "flows").out.splitlines()[-1] == "no flow was seen lately"
    assert ctl(fake, "flows", "--port", "1").out.splitlines()[-1] == "no flow was seen like that"


def test_ports(fake: FakeDaemon) -> None:
    fake.ports_rows = [
        port(), port(protocol="icmp", port=None, icmp_type=8, exact=False, error=0.023), port(protocol="tcp", port=None, exact=False),
    ]  # fmt: skip
    lines = ctl(fake, "ports", "--limit", "3", "--proto", "ICMP", "--no-local", "--interval").out.splitlines()
    assert [cells(line) for line in lines] == [
        ["TO", "SERVICE", "IPV4", "IPV6", "ERROR", "PACKETS", "BYTES", "IPV4 NOW", "IPV6 NOW"],
        ["tcp/22", SSH, "1234", "56", "-", "1234567", "7654321", "12", "3"],
        ["icmp echo-request", "-", "~1234", "~56", "±2.3 %", "≥1234567", "≥7654321", "12", "3"],
        ["tcp", "-", "≥1234", "≥56", "-", "≥1234567", "≥7654321", "12", "3"],
        ["~ an estimate and its standard error; ≥ at least so many: the table was too small"],
    ]
    assert fake.calls == [("ports", {"limit": 4, "protocol": "icmp", "local": False, "interval": True})]


def test_ports_on_a_terminal(fake: FakeDaemon) -> None:
    fake.ports_rows = [port(), port(protocol="icmpv6", port=None, icmp_type=42)]
    lines = screen(fake, "ports")
    assert max(map(len, lines)) <= 80
    assert "ERROR" not in lines[0]
    assert lines[-1] == "IPV4, IPV6: distinct sources in the last full window; NOW: in the running one"
    assert cells(lines[-2].strip()) == ["icmpv6 type 42", *(["-"] if SSH != "-" else []), "1,234", "56", "1.23 M", "7.65 MB", "12", "3"]
    assert "NOW" not in screen(fake, "ports", "--interval")[0]
    fake.ports_rows[0].update(exact=False, error=0.023)
    assert "~ an estimate" in screen(fake, "ports")[-1]
    total = port(protocol=None, port=None, total=True, hidden={"local": {"ipv4": 2, "ipv6": 1}, "ports": 1})
    fake.ports_rows = [port(), total]
    lines = screen(fake, "ports")
    assert any(re.match(r"total +1,234 +56 ", line) for line in lines)
    assert lines[-2:] == ["without 3 local sources; --local shows them", "without 1 port that the setting `ports` leaves out"]
    assert not any("total" in line or "without" in line for line in screen(fake, "ports", "--no-legend"))
    nothing = {"sources": {"ipv4": 0, "ipv6": 0}, "packets": 0, "bytes": 0, "hidden": None}
    fake.ports_rows = [port(**nothing), total | nothing]
    assert screen(fake, "ports")[-1] == "the first window has not ended yet: what came in it stands under NOW"
    for rows in ([], [total | nothing | {"running": None}]):
        fake.ports_rows = rows
        assert screen(fake, "ports")[-1] == "no port was reached lately"


def test_explain(fake: FakeDaemon) -> None:
    fake.answer = {"address": "203.0.113.9", "verdict": "deny", "action": "LOG", "mode": "monitor", "text": f"line one\n{ESCAPE}",
                   "covering": [row(), row(prefix="203.0.0.0/16", verdict="allow")], "talkers": [talker()]}  # fmt: skip
    lines = ctl(fake, "explain", "203.0.113.9").out.splitlines()
    assert lines[:3] == ["203.0.113.9: verdict deny, action LOG", "  line one", "  \\x1b[31mred"]
    assert [line.split()[0] for line in lines if "/24" in line or "/16" in line] == ["203.0.113.0/24", "203.0.0.0/16"]
    assert lines[-1].startswith("tcp/22") and lines[-1].endswith(moment(NOW - 5))
    assert screen(fake, "explain", "203.0.113.9")[-1].rstrip().endswith("5s ago")
    fake.answer |= {"country": "NO", "as_number": 64500, "as_name": f"Example {ESCAPE}"}
    assert ctl(fake, "explain", "203.0.113.9").out.splitlines()[3] == "  NO, AS64500 Example \\x1b[31mred"
    fake.answer |= {"country": None, "as_name": None}
    assert ctl(fake, "explain", "203.0.113.9").out.splitlines()[3] == "  AS64500"
    assert ctl(fake, "explain", "203.0.113.0/24").status == 6
    assert ctl(fake, "explain", "localhost").status == 6


# Events


def test_events_as_lines(fake: FakeDaemon) -> None:
    fake.rows = [event(), {"lost": 7}, event(src_ip="2001:db8::9", dst_ip="2001:db8::1", vlan=12, suppressed=1200),
                 event(src_port=None, dst_port=None, protocol="icmp", rule=ESCAPE)]  # fmt: skip
    clock, day = (time.strftime(form, time.localtime(NOW)) for form in ("%H:%M:%S", "%Y-%m-%d"))
    assert ctl(fake, "events", "--limit", "4").out.splitlines() == [
        f"-- {day} --",
        f"{clock} DROP deny  203.0.113.9:40312 > 192.0.2.1:22 tcp 60 bytes on eth0, rule 203.0.113.0/24",
        "-- 7 events lost here: they came faster than they were read --",
        f"{clock} DROP deny  [2001:db8::9]:40312 > [2001:db8::1]:22 tcp 60 bytes on eth0 vlan 12, rule 203.0.113.0/24, 1,200 more like it"
        " before",
        f"{clock} DROP deny  203.0.113.9 > 192.0.2.1 icmp 60 bytes on eth0, rule \\x1b[31mred",
    ]
    assert fake.calls == [("events", {"limit": 4})]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 200])
def test_events_fit_the_terminal(fake: FakeDaemon, width: int) -> None:
    many, rule = {"suppressed": 1_234_567}, "2001:db8:1234:5678::/64"
    short, long = {"src_ip": "2001:db8::9", "dst_ip": "2001:db8::1"}, {"src_ip": f"{LONG}9", "dst_ip": f"{LONG}1"}
    fake.rows = [event(**ends, **more, rule=rule) for ends in ({}, short, long) for more in ({}, many)]
    lines = screen(fake, "events", "--no-legend", COLUMNS=str(width))
    assert max(map(len, lines)) <= max(width, 76), "nothing is longer but an IPv6 address with its port"
    text = " ".join(" ".join(lines).split())
    assert text.count(f"[{LONG}9]:40312 > [{LONG}1]:22 tcp") == 2
    assert text.count("203.0.113.9:40312 > 192.0.2.1:22 tcp") == 2
    assert text.count("1,234,567 more") == text.count(" more") == 3
    assert width < 200 or text.count(f"60 bytes on eth0, rule {rule}, 1,234,567 more like it before") == 3


def test_events_as_json_are_one_a_line(fake: FakeDaemon) -> None:
    fake.rows = [event(), {"lost": 7}, event(rule=ESCAPE)]
    done = ctl(fake, "events", "-j")
    assert [json.loads(line) for line in done.out.splitlines()] == fake.rows


def test_following_ends_by_interrupt_or_limit(fake: FakeDaemon) -> None:
    fake.rows = [{"lost": 1}, event(), event(), event()]
    fake.interrupt = True
    done = ctl(fake, "events", "-f")
    assert (done.status, done.err) == (0, "")
    done = ctl(fake, "events", "-f", "--limit", "2", "--no-legend")
    assert (done.status, len(done.out.splitlines())) == (0, 3)


def test_following_a_daemon_that_ends(fake: FakeDaemon) -> None:
    fake.rows = [event()]
    assert ctl(fake, "events", "-f").status == 3
    assert ctl(fake, "events", "-f", "--limit", "5").status == 3


def test_an_interrupt_elsewhere_is_quiet(fake: FakeDaemon) -> None:
    fake.interrupt = True
    done = ctl(fake, "list")
    assert (done.status, done.err) == (130, "")


# Colours


@pytest.mark.parametrize(
    ("words", "environ", "terminal", "painted"),
    [
        ([], {}, True, True), ([], {}, False, False), (["--color=always"], {}, False, True), (["--color=never"], {}, True, False),
        ([], {"NO_COLOR": "1"}, True, False), ([], {"NO_COLOR": ""}, True, True), (["--color=always"], {"NO_COLOR": "1"}, False, True),
        ([], {"TERM": "dumb"}, True, False), (["-j"], {}, True, False),
    ],
)  # fmt: skip
def test_when_colours_are_used(fake: FakeDaemon, words: list[str], environ: dict[str, str], terminal: bool, painted: bool) -> None:
    assert ("\x1b[" in ctl(fake, "status", *words, environ=environ, terminal=terminal).out) == painted


# The status screen


def screen(fake: FakeDaemon, *words: str, **environ: str) -> list[str]:
    done = ctl(fake, *words, environ=environ, terminal=True)
    assert (done.status, done.err) == (0, "")
    return unpainted(done.out).splitlines()


def test_status_in_a_quiet_hour(fake: FakeDaemon) -> None:
    lines = screen(fake)
    assert lines[0] == "MONITOR  nothing is dropped"
    assert lines[1] == "eth0      attached, native"
    assert "traffic   5 packets/s, 500 B/s, none dropped, over 10s" in lines
    assert "total     10 packets in 1h 6m, 3 unlisted, 7 allowed" in lines
    assert "policy    2 denied, 7 allowed, others: log" in lines
    assert "tables    12 of 262 k talkers (< 1 %), fullest CPU < 1 %, maps 17.5 MB" in lines
    assert f"top sources of 4 since {time.strftime('%H:%M:%S', time.localtime(NOW - 70))}" in lines
    assert lines[-2:] == [
        "next      xdpmonctl explain 203.0.113.9         the busiest source on no list",
        "          xdpmonctl deny 203.0.113.9 --for 10m  shut it out for ten minutes",
    ]
    assert "31m" not in ctl(fake, "status", terminal=True).out, "nothing is wrong, so nothing is red"


def test_status_shows_the_last_windows_and_the_busiest_ports(fake: FakeDaemon) -> None:
    fake.windows_rows = [window(number) for number in range(1, 9)]
    fake.ports_rows = [port(), port(port=443, sources={"ipv4": 7, "ipv6": 0}, exact=False, error=0.02), port(total=True)]
    lines = screen(fake)
    assert "windows   ▂▃▄▅▆▇▇█  most 13.3 packets/s in 8 windows of 1m" in lines
    assert "ports     tcp/22 1,290 sources, tcp/443 ~7" in lines
    assert ("ports", {"limit": 5, "interval": True}) in fake.calls
    assert len(lines) <= 23
    fake.ports_rows = [port(sources={"ipv4": 1, "ipv6": 0})]
    assert "ports     tcp/22 1 source" in screen(fake)
    painted = ctl(fake, "status", terminal=True).out
    assert "31m" not in painted, "nothing is wrong, so nothing is red"
    fake.windows_rows[3]["dropped"] = 5
    assert "\x1b[33m▅\x1b[0m" in ctl(fake, "status", terminal=True).out, "some were dropped"
    fake.windows_rows[3]["dropped"] = fake.windows_rows[3]["packets"] // 2 + 1
    assert "\x1b[31m▅\x1b[0m" in ctl(fake, "status", terminal=True).out, "most were"
    fake.windows_rows[7].update(ended=NOW + 940, packets=1000)  # late: long, and not busy
    assert screen(fake)[3].startswith("windows   ▂▃▄▅▆▇█▁  most 11.7 packets/s")


def test_status_in_the_first_window(fake: FakeDaemon) -> None:
    fake.ports_rows = [port(sources={"ipv4": 0, "ipv6": 0})]
    lines = screen(fake)
    assert not any(line.startswith("windows") for line in lines)
    assert "ports     tcp/22 15 sources" in lines
    assert ("ports", {"limit": 5, "interval": False}) in fake.calls


def test_status_of_a_daemon_that_knows_no_windows(fake: FakeDaemon) -> None:
    def unknown(_: object) -> Iterator[bytes]:
        raise XdpmondError("the running daemon does not take Windows as this client sends it")

    fake.windows = fake.ports = unknown  # type: ignore[method-assign]
    assert screen(fake)[0] == "MONITOR  nothing is dropped"


@pytest.mark.parametrize(("encoding", "bars"), [("utf-8", "▂▃▄▅▆▇▇█"), ("ascii", ".:-=+**#"), ("iso8859-1", ".:-=+**#")])
def test_bars_where_the_locale_has_none(fake: FakeDaemon, encoding: str, bars: str) -> None:
    fake.windows_rows = [window(number) for number in range(1, 9)]
    fake.status = described(window={"unique_sources": {"ipv4": 5}, "exact": False})
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    assert entry.run(["status"], out, io.StringIO(), environ={}, connect=lambda *_: fake, clock=lambda: NOW) == 0
    text = raw.getvalue().decode(encoding)
    assert f"windows   {bars}  most" in text
    assert "top sources of ≥ 5" in text if encoding == "utf-8" else "top sources of >= 5" in text


def attacked() -> dict[str, Any]:
    """As much to say as there can be."""
    count = {"packets": 10**9}
    interfaces = [
        {"name": f"enp{index}s0f1np1", "state": state, "attach": "generic", "reason": "MTU 9000 is more than the driver takes natively",
         "mode": "enforce", "notes": ["a GRO aggregate counts as one packet"]}
        for index, state in enumerate(["attached", "attached", "absent", "attached", "refused", "waiting"])
    ]  # fmt: skip
    return described(
        mode="enforce", mode_source="operator", interfaces=interfaces,
        totals=dict.fromkeys(("dropped", "logged", "allowed", "denied_passed", "essential"), count) | {"packets": 10**12},
        rates={"packets_per_second": 1_488_000, "bytes_per_second": 95e6, "dropped_per_second": 1_400_000, "interval_seconds": 10},
        policy={"deny": 999_999, "allow": 12, "expiring": 40_000, "next_expiry": NOW + 12},
        books={"evicted": count, "untracked": count, "balanced": False},
        window={"started": NOW - 90, "length_seconds": 75, "late": True, "unique_sources": {"ipv4": 10**7, "ipv6": 10**6}, "exact": False},
        top=[talker(source=f"2001:db8:1234:5678:9abc:def0:1234:567{index}", port=65535, packets=10**8, syns=10**8) for index in range(5)],
        losses={"ring_full": 10**6, "over_budget": 10**6, "merged": 10**6, "queue_full": {"journal": 5, "bus": 6},
                "journal_held_back": 10**6, "followers": 3, "log_queue": {"/var/log/a": 7, "/var/log/b": 10**6}, "log_disk": {"/x": 9}},
        anomalies={"truncated": 7, "bad-header": 9}, confirm={"mode": "monitor", "seconds_left": 42},
        last_reload={"when": NOW - 30, "ok": False, "message": "/etc/xdpmond/xdpmond.toml: interfaces.eth0.attach: 'nativ' is not known"},
    )  # fmt: skip


def test_status_fits_the_screen_when_all_is_wrong(fake: FakeDaemon) -> None:
    fake.status = attacked()
    fake.windows_rows = [window(number % 9 + 1, dropped=number, packets=10**9) for number in range(60)]
    fake.ports_rows = [port(protocol="icmpv6", port=None, icmp_type=135, sources={"ipv4": 0, "ipv6": 10**7}, exact=False)] * 5
    lines = screen(fake, "status")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 23
    assert lines[0] == "ENFORCE  dropping 1.40 M packets/s; unlisted ones pass and are reported"
    assert sum("2001:db8:1234" in line and "tcp/65535" in line for line in lines) >= 1
    assert any("xdpmonctl confirm" in line and "42s" in line for line in lines)
    assert any(line.startswith("top sources of ≥ 11,000,000 since ") for line in lines)
    fake.status["window"]["error"] = 0.023
    assert any(line.startswith("top sources of about 11,000,000 since ") for line in screen(fake, "status"))
    painted = ctl(fake, "status", terminal=True).out
    lost = next(line for line in ctl(fake, "status").out.splitlines() if line.startswith("lost") and "log files" in line)
    assert "1.00 M for log files (queue full)" in lost and "9 for log files (not written)" in lost and "3 for followers" in lost
    for label in ("lost", "books", "reload"):
        assert f"\x1b[1;31m{label:<10}" in painted
    assert "\x1b[1;31msampled" not in painted


def test_status_says_where_flows_go(fake: FakeDaemon) -> None:
    assert not any(line.startswith("flows") for line in screen(fake, "status"))
    flows = {"records": 1200, "capacity": 262144, "waiting": 0, "collector": None, "reachable": None, "exported": 0}
    fake.status = described(flows=flows)
    assert "flows     1.20 k of 262 k records" in screen(fake, "status")
    fake.status = described(flows=flows | {"collector": "192.0.2.1:4739", "reachable": True, "exported": 5_000_000})
    assert "flows     1.20 k of 262 k records, 5.00 M sent to 192.0.2.1:4739" in screen(fake, "status")
    fake.status["flows"]["reachable"] = False
    fake.status["losses"] |= {"flow_cache": 7, "ipfix": 9}
    assert any(line.endswith("which cannot be reached") for line in screen(fake, "status"))
    assert "lost      7 records of flows (no room), 9 records of flows (not received)" in screen(fake, "status")


def test_status_fits_the_screen_in_an_ordinary_attack(fake: FakeDaemon) -> None:
    everything = attacked()
    keys = ("mode", "rates", "policy", "window", "top", "losses", "anomalies", "totals")
    fake.status = described(**{key: everything[key] for key in keys}, interfaces=everything["interfaces"][:2])
    fake.windows_rows, fake.ports_rows = [window(number % 9 + 1) for number in range(60)], [port()] * 5
    lines = screen(fake, "status")
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80


def test_status_in_a_pipe_is_not_wrapped(fake: FakeDaemon) -> None:
    fake.status = attacked()
    lines = ctl(fake, "status").out.splitlines()
    assert any(line.startswith("total ") and line.endswith("essential") for line in lines)
    assert any("SYNS" in line for line in lines)


def test_status_marks_your_own_address_and_never_suggests_to_deny_it(fake: FakeDaemon) -> None:
    fake.status = described(top=[talker(), talker(source="198.51.100.8")])
    lines = screen(fake, SSH_CONNECTION="203.0.113.9 1 192.0.2.1 22")
    assert any(line.startswith("203.0.113.9 (you)") for line in lines)
    assert not any("deny 203.0.113.9" in line for line in lines)
    assert any("deny 198.51.100.8" in line for line in lines)


def test_status_suggests_no_ban_of_neighbours_and_of_the_quiet(fake: FakeDaemon) -> None:
    fake.status = described(top=[talker(source="fe80::1"), talker(source="198.51.100.8", packets=99)])
    lines = screen(fake)
    assert not any(" deny " in line or "explain fe80" in line for line in lines)
    assert any("explain 198.51.100.8" in line for line in lines)


def test_status_without_an_attached_interface(fake: FakeDaemon) -> None:
    fake.status = described(interfaces=[{"name": "eth9", "state": "absent", "reason": "", "mode": "monitor", "notes": []}], top=[])
    lines = screen(fake)
    assert lines[0] == "NOT WATCHING  no interface is attached: eth9"
    assert any("journalctl -u xdpmond" in line for line in lines)


def test_status_says_when_monitor_lets_denied_sources_in(fake: FakeDaemon) -> None:
    fake.status = described(totals={"packets": 10, "denied_passed": {"packets": 1500}})
    lines = screen(fake)
    assert lines[0] == "MONITOR  nothing is dropped; 1.50 k packets of denied sources were let in"
    assert any("xdpmonctl mode enforce --confirm 60s" in line for line in lines)
    # Refused there, since it would drop the answers to this host's own connections too.
    fake.status["default"] = "deny"
    assert not any("xdpmonctl mode enforce" in line for line in screen(fake))


def test_status_repeats_the_warnings_of_the_configuration(fake: FakeDaemon) -> None:
    fake.status = described(configuration={"warnings": [f"enforce with default = deny {'drops replies ' * 8}{ESCAPE}"]})
    text = "\n".join(screen(fake))
    assert "\nwarning   enforce with default = deny drops" in text
    assert "\\x1b[31mred" in text
    assert "\x1b[31m" not in ctl(fake, "status").out


def test_status_of_interfaces_in_different_modes(fake: FakeDaemon) -> None:
    interfaces = [
        {"name": name, "state": "attached", "attach": "native", "mode": mode} for name, mode in (("eth0", "enforce"), ("eth1", "monitor"))
    ]
    fake.status = described(mode="enforce", interfaces=interfaces)
    lines = screen(fake)
    assert lines[0] == "MIXED  denied sources are dropped, on eth0 alone"
    assert "eth1      attached, native, monitor" in lines


@pytest.mark.parametrize(
    "status",
    [
        {},
        {
            "interfaces": "none",
            "top": [None, 3],
            "rates": [],
            "losses": {"log_queue": 5, "queue_full": 3},
            "policy": None,
            "totals": {"packets": "x"},
        },
    ],
)
def test_status_of_an_unknown_daemon_is_shown_in_any_case(fake: FakeDaemon, status: dict[str, Any]) -> None:
    fake.status = status
    assert screen(fake)[0].startswith("NOT WATCHING")


def test_status_neutralises_what_comes_from_outside(fake: FakeDaemon) -> None:
    interfaces = [{"name": ESCAPE, "state": "attached", "attach": ESCAPE, "reason": ESCAPE, "mode": "monitor", "notes": [ESCAPE]}]
    reload, top = {"ok": False, "message": ESCAPE}, [talker(source=ESCAPE, protocol=ESCAPE)]
    fake.status = described(interfaces=interfaces, last_reload=reload, top=top, default=ESCAPE, anomalies={ESCAPE: 1})
    assert "\x1b" not in ctl(fake, "status").out


def test_status_as_json_is_the_document(fake: FakeDaemon) -> None:
    assert json.loads(ctl(fake, "-j").out) == fake.status
    assert json.loads(ctl(fake, "--json=pretty").out) == fake.status


def test_a_long_list_shows_each_entry_as_if_it_stood_alone() -> None:
    """Whatever it has in common with the one before it."""
    kinds: list[dict[str, Any]] = [
        {}, {"reason": "feed"}, {"effective": False}, {"expires": NOW + 60}, {"packets": 7}, {"partial": True}, {"prefix": ESCAPE},
    ]  # fmt: skip
    fake = FakeDaemon()
    rows = [row(**{"prefix": f"192.0.2.{number}/32", **kinds[number * number % len(kinds)]}) for number in range(60) for _ in range(2)]
    fake.rows = rows
    together = ctl(fake, "list", "--no-legend").out.splitlines()
    for line, alone in zip(together, rows, strict=True):
        fake.rows = [alone]
        assert line.split() == ctl(fake, "list", "--no-legend").out.split()
