"""Durations and reasons."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.errors import UsageError
from xdpmond.units import LONGEST_DURATION, LONGEST_REASON, format_duration, parse_duration, parse_reason


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1d1h1m1s", 90061),
        ("1d1s", 86401),
        ("3650d", LONGEST_DURATION),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "for example"),
        ("10", "10s for seconds or 10m for minutes"),
        (" 10", "10s for seconds"),
        ("2w", "write 14d"),
        ("2 weeks", "write 14d"),
        ("10 m", "white space"),
        ("10m ", "white space"),
        ("10m\n", "white space"),
        ("-10m", "not negative"),
        ("1.5h", "1h30m"),
        ("30m1h", "for example"),
        ("1m1m", "for example"),
        ("10M", "for example"),
        ("10min", "for example"),
        ("٣s", "for example"),
        ("3651d", "longest is 3650d"),
        ("999999999d999999999h", "longest is 3650d"),
        ("9999999999s", "for example"),
        ("9" * 5000, "for example"),
    ],
)
def test_what_is_no_duration_gets_a_hint(text, hint):
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert hint in caught.value.hint
    assert len(caught.value.message) < 100


@given(st.integers(0, LONGEST_DURATION))
def test_a_formatted_duration_reads_back(seconds):
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (-5.0, "0s"), (0.4, "0s"), (59.6, "1m"), (5400, "1h30m"), (90061.2, "1d1h1m1s")])
def test_format(seconds, text):
    assert format_duration(seconds) == text


@given(st.text())
def test_nothing_but_usage_errors(text):
    for parse in (parse_duration, parse_reason):
        with suppress(UsageError):
            parse(text)


def test_a_reason_is_one_printable_line():
    assert parse_reason("  scans, seen 3× ") == "scans, seen 3×"
    assert parse_reason("x" * LONGEST_REASON) == "x" * LONGEST_REASON
    for bad in ("two\nlines", "bell\a", "\x1b[31mred", "x" * (LONGEST_REASON + 1)):
        with pytest.raises(UsageError):
            parse_reason(bad)
