"""Who may: polkit, asked without blocking, and what holds where there is no polkit.

The subject is the caller's unique bus name, which cannot be taken over by another process as a pid can. A person is asked for a
password only if the caller's message allowed that. uid 0 is never asked about: root must not wait for a service that may hang. Where
polkit is not installed or not running, everyone may read and only uid 0 may change; where it runs and fails, nobody but uid 0 may.

polkit answers a caller that is not root about foreign subjects only if this caller owns the action: the actions' file names the
service's user in its annotation `org.freedesktop.policykit.owner`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from dbus_next import Message, MessageFlag, Variant

from ..errors import NotAuthorizedError
from ..model import Caller
from .connection import BusError, Disconnected

READ = "org.xdpmond1.read"
MANAGE_POLICY = "org.xdpmond1.manage-policy"
SET_MODE = "org.xdpmond1.set-mode"
RELOAD = "org.xdpmond1.reload"

DESTINATION = "org.freedesktop.PolicyKit1"
PATH = "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = "org.freedesktop.PolicyKit1.Authority"

ALLOW_USER_INTERACTION = 0x1
ANSWER_SECONDS = 20.0
"""How long polkit may think when it asks nobody. A person may take as long as the authentication agent allows."""

_ABSENT = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",
)
"""Error names, or beginnings of them, by which the bus says that nothing owns polkit's name and nothing can be started to own it."""

_WHAT = {READ: "see this", MANAGE_POLICY: "change the policy", SET_MODE: "change the mode", RELOAD: "reload the configuration"}


class Bus(Protocol):
    """What the authority needs of a connection."""

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None = 25.0,
    ) -> list[Any]: ...  # fmt: skip

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> int: ...


class Authority:
    """Answers whether a caller may do an action, over one connection."""

    def __init__(self, bus: Bus):
        self._bus = bus
        self._numbers = itertools.count(1)

    async def require(self, caller: Caller, action: str, *, interactive: bool) -> None:
        """Return if the caller may, else raise `NotAuthorizedError`. Cancelled, it takes the question to the person back."""
        if caller.uid == 0:
            return
        what = _WHAT[action]
        cancellation = f"xdpmond-{next(self._numbers)}" if interactive else ""
        subject = ["system-bus-name", {"name": Variant("s", caller.name)}]
        try:
            answer = await self._bus.call(
                DESTINATION, PATH, INTERFACE, "CheckAuthorization", "(sa{sv})sa{ss}us",
                [subject, action, {}, ALLOW_USER_INTERACTION if interactive else 0, cancellation],
                timeout=None if interactive else ANSWER_SECONDS,
            )  # fmt: skip
        except BusError as error:
            if error.name.startswith(_ABSENT):
                if action == READ:
                    return
                raise NotAuthorizedError(f"only root may {what}: polkit is not running", hint="run it with sudo") from None
            raise NotAuthorizedError(f"polkit could not say whether you may {what}: {error.text}", hint="run it with sudo") from error
        except TimeoutError:
            raise NotAuthorizedError(f"polkit did not say whether you may {what}", hint="run it with sudo") from None
        except asyncio.CancelledError:
            if cancellation:
                self._take_back(cancellation)
            raise
        authorized, challenge, _ = answer[0]
        if authorized:
            return
        if challenge and not interactive:
            hint = "run it with sudo, or where you can be asked for a password"
        else:
            hint = f"run it with sudo, or grant {action} in polkit"
        raise NotAuthorizedError(f"you are not authorised to {what}", hint=hint)

    def _take_back(self, cancellation: str) -> None:
        message = Message(destination=DESTINATION, path=PATH, interface=INTERFACE, member="CancelCheckAuthorization", signature="s",
                          body=[cancellation], flags=MessageFlag.NO_REPLY_EXPECTED)  # fmt: skip
        with contextlib.suppress(Disconnected):
            self._bus.send(message)
