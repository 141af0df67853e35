"""Each shell, really completing, offers exactly the commands and options that the parser knows."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xdpmond.cli.parser import COMMANDS, build_parser, subparsers

COMPLETIONS = Path(__file__).resolve().parents[2] / "completions"
NAMES = {command.name for command in COMMANDS}
OPTIONS = {name: set(child.options()) for name, child in subparsers(build_parser()).items()}
TOP_OPTIONS = set(build_parser().options())
VALUES = {
    ("--json",): {"short", "pretty", "off"}, ("list", "--color"): {"auto", "always", "never"}, ("top", "--by"): {"bytes", "packets", "syn"},
    ("mode",): {"monitor", "enforce", "default"}, ("flows", "--by"): {"bytes", "packets"},
    ("ports", "--proto"): {"tcp", "udp", "icmp", "icmpv6", "sctp"},
}  # fmt: skip


Completer = Callable[..., set[str]]


def bash(*words: str) -> set[str]:
    """What bash offers for the last of the words."""
    program = (
        f'source {COMPLETIONS}/xdpmonctl.bash; compopt() {{ :; }}; COMP_WORDS=(xdpmonctl "$@"); COMP_CWORD=$#;'
        "spec=$(complete -p xdpmonctl); [[ $spec == *'-F _xdpmonctl '* ]] || exit 9; _xdpmonctl; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "--norc", "-u", "-c", program, "bash", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def fish(*words: str) -> set[str]:
    line = " ".join(["xdpmonctl", *words])
    program = f"source {COMPLETIONS}/xdpmonctl.fish; complete -C '{line}'"
    home = "/dev/null/none"  # not even root can make it
    environ = {"PATH": os.environ["PATH"], "HOME": home, "XDG_CONFIG_HOME": home, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["fish", "--no-config", "-c", program], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    return {row.split("\t")[0] for row in done.stdout.splitlines()}


ZSH_SETUP = r"""
PS1= PS2= RPS1= ; unsetopt zle_bracketed_paste prompt_cr prompt_sp beep
fpath=({directory} $fpath); autoload -Uz compinit; compinit -u -D -d {directory}/none
compadd() {{
    if [[ " $* " == *" -"[OAD]" "* ]]; then builtin compadd "$@"; return; fi
    local -a found; builtin compadd -O found "$@"; print -rl -- $found >>{output}
    builtin compadd "$@"
}}
finish() {{ zle complete-word; print -r END >>{output}; zle kill-whole-line }}
zle -N finish; bindkey '^I' finish; zstyle ':completion:*' verbose no; zstyle ':completion:*' list-prompt ''
print -r READY >{output}
"""


class Zsh:
    """An interactive zsh on a terminal of its own, whose completions land in a file."""

    def __init__(self, directory: Path) -> None:
        self._output = directory / "output"
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            environ = {"PATH": os.environ["PATH"], "HOME": str(directory), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
            os.execvpe("zsh", ["zsh", "-f", "-i"], environ)
        (directory / "_xdpmonctl").write_text((COMPLETIONS / "_xdpmonctl").read_text())
        (directory / "setup").write_text(ZSH_SETUP.format(directory=directory, output=self._output))
        self._send(f"source {directory}/setup\n", "READY\n")

    def __call__(self, *words: str) -> set[str]:
        self._output.write_text("")
        text = self._send(" ".join(["xdpmonctl", *words]) + "\t", "END\n")
        return set(text.split()) - {"END"}

    def _send(self, keys: str, mark: str) -> str:
        os.write(self._terminal, keys.encode())
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.02)[0]:
                os.read(self._terminal, 65536)
            text = self._output.read_text() if self._output.exists() else ""
            if text.endswith(mark):
                return text
        raise AssertionError(f"zsh does not answer to {keys!r}")

    def close(self) -> None:
        os.close(self._terminal)
        os.waitpid(self._child, 0)


@pytest.fixture(scope="module")
def zsh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zsh]:
    shell = Zsh(tmp_path_factory.mktemp("zsh"))
    yield shell
    shell.close()


@pytest.fixture(params=["bash", "fish", "zsh"])
def complete(request: pytest.FixtureRequest) -> Completer:
    if request.param == "zsh":
        found: Completer = request.getfixturevalue("zsh")
        return found
    return {"bash": bash, "fish": fish}[request.param]


def test_commands(complete: Completer) -> None:
    assert complete("") == NAMES
    assert complete("che") == {"check-config"}
    assert complete("--no-legend", "--json", "short", "st") == {"status"}


@pytest.mark.parametrize("command", sorted(NAMES))
def test_options_of(command: str, complete: Completer) -> None:
    long = {option for option in OPTIONS[command] if option.startswith("--")}
    assert {option.rstrip("=") for option in complete(command, "--")} == long


def test_top_options(complete: Completer) -> None:
    assert {option.rstrip("=") for option in complete("--")} == {option for option in TOP_OPTIONS if option.startswith("--")}


@pytest.mark.parametrize("words", sorted(VALUES))
def test_values(words: tuple[str, ...], complete: Completer) -> None:
    assert complete(*words, "") == VALUES[words]


def test_bash_short_options_and_joined_values() -> None:
    for command, options in OPTIONS.items():
        assert bash(command, "-") == options
    assert bash("list", "--json", "=", "pr") == {"pretty"}
    assert bash("--json", "=", "short", "mode", "e") == {"enforce"}
