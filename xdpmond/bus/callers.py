"""Who is behind a unique bus name, and whether they are still there.

The bus daemon knows the uid and the pid of each connection; it is asked once a caller. A unique name is never given out again, so what
it said holds until the name goes away. Then the caller is forgotten, and a question to polkit on its behalf is taken back: no password
prompt stays behind on somebody's screen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from dbus_next import Message, MessageFlag

from ..model import Caller
from .connection import DAEMON, DAEMON_PATH, BusError, Connection

MAX_KNOWN = 256
"""Callers remembered; each costs a match rule, of which the system bus allows a connection 512."""


class Gone(Exception):
    """The caller left the bus: nobody waits for the answer any more."""


class Callers:
    def __init__(self, connection: Connection):
        self._connection = connection
        self._known: dict[str, Caller] = {}
        self._asking: dict[str, asyncio.Future[Caller]] = {}
        self._left: set[str] = set()
        self._waiting: dict[str, set[asyncio.Task[None]]] = {}

    def known(self, name: str) -> Caller | None:
        """The caller of this unique name, if the bus has said it already."""
        return self._known.get(name)

    async def identify(self, name: str) -> Caller:
        """The caller of this unique name. Raise `Gone` if it is not there any more."""
        known = self.known(name)
        if known is not None:
            return known
        asking = self._asking.get(name)
        if asking is None:
            asking = asyncio.ensure_future(self._ask(name))
            self._asking[name] = asking
            asking.add_done_callback(lambda _: self._asked(name))
        return await asyncio.shield(asking)

    def _asked(self, name: str) -> None:
        self._asking.pop(name, None)
        self._left.discard(name)

    async def _ask(self, name: str) -> Caller:
        # The rule first: a caller that leaves in between is then either unknown to the bus or reported as gone.
        self._match("AddMatch", name)
        try:
            (credentials,) = await self._connection.call(DAEMON, DAEMON_PATH, DAEMON, "GetConnectionCredentials", "s", [name])
        except BusError:
            credentials = {}
        if "UnixUserID" not in credentials or name in self._left:
            self._match("RemoveMatch", name)
            raise Gone(name)
        pid = credentials["ProcessID"].value if "ProcessID" in credentials else None
        caller = Caller(uid=credentials["UnixUserID"].value, name=name, pid=pid)
        while len(self._known) >= MAX_KNOWN:
            self._forget(next(iter(self._known)))
        self._known[name] = caller
        return caller

    async def while_there(self, caller: Caller, question: Coroutine[Any, Any, None]) -> None:
        """Await the question, unless the caller leaves first: then raise `Gone`."""
        task = asyncio.ensure_future(question)
        tasks = self._waiting.setdefault(caller.name, set())
        tasks.add(task)
        try:
            await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Gone(caller.name) from None
        finally:
            tasks.discard(task)
            if not tasks:
                self._waiting.pop(caller.name, None)

    def gone(self, name: str) -> None:
        """The bus says that this name has no owner any more."""
        if name in self._asking:
            self._left.add(name)
        for task in self._waiting.get(name, ()):
            task.cancel()
        if name in self._known:
            self._forget(name)

    def _forget(self, name: str) -> None:
        del self._known[name]
        self._match("RemoveMatch", name)

    def _match(self, member: str, name: str) -> None:
        rule = f"type='signal',sender='{DAEMON}',interface='{DAEMON}',member='NameOwnerChanged',arg0='{name}'"
        self._connection.send(Message(destination=DAEMON, path=DAEMON_PATH, interface=DAEMON, member=member, signature="s", body=[rule],
                                      flags=MessageFlag.NO_REPLY_EXPECTED))  # fmt: skip
