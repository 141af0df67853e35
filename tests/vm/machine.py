"""One run of a command in a virtual machine: start it, hand on its output as it comes, and return what the command returned.

The guest speaks through three virtio ports: `output` (what the command prints, streamed), `report` (a file that it leaves in
/run/report) and `status` (its exit status, the last thing written). The serial console is kept apart and is shown only when a machine
ends without a status. The machine never outlives its maker: it is killed when time is up, on any exception, and by the kernel when the
maker dies.
"""

from __future__ import annotations

import os
import selectors
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .archive import Archive
from .image import FIRST_MODULES, Image

_PREFIX = "xdpmond-vm-"
_MEMORY_MIB = 2048
_PROCESSORS = 4
_CONSOLE_LINES = 120
"""Shown of a machine that failed: a panic with its stack, and what came before it."""

_LEFT_OUT = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist", "node_modules"}


class MachineError(Exception):
    """The machine ended, or was ended, without an exit status of the command; the message holds the end of its console."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command in a guest came to."""

    status: int
    output: str
    report: bytes


def run(
    image: Image,
    command: Sequence[str],
    *,
    project: Path,
    environment: Mapping[str, str],
    timeout: float,
    boot_timeout: float = 600,
    on_output: Callable[[bytes], object] = lambda data: None,
) -> Finished:
    """Run `command` in the directory /project of a fresh guest, which is a copy of the directory `project` as it is now."""
    _remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as name:
        work = Path(name)
        initramfs = work / "initramfs"
        with initramfs.open("wb") as stream:
            stream.write(image.start.read_bytes())
            _write_run(Archive(stream), project, command, environment)
        qemu = _qemu_command(image, initramfs, work)
        output = _supervise(qemu, work, timeout, boot_timeout, on_output)
        status = _read(work / "status").strip()
        if not status.isdigit():
            raise MachineError(f"the machine ended without a status; the end of its console:\n{_console(work)}")
        return Finished(int(status), output.decode(errors="replace"), _read(work / "report"))


def _remove_leftovers() -> None:
    """What a process left that was killed before it could remove it."""
    for found in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        if not Path("/proc", found.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(found)


def _write_run(archive: Archive, project: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    scripts = Path(__file__).parent
    archive.file("init", (scripts / "start.sh").read_bytes(), 0o755)
    archive.file("vm/main", (scripts / "main.sh").read_bytes(), 0o755)
    archive.file("vm/first-modules", "".join(f"{module}\n" for module in FIRST_MODULES).encode())
    archive.file("vm/command", f"exec {shlex.join(command)}\n".encode())
    archive.file("vm/environment", "".join(f"export {key}={shlex.quote(value)}\n" for key, value in environment.items()).encode())
    archive.directory("project")
    archive.tree(project, "project", wanted=lambda path: os.path.basename(path) not in _LEFT_OUT)
    archive.close()


def _qemu_command(image: Image, initramfs: Path, work: Path) -> list[str]:
    # Hardware virtualisation is asked for only by name: where it is nested it may open, and then hang.
    accelerator = os.environ.get("XDPMOND_ACCEL", "tcg")
    accelerator_arguments = ["-accel", "tcg,thread=multi"] if accelerator == "tcg" else ["-accel", accelerator]
    port = ["-device", "virtio-serial-pci"]
    port += ["-chardev", "stdio,id=output,signal=off", "-device", "virtserialport,chardev=output,name=output"]
    for name in ("report", "status"):
        port += ["-chardev", f"file,id={name},path={work / name}", "-device", f"virtserialport,chardev={name},name={name}"]
    return [
        # The kernel kills qemu if this process dies without a chance to do so.
        "setpriv", "--pdeathsig", "KILL",
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
        "-machine", "q35", *accelerator_arguments, "-cpu", "max", "-smp", str(_PROCESSORS), "-m", f"{_MEMORY_MIB}M",
        "-kernel", str(image.kernel), "-initrd", str(initramfs),
        # What a guest writes to the disk goes to a file that is gone at the end: all machines share one disk, and see it as it was made.
        "-drive", f"file={image.disk},format=raw,if=virtio,snapshot=on",
        # A panic ends the machine at once.
        "-append", "console=ttyS0 panic=-1 loglevel=4 mitigations=off",
        "-serial", f"file:{work / 'console'}", *port,
    ]  # fmt: skip


def _supervise(command: list[str], work: Path, timeout: float, boot_timeout: float, on_output: Callable[[bytes], object]) -> bytes:
    """Read the machine's output until it ends; raise `MachineError` when it says nothing in time, or does not end in time."""
    output = bytearray()
    start = time.monotonic()
    try:
        # Its input stays open and silent: at an end of file qemu would take the port for unplugged, and the guest would wait for ever.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(work / "stderr").open("wb"))
    except FileNotFoundError as error:
        raise MachineError(f"{error.filename} is not installed") from None
    with process, selectors.DefaultSelector() as selector:
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while True:
                limit = timeout if output else min(timeout, boot_timeout)
                left = start + limit - time.monotonic()
                if left <= 0 or not selector.select(left):
                    what = "did not finish" if output else "did not start"
                    raise MachineError(f"the machine {what} within {limit:.0f} s; the end of its console:\n{_console(work)}")
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                output += data
                on_output(data)
            process.wait(timeout=30)
        finally:
            process.kill()
    if process.returncode != 0:
        raise MachineError(f"qemu ended with status {process.returncode}: {_read(work / 'stderr').decode(errors='replace')[-2000:]}")
    return bytes(output)


def _console(work: Path) -> str:
    text = _read(work / "console") + _read(work / "stderr")
    return "\n".join(text.decode(errors="replace").splitlines()[-_CONSOLE_LINES:])


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
