"""Talkers by the hundred thousand: one numpy row for a source on a destination port over an interval.

`model.Talker` is the same as a value; rows become values only when they are shown.
"""

from __future__ import annotations

import numpy as np

from .model import Count, Family, Talker

ROW = np.dtype(
    [
        ("source", "u1", 16), ("family", "u1"), ("protocol", "u1"), ("port", "u2"), ("packets", "u8"), ("bytes", "u8"), ("syns", "u8"),
        ("first_seen", "f8"), ("last_seen", "f8"),
    ]
)  # fmt: skip
"""`family` is the number of a model.Family; IPv4 fills the first 4 bytes of `source`; `port` 0: none, or unreadable; times are seconds
since the epoch."""

NO_ROWS = np.zeros(0, ROW)

_KEY = np.dtype([("low", "u8"), ("high", "u8"), ("tail", "u4")])
_WITH_PORTS = (6, 17, 132)  # TCP, UDP, SCTP


def count_of(rows: np.ndarray) -> Count:
    return Count(int(rows["packets"].sum()), int(rows["bytes"].sum()))


def _words(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows["source"]).view("u8").reshape(-1, 2)


def merge(*parts: np.ndarray, by_source: bool = False) -> np.ndarray:
    """Sum the rows of the same source, protocol and port: over CPUs, or over intervals. `by_source`: of the same source alone, whose
    protocol and port are then 0."""
    rows = np.concatenate(parts)
    if not len(rows):
        return rows
    if by_source:
        rows["protocol"] = rows["port"] = 0
    keys = np.empty(len(rows), _KEY)
    words = _words(rows)
    keys["low"], keys["high"] = words[:, 0], words[:, 1]
    keys["tail"] = rows["port"].astype("u4") | rows["protocol"].astype("u4") << 16 | rows["family"].astype("u4") << 24
    order = np.lexsort((keys["tail"], keys["high"], keys["low"]))
    keys, rows = keys[order], rows[order]
    starts = np.nonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))[0]
    merged = rows[starts]
    for name in ("packets", "bytes", "syns"):
        merged[name] = np.add.reduceat(rows[name], starts)
    merged["first_seen"] = np.minimum.reduceat(rows["first_seen"], starts)
    merged["last_seen"] = np.maximum.reduceat(rows["last_seen"], starts)
    return merged


def unique_sources(rows: np.ndarray) -> dict[Family, int]:
    """Distinct source addresses by family."""
    words = _words(rows)
    return {family: len(np.unique(words[rows["family"] == family], axis=0)) for family in (Family.IPV4, Family.IPV6)}


def strongest(rows: np.ndarray, by: str, limit: int) -> np.ndarray:
    """The `limit` rows with the most of `by` ("packets", "bytes", "syns"), strongest first."""
    if len(rows) > limit > 0:
        rows = rows[np.argpartition(rows[by], len(rows) - limit)[len(rows) - limit :]]
    return rows[np.argsort(rows[by], kind="stable")[::-1]]


def talker(row: np.void) -> Talker:
    """One row as a value."""
    family = Family(int(row["family"]))
    has_port = row["protocol"] in _WITH_PORTS and row["port"]
    return Talker(
        family=family,
        address=row["source"].tobytes()[: family.bits // 8],
        protocol=int(row["protocol"]),
        port=int(row["port"]) if has_port else None,
        packets=int(row["packets"]),
        bytes=int(row["bytes"]),
        syns=int(row["syns"]),
        first_seen=float(row["first_seen"]),
        last_seen=float(row["last_seen"]),
    )
