"""The use-cases, with everything around them written by hand: what holds after a change, and after one that was refused half-way."""

import asyncio
import json
import os
from dataclasses import replace

import pytest
from eventfakes import numbered
from servicefakes import ROOT, START, World, advance, entry, file_entry, kernel_refuses, rows, run

from xdpmond.config import Config, Interface, Tables
from xdpmond.errors import (
    ConfigError,
    FileEntryError,
    GuardError,
    KernelError,
    LockOutError,
    NoSuchEntryError,
    PrefixError,
    UsageError,
    XdpmondError,
)
from xdpmond.interfaces import InterfaceState
from xdpmond.messages import Message
from xdpmond.model import Count, Mode, Origin, Prefix, RuleCount, RuleCounts, Verdict
from xdpmond.policy import Policy
from xdpmond.rows import NO_ROWS
from xdpmond.state import State
from xdpmond.windows import Progress, Totals, Window

ALLOW, DENY = Verdict.ALLOW, Verdict.DENY


def cancelled(task):
    """End a task of the service's, which ends by cancellation alone."""
    task.cancel()
    return asyncio.gather(task, return_exceptions=True)


def running(world):
    return asyncio.create_task(world.service.run())


def kept(*entries):
    return State(Policy(entries))


# Changes of the policy


def test_a_deny_is_in_the_kernel_and_on_disk_and_told():
    async def work():
        world = World()
        done = await world.deny("192.0.2.0/24", "2001:db8::1", seconds=600, reason=" scans ")
        assert world.verdicts() == world.kept() == {"192.0.2.0/24": "deny", "2001:db8::1/128": "deny"}
        assert done["applied"] == [
            {"prefix": prefix, "verdict": "deny", "expires": START + 600, "reason": "scans", "origin": "operator", "replaced": False}
            for prefix in ("192.0.2.0/24", "2001:db8::1/128")
        ]
        assert done["mode"] == "monitor"
        assert any("monitor mode" in note for note in done["notes"])
        (told,) = world.signals("PolicyChanged")
        assert (told["change"], told["prefixes"], told["uid"]) == ("deny", ["192.0.2.0/24", "2001:db8::1/128"], 0)
        (record,) = world.reports(Message.POLICY_CHANGED)
        assert record.fields["caller_uid"] == 0
        json.dumps(done, allow_nan=False)

    run(work)


def test_a_repeated_one_replaces_verdict_reason_and_expiry():
    async def work():
        world = World()
        await world.deny("192.0.2.1", seconds=60, reason="first")
        world.now += 5
        done = await world.allow("192.0.2.1")
        assert done["applied"][0] | {"replaced": True, "expires": None, "reason": "", "verdict": "allow"} == done["applied"][0]
        (kept,) = world.store.saved.policy.entries()
        assert (kept.verdict, kept.expires, kept.reason, kept.created) == (ALLOW, None, "", START + 5)
        assert world.service.policy.next_expiry() is None

    run(work)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prefixes": []}, UsageError),
        ({"prefixes": ["192.0.2.1", "192.0.2.1/24"]}, PrefixError),
        ({"prefixes": ["0.0.0.0/0"]}, GuardError),
        ({"prefixes": ["::/0"]}, GuardError),
        ({"prefixes": ["192.0.2.1"], "seconds": 0.5}, UsageError),
        ({"prefixes": ["192.0.2.1"], "seconds": float("nan")}, UsageError),
        ({"prefixes": ["192.0.2.1"], "seconds": float("inf")}, UsageError),
        ({"prefixes": ["192.0.2.1"], "reason": "two\nlines"}, UsageError),
    ],
)
def test_what_is_malformed_changes_nothing(arguments, error):
    async def work():
        world = World()
        await world.deny("198.51.100.1")
        before = world.snapshot()
        with pytest.raises(error):
            await world.deny(*arguments.pop("prefixes"), **arguments)
        assert world.snapshot() == before

    run(work)


def test_log_is_no_verdict_for_an_entry():
    async def work():
        world = World()
        with pytest.raises(UsageError):
            await world.service.change(Verdict.LOG, ["192.0.2.1"], caller=ROOT)

    run(work)


def test_everything_may_be_denied_by_force():
    async def work():
        world = World()
        await world.deny("0.0.0.0/0", force=True)
        assert world.verdicts() == {"0.0.0.0/0": "deny"}

    run(work)


@pytest.mark.parametrize("call", ["everything", "file entry"])
def test_what_a_guard_refuses_stands_in_the_journal(call):
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24"),)))
        with pytest.raises((GuardError, FileEntryError)):
            await (world.deny("::/0") if call == "everything" else world.service.remove(["203.0.113.0/24"], caller=ROOT))
        (record,) = world.reports(Message.CHANGE_REFUSED)
        assert (record.fields["caller_uid"], record.fields["caller"]) == (0, ":1.7")

    run(work)


def test_a_kernel_that_refuses_leaves_all_as_it_was():
    async def work():
        world = World(Config(allow=(file_entry("10.0.0.0/8", ALLOW),)))
        await world.service.begin()
        await world.deny("192.0.2.1")
        before, told = world.snapshot(), len(world.told)
        for change in (
            lambda: world.deny("192.0.2.2", "192.0.2.3"),
            lambda: world.allow("192.0.2.1"),
            lambda: world.service.remove(["192.0.2.1"], caller=ROOT),
        ):
            world.kernel.refuse["apply_policy"] = kernel_refuses()
            with pytest.raises(KernelError):
                await change()
            assert world.snapshot() == before
            assert len(world.told) == told
        await world.deny("192.0.2.2")  # and nothing of it stands in the way later
        assert world.verdicts() == {"10.0.0.0/8": "allow", "192.0.2.1/32": "deny", "192.0.2.2/32": "deny"}

    run(work)


def test_a_full_disk_does_not_stop_a_deny_but_is_said():
    async def work():
        world = World()
        world.store.full = True
        done = await world.deny("192.0.2.1")
        assert world.verdicts() == {"192.0.2.1/32": "deny"}
        assert any("not kept on disk" in note and "No space" in note for note in done["notes"])
        assert world.reports(Message.STATE_PROBLEM)
        world.store.full = False
        await world.deny("192.0.2.2")  # the next change keeps both
        assert world.kept() == {"192.0.2.1/32": "deny", "192.0.2.2/32": "deny"}

    run(work)


def test_no_more_entries_than_there_may_be():
    async def work():
        tables = Tables(prefixes=3)
        world = World(Config(tables=tables), kept(*(entry(f"192.0.2.{number}") for number in range(4))))
        await world.service.begin()  # a smaller limit does not keep the daemon from its work
        await world.service.remove(["192.0.2.1"], caller=ROOT)
        await world.allow("192.0.2.2")
        before = world.snapshot()
        with pytest.raises(XdpmondError, match=r"would hold 4 entries, and tables\.prefixes is 3"):
            await world.deny("192.0.2.9")
        world.files = Config(tables=tables, deny=(file_entry("203.0.113.0/24"),))
        with pytest.raises(XdpmondError, match="would hold 4 entries"):
            await world.service.reload(caller=ROOT)
        assert world.snapshot() == before

    run(work)


def test_few_changes_are_named_to_the_kernel_and_many_are_not(tmp_path):
    async def work():
        world = World()
        await world.service.begin()
        await world.deny("192.0.2.1", "192.0.2.2")
        await world.deny("192.0.2.1")  # the same verdict: nothing to do
        fd = written(tmp_path / "list", b"".join(b"10.0.%d.%d\n" % (n >> 8, n & 255) for n in range(3000)))
        await world.service.change_from_file(ALLOW, fd, caller=ROOT)
        os.close(fd)
        assert world.kernel.touched == [None, [Prefix.parse("192.0.2.1"), Prefix.parse("192.0.2.2")], None]
        assert len(world.verdicts()) == 3002

    run(work)


@pytest.mark.parametrize("full", [False, True])
def test_a_log_that_has_grown_is_compacted_apart_from_the_change(full):
    async def work():
        world = World()
        task = running(world)
        world.store.overgrown = True
        assert not (await world.deny("192.0.2.1"))["notes"][1:]
        world.store.full = full
        assert await asyncio.to_thread(world.store.compacted.wait, 30)
        if full:
            await world.until(lambda: bool(world.reports(Message.STATE_PROBLEM)))
        await cancelled(task)

    run(work)


def test_changes_wait_for_each_other():
    """Many at once end as if they had come one after the other, in the kernel, here and on disk."""

    async def work():
        world = World()
        wanted = [f"192.0.2.{number}" for number in range(40)]
        await asyncio.gather(*(world.deny(prefix) for prefix in wanted))
        await asyncio.gather(
            *(world.service.remove([prefix], caller=ROOT) for prefix in wanted[::2]), *(world.allow(prefix) for prefix in wanted[1::4])
        )
        left = {f"{prefix}/32": "allow" if number % 4 == 1 else "deny" for number, prefix in enumerate(wanted) if number % 2}
        assert world.verdicts() == left
        assert world.kept() == left

    run(work)


def test_remove_is_all_or_none_and_names_the_file():
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24", line=7),)))
        await world.deny("192.0.2.1")
        before = world.snapshot()
        with pytest.raises(NoSuchEntryError):
            await world.service.remove(["192.0.2.1", "192.0.2.2"], caller=ROOT)
        with pytest.raises(FileEntryError, match=r"xdpmond\.toml:7"):
            await world.service.remove(["192.0.2.1", "203.0.113.0/24"], caller=ROOT)
        with pytest.raises(UsageError):
            await world.service.remove([], caller=ROOT)
        assert world.snapshot() == before

    run(work)


def test_what_covered_an_entry_of_a_file_is_removed_and_the_file_decides_again():
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24", line=7),)))
        await world.service.begin()
        await world.allow("203.0.113.0/24")
        assert world.verdicts() == {"203.0.113.0/24": "allow"}
        done = await world.service.remove(["203.0.113.0/24"], caller=ROOT)
        assert world.verdicts() == {"203.0.113.0/24": "deny"}
        assert [each["origin"] for each in done["removed"]] == ["operator"]
        assert any("still denied" in note and "xdpmond.toml:7" in note for note in done["notes"])

    run(work)


def written(path, text):
    path.write_bytes(text)
    return os.open(path, os.O_RDONLY)


def test_a_file_of_prefixes(tmp_path):
    async def work():
        world = World()
        fd = written(tmp_path / "list", b"192.0.2.1\r\n# a comment\n\n  2001:db8::/32 # the documentation's\n192.0.2.1\n")
        done = await world.service.change_from_file(DENY, fd, caller=ROOT, reason="feed")
        os.close(fd)  # it was the caller's all the time
        assert done["applied"] == 2
        assert world.verdicts() == {"192.0.2.1/32": "deny", "2001:db8::/32": "deny"}

    run(work)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (b"192.0.2.1\n\n10.1\n", PrefixError, "line 3"),
        (b"\xff\xfe1\n", PrefixError, "line 1"),
        (b"# nothing\n", UsageError, "no prefix"),
        (b"192.0.2.1\n::/0\n", GuardError, "::/0"),
        (b"192.0.2.1\n192.0.2.2\n192.0.2.1\n" + b"10.0.0.%d\n" * 3 % (1, 2, 3), UsageError, "line 6: more than 4 prefixes"),
    ],
)
def test_a_bad_file_changes_nothing(tmp_path, text, error, says):
    async def work():
        world = World(Config(tables=Tables(prefixes=4)))
        fd = written(tmp_path / "list", text)
        before = world.snapshot()
        with pytest.raises(error, match=says):
            await world.service.change_from_file(DENY, fd, caller=ROOT)
        os.close(fd)
        assert world.snapshot() == before

    run(work)


# The guard


def enforcing(**more):
    return Config(mode=Mode.ENFORCE, **more)


def test_nobody_connected_is_cut_off_unless_forced():
    async def work():
        world = World(enforcing())
        world.connected = ["192.0.2.7"]
        before = world.snapshot()
        with pytest.raises(LockOutError, match=r"192\.0\.2\.7"):
            await world.deny("192.0.2.0/24")
        assert world.snapshot() == before
        assert world.reports(Message.CHANGE_REFUSED)
        await world.deny("192.0.2.0/24", force=True)
        assert world.verdicts() == {"192.0.2.0/24": "deny"}

    run(work)


def test_the_caller_may_name_more_peers_and_odd_ones_do_no_harm():
    async def work():
        world = World(enforcing())
        with pytest.raises(LockOutError):
            await world.deny("192.0.2.0/24", extra_peers=["fe80::1%eth0", "", "192.0.2.9"])

    run(work)


def test_the_guard_holds_for_removing_an_allow():
    async def work():
        world = World(enforcing(deny=(file_entry("192.0.2.0/24"),)))
        await world.allow("192.0.2.7")
        world.connected = ["192.0.2.7"]
        before = world.snapshot()
        with pytest.raises(LockOutError):
            await world.service.remove(["192.0.2.7"], caller=ROOT)
        assert world.snapshot() == before

    run(work)


def test_the_guard_holds_for_the_mode():
    async def work():
        world = World(Config(deny=(file_entry("192.0.2.0/24"),)))
        world.connected = ["192.0.2.7"]
        before = world.snapshot()
        with pytest.raises(LockOutError):
            await world.set_mode("enforce")
        assert world.snapshot() == before
        await world.set_mode("enforce", force=True)
        assert world.modes == {"eth0": Mode.ENFORCE}
        await world.deny("198.51.100.1")  # who is cut off already stands in the way of nothing

    run(work)


def test_the_guard_holds_for_a_reload():
    async def work():
        world = World(enforcing())
        await world.service.begin()
        world.connected = ["192.0.2.7"]
        world.files = enforcing(deny=(file_entry("192.0.2.0/24"),))
        before = world.snapshot()
        with pytest.raises(LockOutError, match=r"in the configuration, or use xdpmonctl reload --force"):
            await world.service.reload(caller=ROOT)
        assert world.snapshot() == before
        assert world.reports(Message.RELOAD_REFUSED)
        assert world.reloading == [True, False]
        await world.service.reload(caller=ROOT, force=True)  # a stranger on port 22 has no veto
        assert world.verdicts() == {"192.0.2.0/24": "deny"}
        assert world.reports(Message.RELOADED)

    run(work)


def two_interfaces(world):
    world.states = [world.states[0], replace(world.states[0], name="eth1", ifindex=3)]
    return world


def test_an_interface_that_enforces_does_not_blind_the_guard_to_the_others():
    async def work():
        world = two_interfaces(World(Config(deny=(file_entry("192.0.2.0/24"),))))
        world.connected = ["192.0.2.7"]
        await world.set_mode("enforce", interface="eth1", force=True)
        assert world.modes == {"eth0": Mode.MONITOR, "eth1": Mode.ENFORCE}
        await world.deny("198.51.100.1")  # cuts off nobody anew
        with pytest.raises(LockOutError):
            await world.set_mode("enforce")
        with pytest.raises(LockOutError):
            await world.set_mode("enforce", interface="eth0")
        assert world.modes == {"eth0": Mode.MONITOR, "eth1": Mode.ENFORCE}

    run(work)


def test_the_guard_looks_at_interfaces_that_a_reload_adds():
    async def work():
        world = World(Config(interface=("eth0",), deny=(file_entry("192.0.2.0/24"),)))
        world.connected = ["192.0.2.7"]
        world.files = replace(world.files, interface=("eth0", "eth1"), interfaces={"eth1": Interface(mode=Mode.ENFORCE)})
        with pytest.raises(LockOutError):
            await world.service.reload(caller=ROOT)
        assert world.service.config.interface == ("eth0",)

    run(work)


# Mode


def test_a_mode_set_by_hand_wins_and_default_goes_back_to_the_files():
    async def work():
        world = World(Config(interfaces={"eth0": Interface(mode=Mode.MONITOR)}))
        done = await world.set_mode("enforce")
        assert (done["mode"], done["file_mode"], world.modes) == ("enforce", "monitor", {"eth0": Mode.ENFORCE})
        assert world.store.saved.mode is Mode.ENFORCE
        status = await world.service.status()
        assert (status["mode"], status["file_mode"], status["mode_source"]) == ("enforce", "monitor", "operator")
        await world.set_mode("default")
        assert world.modes == {"eth0": Mode.MONITOR}
        assert world.store.saved.mode is None
        assert (await world.service.status())["mode_source"] == "file"

    run(work)


@pytest.mark.parametrize(
    ("mode", "options", "error"),
    [
        ("strict", {}, UsageError),
        ("enforce", {"confirm": 0.1}, UsageError),
        ("enforce", {"confirm": float("nan")}, UsageError),
        ("enforce", {"interface": "eth7"}, NoSuchEntryError),
    ],
)
def test_a_mode_that_means_nothing(mode, options, error):
    async def work():
        world = World()
        before = world.snapshot()
        with pytest.raises(error):
            await world.set_mode(mode, **options)
        assert world.snapshot() == before

    run(work)


def test_enforcing_a_denied_default_is_said_twice():
    async def work():
        world = World(Config(default=DENY))
        with pytest.raises(GuardError, match="DNS"):
            await world.set_mode("enforce")
        assert world.service.mode is Mode.MONITOR
        done = await world.set_mode("enforce", force=True)
        assert any("DNS" in note for note in done["notes"])

    run(work)


def test_the_warnings_are_those_of_the_mode_that_holds():
    async def work():
        world = two_interfaces(World(Config(default=DENY, interfaces={"eth1": Interface(mode=Mode.MONITOR)})))
        assert any("nothing is dropped" in warning for warning in world.service.warnings())
        await world.set_mode("enforce", interface="eth1", force=True)
        assert not any("nothing is dropped" in warning for warning in world.service.warnings())
        assert any("DNS" in warning for warning in (await world.service.status())["configuration"]["warnings"])
        world.files = replace(world.files, window=5)
        notes = (await world.service.reload(caller=ROOT))["notes"]
        assert any("DNS" in note for note in notes)
        assert not any("nothing is dropped" in note for note in notes)
        world = World(replace(world.files, interfaces={"eth0": Interface(mode=Mode.ENFORCE)}), State(mode=Mode.MONITOR))
        assert any("nothing is dropped" in warning for warning in world.service.warnings())

    run(work)


def test_an_interface_that_is_not_found_yet_has_no_mode_of_its_own():
    async def work():
        world = World()
        world.states = [InterfaceState("default", "waiting", reason="there is no default route yet")]
        with pytest.raises(NoSuchEntryError, match="watched are: none"):
            await world.set_mode("enforce", interface="default")

    run(work)


def test_an_unconfirmed_mode_goes_back():
    async def work():
        world = World()
        task = running(world)
        done = await world.set_mode("enforce", confirm=60)
        assert (done["mode"], done["confirm_seconds"], world.modes["eth0"]) == ("enforce", 60, Mode.ENFORCE)
        assert world.store.saved.mode is None  # a restart in between goes back too
        waits = (await world.service.status())["confirm"]
        assert waits["mode"] == "monitor"
        assert 0 < waits["seconds_left"] <= 60
        world.now -= 86400  # the wall clock has no say in it
        advance(61)
        await world.until(lambda: len(world.signals("ModeChanged")) == 2)
        await cancelled(task)
        assert world.modes == {"eth0": Mode.MONITOR}
        assert world.service.mode is Mode.MONITOR
        assert (await world.service.status())["confirm"] is None
        with pytest.raises(NoSuchEntryError):
            await world.service.confirm(caller=ROOT)

    run(work)


def test_a_confirmed_mode_stays():
    async def work():
        world = World()
        task = running(world)
        await world.set_mode("enforce", confirm=60)
        await world.service.confirm(caller=ROOT)
        assert world.store.saved.mode is Mode.ENFORCE
        advance(61)
        await world.deny("192.0.2.1")
        assert world.service.mode is Mode.ENFORCE
        await cancelled(task)

    run(work)


def test_what_waits_to_be_confirmed_waits_on_when_one_interface_is_changed():
    async def work():
        world = two_interfaces(World())
        task = running(world)
        await world.set_mode("enforce", confirm=60)
        await world.set_mode("enforce", interface="eth1")
        assert (world.store.saved.mode, world.store.saved.interface_modes) == (None, {"eth1": Mode.ENFORCE})
        advance(61)
        await world.until(lambda: len(world.signals("ModeChanged")) == 3)
        assert world.modes == {"eth0": Mode.MONITOR, "eth1": Mode.ENFORCE}
        await cancelled(task)

    run(work)


def test_a_mode_for_all_ends_the_waiting():
    async def work():
        world = World()
        task = running(world)
        await world.set_mode("enforce", confirm=60)
        await world.set_mode("enforce")
        with pytest.raises(NoSuchEntryError):
            await world.service.confirm(caller=ROOT)
        advance(61)
        await world.deny("192.0.2.1")
        assert world.service.mode is Mode.ENFORCE
        assert world.store.saved.mode is Mode.ENFORCE
        await cancelled(task)

    run(work)


def test_one_interface_goes_back_by_itself():
    async def work():
        world = two_interfaces(World())
        task = running(world)
        await world.set_mode("enforce", interface="eth1", confirm=5)
        assert world.modes == {"eth0": Mode.MONITOR, "eth1": Mode.ENFORCE}
        advance(6)
        await world.until(lambda: len(world.signals("ModeChanged")) == 2)
        assert world.signals("ModeChanged")[-1] == {"mode": "monitor", "interface": "eth1", "by": "the time to confirm having passed"}
        assert world.modes == {"eth0": Mode.MONITOR, "eth1": Mode.MONITOR}
        await cancelled(task)

    run(work)


def test_a_mode_that_cannot_be_put_in_place_does_not_hold():
    async def work():
        world = World()
        await world.set_mode("enforce", confirm=60)
        before = world.snapshot()
        world.reconcile_refused = kernel_refuses("netlink is busy")
        with pytest.raises(KernelError):
            await world.set_mode("monitor")
        assert world.snapshot() == before
        await world.service.confirm(caller=ROOT)  # still waits

    run(work)


def test_a_restart_before_the_confirmation_starts_with_the_mode_before():
    async def work():
        world = World(state=State(mode=Mode.MONITOR))
        await world.set_mode("enforce", confirm=60)
        await world.deny("192.0.2.1")  # keeps state too
        after = World(state=world.store.saved)
        assert after.service.mode is Mode.MONITOR
        await world.service.confirm(caller=ROOT)
        assert World(state=world.store.saved).service.mode is Mode.ENFORCE

    run(work)


# Expiry


def test_an_entry_ends_by_itself():
    async def work():
        world = World()
        await world.service.begin()
        task = running(world)
        await world.deny("192.0.2.1", seconds=30, reason="scan")
        await world.deny("192.0.2.2")
        world.now += 30
        advance(31)
        await world.until(lambda: bool(world.reports(Message.ENTRY_EXPIRED)))
        assert world.verdicts() == world.kept() == {"192.0.2.2/32": "deny"}
        assert world.reports(Message.ENTRY_EXPIRED)[0].text == "deny 192.0.2.1/32 has ended (scan)"
        await world.until(lambda: world.signals("PolicyChanged")[-1]["change"] == "expired")
        assert world.signals("PolicyChanged")[-1]["prefixes"] == ["192.0.2.1/32"]
        await cancelled(task)

    run(work)


def test_an_entry_that_was_prolonged_does_not_end_at_its_old_time():
    async def work():
        world = World()
        task = running(world)
        await world.deny("192.0.2.1", seconds=30)
        await world.deny("192.0.2.2", seconds=40)
        await world.deny("192.0.2.1", seconds=3000)
        world.now += 45
        advance(46)
        await world.until(lambda: bool(world.reports(Message.ENTRY_EXPIRED)))
        assert world.verdicts() == {"192.0.2.1/32": "deny"}
        await cancelled(task)

    run(work)


def test_a_clock_that_is_set_forward_is_noticed_within_a_minute():
    async def work():
        world = World()
        task = running(world)
        await world.deny("192.0.2.1", seconds=86400)
        world.now += 90000  # the wall clock alone
        advance(61)
        await world.until(lambda: bool(world.reports(Message.ENTRY_EXPIRED)))
        assert world.verdicts() == {}
        await cancelled(task)

    run(work)


def test_a_clock_that_is_set_back_ends_nothing_early():
    async def work():
        world = World()
        task = running(world)
        await world.deny("192.0.2.1", seconds=100)
        world.now -= 3600
        for _ in range(5):
            advance(61)
            await world.deny("198.51.100.1")  # a whole change, so that the task had its turns
        assert "192.0.2.1/32" in world.verdicts()
        world.now += 3701
        advance(61)
        await world.until(lambda: bool(world.reports(Message.ENTRY_EXPIRED)))
        assert "192.0.2.1/32" not in world.verdicts()
        await cancelled(task)

    run(work)


def test_a_kernel_that_refuses_an_end_is_asked_again():
    async def work():
        world = World()
        task = running(world)
        await world.deny("192.0.2.1", seconds=30)
        world.kernel.refuse["apply_policy"] = kernel_refuses()
        world.now += 31
        advance(31)
        await world.until(lambda: bool(world.reports(Message.WARNING)))
        assert world.verdicts() == {"192.0.2.1/32": "deny"}
        advance(61)
        await world.until(lambda: bool(world.reports(Message.ENTRY_EXPIRED)))
        assert world.verdicts() == {}
        assert len(world.reports(Message.WARNING)) == 1
        await cancelled(task)

    run(work)


def test_what_ended_while_no_daemon_ran_never_holds_again():
    async def work():
        world = World(state=kept(entry("192.0.2.1", expires=START - 1), entry("192.0.2.2", expires=START + 1)))
        world.kernel.policy = {Prefix.parse("192.0.2.1"): DENY}
        await world.service.begin()
        assert world.verdicts() == world.kept() == {"192.0.2.2/32": "deny"}
        assert len(world.reports(Message.ENTRY_EXPIRED)) == 1

    run(work)


def test_thousands_end_at_once(tmp_path):
    async def work():
        world = World()
        await world.service.begin()
        task = running(world)
        fd = written(tmp_path / "list", b"".join(b"10.0.%d.%d\n" % (n >> 8, n & 255) for n in range(3000)))
        await world.service.change_from_file(DENY, fd, caller=ROOT, seconds=30)
        os.close(fd)
        await world.deny("192.0.2.1")
        assert len(world.verdicts()) == len(world.kept()) == 3001
        world.now += 31
        advance(31)
        await world.until(lambda: world.signals("PolicyChanged")[-1]["change"] == "expired")
        assert world.verdicts() == world.kept() == {"192.0.2.1/32": "deny"}
        told = world.signals("PolicyChanged")[-1]
        assert (told["count"], len(told["prefixes"])) == (3000, 100)
        await cancelled(task)

    run(work)


def test_many_ends_at_once_are_few_records():
    async def work():
        world = World(state=kept(*(entry(f"192.0.2.{number}", expires=START) for number in range(50))))
        await world.service.begin()
        said = world.reports(Message.ENTRY_EXPIRED)
        assert len(said) == 21
        assert said[-1].text.startswith("30 more")

    run(work)


# Start and reload


def test_the_beginning_brings_the_kernel_from_what_it_has_to_what_is_wanted():
    async def work():
        state = kept(entry("192.0.2.1"), entry("10.0.0.0/8", DENY))
        world = World(Config(allow=(file_entry("10.0.0.0/8", ALLOW), file_entry("::1/128", ALLOW)), default=DENY), state)
        world.kernel.policy = {Prefix.parse("192.0.2.1"): DENY, Prefix.parse("::1"): DENY, Prefix.parse("203.0.113.9"): DENY}
        await world.service.begin()
        assert world.verdicts() == {"10.0.0.0/8": "deny", "192.0.2.1/32": "deny", "::1/128": "allow"}
        assert world.kernel.default is DENY

    run(work)


def test_a_reload_applies_the_difference_and_keeps_what_was_added_by_hand():
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24"), file_entry("198.51.100.0/24"))))
        await world.service.begin()
        await world.deny("192.0.2.1")
        world.files = Config(deny=(file_entry("198.51.100.0/24", line=9), file_entry("2001:db8::/32")), default=Verdict.ALLOW, window=30)
        done = await world.service.reload(caller=ROOT)
        assert done["changed"] == 2
        assert world.verdicts() == {"192.0.2.1/32": "deny", "198.51.100.0/24": "deny", "2001:db8::/32": "deny"}
        assert (world.kernel.default, world.kernel.configured) == (Verdict.ALLOW, world.files)
        assert world.service.config is world.files
        assert world.service.policy.at(Prefix.parse("198.51.100.0/24"))[0].source.endswith(":9")
        assert (await world.service.status())["last_reload"]["ok"]
        assert world.reports(Message.RELOADED)
        assert world.reloading == [True, False]

    run(work)


def test_a_refused_file_changes_nothing_and_is_said():
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24"),)))
        await world.service.begin()
        before = world.snapshot()
        world.files_refused = ConfigError("/etc/xdpmond/xdpmond.toml:3: mode: not a mode")
        with pytest.raises(ConfigError):
            await world.service.reload(caller=ROOT)
        assert world.snapshot() == before
        last = (await world.service.status())["last_reload"]
        assert (last["ok"], last["when"]) == (False, START)
        assert "toml:3" in last["message"]
        assert world.reports(Message.RELOAD_REFUSED)
        assert world.reloading == [True, False]

    run(work)


@pytest.mark.parametrize("where", ["apply_policy", "configure", "reconcile", "load", "peers"])
@pytest.mark.parametrize("error", [kernel_refuses(), RuntimeError("a fault of ours")])
def test_a_reload_that_fails_at_any_step_changes_nothing_and_is_said(where, error):
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24"),)))
        await world.service.begin()
        world.kernel.configure(world.files)
        await world.deny("192.0.2.1")
        before = (*world.snapshot(), world.kernel.configured)
        old, world.files = world.files, enforcing(deny=(file_entry("198.51.100.0/24"),), default=Verdict.ALLOW)
        if where in ("load", "peers", "reconcile"):
            setattr(world, {"load": "files_refused", "peers": "peers_refused", "reconcile": "reconcile_refused"}[where], error)
        else:
            world.kernel.refuse[where] = error
        with pytest.raises(type(error)):
            await world.service.reload(caller=ROOT)
        assert (*world.snapshot(), world.kernel.configured) == before
        assert not (await world.service.status())["last_reload"]["ok"]
        assert world.reports(Message.RELOAD_REFUSED)
        assert world.reloading == [True, False]
        world.files, world.files_refused, world.peers_refused = old, None, None
        assert (await world.service.reload(caller=ROOT))["changed"] == 0

    run(work)


def test_reloads_at_once_come_one_after_the_other():
    """systemd has to see each RELOADING=1 answered before the next one."""

    async def work():
        world = World()
        await asyncio.gather(*(world.service.reload(caller=ROOT) for _ in range(3)))
        assert world.reloading == [True, False] * 3

    run(work)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_reload_into_a_denied_default_is_guarded_whoever_set_enforce(by_hand):
    async def work():
        world = World(Config() if by_hand else enforcing())
        if by_hand:
            await world.set_mode("enforce")
        before = world.snapshot()
        world.files = replace(world.files, default=DENY)
        with pytest.raises(GuardError, match="DNS"):
            await world.service.reload(caller=ROOT)
        with pytest.raises(GuardError, match="DNS"):  # with such a file, the next start is refused
            await world.service.reload(caller=ROOT, force=True)
        assert world.snapshot() == before
        world.files = replace(world.files, force_default_deny=True)
        await world.service.reload(caller=ROOT)
        assert world.kernel.default is DENY

    run(work)


def test_what_was_forced_once_reloads():
    async def work():
        world = World(Config(default=DENY))
        await world.set_mode("enforce", force=True)
        world.files = replace(world.files, window=10)
        await world.service.reload(caller=ROOT)
        assert world.service.config.window == 10

    run(work)


def test_what_takes_effect_at_the_next_start_is_said():
    async def work():
        world = World()
        world.files = replace(world.files, tables=replace(world.files.tables, talkers=1024))
        assert any("next start" in note for note in (await world.service.reload(caller=ROOT))["notes"])

    run(work)


# Questions


def talking(world):
    world.kernel.running = rows(("192.0.2.1", 6, 22, 10, 600), ("2001:db8::9", 17, 53, 3, 900), ("203.0.113.5", 1, 0, 7, 490))
    last = Window(4, START - 60, START, 60, rows(("192.0.2.1", 6, 22, 90, 5400), ("198.51.100.2", 132, 9, 1, 100)))
    world.service.progress = Progress(Totals([], START - 20)).closed(last, Totals([], START - 10), Count(91, 5500))


def test_status_is_json_whatever_there_is():
    async def work():
        world = World(Config(deny=(file_entry("203.0.113.0/24"),)))
        json.dumps(await world.service.status(), allow_nan=False)
        talking(world)
        await world.deny("192.0.2.0/24", seconds=60)
        world.now += 5
        status = json.loads(json.dumps(await world.service.status(), allow_nan=False))
        assert status["uptime_seconds"] == 5
        assert status["policy"] == {"entries": 2, "allow": 0, "deny": 2, "operator": 1, "configuration": 1, "automatic": 0, "expiring": 1,
                                    "next_expiry": START + 60}  # fmt: skip
        assert status["window"]["unique_sources"] == {"ipv4": 3, "ipv6": 1}
        assert [(row["source"], row["packets"], row["rule"], row["verdict"]) for row in status["top"]] == [
            ("192.0.2.1", 100, "192.0.2.0/24", "deny"), ("203.0.113.5", 7, "203.0.113.0/24", "deny"), ("2001:db8::9", 3, "default", "log"),
            ("198.51.100.2", 1, "default", "log"),
        ]  # fmt: skip
        assert status["interfaces"][0]["program_id"] == 9
        assert status["anomalies"] == {"short": 2}

    run(work)


@pytest.mark.parametrize("moment", ["before_kernel", "after_kernel"])
@pytest.mark.parametrize("question", ["status", "top", "explain"])
def test_a_window_that_ends_meanwhile_is_in_the_answer_once(question, moment):
    """Its packets are in a closed window or in the running one. In both, or in neither, they would be books that do not balance."""

    async def work():
        world = World()
        talking(world)
        world.kernel.tally.sourced = Count(91 + 20, 5500 + 1990)
        open_, running = world.service.progress, world.kernel.running

        def close():
            ended = Window(5, START, START + 60, 60, running)
            world.kernel.running = NO_ROWS
            world.service.progress = open_.closed(ended, Totals([], START), open_.tracked + Count(20, 1990))

        setattr(world, moment, close)
        if question == "status":
            answer = await world.service.status()
            assert answer["books"]["tracked"]["packets"] == 111
            assert answer["books"]["balanced"]
            found = answer["top"]
        elif question == "top":
            found = list(await world.service.top(by="packets"))
        else:
            found = (await world.service.explain("203.0.113.5"))["talkers"]
        assert [row["packets"] for row in found if row["source"] == "203.0.113.5"] == [7]

    run(work)


@pytest.mark.parametrize(("last", "lost", "interval", "partial"), [
    (True, 5, False, False), (False, 5, False, True), (True, 6, False, True), (True, 6, True, False), (False, 5, True, True),
])  # fmt: skip
def test_talkers_are_lower_bounds_where_some_were_lost(last, lost, interval, partial):
    async def work():
        world = World()
        talkers = rows(("203.0.113.5", 6, 22, 7, 700))
        world.service.progress = Progress(Totals([], START), last=Window(1, START, START + 60, 60, talkers, exact=last), lost=5)
        world.kernel.running = talkers
        world.kernel.tally.evicted, world.kernel.tally.untracked = Count(lost - 1), Count(1)
        assert [row["partial"] for row in await world.service.top(interval=interval)] == [partial]
        if not interval:
            assert [row["partial"] for row in (await world.service.explain("203.0.113.5"))["talkers"]] == [partial]
            status = await world.service.status()
            assert [row["partial"] for row in status["top"]] == [partial]
            assert status["window"]["exact"] is not partial

    run(work)


def test_entries_come_sorted_with_their_counts():
    async def work():
        world = World(Config(deny=(file_entry("10.0.0.0/8"), file_entry("192.0.2.0/24"))))
        await world.allow("10.0.0.0/8")
        await world.deny("2001:db8::/32")
        counts = {Prefix.parse("10.0.0.0/8"): RuleCount(3, 300), Prefix.parse("192.0.2.0/24"): RuleCount()}
        world.kernel.counts = RuleCounts(counts, RuleCount(partial=True))
        found = [json.loads(line) for line in await world.service.entries()]
        assert [(each["prefix"], each["origin"], each["effective"], each["packets"], each["partial"]) for each in found] == [
            ("10.0.0.0/8", "operator", True, 3, False), ("10.0.0.0/8", "configuration", False, 0, False),
            ("192.0.2.0/24", "configuration", True, 0, False), ("2001:db8::/32", "operator", True, 0, True),
        ]  # fmt: skip

    run(work)


@pytest.mark.parametrize(
    ("address", "verdict", "action", "by", "covering"),
    [
        ("192.0.2.1", "allow", "PASS", "192.0.2.1/32", 2),
        ("192.0.2.2", "deny", "LOG", "192.0.2.0/24", 1),
        ("2001:db8::9", "log", "LOG", None, 0),
    ],
)
def test_explain_in_monitor_mode(address, verdict, action, by, covering):
    async def work():
        world = World(Config(deny=(file_entry("192.0.2.0/24"),)))
        await world.allow("192.0.2.1")
        talking(world)
        found = json.loads(json.dumps(await world.service.explain(address), allow_nan=False))
        assert (found["verdict"], found["action"], len(found["covering"])) == (verdict, action, covering)
        assert (found["decided_by"] and found["decided_by"]["prefix"]) == by
        assert [row["packets"] for row in found["talkers"]] == {"192.0.2.1": [100], "192.0.2.2": [], "2001:db8::9": [3]}[address]

    run(work)


def test_explain_of_what_is_no_address():
    async def work():
        for text in ("192.0.2.0/24", "localhost", ""):
            with pytest.raises(PrefixError):
                await World().service.explain(text)

    run(work)


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ({}, ["192.0.2.1", "2001:db8::9", "203.0.113.5", "198.51.100.2"]),
        ({"by": "packets", "limit": 2}, ["192.0.2.1", "203.0.113.5"]),
        ({"interval": True}, ["192.0.2.1", "198.51.100.2"]),
        ({"protocol": "udp"}, ["2001:db8::9"]),
        ({"protocol": "132"}, ["198.51.100.2"]),
        ({"protocol": "gre"}, []),
        ({"port": 22}, ["192.0.2.1"]),
        ({"port": 0}, []),
    ],
)
def test_top(options, sources):
    async def work():
        world = World()
        talking(world)
        found = list(await world.service.top(**options))
        json.dumps(found, allow_nan=False)
        assert [row["source"] for row in found] == sources

    run(work)


@pytest.mark.parametrize("options", [{"by": "age"}, {"protocol": "quic"}, {"protocol": "256"}, {"protocol": ""}, {"protocol": "²"}])
def test_top_of_what_is_not_known(options):
    async def work():
        with pytest.raises(UsageError):
            await World().service.top(**options)

    run(work)


def test_events_are_remembered_and_followed():
    async def work():
        world = World()
        feed = world.service.follow_events()
        for number in range(3):
            world.service.events.publish(numbered(number))
        assert [event["flow_hash"] for event in await world.service.recent_events(2)] == [1, 2]
        followed = []
        async for lines in feed:
            followed += [json.loads(line)["flow_hash"] for line in lines.splitlines()]
            if followed[-1] == 2:
                feed.close()
        assert followed == [0, 1, 2]

    run(work)


def test_properties():
    async def work():
        world = World(state=kept(entry("192.0.2.1")))
        service = world.service
        assert (service.entry_count, list(service.interfaces), service.started) == (1, ["eth0"], START)
        world.states = [replace(world.states[0], state="waiting")]
        assert list(service.interfaces) == []
        assert (service.mode, service.file_mode, service.default, service.policy.count(Origin.OPERATOR)) == (
            Mode.MONITOR, Mode.MONITOR, Verdict.LOG, 1,
        )  # fmt: skip

    run(work)
