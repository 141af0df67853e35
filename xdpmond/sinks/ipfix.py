"""Records of flows on their way to an IPFIX collector: UDP, from a thread of its own.

UDP says little of what becomes of a datagram. What it does say, that nobody listens there or that there is no way, is heeded: the exporter
then holds back what it has, and offers the templates every few seconds until they are no longer refused. So a collector that is started
again has them before the first record. Records in datagrams that were refused are counted as lost, and so is what waits when the daemon
ends; what the network loses the collector sees by the sequence numbers.

The queue is bounded: whoever has records asks for `room` first. Datagrams leave in small bursts, which the buffer of a socket holds at the
other end.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from ..config import IPFIX
from ..ipfix import Encoder, Message
from ..messages import Message as Kind
from ..messages import Priority, Record
from ..model import Endpoint

CAPACITY = 65_536
"""Records that wait: 6 MB."""
RETRY = 5.0
"""Seconds until a collector that refused is tried again."""
_BURST, _PAUSE = 8, 2
"""Datagrams sent at once, and milliseconds between two bursts: at most 100,000 records of IPv4 flows in a second."""
_SETTLE = 200
"""Milliseconds in which a collector that is not there makes itself known."""


class IpfixSink:
    """`put` and `room` do not block. `drained` is called, from the sink's thread, whenever there is more room."""

    def __init__(
        self,
        settings: IPFIX,
        collector: Endpoint,
        report: Callable[[Record], None],
        drained: Callable[[], None],
        *,
        capacity: int = CAPACITY,
        retry: float = RETRY,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.settings = settings
        self.collector = collector
        self.lost = 0
        """Records that were refused, or could not be sent before the end."""
        self.sent = 0
        self._capacity = capacity
        self._retry = retry
        self._report = report
        self._drained = drained
        self._clock = clock
        self._monotonic = monotonic
        self._encoder = Encoder(settings.observation_domain, settings.packet_size)
        self._waiting: deque[tuple[np.ndarray, Mapping[int, int]]] = deque()
        self._number = 0
        """Records waiting, those that the thread has just taken included."""
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._socket: socket.socket | None = None
        self._address: object = None
        self._unsure = 0
        """Records in the datagrams since it was last looked whether one was refused."""
        self._datagrams = 0
        """So many of them."""
        self.failing = False
        self._lost_before_failure = 0
        self._due = 0.0
        """When the templates are to be sent again, or a collector that refused to be tried."""
        self._thread = threading.Thread(target=self._run, name="ipfix", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        return 0 if self._closing else max(0, self._capacity - self._number)

    def put(self, records: np.ndarray, ifindexes: Mapping[int, int]) -> None:
        """Take records (flows.ENDED), for which there has to be room. `ifindexes` are the interfaces of their slots."""
        with self._changed:
            if self._closing:
                self.lost += len(records)
                return
            self._waiting.append((records, ifindexes))
            self._number += len(records)
            self._changed.notify()

    def finish(self) -> None:
        """Take no more, and end when all that waits is sent; at once if the collector refuses it."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, timeout: float = 3.0) -> None:
        """`finish`, and wait for the end; what is not sent by then is lost."""
        self.finish()
        self._thread.join(timeout)
        self._abandoned = True

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    # The thread

    def _run(self) -> None:
        while (item := self._next()) is not None:
            records, ifindexes = item
            for message in self._encoder.flows(records, ifindexes, self._clock()):
                self._send(message)
            self._look_back()
            with self._changed:
                self._number -= len(records)
            self._drained()
        with self._changed:
            self.lost += self._number
            self._number = 0
        self._disconnect()

    def _next(self) -> tuple[np.ndarray, Mapping[int, int]] | None:
        """What has waited longest; None: it is the end."""
        while True:
            if self._monotonic() >= self._due:
                self._greet()
            with self._changed:
                if self._waiting and not self.failing:
                    return self._waiting.popleft()
                if self._closing:
                    return None
                self._changed.wait(max(0.0, self._due - self._monotonic()))

    def _send(self, message: Message) -> None:
        while not self._abandoned:
            if self._monotonic() >= self._due:
                self._greet()
            if self.failing:
                if self._closing:
                    break
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, max(0.0, self._due - self._monotonic()))
                continue
            try:
                self._transmit(message.data)
            except OSError as error:
                self._fail(error)
                continue
            self.sent += message.records
            self._unsure += message.records
            self._datagrams += 1
            if self._datagrams >= _BURST:
                self._look_back()
            return
        self.lost += message.records

    def _greet(self) -> None:
        """Send the templates, to the address that the collector has now."""
        again = self.failing or self._socket is None
        try:
            self._connect()
            self._transmit(self._encoder.templates(self._clock()).data)
            self._require_no_refusal(_SETTLE if again else _PAUSE)
        except OSError as error:
            self._fail(error)
            return
        self._due = self._monotonic() + self.settings.template_interval
        if self.failing:
            self.failing = False
            lost = self.lost - self._lost_before_failure
            self._tell(f"the IPFIX collector {self.collector} is there again; {lost} records of flows were lost to it", Priority.NOTICE)

    def _look_back(self) -> None:
        """Wait a moment, and see whether something was refused."""
        if not self._datagrams:
            return
        try:
            self._require_no_refusal(_PAUSE)
        except OSError as error:
            self._fail(error)
        self._unsure = self._datagrams = 0

    def _fail(self, error: OSError) -> None:
        self._disconnect()
        if not self.failing:
            self.failing = True
            self._lost_before_failure = self.lost
            reason = error.strerror or repr(error)
            self._tell(f"the IPFIX collector {self.collector} cannot be reached: {reason}; records of flows wait until it can be")
        self.sent -= self._unsure
        self.lost += self._unsure
        self._unsure = self._datagrams = 0
        self._due = self._monotonic() + self._retry

    def _tell(self, text: str, priority: int | None = None) -> None:
        self._report(Record(Kind.IPFIX_PROBLEM, text, {"collector": str(self.collector), "lost": self.lost}, priority=priority))

    # The socket

    def _connect(self) -> None:
        found = socket.getaddrinfo(self.collector.host, self.collector.port, type=socket.SOCK_DGRAM)
        if self._socket is not None:
            if self._address in [address for *_, address in found]:
                return
            self._disconnect()
        failure = OSError(errno.EHOSTUNREACH, "it has no address")
        for family, kind, protocol, _, address in found:
            made = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
            try:
                made.connect(address)
            except OSError as error:
                made.close()
                failure = error
            else:
                self._socket, self._address = made, address
                return
        raise failure

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _transmit(self, data: bytes) -> None:
        if self._socket is None:
            raise OSError(errno.ENOTCONN, "not connected")
        self._socket.send(data)

    def _require_no_refusal(self, milliseconds: int) -> None:
        """Raise what the network says of what was sent, if it says so within so long."""
        if self._socket is None:
            return
        poll = select.poll()
        poll.register(self._socket, 0)
        if poll.poll(milliseconds) and (number := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            raise OSError(number, os.strerror(number))
