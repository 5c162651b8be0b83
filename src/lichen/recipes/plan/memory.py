"""Measures memory of the process or its accelerator.

The kernel's high-water mark is set back where it allows that, so that the peak of one piece of work can be told
from that of loading before it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import final

import torch

from lichen.present.measured.peak_memory import peak_memory_bytes

__all__ = ["MemoryMeter"]


def _field(file: str, name: str) -> int | None:
    """A line such as ``VmRSS:  1234 kB``, in bytes."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _limit() -> int | None:
    """What is left of a container's limit."""
    cgroup, older = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    for limit, used in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (older / "memory.limit_in_bytes", older / "memory.usage_in_bytes"),
    ):
        try:
            return int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):
            continue
    return None


@final
class MemoryMeter:
    """Reads memory where the work is done.

    Args:
        device: As the recipe names it.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device) if device.split(":")[0] == "cuda" else None
        self._highest = 0

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)

    def now(self) -> int:
        """Bytes held now."""
        if self._cuda is not None:
            return torch.cuda.memory_allocated(self._cuda)
        return _field("/proc/self/status", "VmRSS") or peak_memory_bytes()

    def _high_water(self) -> int:
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda)
        return _field("/proc/self/status", "VmHWM") or peak_memory_bytes()

    def restart(self) -> None:
        """Let :meth:`since` start from what is held now; without leave to do so it goes on."""
        self._highest = max(self._highest, self._high_water())
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            return

    def since(self) -> int:
        """The most bytes held since :meth:`restart`."""
        return self._high_water()

    def peak(self) -> int:
        """The most bytes ever held."""
        self._highest = max(self._highest, self._high_water())
        return self._highest

    def available(self) -> int:
        """Bytes this process may hold in all: what it has, and what is free."""
        if self._cuda is not None:
            free, _ = torch.cuda.mem_get_info(self._cuda)
            return free + torch.cuda.memory_reserved(self._cuda)
        free_here = _field("/proc/meminfo", "MemAvailable")
        if free_here is None:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _limit()
        return self.now() + (free_here if limit is None else min(free_here, max(0, limit)))
