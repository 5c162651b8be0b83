"""A site whose process ends each time that it does a job costs its clients the round, not everybody the run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import pytest

from lichen.core.message import Job
from lichen.core.wire.shared import Shared
from lichen.engines.federated import FederatedEngine
from lichen.engines.remote.pieces import Pieces
from lichen.engines.remote.requests import HAND, Fetched, Outcome, Work, pack_outcomes, unpack_values
from lichen.engines.remote.talks import error_frame
from lichen.engines.sites import Seen


class Ending:
    """A site whose process ends after each answer, and is another at the next; :class:`lichen.engines.sites.Sites`.

    Args:
        ends: How often; then it lives, and says of each client that it has worked for it.
    """

    def __init__(self, ends: int) -> None:
        self.ends, self.handed, self.starts = ends, list[list[int]](), itertools.count()
        self.instance, self.pieces = "0", Pieces(self._answer)
        self.outcomes: tuple[Outcome, ...] = ()

    def start(self) -> None:
        """Nothing: it is there."""

    def seen(self) -> Mapping[str, Seen]:
        return {"a": Seen(since=0.0, last=time.time(), instance=self.instance)}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        return self.pieces.answer(kind, body)

    def _answer(self, kind: str, body: bytes) -> bytes:
        values, _ = unpack_values(body)
        if kind == HAND:
            self.handed.append(values["clients"])
            clients = values["clients"] if self.ends == 0 else values["clients"][:1] if len(self.handed) == 1 else []
            done = error_frame(ValueError())
            self.outcomes = tuple(Outcome(at, values["order"], c, done) for at, c in enumerate(clients, start=1))
        elif self.ends:  # it ended since
            self.ends, self.instance, self.outcomes = self.ends - 1, str(next(self.starts) + 1), ()
        return pack_outcomes(Fetched(self.instance, self.outcomes, True, Work()))

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(("ends", "times", "why"), [(4, 5, "a fault of the node"), (9, 5, "has ended 5 times")])
def test_a_job_with_which_a_process_ends_again_and_again_is_given_up(ends: int, times: int, why: str) -> None:
    site = Ending(ends)
    with FederatedEngine(site, lambda client: "a") as engine:
        number = engine.submit(Job(work="train", shared=Shared(), version=0, clients=(1, 2, 3), seed=0))
        errors = {reply.clients[0]: str(reply.error) for reply in engine.replies([number], engine.now() + 30)}
    assert set(errors) == {1, 2, 3}
    assert "a fault of the node" in errors[1]
    assert why in errors[2]
    assert why in errors[3]
    assert site.handed == [[1, 2, 3], *[[2, 3]] * (times - 1)]
