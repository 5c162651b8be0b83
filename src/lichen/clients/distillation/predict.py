"""Predicts public rows with a client's own model, for methods that share predictions instead of weights.

Two networks of different shapes have no weights to average, yet both answer the same rows with the same
K numbers. A client runs its model over a shard that everybody holds and sends, row by row in the shard's
order, what its model makes of each: log-probabilities in two bytes, or the ``top_k`` classes and their
probabilities. Nothing in a message tells which network gave it, so the group is the same for all.

What leaves says something of the rows a model was trained on, though less than its weights do: answers
can be tested for membership as weights can. ``counts``, where given, tell how many rows of each class a
client holds.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Sohei Itahara, Takayuki Nishio, Yusuke Koda, Masahiro Morikura and Koji Yamamoto. "Distillation-Based
    Semi-Supervised Federated Learning for Communication-Efficient Collaborative Training with Non-IID
    Private Data." IEEE Transactions on Mobile Computing 22(1), 2023. https://arxiv.org/abs/2008.06180

Legend: C clients, N public rows, B rows of a batch, K classes, k answers kept of each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import FAILED, Expected, MetricSpec, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.parameters import personal_C
from lichen.core.tree import Tree

__all__ = ["Predict"]

Given = TypeVar("Given")

LEAST = -60000.0
"""Smallest log-probability sent, which float16 still holds."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PredictState:
    """A block of clients part way through the public rows.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        params_C: Who answers.
        fixed: Shared tensors without client axis.
        knows: Whether these clients have trained anything yet.
        parts: ``(index_CB, logp_CBK)`` of the batches so far; the index is -1 for padding.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    fixed: Tree
    knows: bool
    parts: tuple[tuple[Tensor, Tensor], ...]


@final
@dataclass(frozen=True, slots=True)
class Predict:
    """Answers to a public shard as a client work; its source is that shard, once, for every client.

    Args:
        model: A classifier that runs C clients at once.
        rows: N, rows of the public shard.
        personal: Each client answers with its own parameters; one that has none yet weighs nothing.
        use_best: With ``personal``: with its best ones so far, where it has kept some.
        top_k: Send the k likeliest classes alone; None: all K log-probabilities.
        examples: What each client weighs; None: every client 1.
        counts: Labelled rows of every class, by client: sent as ``n``, and the client weighs their sum.

    Raises:
        LichenError: if the model is no classifier, or a number is out of range.
    """

    model: CohortModel
    _: KW_ONLY
    rows: int
    personal: bool = False
    use_best: bool = False
    top_k: int | None = None
    examples: Mapping[int, float] | None = None
    counts: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.model.classes is None:
            raise LichenError("a language model answers no classes", where="predict.model", fix="use a classifier")
        if self.rows < 1:
            raise LichenError(f"{self.rows} public rows", where="predict.rows", fix="give the public shard's size")
        if self.top_k is not None and not 1 <= self.top_k <= self.model.classes:
            raise LichenError(
                f"{self.top_k} of {self.model.classes} classes", where="predict.top_k", fix="use 1 to the class count"
            )

    def expected(self, job: Job) -> Expected:
        """As many answers as there are public rows."""
        classes = int(self.model.classes or 0)
        tensors = {"logits": TensorSpec((self.rows, classes), torch.float16)}
        if self.top_k is not None:
            shape = (self.rows, self.top_k)
            tensors = {"index": TensorSpec(shape, _narrow(classes)), "prob": TensorSpec(shape, torch.float16)}
        if self.counts is not None:
            tensors["n"] = TensorSpec((classes,), torch.float64)
        return Expected(
            group=self._group,
            tensors=tensors,
            metrics={"count": MetricSpec(self.rows, self.rows), "failed": FAILED},
            weight=(0.0, 1.0 if self.counts is None and self.examples is None else math.inf),
        )

    @property
    def _group(self) -> str:
        return f"answers/{self.rows}/{self.model.classes}" + ("" if self.top_k is None else f"/{self.top_k}")

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> PredictState:
        """The models that answer, and no answer yet."""
        trainable, fixed = job.shared.trainable, job.shared.fixed
        mine = own_C if self.personal else None
        return PredictState(
            job=job,
            clients=tuple(clients),
            params_C=personal_C(trainable, mine, len(clients), use_best=self.use_best),
            fixed=fixed,
            knows=not self.personal or any(name.startswith("params/") for name in mine or ()),
            parts=(),
        )

    def step(self, state: PredictState, batch: Batch) -> PredictState:
        """One more batch answered."""
        with torch.no_grad():
            logits_CBK = self.model.logits(state.params_C, state.fixed, batch).float()
            # Client by client: a kernel may take the tail of a stack in other code than its body.
            logp_CBK = torch.stack([logits_BK.log_softmax(-1) for logits_BK in logits_CBK]).cpu()
        index_CB = batch["index_CB"].cpu().masked_fill(~batch["active_C"].cpu()[:, None], -1)
        return replace(state, parts=(*state.parts, (index_CB, logp_CBK)))

    def final(self, state: PredictState) -> tuple[Message, Tree | None]:
        """``logits`` ``(C, N, K)`` float16, or with ``top_k`` ``index`` and ``prob`` ``(C, N, k)``, and perhaps ``n``.

        A client whose answers are not finite sends zeros, weight 0 and ``failed`` = 1.

        Raises:
            LichenError: if the source did not bring every one of the N rows.
        """
        classes = self.model.classes
        assert classes is not None
        logp_CNK = torch.zeros(len(state.clients), self.rows, classes)
        seen_CN = torch.zeros(len(state.clients), self.rows, dtype=torch.bool)
        for index_CB, logp_CBK in state.parts:
            for c, (index_B, logp_BK) in enumerate(zip(index_CB, logp_CBK, strict=True)):
                real_B = index_B >= 0
                if bool((index_B >= self.rows).any()):
                    raise self._misfit(int(index_B.max()) + 1)
                logp_CNK[c, index_B[real_B]] = logp_BK[real_B]
                seen_CN[c, index_B[real_B]] = True
        if not bool(seen_CN.all()):
            raise self._misfit(int(seen_CN.sum(1).min()))
        finite_C = ~logp_CNK.isnan().flatten(1).any(1)
        logp_CNK = torch.where(finite_C[:, None, None], logp_CNK, torch.zeros_like(logp_CNK)).clamp(min=LEAST)
        weight_C = self._weights(state.clients) * finite_C * state.knows
        one_C = torch.ones(len(state.clients), dtype=torch.float64)
        message = Message(
            group=self._group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors=self._upload(logp_CNK, state.clients),
            weight_C=weight_C,
            metrics={"count": one_C * self.rows, "failed": (~finite_C).double()},
        )
        return message, None

    def _upload(self, logp_CNK: Tensor, clients: Sequence[int]) -> Tree:
        tensors: Tree = {"logits": logp_CNK.half()}
        if self.top_k is not None:
            prob_CNK, index_CNK = logp_CNK.exp().sort(dim=-1, descending=True, stable=True)
            tensors = {
                "index": index_CNK[..., : self.top_k].to(_narrow(logp_CNK.shape[-1])).contiguous(),
                "prob": prob_CNK[..., : self.top_k].half().contiguous(),
            }
        if self.counts is not None:
            tensors["n"] = torch.tensor([list(_of(self.counts, c, "counts")) for c in clients], dtype=torch.float64)
        return tensors

    def _weights(self, clients: Sequence[int]) -> Tensor:
        if self.counts is not None:
            weights = [float(sum(_of(self.counts, c, "counts"))) for c in clients]
        elif self.examples is not None:
            weights = [float(_of(self.examples, c, "examples")) for c in clients]
        else:
            weights = [1.0] * len(clients)
        return torch.tensor(weights, dtype=torch.float64)

    def _misfit(self, rows: int) -> LichenError:
        return LichenError(
            f"the public shard has {rows} rows where {self.rows} are answered",
            where="predict.rows",
            fix="give every client the same public rows, each of them once",
        )


def _narrow(classes: int) -> torch.dtype:
    return torch.int8 if classes <= 128 else torch.int16


def _of(by_client: Mapping[int, Given], client: int, what: str) -> Given:
    if client not in by_client:
        raise LichenError(f"client {client} is not named", where=f"predict.{what}", fix="name every client")
    return by_client[client]
