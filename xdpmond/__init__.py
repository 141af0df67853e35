"""xdpmond: who is talking to this host, is that allowed, and is something wrong?"""

__version__ = "0.1.0"
