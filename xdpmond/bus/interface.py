"""The Manager object: what it offers, as tables, and what each member does.

The tables are the interface: introspection is generated from them, arguments and options are checked against them, and a test compares
them with `dbus/org.xdpmond1.Manager.xml`, which is what other programs are built from. A method's row also names the polkit action that
the caller must hold, so that no method can be added without one.

Results are JSON in a string where they are small, and a descriptor where they may not be.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dbus_next import Variant

from ..errors import UsageError
from ..model import Caller, Mode, Verdict
from .lists import Lists
from .payload import EventFeed, Follower, dumps
from .polkit import MANAGE_POLICY, READ, RELOAD, SET_MODE
from .turns import Turns

NAME = "org.xdpmond1"
PATH = "/org/xdpmond1"
INTERFACE = "org.xdpmond1.Manager"

Json = dict[str, Any]
Notify = Callable[[str, Mapping[str, Any]], None]
"""Called by the service with a signal's name and body; any call also means that properties may have changed."""


class Service(Protocol):
    """The use-cases as the bus needs them. Results are dicts and lists that JSON can hold; errors are `XdpmondError`s."""

    @property
    def version(self) -> str: ...
    @property
    def mode(self) -> Mode: ...
    @property
    def file_mode(self) -> Mode: ...
    @property
    def default(self) -> Verdict: ...
    @property
    def interfaces(self) -> Sequence[str]: ...
    @property
    def started(self) -> float: ...
    @property
    def entry_count(self) -> int: ...
    @property
    def window_seconds(self) -> float: ...
    @property
    def last_window(self) -> int: ...
    @property
    def flows_enabled(self) -> bool: ...

    async def status(self) -> Json: ...
    async def change(
        self,
        verdict: Verdict,
        prefixes: Sequence[str],
        *,
        caller: Caller,
        seconds: float | None = None,
        reason: str = "",
        force: bool = False,
        extra_peers: Sequence[str] = (),
    ) -> Json: ...  # fmt: skip
    async def change_from_file(
        self,
        verdict: Verdict,
        fd: int,
        *,
        caller: Caller,
        seconds: float | None = None,
        reason: str = "",
        force: bool = False,
        extra_peers: Sequence[str] = (),
    ) -> Json: ...  # fmt: skip
    async def remove(self, prefixes: Sequence[str], *, caller: Caller, force: bool = False, extra_peers: Sequence[str] = ()) -> Json: ...
    async def entries(self) -> Iterable[str]: ...
    async def explain(self, address: str) -> Json: ...
    async def set_mode(
        self,
        mode: str,
        *,
        caller: Caller,
        interface: str = "",
        force: bool = False,
        confirm: float | None = None,
        extra_peers: Sequence[str] = (),
    ) -> Json: ...  # fmt: skip
    async def confirm(self, *, caller: Caller) -> Json: ...
    async def top(
        self,
        *,
        by: str = "bytes",
        limit: int = 20,
        port: int | None = None,
        protocol: str | None = None,
        interval: bool = False,
        local: bool | None = None,
        prefix_length: int | None = None,
        prefix_length6: int | None = None,
    ) -> Iterable[Json]: ...  # fmt: skip
    async def ports(
        self, *, limit: int = 100, port: int | None = None, protocol: str | None = None, interval: bool = False, local: bool | None = None
    ) -> Iterable[Json]: ...  # fmt: skip
    async def flows(
        self, *, by: str = "bytes", limit: int = 20, port: int | None = None, protocol: str | None = None, address: str | None = None
    ) -> Iterable[Json]: ...  # fmt: skip
    async def windows(self, *, limit: int = 60) -> Iterable[Json]: ...
    async def reload(self, *, caller: Caller, force: bool = False) -> Json: ...
    async def recent_events(self, limit: int) -> Iterable[Json]: ...
    def follow_events(self) -> EventFeed: ...
    def subscribe(self, callback: Notify) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One call, checked: the arguments have the row's types, the options are known. `descriptor` stays open until the method returns."""

    caller: Caller
    arguments: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    descriptor: int = -1


Result = str | int | Follower
"""A string, a descriptor that the receiver closes, or a stream to start."""


@dataclass(frozen=True, slots=True)
class Arg:
    name: str
    signature: str


@dataclass(frozen=True, slots=True)
class Method:
    """`options` are the names allowed in the last argument, an a{sv}; see OPTIONS for their types."""

    name: str
    run: Callable[[Manager, Call], Awaitable[Result]]
    action: str
    takes: tuple[Arg, ...] = ()
    gives: Arg = Arg("json", "s")
    options: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        return "".join(arg.signature for arg in self.takes)


@dataclass(frozen=True, slots=True)
class Property:
    name: str
    signature: str
    read: Callable[[Service], Any]
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Signal:
    """`keys` None: the body is one a{sv}; else these keys of the notification are the arguments."""

    name: str
    args: tuple[Arg, ...] = (Arg("details", "a{sv}"),)
    keys: tuple[str, ...] | None = None


OPTIONS: dict[str, str] = {
    "seconds": "d", "reason": "s", "force": "b", "peers": "as", "interface": "s", "confirm": "d", "by": "s", "limit": "u", "port": "q",
    "protocol": "s", "interval": "b", "local": "b", "prefix_length": "q", "prefix_length6": "q",
    "address": "s",
}  # fmt: skip
"""Every option with its one type; another type is refused, since a guess here could ban for 60 ms or for good."""

_TYPE_NAMES = {"d": "a double", "s": "a string", "b": "a boolean", "as": "an array of strings", "u": "a 32-bit unsigned number",
               "q": "a 16-bit unsigned number"}  # fmt: skip


class Manager:
    """The methods. Each gets a checked and authorised call."""

    def __init__(self, service: Service):
        self.service = service
        self._turns = Turns()
        self._lists = Lists(self._turns, lambda: service.entry_count)

    async def describe(self, _: Call) -> Result:
        return dumps(await self.service.status())

    async def allow(self, call: Call) -> Result:
        return dumps(await self.service.change(Verdict.ALLOW, call.arguments[0], caller=call.caller, **_change_options(call)))

    async def deny(self, call: Call) -> Result:
        return dumps(await self.service.change(Verdict.DENY, call.arguments[0], caller=call.caller, **_change_options(call)))

    async def change_from_file(self, call: Call) -> Result:
        verdict = call.arguments[1]
        if verdict not in (Verdict.ALLOW, Verdict.DENY):
            raise UsageError(f"'{verdict}' is not a verdict for an entry", hint="it is allow or deny")
        return dumps(await self.service.change_from_file(Verdict(verdict), call.descriptor, caller=call.caller, **_change_options(call)))

    async def remove(self, call: Call) -> Result:
        options = call.options
        return dumps(await self.service.remove(call.arguments[0], caller=call.caller, force=options.get("force", False),
                                               extra_peers=options.get("peers", ())))  # fmt: skip

    async def list(self, call: Call) -> Result:
        return await self._lines(call, "list", self.service.entries)

    async def explain(self, call: Call) -> Result:
        async with self._turns.of(call.caller):
            return dumps(await self.service.explain(call.arguments[0]))

    async def set_mode(self, call: Call) -> Result:
        mode = call.arguments[0]
        if mode not in (Mode.MONITOR, Mode.ENFORCE, "default"):
            raise UsageError(f"'{mode}' is not a mode", hint="it is monitor, enforce, or default for the configuration's")
        options = call.options
        return dumps(await self.service.set_mode(mode, caller=call.caller, interface=options.get("interface", ""),
                                                 force=options.get("force", False), confirm=options.get("confirm"),
                                                 extra_peers=options.get("peers", ())))  # fmt: skip

    async def confirm(self, call: Call) -> Result:
        return dumps(await self.service.confirm(caller=call.caller))

    async def top(self, call: Call) -> Result:
        return await self._lines(call, "top", lambda: self.service.top(**call.options))

    async def ports(self, call: Call) -> Result:
        return await self._lines(call, "ports", lambda: self.service.ports(**call.options))

    async def flows(self, call: Call) -> Result:
        return await self._lines(call, "flows", lambda: self.service.flows(**call.options))

    async def windows(self, call: Call) -> Result:
        return await self._lines(call, "windows", lambda: self.service.windows(**call.options))

    async def reload(self, call: Call) -> Result:
        return dumps(await self.service.reload(caller=call.caller, force=call.options.get("force", False)))

    async def events(self, call: Call) -> Result:
        return await self._lines(call, "events", lambda: self.service.recent_events(call.options.get("limit", 100)))

    async def follow_events(self, _: Call) -> Result:
        return Follower(self.service.follow_events())

    async def _lines(self, call: Call, name: str, ask: Callable[[], Awaitable[Iterable[Json | str]]]) -> int:
        return await self._lists.get(call.caller, f"xdpmond-{name}", call.options, ask)


def _change_options(call: Call) -> dict[str, Any]:
    options = call.options
    return {"seconds": options.get("seconds"), "reason": options.get("reason", ""), "force": options.get("force", False),
            "extra_peers": options.get("peers", ())}  # fmt: skip


_OPTIONS_ARG = Arg("options", "a{sv}")
_PREFIXES = Arg("prefixes", "as")
_LINES = Arg("lines", "h")
_CHANGE = ("seconds", "reason", "force", "peers")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("Describe", Manager.describe, READ),
        Method("Allow", Manager.allow, MANAGE_POLICY, (_PREFIXES, _OPTIONS_ARG), options=_CHANGE),
        Method("Deny", Manager.deny, MANAGE_POLICY, (_PREFIXES, _OPTIONS_ARG), options=_CHANGE),
        Method("ChangeFromFile", Manager.change_from_file, MANAGE_POLICY, (Arg("file", "h"), Arg("verdict", "s"), _OPTIONS_ARG),
               options=_CHANGE),
        Method("Remove", Manager.remove, MANAGE_POLICY, (_PREFIXES, _OPTIONS_ARG), options=("force", "peers")),
        Method("List", Manager.list, READ, (_OPTIONS_ARG,), _LINES),
        Method("Explain", Manager.explain, READ, (Arg("address", "s"),)),
        Method("SetMode", Manager.set_mode, SET_MODE, (Arg("mode", "s"), _OPTIONS_ARG), options=("interface", "force", "confirm", "peers")),
        Method("Confirm", Manager.confirm, SET_MODE),
        Method("Top", Manager.top, READ, (_OPTIONS_ARG,), _LINES,
               ("by", "limit", "port", "protocol", "interval", "local", "prefix_length", "prefix_length6")),
        Method("Ports", Manager.ports, READ, (_OPTIONS_ARG,), _LINES, ("limit", "port", "protocol", "interval", "local")),
        Method("Flows", Manager.flows, READ, (_OPTIONS_ARG,), _LINES, ("by", "limit", "port", "protocol", "address")),
        Method("Windows", Manager.windows, READ, (_OPTIONS_ARG,), _LINES, ("limit",)),
        Method("Reload", Manager.reload, RELOAD, (_OPTIONS_ARG,), options=("force",)),
        Method("Events", Manager.events, READ, (_OPTIONS_ARG,), _LINES, ("limit",)),
        Method("FollowEvents", Manager.follow_events, READ, (_OPTIONS_ARG,), _LINES),
    )
}  # fmt: skip

PROPERTIES: dict[str, Property] = {
    prop.name: prop
    for prop in (
        Property("Version", "s", lambda service: service.version, constant=True),
        Property("Mode", "s", lambda service: str(service.mode)),
        Property("FileMode", "s", lambda service: str(service.file_mode)),
        Property("Default", "s", lambda service: str(service.default)),
        Property("Interfaces", "as", lambda service: list(service.interfaces)),
        Property("StartedTimestamp", "t", lambda service: int(service.started * 1_000_000), constant=True),
        Property("EntryCount", "u", lambda service: service.entry_count),
        Property("Window", "d", lambda service: float(service.window_seconds)),
        Property("LastWindow", "t", lambda service: service.last_window),
        Property("Flows", "b", lambda service: service.flows_enabled, constant=True),
    )
}

SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal("PolicyChanged"),
        Signal("ModeChanged", (Arg("mode", "s"), Arg("interface", "s"), Arg("by", "s")), ("mode", "interface", "by")),
        Signal("AlertRaised"),
        Signal("AlertCleared"),
        Signal("SourceBlocked"),
        Signal("WindowClosed"),
    )
}


def read_options(method: Method, given: Mapping[str, Variant]) -> dict[str, Any]:
    """Check the a{sv} against the method's row and unwrap it; `UsageError` names the option."""
    options = {}
    for name, value in given.items():
        if name not in method.options:
            known = f"it takes {', '.join(method.options)}" if method.options else "it takes none"
            raise UsageError(f"{method.name} has no option '{name}'", hint=known)
        wanted = OPTIONS[name]
        if value.signature != wanted:
            raise UsageError(f"option '{name}' is {_TYPE_NAMES[wanted]} ({wanted}), not {value.signature}")
        if wanted == "d" and not (math.isfinite(value.value) and value.value > 0):
            raise UsageError(f"option '{name}' is a number of seconds above 0")
        options[name] = value.value
    return options


def property_values(service: Service) -> dict[str, Variant]:
    return {prop.name: Variant(prop.signature, prop.read(service)) for prop in PROPERTIES.values()}


def signal_body(signal: Signal, body: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Signature and arguments of a signal from the service's notification."""
    signature = "".join(arg.signature for arg in signal.args)
    if signal.keys is None:
        return signature, [variants(body)]
    return signature, [str(body.get(key) or "") for key in signal.keys]


def variants(values: Mapping[str, Any]) -> dict[str, Variant]:
    """A JSON-able mapping as a{sv}. None has no D-Bus type: its key is left out."""
    return {str(key): _variant(value) for key, value in values.items() if value is not None}


def _variant(value: Any) -> Variant:
    if isinstance(value, bool):
        return Variant("b", value)
    if isinstance(value, int):
        return Variant("x", value) if -(1 << 63) <= value < 1 << 63 else Variant("t", value & (1 << 64) - 1)
    if isinstance(value, float):
        return Variant("d", value)
    if isinstance(value, Mapping):
        return Variant("a{sv}", variants(value))
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, str) for item in value):
            return Variant("as", [str(item) for item in value])
        return Variant("av", [_variant(item) for item in value if item is not None])
    return Variant("s", str(value))


_STANDARD = """
<interface name="org.freedesktop.DBus.Peer">
 <method name="Ping"/>
 <method name="GetMachineId"><arg name="machine_uuid" type="s" direction="out"/></method>
</interface>
<interface name="org.freedesktop.DBus.Introspectable">
 <method name="Introspect"><arg name="xml_data" type="s" direction="out"/></method>
</interface>
<interface name="org.freedesktop.DBus.Properties">
 <method name="Get">
  <arg name="interface_name" type="s" direction="in"/><arg name="property_name" type="s" direction="in"/>
  <arg name="value" type="v" direction="out"/>
 </method>
 <method name="GetAll">
  <arg name="interface_name" type="s" direction="in"/><arg name="props" type="a{sv}" direction="out"/>
 </method>
 <method name="Set">
  <arg name="interface_name" type="s" direction="in"/><arg name="property_name" type="s" direction="in"/>
  <arg name="value" type="v" direction="in"/>
 </method>
 <signal name="PropertiesChanged">
  <arg name="interface_name" type="s"/><arg name="changed_properties" type="a{sv}"/><arg name="invalidated_properties" type="as"/>
 </signal>
</interface>
"""
_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    '"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_CONSTANT = "org.freedesktop.DBus.Property.EmitsChangedSignal"


def interface_xml() -> ET.Element:
    """Our interface as introspection describes it."""
    root = ET.Element("interface", name=INTERFACE)
    for method in METHODS.values():
        node = ET.SubElement(root, "method", name=method.name)
        for arg in method.takes:
            ET.SubElement(node, "arg", name=arg.name, type=arg.signature, direction="in")
        ET.SubElement(node, "arg", name=method.gives.name, type=method.gives.signature, direction="out")
    for signal in SIGNALS.values():
        node = ET.SubElement(root, "signal", name=signal.name)
        for arg in signal.args:
            ET.SubElement(node, "arg", name=arg.name, type=arg.signature)
    for prop in PROPERTIES.values():
        node = ET.SubElement(root, "property", name=prop.name, type=prop.signature, access="read")
        if prop.constant:
            ET.SubElement(node, "annotation", name=_CONSTANT, value="const")
    return root


def introspect(path: str) -> str | None:
    """The introspection document of a path, None if there is nothing at it or below."""
    root = ET.Element("node")
    if path == PATH:
        root.extend(ET.fromstring(f"<node>{_STANDARD}</node>"))
        root.append(interface_xml())
    elif path == "/":
        ET.SubElement(root, "node", name=PATH[1:].split("/")[0])
    elif PATH.startswith(path + "/"):
        ET.SubElement(root, "node", name=PATH[len(path) + 1 :].split("/")[0])
    else:
        return None
    ET.indent(root, " ")
    return _DOCTYPE + ET.tostring(root, encoding="unicode")
