"""Writes rows of numbers to a temporary file without a name, and reads back stretches of them.

The file has no name from the start, or loses it at once, so that nothing is left of it when its last row is forgotten
or the process ends, however it ends. It lies where :mod:`tempfile` puts files: set ``TMPDIR`` to a disk that has room.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["Spill", "SpilledRow"]


@final
class Spill:
    """A file to which rows are appended; what was written never changes, so any number of totals may share it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="lichen-rows-", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()
        self._end = 0

    def write(self, x_N: Tensor) -> SpilledRow:
        """Append a row.

        Raises:
            LichenError: if the disk takes no more.
        """
        data = x_N.contiguous().numpy().data.cast("B")
        with self._lock:
            start, self._end = self._end, self._end + len(data)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], start + done)
        except OSError as error:
            raise LichenError(
                f"the clients' rows do not fit on the disk: {error.strerror}",
                where=tempfile.gettempdir(),
                fix="let TMPDIR name a disk with more room, or invite fewer clients",
            ) from error
        return SpilledRow(spill=self, start=start, size=len(x_N), dtype=x_N.dtype)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill ``out`` with the bytes from ``start`` on.

        Raises:
            LichenError: if the file is shorter.
        """
        data = out.data.cast("B")
        done = 0
        while done < len(data):
            got = os.preadv(self._file.fileno(), [data[done:]], start + done)
            if not got:
                raise LichenError("the file of the clients' rows is cut short", where=tempfile.gettempdir())
            done += got


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpilledRow:
    """Where a row lies in a file.

    Attributes:
        spill: The file.
        start: Its first byte.
        size: How many numbers.
        dtype: Their type.
    """

    spill: Spill
    start: int
    size: int
    dtype: torch.dtype

    def part(self, first: int, last: int) -> Tensor:
        """The numbers from ``first`` up to ``last``, read into new memory."""
        x = torch.empty(last - first, dtype=self.dtype)
        self.spill.read(self.start + first * self.dtype.itemsize, x.numpy())
        return x
