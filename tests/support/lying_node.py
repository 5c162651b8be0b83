"""A node of the small experiment whose client 1 lies as a setting says: ``python lying_node.py FOLDER``."""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lichen.core.errors import LichenError
from lichen.core.message import pack_message, unpack_job, unpack_message
from lichen.core.store import ClientStore
from lichen.core.wire.frames import read_frame, write_frame
from lichen.engines.node import serve_frames
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


def main(folder: Path) -> None:
    tasks, store = client_tasks(experiment()), ClientStore(folder)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (frame := read_frame(source)) is not None:
        job = unpack_job(frame[1])
        asking, answering = io.BytesIO(), io.BytesIO()
        write_frame(asking, b"J", frame[1])
        asking.seek(0)
        serve_frames(asking, answering, tasks, store)
        answering.seek(0)
        name = ALL[int(job.settings.get("lie", 0)) - 1] if job.settings.get("lie", 0) else ""
        while (answer := read_frame(answering)) is not None:
            kind, data = answer
            if kind != b"M" or not name or job.clients != (LIAR,):
                write_frame(sink, kind, data)
            elif name in BYTES:
                write_frame(sink, kind, BYTES[name](data))
            else:
                for message in LIES[name](unpack_message(data)):
                    try:
                        write_frame(sink, kind, pack_message(message))
                    except (LichenError, RuntimeError, ValueError, IndexError):
                        write_frame(sink, kind, b"what cannot even be written")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
