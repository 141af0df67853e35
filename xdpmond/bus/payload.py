"""Bulk data as descriptors: a sealed file for what is there now, a pipe for what is to come.

Both carry JSON Lines. A list of a million entries as D-Bus values would take the bus daemon's memory and both ends' time; a memfd costs
neither, and its seals tell the reader that nothing changes under its eyes. The pipe of `FollowEvents` belongs to one reader. If that
reader is slow, its feed drops events, and the next line that fits says how many: nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_BATCH = 512 * 1024
"""Bytes gathered before each write to a memfd."""


_WRITERS = ThreadPoolExecutor(2, "lines")
"""Threads of their own: what waits here must not stand before changes and what keeps them, which are work for asyncio's."""


class EventFeed(Protocol):
    """One follower's queue of events, as the service hands it out: whole lines of JSON, some at a time. `lost` counts what this queue
    dropped since it was made."""

    lost: int

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def close(self) -> None: ...


dumps: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""JSON on one line, ASCII: what a D-Bus string and a line can hold. One encoder, since making it takes as long as using it."""


async def sealed_lines(name: str, rows: Iterable[Mapping[str, Any] | str]) -> int:
    """A memfd with one JSON object a line, sealed, positioned at its start. The caller closes it. A row may be JSON already."""
    writing = _WRITERS.submit(_write_lines, name, rows)
    try:
        return await asyncio.shield(asyncio.wrap_future(writing))
    except asyncio.CancelledError:
        # Once begun, the thread goes on; the descriptor that it makes has no other owner.
        if not writing.cancel():
            writing.add_done_callback(lambda done: None if done.exception() else os.close(done.result()))
        raise


def _write_lines(name: str, rows: Iterable[Mapping[str, Any] | str]) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        batch = bytearray()
        for row in rows:
            batch += (row if isinstance(row, str) else dumps(row)).encode()
            batch += b"\n"
            if len(batch) >= _BATCH:
                _write_all(descriptor, batch)
                batch.clear()
        _write_all(descriptor, batch)
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write_all(descriptor: int, data: bytearray) -> None:
    rest = memoryview(data)
    try:
        while rest:
            written = os.write(descriptor, rest)
            rest = rest[written:]
    finally:
        rest.release()


class Follower:
    """Moves the events of one feed into one pipe until the reader goes away. `reader` is the end to send to the caller."""

    def __init__(self, feed: EventFeed):
        self._feed = feed
        self.reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)

    async def run(self) -> None:
        """Write until the reader closes its end; close ours in every case. The reader's end is not touched here."""
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()
        # A pipe's write end reports an error, and with it readability, when the last reader closes.
        loop.add_reader(self._writer, _settle, gone)
        pump = asyncio.ensure_future(self._pump())
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            loop.remove_reader(self._writer)
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            self._feed.close()
            os.close(self._writer)

    def discard(self) -> None:
        """Close all of it when `run` was never started."""
        self._feed.close()
        os.close(self._writer)
        os.close(self.reader)

    async def _pump(self) -> None:
        reported = self._feed.lost
        try:
            async for lines in self._feed:
                lost = self._feed.lost
                if lost != reported:
                    await self._write(dumps({"lost": lost - reported}).encode() + b"\n")
                    reported = lost
                await self._write(lines)
        except BrokenPipeError:
            return

    async def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            try:
                written = os.write(self._writer, rest)
            except BlockingIOError:
                await self._writable()
                continue
            rest = rest[written:]

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._writer, _settle, future)
        try:
            await future
        finally:
            loop.remove_writer(self._writer)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
