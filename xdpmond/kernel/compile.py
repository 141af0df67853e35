"""The compiler child: the only code that imports bcc.

Importing bcc maps LLVM, about 77 MB and more after a compile, never given back. So a process of its own compiles, loads through libbpf,
passes the descriptors of programs and maps back over a socket (SCM_RIGHTS), and exits. Run as `python3 -m xdpmond.kernel.compile FD`;
`kernel.loader` is its one caller, and describes what travels over the socket.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import sysconfig
import tempfile
from pathlib import Path

from ..errors import KernelError
from . import libbpf

_BPF_PSEUDO_MAP_FD = 1
_LOAD_IMMEDIATE_64 = 0x18


def _shim(directory: Path, scratch: Path) -> Path:
    """A tree that BCC takes for kernel sources: our few headers, and the public ones of linux-libc-dev under their kernel name."""
    tree = scratch / "shim"
    shutil.copytree(directory / "shim", tree)
    (tree / "include" / "uapi").symlink_to("/usr/include")
    return tree


def _reuse_maps(instructions: bytes, replace: dict[int, int]) -> bytes:
    """Point each load of a map's address at another descriptor."""
    code = bytearray(instructions)
    for at in range(0, len(code), 8):
        if code[at] == _LOAD_IMMEDIATE_64 and code[at + 1] >> 4 == _BPF_PSEUDO_MAP_FD:
            fd = int.from_bytes(code[at + 4 : at + 8], "little")
            code[at + 4 : at + 8] = replace.get(fd, fd).to_bytes(4, "little")
    return bytes(code)


def _compile(request: dict, kept: dict[str, int]) -> tuple[dict, list[int]]:
    directory = Path(request["directory"])
    with tempfile.TemporaryDirectory(prefix="xdpmond-") as scratch:
        os.environ["BCC_KERNEL_SOURCE"] = str(_shim(directory, Path(scratch)))
        try:
            from bcc import BPF
        except ImportError as error:
            raise KernelError(f"BCC cannot be imported: {error}", hint="install the package python3-bpfcc") from None
        multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
        flags = ["-D__LINUX_BPF_H__", f"-I/usr/include/{multiarch}", f"-I{directory}", "-Werror=implicit-function-declaration"]
        try:
            module = BPF(text=(directory / request["source"]).read_text(), cflags=flags + request["defines"])
        except Exception as error:  # bcc raises bare Exception; clang has written its reasons to our standard error
            raise KernelError(f"the packet path does not compile: {error}") from None
        fresh = {name: module[name].map_fd for name in request["maps"]}
        same = {name for name, fd in fresh.items() if name in kept and libbpf.map_info(kept[name]) == libbpf.map_info(fd)}
        for group in request["together"]:
            same -= set() if same.issuperset(group) else set(group)
        maps = {name: kept[name] if name in same else fd for name, fd in fresh.items()}
        replace = {fresh[name]: maps[name] for name in fresh}
        frags = "-DXM_FRAGS" in request["defines"]
        programs = [libbpf.load_xdp(_reuse_maps(module.dump_func(name), replace), name, frags=frags) for name in request["programs"]]
        return {"reused": sorted(same)}, programs + list(maps.values())


def main() -> int:
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 64)
        request = json.loads(message)
        try:
            reply, answer = _compile(request, dict(zip(request["kept"], descriptors, strict=True)))
        except KernelError as error:
            socket.send_fds(channel, [json.dumps({"error": error.message, "hint": error.hint}).encode()], [])
            return 1
        socket.send_fds(channel, [json.dumps(reply).encode()], answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
