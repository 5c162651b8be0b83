"""A node: a site over pipes, a process that reads questions as frames and writes answers as frames.

It knows nothing of the server but what it is asked. One thread reads, some answer, and the one that began trains.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from lichen.core.errors import LichenError, traceback_text
from lichen.core.wire.frames import pack_error, read_frame, write_frame
from lichen.engines.pipe_sites import FAILED, OK, REFUSED
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.worker import SiteWorker

__all__ = ["serve_frames"]

_AT_ONCE = 8
"""Questions that are answered side by side."""


def serve_frames(
    source: BinaryIO, sink: BinaryIO, worker: SiteWorker, *, answer: Callable[[str, bytes], bytes] | None = None
) -> None:
    """A node's life: answer every question that comes, until the stream ends, and do what is ordered meanwhile.

    Args:
        source: Where questions come from.
        sink: Where answers go.
        worker: Works in this thread.
        answer: Answers them; None: the worker does, whatever their length.

    Raises:
        LichenError: if what comes are no frames.
    """
    lock, faults, give = threading.Lock(), list[LichenError](), answer or Pieces(worker.answer).answer

    def reply(data: bytes) -> None:
        number, end = data[:8], 9 + data[8]
        try:
            state, body = OK, give(data[9:end].decode(errors="replace"), data[end:])
        except LichenError as error:
            state, body = REFUSED, pack_error(error)
        except Exception as error:
            print(traceback_text(error), file=sys.stderr, flush=True)
            fault = LichenError(f"a fault of the site: {type(error).__name__}", where="site")
            state, body = FAILED, pack_error(fault)
        try:
            with lock:
                write_frame(sink, b"!", number, state, body)
        except (OSError, ValueError):  # nobody reads any more
            worker.close()

    def read() -> None:
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                while (frame := read_frame(source)) is not None:
                    if frame[0] != b"?" or len(frame[1]) < 9:
                        raise LichenError(f"a frame {frame[0]!r} is no question", where="wire")
                    pool.submit(reply, frame[1])
                worker.close()
        except LichenError as error:
            faults.append(error)
        finally:
            worker.close()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    worker.work()
    reader.join()
    if faults:
        raise faults[0]
