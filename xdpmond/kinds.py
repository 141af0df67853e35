"""The kinds of value that a setting can have. A kind reads what TOML holds, checks it, and says for the manual page what is taken.

It raises `XdpmondError` without naming the place: whoever reads the file knows that.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from .errors import ConfigError
from .model import PROTOCOL_NAMES, Endpoint, Listen, Port, PortRange, Prefix
from .units import format_duration, parse_duration, parse_reason

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    form: str
    """What is taken, in words."""
    parse: Callable[[Any], T]
    show: Callable[[T], str]
    """A value as TOML."""


def refusal(value: object, wanted: str, hint: str = "") -> ConfigError:
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits, written in hexadecimal
        shown = "the number"
    return ConfigError(f"{shown if len(shown) <= 40 else shown[:37] + '...'} is not {wanted}", hint=hint)


def choice(of: type[E]) -> Kind[E]:
    names = [str(member) for member in of]

    def parse(value: object) -> E:
        if not isinstance(value, str) or value not in names:
            near = difflib.get_close_matches(value[:40], names, 1) if isinstance(value, str) else []
            raise refusal(value, f"one of {', '.join(names)}", hint=f"did you mean {near[0]}?" if near else "")
        return of(value)

    return Kind(" or ".join(f'"{name}"' for name in names), parse, lambda value: f'"{value}"')


def duration(low: float, high: float, *, or_zero: str = "") -> Kind[float]:
    form = f"a duration from {format_duration(low)} to {format_duration(high)}" + (f', or "0s" {or_zero}' if or_zero else "")

    def parse(value: object) -> float:
        if not isinstance(value, str):
            bare = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
            hint = f'write it with a unit: "{value}s" or "{value}m"' if bare else 'write for example "60s"'
            raise refusal(value, "a duration", hint=hint)
        seconds = parse_duration(value)
        if not (low <= seconds <= high or (or_zero and seconds == 0)):
            raise refusal(value, form)
        return seconds

    return Kind(form, parse, lambda seconds: f'"{format_duration(seconds)}"')


def number(low: int, high: int, *, power_of_two: bool = False) -> Kind[int]:
    form = f"{'a power of two' if power_of_two else 'a number'} from {low} to {high}"

    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise refusal(value, form)
        if power_of_two and value & (value - 1):
            raise refusal(value, form, hint=f"the nearest are {1 << (value.bit_length() - 1)} and {1 << value.bit_length()}")
        return value

    return Kind(form, parse, str)


_SIZE_UNITS = {"T": 1 << 40, "G": 1 << 30, "M": 1 << 20, "K": 1 << 10}


def size(low: int, high: int, *, or_zero: str = "") -> Kind[int]:
    """Bytes, written as a whole number with a unit."""

    def show(number: int) -> str:
        unit = next((unit for unit, factor in _SIZE_UNITS.items() if number and number % factor == 0), "")
        return f'"{number // _SIZE_UNITS.get(unit, 1)}{unit}"'

    form = f"a size from {show(low)} to {show(high)} in K, M, G or T" + (f', or "0" {or_zero}' if or_zero else "")

    def parse(value: object) -> int:
        match = re.fullmatch("([0-9]{1,12})([KMGT]?)", value) if isinstance(value, str) else None
        bytes_ = int(match[1]) * _SIZE_UNITS.get(match[2], 1) if match else -1
        if match is None or not (low <= bytes_ <= high or (or_zero and bytes_ == 0)):
            raise refusal(value, form, hint='write for example "100M"')
        return bytes_

    return Kind(form, parse, show)


def optional(of: Kind[str]) -> Kind[str]:
    """The same, or an empty string for none."""
    return Kind(f'{of.form}; or "" for none', lambda value: "" if value == "" else of.parse(value), of.show)


def auto(of: Kind[T]) -> Kind[T | None]:
    """The same, or "auto", which is None."""

    def parse(value: object) -> T | None:
        return None if value == "auto" else of.parse(value)

    return Kind(f'"auto" or {of.form}', parse, lambda value: '"auto"' if value is None else of.show(value))


def _parse_path(value: object, example: str = "/var/log/xdpmond/events.jsonl") -> str:
    if not isinstance(value, str) or not value.isprintable() or not value.startswith("/") or value.endswith("/"):
        raise refusal(value, "the path of a file", hint="write it in full, " + (f'for example "{example}"' if example else "from / on"))
    if os.path.normpath(value) != value:
        raise refusal(value, "a plain path", hint=f'write "{os.path.normpath(value)}"')
    return value


def _parse_paths(value: object) -> tuple[str, ...]:
    example = "/etc/xdpmond/blocked.txt"
    return _without_doubles([_parse_path(item, example) for item in _parse_list(value, "the paths of files")])


def _parse_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise refusal(value, "true or false")
    return value


def _parse_list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise refusal(value, f"a list of {what}")
    return value


def _without_doubles(items: list[T]) -> tuple[T, ...]:
    for item, number in Counter(items).items():
        if number > 1:
            raise ConfigError(f"{item} stands there twice")
    return tuple(items)


MOST_INTERFACES = 16
"""As many as the kernel side has slots for."""


def _parse_interfaces(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else _parse_list(value, "interface names")
    if not 1 <= len(names) <= MOST_INTERFACES:
        raise ConfigError(f"{len(names)} interfaces are given", hint=f"1 to {MOST_INTERFACES} can be watched")
    for name in names:
        if not isinstance(name, str) or not is_interface_name(name):
            raise refusal(name, "an interface name", hint='write for example "eth0", or "default" for that of the default route')
    return _without_doubles(names)


def is_interface_name(name: str) -> bool:
    """Would the kernel take it? (dev_valid_name)"""
    return 0 < len(name.encode(errors="replace")) < 16 and name not in (".", "..") and re.search(r"[/:\s\0]", name) is None


def _parse_ports(value: object) -> tuple[Port, ...]:
    ports = []
    for item in _parse_list(value, 'ports such as "tcp/22"'):
        match = re.fullmatch(r"(tcp|udp)/([1-9][0-9]{0,4})", item) if isinstance(item, str) else None
        if match is None or int(match[2]) > 65535:
            raise refusal(item, "a port", hint='write for example "tcp/22" or "udp/51820"')
        ports.append(Port(match[1], int(match[2])))
    return _without_doubles(ports)


def _parse_listen(value: object) -> Listen:
    example = 'write "127.0.0.1:9958", "[::1]:9958" or "unix:/run/xdpmond/metrics.sock"'
    if not isinstance(value, str):
        raise refusal(value, "an address to listen on", hint=example)
    if value.startswith("unix:"):
        path = _parse_path(value.removeprefix("unix:"), "unix:/run/xdpmond/metrics.sock")
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            raise refusal(path, f"short enough for a socket: {_LONGEST_SOCKET_PATH} bytes at most")
        return Listen(path=path)
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([1-9][0-9]{0,4})", value)
    if match is None or int(match[3]) > 65535:
        raise refusal(value, "an address and a port to listen on", hint=example)
    family, host = (socket.AF_INET6, match[1]) if match[1] else (socket.AF_INET, match[2])
    try:
        return Listen(socket.inet_ntop(family, socket.inet_pton(family, host)), int(match[3]))
    except OSError:
        raise refusal(host, "an IP address", hint=example) from None


_LONGEST_SOCKET_PATH = 107


def _parse_endpoint(value: object) -> Endpoint | None:
    if value == "":
        return None
    example = 'write "HOST:PORT", for example "192.0.2.1:4739", "collector.example.net:4739" or "[2001:db8::1]:4739"'
    name = r"(?!.{254})[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
    match = re.fullmatch(rf"(?:\[([0-9a-fA-F:.]+)\]|({name})):([1-9][0-9]{{0,4}})", value) if isinstance(value, str) else None
    if match is None or int(match[3]) > 65535:
        raise refusal(value, "a host and a port", hint=example)
    host = match[1] or match[2]
    try:
        if match[1]:
            host = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, host))
        elif re.fullmatch("[0-9.]+", host):
            socket.inet_pton(socket.AF_INET, host)
    except OSError:
        raise refusal(host, "an IP address", hint=example) from None
    return Endpoint(host, int(match[3]))


def _parse_users(value: object) -> tuple[str, ...]:
    items = _parse_list(value, "users, each with a hashed password")
    for item in items:
        if not isinstance(item, str) or re.fullmatch(r"[!-9;-~]{1,64}:scrypt:1[0-7]:8:1:[\w-]{22}:[\w-]{43}", item, re.ASCII) is None:
            # What stands there may be a password.
            raise ConfigError("not a user with a hashed password", hint="make the line with: xdpmond --hash-password NAME")
    names = [item.partition(":")[0] for item in items]
    _without_doubles(names)
    return tuple(items)


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1024:
        raise ConfigError("not a text of a line", hint='write it in quotes: "..."')  # it may be a secret, so it is not shown
    return value


def _parse_url(value: object) -> str:
    example = 'write for example "http://127.0.0.1:8086" or "unix:/run/influxdb/influxdb.sock"'
    if value == "":
        return ""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or " " in value:
        raise refusal(value, "a URL", hint=example)
    if value.startswith("unix:"):
        _parse_path(value.removeprefix("unix:"), "unix:/run/influxdb/influxdb.sock")
        return value
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        known = False
    if not known or parts.query or parts.fragment:
        raise refusal(value, "a URL", hint=example)
    if parts.username is not None:
        raise ConfigError("a URL with a user", hint="write user and password as settings of their own")
    return value.rstrip("/")


MOST_RANGES = 256
_PORT_EXAMPLE = 'write for example "tcp/22", "udp/8000-8100", "80", "sctp/*" or "icmp"'
_NUMBERS = {name: number for number, name in PROTOCOL_NAMES.items()}
_HAVE_PORTS = ("tcp", "udp", "sctp")


def _parse_ranges(value: object) -> tuple[PortRange, ...]:
    items = _parse_list(value, "ports")
    if len(items) > MOST_RANGES:
        raise ConfigError(f"{len(items)} items are given", hint=f"at most {MOST_RANGES}; a range is one")
    return _without_doubles([_parse_range(item) for item in items])


def _parse_range(item: object) -> PortRange:
    what = "a port, a range of ports or a protocol"
    if not isinstance(item, str):
        bare = isinstance(item, int) and not isinstance(item, bool) and 0 < item < 65536
        raise refusal(item, what, hint=f'write "{item}" for tcp, udp and sctp, or "tcp/{item}"' if bare else _PORT_EXAMPLE)
    number = re.fullmatch("[0-9]+(-[0-9]+)?", item) is not None
    name, slash, ports = ("", "/", item) if number else item.partition("/")
    if name not in _NUMBERS and not number:
        if name.lower() in _NUMBERS:
            raise refusal(item, what, hint=f'names are in lower case: "{item.lower()}"')
        turned = slash and ports in _HAVE_PORTS
        raise refusal(item, what, hint=f'write "{ports}/{name}"' if turned else f"{_PORT_EXAMPLE}; names of services are not looked up")
    if name and name not in _HAVE_PORTS:
        if slash:
            raise refusal(item, what, hint=f'{name} has no ports: write "{name}"')
        return PortRange(_NUMBERS[name])
    if not slash:
        raise refusal(item, what, hint=f'write "{name}/*" for all its ports')
    protocol = _NUMBERS[name] if name else None
    if ports == "*" and name:
        return PortRange(protocol)
    match = re.fullmatch("([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?", ports)
    if match is None:
        raise refusal(item, what, hint=_PORT_EXAMPLE)
    low, high = int(match[1]), int(match[2] or match[1])
    if max(low, high) > 65535:
        raise refusal(item, what, hint="ports are 1 to 65535")
    if low > high or match[2] == match[1]:
        said = f"{high}-{low}" if low > high else str(low)
        raise refusal(item, what, hint=f'write "{name}/{said}"' if name else f'write "{said}"')
    return PortRange(protocol, low, high)


def _parse_item(value: object) -> tuple[Prefix, str]:
    """One item of `allow` or `deny`: a prefix, or a table that adds a reason."""
    table = {"prefix": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("prefix"), str):
        raise refusal(value, "a prefix", hint='write for example "192.0.2.0/24" or { prefix = "192.0.2.0/24", reason = "why" }')
    unknown = table.keys() - {"prefix", "reason", "force"}
    if unknown:
        raise ConfigError(f"{show_key(min(unknown))} is unknown here", hint="an entry has prefix, reason and force")
    prefix = Prefix.parse(table["prefix"])
    reason, forced = table.get("reason", ""), _parse_switch(table.get("force", False))
    if not isinstance(reason, str):
        raise refusal(reason, "a reason", hint="write it as a string")
    if prefix.length == 0 and not forced:
        meant = f'{{ prefix = "{prefix}", force = true }}'
        raise ConfigError(f"{prefix} is every {prefix.family.label} source", hint=f"see the setting default, or write {meant}")
    return prefix, parse_reason(reason)


def _show_interfaces(names: tuple[str, ...]) -> str:
    return f'"{names[0]}"' if len(names) == 1 else _show_list(names)


def _show_list(values: tuple[Any, ...]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


SWITCH = Kind("true or false", _parse_switch, lambda value: str(value).lower())
INTERFACES = Kind("an interface name, or a list of them", _parse_interfaces, _show_interfaces)
PATH = Kind("the path of a file, from / on", _parse_path, lambda value: json.dumps(value))
NO_PATH = optional(Kind(PATH.form, lambda value: _parse_path(value, ""), PATH.show))
LISTEN = Kind('"ADDRESS:PORT", "[ADDRESS]:PORT" or "unix:PATH"', _parse_listen, lambda value: f'"{value}"')
ENDPOINT: Kind[Endpoint | None] = Kind('"HOST:PORT", "[ADDRESS]:PORT", or "" for none', _parse_endpoint, lambda value: f'"{value or ""}"')
USERS = Kind("a list of lines made by `xdpmond --hash-password`", _parse_users, _show_list)
TEXT = Kind("a text", _parse_text, lambda value: json.dumps(value))
URL = Kind('"http://HOST:PORT", "https://HOST:PORT", "unix:PATH", or "" for none', _parse_url, lambda value: f'"{value}"')
PORTS = Kind('a list of "tcp/NUMBER" and "udp/NUMBER"', _parse_ports, _show_list)
RANGES = Kind("a list of ports, ranges of ports and protocols", _parse_ranges, _show_list)
FILES = Kind("a list of files, each by its path from / on", _parse_paths, _show_list)
ENTRIES: Kind[Any] = Kind('a list of prefixes, each a string or { prefix = "...", reason = "..." }', _parse_item, _show_list)
"""Read item by item, since each has a line of its own."""


def show_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", key) else json.dumps(key[:40])
