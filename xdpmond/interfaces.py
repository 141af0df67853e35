"""Which interfaces are watched, and keeping it so: wait for those that are absent, let go those that leave, attach those that come back.

`reconcile` compares what the configuration wants with what netlink shows, and does what is missing; it is called after every change of
either. It never asks twice for the same refusal's attention: a problem is reported when it appears or changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .config import Config
from .errors import ForeignProgramError, KernelError
from .messages import Message, Record
from .model import AttachMode, Mode

DEFAULT = "default"


class Link(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def ifindex(self) -> int: ...
    @property
    def mtu(self) -> int: ...
    @property
    def up(self) -> bool: ...
    @property
    def carrier(self) -> bool: ...


class Attachment(Protocol):
    @property
    def ifindex(self) -> int: ...
    @property
    def mode(self) -> AttachMode: ...
    @property
    def reason(self) -> str: ...
    @property
    def layer(self) -> str: ...


class Datapath(Protocol):
    @property
    def needs_addresses(self) -> bool: ...
    def set_addresses(self, addresses: Any) -> None: ...
    @property
    def attachments(self) -> Mapping[str, Attachment]: ...
    def attach(self, link: Any, mode: Mode, wanted: AttachMode) -> Attachment: ...
    def release(self, name: str) -> None: ...
    def is_attached(self, name: str) -> bool: ...
    def set_mode(self, name: str, mode: Mode) -> None: ...
    def adopt_links(self, links: Iterable[int], present: Any, wanted: Mapping[str, tuple[Mode, AttachMode]]) -> list[str]: ...


class Links(Protocol):
    def links(self) -> Mapping[str, Link]: ...
    def default_route(self, links: Any) -> str | None: ...
    def addresses(self) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True)
class InterfaceState:
    """What the status says of one interface. `state`: "attached", "waiting" (not there yet), or "refused" (see `reason`)."""

    name: str
    state: str
    ifindex: int = 0
    attach: str = ""
    reason: str = ""
    layer: str = ""
    mtu: int = 0
    up: bool = False
    notes: tuple[str, ...] = field(default=())


class Interfaces:
    """Blocking calls, one at a time: make them in the kernel thread."""

    def __init__(self, datapath: Datapath, links: Links, report: Callable[[Record], None]):
        self._datapath = datapath
        self._links = links
        self._report = report
        self._states: dict[str, InterfaceState] = {}
        self._default = ""
        self._refused: dict[str, tuple[AttachMode, str]] = {}
        """How an attached interface shall be attached and cannot be, with the reason."""
        self._trouble = ""

    @property
    def states(self) -> list[InterfaceState]:
        return list(self._states.values())

    def take_over(self, stored: tuple[int, ...], config: Config, mode_on: Callable[[str], Mode]) -> list[str]:
        """Go on with links from the descriptor store; returns the interfaces whose program was replaced."""
        self._tell_addresses()
        present = self._links.links()
        wanted = {name: (mode_on(name), config.attach_on(name)) for name in self._wanted(config, present)}
        if DEFAULT in config.interface:
            # Which one it was is not written anywhere: the one that is kept and not named. A default route that leads elsewhere just now,
            # or nowhere, does not move the watch over a restart either.
            wanted |= {name: (mode_on(name), config.attach_on(name)) for name in present}
        replaced = self._datapath.adopt_links(stored, present, wanted)
        unnamed = [name for name in self._datapath.attachments if name not in config.interface]
        if unnamed and self._default not in unnamed:
            self._default = unnamed[0]
        return replaced

    def _wanted(self, config: Config, present: Mapping[str, Link]) -> list[str]:
        """Interface names in the order of the configuration; "default" stays itself while there is no default route."""
        names: list[str] = []
        for name in config.interface:
            if name == DEFAULT:
                # Once attached it does not move: a route that flaps, or an attacker's, must not switch off the watch.
                if self._default not in self._datapath.attachments or self._default not in present:
                    self._default = self._links.default_route(present) or ""
                name = self._default or DEFAULT
            if name not in names:
                names.append(name)
        return names

    def keep(self, config: Config, mode_on: Callable[[str], Mode]) -> None:
        """`reconcile` for whoever has nobody to tell: that the kernel does not answer is reported once, and the next time may go well."""
        try:
            self.reconcile(config, mode_on)
            self._trouble = ""
        except KernelError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._report(Record(Message.WARNING, f"changes of the interfaces are not seen: {error}"))

    def reconcile(self, config: Config, mode_on: Callable[[str], Mode]) -> None:
        """Bring the attachments to what is wanted and possible now. Raises KernelError if the kernel does not tell what there is."""
        self._tell_addresses()
        present = self._links.links()
        lost = set()
        for name, attachment in self._datapath.attachments.items():
            link = present.get(name)
            if link is None or link.ifindex != attachment.ifindex or not self._datapath.is_attached(name):
                self._release(name)
                lost.add(name)
                gone = link is None or link.ifindex != attachment.ifindex
                why = "it has gone; waiting for it to come back" if gone else "somebody detached the program by force; attaching it again"
                self._say(Message.INTERFACE_LOST, name, f"{name} is not watched any more: {why}", reason=why)
        wanted = self._wanted(config, present)
        for name, attachment in self._datapath.attachments.items():
            if name not in wanted:
                self._release(name)
                self._say(Message.INTERFACE_LOST, name, f"{name} is not watched any more: the configuration does not name it",
                          reason="not in the configuration")  # fmt: skip
                continue
            asked = config.attach_on(name)
            if asked in (AttachMode.AUTO, attachment.mode):
                self._refused.pop(name, None)
            elif self._refused.get(name, ("", ""))[0] != asked:
                self._attach_otherwise(present[name], mode_on(name), asked, attachment.mode)
        self._states = {name: self._bring_up(name, present.get(name), config, mode_on, name in lost) for name in wanted}

    def _tell_addresses(self) -> None:
        """Before a program counts by them."""
        if self._datapath.needs_addresses:
            self._datapath.set_addresses(self._links.addresses())

    def _release(self, name: str) -> None:
        self._datapath.release(name)
        self._refused.pop(name, None)

    def _attach_otherwise(self, link: Link, mode: Mode, asked: AttachMode, so_far: AttachMode) -> None:
        """Change how an interface is attached. If that is refused, it is attached as it was."""
        self._release(link.name)
        try:
            self._attach(link, mode, asked)
        except KernelError as error:
            try:
                self._attach(link, mode, so_far)
            except KernelError:
                return  # tried once more as asked, at once, and then reported
            self._refused[link.name] = (asked, error.message)
            self._say(Message.INTERFACE_REFUSED, link.name, f"{link.name} stays in {so_far} mode: {error}", reason=error.message)

    def _attach(self, link: Link, mode: Mode, wanted: AttachMode) -> Attachment:
        attachment = self._datapath.attach(link, mode, wanted)
        why = f" ({attachment.reason})" if attachment.reason else ""
        self._say(Message.INTERFACE_ATTACHED, link.name, f"watching {link.name} in {attachment.mode} mode{why}", attach=attachment.mode,
                  reason=attachment.reason, ifindex=link.ifindex)  # fmt: skip
        return attachment

    def _bring_up(self, name: str, link: Link | None, config: Config, mode_on: Callable[[str], Mode], lost: bool) -> InterfaceState:
        before = self._states.get(name)
        if link is None:
            reason = "there is no default route" if name == DEFAULT else "there is no such interface"
            if not lost and (before is None or before.state != "waiting"):
                self._say(Message.INTERFACE_WAITING, name, f"{name}: {reason}; waiting for it", reason=reason)
            return InterfaceState(name, "waiting", reason=f"{reason} yet")
        attachment = self._datapath.attachments.get(name)
        if attachment is None:
            try:
                attachment = self._attach(link, mode_on(name), config.attach_on(name))
            except KernelError as error:
                if before is None or before.state != "refused" or before.reason != str(error):
                    self._say(Message.INTERFACE_REFUSED, name, f"{name} cannot be watched: {error}", reason=error.message,
                              foreign=isinstance(error, ForeignProgramError))  # fmt: skip
                return InterfaceState(name, "refused", link.ifindex, reason=str(error), mtu=link.mtu, up=link.up)
        self._datapath.set_mode(name, mode_on(name))
        notes = _notes(attachment, link)
        if name in self._refused:
            asked, reason = self._refused[name]
            notes = (*notes, f"it stays in {attachment.mode} mode, {asked} is refused: {reason}")
        return InterfaceState(name, "attached", link.ifindex, attachment.mode, attachment.reason, attachment.layer, link.mtu, link.up,
                              notes)  # fmt: skip

    def _say(self, message: Message, name: str, text: str, **fields: object) -> None:
        self._report(Record(message, text, {"interface": name, **fields}))


def _notes(attachment: Attachment, link: Link) -> tuple[str, ...]:
    """What a reader of the numbers should know of this interface."""
    notes = []
    if not link.up:
        notes.append("the interface is down")
    elif not link.carrier:
        notes.append("no carrier: nothing is connected at the other end")
    if attachment.mode is AttachMode.GENERIC:
        notes.append("generic mode: packets that GRO has merged count as one")
    if attachment.layer == "ip":
        notes.append("no Ethernet header: sizes are those of the IP packets")
    return tuple(notes)
