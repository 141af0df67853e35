"""The policy in the kernel: two copies, and a number that says which one packets look into.

A change is made to the copy at rest, the number is switched, and when no packet is left in the other copy it follows. So a packet sees
the old policy or the new one, whatever the size of the change. Whoever made the change need not wait for that: it happens in a thread of
its own, and the next change waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..errors import KernelError
from ..model import Prefix, Verdict
from . import abi
from .maps import VERDICT_FROM_ABI, VERDICT_TO_ABI, Control, map_memory
from .tables import POLICY_BYTES, POLICY_MAPS, PolicySize
from .verdicts import Built, Copy, DoesNotFit, NeedsWhole, Verdicts, build

_ALWAYS_POINTS = 8
_PREFIXES_WORTH_A_POINT = 400
"""To build everything takes as long as a change of one prefix for so many that there are."""


class PolicyTooLarge(DoesNotFit):
    """The policy needs larger maps; this is what, and how large."""

    def __init__(self, built: Built, size: PolicySize, *, fits: bool):
        super().__init__("the policy does not fit in its maps")
        self.built = built
        self.size = size
        self.fits = fits
        """Is it the maps that are too large?"""


class PolicyTable:
    """Both copies. Not for several threads at once."""

    def __init__(self, maps: Mapping[str, int], sizes: PolicySize, control: Control, grace: Callable[[], None]):
        self.size = sizes
        self._control = control
        self._grace = grace
        seed = self._seed = [int(word) for word in control.block["seed"]]
        each = dict(zip(POLICY_MAPS, _bytes(sizes), strict=True))
        memory = {name: map_memory(maps[name], 2 * size, write=True) for name, size in each.items()}
        kind = np.dtype([("head", abi.POLICY), ("ipv6", "u4", abi.TOPS)])
        policies = np.frombuffer(memory["policy"], kind, 2)
        lines = np.frombuffer(memory["lines"], "u8", 2 * sizes.lines * 8).reshape(2, sizes.lines, 8)
        buckets4 = np.frombuffer(memory["buckets4"], "u8", 2 * sizes.buckets4 * 8).reshape(2, sizes.buckets4, 8)
        buckets6 = np.frombuffer(memory["buckets6"], "u8", 2 * sizes.buckets6 * 16).reshape(2, sizes.buckets6, 16)
        parts = zip(policies["head"], policies["ipv6"], lines, buckets4, buckets6, strict=True)
        self._copies = [Copy(head, ipv6, of_lines, of4, of6, seed) for head, ipv6, of_lines, of4, of6 in parts]
        for at, head in enumerate(policies["head"]):
            head["first_line"], head["first4"], head["first6"] = at * sizes.lines, at * sizes.buckets4, at * sizes.buckets6
            head["mask4"], head["mask6"] = sizes.buckets4 - 1, sizes.buckets6 - 1
        self._equal = False  # nobody knows what stands in the copy at rest
        self._prefixes = 0  # about how many there are
        self._thread = ThreadPoolExecutor(1, "policy")
        self._following: Future[None] | None = None

    @classmethod
    def new(cls, maps: Mapping[str, int], sizes: PolicySize, control: Control, grace: Callable[[], None]) -> PolicyTable:
        """On empty maps: no prefix, and the default `log`."""
        table = cls(maps, sizes, control, grace)
        for copy in table._copies:
            copy.head["default_verdict"] = abi.VERDICT_LOG
            copy.clear()
        table._equal = True
        return table

    def begin(self, built: Built, default: Verdict) -> None:
        """Fill new maps, into which no packet looks yet."""
        active = self._copies[self._control.policy_copy]
        active.write(built)
        active.head["default_verdict"] = VERDICT_TO_ABI[default]
        self._copy_all(1 - self._control.policy_copy)
        self._prefixes = built.prefixes

    @property
    def default(self) -> Verdict:
        """The verdict on sources that no entry covers, as packets see it."""
        return VERDICT_FROM_ABI[int(self._copies[self._control.policy_copy].head["default_verdict"])]

    def apply(self, policy: Verdicts, touched: Sequence[Prefix] | None, default: Verdict, *, shrink: bool = True) -> None:
        """Let packets see this policy and default. `touched` are the prefixes by which it differs from the last one, None: all may.

        Raises PolicyTooLarge if it needs larger maps, or if `shrink` much smaller ones. Blocks: for microseconds a prefix, or for as long
        as it takes to build all.
        """
        self.settle()
        resting = 1 - self._control.policy_copy
        points = touched is not None and self._equal and len(touched) < _ALWAYS_POINTS + self._prefixes // _PREFIXES_WORTH_A_POINT
        self._equal = False
        if points:
            assert touched is not None
            points = self._change(resting, policy, touched)
        if not points:
            self._write_all(resting, policy, shrink)
        self._copies[resting].head["default_verdict"] = VERDICT_TO_ABI[default]
        self._control.set_policy_copy(resting)
        other = 1 - resting
        if points:
            # Immutable, so that it can be read later.
            self._follow(lambda: self._repeat(other, policy, touched or ()))
        else:
            self._follow(lambda: self._copy_all(other))

    def _change(self, copy: int, policy: Verdicts, touched: Sequence[Prefix]) -> bool:
        try:
            self._copies[copy].change(policy, touched)
        except (NeedsWhole, DoesNotFit):
            return False
        self._prefixes += len(touched)
        return True

    def _write_all(self, copy: int, policy: Verdicts, shrink: bool) -> None:
        built = build(policy)
        wanted = built.size(self._seed)
        # Four times too large is worth a move, too.
        wasteful = any(have > 4 * want and have > 65_536 for have, want in zip(self.size, wanted, strict=True))
        if wasteful and shrink:
            raise PolicyTooLarge(built, wanted, fits=True)
        try:
            self._copies[copy].write(built)
        except DoesNotFit:
            raise PolicyTooLarge(built, wanted, fits=False) from None
        self._prefixes = built.prefixes

    # The other copy

    def _follow(self, what: Callable[[], None]) -> None:
        def follow() -> None:
            self._grace()
            what()
            self._equal = True

        self._following = self._thread.submit(follow)

    def _copy_all(self, copy: int) -> None:
        source, target = self._copies[1 - copy], self._copies[copy]
        target.take_from(source)
        target.head["default_verdict"] = source.head["default_verdict"]

    def _repeat(self, copy: int, policy: Verdicts, touched: Sequence[Prefix]) -> None:
        try:
            self._copies[copy].change(policy, touched)
        except (NeedsWhole, DoesNotFit):
            self._copies[copy].take_from(self._copies[1 - copy])
        self._copies[copy].head["default_verdict"] = self._copies[1 - copy].head["default_verdict"]

    def settle(self) -> None:
        """Wait until the other copy has followed. If it could not (no memory), all is built for the next change."""
        following, self._following = self._following, None
        if following is not None:
            try:
                following.result()
            except (KernelError, MemoryError):
                self._equal = False

    def close(self) -> None:
        self.settle()
        self._thread.shutdown()


def _bytes(sizes: PolicySize) -> tuple[int, ...]:
    """Of one copy, in the order of POLICY_MAPS."""
    return (
        POLICY_BYTES,
        sizes.lines * abi.LINE.itemsize,
        sizes.buckets4 * abi.BUCKET4_TYPE.itemsize,
        sizes.buckets6 * abi.BUCKET6_TYPE.itemsize,
    )
