"""`python -m bridgekit`: the same as the command `bridgekit`."""

import sys

from bridgekit.cli import main

sys.exit(main())
