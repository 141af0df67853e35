"""What is watched while interfaces come and go, over a datapath and links written by hand."""

from dataclasses import dataclass, field, replace

import pytest

from xdpmond.config import Config, Interface
from xdpmond.errors import ForeignProgramError, KernelError
from xdpmond.interfaces import Interfaces
from xdpmond.messages import Message
from xdpmond.model import AttachMode, Mode

AUTO, NATIVE, GENERIC = AttachMode.AUTO, AttachMode.NATIVE, AttachMode.GENERIC
LOST, WAITING = Message.INTERFACE_LOST, Message.INTERFACE_WAITING
ATTACHED, REFUSED, WARNING = Message.INTERFACE_ATTACHED, Message.INTERFACE_REFUSED, Message.WARNING


@dataclass(frozen=True)
class FakeLink:
    name: str
    ifindex: int
    mtu: int = 1500
    up: bool = True
    carrier: bool = True


@dataclass(frozen=True)
class FakeAttachment:
    ifindex: int
    mode: AttachMode
    reason: str = ""
    layer: str = "ethernet"


class Datapath:
    """As the kernel would: an interface takes one program, in the ways that its driver knows."""

    needs_addresses = False

    def __init__(self):
        self.addresses = None
        self.attachments = {}
        self.enforced = {}
        self.detached_by_force = set()
        self.refuses = {}
        """Interface, or interface and mode -> error."""
        self.stored = {}
        """Descriptor of a kept link -> (ifindex, mode)."""

    def attach(self, link, mode, wanted):
        assert link.name not in self.attachments
        way = NATIVE if wanted is AUTO and (link.name, NATIVE) not in self.refuses else GENERIC if wanted is AUTO else wanted
        error = self.refuses.get(link.name) or self.refuses.get((link.name, way))
        if error:
            raise error
        self.attachments = {**self.attachments, link.name: FakeAttachment(link.ifindex, way)}
        self.enforced[link.name] = mode is Mode.ENFORCE
        return self.attachments[link.name]

    def set_addresses(self, addresses):
        assert self.needs_addresses
        self.addresses = addresses

    def release(self, name):
        self.attachments = {other: attachment for other, attachment in self.attachments.items() if other != name}
        self.detached_by_force.discard(name)

    def is_attached(self, name):
        return name not in self.detached_by_force

    def set_mode(self, name, mode):
        assert name in self.attachments
        self.enforced[name] = mode is Mode.ENFORCE

    def adopt_links(self, links, present, wanted):
        by_index = {link.ifindex: link.name for link in present.values()}
        for fd in links:
            ifindex, mode = self.stored[fd]
            name = by_index.get(ifindex)
            if name in wanted and wanted[name][1] in (AUTO, mode):
                self.attachments = {**self.attachments, name: FakeAttachment(ifindex, mode)}
        return []


@dataclass
class World:
    config: Config
    present: dict = field(default_factory=dict)
    route: str | None = None
    modes: dict = field(default_factory=dict)
    records: list = field(default_factory=list)
    blind: KernelError | None = None
    own: set = field(default_factory=set)
    """Addresses of this host."""

    def __post_init__(self):
        self.datapath = Datapath()
        self.interfaces = Interfaces(self.datapath, self, self.records.append)

    # The links

    def links(self):
        if self.blind:
            raise self.blind
        return dict(self.present)

    def default_route(self, links):
        return self.route if self.route in links else None

    def addresses(self):
        if self.blind:
            raise self.blind
        return set(self.own)

    def plug(self, name, ifindex, **more):
        self.present[name] = FakeLink(name, ifindex, **more)

    # What tests ask

    def mode_on(self, name):
        return self.modes.get(name) or self.config.mode_on(name)

    def look(self):
        """Reconcile; returns the kinds of message, each with its interface."""
        self.records.clear()
        self.interfaces.reconcile(self.config, self.mode_on)
        return [(record.message, record.fields["interface"]) for record in self.records]

    @property
    def states(self):
        return {state.name: state.state for state in self.interfaces.states}

    def state(self, name):
        return next(state for state in self.interfaces.states if state.name == name)


def named(*names, **more):
    return Config(interface=names, **more)


def test_the_packet_path_knows_the_addresses_before_it_is_attached():
    world = World(named("eth0"), own={"192.0.2.1"})
    world.look()
    assert world.datapath.addresses is None, "it need not"
    world.datapath.needs_addresses = True
    known = []
    attach = world.datapath.attach
    world.datapath.attach = lambda *arguments: (known.append(world.datapath.addresses), attach(*arguments))[1]
    world.plug("eth0", 7)
    world.look()
    assert known == [{"192.0.2.1"}]
    world.own.add("192.0.2.2")
    world.look()
    assert world.datapath.addresses == {"192.0.2.1", "192.0.2.2"}
    world.interfaces.take_over((), world.config, world.mode_on)
    world.blind = KernelError("no")
    with pytest.raises(KernelError):
        world.look()


def test_an_absent_interface_is_waited_for_and_said_once():
    world = World(named("eth0"))
    assert world.look() == [(WAITING, "eth0")]
    assert world.states == {"eth0": "waiting"}
    assert world.look() == []
    world.plug("eth0", 2)
    assert world.look() == [(ATTACHED, "eth0")]
    state = world.state("eth0")
    assert (state.state, state.ifindex, state.attach, state.layer, state.mtu, state.up) == ("attached", 2, "native", "ethernet", 1500, True)
    assert world.look() == []


def test_one_that_goes_is_let_go_and_one_that_comes_back_is_attached_again():
    world = World(named("eth0", "eth1"))
    world.plug("eth0", 2)
    world.plug("eth1", 3)
    world.look()
    del world.present["eth0"]
    assert world.look() == [(LOST, "eth0")]  # which says that it is waited for
    assert world.states == {"eth0": "waiting", "eth1": "attached"}
    assert list(world.datapath.attachments) == ["eth1"]
    assert world.look() == []
    world.plug("eth0", 9)
    assert world.look() == [(ATTACHED, "eth0")]
    assert world.state("eth0").ifindex == 9


def test_one_that_was_replaced_between_two_looks():
    world = World(named("eth0"))
    world.plug("eth0", 2)
    world.look()
    world.plug("eth0", 7)
    assert world.look() == [(LOST, "eth0"), (ATTACHED, "eth0")]
    assert world.datapath.attachments["eth0"].ifindex == 7


def test_a_program_detached_by_force_is_attached_again():
    world = World(named("eth0"))
    world.plug("eth0", 2)
    world.look()
    world.datapath.detached_by_force.add("eth0")
    assert world.look() == [(LOST, "eth0"), (ATTACHED, "eth0")]
    assert "by force" in world.records[0].text


def test_a_refusal_is_said_once_until_it_changes_or_ends():
    world = World(named("eth0"))
    world.plug("eth0", 2)
    world.datapath.refuses["eth0"] = ForeignProgramError("eth0 already has an XDP program: id 7", hint="see bpftool")
    assert world.look() == [(REFUSED, "eth0")]
    assert world.records[0].fields["foreign"]
    state = world.state("eth0")
    assert state.state == "refused"
    assert "id 7" in state.reason
    assert "see bpftool" in state.reason
    assert world.look() == []
    world.datapath.refuses["eth0"] = ForeignProgramError("eth0 already has an XDP program: id 8")
    assert world.look() == [(REFUSED, "eth0")]
    del world.datapath.refuses["eth0"]
    assert world.look() == [(ATTACHED, "eth0")]


def test_one_refused_interface_does_not_stand_in_the_way_of_another():
    world = World(named("eth0", "eth1"))
    world.plug("eth0", 2)
    world.plug("eth1", 3)
    world.datapath.refuses["eth0"] = KernelError("no")
    world.look()
    assert world.states == {"eth0": "refused", "eth1": "attached"}


def test_default_is_the_default_routes_and_stays_there():
    world = World(Config())
    world.plug("eth0", 2)
    world.plug("eth1", 3)
    assert world.look() == [(WAITING, "default")]
    assert "no default route" in world.state("default").reason
    world.route = "eth0"
    assert world.look() == [(ATTACHED, "eth0")]
    world.route = "eth1"
    assert world.look() == []
    world.route = None
    assert world.look() == []
    assert world.states == {"eth0": "attached"}
    del world.present["eth0"]
    assert world.look() == [(LOST, "eth0"), (WAITING, "default")]
    world.route = "eth1"
    assert world.look() == [(ATTACHED, "eth1")]


def test_default_and_the_same_interface_by_name_are_one():
    world = World(named("eth0", "default", "eth1"), route="eth0")
    world.plug("eth0", 2)
    world.look()
    assert list(world.states) == ["eth0", "eth1"]


def test_one_that_the_configuration_names_no_more_is_let_go():
    world = World(named("eth0", "eth1"))
    world.plug("eth0", 2)
    world.plug("eth1", 3)
    world.look()
    world.config = named("eth1")
    assert world.look() == [(LOST, "eth0")]
    assert "configuration" in world.records[0].text
    assert list(world.datapath.attachments) == ["eth1"]
    assert world.states == {"eth1": "attached"}


def test_each_interface_has_its_mode_from_the_first_packet_on():
    world = World(named("eth0", "eth1", interfaces={"eth1": Interface(mode=Mode.ENFORCE)}))
    world.plug("eth0", 2)
    world.plug("eth1", 3)
    world.look()
    assert world.datapath.enforced == {"eth0": False, "eth1": True}
    world.modes = {"eth0": Mode.ENFORCE, "eth1": Mode.MONITOR}
    assert world.look() == []
    assert world.datapath.enforced == {"eth0": True, "eth1": False}


# How it is attached


def attached(mode=NATIVE):
    world = World(named("eth0", attach=mode))
    world.plug("eth0", 2)
    world.look()
    return world


@pytest.mark.parametrize("asked", [AUTO, NATIVE])
def test_what_is_as_asked_is_left_alone(asked):
    world = attached()
    world.config = named("eth0", attach=asked)
    assert world.look() == []


def test_another_way_is_put_in_place():
    world = attached()
    world.config = named("eth0", attach=GENERIC)
    assert world.look() == [(ATTACHED, "eth0")]
    assert world.state("eth0").attach == "generic"


def test_another_way_that_is_refused_leaves_the_one_there_is():
    """Neither unwatched now, nor with a gap at each later look."""
    world = attached(GENERIC)
    world.datapath.refuses["eth0", NATIVE] = KernelError("the driver has no XDP")
    world.config = named("eth0", attach=NATIVE)
    assert world.look() == [(ATTACHED, "eth0"), (REFUSED, "eth0")]
    state = world.state("eth0")
    assert (state.state, state.attach) == ("attached", "generic")
    assert any("native is refused: the driver has no XDP" in note for note in state.notes)
    attachment = world.datapath.attachments["eth0"]
    assert world.look() == []
    assert world.datapath.attachments["eth0"] is attachment
    world.config = named("eth0")
    assert world.look() == []
    assert not any("refused" in note for note in world.state("eth0").notes)
    del world.datapath.refuses["eth0", NATIVE]
    world.config = named("eth0", attach=NATIVE)
    assert world.look() == [(ATTACHED, "eth0")]
    assert world.state("eth0").attach == "native"


def test_another_way_with_none_left():
    world = attached(GENERIC)
    world.datapath.refuses["eth0"] = ForeignProgramError("eth0 already has an XDP program: id 7")
    world.config = named("eth0", attach=NATIVE)
    assert world.look() == [(REFUSED, "eth0")]
    assert world.states == {"eth0": "refused"}
    assert world.look() == []


@pytest.mark.parametrize(
    ("link", "mode", "layer", "says"),
    [
        ({"up": False}, NATIVE, "ethernet", "down"),
        ({"carrier": False}, NATIVE, "ethernet", "carrier"),
        ({}, GENERIC, "ethernet", "GRO"),
        ({}, NATIVE, "ip", "no Ethernet header"),
    ],
)
def test_notes(link, mode, layer, says):
    world = World(named("eth0"))
    world.plug("eth0", 2, **link)
    world.look()
    world.datapath.attachments["eth0"] = replace(world.datapath.attachments["eth0"], mode=mode, layer=layer)
    world.look()
    (note,) = world.state("eth0").notes
    assert says in note


# A kernel that does not answer


def test_a_kernel_that_does_not_list_its_interfaces_changes_nothing():
    world = World(named("eth0"))
    world.plug("eth0", 2)
    world.look()
    before = world.interfaces.states
    world.blind = KernelError("the kernel does not list its interfaces: No buffer space")
    with pytest.raises(KernelError):
        world.look()
    world.records.clear()
    for _ in range(3):
        world.interfaces.keep(world.config, world.mode_on)
    assert [record.message for record in world.records] == [WARNING]
    assert world.interfaces.states == before
    assert list(world.datapath.attachments) == ["eth0"]
    world.blind, was = None, world.blind
    world.interfaces.keep(world.config, world.mode_on)
    world.blind = was
    world.interfaces.keep(world.config, world.mode_on)
    assert len(world.records) == 2  # it is another time


# Taking over from the run before


def taking_over(config, kept, *, route=None):
    world = World(config, route=route)
    for number, name in enumerate(("eth0", "eth1", "eth2"), 2):
        world.plug(name, number)
    for fd, (name, mode) in enumerate(kept, 10):
        world.datapath.stored[fd] = (world.present[name].ifindex, mode)
    world.interfaces.take_over(tuple(world.datapath.stored), world.config, world.mode_on)
    return world


@pytest.mark.parametrize(
    ("config", "kept", "route", "watched"),
    [
        (named("eth0", "eth1"), ["eth0", "eth1"], None, ["eth0", "eth1"]),
        (named("eth1"), ["eth0", "eth1"], None, ["eth1"]),
        (Config(), ["eth0"], "eth0", ["eth0"]),
        (Config(), ["eth0"], None, ["eth0"]),  # the route is not there yet
        (Config(), ["eth0"], "eth1", ["eth0"]),  # it leads elsewhere just now: it does not move
        (Config(), ["eth0", "eth1"], "eth1", ["eth1"]),
        (named("eth0", "default"), ["eth0", "eth1"], "eth2", ["eth0", "eth1"]),
        (named("eth0", "default"), ["eth0"], "eth2", ["eth0", "eth2"]),
        (named("eth0", "default"), ["eth0"], "eth0", ["eth0"]),
        (Config(), [], "eth1", ["eth1"]),
    ],
)
def test_what_is_watched_after_a_restart(config, kept, route, watched):
    world = taking_over(config, [(name, NATIVE) for name in kept], route=route)
    adopted = dict(world.datapath.attachments)
    said = world.look()
    assert sorted(world.datapath.attachments) == watched
    assert all(world.datapath.attachments[name] is adopted[name] for name in set(watched) & set(kept))  # without a gap
    assert [name for message, name in said if message is ATTACHED] == [name for name in watched if name not in kept]
    world.route = "eth2" if route != "eth2" else "eth1"
    assert world.look() == []


def test_a_kept_link_in_another_mode_than_asked_is_attached_anew():
    world = taking_over(named("eth0", attach=GENERIC), [("eth0", NATIVE)])
    assert world.look() == [(ATTACHED, "eth0")]
    assert world.state("eth0").attach == "generic"
