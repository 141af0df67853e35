"""The small texts that people write in files and on command lines: durations such as `1h30m`, and the reason given for an entry.

Both are read strictly, with the likely meaning in the hint: an entry that holds for 10 seconds where 10 minutes were meant, or a reason
that starts a new line in a log, are found out here and not later.
"""

from __future__ import annotations

import re

from .errors import UsageError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")

LONGEST_DURATION = 3650 * 86400
"""Seconds. More is a slip of the keyboard, and far from where clocks overflow."""

LONGEST_REASON = 200
"""Characters."""


def parse_duration(text: str) -> float:
    """Read `90s`, `10m`, `1h30m`, `2d`: whole numbers with units, the largest first, each at most once. Return seconds."""
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise UsageError(f"'{_shorten(text)}' is not a duration", hint=_guess_duration(text))
    seconds = sum(int(number) * unit for number, unit in zip(match.groups(), _UNITS.values(), strict=True) if number)
    if seconds > LONGEST_DURATION:
        raise UsageError(f"'{text}' is too long a duration", hint=f"the longest is {format_duration(LONGEST_DURATION)}")
    return float(seconds)


def format_duration(seconds: float) -> str:
    """The text that `parse_duration` reads, to the nearest second: `1h30m`. A negative duration is over: `0s`."""
    rest = max(0, round(seconds))
    text = ""
    for unit, size in _UNITS.items():
        number, rest = divmod(rest, size)
        if number:
            text += f"{number}{unit}"
    return text or "0s"


def parse_reason(text: str) -> str:
    """Check the reason of an entry: one line of printable text, white space around it dropped."""
    reason = text.strip()
    if len(reason) > LONGEST_REASON:
        raise UsageError(f"the reason has {len(reason)} characters", hint=f"at most {LONGEST_REASON} are kept")
    if not reason.isprintable():
        raise UsageError("the reason holds a line break or another character that cannot be printed", hint="write it in one line")
    return reason


def _guess_duration(text: str) -> str:
    example = "write for example 90s, 10m, 1h30m or 2d"
    bare = text.strip()
    if bare.isascii() and bare.isdigit() and len(bare) <= 9:
        return f"a unit is missing; write {bare}s for seconds or {bare}m for minutes"
    if re.fullmatch(r"[0-9]{1,9} ?w(eeks?)?", bare):
        return f"weeks are not taken; write {int(re.split('[ w]', bare)[0]) * 7}d"
    if any(c.isspace() for c in text):
        return f"leave out the white space; {example}"
    if text.startswith("-"):
        return f"a duration is not negative; {example}"
    if re.fullmatch(r"[0-9]+[.,][0-9]+[dhms]", text):
        return "whole numbers are wanted; write 1h30m for one and a half hours"
    return example


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
