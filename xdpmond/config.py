"""The settings: what can be set, how each is read, what it is when nobody sets it.

A setting is one row: a field of `Config` or of one of its tables, declared with its default, its kind (which reads and checks a value
and says what is taken) and its help. The field's name is the key in the file. Everything else follows from the rows: unknown keys are
refused with the nearest known one, and the list of settings in xdpmond.toml(5) is made from them.

How files set them is in `configfiles`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar, cast

from .errors import ConfigError, GuardError
from .kinds import (
    ENDPOINT,
    ENTRIES,
    FILES,
    INTERFACES,
    LISTEN,
    NO_PATH,
    PATH,
    PORTS,
    RANGES,
    SWITCH,
    TEXT,
    URL,
    USERS,
    Kind,
    auto,
    choice,
    duration,
    number,
    size,
)
from .model import AttachMode, Endpoint, Entry, Listen, Mode, Port, PortRange, Verdict
from .prefixes import Bulk

T = TypeVar("T")


def _setting(default: T, kind: Kind[Any], help: str) -> T:
    """Declare a row. It is typed as its default is, so that the field's type is checked."""
    return field(default=default, metadata={"kind": kind, "help": " ".join(help.split())})


def _needed(kind: Kind[T], help: str) -> T:
    """Declare a row without a default: whoever writes the table writes it too."""
    return cast(T, field(metadata={"kind": kind, "help": " ".join(help.split())}))


class Destination(StrEnum):
    """Which packets count by their source."""

    ANY = "any"
    LOCAL = "local"


class LogFormat(StrEnum):
    CONSOLE = "console"
    JSONL = "jsonl"
    CSV = "csv"


class LogFields(StrEnum):
    XDPMOND = "xdpmond"
    ECS = "ecs"


def _parse_log_format(value: object) -> LogFormat:
    if value == "json":
        # An array is valid only with its last bracket, and whatever comes after that would have to be written over it.
        raise ConfigError(
            "'json' would be one array, and no file that grows is a valid one at every moment",
            hint='write "jsonl": an object a line, which can be read while it grows; jq -s makes an array of it',
        )
    return choice(LogFormat).parse(value)


_LOG_FORMAT = dataclasses.replace(choice(LogFormat), parse=_parse_log_format)


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
        Entries of the table of talkers, one for each source and port seen in a window, for each possible CPU; 64 bytes each. With
        `flows.enable` it has one for each flow, of 112 bytes. When it is full the oldest make room; their packets stay in the totals, and
        the status says how many there were. "auto" is 131072, and less where there are more than 8 CPUs: together 1048576, but at least
        4096 for each.""")
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
class Metrics:
    """`[metrics]`: figures for Prometheus and what reads its format. No address of a source is among them, but in `list`."""

    enable: bool = _setting(False, SWITCH, """
        Serve the metrics over HTTP, under /metrics. This needs the package python3-prometheus-client.""")
    listen: Listen = _setting(Listen("127.0.0.1", 9958), LISTEN, """
        Where to serve them. An address that others than this host can reach needs `certificate`, `key` and `users`, unless `insecure` is
        set. A Unix socket is for whoever belongs to the group xdpmond.""")
    certificate: str = _setting("", NO_PATH, "A file with the certificate for TLS, and those that sign it, which the service can read.")
    key: str = _setting("", NO_PATH, "A file with its key, which the service can read. Both files are read again at a reload.")
    users: tuple[str, ...] = _setting((), USERS, """
        Who may read them, by basic authentication; everybody who can connect if it is empty. A line for each, made by
        `xdpmond --hash-password NAME`, which asks for the password and writes a salted hash of it.""")
    insecure: bool = _setting(False, SWITCH, "Serve them without TLS, or to everybody, at an address that others than this host can reach.")
    list: bool = _setting(False, SWITCH, """
        Serve the sources of the last full window too, each with its port, under /list: a JSON array of objects with "ip", "network",
        "transport" and "port".""")
    active_users: bool = _setting(False, SWITCH, """
        Give the sources by port also as `active_users` with the labels network, transport and port, as xdp-ip-counter names them.""")
    max_ports: int = _setting(100, number(0, 65536), """
        The most ports that have figures of their own: those with the most sources. The packets and bytes of all others are added up.""")
    refresh: float = _setting(5.0, duration(1, 300), "How often the figures are read. Whoever asks gets the latest, and does not wait.")
    textfile: str = _setting("", NO_PATH, """
        Write the metrics to this file, whose name ends in .prom, at each refresh: for the text-file collector of Prometheus's
        node_exporter, in place of a server or besides it. Needs python3-prometheus-client. The service may write where
        `ReadWritePaths=` says (systemctl edit xdpmond), for example /var/lib/prometheus/node-exporter.""")


@dataclass(frozen=True, slots=True)
class InfluxDB:
    """`[influxdb]`: the same figures, written to InfluxDB in its line protocol whenever a window has ended."""

    url: str = _setting("", URL, "Where it is. An https certificate must be signed by an authority that this host knows, or by `ca`.")
    database: str = _setting("", TEXT, "The database, of InfluxDB 1. It has to exist.")
    retention_policy: str = _setting("", TEXT, 'The retention policy, of InfluxDB 1; "" is the database\'s default.')
    bucket: str = _setting("", TEXT, "The bucket, of InfluxDB 2, in place of `database`.")
    organization: str = _setting("", TEXT, "The organization that has the bucket.")
    user: str = _setting("", TEXT, "The user, of InfluxDB 1, if it wants one.")
    password: str = _setting("", TEXT, """
        The password of that user. Keep secrets in a file of their own in /etc/xdpmond/xdpmond.toml.d that only root and the group xdpmond
        can read.""")
    token: str = _setting("", TEXT, "The token, of InfluxDB 2, in place of user and password.")
    ca: str = _setting("", NO_PATH, "A file with the certificate of the authority that signed that of an https server.")


@dataclass(frozen=True, slots=True)
class Names:
    """`[names]`: what is known of the addresses that are shown. The files are in MaxMind's format (.mmdb), which others publish too.
    Reading them needs the package python3-maxminddb. A reload opens them again."""

    country: str = _setting("", NO_PATH, """
        A database of countries or cities, which the service must be able to read. Talkers are shown with the country.""")
    asn: str = _setting("", NO_PATH, """
        A database of autonomous systems, likewise. Talkers are shown with the number and the name of theirs.""")


@dataclass(frozen=True, slots=True)
class Flows:
    """`[flows]`: what came from one source, address and port, to one destination by one protocol."""

    enable: bool = _setting(False, SWITCH, """
        Count flows, for `xdpmonctl flows` and for `[ipfix]`. Each takes an entry in the table of talkers (`tables.talkers`), of 112 bytes
        then. A change takes effect at the next start.""")
    active_timeout: float = _setting(300.0, duration(1, 86400), """
        The record of a flow that goes on ends after so long, and another one begins. Flows are counted by windows (`window`), so a record
        ends with one: up to a window later.""")
    inactive_timeout: float = _setting(30.0, duration(1, 86400), """
        The record of a flow ends when nothing has come for so long, again up to a window later. That of a TCP connection ends 2 s after its
        FIN or RST.""")
    records: int = _setting(262144, number(1024, 16777216), """
        The most records that are kept, 109 bytes each while there are so many. A flow that finds no room makes a record that ends with its
        window, and is not shown. A change takes effect at the next start.""")


@dataclass(frozen=True, slots=True)
class IPFIX:
    """`[ipfix]`: records of flows for a collector, as IPFIX (RFC 7011) over UDP. `flows.enable` has to be set."""

    collector: Endpoint | None = _setting(None, ENDPOINT, """
        Where to send them; 4739 is the port for IPFIX. The datagrams are not encrypted, and whoever sees them sees who talked to this host.
        A name is looked up again when the collector does not answer, and at each `template_interval`.""")
    observation_domain: int = _setting(1, number(0, 4294967295), """
        The number by which the collector tells these records from those of other exporters on this host.""")
    template_interval: float = _setting(60.0, duration(1, 3600), """
        How often the templates are sent, without which a collector cannot read the records: one that was restarted waits for them.""")
    packet_size: int = _setting(1400, number(512, 8952), """
        The most bytes of a datagram, without the 28 or 48 of its UDP and IP headers. What does not fit the path is sent in fragments.""")


@dataclass(frozen=True, slots=True)
class Log:
    """`[[log]]`: a file to which all events are written, a line each. There may be several; those of all files add up. Nothing is forced to
    the disk: what the kernel has not written when the power fails is lost."""

    path: str = _needed(PATH, """
        Where the file is. The service may write below /var/log/xdpmond; for another place name its directory in `ReadWritePaths=`
        (systemctl edit xdpmond). A new file is readable for its group, in /var/log/xdpmond for adm.""")
    format: LogFormat = _setting(LogFormat.JSONL, _LOG_FORMAT, """
        "jsonl" is a JSON object a line, "csv" a header line and then a record a line by RFC 4180, both with the fields that
        `xdpmonctl events --json=short` gives. "console" is a line for a person, as `xdpmonctl events` prints it, with date and zone.""")
    fields: LogFields = _setting(LogFields.XDPMOND, choice(LogFields), """
        What the fields of "jsonl" are called: as in the journal and on the bus, or by the Elastic Common Schema ("ecs"), so that
        Elasticsearch takes the lines as they are.""")
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
        Destination ports that `default = "deny"` leaves open, so that nobody is locked out; a deny entry closes them too. They are open for
        what this host forwards as well; fragments behind the first are not let through, nor are ICMP errors. No change that would cut off
        a peer connected to one of them is taken unless it is forced.""")
    force_default_deny: bool = _setting(False, SWITCH, """
        Permit enforce mode with `default = "deny"`. It also drops the answers to this host's own connections (DNS, package
        downloads, NTP) from sources that are not allowed.""")
    window: float = _setting(60.0, duration(1, 3600), """
        The length of the intervals for which talkers are counted. When a talker was last seen is known to about a thirtieth of it, or
        better.""")
    destination: Destination = _setting(Destination.ANY, choice(Destination), """
        Of which packets talkers, sources by port and flows are counted: "any" is all of them, "local" those to this host's own addresses,
        to broadcast and to multicast addresses, without what it forwards. Verdicts and totals are those of all packets either way; what is
        left out is shown beside them, as `elsewhere`. A change takes effect at the next start.""")
    ports: tuple[PortRange, ...] = _setting((), RANGES, """
        The ports whose sources are shown by `xdpmonctl ports`, and exported: all that were reached if none are named. "tcp/22" is a port,
        "udp/8000-8100" a range, "80" that port of TCP, UDP and SCTP, "sctp/*" every port of SCTP, "icmp" all its types. What is counted
        does not depend on it; how many ports were left out is said.""")
    show_local: bool = _setting(True, SWITCH, """
        Show local sources among the talkers and count them among the sources of a port. Local are sources that no packet from the Internet
        has: 0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.168.0.0/16, ::, ::1, fc00::/7 and
        fe80::/10. If not, it is said how many were left out. `xdpmonctl --local` asks otherwise for one answer.""")
    summary_interval: float = _setting(60.0, duration(1, 86400, or_zero="for none"), """
        How often a summary with the top sources of that time is written to the journal.""")
    log_buffer_size: int = _setting(131072, number(1024, 4194304), """
        The most events that wait for each log file to be written, 65 bytes each. What finds no room is lost and counted.""")
    events: Events = field(default_factory=Events)
    tables: Tables = field(default_factory=Tables)
    journal: Journal = field(default_factory=Journal)
    bus: Bus = field(default_factory=Bus)
    names: Names = field(default_factory=Names)
    flows: Flows = field(default_factory=Flows)
    ipfix: IPFIX = field(default_factory=IPFIX)
    metrics: Metrics = field(default_factory=Metrics)
    influxdb: InfluxDB = field(default_factory=InfluxDB)
    log: tuple[Log, ...] = ()
    interfaces: Mapping[str, Interface] = field(default_factory=dict)
    lists: tuple[Bulk, ...] = ()
    """What stands in `allow_files` and `deny_files`. Not a setting."""
    files: tuple[str, ...] = ()
    """The files that were read. Not a setting."""
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """FILE:LINE of each setting that a file has, by its name as in "metrics.listen". Not a setting."""
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


@contextlib.contextmanager
def naming_the_place(config: Config) -> Iterator[None]:
    """What turns out only in use to be wrong with a setting is refused with the file and the line all the same."""
    try:
        yield
    except ConfigError as error:
        place = config.places.get(error.message.partition(":")[0])
        if place is None:
            raise
        raise ConfigError(f"{place}: {error.message}", hint=error.hint) from None



TABLES: dict[str, type] = {
    "events": Events, "tables": Tables, "journal": Journal, "bus": Bus, "names": Names, "metrics": Metrics, "influxdb": InfluxDB,
    "flows": Flows, "ipfix": IPFIX,
}  # fmt: skip
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
        return joined(self.path)

    @property
    def needed(self) -> bool:
        return self.default is dataclasses.MISSING


def joined(path: tuple[str, ...]) -> str:
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
