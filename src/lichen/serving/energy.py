"""Reads what the processors of this machine have used, where the kernel lets us.

A counter is of a whole package of cores, so that it has what others did at the same time.

References:
    The Linux kernel. "Power Capping Framework." https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["joules_between", "read_counters"]

ROOT = Path("/sys/class/powercap")

Counters = Mapping[str, tuple[int, int]]
"""Microjoules of each package, and where its counter begins anew."""


def read_counters(root: Path = ROOT) -> Counters:
    """The counters of all packages; none where there are none, or only the administrator may read them."""
    found = {}
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:  # a part of a package, which that counts already
            continue
        try:
            values = [int((folder / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
        except (OSError, ValueError):
            continue
        found[folder.name] = (values[0], values[1])
    return found


def joules_between(before: Counters, after: Counters) -> float | None:
    """Joules of all packages from one reading to the next; None where nothing could be read.

    >>> joules_between({"p": (900, 1000)}, {"p": (100, 1000)}), joules_between({}, {})
    (0.0002, None)
    """
    both = before.keys() & after.keys()
    if not both:
        return None
    return sum((after[name][0] - before[name][0]) % max(after[name][1], 1) for name in both) / 1e6
