"""``python -m lichen`` is the command ``lichen``."""

from lichen.cli import main

if __name__ == "__main__":
    main()
