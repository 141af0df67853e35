"""The compiler child: the only code that imports bcc.

Importing bcc maps LLVM, about 77 MB and more after a compile, never given back. So a process of its own compiles, writes the program's
instructions to its standard output, and exits. Run as `python3 -m xdpmond.kernel.compile`, with a request as JSON on its standard input;
`kernel.loader` is its one caller, and describes what travels.

The first start after a boot waits for this. So nothing is imported here that is not needed (numpy takes as long as LLVM to load), no
debugging information is made, and the process ends without tidying up its memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from ..errors import KernelError
from . import libbpf

_BPF_PSEUDO_MAP_FD = 1
_LOAD_IMMEDIATE_64, _MOVE_IMMEDIATE_64 = 0x18, 0xB7


def _shim(directory: Path, scratch: Path) -> Path:
    """A tree that BCC takes for kernel sources: our few headers, and the public ones of linux-libc-dev under their kernel name."""
    tree = scratch / "shim"
    shutil.copytree(directory / "shim", tree)
    (tree / "include" / "uapi").symlink_to("/usr/include")
    return tree


def _source(directory: Path, name: str) -> str:
    """A source with our own headers in the place of their #include: BCC rewrites uses of maps in the main file alone."""
    lines = []
    for number, line in enumerate((directory / name).read_text().splitlines(), 1):
        header = re.fullmatch(r'#include "(\w+\.h)"', line)
        lines += [f'#line 1 "{header[1]}"', _source(directory, header[1]), f'#line {number + 1} "{name}"'] if header else [line]
    return "\n".join(lines)


def _places(code: bytes, names: dict[int, str], request: dict) -> dict[str, list]:
    """Where the instructions load a map, or the address of a map's one value, and of which map; and where they hold a mark, and which."""
    loads, values, marks = [], [], []
    at = 0
    while at < len(code):
        immediate = int.from_bytes(code[at + 4 : at + 8], "little")
        if code[at] == _LOAD_IMMEDIATE_64:
            if code[at + 1] >> 4 == _BPF_PSEUDO_MAP_FD:
                loads.append((at, names[immediate]))
            elif int.from_bytes(code[at + 12 : at + 16], "little") == request["value_mark"]:
                values.append((at, request["values"][immediate]))
            at += 8  # it has two places
        elif code[at] == _MOVE_IMMEDIATE_64 and immediate in request["marks"]:
            marks.append((at, immediate))
        at += 8
    return {"loads": loads, "values": values, "marks": marks}


def _compile(request: dict) -> tuple[dict, bytes]:
    directory = Path(request["directory"])
    os.environ["BCC_KERNEL_SOURCE"] = str(_shim(directory, Path(request["scratch"])))
    try:
        from bcc import BPF
    except ImportError as error:
        raise KernelError(f"BCC cannot be imported: {error}", hint="install the package python3-bpfcc") from None
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    flags = ["-D__LINUX_BPF_H__", f"-I/usr/include/{multiarch}", f"-I{directory}", "-Werror=implicit-function-declaration", "-g0"]
    try:
        module = BPF(text=_source(directory, request["source"]), cflags=flags + request["defines"])
    except Exception as error:  # bcc raises bare Exception; clang has written its reasons to our standard error
        raise KernelError(f"the packet path does not compile: {error}") from None
    maps = {name: module[name].map_fd for name in request["maps"]}
    names = {fd: name for name, fd in maps.items()}
    code = module.dump_func(request["program"])
    definitions = {name: libbpf.map_info(fd) for name, fd in maps.items()}
    return {"maps": definitions, "size": len(code), **_places(code, names, request)}, code


def main() -> NoReturn:
    # What BCC prints must not get between the lines of our answer.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        head, code = _compile(json.load(sys.stdin))
    except KernelError as error:
        head, code = {"error": error.message, "hint": error.hint}, b""
    with answer:
        answer.write(json.dumps(head).encode() + b"\n" + code)
    # At once: LLVM would first give back, piece by piece, memory that goes with the process anyway.
    sys.stderr.flush()
    os._exit(1 if "error" in head else 0)


if __name__ == "__main__":
    main()
