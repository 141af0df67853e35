"""A benchmark's rows: what a goal says of them, how they are written, and that contestants take turns."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest

from bench import growth, report
from bench.__main__ import SECTIONS
from bench.lists import mixed_ipv4, mixed_ipv6, sources_outside, sources_within
from bench.report import page
from bench.rows import Goal, Of, Row, interleaved, table, write_json


@pytest.mark.parametrize(
    ("row", "holds", "text"),
    [
        (Row("slower", 30, "ns", 20, Goal(1.2)), False, "≤ 1.2 ×"),
        (Row("as fast", 24, "ns", 20, Goal(1.2)), True, "≤ 1.2 ×"),
        (Row("no peer", 24, "ns", None, Goal(1.2)), None, "≤ 1.2 ×"),
        (Row("more is better", 3, "Mpps", 4, Goal(0.75, at_least=True)), True, "≥ 0.75 ×"),
        (Row("a bound of its own", 45.1, "MB", None, Goal(45, Of.VALUE)), False, "≤ 45 MB"),
        (Row("for the reader", 5, "ns"), None, None),
    ],
)
def test_goal(row: Row, holds: bool | None, text: str | None) -> None:
    document = row.document()
    assert list(document) == ["row", "value", "unit", "reference", "ratio", "goal", "holds"]
    assert (document["holds"], document["goal"]) == (holds, text)


def test_json_is_a_list_of_rows(tmp_path: Path) -> None:
    write_json([Row("a", 30, "ns", 20, Goal(1.2)), Row("b", 1.23456, "s")], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {"row": "a", "value": 30, "unit": "ns", "reference": 20, "ratio": 1.5, "goal": "≤ 1.2 ×", "holds": False},
        {"row": "b", "value": 1.235, "unit": "s", "reference": None, "ratio": None, "goal": None, "holds": None},
    ]


def test_table_has_a_line_for_each_row_and_says_what_does_not_hold() -> None:
    head, first, second = table([Row("slow", 30, "ns", 20, Goal(1.2)), Row("a much longer name", 7, "ns")]).splitlines()
    assert head.split() == ["row", "value", "unit", "reference", "ratio", "goal", "holds"]
    assert first.split() == ["slow", "30", "ns", "20", "1.50", "≤", "1.2", "×", "NO"]
    assert second.split() == ["a", "much", "longer", "name", "7", "ns"]
    assert head.index("unit") == first.index("ns") == second.index("ns")


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    values = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 5.0, 5.0, 6.0])}

    def contestant(name: str) -> float:
        order.append(name)
        return next(values[name])

    medians = interleaved({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, rounds=3)
    assert medians == {"a": 2.0, "b": 5.0}
    assert "".join(order) == "ab" * 4


def test_page_has_a_table_for_each_section() -> None:
    rows = [
        Row("packets: slow", 30, "ns", 20, Goal(1.2)), Row("packets: for the reader", 7, "ns"), Row("fuzz: differences", 0, "packets",
        goal=Goal(0, Of.VALUE)),
    ]  # fmt: skip
    lines = page([row.document() for row in rows], "some machine").splitlines()
    assert "some machine." in "\n".join(lines)
    assert [line for line in lines if line.startswith("## ")] == [
        "## The packet path, one core, by BPF_PROG_TEST_RUN", "## Each packet judged by a second parser and policy",
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("| ") and not line.startswith("| row")] == [
        "| slow | 30 | ns | 20 | 1.50 | ≤ 1.2 × | **no** |", "| for the reader | 7 | ns |  |  |  |  |",
        "| differences | 0 | packets |  |  | ≤ 0 packets | yes |",
    ]  # fmt: skip


def test_growth_is_told_by_rows_of_the_sections_that_are() -> None:
    rows = [Row(begins, 100, "ns", 50).document() for begins in growth._ROWS.values()]
    text = growth.page(rows)
    assert "takes 100 ns there" in text
    assert "two cores drop 2.00 times what one does" in text
    assert {begins.partition(":")[0] for begins in growth._ROWS.values()} <= report._SECTIONS.keys() == SECTIONS.keys()
    with pytest.raises(growth.MissingRowError, match="no row begins"):
        growth.page(rows[1:])


def test_sources_are_where_the_prefixes_say() -> None:
    for prefixes in (mixed_ipv4(2000), mixed_ipv6(2000)):
        listed = [ipaddress.ip_network(text) for text in prefixes.texts()]
        assert len(set(listed)) == 2000
        assert set(map(str, prefixes.columns())) == set(prefixes.texts())
        for sources, wanted in ((sources_within(prefixes, 64), True), (sources_outside(prefixes, 64), False)):
            assert len(set(sources.texts())) == 64
            for text in sources.texts():
                assert any(ipaddress.ip_address(text) in network for network in listed) is wanted
