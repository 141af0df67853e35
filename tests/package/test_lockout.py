"""The guard, with a real sshd: nobody cuts off the connection that they came in by, whichever way they ask."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .machine import ADDRESS, ATTACKER, PERMITTED, UNLISTED, Machine, wait_for

MANAGER = ("org.xdpmond1", "/org/xdpmond1", "org.xdpmond1.Manager")


class Session:
    """An SSH login of `admin` from one source address, kept open; commands run inside it, in a shell."""

    def __init__(self, machine: Machine, key: Path, source: str):
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes")
        command = ["ip", "netns", "exec", machine.wire.name, "ssh", "-T", "-b", source, "-i", str(key)]
        command += [f"-o{option}" for option in options] + [f"admin@{ADDRESS[6 if ':' in source else 4]}", "sh"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, command: str) -> tuple[int, str]:
        """Exit status and what was printed."""
        assert self._process.stdout
        self.send(f'{command} 2>&1; echo "--done $?"')
        printed = ""
        for line in self._process.stdout:
            if line.startswith("--done "):
                return int(line.split()[1]), printed
            printed += line
        raise AssertionError(f"the SSH connection ended: {printed}")

    def send(self, command: str) -> None:
        """Start a command whose answer nobody waits for."""
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def key(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ssh") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    machine.write("/home/admin/.ssh/authorized_keys", path.with_suffix(".pub").read_text())
    machine.run("chown", "-R", "admin:admin", "/home/admin/.ssh")
    machine.ctl("mode", "enforce")
    return path


@pytest.fixture(params=[PERMITTED[4], UNLISTED[6]], ids=["permitted-ipv4", "unlisted-ipv6"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def session(machine: Machine, key: Path, source: str) -> Iterator[Session]:
    login = Session(machine, key, source)
    try:
        yield login
    finally:
        login.close()


def wide(source: str) -> str:
    return "2001:db8:1::/48" if ":" in source else "10.77.0.0/24"


def test_under_sudo_a_deny_of_ones_own_address_is_refused(session: Session, machine: Machine, source: str) -> None:
    assert session.run("env | grep -c SSH_CONNECTION")[1] == "1\n"
    assert session.run("sudo env | grep -c SSH_CONNECTION")[1] == "0\n", "sudo hands the variable on here, so this would prove nothing"
    for prefix in (source, wide(source)):
        status, printed = session.run(f"sudo xdpmonctl deny {prefix}")
        assert status == 7, printed
        assert source in printed and "--force" in printed
    assert session.run("echo still here") == (0, "still here\n")
    assert wide(source) not in machine.entries()


def test_other_clients_are_refused_too(session: Session, machine: Machine, source: str) -> None:
    status, printed = session.run(f"sudo busctl call {' '.join(MANAGER)} Deny 'asa{{sv}}' 1 {wide(source)} 0")
    assert status != 0
    assert source in printed
    status, _ = session.run(f"echo {wide(source)} | sudo xdpmonctl deny --from-file -")
    assert status == 7
    assert session.run("echo still here") == (0, "still here\n")


def test_a_stranger_is_denied_without_ado(session: Session, machine: Machine) -> None:
    assert session.run(f"sudo xdpmonctl deny {ATTACKER[4]}")[0] == 0
    assert machine.wire.ping(ATTACKER[4]) == 0
    assert session.run(f"sudo xdpmonctl remove {ATTACKER[4]}")[0] == 0


def test_removing_the_exception_that_lets_one_in_is_refused(session: Session, machine: Machine, source: str) -> None:
    machine.ctl("allow", source)
    machine.ctl("deny", wide(source))
    status, printed = session.run(f"sudo xdpmonctl remove {source}")
    assert status == 7, printed
    assert session.run("echo still here") == (0, "still here\n")
    machine.ctl("remove", wide(source))
    machine.ctl("remove", source)


def test_a_mode_that_would_cut_one_off_is_refused(session: Session, machine: Machine, source: str) -> None:
    machine.ctl("mode", "monitor")
    machine.ctl("deny", wide(source))
    status, printed = session.run("sudo xdpmonctl mode enforce")
    assert status == 7, printed
    assert machine.status()["mode"] == "monitor"
    machine.ctl("remove", wide(source))
    assert session.run("sudo xdpmonctl mode enforce")[0] == 0


def test_a_configuration_that_would_cut_one_off_is_refused(session: Session, machine: Machine, source: str) -> None:
    dropin = "/etc/xdpmond/xdpmond.toml.d/cut.toml"
    machine.write(dropin, f'deny = ["{wide(source)}"]\n')
    status, printed = session.run("sudo systemctl reload xdpmond")
    assert status != 0, printed
    assert session.run("echo still here") == (0, "still here\n")
    assert wide(source) not in machine.entries()
    machine.run("rm", dropin)
    machine.run("systemctl", "reload", "xdpmond")


def test_with_force_it_is_done(session: Session, machine: Machine, source: str) -> None:
    session.send(f"sudo xdpmonctl deny --force {source}")
    wait_for("the entry", lambda: any(entry["verdict"] == "deny" and entry["origin"] == "operator" for entry in machine.entries().values()))
    assert machine.wire.ping(source) == 0
    machine.ctl("remove", source)
    assert machine.wire.ping(source) == 1
