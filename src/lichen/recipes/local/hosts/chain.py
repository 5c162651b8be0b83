"""Asks hosts one after another for the next token: what one gives goes to the next, and the last gives logits.

All of it walks through whoever asks, as in training over hosts. A host that has ended is started again, and the text
goes through all of them anew: none keeps anything that cannot be made again.

Legend: T tokens so far, t of them new, V tokens of a vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

import psutil
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.wire.answer import pack_answer, unpack_answer
from lichen.engines.pipe_sites import PipeSites
from lichen.engines.remote.pieces import ask_long
from lichen.engines.sites import SiteError, Sites
from lichen.recipes.local.hosts.piece_process import NEXT

__all__ = ["Chain", "host_processes", "resident_bytes"]

_WITHIN = 300.0
"""Seconds for one answer; the first one waits until the piece is loaded."""


@contextmanager
def host_processes(folder: Path, hosts: int) -> Iterator[PipeSites]:
    """Processes with a piece of a run's model each; they end with this.

    Args:
        folder: The finished run's.
        hosts: How many.
    """
    words = (sys.executable, "-m", "lichen", "piece", str(folder), "--hosts", str(hosts), "--host")
    sites = PipeSites({str(host): (*words, str(host)) for host in range(hosts)})
    try:
        sites.start()
        yield sites
    finally:
        sites.close()


def resident_bytes(sites: PipeSites) -> list[int]:
    """Memory of each host's process, as the system counts it."""
    return [int(psutil.Process(child.process.pid).memory_info().rss) for child in sites.children.values()]


@final
class Chain:
    """The next token's logits of a text that goes through all hosts; a ``NextLogits`` of the bare or tuned model.

    Args:
        sites: The hosts, by their numbers as names.
        hosts: How many.
        tuned: With what the run learned.
        delay: Seconds that a question to a host and its answer are on their way, beside what they take here.
    """

    def __init__(self, sites: Sites, hosts: int, *, tuned: bool, delay: float = 0.0) -> None:
        self._sites, self._hosts, self._tuned, self._delay = sites, hosts, tuned, delay
        self._seen: list[int] = []

    def __call__(self, ids: Sequence[int], /) -> Tensor:
        """``(V,)`` float32.

        Raises:
            LichenError: if a host does not answer, nor the one that is started in its place.
        """
        whole, known = list(ids), len(self._seen)
        if known >= len(whole) or whole[:known] != self._seen:
            known = 0
        try:
            logits_V = self._through(whole, known)
        except SiteError as error:
            if error.cause != "gone":
                raise self._named(error) from None
            self._sites.start()
            try:
                logits_V = self._through(whole, 0)
            except SiteError as again:
                raise self._named(again) from None
        self._seen = whole
        return logits_V

    def _through(self, whole: list[int], known: int) -> Tensor:
        self._seen = []
        entry = torch.tensor([whole[known:]])
        about = {"known": torch.tensor(known), "tuned": torch.tensor(self._tuned)}
        for host in range(self._hosts):
            if self._delay:
                time.sleep(self._delay)
            body = pack_answer(1, {"entry": entry, **about})
            _, tree = unpack_answer(ask_long(self._sites, str(host), NEXT, body, _WITHIN))
            if tree is None or tree.keys() != {"out"}:
                raise LichenError("answers with something else", where=f"host {host}")
            entry = tree["out"]
        return entry[0, -1].float()

    def _named(self, error: SiteError) -> LichenError:
        return LichenError(error.error.what, where=f"host {error.site}", fix=error.error.fix)
