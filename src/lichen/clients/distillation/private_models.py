"""FedMD's client: distils its own model from the mean predictions, then trains it on its own rows.

A private model is not sent, so neither should its first tensors be: :class:`LocalInit` gives every client
those it can make itself, and a job carries the answers alone. :class:`ConcatSource` is a source after a source;
with the public rows first and the client's own after them, one fold of
:class:`lichen.clients.training.train.Train` digests the answers and revisits the private rows, as FedMD does.
DS-FL is the same cycle, counted from another point.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Sohei Itahara, Takayuki Nishio, Yusuke Koda, Masahiro Morikura and Koji Yamamoto. "Distillation-Based
    Semi-Supervised Federated Learning for Communication-Efficient Collaborative Training with Non-IID
    Private Data." IEEE Transactions on Mobile Computing 22(1), 2023. https://arxiv.org/abs/2008.06180

Legend: C clients, N public rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import numpy as np

from lichen.clients.distillation.predict import Predict
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask, ClientWork, Costed, Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import EvalSource, Shard, TrainSource

__all__ = ["ConcatSource", "LocalInit", "asking", "private_client_tasks", "unlabelled", "with_answer_rows"]


@final
@dataclass(frozen=True, slots=True)
class LocalInit:
    """A work whose clients make the first shared tensors themselves; a job brings what is new.

    Args:
        inner: What is done.
        start: Tensors that stand in a job that lacks them, such as ``model.init(seed)``.
    """

    inner: ClientWork
    _: KW_ONLY
    start: Shared

    def expected(self, job: Job) -> Expected:
        """The work's, as if the job had brought ``start`` too."""
        return self.inner.expected(replace(job, shared=self.start | job.shared))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The work's state, as if the job had brought ``start`` too."""
        near = job.shared.device or next((x.device for x in (own_C or {}).values()), None)
        start = self.start if near is None else self.start.to(near)
        return self.inner.init(replace(job, shared=start | job.shared), clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """The work's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The work's."""
        return self.inner.final(state)


@final
@dataclass(frozen=True, slots=True)
class ConcatSource:
    """One source's batches after another's.

    Args:
        sources: In order; each draws from its own seed.

    Raises:
        LichenError: if there are none.
    """

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise LichenError("no source at all", where="source", fix="give at least one")

    def shape(self, client: int) -> Hashable:
        """All their shapes: clients must stand side by side in each."""
        return tuple(source.shape(client) for source in self.sources)

    def cost(self, client: int) -> int:
        """The sum of their costs; a source that tells none counts 1."""
        return sum(source.cost(client) if isinstance(source, Costed) else 1 for source in self.sources)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The first source's steps, then the next one's."""
        for place, source in enumerate(self.sources):
            yield from source.batches(clients, derive(seed, "turn", place))


def unlabelled(public: Shard) -> Shard:
    """The shard without its labels and answers, so that no label of a public row can teach by mistake."""
    return replace(public, labels=np.full(public.size, -100, np.int64), answer=None)


def with_answer_rows(public: Shard) -> Shard:
    """The unlabelled shard whose row i has the shared answers' row i."""
    return replace(unlabelled(public), answer=np.arange(public.size, dtype=np.int64))


def asking(own: TrainSource, public: Shard, clients: Sequence[int]) -> EvalSource:
    """Every public row once, for each of these clients, padded as their own rows are."""
    return EvalSource(
        dict.fromkeys(clients, unlabelled(public)),
        batch_size=max(32, own.batch_size),
        pad=own.pad,
        width_multiple=own.width_multiple,
        max_length=own.max_length,
    )


def private_client_tasks(
    arch: str,
    train: Train,
    *,
    start: Shared,
    own: TrainSource,
    public: Shard,
    clients: Sequence[int],
    digest_steps: int,
    revisit: bool = True,
    examples: Mapping[int, float] | None = None,
    counts: Mapping[int, Sequence[int]] | None = None,
    top_k: int | None = None,
) -> dict[str, ClientTask]:
    """What clients of one architecture can be asked to do by :class:`lichen.algorithms.exchange.PredictionExchange`.

    ``train/<arch>``, ``predict/<arch>`` and ``learn/<arch>``. Validation is the caller's: any work that
    judges the clients' own parameters, inside :class:`LocalInit`, as ``valid/<arch>``.

    Args:
        arch: Name of the architecture.
        train: Local training, ``personal``.
        start: Where these clients' models begin.
        own: The clients' labelled rows.
        public: Rows that every client holds; labels of theirs are not looked at.
        clients: Those of this architecture.
        digest_steps: Steps on public rows in a round, of as many rows as ``own`` takes.
        revisit: Go back to the own rows after them.
        examples: As in :class:`lichen.clients.distillation.predict.Predict`.
        counts: As there.
        top_k: As there.

    Raises:
        LichenError: if the training is not personal, or a number does not fit.
    """
    if not train.personal:
        raise LichenError("clients of unlike models send no tensors", where="train", fix="train with personal=True")
    if digest_steps < 1:
        raise LichenError(f"{digest_steps} steps", where="exchange.distill_steps", fix="use 1 or more")
    digest = replace(own, shards=dict.fromkeys(clients, with_answer_rows(public)), steps=digest_steps)
    learn: Source = ConcatSource((digest, own)) if revisit else digest
    predict = Predict(train.model, rows=public.size, personal=True, examples=examples, counts=counts, top_k=top_k)
    return {
        f"train/{arch}": ClientTask(work=LocalInit(train, start=start), source=own),
        f"learn/{arch}": ClientTask(work=LocalInit(train, start=start), source=learn),
        f"predict/{arch}": ClientTask(work=LocalInit(predict, start=start), source=asking(own, public, clients)),
    }
