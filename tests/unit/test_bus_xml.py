"""The interface stands in three places: the code's tables, the XML that is installed, and the manual page. None may drift."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from dbus_next import Variant

from xdpmond.bus import interface, polkit
from xdpmond.bus.errormap import ERROR_NAMES, bus_error, clean
from xdpmond.errors import ERRORS, PrefixError, UsageError, XdpmondError

ROOT = Path(__file__).resolve().parents[2]


def shape(node: ET.Element) -> list[object]:
    """A comparable form: tag, attributes, children in order; no comments, no white space."""
    return [node.tag, sorted(node.attrib.items()), [shape(child) for child in node if isinstance(child.tag, str)]]


def test_installed_xml_is_the_code() -> None:
    document = ET.parse(ROOT / "dbus/org.xdpmond1.Manager.xml").getroot()
    (described,) = document.findall("interface")
    assert shape(described) == shape(interface.interface_xml())


def test_introspection_is_found_from_the_root() -> None:
    path = ""
    while path != interface.PATH:
        document = interface.introspect(path or "/")
        assert document is not None
        (child,) = ET.fromstring(document).findall("node")
        path += "/" + child.attrib["name"]
    names = [node.attrib["name"] for node in ET.fromstring(interface.introspect(path) or "").findall("interface")]
    assert interface.INTERFACE in names and "org.freedesktop.DBus.Properties" in names
    assert interface.introspect("/org/xdpmond1/none") is None
    assert interface.introspect("/or") is None


def test_every_option_of_a_method_has_a_type_and_every_type_a_method() -> None:
    used = {option for method in interface.METHODS.values() for option in method.options}
    assert used == set(interface.OPTIONS)
    for method in interface.METHODS.values():
        assert not method.options or method.takes[-1].signature == "a{sv}"


def test_actions_are_those_of_the_policy_file() -> None:
    actions = ET.parse(ROOT / "dbus/org.xdpmond1.policy").getroot().findall("action")
    assert {action.attrib["id"] for action in actions} == {method.action for method in interface.METHODS.values()}
    for action in actions:
        values = {node.text for node in action.find("defaults") or ()}
        assert values == {"yes"} if action.attrib["id"] == polkit.READ else values == {"auth_admin_keep"}
        owners = [node.text for node in action.findall("annotate") if node.attrib["key"] == "org.freedesktop.policykit.owner"]
        assert owners == ["unix-user:xdpmond"]


def test_changing_is_never_only_reading() -> None:
    reading = {name for name, method in interface.METHODS.items() if method.action == polkit.READ}
    assert reading == {"Describe", "List", "Explain", "Top", "Ports", "Flows", "Windows", "Events", "FollowEvents"}


def test_manual_page_names_every_member_option_error_and_action() -> None:
    page = (ROOT / "man/org.xdpmond1.5").read_text().replace("\\-", "-")
    wanted = [*interface.METHODS, *interface.PROPERTIES, *interface.SIGNALS, *interface.OPTIONS, *ERROR_NAMES.values()]
    wanted += [method.action for method in interface.METHODS.values()]
    missing = [word for word in wanted if not re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", page)]
    assert not missing


def test_every_error_code_has_its_own_bus_name() -> None:
    assert len(set(ERROR_NAMES.values())) == len(ERRORS)
    assert ERROR_NAMES["locks-you-out"] == "org.xdpmond1.Error.LocksYouOut"
    assert bus_error(PrefixError("'x' is none", hint="write y")) == ("org.xdpmond1.Error.InvalidPrefix", "'x' is none\nwrite y")
    assert bus_error(XdpmondError("plain")) == ("org.xdpmond1.Error.Failed", "plain")


def test_error_text_is_always_a_dbus_string() -> None:
    text = clean("a\0b\udcff")
    assert "\0" not in text
    text.encode()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"secconds": Variant("d", 1.0)}, "secconds"),
        ({"seconds": Variant("i", 60)}, "double"),
        ({"seconds": Variant("d", float("nan"))}, "above 0"),
        ({"seconds": Variant("d", float("inf"))}, "above 0"),
        ({"seconds": Variant("d", -1.0)}, "above 0"),
        ({"reason": Variant("as", ["x"])}, "string"),
        ({"limit": Variant("u", 1)}, "limit"),
    ],
)
def test_wrong_options_are_refused_by_name(given: dict[str, Variant], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        interface.read_options(interface.METHODS["Allow"], given)


def test_right_options_are_unwrapped() -> None:
    given = {"seconds": Variant("d", 60.0), "reason": Variant("s", "scan"), "force": Variant("b", True), "peers": Variant("as", ["::1"])}
    options = interface.read_options(interface.METHODS["Deny"], given)
    assert options == {"seconds": 60.0, "reason": "scan", "force": True, "peers": ["::1"]}


def test_signal_bodies_take_what_json_takes() -> None:
    body = {"n": 1, "big": 1 << 63, "f": 0.5, "b": True, "none": None, "words": ["a"], "mixed": [1, {"x": "y"}], "deep": {"a": {"b": 2}}}
    signature, arguments = interface.signal_body(interface.SIGNALS["PolicyChanged"], body)
    assert signature == "a{sv}"
    assert "none" not in arguments[0]
    for value in arguments[0].values():
        value.type.verify(value.value)
    assert arguments[0]["b"].signature == "b" and arguments[0]["big"].signature == "t"
    assert interface.signal_body(interface.SIGNALS["ModeChanged"], {"mode": "enforce", "by": "uid 0"}) == ("sss", ["enforce", "", "uid 0"])
