"""What the daemon tells the outside: a closed set of messages, each with an id that never changes, and the records that carry them.

Whoever has something to say makes a `Record`; the sinks decide how it looks. `journalctl MESSAGE_ID=...` finds all records of a kind, and
systemd/xdpmond.catalog explains each kind to a person (`journalctl -x`). The ids are public: rules and scripts match on them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from .model import Action, Outcome, PacketEvent, Verdict, protocol_name


class Priority(enum.IntEnum):
    """syslog's severities; the smaller the more serious."""

    CRITICAL = 2
    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


class Message(enum.Enum):
    """A kind of message: its MESSAGE_ID (128 random bits, fixed for ever) and its ordinary priority."""

    STARTED = ("51f8c6b57f670f019431a11b37b127b7", Priority.NOTICE)
    STOPPING = ("45aac42e6ba39214fdd5b33d2698cf51", Priority.NOTICE)
    RELOADED = ("5f98893aec9001deb753dfa6577bc532", Priority.NOTICE)
    RELOAD_REFUSED = ("8cecb4940a314ff54756ef0a7878966e", Priority.ERROR)
    POLICY_CHANGED = ("ef6d977f1880a592559feb4ca15953f2", Priority.NOTICE)
    ENTRY_EXPIRED = ("2a6f432405f53089f02e66a1c14dd9de", Priority.NOTICE)
    MODE_CHANGED = ("963474c8ac7fba08299baad6ed6df24d", Priority.NOTICE)
    PACKET_LOGGED = ("161eca72c7a86163fcf6748aed977bfe", Priority.INFO)
    PACKET_DROPPED = ("b23f5f1abe5411a6ce0fe353e650f28c", Priority.INFO)
    SUMMARY = ("8b5cd34e7b815f23a656da631c8e3132", Priority.INFO)
    INTERFACE_ATTACHED = ("317dda6f888900f32c41ca9cc346302e", Priority.NOTICE)
    INTERFACE_LOST = ("5995305cf6a6f6a588947e7f16a92133", Priority.WARNING)
    INTERFACE_REFUSED = ("a3375baaf7069a82dbbc3bc34c8312bf", Priority.ERROR)
    INTERFACE_WAITING = ("543265bff402b78d8b833832172ce716", Priority.WARNING)
    PROGRAM_REPLACED = ("3045009b986297e73cc6efb6e372c8ca", Priority.NOTICE)
    TOOK_OVER = ("a4dcb7d923a5ebb72beacd5be6daa22a", Priority.NOTICE)
    CHANGE_REFUSED = ("36223527085bdd534108a82b44dfa9be", Priority.WARNING)
    BUS_PROBLEM = ("4b68b7c6e4b6e52dcdf148b558b10edc", Priority.WARNING)
    BUS_CONNECTED = ("7a1c4b6fd2a94c0e9d1f3b58e6a07c42", Priority.INFO)
    STATE_PROBLEM = ("a2474bce81d257331e428acfe6e872d0", Priority.ERROR)
    LOG_PROBLEM = ("0666b86fbada21892fba6f408fbc5270", Priority.ERROR)
    IPFIX_PROBLEM = ("127519c89a0c3375f51b298eef4f73bf", Priority.WARNING)
    METRICS_PROBLEM = ("f556d090266bd9f1bc7d04cfda2c63c1", Priority.WARNING)
    WARNING = ("b89f83a4873f4a8d9d6b1afbd1a173dc", Priority.WARNING)
    INTERNAL_ERROR = ("3f40337a28224f52e000d65f2f15a145", Priority.ERROR)

    def __init__(self, message_id: str, priority: Priority) -> None:
        self.message_id = message_id
        self.priority = priority

    @property
    def of_packet(self) -> bool:
        """Is it a sample of traffic? Those alone are as many as strangers choose to make them."""
        return self in (Message.PACKET_LOGGED, Message.PACKET_DROPPED)


@dataclass(frozen=True, slots=True)
class Record:
    """One message. `text` is for a person, and may have several lines; `fields` are for programs: snake_case names, plain values."""

    message: Message
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)
    timestamp: float = 0.0
    """Seconds since the epoch; 0: now."""
    priority: int | None = None
    """syslog's severity where it is not the ordinary one of the message."""

    @property
    def severity(self) -> int:
        return self.message.priority if self.priority is None else self.priority


def event_fields(event: PacketEvent) -> dict[str, object]:
    """The fields of a packet event by the contract, the same in JSON and in the journal. What is unknown is None, never 0."""
    verdict = event.outcome.verdict
    return {
        "timestamp": event.timestamp,
        "timestamp_iso": datetime.fromtimestamp(event.timestamp, UTC).isoformat(timespec="microseconds"),
        "interface": event.interface,
        "vlan": event.vlan,
        "family": event.family.label,
        "src_ip": event.src_ip or None,
        "dst_ip": event.dst_ip or None,
        "src_port": event.src_port,
        "dst_port": event.dst_port,
        "protocol": protocol_name(event.protocol_num),
        "protocol_num": event.protocol_num,
        "packet_size": event.packet_size,
        "action": _action(event).value,
        "verdict": None if verdict is None else verdict.value,
        "rule": event.rule,
        "suppressed": event.suppressed,
        "flow_hash": event.flow_hash,
    }


def packet_record(event: PacketEvent) -> Record:
    message = Message.PACKET_DROPPED if _action(event) is Action.DROP else Message.PACKET_LOGGED
    return Record(message, _sentence(event), event_fields(event), event.timestamp)


def visible(text: str, *, keep: str = "") -> str:
    """The text with everything spelled out that a terminal would obey or that hides: control characters, line separators, bidirectional
    overrides, lone surrogates. Characters in `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c == " " or c.isprintable() or c in keep else _spell(ord(c)) for c in text)


def _spell(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _action(event: PacketEvent) -> Action:
    """An event is a report, so what passed is LOG here, whatever the reason for its passing."""
    return Action.DROP if event.outcome.action is Action.DROP else Action.LOG


def _sentence(event: PacketEvent) -> str:
    """For example `DROP 203.0.113.9:40312 -> 192.0.2.1:22 tcp, 60 bytes on eth0: denied by 203.0.113.0/24, 12 more like it before`."""
    source, destination = endpoint(event.src_ip, event.src_port), endpoint(event.dst_ip, event.dst_port)
    tag = "" if event.vlan is None else f" vlan {event.vlan}"
    way = f"{source} -> {destination} {protocol_name(event.protocol_num)}"
    text = f"{_action(event)} {way}, {event.packet_size} bytes on {event.interface}{tag}"
    more = f", {event.suppressed:,} more like it before" if event.suppressed else ""
    return visible(f"{text}: {_judgement(event)}{more}")


def endpoint(address: str, port: object) -> str:
    """`192.0.2.1:22`, `[2001:db8::1]:22`, or the address alone."""
    if port is None:
        return address or "?"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _judgement(event: PacketEvent) -> str:
    listed = event.rule != "default"
    match event.outcome:
        case Outcome.NO_SOURCE:
            return "no readable source"
        case Outcome.ESSENTIAL_PASSED:
            return f"denied by {event.rule}, passed because the host needs it"
    verdict = event.outcome.verdict
    if verdict is Verdict.DENY:
        text = f"denied by {event.rule}" if listed else "on no list, denied by default"
        return text if event.outcome.action is Action.DROP else f"{text}, passed in monitor mode"
    if verdict is Verdict.LOG:
        return f"reported by {event.rule}" if listed else "on no list"
    return f"allowed by {event.rule}" if listed else "on no list, allowed by default"
