"""Walk it by hand: a booted Debian with the package installed, and a shell in it. From the checkout: `python3 -m tests.package.walk`.

The wire's end is the namespace that is named at the start: `ip netns exec NAME ping -I 198.51.100.7 10.77.0.1` is an unlisted visitor.
Ends, and removes all, when the shell ends. `--bare` installs nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from . import build
from .machine import ADDRESS, ATTACKER, PERMITTED, UNLISTED, VISITOR, booted


def main() -> int:
    with tempfile.TemporaryDirectory() as output, booted() as machine:
        if "--bare" not in sys.argv:
            machine.install(build.build_deb(Path(output)))
        print(f"the machine: {ADDRESS[4]} and {ADDRESS[6]}, process 1 is {machine.leader}; its files: {machine.copy.root}")
        print(f"the wire: ip netns exec {machine.wire.name} ping -I SOURCE {ADDRESS[4]}")
        for name, pair in {"permitted": PERMITTED, "unlisted": UNLISTED, "visitor": VISITOR, "attacker": ATTACKER}.items():
            print(f"  {name:<10} {pair[4]:<15} {pair[6]}")
        return subprocess.run(["nsenter", "-t", str(machine.leader), "-a", "env", "-C", "/root", "bash", "--login"], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
