"""``python -m ddgen COMMAND``."""

import sys

from ddgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
