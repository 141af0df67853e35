"""C programs of the benchmark's own, compiled by BCC in a child process, which passes their descriptors back and ends.

As the daemon does it, and with its stand-in for kernel headers; BCC in this process would weigh upon what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xdpmond.kernel import libbpf, loader

_ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).parent / "programs"
_TIMEOUT = 60.0


class CompileError(Exception):
    """What clang or the verifier said."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Descriptors by name."""

    programs: dict[str, int]
    maps: dict[str, int]

    def close(self) -> None:
        for fd in (*self.programs.values(), *self.maps.values()):
            os.close(fd)


def compiled(source: str, programs: Sequence[str], maps: Sequence[str], **defines: int) -> Compiled:
    """Compile and load programs of one of the files beside this module."""
    request = {"source": source, "programs": list(programs), "maps": list(maps), "defines": defines}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "bench.compiled", str(theirs.fileno()), json.dumps(request)]
    environment = os.environ | {"PYTHONPATH": str(_ROOT)}
    with (
        ours,
        subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=_ROOT
        ) as child,
    ):
        theirs.close()
        ours.settimeout(_TIMEOUT)
        message, descriptors, _, _ = socket.recv_fds(ours, 16, 64)
        said = child.stderr.read().decode(errors="replace") if child.stderr else ""
    if not message:
        raise CompileError(f"{source}: {said[-2000:]}")
    return Compiled(
        dict(zip(programs, descriptors[: len(programs)], strict=True)), dict(zip(maps, descriptors[len(programs) :], strict=True))
    )


def _main() -> None:
    request = json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory(prefix="xm-bench-") as scratch, socket.socket(fileno=int(sys.argv[1])) as channel:
        tree = Path(scratch) / "shim"
        shutil.copytree(loader.source_directory() / "shim", tree)
        (tree / "include" / "uapi").symlink_to("/usr/include")
        os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        from bcc import BPF

        flags = ["-D__LINUX_BPF_H__", f"-I/usr/include/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}"]
        flags += ["-Werror=implicit-function-declaration", *(f"-D{name}={value}" for name, value in request["defines"].items())]
        module = BPF(text=(SOURCES / request["source"]).read_text(), cflags=flags)
        # What one program calls must be loaded as it is.
        frags = libbpf.has_frags()
        programs = [libbpf.load_xdp(module.dump_func(name.encode()), name, frags=frags) for name in request["programs"]]
        socket.send_fds(channel, [b"done"], programs + [module[name].map_fd for name in request["maps"]])


if __name__ == "__main__":
    _main()
