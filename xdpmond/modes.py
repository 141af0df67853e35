"""Monitor or enforce, and by whose word: set by hand for one interface, set by hand for all, the files' for the interface, the files'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .config import Config
from .model import Mode


@dataclass(frozen=True, slots=True)
class Modes:
    """What was set by hand. Empty: as the files say."""

    everywhere: Mode | None = None
    on: Mapping[str, Mode] = field(default_factory=dict)

    def of(self, config: Config, interface: str) -> Mode:
        return self.on.get(interface) or self.everywhere or config.mode_on(interface)

    def with_change(self, mode: Mode | None, interface: str = "") -> Modes:
        """Set (None: leave to the files) for one interface, or for all, which ends what was set for single ones."""
        if not interface:
            return Modes(mode)
        others = {name: other for name, other in self.on.items() if name != interface}
        return Modes(self.everywhere, others if mode is None else {**others, interface: mode})
