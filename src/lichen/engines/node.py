"""A node: a process that reads jobs as frames and writes messages as frames.

It knows nothing of the server but the jobs it is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import BinaryIO

from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError, traceback_text
from lichen.core.machine import machine_fault
from lichen.core.message import unpack_job
from lichen.core.store import ClientStore
from lichen.core.wire.frames import pack_error, read_frame, write_frame
from lichen.core.wire.shared import Shared
from lichen.engines.node_talks import NodeTalks
from lichen.transforms.codec import Chain
from lichen.transforms.downlink_cache import SnapshotCache

__all__ = ["serve_frames"]


def serve_frames(
    source: BinaryIO,
    sink: BinaryIO,
    client_tasks: Mapping[str, ClientTask],
    store: ClientStore,
    *,
    base: str = "",
    device: str = "cpu",
    down: Chain | None = None,
    agreed: Shared | None = None,
) -> None:
    """A node's life: do every job that comes, until the stream ends. A job it cannot do does not end it.

    Jobs whose clients ask back lie open side by side; see :mod:`lichen.engines.node_talks`.

    Args:
        source: Where jobs come from.
        sink: Where messages go.
        client_tasks: What it can do.
        store: Private state of its clients.
        base: Digest of the frozen base it holds.
        device: Where its clients are trained.
        down: What the server codes the steps of its view with.
        agreed: Shared tensors that server and clients hold before the first job.
    """
    snapshots, talks = SnapshotCache(down, agreed), NodeTalks(client_tasks, store, base=base, device=device)
    while (frame := read_frame(source)) is not None:
        try:
            if frame[0] == b"A":
                frames = talks.answer(frame[1])
            else:
                talks.jobs += 1
                frames = talks.begin(snapshots.whole(unpack_job(frame[1])))
            for kind, body in frames:
                write_frame(sink, kind, body)
        except LichenError as error:
            write_frame(sink, b"E", pack_error(error))
        except OSError:
            raise
        except Exception as error:
            if (refused := machine_fault(error)) is not None:
                write_frame(sink, b"E", pack_error(refused))
                continue
            print(traceback_text(error), file=sys.stderr, flush=True)
            first = (str(error).splitlines() or [""])[0][:200]  # the server is not to read a row in it
            fault = LichenError(f"a fault of the node: {type(error).__name__}: {first}", where="node")
            write_frame(sink, b"E", pack_error(fault))
