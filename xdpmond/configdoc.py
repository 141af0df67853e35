"""The documents that follow from the table of settings: the list in xdpmond.toml(5) and the vendor's file with every default.

    python3 -m xdpmond.configdoc man/xdpmond.toml.5 conf/vendor.toml

rewrites them; a unit test fails while they are not current.
"""

from __future__ import annotations

import re
import sys
import textwrap
from itertools import groupby
from pathlib import Path

from .config import ANY_NAME, ARRAYS, EACH, SETTINGS, TABLES, Interface, Setting
from .kinds import ENTRIES, FILES

BEGIN = '.\\" The settings up to the end mark are made by: python3 -m xdpmond.configdoc man/xdpmond.toml.5'
END = '.\\" End mark.'

_VENDOR_HEAD = """\
# The defaults of xdpmond, for reading. This file belongs to the package and is replaced with it:
# change settings in /etc/xdpmond/xdpmond.toml or in /etc/xdpmond/xdpmond.toml.d/NAME.toml.
# Made from the table of settings by: python3 -m xdpmond.configdoc
"""


def man_settings() -> str:
    """The settings as man macros, one section for each table."""
    lines = []
    for table, settings in groupby(SETTINGS.values(), key=lambda setting: setting.path[:-1]):
        lines.append(f".SS {_man(_heading(table)) if table else 'Above the first [table] line'}")
        if table:
            lines.append(_man_text(_about(table)))
        for setting in settings:
            default = "" if setting.needed else f' " = {_man(_default(setting))}"'
            lines += [".TP", f".{'BR' if default else 'B'} {setting.path[-1]}{default}"]
            lines += [_man_text(setting.help), ".br", f"Takes {_man(setting.kind.form)}{'; must be given' if setting.needed else ''}."]
    return "\n".join(lines) + "\n"


def with_settings(page: str) -> str:
    """A manual page with what stands between the marks replaced."""
    before, found, rest = page.partition(BEGIN + "\n")
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise ValueError("the page lacks the marks")
    return before + found + man_settings() + found_end + after


def vendor_toml() -> str:
    """Every setting that a vendor may set, with its default and its help."""
    lines = [_VENDOR_HEAD]
    for table, settings in groupby(SETTINGS.values(), key=lambda setting: setting.path[:-1]):
        if ANY_NAME in table or EACH in table:
            continue
        if table:
            lines += [f"# {_about(table)}", f"[{'.'.join(table)}]\n"]
        for setting in settings:
            if setting.kind not in (ENTRIES, FILES):
                lines += textwrap.wrap(setting.help.replace("`", ""), 120, initial_indent="# ", subsequent_indent="# ")
                lines.append(f"{setting.path[-1]} = {_default(setting)}\n")
    return "\n".join(lines)


def _heading(table: tuple[str, ...]) -> str:
    return f"[[{table[0]}]]" if EACH in table else f"[{'.'.join(table)}]"


def _about(table: tuple[str, ...]) -> str:
    """What a table is for, from its docstring, which starts with the table's name."""
    declared = Interface if ANY_NAME in table else (TABLES | ARRAYS)[table[0]]
    text = " ".join((declared.__doc__ or "").partition(": ")[2].split())
    return text[:1].upper() + text[1:]


def _default(setting: Setting) -> str:
    return "as everywhere" if ANY_NAME in setting.path else setting.kind.show(setting.default)


def _man(text: str) -> str:
    """Text as roff takes it literally."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("'", "\\(aq").replace("~", "\\(ti")


def _man_text(text: str) -> str:
    """Running text: what stands between backticks in bold, hyphens as hyphens, one sentence a line."""
    parts = [f"\\fB{_man(part)}\\fP" if number % 2 else part.replace('"', "\\(dq") for number, part in enumerate(text.split("`"))]
    return re.sub(r"(?<=[.:]) (?=[A-Z\\])", "\n", "".join(parts))


def main(files: list[str]) -> int:
    if not files:
        sys.stdout.write(man_settings())
    for file in map(Path, files):
        file.write_text(vendor_toml() if file.suffix == ".toml" else with_settings(file.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
