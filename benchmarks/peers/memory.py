"""The most memory a command held, its child processes included."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import final

import psutil

__all__ = ["PeakMemory"]


@final
class PeakMemory:
    """Samples this process and its descendants while the ``with`` block runs.

    Proportional set sizes are summed, so that a page which several processes share counts once: summed
    resident sizes would charge a framework with many processes for the same libraries many times over.

    Attributes:
        mib: The largest sum seen, in MiB.
    """

    def __init__(self, every_s: float = 0.25) -> None:
        self.mib = 0
        self._every_s = every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended in between
                    continue
            self.mib = max(self.mib, total >> 20)
            if self._done.wait(self._every_s):
                return
