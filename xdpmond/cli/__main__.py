"""`python3 -m xdpmond.cli` is xdpmonctl."""

import sys

from .entry import main

if __name__ == "__main__":
    sys.exit(main())
