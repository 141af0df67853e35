"""Daemon and client as whole processes: start to READY=1, with nothing kept, from the descriptor store, and after another boot; private
memory; a status call."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .rows import Goal, Of, Row
from .stage import NotifySocket, private_memory, stage

TITLE = "whole processes"


def measure(rounds: int) -> Iterable[Row]:
    rounds = max(7, rounds // 2)
    with stage() as at:
        cold, taken_over, booted, memory, status = [], [], [], [], []
        for _ in range(rounds):
            at.forget()
            with NotifySocket(at.directory / "notify") as manager:
                daemon = at.start(manager)
                try:
                    cold.append(daemon.seconds)
                    memory.append(private_memory(daemon.pid))
                    status.append(at.client("status"))
                    attached = manager.attached_programs()
                finally:
                    # A crash: what the store holds is all that is left.
                    daemon.kill()
                daemon = at.start(manager)
                taken_over.append(daemon.seconds)
                daemon.kill()
                if not attached or manager.attached_programs() != attached:
                    raise AssertionError(f"program {attached} was attached, after the second start {manager.attached_programs()}")
            with at.daemon() as daemon:
                booted.append(daemon.seconds)
    yield Row("daemon: start to READY, nothing kept", statistics.median(cold), "s", goal=Goal(2.0, Of.VALUE))
    yield Row("daemon: start to READY, with what an earlier boot has compiled", statistics.median(booted), "s", goal=Goal(2.0, Of.VALUE))
    yield Row("daemon: start to READY, from the descriptor store", statistics.median(taken_over), "s", goal=Goal(0.7, Of.VALUE))
    yield Row("daemon: private memory at rest", statistics.median(memory) / 1e6, "MB", goal=Goal(45, Of.VALUE))
    yield Row("xdpmonctl status", statistics.median(status), "s", goal=Goal(0.25, Of.VALUE))
