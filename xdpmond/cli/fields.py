"""Reading the daemon's documents: what is absent or of another type becomes zero or nothing, so that a screen is shown in any case.

The daemon may be a version older or newer than this client; a person under attack wants the numbers that are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import XdpmondError

Document = dict[str, Any]


def value(document: Document, *path: str) -> Any:
    """What stands at the path of keys, or None."""
    if len(path) == 1 and isinstance(document, dict):  # several times in each row of a table
        return document.get(path[0])
    here: Any = document
    for key in path:
        if not isinstance(here, dict):
            return None
        here = here.get(key)
    return here


def number(document: Document, *path: str) -> float:
    found = value(document, *path)
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) and found == found else 0


def count(document: Document, *path: str) -> int:
    return int(number(document, *path))


def text(document: Document, *path: str) -> str:
    """The text as it came: not yet safe to print."""
    found = value(document, *path)
    return found if isinstance(found, str) else "" if found is None or isinstance(found, (dict, list, bool)) else str(found)


def flag(document: Document, *path: str) -> bool:
    return value(document, *path) is True


def rows(document: Document, *path: str) -> list[Document]:
    found = value(document, *path)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def texts(document: Document, *path: str) -> list[str]:
    found = value(document, *path)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def parse_lines(lines: Iterable[bytes]) -> Iterator[Document]:
    """JSON Lines as documents."""
    decode = json.JSONDecoder().decode
    for line in lines:
        if line.isspace() or not line:
            continue
        try:
            document = decode(line.decode())
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise XdpmondError("the daemon sent a line that cannot be read", hint="daemon and client may differ in version")
        yield document
