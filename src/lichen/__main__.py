"""``python -m lichen`` is the command ``lichen``."""

import sys

from lichen.cli import main

if __name__ == "__main__":
    sys.exit(main())
