"""The daemon's presence on the bus: connection, name, calls under way, signals; and all of it again when the bus comes back.

The daemon works without a bus. If there is none, or it refuses us, the reason is logged once, shown as `problem`, and tried again with
growing pauses. A call that is running when the bus goes away is not cancelled, for a change half made helps nobody; its answer is lost.

Every call is a task. The receiving loop only parses headers and starts tasks, so a slow call delays no other. What one caller may have
under way is bounded, and so is what all may.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dbus_next import Message, MessageFlag, Variant

from ..errors import NotAuthorizedError, UsageError, XdpmondError
from ..model import Caller
from .callers import Callers, Gone
from .connection import DAEMON, DAEMON_PATH, MAX_BODY, BusError, Connection, Disconnected, Incoming
from .errormap import ERROR_NAMES, bus_error, clean
from .interface import (
    INTERFACE, METHODS, NAME, PATH, PROPERTIES, SIGNALS, Call, Manager, Method, Result, Service, introspect, property_values, read_options,
    signal_body,
)  # fmt: skip
from .payload import Follower
from .polkit import READ, Authority

Log = Callable[[int, str], None]
"""Syslog priority (3 error, 4 warning, 5 notice, 6 information) and message."""
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6

CALLS_PER_CALLER = 64
CALLS = 512
FOLLOWERS_PER_USER = 16
FOLLOWERS = 64
"""Of all users but root."""
REFUSAL_SECONDS = 60.0
"""The same user refused the same method is logged once in this time."""

_STANDARD_ERROR = "org.freedesktop.DBus.Error."
_DO_NOT_QUEUE = 4
_PRIMARY_OWNER, _ALREADY_OWNER = 1, 4


class Refusal(Exception):
    """A call that the D-Bus conventions already have an error name for."""

    def __init__(self, name: str, text: str):
        super().__init__(text)
        self.name = _STANDARD_ERROR + name


class BusServer:
    """Serves one service on one bus. `run` is owned by the daemon's task group and ends by cancellation only."""

    def __init__(self, service: Service, address: str | None, log: Log, *, first_pause: float = 1.0, longest_pause: float = 60.0):
        self._service = service
        self._manager = Manager(service)
        self._address = address
        self._log = log
        self._pauses = (first_pause, longest_pause)
        self._session: Session | None = None
        self._settled = asyncio.Event()
        self._followers: Counter[int] = Counter()
        self._refusals: dict[tuple[int, str], float] = {}
        self.problem = ""
        """Why the bus is not there, in one line; empty while connected."""

    @property
    def connected(self) -> bool:
        """Do we own our name on the bus?"""
        return self._session is not None

    async def settled(self) -> None:
        """Wait until the first attempt has ended, well or not: a unit is ready when its name is there, or cannot be had."""
        await self._settled.wait()

    async def run(self) -> None:
        unsubscribe = self._service.subscribe(self._notify)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._keep_connected(tasks)
        finally:
            unsubscribe()

    async def _keep_connected(self, tasks: asyncio.TaskGroup) -> None:
        pause, longest = self._pauses
        while True:
            try:
                connection = await Connection.open(self._address)
                try:
                    await self._serve(connection, tasks)
                finally:
                    connection.close()
            except (Disconnected, BusError, TimeoutError) as error:
                if self._session is not None:
                    pause = self._pauses[0]
                self._session = None
                self._report(str(error) or "the bus does not answer")
            finally:
                self._session = None
                self._settled.set()
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    async def _serve(self, connection: Connection, tasks: asyncio.TaskGroup) -> None:
        session = Session(connection, self, tasks)
        receiving = asyncio.create_task(session.receive())
        naming = asyncio.create_task(take_name(connection))
        try:
            await asyncio.wait({receiving, naming}, return_when=asyncio.FIRST_COMPLETED)
            if naming.done():
                naming.result()
                session.announced = property_values(self._service)
                self._session = session
                self.problem = ""
                self._settled.set()
                self._log(INFO, f"on the bus as {NAME}")
            await receiving
        finally:
            receiving.cancel()
            naming.cancel()
            await asyncio.gather(receiving, naming, return_exceptions=True)

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            self._log(WARNING, f"not on the bus, xdpmonctl cannot reach this daemon: {problem}")

    def _notify(self, name: str, body: Mapping[str, Any]) -> None:
        """The service's callback. It never raises: what the bus cannot carry is no reason to fail a change."""
        session = self._session
        if session is None:
            return
        try:
            session.notify(name, body)
        except Exception:
            self._log(ERROR, f"signal {name} could not be sent:\n{traceback.format_exc()}")

    # What the sessions share.

    @property
    def manager(self) -> Manager:
        return self._manager

    @property
    def service(self) -> Service:
        return self._service

    def failed(self, member: str, caller: str) -> None:
        """Log the exception being handled, whole: the caller gets one line."""
        self._log(ERROR, f"{member} called by {caller} failed:\n{traceback.format_exc()}")

    def refused(self, member: str, caller: Caller, error: XdpmondError) -> None:
        now = asyncio.get_running_loop().time()
        key = (caller.uid, member)
        if now - self._refusals.get(key, -REFUSAL_SECONDS) < REFUSAL_SECONDS:
            return
        if len(self._refusals) >= 256:
            self._refusals.clear()
        self._refusals[key] = now
        self._log(NOTICE, f"refused {member} to uid {caller.uid} (pid {caller.pid}): {error.message}")

    async def follow(self, follower: Follower, caller: Caller) -> None:
        """Run a follower to its end; it was counted by `admit_follower`."""
        try:
            await follower.run()
        except Exception:
            self.failed("FollowEvents", caller.name)
        finally:
            self._followers[caller.uid] -= 1

    def admit_follower(self, caller: Caller) -> None:
        if caller.uid != 0:
            others = sum(count for uid, count in self._followers.items() if uid != 0)
            if self._followers[caller.uid] >= FOLLOWERS_PER_USER or others >= FOLLOWERS:
                raise XdpmondError("too many programs follow the events already", hint="end one of them")
        self._followers[caller.uid] += 1


class Session:
    """One connection's life: its callers, and the calls that came over it."""

    def __init__(self, connection: Connection, server: BusServer, tasks: asyncio.TaskGroup):
        self._connection = connection
        self._server = server
        self._tasks = tasks
        self._callers = Callers(connection)
        self._authority = Authority(connection)
        self._running: Counter[str] = Counter()
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
        sender = message.sender
        if self._running[sender] >= CALLS_PER_CALLER or self._running.total() >= CALLS:
            self._fail(message, _STANDARD_ERROR + "LimitsExceeded", "too many calls at once; wait for the answers")
            message.close()
            return
        self._running[sender] += 1
        self._tasks.create_task(self._handle(message))

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
            self._server.failed(message.member, message.sender)
            self._fail(message, ERROR_NAMES["failed"], f"{clean(message.member)} failed inside xdpmond\nthe daemon's journal says why")
        finally:
            message.close()
            self._running[message.sender] -= 1
            if self._running[message.sender] <= 0:
                del self._running[message.sender]

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
        try:
            arguments = message.body() if method.takes else []
        except ValueError as error:
            raise Refusal("InvalidArgs", str(error)) from None
        options = read_options(method, arguments[-1]) if method.takes and method.takes[-1].signature == "a{sv}" else {}
        caller = await self._callers.identify(message.sender)
        try:
            await self._callers.while_there(caller, self._authority.require(caller, method.action, interactive=message.may_interact))
        except NotAuthorizedError as error:
            if method.action != READ:
                self._server.refused(method.name, caller, error)
            raise
        descriptor = -1
        if "h" in method.signature:
            try:
                descriptor = message.take_descriptor(arguments[0])
            except ValueError as error:
                raise UsageError(str(error)) from None
        try:
            result = await method.run(self._server.manager, Call(caller, arguments, options, descriptor))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        self._return(message, method, caller, result)

    def _return(self, message: Incoming, method: Method, caller: Caller, result: Result) -> None:
        if isinstance(result, str):
            self._reply(message, method.gives.signature, [result])
            return
        if isinstance(result, int):
            self._reply(message, method.gives.signature, [0], (result,))
            return
        try:
            self._server.admit_follower(caller)
        except XdpmondError:
            result.discard()
            raise
        reader = result.reader
        self._tasks.create_task(self._server.follow(result, caller))
        self._reply(message, method.gives.signature, [0], (reader,))

    # The interfaces that every object has. They need no authorisation: they tell nothing that signals do not tell everyone.

    def _standard(self, message: Incoming) -> tuple[str, list[Any]]:
        interface, member = message.interface, message.member
        if interface in ("org.freedesktop.DBus.Peer", "") and member == "Ping":
            return "", []
        if interface in ("org.freedesktop.DBus.Peer", "") and member == "GetMachineId":
            return "s", [machine_id()]
        document = introspect(message.path)
        if document is None:
            raise Refusal("UnknownObject", f"there is no object {message.path}; it is {PATH}")
        if interface in ("org.freedesktop.DBus.Introspectable", "") and member == "Introspect":
            return "s", [document]
        if message.path == PATH and interface in ("org.freedesktop.DBus.Properties", "") and member in ("Get", "GetAll", "Set"):
            return self._properties(message)
        if interface not in ("", INTERFACE, "org.freedesktop.DBus.Peer", "org.freedesktop.DBus.Introspectable",
                             "org.freedesktop.DBus.Properties"):  # fmt: skip
            raise Refusal("UnknownInterface", f"{message.path} has no interface {interface}")
        raise Refusal("UnknownMethod", f"{message.path} has no method {interface or INTERFACE}.{member}")

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
            return "a{sv}", [property_values(self._server.service) if ours else {}]
        prop = PROPERTIES.get(arguments[1]) if ours else None
        if prop is None:
            raise Refusal("UnknownProperty", f"{arguments[0] or INTERFACE} has no property {arguments[1]}")
        if message.member == "Set":
            raise Refusal("PropertyReadOnly", f"{prop.name} is read-only")
        return "v", [Variant(prop.signature, prop.read(self._server.service))]

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
            signature, arguments = signal_body(signal, body)
            self._emit(INTERFACE, name, signature, arguments)
        if not self._checking:
            self._checking = True
            asyncio.get_running_loop().call_soon(self._announce)

    def _announce(self) -> None:
        self._checking = False
        try:
            values = property_values(self._server.service)
            changed = {name: value for name, value in values.items() if value != self.announced.get(name)}
            if changed:
                self.announced = values
                self._emit("org.freedesktop.DBus.Properties", "PropertiesChanged", "sa{sv}as", [INTERFACE, changed, []])
        except Exception:
            self._server.failed("PropertiesChanged", "the service")

    def _emit(self, interface: str, member: str, signature: str, body: list[Any]) -> None:
        self._connection.emit(Message.new_signal(PATH, interface, member, signature, body))


async def take_name(connection: Connection) -> None:
    """Own our name, or raise `Disconnected` with the reason and what to do."""
    try:
        (answer,) = await connection.call(DAEMON, DAEMON_PATH, DAEMON, "RequestName", "su", [NAME, _DO_NOT_QUEUE])
    except BusError as error:
        if error.name == _STANDARD_ERROR + "AccessDenied":
            raise Disconnected(f"the bus policy does not let uid {os.geteuid()} own {NAME}; is {NAME}.conf installed, and the bus reloaded"
                               " since?") from None  # fmt: skip
        raise
    if answer not in (_PRIMARY_OWNER, _ALREADY_OWNER):
        owner = await _owner(connection)
        raise Disconnected(f"the name {NAME} is taken{owner}; is another xdpmond running?")


async def _owner(connection: Connection) -> str:
    with contextlib.suppress(BusError):
        (pid,) = await connection.call(DAEMON, DAEMON_PATH, DAEMON, "GetConnectionUnixProcessID", "s", [NAME])
        return f" by process {pid}"
    return ""


def machine_id() -> str:
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError), open(place, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    raise Refusal("Failed", "this machine has no machine-id")


def _as_call(message: Incoming) -> Message:
    """What dbus_next needs in order to address an answer."""
    return Message(sender=message.sender, serial=message.serial, path=PATH, member="Reply", flags=MessageFlag.NONE)
