"""The D-Bus room: the object that `xdpmonctl` and other programs talk to.

`connection` moves messages (`wire`) and descriptors over one socket, `callers` knows who sent them, `interface` says what the object
offers, `polkit` who may ask for it, `payload` makes the descriptors that bulk data travels in, `turns` says who is next where that takes
time, `held` what callers keep of the memory, `lists` brings these three together, `errormap` names the errors, `session` takes the calls of
one connection, and `server` keeps connection and name.
dbus_next marshals the messages; these are the only files of the daemon that import it.
"""
