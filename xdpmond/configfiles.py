"""The files that set what `config` declares: reading them, and making one configuration of them.

The files are the vendor's, the administrator's, then the drop-ins by name. Later values replace earlier ones; lists of entries add up.
All is read before any of it counts: a `ConfigError` means that nothing was taken over.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import tomllines
from .config import ANY_NAME, ARRAYS, EACH, SETTINGS, TABLES, Config, InfluxDB, Interface, LogFields, LogFormat, Metrics, Setting, joined
from .errors import ConfigError, XdpmondError
from .kinds import ENTRIES, FILES, Kind, is_interface_name, refusal, show_key
from .model import Entry, Origin, Prefix, Verdict
from .prefixes import Bulk, PrefixSet
from .prefixfile import read_list

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ConfigPaths:
    """Where the files are. Only `main` may be `required`: an administrator may delete any of them."""

    vendor: Path | None = Path("/usr/lib/xdpmond/xdpmond.toml")
    main: Path = Path("/etc/xdpmond/xdpmond.toml")
    dropins: Path = Path("/etc/xdpmond/xdpmond.toml.d")
    required: bool = False

    @classmethod
    def single(cls, file: str | Path) -> ConfigPaths:
        """One file named by hand, and its drop-ins."""
        return cls(vendor=None, main=Path(file), dropins=Path(f"{file}.d"), required=True)


def load(paths: ConfigPaths) -> Config:
    """Read and check all files. Raises `ConfigError` naming file, line and key."""
    found = _Found()
    if paths.vendor is not None:
        found.read(paths.vendor, vendor=True)
    found.read(paths.main, required=paths.required)
    for dropin in _dropins(paths.dropins):
        found.read(dropin, required=True)
    return found.config()


def _dropins(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.name.endswith(".toml") and not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from None


class _Found:
    """What the files read so far have set."""

    def __init__(self) -> None:
        self._values: dict[tomllines.Path, Any] = {}
        self._places: dict[tomllines.Path, str] = {}
        """Where each of these stands."""
        self._entries: dict[Prefix, Entry] = {}
        self._items: dict[str, dict[tuple[Any, ...], Any]] = {name: {} for name in ARRAYS}
        """The items of each array of tables by what no other one may have too."""
        self._lists: list[_List] = []
        self._files: list[str] = []

    def read(self, file: Path, *, vendor: bool = False, required: bool = False) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            document = tomllib.loads(text)
            lines = tomllines.locate(text)
        except FileNotFoundError:
            if required:
                raise ConfigError(f"{file}: no such file") from None
            return
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{file}: not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}") from None
        self._files.append(str(file))
        place = _Place(str(file), lines)
        items: dict[tuple[str | int, ...], dict[str, Any]] = {}
        for path, setting, value in _walk(document, (), place):
            parsed = None if setting.kind is ENTRIES else place.parse(path, setting.kind, value)
            if vendor and setting.kind in (ENTRIES, FILES):
                raise place.error(path, ConfigError("entries stand in the files in /etc only"))
            if len(path) == 3 and path[0] in ARRAYS:
                items.setdefault(path[:2], {})[str(path[2])] = parsed
            elif setting.kind is ENTRIES:
                self._add_entries(place, path, value)
            elif setting.kind is FILES:
                verdict = Verdict(str(path[0]).removesuffix("_files"))
                self._lists += [_List(verdict, file, place, (*path, index)) for index, file in enumerate(parsed or ())]
            else:
                self._values[path], self._places[path] = parsed, place.of(path)
        for name in ARRAYS:
            for index in range(len(document.get(name, ()))):
                self._add_item(place, name, index, items.get((name, index), {}))

    def _add_item(self, place: _Place, name: str, index: int, values: dict[str, Any]) -> None:
        needed = [row.path[-1] for row in SETTINGS.values() if row.needed and row.path[0] == name]
        for key in needed:
            if key not in values:
                raise place.error((name, index), ConfigError(f"{key} is missing", hint=f"each [[{name}]] has its own"))
        item = ARRAYS[name](**values, source=place.of((name, index)))
        if name == "log" and item.fields is not LogFields.XDPMOND and item.format is not LogFormat.JSONL:
            raise place.error((name, index, "fields"), ConfigError(f'"{item.fields}" is for format = "jsonl"', hint="leave it out"))
        same = tuple(values[key] for key in needed)
        before = self._items[name].setdefault(same, item)
        if before is not item:
            raise place.error((name, index), ConfigError(f"{same[0]} stands in {before.source} already", hint="delete one"))

    def _add_entries(self, place: _Place, path: tomllines.Path, items: object) -> None:
        if not isinstance(items, list):
            raise place.error(path, refusal(items, "a list of prefixes", hint='write for example ["192.0.2.0/24"]'))
        verdict = Verdict(str(path[0]))
        for index, item in enumerate(items):
            where: tomllines.Path = (*path, index)
            prefix, reason = place.parse(where, ENTRIES, item)
            entry = Entry(prefix, verdict, Origin.CONFIGURATION, reason=reason, source=place.of(where))
            before = self._entries.setdefault(prefix, entry)
            if before.verdict is not verdict:
                raise place.error(where, ConfigError(f"{prefix} stands under {before.verdict} too, in {before.source}", hint="delete one"))
            self._entries[prefix] = entry

    def config(self) -> Config:
        for verdict in (Verdict.ALLOW, Verdict.DENY):
            self._values[(verdict,)] = tuple(entry for entry in self._entries.values() if entry.verdict is verdict)
            self._values[(f"{verdict}_files",)] = tuple(dict.fromkeys(of.file for of in self._lists if of.verdict is verdict))
        tables: dict[str, Any] = {name: table(**self._under(name)) for name, table in TABLES.items()}
        names = {str(path[1]) for path in self._values if path[0] == "interfaces"}
        interfaces = {name: Interface(**self._under("interfaces", name)) for name in sorted(names)}
        arrays: dict[str, Any] = {name: tuple(self._items[name].values()) for name in ARRAYS}
        files = tuple(dict.fromkeys([*self._files, *(of.file for of in self._lists)]))
        places = {".".join(map(str, path)): place for path, place in self._places.items()}
        config = Config(**self._under(), **tables, **arrays, interfaces=interfaces, files=files, places=places)
        _check_metrics(config.metrics, self._contradiction)
        _check_influxdb(config.influxdb, self._contradiction)
        if config.ipfix.collector and not config.flows.enable:
            raise self._contradiction("ipfix", "collector", "there are no flows to send", "set enable = true in [flows]")
        config = dataclasses.replace(config, lists=self._read_lists(config.tables.prefixes))
        number = config.count(Verdict.ALLOW) + config.count(Verdict.DENY)
        if number > config.tables.prefixes:
            raise ConfigError(f"allow and deny hold {number} prefixes, tables.prefixes is {config.tables.prefixes}")
        return config

    def _contradiction(self, table: str, key: str, message: str, hint: str) -> ConfigError:
        """A setting that does not go with others of its table."""
        place = self._places.get((table, key))
        return ConfigError(f"{f'{place}: ' if place else ''}{table}.{key}: {message}", hint=hint)

    def _read_lists(self, most: int) -> tuple[Bulk, ...]:
        """The files of prefixes, without what is named elsewhere too."""
        named = {
            verdict: PrefixSet.of(prefix for prefix, entry in self._entries.items() if entry.verdict is verdict)
            for verdict in (Verdict.ALLOW, Verdict.DENY)
        }
        found: list[tuple[_List, PrefixSet]] = []
        for of in self._lists:
            prefixes = of.read(most)
            other = Verdict.ALLOW if of.verdict is Verdict.DENY else Verdict.DENY
            if prefix := prefixes.common(named[other]):
                raise of.contradiction(prefix, prefixes, other, self._entries[prefix].source)
            for before, earlier in found:
                if before.verdict is other and (prefix := prefixes.common(earlier)):
                    raise of.contradiction(prefix, prefixes, other, f"{before.file}:{earlier.line_of(prefix)}")
            found.append((of, prefixes))
        lists: list[Bulk] = []
        for of, prefixes in reversed(found):  # the last one that names a prefix has it
            prefixes = prefixes.without(named[of.verdict])
            for later in lists:
                prefixes = prefixes.without(later.prefixes)
            lists.append(Bulk(prefixes, of.verdict, Origin.CONFIGURATION, source=of.file))
        return tuple(reversed(lists))

    def _under(self, *table: str) -> dict[str, Any]:
        return {str(path[-1]): value for path, value in self._values.items() if path[:-1] == table}


Contradiction = Callable[[str, str, str, str], ConfigError]


def _check_metrics(of: Metrics, error: Contradiction) -> None:
    """Refuse settings of `[metrics]` that do not go together."""
    if bool(of.certificate) != bool(of.key):
        given, missing = ("certificate", "key") if of.certificate else ("key", "certificate")
        raise error("metrics", given, f"{missing} is missing", "TLS needs both")
    if of.certificate and of.listen.path:
        raise error("metrics", "certificate", "a Unix socket needs no TLS", "leave out certificate and key")
    if of.textfile and not of.textfile.endswith(".prom"):
        raise error("metrics", "textfile", f"{of.textfile} does not end in .prom", "node_exporter reads no other files")
    if of.enable and not of.listen.local and not of.insecure and not (of.certificate and of.users):
        missing = "users" if of.certificate else "certificate and key" if of.users else "certificate, key and users"
        raise error("metrics", "listen", f"{of.listen} can be reached by others than this host, and {missing} are not set",
                    "set them, or listen on 127.0.0.1, or set insecure = true if that is meant")  # fmt: skip


def _check_influxdb(of: InfluxDB, error: Contradiction) -> None:
    """Refuse settings of `[influxdb]` that do not go together."""
    if not of.url:
        return
    if bool(of.database) == bool(of.bucket):
        message = "database or bucket is missing" if not of.bucket else "database and bucket are both set"
        raise error("influxdb", "url", message, "database is for InfluxDB 1, bucket and organization for InfluxDB 2")
    if of.bucket and not of.organization:
        raise error("influxdb", "bucket", "organization is missing", "a bucket belongs to one")
    if of.bucket and not of.token:
        raise error("influxdb", "bucket", "token is missing", "InfluxDB 2 wants one")
    if of.retention_policy and not of.database:
        raise error("influxdb", "retention_policy", "a bucket has its own", "leave it out")
    if bool(of.user) != bool(of.password):
        given, missing = ("user", "password") if of.user else ("password", "user")
        raise error("influxdb", given, f"{missing} is missing", "set both or none")
    if of.user and of.token:
        raise error("influxdb", "token", "user is set too", "leave out one of them")


@dataclass(frozen=True, slots=True)
class _Place:
    """A file, and where in it things are."""

    file: str
    lines: Mapping[tomllines.Path, int]

    def of(self, path: tomllines.Path) -> str:
        line = self.lines.get(path)
        return f"{self.file}:{line}" if line else self.file

    def error(self, path: tomllines.Path, error: XdpmondError) -> ConfigError:
        key = ".".join(show_key(key) for key in path if isinstance(key, str))
        return ConfigError(f"{self.of(path)}: {key}: {error.message}", hint=error.hint)

    def parse(self, path: tomllines.Path, kind: Kind[T], value: object) -> T:
        try:
            return kind.parse(value)
        except XdpmondError as error:
            raise self.error(path, error) from None


@dataclass(frozen=True, slots=True)
class _List:
    """A file of prefixes, and where it is named."""

    verdict: Verdict
    file: str
    place: _Place
    path: tomllines.Path

    def read(self, most: int) -> PrefixSet:
        try:
            prefixes = read_list(self.file, most)
        except XdpmondError as error:
            raise self.place.error(self.path, error) from None
        for prefix in prefixes.of_length(0):
            where = f"{self.file}:{prefixes.line_of(prefix)}"
            hint = f'write {{ prefix = "{prefix}", force = true }} under {self.verdict}'
            raise self.place.error(self.path, ConfigError(f"{where}: {prefix} is every {prefix.family.label} source", hint=hint))
        return prefixes

    def contradiction(self, prefix: Prefix, prefixes: PrefixSet, other: Verdict, source: str) -> ConfigError:
        message = f"{self.file}:{prefixes.line_of(prefix)}: {prefix} stands under {other} too, in {source}"
        return self.place.error(self.path, ConfigError(message, hint="delete one"))


def _walk(table: dict[str, Any], path: tomllines.Path, place: _Place) -> Iterator[tuple[tomllines.Path, Setting, Any]]:
    """The settings in a document, each with its path and what stands there."""
    for key, value in table.items():
        here = (*path, key)
        row = _row_of(here)
        if here in (("interfaces",), *((name,) for name in TABLES)) or (here[0] == "interfaces" and len(here) == 2):
            if not isinstance(value, dict):
                hint = f"write [{'.'.join(map(str, here))}] on a line by itself, and its settings below"
                raise place.error(here, refusal(value, "a table", hint=hint))
            if len(here) == 2 and not is_interface_name(key):
                raise place.error(here, ConfigError("not an interface name"))
            yield from _walk(value, here, place)
        elif len(here) == 1 and key in ARRAYS:
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                hint = f"write [[{key}]] on a line by itself, and its settings below"
                raise place.error(here, refusal(value, "an array of tables", hint=hint))
            for index, item in enumerate(value):
                yield from _walk(item, (key, index), place)
        elif row in SETTINGS:
            yield here, SETTINGS[row], value
        else:
            raise place.error(here, ConfigError("unknown key", hint=_guess_key(here, row, value)))


def _row_of(path: tomllines.Path) -> tuple[str, ...]:
    """The path of a setting in the table of settings."""
    if path[0] == "interfaces" and len(path) > 1:
        return ("interfaces", ANY_NAME, *map(str, path[2:]))
    return tuple(EACH if isinstance(part, int) else part for part in path)


def _guess_key(path: tomllines.Path, row: tuple[str, ...], value: object) -> str:
    if path[0] == "interfaces" and isinstance(value, dict):
        return f'a name with a dot needs quotes: [interfaces."{path[1]}.{show_key(str(path[2]))}"]'
    if len(path) > 1 and row[-1:] in SETTINGS:
        return f"{row[-1]} belongs above the first [table] line: what follows one belongs to that table"
    names = (*SETTINGS, *((name,) for name in (*TABLES, *ARRAYS, "interfaces")))
    siblings = {known[-1]: known for known in names if known[:-1] == row[:-1]}
    others = {known[-1]: known for known in SETTINGS}
    for candidates in (siblings, others):
        near = difflib.get_close_matches(row[-1][:40], candidates, 1)
        if near:
            return f"did you mean {joined(candidates[near[0]])}?"
    return "see xdpmond.toml(5)"
