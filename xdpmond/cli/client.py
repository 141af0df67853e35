"""The daemon as seen over D-Bus: one blocking connection, one call at a time.

A command line makes one call and ends, so there is no event loop here. dbus_next composes and reads the messages; the socket is ours.
Its package module, however, imports asyncio and GLib for the two loops it supports, which takes longer than all else that xdpmonctl
does. `_load_dbus_next` therefore loads the message modules alone.

Bulk answers come as a descriptor (a sealed memfd, or a pipe for the event stream) that holds JSON Lines; `_lines` reads it line by line,
so that a million entries never stand in memory at once.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ERRORS, NotAuthorizedError, NotRunningError, XdpmondError

if TYPE_CHECKING:
    from dbus_next.message import Message

NAME = "org.xdpmond1"
PATH = "/org/xdpmond1"
INTERFACE = "org.xdpmond1.Manager"
ERROR_PREFIX = "org.xdpmond1.Error."

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
_BUS = "org.freedesktop.DBus"
TIMEOUT_SECONDS = 60.0
"""How long one answer may take: a policy of a million prefixes needs seconds, nothing needs a minute."""
PERSON_SECONDS = 300.0
"""The same where polkit may first ask a person for a password."""

START_HINT = "start it with: systemctl start xdpmond"
ROOT_HINT = "run it with sudo, or have an administrator allow it by polkit"

_OPTION_TYPES = {
    "seconds": "d", "reason": "s", "force": "b", "peers": "as", "interface": "s", "confirm": "d", "by": "s", "limit": "u", "port": "q",
    "protocol": "s", "interval": "b", "local": "b", "address": "s", "prefix_length": "q", "prefix_length6": "q",
}  # fmt: skip


def bus_address(argument: str | None, environ: Mapping[str, str]) -> str:
    """The bus to ask: the option, else XDPMOND_BUS, else the system bus."""
    return argument or environ.get("XDPMOND_BUS") or environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS


def ssh_peers(environ: Mapping[str, str]) -> list[str]:
    """Where the person running this sits, by SSH_CONNECTION; empty when not over SSH, or under sudo, which drops it.

    The daemon's guard finds SSH connections by itself; this only adds one that it may not see.
    """
    words = environ.get("SSH_CONNECTION", "").split()
    if not words:
        return []
    address = words[0].partition("%")[0]
    if address.lower().startswith("::ffff:") and "." in address:
        address = address[7:]
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, ValueError):
        return []
    return [address]


class Daemon:
    """The calls of org.xdpmond1.Manager. Options are by name, as the bus contract has them; answers are the daemon's documents.

    The connection is made at the first call. Every failure is an `XdpmondError`.
    """

    def __init__(self, address: str, *, interactive: bool = False) -> None:
        self._address = address
        self._interactive = interactive
        self._connection: _Connection | None = None

    def describe(self) -> dict[str, Any]:
        return self._document("Describe")

    def change(self, verdict: str, prefixes: Sequence[str], options: Mapping[str, object]) -> dict[str, Any]:
        return self._document({"allow": "Allow", "deny": "Deny"}[verdict], "asa{sv}", [list(prefixes), options])

    def change_from_file(self, verdict: str, descriptor: int, options: Mapping[str, object]) -> dict[str, Any]:
        return self._document("ChangeFromFile", "hsa{sv}", [0, verdict, options], [descriptor])

    def remove(self, prefixes: Sequence[str], options: Mapping[str, object]) -> dict[str, Any]:
        return self._document("Remove", "asa{sv}", [list(prefixes), options])

    def explain(self, address: str) -> dict[str, Any]:
        return self._document("Explain", "s", [address])

    def set_mode(self, mode: str, options: Mapping[str, object]) -> dict[str, Any]:
        return self._document("SetMode", "sa{sv}", [mode, options])

    def confirm(self) -> dict[str, Any]:
        return self._document("Confirm")

    def reload(self, options: Mapping[str, object]) -> dict[str, Any]:
        return self._document("Reload", "a{sv}", [options])

    def entries(self) -> Iterator[bytes]:
        return self._bulk("List", {})

    def top(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._bulk("Top", options)

    def ports(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._bulk("Ports", options)

    def windows(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._bulk("Windows", options)

    def flows(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._bulk("Flows", options)

    def events(self, options: Mapping[str, object]) -> Iterator[bytes]:
        return self._bulk("Events", options)

    def follow_events(self) -> Iterator[bytes]:
        return self._bulk("FollowEvents", {})

    def _document(self, member: str, signature: str = "", body: Sequence[Any] = (), descriptors: Sequence[int] = ()) -> dict[str, Any]:
        reply, received = self._call(member, signature, body, descriptors)
        _close(received)
        try:
            document = json.loads(reply[0])
        except (IndexError, TypeError, ValueError):
            document = None
        if not isinstance(document, dict):
            raise XdpmondError(f"the daemon's answer to {member} cannot be read", hint="daemon and client may differ in version")
        return document

    def _bulk(self, member: str, options: Mapping[str, object]) -> Iterator[bytes]:
        reply, received = self._call(member, "a{sv}", [options])
        try:
            descriptor = received.pop(reply[0])
        except (IndexError, TypeError):
            _close(received)
            raise XdpmondError(
                f"the daemon's answer to {member} carries no descriptor", hint="daemon and client may differ in version"
            ) from None
        _close(received)
        return _lines(descriptor)

    def _call(self, member: str, signature: str, body: Sequence[Any], descriptors: Sequence[int] = ()) -> tuple[list[Any], list[int]]:
        if self._connection is None:
            self._connection = _Connection(self._address, self._interactive)
        return self._connection.call(NAME, PATH, INTERFACE, member, signature, body, descriptors)


class _Connection:
    """A connection to a message bus, ready for calls."""

    def __init__(self, address: str, interactive: bool) -> None:
        self._interactive = interactive
        self._serial = 0
        self._socket = _connect(address)
        try:
            self._authenticate()
            self.call(_BUS, "/org/freedesktop/DBus", _BUS, "Hello")
        except (OSError, EOFError) as error:
            raise NotRunningError(f"the bus at {address} does not talk to us: {error}") from None

    def call(
        self,
        name: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        descriptors: Sequence[int] = (),
    ) -> tuple[list[Any], list[int]]:
        """Call a method; return the answer's body and the descriptors that came with it."""
        _load_dbus_next()
        from dbus_next.constants import MessageFlag
        from dbus_next.message import Message

        flags = MessageFlag.NO_AUTOSTART
        if self._interactive:
            flags |= MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
        self._serial += 1
        message = Message(
            destination=name, path=path, interface=interface, member=member, flags=flags, signature=signature,
            body=[_variants(item) if isinstance(item, dict) else item for item in body], unix_fds=list(descriptors), serial=self._serial,
        )  # fmt: skip
        try:
            self._send(message._marshall(negotiate_unix_fd=True), descriptors)
            reply = self._receive(self._serial, name)
        except TimeoutError:
            raise XdpmondError(
                f"the daemon did not answer within {self._socket.gettimeout():.0f} s", hint="systemctl status xdpmond"
            ) from None
        except (ConnectionError, EOFError):
            raise NotRunningError("the bus closed the connection", hint="systemctl status dbus xdpmond") from None
        if reply.error_name:
            _close(reply.unix_fds)
            raise _error(reply.error_name, reply.body[0] if reply.body and isinstance(reply.body[0], str) else "", member)
        return reply.body, reply.unix_fds

    def _send(self, data: bytes, descriptors: Sequence[int]) -> None:
        view = memoryview(data)
        sent = socket.send_fds(self._socket, [view], list(descriptors)) if descriptors else 0
        self._socket.sendall(view[sent:])

    def _receive(self, serial: int, name: str) -> Message:
        """The answer to the call of this serial to this name; what else comes meanwhile is passed over."""
        from dbus_next._private.unmarshaller import Unmarshaller

        while True:
            reader = Unmarshaller(None, self._socket)
            # It returns None when a read fell short, and goes on from there at the next call.
            while (message := reader.unmarshall()) is None:
                pass
            if message.reply_serial == serial and _answers(message, name):
                return message
            _close(message.unix_fds)

    def _authenticate(self) -> None:
        _load_dbus_next()
        from dbus_next.auth import AuthExternal
        from dbus_next.errors import AuthError

        self._socket.settimeout(TIMEOUT_SECONDS)
        external = AuthExternal()
        line = external._authentication_start(negotiate_unix_fd=True)
        self._socket.sendall(b"\0")
        try:
            while True:
                self._socket.sendall(f"{line}\r\n".encode())
                if line == "BEGIN":
                    break
                line = external._receive_line(self._read_line())
        except (AuthError, ValueError):
            raise NotAuthorizedError("the bus does not accept this user") from None
        self._socket.settimeout(PERSON_SECONDS if self._interactive else TIMEOUT_SECONDS)

    def _read_line(self) -> str:
        """One line of the handshake; the bus sends nothing after it before it is asked."""
        line = b""
        while not line.endswith(b"\r\n"):
            chunk = self._socket.recv(512)
            if not chunk or len(line) > 4096:
                raise EOFError("it ended the handshake")
            line += chunk
        return line[:-2].decode("ascii", "replace")


def _load_dbus_next() -> None:
    """Make dbus_next's message modules importable without running the package's own __init__.

    A bare package stands in while they load and is taken away again, so that a later `import dbus_next` gets the real one. The errors
    module comes first because it and `message` import each other.
    """
    if "dbus_next" in sys.modules or "dbus_next.message" in sys.modules:
        return
    spec = importlib.machinery.PathFinder.find_spec("dbus_next")
    if spec is None or spec.submodule_search_locations is None:
        raise XdpmondError("the Python library dbus_next is not installed", hint="apt install python3-dbus-next")
    stand_in = ModuleType("dbus_next")
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules["dbus_next"] = stand_in
    try:
        import dbus_next.errors  # noqa: I001
        import dbus_next._private.unmarshaller
        import dbus_next.auth  # noqa: F401
    finally:
        del sys.modules["dbus_next"]


def _answers(message: Message, name: str) -> bool:
    """Is it an answer, and from the bus, if it was the bus that we called? Anybody may send a call or a signal that carries our serial,
    and not every bus holds it back. Of a service we do not know the unique name; a return comes only from whom we called."""
    from dbus_next.constants import MessageType

    if message.message_type not in (MessageType.METHOD_RETURN, MessageType.ERROR):
        return False
    by_bus = message.sender == _BUS
    return by_bus if name == _BUS else not by_bus or message.message_type is MessageType.ERROR


def _variants(options: Mapping[str, object]) -> dict[str, object]:
    from dbus_next.signature import Variant

    return {name: Variant(_OPTION_TYPES[name], value) for name, value in options.items()}


def _connect(addresses: str) -> socket.socket:
    """Connect to the first of the addresses (`unix:path=...;unix:abstract=...`) that answers."""
    problem = "only unix:path= and unix:abstract= are supported"
    for address in addresses.split(";"):
        transport, _, pairs = address.partition(":")
        values = dict(pair.partition("=")[::2] for pair in pairs.split(","))
        where = _unescape(values["path"]) if "path" in values else b"\0" + _unescape(values.get("abstract", ""))
        if transport != "unix" or not where.strip(b"\0"):
            continue
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(where)
        except (OSError, ValueError) as error:
            connection.close()
            problem = getattr(error, "strerror", None) or str(error)
            continue
        return connection
    raise NotRunningError(
        f"no message bus at {addresses}: {problem}", hint="the daemon is reached over it; start both with: systemctl start dbus xdpmond"
    )


def _unescape(value: str) -> bytes:
    """A value of a bus address: bytes outside a small set are written %XX."""
    head, *rest = os.fsencode(value).split(b"%")
    for part in rest:
        try:
            head += bytes([int(part[:2], 16)]) + part[2:]
        except ValueError:
            head += b"%" + part
    return head


def _error(name: str, text: str, member: str) -> XdpmondError:
    """An error reply as an exception of ours: by the code that the daemon put into the name, never by its text."""
    message, _, hint = text.partition("\n")
    if name.startswith(ERROR_PREFIX):
        kind = _BY_NAME.get(name[len(ERROR_PREFIX) :], XdpmondError)
        return kind(message or "the daemon gives no reason", hint=hint or (ROOT_HINT if kind is NotAuthorizedError else ""))
    short = name.rpartition(".")[2]
    if short in ("ServiceUnknown", "NameHasNoOwner"):
        return NotRunningError("the daemon is not running", hint=START_HINT)
    if short in ("NoReply", "Disconnected"):
        return NotRunningError("the daemon ended before it answered", hint="see why with: journalctl -u xdpmond -n 20")
    if short in ("AccessDenied", "AuthFailed", "InteractiveAuthorizationRequired"):
        return NotAuthorizedError(f"the bus refuses the call: {message}" if message else "the bus refuses the call", hint=ROOT_HINT)
    if short in ("UnknownMethod", "UnknownObject", "UnknownInterface", "InvalidArgs"):
        return XdpmondError(
            f"the running daemon does not take {member} as this client sends it", hint="after an upgrade: systemctl restart xdpmond"
        )
    return XdpmondError(f"{name}: {message}" if message else name)


def _camel(code: str) -> str:
    return "".join(part.capitalize() for part in code.split("-"))


_BY_NAME = {_camel(code): kind for code, kind in ERRORS.items()}


def _lines(descriptor: int) -> Iterator[bytes]:
    with open(descriptor, "rb", buffering=1 << 16) as stream:
        if stream.seekable():
            stream.seek(0)  # a memfd's position is shared with who wrote it
        while line := stream.readline():
            yield line


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
