"""The tests in `guest` need modules and a freedom that a host does not give: they are collected in a machine made for them alone."""

import os

collect_ignore = [] if os.environ.get("XDPMOND_GUEST") == "1" else ["guest"]
