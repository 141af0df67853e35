"""xdpmonctl: a thin client of the daemon's D-Bus object.

Every command is one call on the bus and one way of showing the answer; nothing is decided here that the daemon does not decide again.
`entry` is where it begins, `main` owns exit statuses and error output, `parser` the words of the command line, `client` the bus, `render`
and `layout` the look, `live` and `terminal` the screens that refresh in place. The client is run by a person in a hurry, so nothing is
imported before it is needed: `xdpmonctl status` loads neither asyncio nor rich nor dataclasses.
"""
