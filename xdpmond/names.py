"""What is known of addresses: the country and the autonomous system, from files in MaxMind's format.

The library, python3-maxminddb, is imported only where a file is configured. A file is copied into memory when it is opened, so that whoever
replaces it on disk, in whatever way, changes nothing for a reader; a reload opens it again. Only what is shown is looked up. A file whose
inside is damaged gives no names; `Names.damaged` says so.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import Names as Files
from .errors import ConfigError
from .model import Family

_LARGEST = 1 << 30
_LONGEST_NAME = 200
_PACKAGE = "python3-maxminddb"


@dataclass(frozen=True, slots=True)
class Name:
    country: str | None = None
    """Two letters, by ISO 3166-1."""
    as_number: int | None = None
    as_name: str | None = None


class Database:
    """One file, opened. `setting` is the key that names it."""

    def __init__(self, setting: str, file: str):
        self.file = file
        self.damaged = False
        try:
            import maxminddb
        except ImportError:
            raise ConfigError(f"names.{setting}: {_PACKAGE} is not installed", hint=f"apt install {_PACKAGE}") from None
        self._invalid = maxminddb.InvalidDatabaseError
        try:
            self._reader = _open_copy(maxminddb, file)
            self.type = str(self._reader.metadata().database_type)
            self._ipv6 = self._reader.metadata().ip_version == 6
        except OSError as error:
            raise ConfigError(f"names.{setting}: {file}: {error.strerror or error}") from None
        except Exception:  # of a file with any content the library may raise any
            hint = "it is not in MaxMind's format (.mmdb), or not whole"
            raise ConfigError(f"names.{setting}: {file} is not a database that can be read", hint=hint) from None

    def find(self, family: Family, packed: bytes, length: int) -> Mapping[str, Any]:
        """The record that holds for the whole prefix; empty if there is none."""
        if self.damaged or (family is Family.IPV6 and not self._ipv6):
            return {}
        try:
            record, covered = self._reader.get_with_prefix_len(ipaddress.ip_address(packed))
        except (self._invalid, ValueError, TypeError, UnicodeError, OverflowError):
            self.damaged = True
            return {}
        return record if isinstance(record, dict) and covered <= length else {}


def _open_copy(maxminddb: Any, file: str) -> Any:
    """A reader of a copy in memory."""
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as source:  # a pipe would keep us waiting
        status = os.fstat(source.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise OSError(0, f"not a regular file of at most {_LARGEST >> 20} MiB")
        copy = os.memfd_create("xdpmond-names", os.MFD_CLOEXEC)
        try:
            while os.sendfile(copy, source.fileno(), None, 1 << 20):
                if os.fstat(copy).st_size > _LARGEST:
                    raise OSError(0, "it grows while it is read")
            return maxminddb.open_database(f"/proc/self/fd/{copy}")
        finally:
            os.close(copy)


class Names:
    """The files that are configured."""

    def __init__(self, country: Database | None = None, asn: Database | None = None):
        self._country, self._asn = country, asn

    @classmethod
    def open(cls, files: Files) -> Names:
        """Raises `ConfigError` if one of them cannot be used."""
        country = Database("country", files.country) if files.country else None
        asn = Database("asn", files.asn) if files.asn else None
        if country and "ASN" in country.type.upper():
            raise ConfigError(f"names.country: {files.country} is a database of type {country.type}", hint="that belongs to names.asn")
        if asn and any(word in asn.type.upper() for word in ("COUNTRY", "CITY")) and "ASN" not in asn.type.upper():
            raise ConfigError(f"names.asn: {files.asn} is a database of type {asn.type}", hint="that belongs to names.country")
        return cls(country, asn)

    @property
    def damaged(self) -> list[str]:
        """The files in which something was found that cannot be read."""
        return [of.file for of in (self._country, self._asn) if of and of.damaged]

    def of(self, family: Family, packed: bytes, length: int | None = None) -> Name:
        """Of an address, or of a whole prefix: what is not the same for all of it is not known."""
        length = family.bits if length is None else length
        country = self._country.find(family, packed, length) if self._country else {}
        asn = self._asn.find(family, packed, length) if self._asn else {}
        place = next((of for key in ("country", "registered_country") if isinstance(of := country.get(key), dict)), {})
        number = asn.get("autonomous_system_number")
        return Name(_text(place.get("iso_code")), number if isinstance(number, int) else None,
                    _text(asn.get("autonomous_system_organization")))  # fmt: skip


def _text(value: object) -> str | None:
    return value[:_LONGEST_NAME] if isinstance(value, str) and value else None


NO_NAMES = Names()
