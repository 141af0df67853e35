"""Names of addresses, from real files made here."""

from __future__ import annotations

import builtins
import ipaddress
import os
import sys
from pathlib import Path

import pytest

from xdpmond.config import Names as Files
from xdpmond.errors import ConfigError
from xdpmond.model import Family, parse_address
from xdpmond.names import NO_NAMES, Name, Names

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.mmdb import encode

COUNTRIES = {
    "192.0.2.0/25": {"country": {"iso_code": "NO"}, "continent": {"code": "EU"}}, "192.0.2.128/25": {"country": {"iso_code": "SE"}},
    "198.51.100.0/24": {"registered_country": {"iso_code": "FI"}}, "2001:db8::/33": {"country": {"iso_code": "IS"}},
    "203.0.113.0/24": {"country": "not a map"},
}  # fmt: skip
NETWORKS = {
    "192.0.2.0/24": {"autonomous_system_number": 64500, "autonomous_system_organization": "Example Nät " + "x" * 300},
    "2001:db8::/32": {"autonomous_system_number": 4_200_000_000, "autonomous_system_organization": "Example\n"},
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "country.mmdb").write_bytes(encode(COUNTRIES, kind="GeoLite2-Country"))
    (tmp_path / "asn.mmdb").write_bytes(encode(NETWORKS, kind="GeoLite2-ASN", record_size=28))
    return Files(str(tmp_path / "country.mmdb"), str(tmp_path / "asn.mmdb"))


def name(names: Names, text: str) -> Name:
    address, _, length = text.partition("/")
    return names.of(*parse_address(address), int(length) if length else None)


def test_addresses_of_both_families(files):
    names = Names.open(files)
    norwegian = name(names, "192.0.2.1")
    assert (norwegian.country, norwegian.as_number) == ("NO", 64500)
    assert norwegian.as_name == ("Example Nät " + "x" * 300)[:200]
    assert name(names, "192.0.2.200").country == "SE"
    assert name(names, "198.51.100.7") == Name("FI")
    assert name(names, "2001:db8::1") == Name("IS", 4_200_000_000, "Example\n")
    assert name(names, "203.0.113.1") == name(names, "10.0.0.1") == name(names, "2001:db9::1") == Name()
    assert names.damaged == []


def test_of_a_network_is_known_what_holds_for_all_of_it(files):
    names = Names.open(files)
    assert name(names, "192.0.2.0/24") == Name(None, 64500, name(names, "192.0.2.1").as_name)
    assert name(names, "192.0.2.0/25").country == "NO"
    assert name(names, "192.0.0.0/16") == Name()
    assert name(names, "2001:db8::/32") == Name(None, 4_200_000_000, "Example\n")
    assert name(names, "2001:db8::/64").country == "IS"


def test_every_address_of_a_file_is_found_by_its_network(tmp_path):
    networks = {str(net): {"country": {"iso_code": f"{number:02}"}}
                for number, net in enumerate([*ipaddress.ip_network("10.0.0.0/8").subnets(new_prefix=14),
                                              *ipaddress.ip_network("fc00::/7").subnets(new_prefix=12)][:90])}  # fmt: skip
    for size in (24, 28, 32):
        (tmp_path / "c.mmdb").write_bytes(encode(networks, kind="Country", record_size=size))
        names = Names.open(Files(country=str(tmp_path / "c.mmdb")))
        for text, record in networks.items():
            net = ipaddress.ip_network(text)
            family = Family.IPV4 if net.version == 4 else Family.IPV6
            for address in (net[0], net[-1]):
                assert names.of(family, address.packed).country == record["country"]["iso_code"]
            assert names.of(family, net[0].packed, net.prefixlen).country
            assert names.of(family, net[0].packed, net.prefixlen - 1).country is None


def test_a_file_of_ipv4_alone_knows_no_ipv6(tmp_path):
    (tmp_path / "c.mmdb").write_bytes(encode({"192.0.2.0/24": COUNTRIES["192.0.2.0/25"]}, kind="Country", version=4))
    names = Names.open(Files(country=str(tmp_path / "c.mmdb")))
    assert name(names, "192.0.2.1").country == "NO" and name(names, "192.0.2.0/24").country == "NO"
    assert name(names, "2001:db8::1") == Name() and not names.damaged


def test_nothing_is_known_where_nothing_is_configured(files):
    assert name(NO_NAMES, "192.0.2.1") == name(Names.open(Files()), "192.0.2.1") == Name()
    assert name(Names.open(Files(asn=files.asn)), "192.0.2.1").country is None


def test_a_file_that_is_overwritten_or_cut_short_disturbs_no_reader(files):
    names = Names.open(files)
    Path(files.country).write_bytes(b"")
    assert name(names, "192.0.2.1").country == "NO"
    Path(files.country).write_bytes(encode({"192.0.2.0/24": {"country": {"iso_code": "DK"}}}, kind="Country"))
    assert name(names, "192.0.2.1").country == "NO"
    assert name(Names.open(files), "192.0.2.1").country == "DK", "opened again it is the new one"


def refused(country: str = "", asn: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        Names.open(Files(country, asn))
    return str(caught.value)


def test_what_cannot_be_opened_is_refused(tmp_path, files):
    assert refused(str(tmp_path / "none")).startswith(f"names.country: {tmp_path}/none: No such file or directory")
    assert "Is a directory" in refused(asn=str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(asn=str(tmp_path / "pipe"))
    for content in (b"", b"<html>", Path(files.country).read_bytes()[:-200], b"\xab\xcd\xefMaxMind.com" + b"\xe0"):
        (tmp_path / "bad").write_bytes(content)
        assert "is not a database that can be read" in refused(str(tmp_path / "bad"))


def test_files_that_were_mixed_up_are_refused(files):
    assert "is a database of type GeoLite2-ASN (that belongs to names.asn)" in refused(country=files.asn)
    assert "is a database of type GeoLite2-Country (that belongs to names.country)" in refused(asn=files.country)


def test_damage_within_gives_no_names_and_is_known(tmp_path, files):
    whole = Path(files.country).read_bytes()
    records = whole.index(bytes(16), 100) + 16
    (tmp_path / "bad").write_bytes(whole[:records] + b"\xff" * 60 + whole[records + 60 :])
    names = Names.open(Files(country=str(tmp_path / "bad")))
    assert name(names, "192.0.2.1") == Name()
    assert names.damaged == [str(tmp_path / "bad")]
    assert name(names, "192.0.2.200") == Name()


def test_without_the_library(files, monkeypatch):
    def none(module, *arguments, **more):
        if module == "maxminddb":
            raise ImportError(module)
        return real(module, *arguments, **more)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", none)
    assert refused(country=files.country) == "names.country: python3-maxminddb is not installed (apt install python3-maxminddb)"
    assert name(Names.open(Files()), "192.0.2.1") == Name(), "nor is it wanted where no file is configured"
