"""A site for the conformance suite: echoes, declines and faults by kind, and trains what it is handed, counting it.

``<state>/trained.log`` in its folder gets a line ``<version> <client>`` for every training. A job's setting ``slow`` is
how many seconds each client sleeps before; while there is a file ``pause`` in the site's folder, none begins to train.
As a program: ``python counting_site.py FOLDER``, over pipes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.wire.frames import Frame
from lichen.engines.node import serve_frames
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from support import compressed_run
from support.small_experiment import experiment

RECIPE = "5" * 64
LOG = "trained.log"
PAUSE = "pause"


class Site:
    """What a transport asks: ``answer(kind, body)``, in any thread; ``work`` is called in one, until ``close``."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.made = folder, experiment(6)
        self.worker = SiteWorker(self.talks, recipe=RECIPE)
        self.jobs, self.long = Pieces(self.worker.answer), Pieces(lambda kind, body: body)

    def talks(self, state: str) -> Talks:
        def counted(job: Job, frames: Iterator[Frame]) -> Iterator[Frame]:
            (self.folder / state).mkdir(exist_ok=True)
            if job.work.startswith("train"):
                with open(self.folder / state / LOG, "a", encoding="utf-8") as log:
                    log.write(f"{job.version} {job.clients[0]}\n")
            time.sleep(job.settings.get("slow", 0.0))
            while (self.folder / PAUSE).exists() and job.work.startswith("train"):
                time.sleep(0.01)
            return frames

        store = ClientStore(self.folder / state)
        tasks = compressed_run.coded(self.made)
        return Talks(tasks, store, down=compressed_run.DOWN, agreed=self.made.start, around=counted)

    def answer(self, kind: str, body: bytes) -> bytes:
        if kind == "echo":
            return body
        if kind in ("long", "put", "get"):
            return self.long.answer(kind, body)
        if kind == "decline":
            raise LichenError("not today", where="door", fix="come tomorrow")
        if kind == "fault":
            raise ZeroDivisionError("by a row's value")
        return self.jobs.answer(kind, body)

    def work(self) -> None:
        self.worker.work()

    def close(self) -> None:
        self.worker.close()


def trained(folder: Path) -> list[str]:
    """The lines of the log in the folder of a private state."""
    path = folder / LOG
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    site = Site(Path(sys.argv[1]))
    serve_frames(source, sink, site.worker, answer=site.answer)
