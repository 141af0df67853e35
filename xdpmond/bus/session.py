"""One connection's life on the bus: the calls that came over it, from the header to the answer, and the signals that go out.

Every call is a task. The receiving loop only parses headers and starts tasks, so a slow call delays no other. What one connection may have
under way is bounded, so is what one user may, and what all may but root: nobody takes root's place by taking all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from dbus_next import Message, MessageFlag, Variant

from ..errors import NotAuthorizedError, UsageError, XdpmondError
from ..model import Caller
from . import interface
from .callers import Callers, Gone
from .connection import DAEMON, Connection, Disconnected
from .errormap import ERROR_NAMES, bus_error, clean
from .interface import INTERFACE, METHODS, PATH, PROPERTIES, SIGNALS, Call, Manager, Method, Result, Service
from .payload import Follower
from .polkit import READ, Authority
from .wire import MAX_BODY, Incoming

CALLS_PER_CALLER = 64
"""Of one connection."""
UNKNOWN_CALLS = 16
"""Of one connection, while the bus is asked whose it is. What all may have is bounded by how many connections the bus lets a user have:
until we know who they are, a bound of ours would be one for root as well."""
CALLS_PER_USER = 128
CALLS = 512
"""Of all users but root."""

_Key = TypeVar("_Key")
_STANDARD_ERROR = "org.freedesktop.DBus.Error."
_STANDARD_INTERFACES = ("org.freedesktop.DBus.Peer", "org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Properties")


class Host(Protocol):
    """What outlives a connection, as a session needs it."""

    @property
    def manager(self) -> Manager: ...
    @property
    def service(self) -> Service: ...

    def start(self, work: Coroutine[Any, Any, None]) -> object: ...
    def failed(self, member: str, caller: str) -> None: ...
    def refused(self, member: str, caller: Caller, error: XdpmondError) -> None: ...
    def admit_follower(self, caller: Caller) -> None: ...
    async def follow(self, follower: Follower, caller: Caller) -> None: ...


class Refusal(Exception):
    """A call that the D-Bus conventions already have an error name for."""

    def __init__(self, name: str, text: str):
        super().__init__(text)
        self.name = _STANDARD_ERROR + name


class TooMany(Refusal):
    def __init__(self) -> None:
        super().__init__("LimitsExceeded", "too many calls at once; wait for the answers")


class Session:
    """One connection's life: its callers, and the calls that came over it."""

    def __init__(self, connection: Connection, host: Host):
        self._connection = connection
        self._host = host
        self._callers = Callers(connection)
        self._authority = Authority(connection)
        self._running: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._of_users: Counter[int] = Counter()
        self._checking = False
        self.announced: dict[str, Variant] = {}

    async def receive(self) -> None:
        """Take messages until the connection ends with `Disconnected`."""
        while True:
            message = await self._connection.receive()
            await asyncio.sleep(0)  # a flood of messages must not keep the loop from everything else
            if message.is_call:
                self._accept(message)
                continue
            if message.is_signal and message.sender == DAEMON and message.member == "NameOwnerChanged" and message.signature == "sss":
                name, _, owner = message.body()
                if not owner:
                    self._callers.gone(name)
            message.close()

    def _accept(self, message: Incoming) -> None:
        if self._running[message.sender] >= CALLS_PER_CALLER:
            refusal = TooMany()
            self._fail(message, refusal.name, str(refusal))
            message.close()
            return
        self._running[message.sender] += 1
        self._host.start(self._handle(message))

    async def _handle(self, message: Incoming) -> None:
        """One call from beginning to end. Nothing but cancellation gets out of here."""
        try:
            await self._answer(message)
        except XdpmondError as error:
            self._fail(message, *bus_error(error))
        except Refusal as refusal:
            self._fail(message, refusal.name, str(refusal))
        except (Gone, Disconnected):
            pass
        except Exception:
            self._host.failed(message.member, message.sender)
            self._fail(message, ERROR_NAMES["failed"], f"{clean(message.member)} failed inside xdpmond\nthe daemon's journal says why")
        finally:
            message.close()
            _count_down(self._running, message.sender)

    async def _answer(self, message: Incoming) -> None:
        if message.path == PATH and message.interface in (INTERFACE, "") and message.member in METHODS:
            await self._run(METHODS[message.member], message)
        else:
            self._reply(message, *self._standard(message))

    async def _run(self, method: Method, message: Incoming) -> None:
        if message.signature != method.signature:
            raise Refusal("InvalidArgs", f"{method.name} takes '{method.signature}', not '{message.signature}'")
        if message.too_long:
            raise UsageError(f"the call is longer than {MAX_BODY} bytes", hint="give many prefixes as a file")
        caller = await self._identify(message.sender)
        with self._admitted(caller):
            self._return(message, method, caller, await self._do(method, message, caller))

    async def _identify(self, name: str) -> Caller:
        known = self._callers.known(name)
        if known is not None:
            return known
        if self._unknown[name] >= UNKNOWN_CALLS:
            raise TooMany
        with _counted(self._unknown, name):
            return await self._callers.identify(name)

    @contextlib.contextmanager
    def _admitted(self, caller: Caller) -> Iterator[None]:
        if caller.uid == 0:
            yield
            return
        if self._of_users[caller.uid] >= CALLS_PER_USER or self._of_users.total() >= CALLS:
            raise TooMany
        with _counted(self._of_users, caller.uid):
            yield

    async def _do(self, method: Method, message: Incoming, caller: Caller) -> Result:
        try:
            arguments = message.body() if method.takes else []
        except ValueError as error:
            raise Refusal("InvalidArgs", str(error)) from None
        options = interface.read_options(method, arguments[-1]) if method.takes and method.takes[-1].signature == "a{sv}" else {}
        try:
            await self._callers.while_there(caller, self._authority.require(caller, method.action, interactive=message.may_interact))
        except NotAuthorizedError as error:
            if method.action != READ:
                self._host.refused(method.name, caller, error)
            raise
        descriptor = -1
        if "h" in method.signature:
            try:
                descriptor = message.take_descriptor(arguments[0])
            except ValueError as error:
                raise UsageError(str(error)) from None
        try:
            return await method.run(self._host.manager, Call(caller, arguments, options, descriptor))
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _return(self, message: Incoming, method: Method, caller: Caller, result: Result) -> None:
        if isinstance(result, str):
            self._reply(message, method.gives.signature, [result])
            return
        if isinstance(result, int):
            self._reply(message, method.gives.signature, [0], (result,))
            return
        try:
            self._host.admit_follower(caller)
        except XdpmondError:
            result.discard()
            raise
        reader = result.reader
        self._host.start(self._host.follow(result, caller))
        self._reply(message, method.gives.signature, [0], (reader,))

    # The interfaces that every object has. They need no authorisation: they tell nothing that signals do not tell everyone.

    def _standard(self, message: Incoming) -> tuple[str, list[Any]]:
        wanted, member = message.interface, message.member
        if wanted in ("org.freedesktop.DBus.Peer", "") and member == "Ping":
            return "", []
        if wanted in ("org.freedesktop.DBus.Peer", "") and member == "GetMachineId":
            return "s", [machine_id()]
        document = interface.introspect(message.path)
        if document is None:
            raise Refusal("UnknownObject", f"there is no object {message.path}; it is {PATH}")
        if wanted in ("org.freedesktop.DBus.Introspectable", "") and member == "Introspect":
            return "s", [document]
        if message.path == PATH and wanted in ("org.freedesktop.DBus.Properties", "") and member in ("Get", "GetAll", "Set"):
            return self._properties(message)
        if wanted not in ("", INTERFACE, *_STANDARD_INTERFACES):
            raise Refusal("UnknownInterface", f"{message.path} has no interface {wanted}")
        raise Refusal("UnknownMethod", f"{message.path} has no method {wanted or INTERFACE}.{member}")

    def _properties(self, message: Incoming) -> tuple[str, list[Any]]:
        wanted = {"Get": "ss", "GetAll": "s", "Set": "ssv"}[message.member]
        if message.signature != wanted:
            raise Refusal("InvalidArgs", f"{message.member} takes '{wanted}', not '{message.signature}'")
        try:
            arguments = message.body()
        except ValueError as error:
            raise Refusal("InvalidArgs", str(error)) from None
        ours = arguments[0] in (INTERFACE, "")
        if message.member == "GetAll":
            return "a{sv}", [interface.property_values(self._host.service) if ours else {}]
        prop = PROPERTIES.get(arguments[1]) if ours else None
        if prop is None:
            raise Refusal("UnknownProperty", f"{arguments[0] or INTERFACE} has no property {arguments[1]}")
        if message.member == "Set":
            raise Refusal("PropertyReadOnly", f"{prop.name} is read-only")
        return "v", [Variant(prop.signature, prop.read(self._host.service))]

    # Out.

    def _reply(self, message: Incoming, signature: str, body: list[Any], descriptors: tuple[int, ...] = ()) -> None:
        """Answer the call. The descriptors are closed in every case."""
        if message.wants_reply:
            self._connection.send(Message.new_method_return(_as_call(message), signature, body), descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)

    def _fail(self, message: Incoming, name: str, text: str) -> None:
        if message.wants_reply:
            with contextlib.suppress(Disconnected):
                self._connection.send(Message.new_error(_as_call(message), name, text))

    def notify(self, name: str, body: Mapping[str, Any]) -> None:
        """Emit the signal of this name, if it is one, and look for changed properties once the service has finished its change."""
        signal = SIGNALS.get(name)
        if signal is not None:
            signature, arguments = interface.signal_body(signal, body)
            self._emit(INTERFACE, name, signature, arguments)
        if not self._checking:
            self._checking = True
            asyncio.get_running_loop().call_soon(self._announce)

    def _announce(self) -> None:
        self._checking = False
        try:
            values = interface.property_values(self._host.service)
            changed = {name: value for name, value in values.items() if value != self.announced.get(name)}
            if changed:
                self.announced = values
                self._emit("org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", [INTERFACE, changed, []])
        except Exception:
            self._host.failed("PropertiesChanged", "the service")

    def _emit(self, name: str, member: str, signature: str, body: list[Any]) -> None:
        self._connection.emit(Message.new_signal(PATH, name, member, signature, body))


@contextlib.contextmanager
def _counted(counter: Counter[_Key], key: _Key) -> Iterator[None]:
    counter[key] += 1
    try:
        yield
    finally:
        _count_down(counter, key)


def _count_down(counter: Counter[_Key], key: _Key) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def machine_id() -> str:
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError), open(place, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    raise Refusal("Failed", "this machine has no machine-id")


def _as_call(message: Incoming) -> Message:
    """What dbus_next needs in order to address an answer."""
    return Message(sender=message.sender, serial=message.serial, path=PATH, member="Reply", flags=MessageFlag.NONE)
