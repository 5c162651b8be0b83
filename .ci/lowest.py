"""Prints the lowest version of every direct dependency that pyproject.toml allows, as pip constraints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def lowest(requirements: list[str]) -> list[str]:
    """``name==version`` for each requirement ``name>=version``, or ``name>=version,<another``.

    >>> lowest(["numpy>=2", "torch>=2.8,<3"])
    ['numpy==2', 'torch==2.8']
    """
    pins = []
    for requirement in requirements:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)(,<[0-9.]+)?", requirement)
        if match:
            pins.append(f"{match[1]}=={match[2]}")
    return pins


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    print("\n".join(sorted(set(lowest(wanted)))))
