"""`python -m contextuate_persist` is `contextuate-persist`."""

import sys

from contextuate_persist.cli import main

if __name__ == "__main__":
    sys.exit(main())
