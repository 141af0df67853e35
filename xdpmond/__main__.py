"""python3 -m xdpmond"""

import sys

from .app import main

sys.exit(main())
