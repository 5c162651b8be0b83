"""Checks synthetic texts against a client's private rows; one bit a candidate leaves.

The job's texts are the candidates. Every client holds them against its own rows
(:class:`lichen.data.synthetic.near_duplicates.NearDuplicates`, and embeddings where there is an encoder) and sends one
bit each; no text goes up. The bits are summed by any exact sum, such as :class:`lichen.server.mean.Mean` weighted
uniformly, and the server drops what anybody flagged (:func:`flags`). Under secure aggregation it learns
how many flagged a candidate and not who.

Chance grows with the rows that are asked. Of real clothing reviews by others, 1.2 % share eight words in a
row, or nearly, with one of 1,000 rows, and 20 % with one of 22,000; with ``run=12, share=0.5`` 0.1 % and 1.2 %,
and copies cut to fewer words than that are missed. Choose by what a false alarm costs: one text.

The bits themselves tell that somebody holds a near copy of the candidate, and whoever may choose the
candidates can ask for anything. So this is a guard against accidents and no private mechanism: where
differential privacy is promised, either what the foundation model wrote never depended on private rows but
through noised votes, and then nothing needs to be asked; or the bits must be noised and accounted for.

References:
    Katherine Lee, Daphne Ippolito, Andrew Nystrom, Chiyuan Zhang, Douglas Eck, Chris Callison-Burch and
    Nicholas Carlini. "Deduplicating Training Data Makes Language Models Better." ACL 2022.
    https://arxiv.org/abs/2107.06499
    Nicholas Carlini et al. "Extracting Training Data from Large Language Models." USENIX Security 2021.
    https://arxiv.org/abs/2012.07805

Legend: C clients, M candidates, H width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, MetricSpec, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.data.synthetic.near_duplicates import NearDuplicates, close_M

__all__ = ["Leakage", "flags"]

_Find = Callable[[Sequence[str]], NearDuplicates]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageState:
    """The candidates and who is asked."""

    job: Job
    clients: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Leakage:
    """One bit a candidate as a client work; serve it with
    :class:`lichen.clients.distillation.teacher_labels.NoBatches`.

    Args:
        rows: Private texts of a client: on a real node its own, whatever the number.
        copies: Makes ready what candidates are held against.
        embed: Embeddings ``(N, H)`` of some texts, by a model that runs where the rows are; None: words alone.
        cosine: From which a candidate's embedding is too close to a row's.

    Raises:
        LichenError: if the cosine is out of range.
    """

    rows: Callable[[int], Sequence[str]]
    _: KW_ONLY
    copies: _Find = field(default=NearDuplicates)
    embed: Callable[[Sequence[str]], Tensor] | None = None
    cosine: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.cosine <= 1:
            raise LichenError(
                f"{self.cosine} is out of range", where="leakage.cosine", fix="use a number above 0, at most 1"
            )

    def expected(self, job: Job) -> Expected:
        """A bit for each candidate."""
        texts = len(job.texts)
        return Expected(
            group=f"leakage/{texts}",
            tensors={"flagged": TensorSpec((texts,), torch.uint8)},
            metrics={"count": MetricSpec(texts, texts)},
            weight=(1.0, 1.0),
        )

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> LeakageState:
        """The question.

        Raises:
            LichenError: if there is no candidate.
        """
        if not job.texts:
            raise LichenError("no candidates", where="leakage", fix="send the texts to be checked in the job")
        return LeakageState(job=job, clients=tuple(clients))

    def step(self, state: LeakageState, batch: Batch) -> LeakageState:
        """Texts are not batched."""
        return state

    def final(self, state: LeakageState) -> tuple[Message, Tree | None]:
        """``flagged`` ``(C, M)`` uint8, every client of weight 1."""
        flagged_CM = torch.stack([self._flagged(state.job.texts, client) for client in state.clients])
        one_C = torch.ones(len(state.clients), dtype=torch.float64)
        message = Message(
            group=f"leakage/{len(state.job.texts)}",
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={"flagged": flagged_CM},
            weight_C=one_C,
            metrics={"count": one_C * len(state.job.texts)},
        )
        return message, None

    def _flagged(self, candidates: Sequence[str], client: int) -> Tensor:
        rows = self.rows(client)
        flagged_M = torch.tensor([bool(reason) for reason in self.copies(rows).found(candidates)])
        if self.embed is not None and rows:
            flagged_M = flagged_M | close_M(self.embed(candidates), self.embed(rows), cosine=self.cosine)
        return flagged_M.to(torch.uint8)


def flags(change: Tree) -> tuple[bool, ...]:
    """Which candidates anybody flagged, from the sum or the mean of the clients' bits.

    It is exact for up to a trillion clients: a mean of bits is 0 only where every bit is.

    Raises:
        LichenError: if these are not the bits' sum.
    """
    if change.keys() != {"flagged"} or change["flagged"].dim() != 1:
        raise LichenError("these are not flags", where="leakage", fix="close the sum of the messages of Leakage")
    return tuple((change["flagged"] > 0).tolist())
