"""What xdpmond costs, beside its peers, on the machine at hand: `./dev bench`.

A *row* is one measured value, with the value of a peer measured in the same run for reference where there is one, and with a goal where
one is set. `packets` measures the packet path, `process` the daemon and the client as whole processes; each yields rows, and a new kind
of measurement is a new module named in `__main__.SECTIONS`.
"""
