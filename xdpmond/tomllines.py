"""On which line of a TOML file does a value stand?

tomllib says what a file means but not where, and whoever has an entry refused, or wants to remove one that belongs to a file, needs the
line. This is not a second parser: it walks over text that tomllib has already accepted, and so has only to tell strings, comments and
brackets apart.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

Path = tuple[str | int, ...]
"""Keys from the top down; within an array the index."""


def locate(text: str) -> dict[Path, int]:
    """Every key and array element of a valid TOML document, with its line counted from 1."""
    return _Walk(text).lines


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


_TOKEN = re.compile(
    r'''(?P<string>"""(?:[^\\]|\\.)*?"{3,5}(?!")|\'\'\'.*?\'{3,5}(?!\')|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')'''
    r"""|(?P<mark>[\[\]{}=,.\n])|(?P<skip>[ \t\r]+|\#[^\n]*)|(?P<bare>[^\s\#"'\[\]{}=,.]+)""",
    re.DOTALL,
)
_END = _Token("mark", "", 0)


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup or "", match.group()
        if kind != "skip":
            yield _Token(kind, token, line)
        line += token.count("\n")


class _Walk:
    """Strings keep their quotes as tokens, so a token that reads `[` is the bracket."""

    def __init__(self, text: str):
        self.lines: dict[Path, int] = {}
        self._tables: dict[Path, int] = {}
        """Arrays of tables: the index of the last one."""
        self._tokens = _tokens(text)
        self._next = next(self._tokens, _END)
        table: Path = ()
        while self._next is not _END:
            if self._next.text == "\n":
                self._advance()
            elif self._next.text == "[":
                table = self._header()
            else:
                self._pair(table)

    def _advance(self) -> _Token:
        token, self._next = self._next, next(self._tokens, _END)
        return token

    def _header(self) -> Path:
        line = self._advance().line
        of_array = self._next.text == "["
        if of_array:
            self._advance()
        path: Path = ()
        for key in self._key():
            if path in self._tables:  # a header through an array of tables means its last table
                path = (*path, self._tables[path])
            path = (*path, key)
            self.lines.setdefault(path, line)
        if of_array:
            self._tables[path] = self._tables.get(path, -1) + 1
            path = (*path, self._tables[path])
            self.lines[path] = line
        while self._next.text == "]":
            self._advance()
        return path

    def _key(self) -> Iterator[str]:
        while self._next.text not in ("=", "]", ""):
            token = self._advance()
            if token.kind == "string":
                yield tomllib.loads(f"key = {token.text}")["key"]
            elif token.kind == "bare":
                yield token.text

    def _pair(self, path: Path) -> None:
        line = self._next.line
        for key in self._key():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._advance()
        self._value(path)

    def _value(self, path: Path) -> None:
        if self._next.text == "[":
            self._advance()
            index = 0
            while self._more("]"):
                self.lines[(*path, index)] = self._next.line
                self._value((*path, index))
                index += 1
        elif self._next.text == "{":
            self._advance()
            while self._more("}"):
                self._pair(path)
        else:
            while self._next.kind != "mark" or self._next.text == ".":  # a float or a date is several tokens
                self._advance()

    def _more(self, closing: str) -> bool:
        """Step over commas and line breaks to the next element; False at the closing bracket, which is consumed."""
        while self._next.text in ("\n", ","):
            self._advance()
        if self._next.text in (closing, ""):
            self._advance()
            return False
        return True
