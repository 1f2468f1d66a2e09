"""`python -m kind_edge.cli`."""

import sys

from kind_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
