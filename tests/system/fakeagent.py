"""An authentication agent for one process: it shows nobody a dialogue, it tells its standard output what polkit asks.

`fakeagent.py BUS PID` registers for the process and prints "registered", then one JSON object a line. A line on its standard input ends
the authentication under way, as a closed dialogue would.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from dbus_next import Message, Variant
from dbus_next.aio import MessageBus

OBJECT = "/org/xdpmond1/test/agent"


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def main(address: str, pid: int) -> None:
    bus = await MessageBus(bus_address=address).connect()
    waiting: list[Message] = []

    def handle(message: Message) -> Message | bool | None:
        if message.path != OBJECT:
            return None
        if message.member == "BeginAuthentication":
            action, _, _, _, cookie, _ = message.body
            waiting.append(message)
            tell(begin=action, cookie=cookie)
            return True
        if message.member == "CancelAuthentication":
            tell(cancel=message.body[0])
            return Message.new_method_return(message)
        return None

    bus.add_message_handler(handle)
    start_time = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    subject = ["unix-process", {"pid": Variant("u", pid), "start-time": Variant("t", start_time), "uid": Variant("i", os.getuid())}]
    reply = await bus.call(Message(destination="org.freedesktop.PolicyKit1", path="/org/freedesktop/PolicyKit1/Authority",
                                   interface="org.freedesktop.PolicyKit1.Authority", member="RegisterAuthenticationAgent",
                                   signature="(sa{sv})ss", body=[subject, "C", OBJECT]))  # fmt: skip
    assert reply is not None
    tell(registered=reply.error_name or True, text=reply.body)
    while await asyncio.to_thread(sys.stdin.readline):
        await bus.send(Message.new_method_return(waiting.pop(0)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
