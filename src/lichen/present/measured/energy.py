"""Measures energy where the machine counts it: Intel and AMD processors, NVIDIA accelerators.

Processors count microjoules since some moment in the past (RAPL, read through Linux' power capping files) and
start again from zero at a range the kernel names, so that a reading is taken often enough to see every turn.
Accelerators count millijoules since their driver was loaded (NVML). What cannot be read is told as None, never
guessed from a rated power.

References:
    Khan, Hirki, Niemi, Nurminen and Ou (2018). RAPL in Action: Experiences in Using RAPL for Power
    Measurements. ACM Transactions on Modeling and Performance Evaluation of Computing Systems 3(2), 9.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import final

__all__ = ["Counter", "Meter", "counters", "nvml_counter", "rapl_counters"]

POWERCAP = Path("/sys/class/powercap")
POLL = 30.0
"""Seconds between readings: the fastest processors take minutes to turn their counter over."""


@final
@dataclass(frozen=True, slots=True)
class Counter:
    """One counter of energy.

    Args:
        name: What it counts, such as ``package-0``.
        read: Its value now, in joules.
        turn: Joules after which it starts again from zero; None if it never does.
    """

    name: str
    _: KW_ONLY
    read: Callable[[], float]
    turn: float | None = None

    def since(self, before: float, now: float) -> float:
        """Joules between two readings, at most one turn apart.

        >>> Counter("package-0", read=float, turn=100.0).since(90.0, 5.0)
        15.0
        """
        return now - before if now >= before or self.turn is None else now - before + self.turn


def _microjoules(file: Path) -> float:
    return int(file.read_text(encoding="utf-8")) / 1e6


def rapl_counters(folder: Path = POWERCAP) -> tuple[Counter, ...]:
    """The processor packages and memory that can be read; what lies inside a package is not counted twice.

    Args:
        folder: Where the kernel shows its power zones.
    """
    found: dict[str, Counter] = {}
    # A parent comes before its parts, and the zones proper before their doubles in mapped memory.
    for zone in sorted(folder.glob("*:*"), key=lambda path: ("mmio" in path.name, path.name.count(":"), path.name)):
        try:
            name = (zone / "name").read_text().strip()
            if name == "dram":
                name = f"{name} of {zone.name.rpartition(':')[0]}"
            elif not name.startswith("package"):
                continue
            file = zone / "energy_uj"
            _microjoules(file)
            turn = _microjoules(zone / "max_energy_range_uj")
        except (OSError, ValueError):
            continue
        found.setdefault(name, Counter(name, read=lambda file=file: _microjoules(file), turn=turn))  # type: ignore[misc]
    return tuple(found.values())


def nvml_counter(index: int) -> Counter | None:
    """The accelerator of this number; None without NVML's Python package, or where it does not count energy."""
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)

        def read() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        read()
    except Exception:  # the package is not ours, and each of its versions fails in its own way
        return None
    return Counter(f"accelerator {index}", read=read)


def counters(device: str, *, folder: Path = POWERCAP) -> tuple[Counter, ...]:
    """All counters for work on ``device``; none where its own energy is not counted.

    Half a sum would look like a whole one: work on an accelerator that is not counted has no counters,
    though the processor beside it may have.
    """
    processors = rapl_counters(folder)
    if device == "cpu":
        return processors
    if device.split(":")[0] != "cuda":
        return ()
    own = nvml_counter(int(device.partition(":")[2] or 0))
    return (*processors, own) if own is not None else ()


@final
class Meter:
    """Counts joules from when it is made until it is closed.

    Args:
        sources: What is summed; none at all counts nothing and says so.
        before: Joules of a run's earlier sessions; None: not known, and so neither is the sum.

    >>> reading = iter([1.0, 3.0, 3.5])
    >>> with Meter([Counter("package-0", read=lambda: next(reading))]) as meter:
    ...     meter.joules(), meter.joules()
    (2.0, 2.5)
    """

    def __init__(self, sources: Sequence[Counter], *, before: float | None = 0.0) -> None:
        self._sources, self._lock = tuple(sources), threading.Lock()
        self._sum = before if self._sources else None
        self._last = self._read()
        self._ended = threading.Event()
        if self._sum is not None:
            threading.Thread(target=self._poll, daemon=True).start()

    def _read(self) -> list[float]:
        try:
            return [source.read() for source in self._sources]
        except Exception:  # a counter that was there and is gone: what is not whole is not told
            self._sum = None
            return []

    def _poll(self) -> None:
        while not self._ended.wait(POLL):
            self.joules()

    def joules(self) -> float | None:
        """Joules so far; None where the machine does not say, now or in an earlier session of the run."""
        with self._lock:
            if self._sum is not None:
                now = self._read()
            if self._sum is not None:
                self._sum += sum(s.since(a, b) for s, a, b in zip(self._sources, self._last, now, strict=True))
                self._last = now
            return self._sum

    def close(self) -> None:
        """Stop counting."""
        self._ended.set()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
