"""What xdpmond costs, beside its peers, on the machine at hand: `./dev bench`.

A *row* is one measured value, with the value of a peer measured in the same run for reference where there is one, and with a goal where
one is set. Each section is a module that yields rows: `packets` and `live` measure the packet path, `control` the loading of policies,
`reading` and `events` what the daemon does with what the kernel has counted, `process` daemon and client as whole processes, `fuzz` that
it is all correct. A new kind of measurement is a new module named in `__main__.SECTIONS`.
"""
