"""How a process ended, in words, and whether the system ended it for want of memory. Nothing here needs torch."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path

__all__ = ["STOPS", "ending", "final_code", "out_of_memory"]

STOPS = (signal.SIGTERM, signal.SIGINT)
"""Signals by which a person, or the system that starts a site, ends it."""

_SETTLED = (0, 2, 130, *(128 + number for number in STOPS))
"""Exit codes of an end that is meant: it has left, it has said what is wrong, or it was stopped."""


def final_code(code: int) -> int | None:
    """The exit code of a site whose worker ended so; None where the worker is to be started again.

    Args:
        code: Of the worker, as :class:`subprocess.Popen` has it: less than 0 for a signal.

    >>> final_code(2), final_code(-15), final_code(-9), final_code(1)
    (2, 143, None, None)
    """
    code = 128 - code if code < 0 else code
    return code if code in _SETTLED else None


def ending(code: int, lacks: str = "") -> str:
    """How it ended.

    Args:
        code: As in :func:`final_code`.
        lacks: Who was out of memory meanwhile; empty: nobody.

    >>> ending(-9, "the machine")
    'was ended by signal 9 (SIGKILL), as the machine was out of memory'
    >>> ending(1)
    'met a fault (exit code 1)'
    """
    if code >= 0:
        return f"met a fault (exit code {code})"
    try:
        name = f"{-code} ({signal.Signals(-code).name})"
    except ValueError:
        name = str(-code)
    why = f", as {lacks} was out of memory" if lacks and -code == signal.SIGKILL else ""
    return f"was ended by signal {name}{why}"


def out_of_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Mapping[str, int]:
    """How many processes the system has ended for want of memory, by who lacked it, as far as it can be read.

    What rose between two calls says why a process was killed in between: the kernel counts in a group's
    ``memory.events`` (or ``memory.oom_control``), and for all of the machine in ``vmstat``.

    Args:
        proc: The kernel's folder of processes.
        groups: Its folder of control groups.
    """
    found = dict[str, int]()
    for file in _group_files(proc, groups):
        if (count := _count(file)) is not None:
            found["the group of processes that it is in"] = count
            break
    if (count := _count(proc / "vmstat")) is not None:
        found["the machine"] = count
    return found


def _group_files(proc: Path, groups: Path) -> list[Path]:
    """Where the kernel counts for the control group of this process, in either version of these."""
    files = list[Path]()
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            files += [groups / path.lstrip("/") / "memory.events"]
        elif "memory" in controllers.split(","):
            top = groups / "memory"
            files += [top / path.lstrip("/") / "memory.oom_control", top / "memory.oom_control"]
    return files


def _count(file: Path) -> int | None:
    for line in _text(file).splitlines():
        name, _, number = line.partition(" ")
        if name == "oom_kill" and number.strip().isdigit():
            return int(number)
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
