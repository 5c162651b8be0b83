"""Rows with what a reference says of each: its log-probability, which was computed once and stays with the client.

Legend: C clients, B rows of a batch, N rows of a client.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.tree import to_device
from lichen.core.wire.shared import Shared

__all__ = ["Referenced", "reference_scores"]


@final
@dataclass(frozen=True, slots=True)
class Referenced:
    """Another source, whose batches also have ``reference_CB``: the score of each row, 0 where there is none.

    Args:
        inner: Gives the rows.
        scores: From a client to the scores of its rows ``(N,)``, by their position in its shard.
    """

    inner: Source
    scores: Callable[[int], Tensor]

    def shape(self, client: int) -> Hashable:
        """As the inner one."""
        return self.inner.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The inner one's, with the scores.

        Raises:
            LichenError: if a batch does not say which rows it has.
        """
        own = [self.scores(client) for client in clients]
        for batch in self.inner.batches(clients, seed):
            if "index_CB" not in batch:
                raise LichenError("a batch does not say which rows it has", where="source")
            index_CB = batch["index_CB"]
            rows = [
                torch.where(index_B >= 0, score_N[index_B.clamp(min=0)], torch.zeros(()))
                for score_N, index_B in zip(own, index_CB, strict=True)
            ]
            yield {**batch, "reference_CB": torch.stack(rows)}


def reference_scores(
    model: CohortModel, shared: Shared, source: Source, client: int, *, rows: int, device: str = "cpu"
) -> Tensor:
    """``(N,)`` float32: the log-probability of each of a client's rows by a model; 0 of a row without a label.

    Args:
        model: Whose loss is a sum of rows' negative log-likelihoods.
        shared: Its tensors.
        source: Gives each row once.
        client: Whose rows.
        rows: N.
        device: Where it is computed.
    """
    score_N = torch.zeros(rows)
    params_C, fixed = (to_device(tree, device) for tree in (trees.expand(shared.trainable, 1), shared.fixed))
    with torch.no_grad():
        for batch in source.batches((client,), 0):
            nll_CB, _ = model.losses(params_C, fixed, batch)
            index_B = batch["index_CB"][0]
            score_N[index_B[index_B >= 0]] = -nll_CB[0].float().cpu()[index_B >= 0]
    return score_N
