"""Settings: the table, the files and their merging, and that a refusal says where and what to do."""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.config import (
    ANY_NAME,
    EACH,
    SETTINGS,
    Config,
    Interface,
    Log,
    LogFormat,
    config_warnings,
    naming_the_place,
    require_force,
)
from xdpmond.configdoc import vendor_toml, with_settings
from xdpmond.configfiles import ConfigPaths, load
from xdpmond.errors import ConfigError, GuardError
from xdpmond.kinds import ENTRIES
from xdpmond.model import AttachMode, Endpoint, Listen, Mode, Origin, Port, PortRange, Verdict

ROOT = Path(__file__).parents[2]
MAN_PAGE = ROOT / "man" / "xdpmond.toml.5"


@pytest.fixture
def tree(tmp_path):
    """The three places, and a way to fill them."""

    class Tree:
        paths = ConfigPaths(tmp_path / "vendor.toml", tmp_path / "xdpmond.toml", tmp_path / "xdpmond.toml.d")

        def write(self, name, text):
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return file

        def load(self, text=None):
            if text is not None:
                self.write("xdpmond.toml", text)
            return load(self.paths)

        def refused(self, text):
            with pytest.raises(ConfigError) as caught:
                self.load(text)
            message = str(caught.value)
            assert message.startswith(f"{tmp_path}/"), message
            assert message.isprintable()
            assert len(message) < 400
            return message.removeprefix(f"{tmp_path}/")

    return Tree()


# --- the table


WITH_DEFAULT = [
    setting for setting in SETTINGS.values() if setting.kind is not ENTRIES and not setting.needed and ANY_NAME not in setting.path
]


@pytest.mark.parametrize("setting", WITH_DEFAULT, ids=lambda setting: setting.name)
def test_each_default_as_the_manual_shows_it_reads_back(setting):
    assert setting.kind.parse(tomllib.loads(f"x = {setting.kind.show(setting.default)}")["x"]) == setting.default


NOT_WITH_OTHERS = {("log", EACH, "fields"), *(("influxdb", name) for name in ("bucket", "organization", "token"))}
"""They do not go with those for CSV and for InfluxDB 1."""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tcp/22", PortRange(6, 22, 22)), ("udp/8000-8100", PortRange(17, 8000, 8100)), ("80", PortRange(None, 80, 80)),
        ("80-443", PortRange(None, 80, 443)), ("sctp/*", PortRange(132)), ("icmp", PortRange(1)), ("icmpv6", PortRange(58)),
        ("gre", PortRange(47)), ("tcp/1-65535", PortRange(6, 1, 65535)),
    ],
)  # fmt: skip
def test_ports_and_ranges_of_ports(tree, text, wanted):
    assert tree.load(f'ports = ["{text}"]').ports == (wanted,)
    assert str(wanted) == text


def test_each_setting_can_be_set_and_arrives(tree):
    lists = [json.dumps([str(tree.write(name, ""))]) for name in ("allowed", "denied")]
    config = tree.load(
        f"allow_files = {lists[0]}\ndeny_files = {lists[1]}"
        + """
        mode = "enforce"
        default = "deny"
        interface = ["eth0", "eth1"]
        attach = "generic"
        allow = ["10.0.0.0/8"]
        deny = [{ prefix = "192.0.2.1", reason = "scans" }]
        failsafe_ports = ["tcp/2222", "udp/51820"]
        force_default_deny = true
        window = "2m"
        destination = "local"
        ports = ["tcp/22", "icmp"]
        show_local = false
        summary_interval = "0s"
        log_buffer_size = 1024
        events = { enable = false, interval = "5s", per_second = 7, ring_size = 65536 }
        tables = { talkers = 2048, prefixes = 4096, rule_counters = 1024 }
        journal = { events_per_minute = 0 }
        bus.enable = false
        names = { country = "/usr/share/GeoIP/country.mmdb", asn = "/usr/share/GeoIP/asn.mmdb" }
        [metrics]
        enable = true
        listen = "[2001:db8::1]:9100"
        certificate = "/etc/xdpmond/metrics.crt"
        key = "/etc/xdpmond/metrics.key"
        users = ["prometheus:scrypt:14:8:1:AAAAAAAAAAAAAAAAAAAAAA:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]
        insecure = true
        list = true
        active_users = true
        max_ports = 7
        refresh = "15s"
        textfile = "/var/lib/prometheus/node-exporter/xdpmond.prom"
        [influxdb]
        url = "https://influx.example:8086"
        database = "net"
        retention_policy = "year"
        user = "xdpmond"
        password = "secret"
        ca = "/etc/ssl/influx.crt"
        [interfaces.eth1]
        attach = "native"
        mode = "monitor"
        [flows]
        enable = true
        active_timeout = "2m"
        inactive_timeout = "10s"
        records = 2048
        [ipfix]
        collector = "[2001:db8:0::1]:4739"
        observation_domain = 0
        template_interval = "10m"
        packet_size = 512
        [[log]]
        path = "/var/log/xdpmond/events.csv"
        format = "csv"
        rotate_size = "2M"
        rotate_age = "1d"
        keep = 3
        compress = false
    """
    )
    tree.write("xdpmond.toml", "")
    other = tree.load("""
        influxdb = { url = "unix:/run/influxdb.sock", bucket = "net", organization = "us", token = "secret" }
        log = [{ path = "/var/log/xdpmond/ecs.jsonl", fields = "ecs" }]
    """)
    for path, setting in SETTINGS.items():
        value = other if path in NOT_WITH_OTHERS else config
        for key in path:
            value = value["eth1"] if key == ANY_NAME else value[0] if key == EACH else getattr(value, key)
        assert value != setting.default, setting.name
    assert config.metrics.listen == Listen("2001:db8::1", 9100)
    assert config.ipfix.collector == Endpoint("2001:db8::1", 4739)
    assert config.failsafe_ports == (Port("tcp", 2222), Port("udp", 51820))
    assert config.ports == (PortRange(6, 22, 22), PortRange(1))
    assert (config.window, config.summary_interval, config.events.interval) == (120.0, 0.0, 5.0)
    assert config.interfaces == {"eth1": Interface(AttachMode.NATIVE, Mode.MONITOR)}
    assert (config.mode_on("eth0"), config.mode_on("eth1")) == (Mode.ENFORCE, Mode.MONITOR)
    assert (config.attach_on("eth0"), config.attach_on("eth1")) == (AttachMode.GENERIC, AttachMode.NATIVE)


# --- the shipped files and documents


def test_no_file_at_all_means_the_defaults(tree):
    assert tree.load() == Config()
    assert tree.load("") == Config(files=(str(tree.paths.main),))


def test_logs_add_up_in_the_order_of_the_files(tree):
    tree.write("xdpmond.toml.d/10-a.toml", '[[log]]\npath = "/var/log/a"\nrotate_size = "1G"\n[[log]]\npath = "/var/log/b"\n')
    tree.write("xdpmond.toml.d/20-b.toml", 'log = [{ path = "/var/log/c", rotate_age = "1h", rotate_size = "0" }]\n')
    config = tree.load('[[log]]\npath = "/srv/first"\nformat = "csv"\n')
    assert config.log == (
        Log("/srv/first", LogFormat.CSV), Log("/var/log/a", rotate_size=1 << 30), Log("/var/log/b"),
        Log("/var/log/c", rotate_age=3600.0, rotate_size=0),
    )  # fmt: skip
    before = tree.write("xdpmond.toml.d/30-d.toml", '\n\n[[log]]\npath = "/var/log/a"\n')
    assert tree.refused("") == (
        f"{before.parent.name}/30-d.toml:3: log: /var/log/a stands in {before.parent}/10-a.toml:1 already (delete one)"
    )


def test_the_vendor_file_is_current_and_changes_nothing(tree):
    assert (ROOT / "conf/vendor.toml").read_text() == vendor_toml(), "run: python3 -m xdpmond.configdoc conf/vendor.toml"
    tree.write("vendor.toml", vendor_toml())
    assert tree.load() == Config(files=(str(tree.paths.vendor),))


def test_the_conffile_watches_and_permits_private_networks(tree):
    config = tree.load((ROOT / "conf/xdpmond.toml").read_text())
    assert {str(e.prefix) for e in config.allow} == {
        "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7", "fe80::/10",
    }  # fmt: skip
    assert (config.mode, config.default, config.deny, config.interface) == (Mode.MONITOR, Verdict.LOG, (), ("default",))
    assert config_warnings(config) == []


def test_what_the_conffile_shows_commented_out_is_valid_too(tree):
    lines = (ROOT / "conf/xdpmond.toml").read_text().splitlines()
    text = "\n".join(
        line.replace("#", "", 1) if line.lstrip().startswith("#") and not line.lstrip().startswith("# ") else line for line in lines
    )
    config = tree.load(text)
    assert (len(config.allow), len(config.deny)) == (7, 2)
    assert (config.mode, config.default, config.interface, config.failsafe_ports) == (
        Config().mode,
        Config().default,
        Config().interface,
        Config().failsafe_ports,
    )


def test_the_strict_example(tree):
    config = tree.load((ROOT / "conf/strict.toml").read_text())
    assert config.default is Verdict.DENY
    assert len(config.allow) == 3
    assert config_warnings(config) == ['default = "deny" in monitor mode: nothing is dropped']


def test_the_manual_page_is_current():
    page = MAN_PAGE.read_text()
    assert with_settings(page) == page, "run: python3 -m xdpmond.configdoc man/xdpmond.toml.5"


def test_man_has_no_complaint_and_shows_every_setting():
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "200"}
    done = subprocess.run(["man", "--warnings", "-l", str(MAN_PAGE)], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    for setting in SETTINGS.values():
        shown = "as everywhere" if ANY_NAME in setting.path else "" if setting.needed else setting.kind.show(setting.default)
        assert (f" {setting.path[-1]} = {shown}\n" if shown else f" {setting.path[-1]} ") in done.stdout


# --- merging


def test_later_values_replace_and_entries_add_up(tree):
    tree.write("vendor.toml", 'window = "5m"\n[journal]\nevents_per_minute = 1\n[bus]\nenable = false\n')
    main = tree.write("xdpmond.toml", 'window = "6m"\nallow = ["10.0.0.0/8"]\n[journal]\nevents_per_minute = 2\n')
    tree.write("xdpmond.toml.d/20-b.toml", 'window = "8m"\nallow = ["::1"]\n')
    ten = tree.write("xdpmond.toml.d/10-a.toml", 'window = "7m"\n\ndeny = [\n  { prefix = "10.1.0.0/16", reason = " why " },\n]\n')
    tree.write("xdpmond.toml.d/30-c.toml~", "not TOML")
    tree.write("xdpmond.toml.d/.30-c.toml", "not TOML")
    config = tree.load()
    assert config.window == 480
    assert (config.journal.events_per_minute, config.bus.enable) == (2, False)
    assert [str(e.prefix) for e in config.allow] == ["10.0.0.0/8", "::1/128"]
    assert [(e.reason, e.source, e.origin, e.expires) for e in config.deny] == [("why", f"{ten}:4", Origin.CONFIGURATION, None)]
    assert config.allow[0].source == f"{main}:2"
    assert [Path(file).name for file in config.files] == ["vendor.toml", "xdpmond.toml", "10-a.toml", "20-b.toml"]
    assert config.entries == config.allow + config.deny


@pytest.mark.parametrize(("message", "place"), [
    ("metrics.textfile: /x.prom cannot be written", "xdpmond.toml.d/a.toml:3: "), ("window: too long", "xdpmond.toml:1: "),
    ("metrics.listen: stands in no file", ""), ("of no setting", ""),
])  # fmt: skip
def test_what_turns_out_later_to_be_wrong_names_the_place(tree, message, place):
    tree.write("xdpmond.toml", 'window = "2s"\n')
    tree.write("xdpmond.toml.d/a.toml", '[metrics]\nmax_ports = 7\ntextfile = "/x.prom"\n')
    config = tree.load()
    where = f"{tree.paths.main.parent}/" if place else ""
    with pytest.raises(ConfigError) as refused, naming_the_place(config):
        raise ConfigError(message, hint="do something")
    assert (refused.value.message, refused.value.hint) == (f"{where}{place}{message}", "do something")


def test_a_prefix_named_twice_is_one_entry_where_it_was_named_last(tree):
    tree.write("xdpmond.toml.d/a.toml", '\nallow = [{ prefix = "10.0.0.0/8", reason = "again" }]')
    (entry,) = tree.load('allow = ["10.0.0.0/8", "10.0.0.0/8"]').allow
    assert (entry.reason, entry.source) == ("again", f"{tree.paths.dropins}/a.toml:2")


def test_a_prefix_under_allow_and_deny_is_refused_with_both_places(tree):
    tree.write("xdpmond.toml.d/a.toml", '\ndeny = ["10.0.0.0/8"]')
    message = tree.refused('allow = [\n"10.0.0.0/8"]')
    assert message.startswith("xdpmond.toml.d/a.toml:2: deny: 10.0.0.0/8 stands under allow too, in ")
    assert "/xdpmond.toml:2" in message


def test_entries_as_an_array_of_tables(tree):
    config = tree.load('[[deny]]\nprefix = "192.0.2.1"\n[[deny]]\nprefix = "192.0.2.2"\nreason = "x"\n')
    assert [(e.source.rpartition(":")[2], e.reason) for e in config.deny] == [("1", ""), ("3", "x")]


def test_one_file_named_by_hand(tmp_path):
    file = tmp_path / "my.conf"
    with pytest.raises(ConfigError, match="no such file"):
        load(ConfigPaths.single(file))
    file.write_text('window = "2m"')
    (tmp_path / "my.conf.d").mkdir()
    (tmp_path / "my.conf.d" / "x.toml").write_text('summary_interval = "3m"')
    config = load(ConfigPaths.single(file))
    assert (config.window, config.summary_interval) == (120, 180)


# --- files of prefixes


def listed(config):
    """What the lists amount to: verdict, prefix and place of each."""
    found = [
        (bulk.verdict, str(prefix), f"{bulk.source}:{bulk.prefixes.line_of(prefix)}") for bulk in config.lists for prefix in bulk.prefixes
    ]
    return sorted(found)


def test_files_of_prefixes_add_up_and_the_last_word_on_a_prefix_counts(tree):
    one = tree.write("one", "10.0.0.0/8 # ours\n\n192.0.2.1\n::1\n10.0.0.0/8\n")
    two = tree.write("two", "192.0.2.1\n192.0.2.2\n198.51.100.0/24\n")
    three = tree.write("three", "203.0.113.0/24\n2001:db8::/32\n")
    tree.write("xdpmond.toml.d/a.toml", f'allow_files = ["{two}"]\ndeny_files = ["{three}"]')
    config = tree.load(f'allow = [{{ prefix = "198.51.100.0/24", reason = "why" }}]\nallow_files = [\n"{one}"]')
    assert listed(config) == [
        (Verdict.ALLOW, "10.0.0.0/8", f"{one}:5"), (Verdict.ALLOW, "192.0.2.1/32", f"{two}:1"),
        (Verdict.ALLOW, "192.0.2.2/32", f"{two}:2"), (Verdict.ALLOW, "::1/128", f"{one}:4"),
        (Verdict.DENY, "2001:db8::/32", f"{three}:2"), (Verdict.DENY, "203.0.113.0/24", f"{three}:1"),
    ]  # fmt: skip
    assert [(str(entry.prefix), entry.reason) for entry in config.allow] == [("198.51.100.0/24", "why")]
    assert (config.count(Verdict.ALLOW), config.count(Verdict.DENY)) == (5, 2)
    assert (config.allow_files, config.deny_files) == ((str(one), str(two)), (str(three),))
    assert [Path(file).name for file in config.files] == ["xdpmond.toml", "a.toml", "one", "two", "three"]
    assert config_warnings(config) == ["deny entries in monitor mode: nothing is dropped"]


@pytest.mark.parametrize(
    ("toml", "content", "message"),
    [
        ('\ndeny_files = ["LIST"]', "::1\n10.1\n", "xdpmond.toml:2: deny_files: LIST:2: '10.1' is not an IP prefix (four decimal parts"),
        ('deny_files = [\n"LIST"]', "10.0.0.1/8\n", "xdpmond.toml:2: deny_files: LIST:1: '10.0.0.1/8' has host bits set (write 10.0.0.0/8"),
        ('deny_files = ["LIST"]', "::1\n::/0", 'LIST:2: ::/0 is every ipv6 source (write { prefix = "::/0", force = true } under deny)'),
        ('deny_files = ["LIST"]\nallow = ["::1"]', "#\n::1", "LIST:2: ::1/128 stands under allow too, in "),
        ('deny_files = ["LIST"]\nallow_files = ["LIST"]', "::1",
         "xdpmond.toml:2: allow_files: LIST:1: ::1/128 stands under deny too, in LIST:1"),
        ('deny_files = ["LIST.x"]', "", "xdpmond.toml:1: deny_files: LIST.x: No such file or directory"),
        ('deny_files = ["/dev/null"]', "", "deny_files: prefixes are read from a regular file only"),
        ('deny_files = "LIST"', "", "is not a list of the paths of files"),
        ('deny_files = ["list"]', "", "deny_files: 'list' is not the path of a file (write it in full, for example \"/etc/xdpmond/"),
        ('deny_files = ["LIST", "LIST"]', "", "LIST stands there twice"),
        ('tables.prefixes = 1024\ndeny_files = ["LIST"]', "\n".join(f"10.0.{n >> 8}.{n & 255}" for n in range(1025)),
         "deny_files: LIST: more than 1024 prefixes"),
        ('tables.prefixes = 1024\ndeny = ["::1"]\ndeny_files = ["LIST"]', "\n".join(f"10.0.{n >> 8}.{n & 255}" for n in range(1024)),
         "allow and deny hold 1025 prefixes, tables.prefixes is 1024"),
    ],
)  # fmt: skip
def test_a_refused_file_of_prefixes_is_named_with_its_line(tree, toml, content, message):
    file = tree.write("list", content)
    with pytest.raises(ConfigError) as caught:
        tree.load(toml.replace("LIST", str(file)))
    assert message.replace("LIST", str(file)) in str(caught.value)


def test_a_vendor_names_no_files_of_prefixes(tree):
    tree.write("vendor.toml", "deny_files = []")
    assert tree.refused("") == "vendor.toml:1: deny_files: entries stand in the files in /etc only"


# --- refusals

REFUSALS = [
    ('modee = "enforce"', "xdpmond.toml:1: modee: unknown key (did you mean mode?)"),
    (
        "\n[journal]\nevents_per_minut = 5",
        "xdpmond.toml:3: journal.events_per_minut: unknown key (did you mean journal.events_per_minute?)",
    ),
    ("events_per_minute = 5", "xdpmond.toml:1: events_per_minute: unknown key (did you mean journal.events_per_minute?)"),
    ('[journal]\nallow = ["::1"]', "xdpmond.toml:2: journal.allow: unknown key (allow belongs above the first [table] line"),
    ("[jornal]\nenable = true", "xdpmond.toml:1: jornal: unknown key (did you mean journal?)"),
    ('"events.interval" = "5s"', 'xdpmond.toml:1: "events.interval": unknown key'),
    ("zzz = 1", "xdpmond.toml:1: zzz: unknown key (see xdpmond.toml(5))"),
    ('"a\\nb\\u001b" = 1', 'xdpmond.toml:1: "a\\nb\\u001b": unknown key'),
    (
        '[interfaces.eth0.100]\nmode = "monitor"',
        'xdpmond.toml:1: interfaces.eth0.100: unknown key (a name with a dot needs quotes: [interfaces."eth0.100"]',
    ),
    ("[interfaces.eth0]\nmod = 1", "xdpmond.toml:2: interfaces.eth0.mod: unknown key (did you mean interfaces.NAME.mode?)"),
    ('[interfaces."a b"]', 'xdpmond.toml:1: interfaces."a b": not an interface name'),
    ("interfaces.eth0 = 5", "xdpmond.toml:1: interfaces.eth0: 5 is not a table (write [interfaces.eth0]"),
    ("events = 5", "xdpmond.toml:1: events: 5 is not a table (write [events]"),
    ('[[log]]\npath = "/x"\nformatt = "csv"', "xdpmond.toml:3: log.formatt: unknown key (did you mean log.format?)"),
    ("[[log]]\nsiez = 1", "xdpmond.toml:2: log.siez: unknown key"),
    ('[[logs]]\npath = "/x"', "xdpmond.toml:1: logs: unknown key (did you mean log?)"),
    ('format = "csv"', "xdpmond.toml:1: format: unknown key (did you mean log.format?)"),
    ('[[log]]\npath = "/x"\nmode = "enforce"', "xdpmond.toml:3: log.mode: unknown key (mode belongs above the first [table] line"),
    ("\n[[log]]", "xdpmond.toml:2: log: path is missing (each [[log]] has its own)"),
    ('[[log]]\npath = "/x"\n\n[[log]]\nkeep = 1', "xdpmond.toml:4: log: path is missing"),
    ('[[log]]\npath = "/x"\n\n[[log]]\npath = "/x"', "xdpmond.toml:4: log: /x stands in "),
    ('log = "/x"', "xdpmond.toml:1: log: '/x' is not an array of tables (write [[log]] on a line by itself, and its settings below)"),
    ('[log]\npath = "/x"', "xdpmond.toml:1: log: {'path': '/x'} is not an array of tables (write [[log]] on a line by itself"),
    ('log = [{ path = "/x" }, 3]', "xdpmond.toml:1: log: "),
    ('[[log]]\npath = "events.jsonl"', "xdpmond.toml:2: log.path: 'events.jsonl' is not the path of a file (write it in full"),
    ('[[log]]\npath = "/var/log/../x"', "xdpmond.toml:2: log.path: '/var/log/../x' is not a plain path (write \"/var/x\")"),
    ('[[log]]\npath = "/x\\n"', "xdpmond.toml:2: log.path: '/x\\n' is not the path of a file"),
    ('[[log]]\npath = "/x"\nformat = "jsnl"', "xdpmond.toml:3: log.format: 'jsnl' is not one of console, jsonl, csv (did you mean jsonl?)"),
    ('[[log]]\npath = "/x"\nrotate_size = 100', 'xdpmond.toml:3: log.rotate_size: 100 is not a size from "64K" to "1T"'),
    ('[[log]]\npath = "/x"\nrotate_size = "1K"', "xdpmond.toml:3: log.rotate_size: '1K' is not a size"),
    ('mode = "enforced"', "xdpmond.toml:1: mode: 'enforced' is not one of monitor, enforce (did you mean enforce?)"),
    ("mode = 5", "xdpmond.toml:1: mode: 5 is not one of monitor, enforce"),
    ("default = true", "default: True is not one of allow, log, deny"),
    ("window = 60", 'xdpmond.toml:1: window: 60 is not a duration (write it with a unit: "60s" or "60m")'),
    ('window = "60"', "window: '60' is not a duration (a unit is missing; write 60s for seconds or 60m for minutes)"),
    ('window = "2h"', "window: '2h' is not a duration from 1s to 1h"),
    ('window = "0s"', "window: '0s' is not a duration from 1s to 1h"),
    ('summary_interval = "2d"', "summary_interval: '2d' is not a duration from 1s to 1d, or \"0s\" for none"),
    ("window = inf", "window: inf is not a duration"),
    ("force_default_deny = 1", "force_default_deny: 1 is not true or false"),
    ("tables.talkers = 65537", "tables.talkers: 65537 is not a power of two from 1024 to 4194304 (the nearest are 65536 and 131072)"),
    ("tables.talkers = true", "tables.talkers: True is not a power of two"),
    ("tables.talkers = 65536.0", "tables.talkers: 65536.0 is not a power of two"),
    ("events.per_second = 0", "events.per_second: 0 is not a number from 1 to 1000000"),
    ("events.per_second = 0x" + "f" * 9000, "events.per_second: the number is not a number from 1"),
    ("interface = []", "interface: 0 interfaces are given"),
    (f"interface = {json.dumps([f'eth{n}' for n in range(17)])}", "interface: 17 interfaces are given (1 to 16"),
    ('interface = ["eth0", "eth0"]', "interface: eth0 stands there twice"),
    ('interface = "an-interface-name"', "interface: 'an-interface-name' is not an interface name"),
    ('interface = ["eth0", 5]', "interface: 5 is not an interface name"),
    ('interface = ".."', "interface: '..' is not an interface name"),
    ("interface = 5", "interface: 5 is not a list of interface names"),
    ("failsafe_ports = [22]", 'failsafe_ports: 22 is not a port (write for example "tcp/22"'),
    ('failsafe_ports = ["icmp/8"]', "failsafe_ports: 'icmp/8' is not a port"),
    ('ports = "tcp/22"', "ports: 'tcp/22' is not a list of ports"),
    ("ports = [22]", 'ports: 22 is not a port, a range of ports or a protocol (write "22" for tcp, udp and sctp, or "tcp/22")'),
    ('ports = ["22/tcp"]', "ports: '22/tcp' is not a port, a range of ports or a protocol (write \"tcp/22\")"),
    ('ports = ["TCP/22"]', 'names are in lower case: "tcp/22"'),
    ('ports = ["tcp"]', "ports: 'tcp' is not a port, a range of ports or a protocol (write \"tcp/*\" for all its ports)"),
    ('ports = ["icmp/8"]', 'icmp has no ports: write "icmp"'),
    ('ports = ["gre/*"]', 'gre has no ports: write "gre"'),
    ('ports = ["http"]', "names of services are not looked up"),
    ('ports = ["tcp/http"]', 'write for example "tcp/22", "udp/8000-8100", "80", "sctp/*" or "icmp"'),
    ('ports = ["tcp/22-"]', 'write for example "tcp/22"'),
    ('ports = ["tcp/0"]', "'tcp/0' is not a port"),
    ('ports = ["tcp/022"]', "'tcp/022' is not a port"),
    ('ports = ["65536"]', "ports are 1 to 65535"),
    ('ports = ["udp/1-65536"]', "ports are 1 to 65535"),
    ('ports = ["udp/8100-8000"]', 'write "udp/8000-8100"'),
    ('ports = ["90-80"]', 'write "80-90"'),
    ('ports = ["80-80"]', 'write "80"'),
    ('ports = ["*"]', "'*' is not a port"),
    ('ports = ["-"]', "'-' is not a port"),
    ('ports = [""]', "'' is not a port"),
    ('ports = ["/22"]', "'/22' is not a port"),
    ('ports = ["80", "80"]', "ports: 80 stands there twice"),
    ("ports = [" + '"tcp/1-2", ' * 257 + "]", "ports: 257 items are given (at most 256; a range is one)"),
    ('show_local = "no"', "show_local: 'no' is not true or false"),
    ('[names]\ncountry = "country.mmdb"', "xdpmond.toml:2: names.country: 'country.mmdb' is not the path of a file"),
    ("[names]\nasn = 5", "xdpmond.toml:2: names.asn: 5 is not the path of a file"),
    ('failsafe_ports = ["tcp/65536"]', "failsafe_ports: 'tcp/65536' is not a port"),
    ('failsafe_ports = ["tcp/0"]', "failsafe_ports: 'tcp/0' is not a port"),
    ('failsafe_ports = ["tcp/22", "tcp/22"]', "failsafe_ports: tcp/22 stands there twice"),
    ('allow = "10.0.0.0/8"', "xdpmond.toml:1: allow: '10.0.0.0/8' is not a list of prefixes"),
    ("allow = [5]", "xdpmond.toml:1: allow: 5 is not a prefix"),
    ("allow = [{}]", "allow: {} is not a prefix"),
    ('allow = [\n"::1",\n\n"10.1.2.3/8"]', "xdpmond.toml:4: allow: '10.1.2.3/8' has host bits set (write 10.0.0.0/8 for the network or"),
    ('deny = [\n{ prefix = "::1", reson = "x" }]', "xdpmond.toml:2: deny: reson is unknown here (an entry has prefix, reason and force)"),
    ('deny = [{ prefix = "::1", reason = 5 }]', "deny: 5 is not a reason"),
    ('deny = [{ prefix = "::1", reason = "a\\nb" }]', "deny: the reason holds a line break"),
    ('deny = [{ prefix = "::1", force = "yes" }]', "deny: 'yes' is not true or false"),
    (
        'deny = ["0.0.0.0/0"]',
        'deny: 0.0.0.0/0 is every ipv4 source (see the setting default, or write { prefix = "0.0.0.0/0", force = true })',
    ),
    ('allow = ["10.0.0.0/\\n8"]', r"allow: '10.0.0.0/\n8' has no valid prefix length"),
    ("a = [" * 5000, "xdpmond.toml: not valid TOML: "),
    ("a = " + "[" * 5000, "xdpmond.toml: not valid TOML: "),
    ("a = 1\na = 2\n", "xdpmond.toml: not valid TOML: Cannot overwrite a value (at line 2"),
    ("a = " + "9" * 5000, "xdpmond.toml: not valid TOML: "),
    ("a = 2026-13-01", "xdpmond.toml: not valid TOML: "),
]


@pytest.mark.parametrize(("text", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_refusal_names_file_line_and_key_and_says_what_to_do(tree, text, message):
    assert message in tree.refused(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('collector = "c.example.net:4739"', "xdpmond.toml:2: ipfix.collector: there are no flows to send (set enable = true in [flows])"),
        ('collector = "192.0.2.1"', "ipfix.collector: '192.0.2.1' is not a host and a port (write \"HOST:PORT\""),
        ('collector = "2001:db8::1:4739"', "is not a host and a port"),
        ('collector = "[2001:db8:::1]:4739"', "'2001:db8:::1' is not an IP address"),
        ('collector = "192.0.2.256:4739"', "'192.0.2.256' is not an IP address"),
        ('collector = "192.0.2.1:0"', "is not a host and a port"),
        ('collector = "192.0.2.1:65536"', "is not a host and a port"),
        ('collector = "a b:4739"', "is not a host and a port"),
        ('collector = "a..b:4739"', "is not a host and a port"),
        (f'collector = "{"a" * 64}:4739"', "is not a host and a port"),
        ('collector = ["192.0.2.1:4739"]', "is not a host and a port"),
        ('packet_size = 511', "ipfix.packet_size: 511 is not a number from 512"),
        ('observation_domain = 4294967296', "ipfix.observation_domain: 4294967296 is not a number from 0"),
    ],
)  # fmt: skip
def test_settings_of_ipfix_that_cannot_be_are_refused(tree, text, message):
    assert message in tree.refused(f"[ipfix]\n{text}")


@pytest.mark.parametrize("collector", ["collector.example.net:4739", "[2001:db8::1]:4739", "192.0.2.1:1"])
def test_a_collector_can_be_a_name_or_an_address(tree, collector):
    assert str(tree.load(f'flows.enable = true\n[ipfix]\ncollector = "{collector}"').ipfix.collector) == collector


def test_json_is_not_offered_and_what_to_write_instead(tree):
    refusal = tree.refused('[[log]]\npath = "/l"\nformat = "json"')
    assert "xdpmond.toml:3: log.format: 'json' would be one array, and no file that grows is a valid one at every moment" in refusal
    assert 'write "jsonl"' in refusal


@pytest.mark.parametrize("name", ["csv", "console"])
def test_the_fields_of_ecs_are_for_json(tree, name):
    assert 'xdpmond.toml:4: log.fields: "ecs" is for format = "jsonl"' in tree.refused(
        f'[[log]]\npath = "/l"\nformat = "{name}"\nfields = "ecs"'
    )


TLS = 'certificate = "/c"\nkey = "/k"\n'
USER = "prometheus:scrypt:14:8:1:AAAAAAAAAAAAAAAAAAAAAA:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[metrics]\nlisten = "localhost:9958"', "xdpmond.toml:2: metrics.listen: 'localhost:9958' is not an address and a port"),
        ('[metrics]\nlisten = "::1:9958"', "is not an address and a port to listen on"),
        ('[metrics]\nlisten = "127.1:9958"', "'127.1' is not an IP address"),
        ('[metrics]\nlisten = "127.0.0.1:0"', "is not an address and a port"),
        ('[metrics]\nlisten = "127.0.0.1:65536"', "is not an address and a port"),
        ('[metrics]\nlisten = "unix:metrics.sock"', 'is not the path of a file (write it in full, for example "unix:/run'),
        (f'[metrics]\nlisten = "unix:/{"x" * 108}"', "107 bytes at most"),
        ('[metrics]\nusers = ["prometheus:tomato"]', "metrics.users: not a user with a hashed password (make the line with: xdpmond"),
        (f'[metrics]\nusers = ["{USER}", "{USER}"]', "prometheus stands there twice"),
        ('[metrics]\ncertificate = "/c"', "xdpmond.toml:2: metrics.certificate: key is missing (TLS needs both)"),
        ('[metrics]\n\nkey = "/k"', "xdpmond.toml:3: metrics.key: certificate is missing"),
        (f'[metrics]\n{TLS}listen = "unix:/run/x"', "metrics.certificate: a Unix socket needs no TLS"),
        ('[metrics]\ntextfile = "/var/x.txt"', "metrics.textfile: /var/x.txt does not end in .prom"),
        ('[metrics]\nenable = true\nlisten = "0.0.0.0:9958"', "metrics.listen: 0.0.0.0:9958 can be reached by others than this host, and"
         " certificate, key and users are not set (set them, or listen on 127.0.0.1, or set insecure = true if that is meant)"),
        (f'[metrics]\nenable = true\n{TLS}listen = "[::]:9958"', "can be reached by others than this host, and users are not set"),
        ('[influxdb]\nurl = "127.0.0.1:8086"', "influxdb.url: '127.0.0.1:8086' is not a URL"),
        ('[influxdb]\nurl = "http://u:tomato@h:8086"', "influxdb.url: a URL with a user"),
        ('[influxdb]\nurl = "http://h:8086"', "influxdb.url: database or bucket is missing"),
        ('[influxdb]\nurl = "http://h:8086"\nbucket = "b"', "influxdb.bucket: organization is missing"),
        ('[influxdb]\nurl = "http://h:8086"\nbucket = "b"\norganization = "o"', "influxdb.bucket: token is missing"),
        ('[influxdb]\nurl = "http://h:8086"\ndatabase = "b"\npassword = "tomato"', "influxdb.password: user is missing"),
        ('[influxdb]\npassword = 7', "influxdb.password: not a text of a line"),
    ],
)  # fmt: skip
def test_settings_of_metrics_that_cannot_be_are_refused_and_no_secret_is_shown(tree, text, message):
    refusal = tree.refused(text)
    assert message in refusal
    assert "tomato" not in refusal


@pytest.mark.parametrize("text", ['listen = "127.1.2.3:1"', 'listen = "[::1]:1"', 'listen = "unix:/run/x"',
                                  'listen = "10.0.0.1:1"\ninsecure = true',
                                  f'listen = "10.0.0.1:1"\nusers = ["{USER}"]\n{TLS}'])  # fmt: skip
def test_metrics_may_be_served_where_only_those_who_may_read_them_can(tree, text):
    assert tree.load(f"[metrics]\nenable = true\n{text}").metrics.enable


def test_everything_may_be_listed_when_that_is_said_twice(tree):
    (entry,) = tree.load('deny = [{ prefix = "::/0", force = true }]').deny
    assert entry.prefix.length == 0


def test_a_vendor_has_no_say_in_who_is_allowed(tree):
    tree.write("vendor.toml", 'allow = ["10.0.0.0/8"]')
    assert tree.refused("") == "vendor.toml:1: allow: entries stand in the files in /etc only"


def test_more_prefixes_than_the_table_holds(tree):
    entries = [f"10.0.{n >> 8}.{n & 255}" for n in range(1025)]
    assert tree.load(f"allow = {json.dumps(entries)}").allow
    tree.write("xdpmond.toml", f"tables.prefixes = 1024\nallow = {json.dumps(entries)}")
    with pytest.raises(ConfigError, match="1025 prefixes"):
        tree.load()


def test_files_that_cannot_be_read(tree):
    tree.paths.main.mkdir()
    with pytest.raises(ConfigError, match=r"xdpmond\.toml: Is a directory"):
        tree.load()
    tree.paths.main.rmdir()
    tree.paths.main.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        tree.load()
    tree.paths.main.unlink()
    tree.paths.dropins.write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        tree.load()
    tree.paths.dropins.unlink()
    tree.paths.dropins.mkdir()
    (tree.paths.dropins / "dangling.toml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"dangling\.toml: no such file"):
        tree.load()


# --- fuzzing


def never_anything_but_a_config_error(directory, content):
    file = directory / "fuzz.toml"
    file.write_bytes(content)
    try:
        config = load(ConfigPaths.single(file))
    except ConfigError as error:
        assert str(error).startswith(str(file))
    else:
        config_warnings(config)


@given(st.binary())
def test_arbitrary_bytes(tmp_path_factory, content):
    never_anything_but_a_config_error(tmp_path_factory.getbasetemp(), content)


KEYS = sorted(
    {key for path in SETTINGS for key in path} | {"events", "tables", "journal", "bus", "interfaces", "prefix", "reason", "force"}
)
VALUES = ["monitor", "enforce", "deny", "log", "auto", "60s", "default", "eth0", "tcp/22", "10.0.0.0/8", "::1", "0.0.0.0/0", "10.0.0.1/8"]


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


NUMBERS = st.integers() | st.sampled_from([60, 1024, 65536]) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.sampled_from(VALUES) | st.text(max_size=8) | st.booleans() | NUMBERS
NAMES = st.sampled_from(KEYS) | st.text(max_size=6)
NESTED = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4))
DOCUMENTS = st.dictionaries(NAMES, NESTED, max_size=5)


@given(DOCUMENTS)
def test_arbitrary_documents(tmp_path_factory, document):
    text = "\n".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(value)}" for key, value in document.items())
    never_anything_but_a_config_error(tmp_path_factory.getbasetemp(), text.encode(errors="surrogatepass"))


@given(st.data())
def test_the_shipped_files_with_bytes_changed(tmp_path_factory, data):
    content = bytearray((ROOT / data.draw(st.sampled_from(["conf/xdpmond.toml", "conf/strict.toml", "conf/vendor.toml"]))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.sampled_from([b"", b'"', b"[", b"]", b"=", b"\n", b"{", b"9", b"."]))
    never_anything_but_a_config_error(tmp_path_factory.getbasetemp(), bytes(content))


# --- what is permitted but perhaps not meant


def test_enforcing_default_deny_has_to_be_said_twice(tree):
    strict = tree.load('mode = "enforce"\ndefault = "deny"')
    with pytest.raises(GuardError, match="DNS, apt and NTP") as caught:
        require_force(strict)
    assert "force_default_deny = true" in caught.value.hint
    require_force(strict, forced=True)
    require_force(strict, mode=Mode.MONITOR)
    require_force(tree.load('mode = "enforce"\ndefault = "deny"\nforce_default_deny = true'))
    require_force(tree.load('mode = "enforce"'))
    watching = tree.load('default = "deny"')
    require_force(watching)
    with pytest.raises(GuardError):
        require_force(watching, mode=Mode.ENFORCE)
    with pytest.raises(GuardError):
        require_force(tree.load('default = "deny"\n[interfaces.eth0]\nmode = "enforce"'))


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ('default = "deny"', 'default = "deny" in monitor mode: nothing is dropped'),
        ('deny = ["::1"]', "deny entries in monitor mode: nothing is dropped"),
        ('default = "deny"\nmode = "enforce"\nforce_default_deny = true', "answers to this host's own connections are dropped"),
        ("failsafe_ports = []", "nothing guards against locking yourself out"),
        ('interface = "eth1"\n[interfaces.eth0]\nmode = "enforce"', "[interfaces.eth0] has no effect"),
    ],
)
def test_warnings(tree, text, warning):
    (found,) = config_warnings(tree.load(text))
    assert warning in found
