"""The one family of errors that a person may see.

Every error has a stable `code` (kebab-case, part of the public contract), a message that says what is wrong and where, and a hint that
says what to do. One place turns the code into an exit status (`xdpmond.cli`), one into a D-Bus error name (`xdpmond.bus`); nothing
parses a message. Exceptions of libraries stop at the adapter that uses the library and become one of these.
"""


class XdpmondError(Exception):
    """Root of all errors of ours. `code` is stable; `hint` may be empty."""

    code = "failed"
    exit_status = 1

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(XdpmondError):
    """The call itself is malformed: an unknown option, a combination that means nothing."""

    code = "usage"
    exit_status = 2


class NotRunningError(XdpmondError):
    """No daemon owns the bus name."""

    code = "not-running"
    exit_status = 3


class NotAuthorizedError(XdpmondError):
    """polkit, or its absence, refuses the caller."""

    code = "not-authorized"
    exit_status = 4


class NoSuchEntryError(XdpmondError):
    """The prefix, interface or thing named does not exist."""

    code = "no-such-entry"
    exit_status = 5


class ConfigError(XdpmondError):
    """A configuration file or key is refused. The message names file and key."""

    code = "invalid-config"
    exit_status = 6


class PrefixError(XdpmondError):
    """A text is not a prefix by the strict rules of `model.Prefix.parse`."""

    code = "invalid-prefix"
    exit_status = 6


class LockOutError(XdpmondError):
    """The change would cut off an established connection to a failsafe port."""

    code = "locks-you-out"
    exit_status = 7


class FileEntryError(XdpmondError):
    """The entry belongs to a configuration file; the message names file and line."""

    code = "file-entry"
    exit_status = 7


class GuardError(XdpmondError):
    """Refused by another guard unless forced: a /0 prefix, enforce with default deny."""

    code = "needs-force"
    exit_status = 7


class KernelError(XdpmondError):
    """The kernel refused: compile, load, attach or a map operation. The message carries the kernel's reason, `errno` its number."""

    code = "kernel"
    errno = 0


class ForeignProgramError(KernelError):
    """Another XDP program is attached to the interface; it is never replaced."""

    code = "foreign-program"


class StateError(XdpmondError):
    """The state directory cannot be read or written."""

    code = "state"


ERRORS: dict[str, type[XdpmondError]] = {
    cls.code: cls
    for cls in (
        XdpmondError, UsageError, NotRunningError, NotAuthorizedError, NoSuchEntryError, ConfigError, PrefixError, LockOutError,
        FileEntryError, GuardError, KernelError, ForeignProgramError, StateError,
    )
}  # fmt: skip
"""Every class by its code, for whoever rebuilds an error from a bus reply."""
