"""Run the command line with `python -m edge_moe`."""

import sys

from edge_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
