"""A node of the small experiment whose client 1 lies as a setting says: ``python lying_node.py FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_message, unpack_message
from lichen.core.store import ClientStore
from lichen.core.wire.frames import Frame
from lichen.engines.node import serve_frames
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.recipes.assemble.parts import client_tasks
from support.lies import LIES
from support.small_experiment import experiment

BYTES = {
    "no bytes": lambda data: b"",
    "half of the bytes": lambda data: data[: len(data) // 2],
    "other bytes": lambda data: bytes(len(data)),
    "a flipped bit": lambda data: data[:-3] + bytes([data[-3] ^ 16]) + data[-2:],
}
"""Lies below messages."""

ALL = (*LIES, *BYTES)
"""Names of all lies; a job names one by its place here, counted from 1."""

LIAR = 1


def lied(job: Job, frames: Iterator[Frame]) -> Iterator[Frame]:
    """The frames of a client's job, with the lie that the job names."""
    lie = int(job.settings.get("lie", 0))
    for kind, data in frames:
        if kind != b"M" or not lie or job.clients != (LIAR,):
            yield kind, data
        elif (name := ALL[lie - 1]) in BYTES:
            yield kind, BYTES[name](data)
        else:
            for message in LIES[name](unpack_message(data)):
                try:
                    yield kind, pack_message(message)
                except (LichenError, RuntimeError, ValueError, IndexError):
                    yield kind, b"what cannot even be written"


def main(folder: Path) -> None:
    talks = Talks(client_tasks(experiment()), ClientStore(folder), around=lied)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    serve_frames(source, sink, SiteWorker(lambda rate: talks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
