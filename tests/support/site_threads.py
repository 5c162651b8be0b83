"""Sites in threads of this process, in place of the child processes of :mod:`lichen.recipes.sites.site_engines`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from lichen.core.errors import LichenError
from lichen.engines import spawned
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.worker import SiteWorker
from lichen.engines.sites import Seen, SiteError
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.sites import site_engines
from lichen.recipes.sites.node import node_worker


class ThreadSites:
    """As :class:`lichen.engines.pipe_sites.PipeSites`, given the commands that would start nodes."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self.commands = dict(commands)
        self.workers: dict[str, tuple[SiteWorker, threading.Thread]] = {}
        self.answers: dict[str, Pieces] = {}

    def start(self) -> None:
        for name, command in self.commands.items():
            if name not in self.workers:
                words = dict(pairwise(command))
                data = Path(words["--data"]) if "--data" in words else None
                worker = node_worker(recipe_of(Path(words["--recipe"])), Path(words["--state"]), data)
                self.workers[name] = worker, worker.start()
                self.answers[name] = Pieces(worker.answer)

    def seen(self) -> dict[str, Seen]:
        now = time.time()
        return {name: Seen(since=now, last=now, instance=one.instance) for name, (one, _) in self.workers.items()}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        try:
            return self.answers[site].answer(kind, body)
        except LichenError as error:
            raise SiteError(site, "refused", error) from None

    def close(self) -> None:
        for worker, thread in self.workers.values():
            worker.close()
            thread.join()
        self.workers = {}


@contextmanager
def sites_in_threads() -> Iterator[None]:
    """Let neither ``sites=...`` nor the engine ``spawned`` start a process."""
    with patch.object(site_engines, "PipeSites", ThreadSites), patch.object(spawned, "PipeSites", ThreadSites):
        yield
