"""`python -m sapper` is the command `sapper`, of the Python that runs it."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "sapper"
    sys.exit(main())
