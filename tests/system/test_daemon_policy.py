"""Changes of the policy by the real client, and what the daemon makes of them: all or none, kept, guarded."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from busfixture import MANAGER, NAME, PATH
from conftest import CONFIG, DENIED4, PERMITTED4, PERMITTED6, UNLISTED4, UNLISTED6, Ends, Start, World

from tests.lab import NOBODY, wait_for
from xdpmond.state import OperatorStore


def prefixes(world: World) -> list[str]:
    return [row["prefix"] for row in world.lab.rows("list") if row["origin"] == "operator"]


def test_several_prefixes_are_taken_all_or_none(world: World, start: Start, tmp_path: Path) -> None:
    start()
    ctl = world.lab.ctl
    refused = ctl("deny", "192.0.2.0/24", "192.0.2.1/24", "198.51.100.9", status=6)
    assert "host bits" in refused.stderr and "192.0.2.0/24" in refused.stderr
    assert prefixes(world) == []
    listed = tmp_path / "blocked"
    listed.write_text("192.0.2.7\n2001:db8:7::/48 # a network\n\n10.1\n")
    refused = ctl("deny", "--from-file", str(listed), status=6)
    assert "line 4" in refused.stderr and "10.1.0.0/16" in refused.stderr
    assert prefixes(world) == []
    listed.write_text("# none of these\n192.0.2.7\n2001:db8:7::/48 # a network\n198.51.100.128/25\n")
    assert world.lab.json("deny", "--from-file", str(listed), "--reason", "from a feed")["applied"] == 3
    assert prefixes(world) == ["192.0.2.7/32", "198.51.100.128/25", "2001:db8:7::/48"]
    assert world.entry("192.0.2.7/32")["reason"] == "from a feed"
    refused = ctl("remove", "192.0.2.7", "192.0.2.8", status=5)
    assert "192.0.2.8" in refused.stderr
    assert len(prefixes(world)) == 3
    ctl("allow", "--from-file", "-", input="192.0.2.7\n")  # standard input; a repeated prefix replaces
    assert world.entry("192.0.2.7/32")["verdict"] == "allow"
    assert world.entry("192.0.2.7/32")["reason"] == ""
    ctl("remove", "192.0.2.7", "198.51.100.128/25", "2001:db8:7::/48")
    assert prefixes(world) == []


def test_entries_and_mode_survive_a_restart(world: World, start: Start, tmp_path: Path) -> None:
    state = ["--state", str(tmp_path / "policy.log")]
    daemon = start(CONFIG, *state)
    ctl = world.lab.ctl
    ctl("deny", UNLISTED4.net, "--reason", 'it said "hello"')
    ends = world.lab.json("deny", UNLISTED6.net, "--for", "1h")["applied"][0]["expires"]
    ctl("deny", "192.0.2.1", "--for", "2s")
    over = time.time() + 2
    ctl("allow", DENIED4.net)  # over the file's deny of the network
    ctl("mode", "enforce")
    before = world.lab.rows("list")
    assert daemon.stop() == 0
    wait_for(lambda: time.time() > over, "the time of one entry to pass")

    daemon = start(CONFIG, *state)
    after = world.lab.rows("list")
    keys = ("prefix", "verdict", "origin", "source", "reason", "created", "expires", "effective")
    assert [[row[key] for key in keys] for row in after] == [
        [row[key] for key in keys] for row in before if row["prefix"] != "192.0.2.1/32"
    ]
    assert world.entry(f"{UNLISTED6.net}/128")["expires"] == pytest.approx(ends, abs=0.01)
    status = world.lab.status()
    assert (status["mode"], status["file_mode"], status["mode_source"]) == ("enforce", "monitor", "operator")
    assert world.drops(UNLISTED4, UNLISTED6)
    assert world.passes(DENIED4, PERMITTED4)
    ctl("mode", "default")
    ctl("remove", UNLISTED4.net)
    daemon.stop(signal.SIGKILL)  # what was answered is on disk

    start(CONFIG, *state)
    status = world.lab.status()
    assert (status["mode"], status["mode_source"]) == ("monitor", "file")
    assert f"{UNLISTED4.net}/32" not in prefixes(world)


def test_a_damaged_state_file_is_put_aside(world: World, start: Start, tmp_path: Path) -> None:
    state = tmp_path / "policy.log"
    daemon = start(CONFIG, "--state", str(state))
    for number in range(3):
        world.lab.ctl("deny", f"192.0.2.{number}")
    daemon.stop()
    content = bytearray(state.read_bytes())
    content[content.index(b"192.0.2.1")] ^= 1
    state.write_bytes(content)
    daemon = start(CONFIG, "--state", str(state))
    assert world.passes(PERMITTED4)
    assert f"{state} is not understood" in daemon.log
    assert state.with_name("policy.log.unreadable-1").read_bytes() == content
    assert prefixes(world) == ["192.0.2.0/32"]  # what was read before the damage
    world.lab.ctl("deny", "192.0.2.7")
    daemon.stop(signal.SIGKILL)
    start(CONFIG, "--state", str(state))
    assert prefixes(world) == ["192.0.2.0/32", "192.0.2.7/32"]


def test_a_state_that_cannot_be_written_is_said_to_the_caller(world: World, start: Start) -> None:
    start(CONFIG, "--enforce", "--state", "/proc/nothing/policy.log")
    said = world.lab.ctl("deny", UNLISTED4.net)
    assert "not kept" in said.stdout + said.stderr
    assert world.drops(UNLISTED4)  # it holds all the same


def test_what_the_kernel_cannot_hold_changes_nothing(world: World, start: Start, tmp_path: Path) -> None:
    start(CONFIG + "[tables]\nprefixes = 1024", "--enforce", "--state", str(tmp_path / "policy.log"))
    world.lab.ctl("deny", UNLISTED4.net)
    some, more = ("\n".join(f"100.{net}.{number >> 8}.{number & 255}" for number in range(600)) for net in (64, 65))
    assert world.lab.json("deny", "--from-file", "-", input=some)["applied"] == 600
    refused = world.lab.ctl("deny", "--from-file", "-", input=f"{more}\n{PERMITTED4.net}", status=1)
    assert refused.stderr
    assert len(prefixes(world)) == 601
    assert not any(str(entry.prefix).startswith("100.65") for entry in OperatorStore(tmp_path / "policy.log").load().policy.entries())
    assert world.passes(PERMITTED4) and world.drops(UNLISTED4, DENIED4)
    world.lab.ctl("deny", PERMITTED4.net)  # there is room for one
    assert world.drops(PERMITTED4)


def test_zero_length_prefixes_need_force(world: World, start: Start) -> None:
    start(CONFIG, "--enforce")
    for prefix in ("0.0.0.0/0", "::/0"):
        for verb in ("deny", "allow"):
            assert "--force" in world.lab.ctl(verb, prefix, status=7).stderr
    assert prefixes(world) == []
    world.lab.ctl("deny", "::/0", "--force")
    assert world.drops(UNLISTED6)
    assert world.passes(PERMITTED6, UNLISTED4)


def test_an_entry_of_a_file_is_not_removed(world: World, start: Start) -> None:
    daemon = start()
    refused = world.lab.ctl("remove", "203.0.113.0/24", status=7)
    assert f"{daemon.config}:4" in refused.stderr
    assert world.entry("203.0.113.0/24")["source"] == f"{daemon.config}:4"
    # Overridden and set free again, it is the file's once more.
    world.lab.ctl("allow", "203.0.113.0/24")
    assert world.entry("203.0.113.0/24")["verdict"] == "allow"
    said = world.lab.ctl("remove", "203.0.113.0/24")
    assert f"{daemon.config}:4" in said.stdout + said.stderr
    assert world.entry("203.0.113.0/24")["verdict"] == "deny"


def test_exit_statuses(world: World, start: Start) -> None:
    ctl = world.lab.ctl
    ctl("status", status=3)
    ctl("deny", "192.0.2.1", status=3)
    start(CONFIG, "--enforce")
    ctl("status")
    ctl("deny", "192.0.2.1")
    for usage in (
        ["frobnicate"],
        ["deny"],
        ["deny", "192.0.2.1", "--for", "10"],
        ["mode", "enforced"],
        ["top", "--by", "colour"],
        ["--json=x"],
    ):
        ctl(*usage, status=2)
    ctl("deny", "192.0.2.1", uid=NOBODY, status=4)
    ctl("remove", "192.0.2.2", status=5)
    ctl("mode", "enforce", "--interface", "eth7", status=5)
    ctl("confirm", status=5)
    for wrong in ("192.0.2.1/24", "localhost", "::ffff:192.0.2.1", "fe80::1%eth0", "010.0.0.1", "10.1", "1.2.3.4/255.255.255.0"):
        ctl("deny", wrong, status=6)
    ctl("explain", "192.0.2.0/24", status=6)
    ctl("deny", "0.0.0.0/0", status=7)
    ctl("remove", "203.0.113.0/24", status=7)


def test_anybody_may_look_and_only_root_may_change(world: World, start: Start) -> None:
    start()
    assert world.passes(UNLISTED4)
    for question in (["status"], ["list"], ["top"], ["explain", UNLISTED4.net], ["events"], ["mode"]):
        assert world.lab.ctl(*question, uid=NOBODY).stdout
    before = world.lab.rows("list"), world.lab.status()["mode"]
    for change in (["deny", "192.0.2.1"], ["allow", "192.0.2.1"], ["remove", "203.0.113.0/24"], ["mode", "enforce"], ["reload"],
                   ["deny", "--from-file", "/etc/hostname"], ["deny", "192.0.2.1", "--force"]):  # fmt: skip
        assert world.lab.ctl(*change, uid=NOBODY, status=4).stderr
    for method, signature, arguments in (("Deny", "asa{sv}", ["1", "192.0.2.1", "0"]), ("SetMode", "sa{sv}", ["enforce", "0"])):
        refused = world.lab.bus.call(method, signature, *arguments, uid=NOBODY)
        assert refused.returncode and refused.stderr
    assert (world.lab.rows("list"), world.lab.status()["mode"]) == before


def test_a_damaged_log_on_a_full_disk_loses_no_ban(world: World, start: Start, small_disk: Path) -> None:
    log, filler = small_disk / "policy.log", small_disk / "filler"
    daemon = start(CONFIG, "--state", str(log))
    world.lab.ctl("deny", UNLISTED4.net)
    world.lab.ctl("mode", "enforce")
    daemon.stop()
    log.write_bytes(log.read_bytes() + bytes(64))
    damaged = log.read_bytes()
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))
    for _ in range(2):
        daemon = start(CONFIG, "--state", str(log))
        daemon.wait_log("1 entries; what is left is not kept on disk: No space left on device")
        assert world.drops(UNLISTED4)
        assert log.read_bytes() == damaged
        assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "policy.log", "policy.log.unreadable-1"]
        daemon.stop()
    filler.unlink()
    for _ in range(2):
        daemon = start(CONFIG, "--state", str(log))
        assert world.drops(UNLISTED4)
        daemon.stop()
    assert "not understood" not in daemon.log
    assert (small_disk / "policy.log.unreadable-1").read_bytes() == damaged


# The guard


@pytest.fixture
def logged_in(request: pytest.FixtureRequest, world: World) -> Iterator[Ends]:
    """A TCP connection to the host's port 22. The server listens on :: for both families, as sshd does."""
    ends: Ends = getattr(request, "param", UNLISTED4)
    with world.host.listen("::", 22) as listener, world.net.connect(ends.net, ends.host, 22):
        accepted, _ = listener.accept()
        with accepted:
            yield ends


def network(ends: Ends) -> str:
    return ends.net.rpartition("2")[0] + ("0/24" if ends.length == 24 else "/64")


@pytest.mark.parametrize("logged_in", [UNLISTED4, PERMITTED6], ids=["ipv4", "ipv6"], indirect=True)
def test_a_connected_peer_is_not_locked_out(world: World, start: Start, logged_in: Ends) -> None:
    start('interface = "eth0"', "--enforce")
    ctl, net = world.lab.ctl, network(logged_in)
    refused = ctl("deny", net, status=7)
    assert logged_in.net in refused.stderr and "--force" in refused.stderr
    ctl("deny", "192.0.2.0/24", logged_in.net, status=7)
    assert prefixes(world) == []
    ctl("deny", "--from-file", "-", input=f"192.0.2.1\n{net}\n", status=7)
    assert prefixes(world) == []
    ctl("allow", logged_in.net)
    ctl("deny", net)  # the allow inside it keeps the peer in
    assert world.passes(logged_in)
    ctl("remove", logged_in.net, status=7)
    ctl("deny", logged_in.net, status=7)
    assert world.passes(logged_in)
    ctl("deny", logged_in.net, "--force")
    assert world.drops(logged_in)


def test_other_clients_meet_the_same_guard(world: World, start: Start, logged_in: Ends) -> None:
    start('interface = "eth0"', "--enforce")
    net = network(logged_in)
    refused = world.lab.bus.call("Deny", "asa{sv}", "1", net, "0")
    assert refused.returncode and logged_in.net in refused.stderr
    gdbus = ["gdbus", "call", "--system", "-d", NAME, "-o", PATH, "-m", f"{MANAGER}.Deny", f"['{net}']", "{}"]
    refused = world.lab.bus.run(gdbus)
    assert refused.returncode and "LocksYouOut" in refused.stderr
    assert prefixes(world) == []
    assert world.passes(logged_in)


def test_enforce_is_refused_when_it_would_lock_out(world: World, start: Start, logged_in: Ends) -> None:
    daemon = start('interface = "eth0"')
    ctl = world.lab.ctl
    ctl("deny", logged_in.net)  # nothing is dropped in monitor mode
    refused = ctl("mode", "enforce", status=7)
    assert logged_in.net in refused.stderr
    ctl("mode", "enforce", "--interface", "eth0", status=7)
    ctl("mode", "enforce", "--confirm", "60s", status=7)
    assert world.lab.status()["mode"] == "monitor"
    assert world.lab.interface("eth0")["mode"] == "monitor"
    daemon.config.write_text('interface = "eth0"\nmode = "enforce"\n')
    assert logged_in.net in ctl("reload", status=7).stderr
    assert world.lab.status()["file_mode"] == "monitor"
    assert world.passes(logged_in)
    ctl("mode", "enforce", "--force")
    assert world.drops(logged_in)


def test_a_reload_that_locks_out_is_refused(world: World, start: Start, logged_in: Ends) -> None:
    daemon = start('interface = "eth0"', "--enforce")
    daemon.config.write_text(f'interface = "eth0"\ndeny = ["192.0.2.0/24", "{network(logged_in)}"]\n')
    refused = world.lab.ctl("reload", status=7)
    assert logged_in.net in refused.stderr and f"{daemon.config}:2" in refused.stderr and "reload --force" in refused.stderr
    assert world.lab.rows("list") == []
    assert world.passes(logged_in)
    assert world.lab.status()["last_reload"]["ok"] is False
    daemon.process.send_signal(signal.SIGHUP)  # which nobody can force
    daemon.wait_log("the configuration is refused", count=2)
    assert world.lab.rows("list") == []
    assert world.lab.json("reload", "--force")["changed"] == 2
    assert world.drops(logged_in)


def test_the_client_names_its_ssh_peer(world: World, start: Start) -> None:
    """A connection that the daemon cannot see (through a jump host's namespace, say) is known by SSH_CONNECTION."""
    start('interface = "eth0"', "--enforce")
    over_ssh = {"SSH_CONNECTION": f"{UNLISTED4.net} 50000 {UNLISTED4.host} 22"}
    world.lab.ctl("deny", UNLISTED4.net, status=7, environment=over_ssh)
    world.lab.ctl("deny", UNLISTED4.net)


def test_a_mode_to_be_confirmed_goes_back(world: World, start: Start) -> None:
    start()
    ctl = world.lab.ctl
    for seconds in (2, 4, 8, 16):  # on a slow machine the shortest may be over before anybody has looked
        ctl("mode", "enforce", "--confirm", f"{seconds}s")
        held, waiting = world.drops(DENIED4), world.lab.status()["confirm"]
        if waiting is not None:
            break
    assert held and waiting["mode"] == "monitor"
    wait_for(lambda: world.lab.status()["mode"] == "monitor", "the mode to go back")
    assert world.passes(DENIED4)
    for seconds in (2, 4, 8, 16):
        ctl("mode", "enforce", "--confirm", f"{seconds}s")
        if ctl("confirm", status=None).returncode == 0:
            break
    assert world.lab.status()["confirm"] is None
    later = world.lab.status()["uptime_seconds"] + seconds + 0.5
    wait_for(lambda: world.lab.status()["uptime_seconds"] > later, "the time to confirm to pass")
    assert world.lab.status()["mode"] == "enforce"


def test_enforce_by_default_needs_force(world: World, start: Start) -> None:
    daemon = start('interface = "eth0"\ndefault = "deny"\nallow = ["10.0.0.0/24"]')
    refused = world.lab.ctl("mode", "enforce", status=7)
    assert "--force" in refused.stderr and "answers" in refused.stderr
    assert world.passes(UNLISTED4)
    daemon.config.write_text('mode = "enforce"\n' + daemon.config.read_text())
    assert "force" in world.lab.ctl("reload", status=7).stderr
    said = world.lab.ctl("mode", "enforce", "--force")
    assert "answers" in said.stdout + said.stderr
    assert world.drops(UNLISTED4)
    assert world.passes(PERMITTED4)


def test_json_documents_are_json(world: World, start: Start) -> None:
    start()
    assert world.passes(UNLISTED4, UNLISTED6)
    for command in (["status"], ["list"], ["top"], ["explain", UNLISTED4.net], ["mode"], ["deny", "192.0.2.1"], ["reload"]):
        for form in ("short", "pretty"):
            json.loads(world.lab.ctl(f"--json={form}", *command).stdout)
    for line in world.lab.ctl("--json=short", "events").stdout.splitlines():
        json.loads(line)


def test_a_list_that_the_configuration_names(world: World, start: Start, tmp_path: Path) -> None:
    listed = tmp_path / "blocked"
    listed.write_text(f"# a feed\n{UNLISTED4.net}\n{UNLISTED6.net}\n" + "".join(f"100.64.{n >> 8}.{n & 255}\n" for n in range(5000)))
    start(f'deny_files = ["{listed}"]\n{CONFIG}', "--enforce", "--state", str(tmp_path / "policy.log"))
    assert world.drops(UNLISTED4, UNLISTED6)
    assert world.passes(PERMITTED4)
    assert world.entry(f"{UNLISTED4.net}/32")["source"] == f"{listed}:2"
    assert f"stands in {listed}:3" in world.lab.ctl("remove", UNLISTED6.net, status=7).stderr
    listed.write_text(f"{UNLISTED6.net}\n10.1\n")
    assert f"{listed}:2: '10.1' is not an IP prefix" in world.lab.ctl("reload", status=6).stderr
    assert world.drops(UNLISTED4)
    listed.write_text(f"{UNLISTED6.net}\n")
    assert world.lab.json("reload")["changed"] == 5001
    assert world.passes(UNLISTED4) and world.drops(UNLISTED6)
