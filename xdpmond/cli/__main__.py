"""`python3 -m xdpmond.cli` is xdpmonctl."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
