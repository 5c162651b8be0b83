"""Counts the peak of live tensor bytes of a computation, the same on every run.

What the kernel says of a process depends on its allocator and on what else it has loaded. Here every tensor
that an operation makes is counted by its storage until the storage is gone, on the way forward, on the way
back and in the optimizer. What was there before, and what a kernel needs for itself, is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any, final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


@final
class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts inside a ``with``.

    Attributes:
        now: Bytes made inside that are still alive.
        peak: The most there were.

    >>> import torch
    >>> with LiveBytes() as live:
    ...     x = torch.zeros(256)  # 1,024 bytes
    ...     y = (x + 1).sum()  # as many for the sum's terms, and 4
    >>> live.now, live.peak
    (1028, 2052)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._meet(x, made=False)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._meet(x, made=True)
        self.peak = max(self.peak, self.now)
        return out

    def _meet(self, x: Tensor, *, made: bool) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key in self._known:
            return
        self.now += size

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
