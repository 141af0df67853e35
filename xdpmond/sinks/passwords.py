"""Who may read the metrics: names and salted scrypt hashes, in a line each as the configuration has them.

    NAME:scrypt:LOG2_N:R:P:SALT:HASH

A hash takes some hundredths of a second on purpose, so a password that was found right is remembered, as a digest under a key of this
process, and wrong ones are looked at only so often: whoever guesses cannot keep a CPU busy, nor keep out those who were in before.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UsageError

_LOG2_N, _R, _P = 14, 8, 1
_MEMORY = 256 << 20
"""The most that scrypt may take: what the highest cost that the configuration takes needs, and some more."""
_LENGTH = 32
_GUESSES, _GUESS_SECONDS = 10, 10.0
"""So many wrong passwords are looked at in so long a time."""


def hashed(name: str, password: str) -> str:
    """The line for the configuration."""
    if not name or len(name) > 64 or not all(" " < character <= "~" and character != ":" for character in name):
        raise UsageError(f"{name!r:.80} is not a name", hint="1 to 64 letters, digits and signs, but no colon")
    if not password:
        raise UsageError("the password is empty")
    salt = secrets.token_bytes(16)
    return f"{name}:scrypt:{_LOG2_N}:{_R}:{_P}:{_encoded(salt)}:{_encoded(_scrypt(password, salt, _LOG2_N, _R, _P))}"


@dataclass(frozen=True, slots=True)
class _User:
    cost: tuple[int, int, int]
    salt: bytes
    hash: bytes

    def has(self, password: str) -> bool:
        return hmac.compare_digest(_scrypt(password, self.salt, *self.cost), self.hash)


class Users:
    """Those of the configuration. For one thread at a time."""

    def __init__(self, lines: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self._users = dict(_parse(line) for line in lines)
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._right: dict[str, bytes] = {}
        self._wrong: deque[float] = deque(maxlen=_GUESSES)
        # Somebody who does not exist takes as long as somebody who does.
        self._nobody = _User((_LOG2_N, _R, _P), secrets.token_bytes(16), bytes(_LENGTH))

    def knows(self, authorization: str) -> bool:
        """Was this header (of basic authentication) found right before? Takes no time."""
        name, password = _credentials(authorization)
        return hmac.compare_digest(self._right.get(name, b""), self._digest(password))

    @property
    def overwhelmed(self) -> bool:
        """Have so many been wrong lately that none is looked at now?"""
        return len(self._wrong) == _GUESSES and self._clock() - self._wrong[0] < _GUESS_SECONDS

    def check(self, authorization: str) -> bool:
        """Look at a header; takes a while."""
        name, password = _credentials(authorization)
        if not name:
            return False
        user = self._users.get(name)
        if (user or self._nobody).has(password) and user:
            self._right[name] = self._digest(password)
            return True
        self._wrong.append(self._clock())
        return False

    def _digest(self, password: str) -> bytes:
        return hashlib.blake2b(password.encode(), key=self._key).digest()


def _parse(line: str) -> tuple[str, _User]:
    name, _, *cost, salt, hash_ = line.split(":")
    log2_n, r, p = map(int, cost)
    return name, _User((log2_n, r, p), _decoded(salt), _decoded(hash_))


def _credentials(authorization: str) -> tuple[str, str]:
    """Name and password of a header; empty if it has none."""
    scheme, _, encoded = authorization.strip().partition(" ")
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:
        return "", ""
    name, colon, password = text.partition(":")
    return (name, password) if scheme.lower() == "basic" and colon else ("", "")


def _scrypt(password: str, salt: bytes, log2_n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << log2_n, r=r, p=p, maxmem=_MEMORY, dklen=_LENGTH)


def _encoded(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
