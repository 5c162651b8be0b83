"""Searches a discrete prompt by the cross-entropy method: losses alone, no gradient.

Research: no recipe and no public name reaches this module.

Each client draws ``samples`` prompts from the shared distribution, asks for each one's loss on its own
rows, and moves the probabilities towards how often the ``elite`` best use each word. On a batch::

    p ← (1 − rate) · p + rate · frequency in the elite

What leaves is the change of p. It sums over clients, so plain averaging
(:class:`lichen.server.mean.Mean`) is the server, with all its transforms. Texts are all that a model is
asked, so this works through any endpoint.

References:
    Shumeet Baluja. "Population-Based Incremental Learning: A Method for Integrating Genetic Search Based
    Function Optimization and Competitive Learning." Technical Report CMU-CS-94-163, 1994. (the rule)
    Reuven Y. Rubinstein. "The Cross-Entropy Method for Combinatorial and Continuous Optimization."
    Methodology and Computing in Applied Probability 1, 1999. https://doi.org/10.1023/A:1010091220143
    (the elite's frequencies; ``rate = 1``)
    Jiaqi Wu, Simin Chen, Yuzhe Yang, Yijiang Li, Shiyue Hou, Rui Jing, Zehua Wang, Wei Chen and Zijian
    Tian. "FedDTPT: Federated Discrete and Transferable Prompt Tuning for Black-Box Large Language Models."
    2024. https://arxiv.org/abs/2411.00985 (the setting: discrete prompts, federated, by an API's answers)

Legend: C clients, S samples, L positions of the prompt, V candidates of a position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from lichen.clients.training.training_sums import tokens_seen_C, training_expected, training_metrics
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, specs_of
from lichen.core.message import Job, Message
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree

__all__ = ["TokenSearch"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSearchState:
    """A block of clients in the middle of their search.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        choice_CLV: Each client's distribution now, float32.
        fixed: Shared tensors without client axis.
        steps: Batches so far.
        sums: ``(C,)`` float64 ``loss_sum``, ``count``, ``tokens``, ``failed``.
    """

    job: Job
    clients: tuple[int, ...]
    choice_CLV: Tensor
    fixed: Tree
    steps: int
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class TokenSearch:
    """The search as a client work.

    Args:
        model: Any cohort model with the one trainable tensor ``choice`` ``(L, V)``, rows summing to one,
            such as :class:`lichen.research.prompts.word_prompt.WordPrompt`; one-hot rows name a prompt.
        samples: S, prompts asked on a batch.
        elite: How many of them are followed.
        rate: How far, in (0, 1].
        explore: Share of uniform choices in a draw, so that no word is lost for good.

    Raises:
        LichenError: if a value is out of range.
    """

    model: CohortModel
    _: KW_ONLY
    samples: int = 8
    elite: int = 2
    rate: float = 0.3
    explore: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.elite < self.samples:
            raise LichenError(
                f"an elite of {self.elite} in {self.samples}",
                where="token_search.elite",
                fix="use 1 <= elite < samples",
            )
        if not (0 < self.rate <= 1 and 0 <= self.explore < 1):
            raise LichenError("is out of range", where="token_search.rate", fix="use 0 < rate <= 1, 0 <= explore < 1")

    def expected(self, job: Job) -> Expected:
        """The change of the distribution."""
        expected = training_expected(self.model, specs_of(job.shared.trainable))
        return replace(expected, metrics={name: x for name, x in expected.metrics.items() if name != "steps"})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> TokenSearchState:
        """Clients at the shared distribution.

        Raises:
            LichenError: if the shared tensors are none.
        """
        del own_C
        trainable, fixed = job.shared.trainable, job.shared.fixed
        if trainable.keys() != {"choice"} or trainable["choice"].dim() != 2:
            raise LichenError(
                f"expected choice (L, V), got {sorted(trainable)}", where="job.shared", fix="search a prompt of words"
            )
        names = ("loss_sum", "count", "tokens", "failed")
        return TokenSearchState(
            job=job,
            clients=tuple(clients),
            choice_CLV=trees.broadcast({"choice": trainable["choice"].cpu()}, len(clients))["choice"],
            fixed=fixed,
            steps=0,
            sums={name: torch.zeros(len(clients), dtype=torch.float64) for name in names},
        )

    def step(self, state: TokenSearchState, batch: Batch) -> TokenSearchState:
        """Every active client draws, asks and moves once."""
        tokens_C = tokens_seen_C(batch)
        choice_CLV = state.choice_CLV.clone()
        sums = {name: x.clone() for name, x in state.sums.items()}
        for c in (c for c, active in enumerate(batch["active_C"].tolist()) if active):
            alone = {name: x[c : c + 1] for name, x in batch.items()}
            sampled_SL = self._draw(choice_CLV[c], state.job.seed, state.clients[c], state.steps)
            hot_SLV = functional.one_hot(sampled_SL, choice_CLV.shape[-1]).float()
            known: dict[tuple[int, ...], tuple[float, int]] = {}
            for s, words in enumerate(map(tuple, sampled_SL.tolist())):
                if words not in known:  # a prompt drawn twice is asked once
                    with torch.no_grad():
                        loss_C, count_C = self.model.loss({"choice": hot_SLV[s : s + 1]}, state.fixed, alone)
                    known[words] = float(loss_C[0]), int(count_C[0])
            losses = [known[words][0] for words in map(tuple, sampled_SL.tolist())]
            count = next(iter(known.values()))[1]
            if not all(map(math.isfinite, losses)):
                sums["failed"][c] = 1.0
                continue
            best = sorted(range(self.samples), key=lambda s: (losses[s], s))[: self.elite]
            choice_CLV[c] = (1 - self.rate) * choice_CLV[c] + self.rate * hot_SLV[best].mean(0)
            sums["loss_sum"][c] += sum(losses) / self.samples
            sums["count"][c] += count
            sums["tokens"][c] += int(tokens_C[c]) * len(known)
        return replace(state, choice_CLV=choice_CLV, steps=state.steps + 1, sums=sums)

    def _draw(self, choice_LV: Tensor, seed: int, client: int, step: int) -> Tensor:
        """``(S, L)`` int64 candidates."""
        uniform_SL = torch.from_numpy(
            numpy_generator(seed, client, "words", step).random((self.samples, choice_LV.shape[0]))
        )
        p_LV = choice_LV.double().clamp(min=0)
        p_LV = (1 - self.explore) * p_LV / p_LV.sum(1, keepdim=True) + self.explore / p_LV.shape[1]
        sampled_LS = torch.searchsorted(p_LV.cumsum(1), uniform_SL.T.contiguous(), right=True)
        return sampled_LS.T.clamp(max=choice_LV.shape[1] - 1)

    def final(self, state: TokenSearchState) -> tuple[Message, Tree | None]:
        """The change of the distribution; a client that met a loss that is no number weighs nothing."""
        finite_C = state.sums["failed"] == 0
        delta_CLV = state.choice_CLV - state.job.shared.trainable["choice"].cpu()
        sums = {name: torch.where(finite_C, x, 0.0) for name, x in state.sums.items()}
        sums["failed"] = (~finite_C).double()
        message = Message(
            group=self.model.group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={"choice": torch.where(finite_C[:, None, None], delta_CLV, 0.0)},
            weight_C=sums["count"],
            metrics=training_metrics(self.model, sums),
        )
        return message, None
