"""The bus server with a real polkitd on the private bus, and a daemon that is not root, as on a system.

polkitd finds our actions file and the user `xdpmond` in a mount namespace of its own; the machine's files stay as they are.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from busfixture import MANAGER, NAME, NOBODY, PATH, ROOT, FakeDaemon, PrivateBus, end, private_bus, read_line, wait_for

POLKIT = "org.freedesktop.PolicyKit1"
DAEMON_UID = 64990
DAEMON_USER = 1
"""The user `daemon`, whom the test's rule keeps from reading."""

RULES = """
polkit.addRule(function (action, subject) {
    if (action.id == "org.xdpmond1.reload" && subject.user == "nobody") return polkit.Result.YES;
    if (action.id == "org.xdpmond1.read" && subject.user == "daemon") return polkit.Result.NO;
});
"""
CALLER = """
import asyncio, sys
from dbus_next import Message, MessageFlag
from dbus_next.aio import MessageBus
async def main():
    bus = await MessageBus(bus_address=sys.argv[1]).connect()
    for line in sys.stdin:
        reply = await bus.call(Message(destination="org.xdpmond1", path="/org/xdpmond1", interface="org.xdpmond1.Manager", member="Deny",
                                       signature="asa{sv}", body=[["192.0.2.0/24"], {}],
                                       flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if line == "ask\\n" else MessageFlag.NONE))
        print(reply.error_name or "done", flush=True)
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("polkit")
    passwd = Path("/etc/passwd").read_text()
    (made / "passwd").write_text(f"{passwd}xdpmond:x:{DAEMON_UID}:{DAEMON_UID}::/nonexistent:/usr/sbin/nologin\n")
    for name in ("actions", "rules"):
        (made / name).mkdir()
        (made / name).chmod(0o755)
    (made / "actions/org.xdpmond1.policy").write_text((ROOT / "dbus/org.xdpmond1.policy").read_text())
    (made / "rules/10-test.rules").write_text(RULES)
    for path in made.rglob("*.*"):
        path.chmod(0o644)
    (made / "passwd").chmod(0o644)
    return made


@pytest.fixture
def bus(files: Path) -> Iterator[PrivateBus]:
    mounts = (
        f"mount --bind {files}/passwd /etc/passwd\n"
        f"mount --bind {files}/actions /usr/share/polkit-1/actions\n"
        f"mount --bind {files}/rules /etc/polkit-1/rules.d"
    )
    policies = (ROOT / "dbus/org.xdpmond1.conf", Path("/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf"))
    with private_bus(policies=policies, mounts=mounts) as made:
        yield made


@pytest.fixture
def polkitd(bus: PrivateBus) -> subprocess.Popen[str]:
    process = bus.spawn(["/usr/lib/polkit-1/polkitd", "--no-debug"], log="polkit.log")
    wait_for(lambda: bus.owned(POLKIT), "polkitd to take its name")
    return process


@pytest.fixture
def daemon(bus: PrivateBus, polkitd: subprocess.Popen[str]) -> FakeDaemon:
    made = FakeDaemon(bus, uid=DAEMON_UID)
    made.wait_line("ready")
    assert bus.owned(NAME), made.log()
    return made


def gdbus(bus: PrivateBus, method: str, *arguments: str, uid: int) -> str:
    result = bus.run(["gdbus", "call", "--system", "--dest", NAME, "--object-path", PATH, "--method", f"{MANAGER}.{method}", *arguments],
                     uid=uid)  # fmt: skip
    return result.stdout if result.returncode == 0 else result.stderr


def test_polkit_decides_for_everybody_but_root(bus: PrivateBus, daemon: FakeDaemon) -> None:
    refused = "Error.NotAuthorized"
    assert '"version"' in gdbus(bus, "Describe", uid=NOBODY)
    assert '"reloaded":true' in gdbus(bus, "Reload", "{}", uid=NOBODY)
    for method, arguments in (("Deny", ["['192.0.2.0/24']", "{}"]), ("SetMode", ["enforce", "{}"])):
        answer = gdbus(bus, method, *arguments, uid=NOBODY)
        assert refused in answer and "password" in answer
    assert refused in gdbus(bus, "Describe", uid=DAEMON_USER)
    assert refused in gdbus(bus, "List", "{}", uid=DAEMON_USER)
    assert '"deny"' in gdbus(bus, "Deny", "['192.0.2.0/24']", "{}", uid=0)


def test_root_does_not_wait_for_a_polkit_that_hangs(bus: PrivateBus, daemon: FakeDaemon, polkitd: subprocess.Popen[str]) -> None:
    polkitd.send_signal(signal.SIGSTOP)
    try:
        assert '"deny"' in gdbus(bus, "Deny", "['192.0.2.0/24']", "{}", uid=0)
    finally:
        polkitd.send_signal(signal.SIGCONT)


def test_polkit_that_goes_away_leaves_the_rule_for_its_absence(bus: PrivateBus, daemon: FakeDaemon, polkitd: subprocess.Popen[str]) -> None:
    end(polkitd)
    wait_for(lambda: not bus.owned(POLKIT), "polkitd to be gone")
    assert "polkit is not running" in gdbus(bus, "Reload", "{}", uid=NOBODY)
    assert '"version"' in gdbus(bus, "Describe", uid=NOBODY)


class Conversation:
    """A caller of user nobody with an agent of its own."""

    def __init__(self, bus: PrivateBus):
        self.bus = bus
        self.caller = bus.spawn([sys.executable, "-c", CALLER, bus.address], uid=NOBODY, log="caller.log")
        self.agent = bus.spawn([sys.executable, str(Path(__file__).parent / "fakeagent.py"), bus.address, str(self.caller.pid)],
                               uid=NOBODY, log="agent.log")  # fmt: skip
        assert self.told()["registered"] is True

    def told(self) -> dict[str, Any]:
        line = read_line(self.agent)
        assert line, self.bus.log("agent.log")
        return json.loads(line)

    def say(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def call(self, how: str) -> None:
        self.say(self.caller, how)

    def answer(self) -> str:
        return read_line(self.caller)

    def authenticated_as_root(self, cookie: str) -> None:
        """What polkit's helper says when the password was right; only root can say it."""
        identity = ("unix-user", "1", "uid", "u", "0")
        said = self.bus.busctl("call", POLKIT, "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority",
                               "AuthenticationAgentResponse2", "us(sa{sv})", str(NOBODY), cookie, *identity)  # fmt: skip
        assert said.returncode == 0, said.stderr


def test_a_password_is_asked_for_only_if_the_call_allows_it(bus: PrivateBus, daemon: FakeDaemon) -> None:
    talk = Conversation(bus)
    talk.call("do not ask")
    assert talk.answer() == "org.xdpmond1.Error.NotAuthorized"
    talk.call("ask")
    asked = talk.told()  # the first thing that the agent hears: the call before this one did not reach it
    assert asked["begin"] == "org.xdpmond1.manage-policy"
    assert bus.call("Describe").returncode == 0  # the daemon does not wait with us
    talk.authenticated_as_root(asked["cookie"])
    talk.say(talk.agent, "close the dialogue")
    assert talk.answer() == "done"


def test_a_dismissed_dialogue_is_a_refusal(bus: PrivateBus, daemon: FakeDaemon) -> None:
    talk = Conversation(bus)
    talk.call("ask")
    talk.told()
    talk.say(talk.agent, "close the dialogue")
    assert talk.answer() == "org.xdpmond1.Error.NotAuthorized"


def test_the_dialogue_goes_away_with_the_caller(bus: PrivateBus, daemon: FakeDaemon) -> None:
    before = daemon.descriptors()
    talk = Conversation(bus)
    talk.call("ask")
    cookie = talk.told()["cookie"]
    end(talk.caller)
    assert talk.told() == {"cancel": cookie}
    assert daemon.descriptors() == before
    assert "Traceback" not in daemon.log()
    assert json.loads(json.loads(bus.call("Describe", json=True).stdout)["data"][0])["caller"] is None
