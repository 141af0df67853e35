"""The one place where an error becomes a D-Bus error, and the one table for it.

`org.xdpmond1.Error.` and the code in camel case: `invalid-prefix` is `org.xdpmond1.Error.InvalidPrefix`. The text is the message and,
if there is one, a newline and the hint. A client rebuilds the error by the name and parses no text.
"""

from __future__ import annotations

from ..errors import ERRORS, XdpmondError

PREFIX = "org.xdpmond1.Error."
MAX_TEXT = 16 * 1024


def error_name(code: str) -> str:
    return PREFIX + "".join(part.capitalize() for part in code.split("-"))


ERROR_NAMES: dict[str, str] = {code: error_name(code) for code in ERRORS}
"""Code to D-Bus name; complete, since the codes are a closed set."""


def bus_error(error: XdpmondError) -> tuple[str, str]:
    """Name and text for an error of ours."""
    text = f"{error.message}\n{error.hint}" if error.hint else error.message
    return ERROR_NAMES.get(error.code, ERROR_NAMES["failed"]), clean(text)


def clean(text: str) -> str:
    """What a D-Bus string can hold: no NUL, valid UTF-8, and no novel."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()[:MAX_TEXT]
