"""The commands on the daemon itself: mode, confirm, reload, check-config."""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

from ..errors import ConfigError, GuardError, NoSuchEntryError, UsageError, XdpmondError
from . import fields
from .context import Context
from .fields import Document
from .policy import duration
from .render import safe, span


def mode(context: Context) -> None:
    given = context.arguments
    if given.mode is None:
        _show_mode(context)
        return
    options: dict[str, object] = {"force": True} if given.force else {}
    if given.interface:
        options["interface"] = given.interface
    seconds = duration(given.confirm) if given.confirm is not None else 0.0
    if seconds:
        options["confirm"] = seconds
    from .client import ssh_peers

    if peers := ssh_peers(context.environ):
        options["peers"] = peers
    document = context.daemon.set_mode(given.mode, options)
    if context.json:
        context.document(document)
        return
    context.line(
        _painted(context, fields.text(document, "mode") or given.mode) + (f" on {safe(given.interface)}" if given.interface else "")
    )
    if seconds and context.legend:
        context.line(f"it goes back in {span(seconds)} unless you run: {context.style('xdpmonctl confirm', 'cyan')}")
    context.notes(fields.texts(document, "notes"))


def _show_mode(context: Context) -> None:
    given = context.arguments
    if given.confirm is not None or given.force:
        raise UsageError("--confirm and --force need a mode to set", hint="write for example: xdpmonctl mode enforce --confirm 60s")
    status = context.daemon.describe()
    interfaces = [row for row in fields.rows(status, "interfaces") if given.interface in ("", fields.text(row, "name"))]
    if given.interface and not interfaces:
        raise NoSuchEntryError(f"'{given.interface}' is not an interface that the daemon watches", hint="see: xdpmonctl status")
    if context.json:
        keys = ("mode", "file_mode", "mode_source", "default")
        shown: Document = {key: status.get(key) for key in keys}
        shown["interfaces"] = [{"name": row.get("name"), "mode": row.get("mode")} for row in interfaces]
        context.document(shown)
        return
    if given.interface:
        context.line(_painted(context, fields.text(interfaces[0], "mode")))
        return
    text, file_mode = _painted(context, fields.text(status, "mode")), fields.text(status, "file_mode")
    if fields.text(status, "mode_source") == "operator":
        text += f" (set by xdpmonctl; the files say {safe(file_mode)}, to which `xdpmonctl mode default` goes back)"
    context.line(text)
    for row in interfaces:
        if fields.text(row, "mode") not in ("", fields.text(status, "mode")):
            context.line(f"{_painted(context, fields.text(row, 'mode'))} on {safe(fields.text(row, 'name'))}")


def _painted(context: Context, name: str) -> str:
    return context.style(safe(name), {"enforce": "green", "monitor": "yellow"}.get(name, ""), "bold")


def confirm(context: Context) -> None:
    document = context.daemon.confirm()
    if context.json:
        context.document(document)
        return
    name = fields.text(document, "mode")
    context.line(f"{_painted(context, name)} is kept" if name else "the mode is kept")
    context.notes(fields.texts(document, "notes"))


def reload(context: Context) -> None:
    document = context.daemon.reload({"force": True} if context.arguments.force else {})
    if context.json:
        context.document(document)
        return
    context.line(safe(fields.text(document, "message")) or "the configuration was read again")
    context.notes(fields.texts(document, "notes"))


def check_config(context: Context) -> None:
    """Let the daemon's own program check, in a process of its own: it knows every key, and needs no running daemon."""
    import subprocess

    given = context.arguments
    # -P keeps the working directory out of the module path: someone may run this as root in a directory of another user.
    command = [sys.executable, "-P", "-m", "xdpmond", "--check-config"]
    if given.file is not None:
        command += ["-c", os.path.abspath(given.file)]
    package = str(Path(__file__).resolve().parents[2])
    environ = dict(context.environ)
    if package not in site.getsitepackages():  # run from a checkout: check with the daemon of the same checkout
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    said, complaint = done.stdout.strip(), done.stderr.strip()
    if done.returncode == 0:
        if context.json:
            context.document({"ok": True, "message": said})
        else:
            for line in [*said.splitlines(), *complaint.splitlines()] or ["the configuration is in order"]:
                context.line(safe(line.removeprefix("xdpmond: ")))
        return
    if complaint.startswith("Traceback"):
        raise XdpmondError(f"the check itself failed: {complaint.splitlines()[-1]}", hint=f"see all of it with: {' '.join(command[3:])}")
    message, _, hint = (complaint or said or f"the check ended with status {done.returncode}").partition("\n")
    kind = {kind.exit_status: kind for kind in (ConfigError, GuardError)}.get(done.returncode, XdpmondError)
    raise kind(message.removeprefix("xdpmond: "), hint=hint)
