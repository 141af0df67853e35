"""The D-Bus room: the object that `xdpmonctl` and other programs talk to.

`connection` moves messages and descriptors over one socket, `interface` says what the object offers, `polkit` who may ask for it,
`payload` makes the descriptors that bulk data travels in, and `server` holds the connection, the name and the calls under way.
dbus_next marshals the messages; these are the only files of the daemon that import it.
"""
