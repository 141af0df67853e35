"""Numbers, tables and what is neutralised."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpmond.cli.render import COLOURS, DRAWN_ROWS, Style, columns, percent, plural, safe, short, short_bytes, span, write_table

PLAIN, PAINTED = Style(False), Style(True)


@given(st.text())
def test_safe_text_is_printable_and_one_line(text: str) -> None:
    assert safe(text).isprintable()
    if text.isprintable():
        assert safe(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[2Jb", "a\\x1b[2Jb"), ("a\nb", "a\\x0ab"), ("\x9b31m", "\\x9b31m"), ("a\u202eb", "a\\u202eb"), ("\x7f", "\\x7f"),
     ("für", "für"), ("\U000e0041", "\\U000e0041"), ("\ud800", "\\ud800")],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert safe(text) == shown


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (0.4, "0.4"), (99.96, "100"), (999, "999"), (999.5, "1.00 k"), (1234, "1.23 k"), (9995, "10.0 k"),
     (12345, "12.3 k"), (99950, "100 k"), (999499, "999 k"), (999500, "1.00 M"), (1.5e9, "1.50 G"), (2**64, "18.4 E"), (10**22, "10000 E"),
     (-1234, "-1.23 k")],
)  # fmt: skip
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


@given(st.floats(min_value=0, max_value=9e20))
def test_short_numbers_are_near_and_narrow(number: float) -> None:
    text = short(number)
    head, _, unit = text.partition(" ")
    assert len(text) <= 6
    assert float(head) * 1000 ** " kMGTPE".index(unit or " ") == pytest.approx(number, rel=0.006, abs=0.06)


def test_bytes_and_counts() -> None:
    assert [short_bytes(number) for number in (0, 950, 1234)] == ["0 B", "950 B", "1.23 kB"]
    assert [plural(number, "entry", "entries") for number in (0, 1, 12345)] == ["0 entries", "1 entry", "12,345 entries"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-5, "0s"),
        (45, "45s"),
        (60, "1m"),
        (250, "4m 10s"),
        (3600, "1h"),
        (3605, "1h"),
        (11520, "3h 12m"),
        (86400 * 5 + 7200, "5d 2h"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("part", "text"),
    [(0, "0 %"), (1, "< 1 %"), (499, "< 1 %"), (501, "1 %"), (500, "50 %"), (99400, "99 %"), (99999, "> 99 %"), (100000, "100 %")],
)
def test_a_share_does_not_lie_at_its_ends(part: int, text: str) -> None:
    assert percent(part, 1000 if part == 500 else 100000) == text
    assert percent(1, 0) == "0 %"


def test_a_plain_table_is_aligned_and_can_be_cut() -> None:
    out = io.StringIO()
    rows = [["10.0.0.0/8", ("allow", "green"), "5", "a reason"], ["192.0.2.1/32", "", "12345", ""]]
    assert write_table(out, PLAIN, columns("PREFIX", "VERDICT", ">PACKETS", "REASON"), rows) == 2
    assert out.getvalue() == (
        "PREFIX        VERDICT  PACKETS  REASON\n"
        "10.0.0.0/8    allow          5  a reason\n"
        "192.0.2.1/32  -          12345  -\n"
    )  # fmt: skip
    for line in out.getvalue().splitlines():
        assert len(re.split("  +", line)) == 4


def test_without_legend_there_is_no_header() -> None:
    out = io.StringIO()
    write_table(out, PLAIN, columns("A", "B"), [["1", "2"]], legend=False)
    assert out.getvalue() == "1  2\n"


def test_colours_do_not_count_as_width() -> None:
    out = io.StringIO()
    write_table(out, PAINTED, columns("A", "B"), [[("x", "red"), "1"], ["longer", "2"]])
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert text == "A       B\nx       1\nlonger  2\n"
    assert "\x1b[31mx\x1b[0m" in out.getvalue()
    assert PAINTED("", "red") == ""
    assert set(COLOURS) >= {"red", "green", "yellow"}


def test_a_long_table_is_streamed() -> None:
    """Rows past the sample are not read before those in front of them are written."""
    written: list[int] = []
    out = io.StringIO()

    def rows() -> Iterator[list[str]]:
        for index in range(5000):
            written.append(out.getvalue().count("\n"))
            yield [str(index)]

    assert write_table(out, PLAIN, columns("N"), rows()) == 5000
    assert written[-1] > 4000


@pytest.mark.parametrize("count", [3, DRAWN_ROWS + 1])
def test_a_terminal_gets_a_drawn_table_unless_it_is_long(count: int) -> None:
    out = io.StringIO()
    rows = [[f"192.0.2.{index}", "[bold]not markup[/bold]"] for index in range(count)]
    assert write_table(out, PAINTED, columns("PREFIX", "REASON"), rows, terminal=True, width=80) == count
    assert ("─" in out.getvalue()) == (count == 3)
    assert out.getvalue().count("[bold]not markup[/bold]") == count


def test_a_narrow_terminal_loses_nothing() -> None:
    out = io.StringIO()
    rows = [["2001:db8:1234:5678:9abc:def0:1234:5678", "x" * 30, "the verdict"]]
    write_table(out, PAINTED, columns("SOURCE", "MIDDLE", "VERDICT"), rows, terminal=True, width=60)
    assert "the verdict" in out.getvalue()
    assert "2001:db8:1234:5678:9abc:def0:1234:5678" in out.getvalue()


def test_free_text_folds_within_the_terminal() -> None:
    out = io.StringIO()
    write_table(out, PAINTED, columns("PREFIX", "REASON"), [["192.0.2.0/24", "y" * 200]], terminal=True, width=60)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert text.count("y") == 200
    assert max(map(len, text.splitlines())) <= 60
