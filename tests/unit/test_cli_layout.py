"""Tables in any width: nothing is wider than the terminal but an address, no address is cut, and what must be shown is shown."""

from __future__ import annotations

import io
import re

from hypothesis import given
from hypothesis import strategies as st

from xdpmond.cli.layout import lines, shape, write_fitting
from xdpmond.cli.render import Column, Style

PLAIN = Style(False)
ADDRESSES = st.sampled_from(["192.0.2.1", "203.0.113.255:65535", "2001:db8::1", "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535"])
COLUMNS = [
    Column("SOURCE", False), Column("DESTINATION", False), Column("BYTES", True), Column("VERDICT", False, 1), Column("RULE", False, 5),
    Column("SEEN", False, 9), Column("PACKETS", True, 3),
]  # fmt: skip
ROWS = st.lists(st.tuples(ADDRESSES, ADDRESSES, *(st.sampled_from(["", "7", "1.23 kB", "x" * 14]) for _ in COLUMNS[2:])), max_size=6)


@given(ROWS, st.integers(20, 200), st.sampled_from([1, 2]), st.booleans())
def test_any_table_in_any_width(rows: list[tuple[str, ...]], width: int, lead: int, legend: bool) -> None:
    columns = COLUMNS[2 - lead :]
    rows = [row[2 - lead :] for row in rows]
    of = shape(columns, rows, width, lead, legend=legend)
    groups = list(lines(PLAIN, columns, rows, of, lead, width=width, legend=legend))
    assert len(groups) == len(rows) + legend
    for row, group in zip(rows, groups[legend:], strict=True):
        words = " ".join(group).split()
        assert words[:lead] == list(row[:lead])
        assert (row[lead] or "-").split()[0] in words[lead:], "what has rank 0 is always there"
        for line in group:
            assert len(line) <= max(width, 2 + 14) or line.strip() in row[:lead]
    if width >= 2 * 46 + 5 * 14 + 6 * 2:
        assert of.whole and len(of.shown) == len(columns) - lead, "where there is room, all is shown, in one line"
    if of.whole:
        assert all(len(group) == 1 for group in groups)


def table(width: int, rows: list[list[str]]) -> list[str]:
    out = io.StringIO()
    write_fitting(out, PLAIN, COLUMNS, rows, width=width, lead=2, legend=True, drawn=False)
    return out.getvalue().splitlines()


SHORT = ["192.0.2.1:4", "192.0.2.2:5", "7", "log", "default", "5s", "1"]
LONG = ["[2001:db8:1234:5678:9abc:def0:1234:5678]:4", "192.0.2.2:5", "7", "log", "default", "5s", "1"]


def test_columns_go_by_rank() -> None:
    assert re.split("  +", table(80, [SHORT])[0]) == ["SOURCE", "DESTINATION", "BYTES", "VERDICT", "RULE", "SEEN", "PACKETS"]
    assert re.split("  +", table(60, [SHORT])[0]) == ["SOURCE", "DESTINATION", "BYTES", "VERDICT", "RULE", "PACKETS"]
    assert re.split("  +", table(46, [SHORT])[0]) == ["SOURCE", "DESTINATION", "BYTES", "VERDICT"]


def test_only_a_row_that_is_too_long_is_broken() -> None:
    assert table(70, [SHORT, LONG, SHORT]) == [
        "SOURCE       DESTINATION  BYTES  VERDICT  RULE     SEEN  PACKETS",
        "192.0.2.1:4  192.0.2.2:5      7  log      default  5s          1",
        "[2001:db8:1234:5678:9abc:def0:1234:5678]:4  192.0.2.2:5",
        "                              7  log      default  5s          1",
        "192.0.2.1:4  192.0.2.2:5      7  log      default  5s          1",
    ]
    assert table(50, [LONG])[1:4] == ["[2001:db8:1234:5678:9abc:def0:1234:5678]:4", "  192.0.2.2:5", f"{'7':>26}  log      5s          1"]
