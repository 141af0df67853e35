"""The settings: what can be set, how each is read, what it is when nobody sets it.

A setting is one row: a field of `Config` or of one of its tables, declared with its default, its kind (which reads and checks a value
and says what is taken) and its help. The field's name is the key in the file. Everything else follows from the rows: unknown keys are
refused with the nearest known one, and the list of settings in xdpmond.toml(5) is made from them.

The files are the vendor's, the administrator's, then the drop-ins by name. Later values replace earlier ones; lists of entries add up.
All is read before any of it counts: a `ConfigError` means that nothing was taken over.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast

from . import tomllines
from .errors import ConfigError, GuardError, XdpmondError
from .kinds import (
    ENTRIES,
    FILES,
    INTERFACES,
    PATH,
    PORTS,
    SWITCH,
    Kind,
    auto,
    choice,
    duration,
    is_interface_name,
    number,
    refusal,
    show_key,
    size,
)
from .model import AttachMode, Entry, Mode, Origin, Port, Prefix, Verdict
from .prefixes import Bulk, PrefixSet
from .prefixfile import read_list

T = TypeVar("T")


def _setting(default: T, kind: Kind[Any], help: str) -> T:
    """Declare a row. It is typed as its default is, so that the field's type is checked."""
    return field(default=default, metadata={"kind": kind, "help": " ".join(help.split())})


def _needed(kind: Kind[T], help: str) -> T:
    """Declare a row without a default: whoever writes the table writes it too."""
    return cast(T, field(metadata={"kind": kind, "help": " ".join(help.split())}))


class LogFormat(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"


# A row reads as a row, and its default is evaluated once, as it should be.
# ruff: noqa: RUF009
# fmt: off
@dataclass(frozen=True, slots=True)
class Interface:
    """`[interfaces.NAME]`: what differs on one interface. None: as everywhere."""

    attach: AttachMode | None = _setting(None, choice(AttachMode), "The `attach` of this interface.")
    mode: Mode | None = _setting(None, choice(Mode), "The `mode` of this interface.")


@dataclass(frozen=True, slots=True)
class Events:
    """`[events]`: samples of packets, for the journal and for whoever follows."""

    enable: bool = _setting(True, SWITCH, """
        Make samples of packets of denied and unlisted sources. If not, the program has no instruction for it; totals, talkers and
        summaries are there all the same. A change takes effect at the next start.""")
    interval: float = _setting(60.0, duration(1, 3600), """
        The first packet of a source on a port makes an event. More of the same make none for this long; the next event says how many
        there were.""")
    per_second: int = _setting(1000, number(1, 1_000_000), """
        The most events that a CPU makes in a second, whatever arrives. What is held back is counted, and shown in the status.""")
    ring_size: int = _setting(1048576, number(65536, 67108864, power_of_two=True), """
        Bytes of the buffer in which events wait for the daemon. A change takes effect at the next start.""")


@dataclass(frozen=True, slots=True)
class Tables:
    """`[tables]`: the sizes of the tables in the kernel. A change takes effect at the next start."""

    talkers: int | None = _setting(None, auto(number(1024, 4194304, power_of_two=True)), """
        Entries of the table of talkers, one for each source and port seen in a window, for each possible CPU; 64 bytes each. When it is
        full the oldest make room; their packets stay in the totals, and the status says how many there were. "auto" is 131072, and
        less where there are more than 8 CPUs: together 1048576, but at least 4096 for each.""")
    prefixes: int = _setting(1048576, number(1024, 16777216), "The most prefixes that the policy can hold.")
    rule_counters: int = _setting(16384, number(1024, 16777216), """
        The most entries whose packets and bytes are counted each by itself.""")

    def talkers_of_a_cpu(self, cpus: int) -> int:
        """Entries of one slice where there are so many possible CPUs: a power of two."""
        if self.talkers is not None:
            return self.talkers
        shares = 1 << max(cpus - 1, 0).bit_length()
        return max(min(131_072, 1_048_576 // shares), 4096)


@dataclass(frozen=True, slots=True)
class Journal:
    """`[journal]`: what goes to journald."""

    events_per_minute: int = _setting(60, number(0, 100_000), """
        The most events written in a minute. On a public server every visitor makes one, and each takes more than a kilobyte.
        What is held back is counted in the summary.""")


@dataclass(frozen=True, slots=True)
class Bus:
    """`[bus]`: D-Bus."""

    enable: bool = _setting(True, SWITCH, "Answer xdpmonctl and other programs on D-Bus.")


@dataclass(frozen=True, slots=True)
class Log:
    """`[[log]]`: a file to which all events are written, a line each. There may be several; those of all files add up. Nothing is forced to
    the disk: what the kernel has not written when the power fails is lost."""

    path: str = _needed(PATH, """
        Where the file is. The service may write below /var/log/xdpmond; for another place name its directory in `ReadWritePaths=`
        (systemctl edit xdpmond). A new file is readable for its group, in /var/log/xdpmond for adm.""")
    format: LogFormat = _setting(LogFormat.JSONL, choice(LogFormat), """
        "jsonl" is a JSON object a line, "csv" a header line and then a record a line by RFC 4180. The fields are those that
        `xdpmonctl events` gives.""")
    rotate_size: int = _setting(100 << 20, size(1 << 16, 1 << 40, or_zero="for any size"), """
        Begin a new file when this one has grown so large. The old one gets the time as a suffix to its name.""")
    rotate_age: float = _setting(0.0, duration(60, 31 * 86400, or_zero="for any age"), """
        Begin a new file in each such interval, counted from midnight UTC on 1 January 1970: "1d" is at midnight.""")
    keep: int = _setting(7, number(0, 10000), "How many old files are kept. The oldest ones are deleted.")
    compress: bool = _setting(True, SWITCH, "Compress old files with gzip.")
    source: str = field(default="", compare=False)
    """FILE:LINE. Not a setting."""


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, checked. `Config()` is what holds when no file says anything."""

    mode: Mode = _setting(Mode.MONITOR, choice(Mode), """
        "monitor" watches and drops nothing. "enforce" drops the packets of denied sources. A mode set by `xdpmonctl mode` wins over
        this one, until `xdpmonctl mode default`.""")
    default: Verdict = _setting(Verdict.LOG, choice(Verdict), """
        What to do with sources that no entry covers: "allow" passes them, "log" passes and reports them, "deny" drops them in enforce
        mode and reports them in monitor mode.""")
    interface: tuple[str, ...] = _setting(("default",), INTERFACES, """
        The interfaces to watch. "default" is that of the default route, found when there is one. An interface that is absent is
        waited for.""")
    attach: AttachMode = _setting(AttachMode.AUTO, choice(AttachMode), """
        Where packets are seen: "native" in the network driver, "generic" in the kernel's network core, which works with every driver but
        costs more. "auto" tries native first; the status says which it became, and why.""")
    allow: tuple[Entry, ...] = _setting((), ENTRIES, """
        The permitted sources. The lists of all files in /etc add up. The longest prefix that covers a source decides, so that
        a deny inside an allowed network works, and the other way round.""")
    deny: tuple[Entry, ...] = _setting((), ENTRIES, "The denied sources, in the same way.")
    allow_files: tuple[str, ...] = _setting((), FILES, """
        More permitted sources, in files of their own, which the service must be able to read: one prefix a line, `#` begins a comment. For
        long lists: a million prefixes take a second. The files named in all files in /etc add up. What `allow` and `deny` say of a
        prefix wins over the same prefix here.""")
    deny_files: tuple[str, ...] = _setting((), FILES, "More denied sources, in the same way.")
    failsafe_ports: tuple[Port, ...] = _setting((Port("tcp", 22),), PORTS, """
        Ports of this host that `default = "deny"` leaves open, so that nobody is locked out; a deny entry closes them too. No change
        that would cut off a peer connected to one of them is taken unless it is forced.""")
    force_default_deny: bool = _setting(False, SWITCH, """
        Permit enforce mode with `default = "deny"`. It also drops the answers to this host's own connections (DNS, package
        downloads, NTP) from sources that are not allowed.""")
    window: float = _setting(60.0, duration(1, 3600), "The length of the intervals for which talkers are counted.")
    summary_interval: float = _setting(60.0, duration(1, 86400, or_zero="for none"), """
        How often a summary with the top sources of that time is written to the journal.""")
    log_buffer_size: int = _setting(131072, number(1024, 4194304), """
        The most events that wait for each log file to be written, 65 bytes each. What finds no room is lost and counted.""")
    events: Events = field(default_factory=Events)
    tables: Tables = field(default_factory=Tables)
    journal: Journal = field(default_factory=Journal)
    bus: Bus = field(default_factory=Bus)
    log: tuple[Log, ...] = ()
    interfaces: Mapping[str, Interface] = field(default_factory=dict)
    lists: tuple[Bulk, ...] = ()
    """What stands in `allow_files` and `deny_files`. Not a setting."""
    files: tuple[str, ...] = ()
    """The files that were read. Not a setting."""
# fmt: on

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.allow + self.deny

    def count(self, verdict: Verdict) -> int:
        """How many prefixes are allowed, or denied."""
        entries = self.allow if verdict is Verdict.ALLOW else self.deny
        return len(entries) + sum(len(bulk.prefixes) for bulk in self.lists if bulk.verdict is verdict)

    def mode_on(self, interface: str) -> Mode:
        own = self.interfaces.get(interface)
        return own.mode if own and own.mode else self.mode

    def attach_on(self, interface: str) -> AttachMode:
        own = self.interfaces.get(interface)
        return own.attach if own and own.attach else self.attach


TABLES: dict[str, type] = {"events": Events, "tables": Tables, "journal": Journal, "bus": Bus}
ARRAYS: dict[str, type] = {"log": Log}
"""Arrays of tables."""
ANY_NAME = "NAME"
"""Stands for the interface in the path of a setting of `[interfaces.NAME]`."""
EACH = "[]"
"""Stands for the number in the path of a setting of an array of tables."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A row, as found in the declarations above."""

    path: tuple[str, ...]
    default: Any
    kind: Kind[Any]
    help: str

    @property
    def name(self) -> str:
        return _joined(self.path)

    @property
    def needed(self) -> bool:
        return self.default is dataclasses.MISSING


def _joined(path: tuple[str, ...]) -> str:
    return ".".join(part for part in path if part != EACH)


def _rows(of: type, path: tuple[str, ...] = ()) -> Iterator[Setting]:
    for row in dataclasses.fields(of):
        if row.metadata:
            yield Setting((*path, row.name), row.default, row.metadata["kind"], row.metadata["help"])


SETTINGS: dict[tuple[str, ...], Setting] = {
    row.path: row
    for path, of in [((), Config), *(((name,), table) for name, table in TABLES.items()), (("interfaces", ANY_NAME), Interface),
                     *(((name, EACH), table) for name, table in ARRAYS.items())]
    for row in _rows(of, path)
}
"""Every setting by its path, in the order of the manual page."""


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
                self._values[path] = parsed
        for name in ARRAYS:
            for index in range(len(document.get(name, ()))):
                self._add_item(place, name, index, items.get((name, index), {}))

    def _add_item(self, place: _Place, name: str, index: int, values: dict[str, Any]) -> None:
        needed = [row.path[-1] for row in SETTINGS.values() if row.needed and row.path[0] == name]
        for key in needed:
            if key not in values:
                raise place.error((name, index), ConfigError(f"{key} is missing", hint=f"each [[{name}]] has its own"))
        item = ARRAYS[name](**values, source=place.of((name, index)))
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
        config = Config(**self._under(), **tables, **arrays, interfaces=interfaces, files=files)
        config = dataclasses.replace(config, lists=self._read_lists(config.tables.prefixes))
        number = config.count(Verdict.ALLOW) + config.count(Verdict.DENY)
        if number > config.tables.prefixes:
            raise ConfigError(f"allow and deny hold {number} prefixes, tables.prefixes is {config.tables.prefixes}")
        return config

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
            return f"did you mean {_joined(candidates[near[0]])}?"
    return "see xdpmond.toml(5)"


def require_force(config: Config, forced: bool = False, mode: Mode | None = None) -> None:
    """Refuse to enforce `default = "deny"` unless that is said twice. `mode` is the one about to hold, if not the files'."""
    modes = {mode or config.mode, *(own.mode for own in config.interfaces.values())}
    if Mode.ENFORCE in modes and config.default is Verdict.DENY and not (forced or config.force_default_deny):
        raise GuardError(
            'enforce mode with default = "deny" also drops the answers to this host\'s own connections, such as DNS, apt and NTP, from'
            " sources that are not allowed, until replies are tracked",
            hint="allow those sources, then use --force or set force_default_deny = true",
        )


def config_warnings(config: Config) -> list[str]:
    """What is permitted but perhaps not meant."""
    warnings = []
    modes = {config.mode, *(own.mode for own in config.interfaces.values())}
    if Mode.ENFORCE not in modes and config.default is Verdict.DENY:
        warnings.append('default = "deny" in monitor mode: nothing is dropped')
    elif Mode.ENFORCE not in modes and config.count(Verdict.DENY):
        warnings.append("deny entries in monitor mode: nothing is dropped")
    if Mode.ENFORCE in modes and config.default is Verdict.DENY:
        warnings.append("answers to this host's own connections are dropped unless their sources are allowed (DNS, apt, NTP)")
    if not config.failsafe_ports:
        warnings.append("failsafe_ports is empty: nothing guards against locking yourself out")
    for name in config.interfaces:
        if name not in config.interface and "default" not in config.interface:
            warnings.append(f"[interfaces.{name}] has no effect: {name} is not among the interfaces to watch")
    return warnings
