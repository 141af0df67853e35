"""Prefixes are read strictly, and as Python's own ipaddress reads them."""

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xdpmond.errors import PrefixError
from xdpmond.model import Action, Family, Outcome, Prefix, Verdict, format_address, parse_address


def networks():
    """Any network of either family, as ipaddress has it."""

    def build(version, number, length):
        kind, bits = (ipaddress.IPv4Network, 32) if version == 4 else (ipaddress.IPv6Network, 128)
        length %= bits + 1
        return kind((number % (1 << bits) >> (bits - length) << (bits - length), length))

    return st.builds(build, st.sampled_from([4, 6]), st.integers(0, (1 << 128) - 1), st.integers(0, 128))


def is_mapped(network):
    return network.version == 6 and network.network_address.ipv4_mapped is not None


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("192.0.2.1", "192.0.2.1/32"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("255.255.255.255/32", "255.255.255.255/32"),
        ("::", "::/128"),
        ("::/0", "::/0"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("2001:0db8:0000::1", "2001:db8::1/128"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201/128"),
        ("::1", "::1/128"),
    ],
)
def test_what_is_taken(text, canonical):
    assert str(Prefix.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("10.1.2.3/8", "host bits", "write 10.0.0.0/8 for the network or 10.1.2.3 for the one host"),
        ("2001:db8::1/32", "host bits", "write 2001:db8::/32 for the network or 2001:db8::1"),
        ("::ffff:192.0.2.1", "IPv4-mapped", "write 192.0.2.1"),
        ("::ffff:10.0.0.0/104", "IPv4-mapped", "write 10.0.0.0/8"),
        ("::ffff:0:0/96", "IPv4-mapped", "write 0.0.0.0/0"),
        ("fe80::1%eth0", "not an IP prefix", "zone id"),
        ("fe80::%eth0/64", "not an IP prefix", "zone id"),
        ("localhost", "not an IP prefix", "host names"),
        ("example.org", "not an IP prefix", "host names"),
        ("10.1", "not an IP prefix", "perhaps 10.1.0.0/16"),
        ("10", "not an IP prefix", "perhaps 10.0.0.0/8"),
        ("10.1/16", "not an IP prefix", "perhaps 10.1.0.0/16"),
        ("300.1", "not an IP prefix", "0 to 255"),
        ("192.0.2.256", "not an IP prefix", "0 to 255"),
        ("010.0.0.1", "not an IP prefix", "octal"),
        ("192.168.001.1", "not an IP prefix", "octal"),
        ("3221225985", "not an IP prefix", "write"),
        ("0x7f000001", "not an IP prefix", "write"),
        ("1.2.3.4.5", "not an IP prefix", "write"),
        ("1..2.3", "not an IP prefix", "write"),
        ("10.0.0.0/255.0.0.0", "prefix length", "write /8"),
        ("10.0.0.0/255.0.255.0", "prefix length", "0 to 32"),
        ("10.0.0.0/0.255.255.255", "prefix length", "0 to 32"),
        ("10.0.0.0/255.0.0.0\0", "prefix length", "0 to 32"),
        ("10.0.0.0/255.0.0.\udcff", "prefix length", "0 to 32"),
        ("10.0.0.0/33", "prefix length", "0 to 32"),
        ("2001:db8::/129", "prefix length", "0 to 128"),
        ("10.0.0.0/", "prefix length", "0 to 32"),
        ("10.0.0.0/08", "prefix length", "0 to 32"),
        ("10.0.0.0/+8", "prefix length", "0 to 32"),
        ("10.0.0.0/-1", "prefix length", "0 to 32"),
        ("10.0.0.0/٨", "prefix length", "0 to 32"),
        ("10.0.0.0/8/8", "prefix length", "0 to 32"),
        ("10.0.0.0/8\n", "prefix length", "0 to 32"),
        ("10.0.0.0/" + "9" * 5000, "prefix length", "0 to 32"),
        ("9" * 5000, "not an IP prefix", "write"),
        (" 10.0.0.1", "not an IP prefix", "white space"),
        ("10.0.0.0 /8", "not an IP prefix", "white space"),
        ("10.0.0.1\0", "not an IP prefix", "write"),
        ("٣.1.1.1", "not an IP prefix", "write"),
        ("10.0.0.1-10.0.0.9", "not an IP prefix", "write"),
        (":::", "not an IP prefix", "write"),
        ("[::1]", "not an IP prefix", "write"),
        ("", "not an IP prefix", "write"),
        ("/8", "not an IP prefix", "write"),
    ],
)
def test_what_is_refused(text, message, hint):
    with pytest.raises(PrefixError) as caught:
        Prefix.parse(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


@given(networks())
def test_the_text_of_a_prefix_reads_back_and_ipaddress_agrees(network):
    if is_mapped(network):
        with pytest.raises(PrefixError, match="IPv4-mapped"):
            Prefix.parse(str(network))
        return
    prefix = Prefix.parse(str(network))
    assert Prefix.parse(str(prefix)) == prefix
    assert ipaddress.ip_network(str(prefix)) == network
    assert prefix.family == network.version
    assert prefix.address == network.network_address.packed
    assert prefix.length == network.prefixlen


@given(st.one_of(st.text("0123456789abcdefF.:/%x ", max_size=24), st.text(), networks().map(str)))
@example("1:2:3:4:5:6:7::")
@example("::2:3:4:5:6:7:8")
def test_what_is_taken_means_the_same_to_ipaddress(text):
    try:
        prefix = Prefix.parse(text)
    except PrefixError:
        return
    network = ipaddress.ip_network(text)
    assert (prefix.family, prefix.address, prefix.length) == (network.version, network.network_address.packed, network.prefixlen)


@given(networks(), networks())
def test_order_is_by_family_address_length(one, other):
    a, b = (Prefix(Family(n.version), n.network_address.packed, n.prefixlen) for n in (one, other))
    key = [(n.version, n.network_address.packed, n.prefixlen) for n in (one, other)]
    assert (a < b) == (key[0] < key[1])


@given(networks(), networks(), st.integers(0, (1 << 128) - 1))
def test_covers_as_ipaddress_does(network, other, offset):
    prefix = Prefix(Family(network.version), network.network_address.packed, network.prefixlen)
    inside = network[offset % network.num_addresses]
    assert prefix.covers(prefix.family, inside.packed)
    address = other.network_address
    assert prefix.covers(Family(other.version), address.packed) == (address in network)


def test_addresses():
    assert parse_address("192.0.2.1") == (Family.IPV4, bytes([192, 0, 2, 1]))
    assert format_address(*parse_address("2001:DB8::1")) == "2001:db8::1"
    with pytest.raises(PrefixError, match="one address"):
        parse_address("192.0.2.0/24")


@pytest.mark.parametrize("outcome", Outcome)
def test_outcomes_keep_verdict_and_action_apart(outcome):
    """Only a denied packet is ever dropped, and "dropped" in the name says so."""
    assert (outcome.action is Action.DROP) == outcome.name.endswith("_DROPPED")
    if outcome.action is Action.DROP:
        assert outcome.verdict is Verdict.DENY


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("10.1", "'10.1' is not an IP address", "four decimal parts are wanted"),
        ("example.org", "'example.org' is not an IP address", "host names are not looked up; write the address"),
        ("1..2.3", "'1..2.3' is not an IP address", "write for example 192.0.2.1 or 2001:db8::1"),
        ("192.0.2.0/24", "'192.0.2.0/24' is a prefix where one address is wanted", "leave out the slash and what follows"),
        ("::ffff:192.0.2.1", "'::ffff:192.0.2.1' is an IPv4-mapped IPv6 address", "no packet carries one as its source; write 192.0.2.1"),
    ],
)
def test_an_address_is_asked_for_as_one(text: str, message: str, hint: str) -> None:
    with pytest.raises(PrefixError) as caught:
        parse_address(text)
    assert (caught.value.message, caught.value.hint) == (message, hint)
