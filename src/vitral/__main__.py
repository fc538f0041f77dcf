"""`python -m vitral`."""

import sys

from vitral.cli import main

if __name__ == "__main__":
    sys.exit(main())
