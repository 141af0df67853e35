"""The pictures in the documents: each is there, whole, and of the command that it is said to be of."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from demo.screens import COLUMNS, DIRECTORY, LINES, SCREENS, Run, drawn, runs  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, words, _ in SCREENS])
def test_each_picture(name: str, words: list[str]) -> None:
    picture = (DIRECTORY / f"{name}.svg").read_text()
    root = ElementTree.fromstring(picture)
    assert root.findtext(f"{SVG}title") == f"xdpmonctl {' '.join(words)}"
    rows = {text.get("y") for text in root.iter(f"{SVG}text")}
    assert 3 < len(rows) <= LINES
    assert picture.count("://") == 1, "it loads nothing from elsewhere"


@pytest.mark.parametrize("document", ["README.md", "docs/screens.md"])
def test_documents_show_pictures_that_are_there(document: str) -> None:
    path = ROOT / document
    shown = re.findall(r"!\[.+\]\((.+\.svg)\)", path.read_text())
    assert shown
    for picture in shown:
        assert (path.parent / picture).is_file()
    if document.startswith("docs"):
        assert {Path(picture).stem for picture in shown} >= {name for name, _, _ in SCREENS}


def test_what_is_painted() -> None:
    assert list(runs("a\x1b[1;31mb\x1b[0m c\x1b[2md\x1b[m")) == [
        Run("a", frozenset()), Run("b", frozenset({"1", "31"})), Run(" c", frozenset()), Run("d", frozenset({"2"})),
    ]  # fmt: skip
    root = ElementTree.fromstring(drawn("<t>", ["<&>\x1b[31mred\x1b[0m", "", "x" * COLUMNS], 3))
    texts = list(root.iter(f"{SVG}text"))
    assert [text.text for text in texts] == ["<&>", "red", "x" * COLUMNS]
    assert texts[1].get("fill") and not texts[0].get("fill")
    assert float(texts[2].get("x", "")) + float(texts[2].get("textLength", "")) < float(root.get("width", ""))
