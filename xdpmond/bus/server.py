"""The daemon's presence on the bus: connection, name, calls under way, signals; and all of it again when the bus comes back.

The daemon works without a bus. If there is none, or it refuses us, the reason is logged once, shown as `problem`, and tried again with
growing pauses. A call that is running when the bus goes away is not cancelled, for a change half made helps nobody; its answer is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from ..errors import XdpmondError
from ..model import Caller
from .connection import DAEMON, DAEMON_PATH, BusError, Connection, Disconnected
from .interface import NAME, Manager, Service, property_values
from .payload import Follower
from .session import Session

Log = Callable[[int, str], None]
"""Syslog priority (3 error, 4 warning, 5 notice, 6 information) and message."""
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6

FOLLOWERS_PER_USER = 16
FOLLOWERS = 64
"""Of all users but root."""
REFUSAL_SECONDS = 60.0
"""The same user refused the same method is logged once in this time."""

_ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
_DO_NOT_QUEUE = 4
_PRIMARY_OWNER, _ALREADY_OWNER = 1, 4


class BusServer:
    """Serves one service on one bus. `run` is owned by the daemon's task group and ends by cancellation only."""

    def __init__(self, service: Service, address: str | None, log: Log, *, first_pause: float = 1.0, longest_pause: float = 60.0):
        self._service = service
        self._manager = Manager(service)
        self._address = address
        self._log = log
        self._pauses = (first_pause, longest_pause)
        self._session: Session | None = None
        self._tasks: asyncio.TaskGroup | None = None
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
                self._tasks = tasks
                await self._keep_connected()
        finally:
            unsubscribe()

    async def _keep_connected(self) -> None:
        pause, longest = self._pauses
        while True:
            try:
                connection = await Connection.open(self._address)
                try:
                    await self._serve(connection)
                finally:
                    connection.close()
            except (Disconnected, BusError, TimeoutError) as error:
                if self._session is not None:
                    pause = self._pauses[0]
                self._session = None
                self._report(str(error) or "the bus does not answer")
            except Exception:
                # A fault of ours: the daemon goes on filtering without a bus, and a new connection starts clean.
                self.problem = "internal error; the journal has the details"
                self._log(ERROR, f"the connection to the bus failed:\n{traceback.format_exc()}")
            finally:
                self._session = None
                self._settled.set()
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    async def _serve(self, connection: Connection) -> None:
        session = Session(connection, self)
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

    def start(self, work: Coroutine[Any, Any, None]) -> object:
        """Run a task that outlives the connection and ends with the server."""
        assert self._tasks is not None
        return self._tasks.create_task(work)

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


async def take_name(connection: Connection) -> None:
    """Own our name, or raise `Disconnected` with the reason and what to do."""
    try:
        (answer,) = await connection.call(DAEMON, DAEMON_PATH, DAEMON, "RequestName", "su", [NAME, _DO_NOT_QUEUE])
    except BusError as error:
        if error.name == _ACCESS_DENIED:
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
