"""The control path: a large policy from start to effect beside ipset and nft, and single changes in a large policy.

All three take the same prefixes in the same run, each in its own way: `ipset restore` into a hash:net, `nft -f` into a set with intervals,
`xdpmonctl deny --from-file` into a running daemon. Ours has by then been written to the disk for the next start, which neither peer does.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from xdpmond.cli.client import Daemon as BusClient
from xdpmond.kernel.maps import wait_for_packets_under_way
from xdpmond.kernel.tables import POLICY_MAPS
from xdpmond.model import Family, Prefix

from .lists import SEED, Prefixes, mixed_ipv4
from .packets import MANY_IPV4
from .rows import Goal, Of, Row, interleaved
from .stage import CONFIG, Stage, private_memory, stage

TITLE = "control path"
_CHANGES = 100


def measure(rounds: int) -> Iterable[Row]:
    rounds = max(2, min(3, rounds // 3))
    prefixes = mixed_ipv4(MANY_IPV4)
    with stage() as at:
        texts = prefixes.texts()
        listed = _file(at, "prefixes", texts)
        ipset = _file(at, "ipset", ["create denied hash:net family inet maxelem 2000000", *(f"add denied {text}" for text in texts)])
        nft = _file(
            at,
            "nft",
            [
                "table ip bench {",
                "set denied {",
                "type ipv4_addr; flags interval; auto-merge",
                "elements = {",
                ",\n".join(texts),
                "}",
                "}",
                "}",
            ],
        )
        sample = texts[:3]
        contestants = {"from file": _from_file(at, listed, sample), "files": _by_configuration(at, listed, sample)}
        missing = [tool for tool in ("ipset", "nft") if not shutil.which(tool)]
        if not missing:
            contestants["ipset"] = _in_kernel(at, ["ipset", "restore", "-f", str(ipset)], ["ipset", "destroy", "denied"])
        medians = interleaved(contestants, rounds)
        peers = {"ipset": medians.get("ipset"), "nft": None if missing else at.within("nft", "-f", nft)}
        many = f"{MANY_IPV4:,} prefixes"
        for name, how in (("ipset", "ipset restore, hash:net"), ("nft", "nft -f, intervals, auto-merge, once")):
            if (value := peers[name]) is not None:
                yield Row(f"{how}: {many}", value, "s")
            else:
                yield Row(f"{how}: {many}: not measured", 0, "s")
        for name, how in (("from file", "xdpmonctl deny --from-file"), ("files", "xdpmonctl reload with deny_files")):
            yield Row(f"{how}: {many} (reference: ipset restore)", medians[name], "s", peers["ipset"], Goal(1.0))
            yield Row(f"{how}: {many} (reference: nft -f)", medians[name], "s", peers["nft"], Goal(0.5))
        yield from _single_changes(at, listed, prefixes)


def _file(at: Stage, name: str, lines: Iterable[str]) -> Path:
    path = at.directory / name
    path.write_text("\n".join(lines) + "\n")
    return path


def _in_kernel(at: Stage, command: list[str], undo: list[str]) -> Callable[[], float]:
    def run() -> float:
        seconds = at.within(*command)
        at.within(*undo)
        return seconds

    return run


def _from_file(at: Stage, listed: Path, sample: list[str]) -> Callable[[], float]:
    def run() -> float:
        at.forget()
        at.configure()
        with at.daemon():
            seconds = at.client("deny", "--from-file", listed)
            _check(at, sample)
        return seconds

    return run


def _by_configuration(at: Stage, listed: Path, sample: list[str]) -> Callable[[], float]:
    def run() -> float:
        at.forget()
        at.configure()
        with at.daemon():
            at.configure(f'{CONFIG}deny_files = ["{listed}"]\n')
            seconds = at.client("reload")
            _check(at, sample)
        at.configure()
        return seconds

    return run


def _check(at: Stage, sample: list[str]) -> None:
    for text in sample:
        found = at.ask("explain", text.partition("/")[0])
        if found["verdict"] != "deny":
            raise AssertionError(f"{text} was to be denied: {found}")


def _single_changes(at: Stage, listed: Path, prefixes: Prefixes) -> Iterable[Row]:
    at.forget()
    at.configure()
    with at.daemon() as daemon:
        at.client("deny", "--from-file", listed)
        yield Row(f"daemon: private memory with {MANY_IPV4:,} prefixes", private_memory(daemon.pid) / 1e6, "MB", goal=Goal(120, Of.VALUE))
        yield Row(f"maps of the policy with {MANY_IPV4:,} prefixes", _policy_bytes(at) / 1e6, "MB")
        client = BusClient(at.bus)
        client.describe()
        fresh = _others(prefixes)
        taken: dict[str, list[float]] = {"add": [], "remove": [], "at once": []}

        def change(kind: str, call: Callable[[], object], pause: bool = True) -> None:
            if pause:
                # What the daemon does after the answer, it has done: readying the old copy takes it a grace period.
                for _ in range(3):
                    wait_for_packets_under_way()
            started = time.monotonic()
            call()
            taken[kind].append((time.monotonic() - started) * 1e3)

        for text in fresh:
            change("add", lambda text=text: client.change("deny", [text], {}))  # type: ignore[misc]
        for text in fresh:
            change("remove", lambda text=text: client.remove([text], {}))  # type: ignore[misc]
        for text in fresh:
            change("at once", lambda text=text: client.change("deny", [text], {}), pause=False)  # type: ignore[misc]
    for kind, label in (("add", "adding one"), ("remove", "removing one"), ("at once", "adding one right after another")):
        row = f"{label} among {MANY_IPV4:,} prefixes, by D-Bus (worst {max(taken[kind]):.1f} ms)"
        yield Row(row, statistics.median(taken[kind]), "ms", goal=Goal(10, Of.VALUE) if kind != "at once" else None)


def _policy_bytes(at: Stage) -> int:
    return sum(each["bytes"] for each in at.ask("status")["maps"]["each"] if each["name"] in POLICY_MAPS)


def _others(prefixes: Prefixes) -> list[str]:
    """Prefixes of all lengths from /8 on that are not among these."""
    random = np.random.default_rng(SEED + 3)
    listed = set(prefixes.values())
    found: dict[Prefix, None] = {}
    while len(found) < _CHANGES:
        length = int(random.integers(8, 33))
        number = int(random.integers(1 << 24, 224 << 24)) >> (32 - length) << (32 - length)
        prefix = Prefix(Family.IPV4, number.to_bytes(4, "big"), length)
        if prefix not in listed and number >> 24 not in (10, 127, 172, 192):
            found[prefix] = None
    return [str(prefix) for prefix in found]
