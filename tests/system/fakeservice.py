"""The bus server with a service written by hand: it keeps a list of entries and does as it is told through ordinary calls.

`Explain` steers it: "emit N" makes N events, "wait" answers only after `Confirm` was called, "crash" raises what no caller may see.
SIGUSR1 makes it send 900 signals at once. It prints "ready" when the first attempt at the bus has ended, and "sent" and "ended".
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from xdpmond.bus.interface import Notify
from xdpmond.bus.server import BusServer
from xdpmond.errors import LockOutError, NoSuchEntryError
from xdpmond.model import Caller, Mode, Prefix, Verdict

QUEUE = 100


class Feed:
    def __init__(self, feeds: set[Feed]):
        self.lost = 0
        self._feeds = feeds
        self._events: deque[Mapping[str, Any]] = deque()
        self._more = asyncio.Event()
        feeds.add(self)

    def put(self, event: Mapping[str, Any]) -> None:
        if len(self._events) >= QUEUE:
            self.lost += 1
            return
        self._events.append(event)
        self._more.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._events:
                yield json.dumps(self._events.popleft()).encode() + b"\n"
            self._more.clear()
            await self._more.wait()

    def close(self) -> None:
        self._feeds.discard(self)


class FakeService:
    version = "0.0"
    mode = Mode.MONITOR
    file_mode = Mode.MONITOR
    default = Verdict.LOG
    interfaces: Sequence[str] = ("eth0",)
    window_seconds = 60.0
    last_window = 7
    flows_enabled = False

    def __init__(self) -> None:
        self.started = time.time()
        self.kept: dict[Prefix, dict[str, Any]] = {}
        self.feeds: set[Feed] = set()
        self.listeners: list[Notify] = []
        self.confirmed = asyncio.Event()
        self.last_caller: Caller | None = None
        self.waited = 0

    @property
    def entry_count(self) -> int:
        return len(self.kept)

    async def status(self) -> dict[str, Any]:
        caller = self.last_caller
        return {"version": self.version, "followers": len(self.feeds), "waited": self.waited,
                "caller": caller and [caller.uid, caller.name, caller.pid]}  # fmt: skip

    async def change(self, verdict: Verdict, prefixes: Sequence[str], *, caller: Caller, seconds: float | None = None, reason: str = "",
                     force: bool = False, extra_peers: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
        self.last_caller = caller
        parsed = [Prefix.parse(text) for text in prefixes]
        for prefix in parsed:
            if any(str(prefix.host) == peer for peer in extra_peers) and not force:
                raise LockOutError("this cuts your own connection", hint="use --force")
        for prefix in parsed:
            self.kept[prefix] = {"prefix": str(prefix), "verdict": verdict, "seconds": seconds, "reason": reason}
        self.tell("PolicyChanged", {"applied": [str(prefix) for prefix in parsed], "verdict": str(verdict), "by": f"uid {caller.uid}"})
        return {"applied": [self.kept[prefix] for prefix in parsed], "notes": []}

    async def change_from_file(self, verdict: Verdict, fd: int, *, caller: Caller, seconds: float | None = None, reason: str = "",
                               force: bool = False, extra_peers: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
        text = await asyncio.to_thread(lambda: os.read(fd, 1 << 20).decode())
        await self.change(verdict, text.split(), caller=caller, seconds=seconds, reason=reason, force=force, extra_peers=extra_peers)
        return {"applied": len(text.split()), "notes": []}

    async def remove(self, prefixes: Sequence[str], *, caller: Caller, force: bool = False,
                     extra_peers: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
        for text in prefixes:
            if self.kept.pop(Prefix.parse(text), None) is None:
                raise NoSuchEntryError(f"there is no entry {text}")
        self.tell("PolicyChanged", {"removed": list(prefixes)})
        return {"removed": list(prefixes)}

    async def entries(self) -> list[dict[str, Any]]:
        return [self.kept[prefix] for prefix in sorted(self.kept)]

    async def explain(self, address: str) -> dict[str, Any]:
        word, _, number = address.partition(" ")
        if word == "crash":
            raise RuntimeError("an inner secret")
        if word == "wait":
            await self.confirmed.wait()
            self.waited += 1
        if word == "emit":
            for serial in range(int(number)):
                for feed in self.feeds:
                    feed.put({"serial": serial, "padding": "x" * 200})
        return {"address": address}

    async def set_mode(self, mode: str, *, caller: Caller, interface: str = "", force: bool = False, confirm: float | None = None,
                       extra_peers: Sequence[str] = ()) -> dict[str, Any]:  # fmt: skip
        self.mode = self.file_mode if mode == "default" else Mode(mode)
        self.tell("ModeChanged", {"mode": str(self.mode), "interface": interface, "by": f"uid {caller.uid}"})
        return {"mode": self.mode}

    async def confirm(self, *, caller: Caller) -> dict[str, Any]:
        self.confirmed.set()
        return {}

    async def top(self, *, by: str = "bytes", limit: int = 20, port: int | None = None, protocol: str | None = None,
                  interval: bool = False, local: bool | None = None, prefix_length: int | None = None,
                  prefix_length6: int | None = None) -> list[dict[str, Any]]:  # fmt: skip
        return [{"by": by, "limit": limit, "port": port, "protocol": protocol, "interval": interval, "local": local,
                 "prefix_length": prefix_length, "prefix_length6": prefix_length6}]  # fmt: skip

    async def ports(self, *, limit: int = 100, port: int | None = None, protocol: str | None = None, interval: bool = False,
                    local: bool | None = None) -> list[dict[str, Any]]:  # fmt: skip
        return [{"limit": limit, "port": port, "protocol": protocol, "interval": interval, "local": local}]

    async def flows(self, *, by: str = "bytes", limit: int = 20, port: int | None = None, protocol: str | None = None,
                    address: str | None = None) -> list[dict[str, Any]]:  # fmt: skip
        return [{"by": by, "limit": limit, "port": port, "protocol": protocol, "address": address}]

    async def windows(self, *, limit: int = 60) -> list[dict[str, Any]]:
        return [{"number": number} for number in range(min(limit, 3))]

    async def reload(self, *, caller: Caller, force: bool = False) -> dict[str, Any]:
        return {"reloaded": True, "force": force}

    async def recent_events(self, limit: int) -> list[dict[str, Any]]:
        return [{"serial": serial} for serial in range(min(limit, 5))]

    def follow_events(self) -> Feed:
        return Feed(self.feeds)

    def subscribe(self, callback: Notify) -> Callable[[], None]:
        self.listeners.append(callback)
        return lambda: self.listeners.remove(callback)

    def burst(self) -> None:
        for serial in range(900):
            self.tell("SourceBlocked", {"serial": serial, "padding": "x" * 1000})
        print("sent", flush=True)

    def tell(self, name: str, body: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener(name, body)


async def main(address: str) -> None:
    service = FakeService()
    server = BusServer(service, address, lambda priority, text: print(f"<{priority}>{text}", file=sys.stderr, flush=True),
                       first_pause=0.05, longest_pause=0.2)  # fmt: skip
    task = asyncio.create_task(server.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, service.burst)
    await server.settled()
    print("ready", flush=True)
    try:
        await task
    except asyncio.CancelledError:
        print("ended", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]), debug=bool(os.environ.get("DEBUG")))
