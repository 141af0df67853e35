"""The kinds of value that a setting can have. A kind reads what TOML holds, checks it, and says for the manual page what is taken.

It raises `XdpmondError` without naming the place: whoever reads the file knows that.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from .errors import ConfigError
from .model import Port, Prefix
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


def auto(of: Kind[T]) -> Kind[T | None]:
    """The same, or "auto", which is None."""

    def parse(value: object) -> T | None:
        return None if value == "auto" else of.parse(value)

    return Kind(f'"auto" or {of.form}', parse, lambda value: '"auto"' if value is None else of.show(value))


def _parse_path(value: object, example: str = "/var/log/xdpmond/events.jsonl") -> str:
    if not isinstance(value, str) or not value.isprintable() or not value.startswith("/") or value.endswith("/"):
        raise refusal(value, "the path of a file", hint=f'write it in full, for example "{example}"')
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
PORTS = Kind('a list of "tcp/NUMBER" and "udp/NUMBER"', _parse_ports, _show_list)
FILES = Kind("a list of files, each by its path from / on", _parse_paths, _show_list)
ENTRIES: Kind[Any] = Kind('a list of prefixes, each a string or { prefix = "...", reason = "..." }', _parse_item, _show_list)
"""Read item by item, since each has a line of its own."""


def show_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", key) else json.dumps(key[:40])
