"""SemiFL's clients: pseudo-labels of the model as received, consistency on sure rows, and mixup with any.

A client of SemiFL has no labels. Before its first step the model as it came down looks at all of the client's rows, in
a weak view, and labels them. Rows whose likeliest class has at least ``threshold`` are the *fix* data; the *mix* data
are as many rows drawn with replacement from all. These labels stay for the round. A step on n rows of each, x_f with
label y_f and x_m with label y_m, takes the gradient of

    mean CE(strong(x_f), y_f) + weight * mean [share CE(x, y_f) + (1 - share) CE(x, y_m)]
    x = share weak(x_f) + (1 - share) weak(x_m),  share ~ Beta(a, a), one for each step of a client

Tokens have no such sum. There x is mixed before the last layer, as Guo et al. do with sentences; this layer is linear,
so that logits are mixed. A client that is sure of no row does not step. What SemiFL's server does is
:mod:`lichen.algorithms.semi`.

References:
    Enmao Diao, Jie Ding and Vahid Tarokh. "SemiFL: Semi-Supervised Federated Learning for Unlabeled
    Clients with Alternate Training." NeurIPS 2022. https://arxiv.org/abs/2106.01432
    Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin and David Lopez-Paz. "mixup: Beyond Empirical Risk
    Minimization." ICLR 2018. https://arxiv.org/abs/1710.09412
    Hongyu Guo, Yongyi Mao and Richong Zhang. "Augmenting Data with Mixup for Sentence Classification: An
    Empirical Study." 2019. https://arxiv.org/abs/1905.08941

Legend: C clients, B rows of a step, K classes, R rows of a client's shard, F of them sure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lichen.clients.training.soft_targets import TargetLoss, pseudo_labels_CB
from lichen.clients.training.train import Train, TrainState
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree
from lichen.data.batches.augment import Kind, Views
from lichen.data.batches.scarce_labels import ScarceLabels

__all__ = ["FixAndMix"]

_INPUTS = ("x_CBF", "input_ids_CBT", "attention_mask_CBT")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """What one client's rows were found to be.

    Attributes:
        label_R: A class for each unlabelled row, by its number in the shard.
        sure: The fix data: ``index_F``, and the rows' inputs by their names in a batch.
    """

    label_R: Tensor
    sure: Tree


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FixAndMixState:
    """The wrapped state, steps done, and the pseudo-labels.

    Attributes:
        inner: The training's.
        step: Steps so far.
        found: For each client of the block.
        sums: ``(C,)`` float64: ``unlabelled`` rows, and how many of them got a ``pseudo`` label.
    """

    inner: TrainState
    step: int
    found: tuple[Labelled, ...]
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class FixAndMix:
    """Training of a client without labels on what the model it received is sure of.

    Batches are the mix data. What a client's weight counts as an example is a row of the fix data.

    Args:
        inner: How a step is taken.
        views: Makes weak and strong views.
        rows: The clients' rows, drawn with replacement; the source of this work's batches.
        threshold: How likely a class must be.
        weight: λ of the mixed rows' loss.
        mixup: a of Beta(a, a).

    Raises:
        LichenError: if a value is out of range, or the model is no classifier.
    """

    inner: Train
    views: Views
    rows: ScarceLabels
    _: KW_ONLY
    threshold: float = 0.95
    weight: float = 1.0
    mixup: float = 0.75

    def __post_init__(self) -> None:
        if self.inner.model.classes is None:
            raise LichenError("a language model has no class to be sure of", where="semi", fix="use task: classify")
        if not 0 <= self.threshold <= 1:
            raise LichenError(f"{self.threshold} is no probability", where="semi.threshold", fix="use 0.8 to 0.95")
        for name in ("weight", "mixup"):
            if not 0 < getattr(self, name) < math.inf:
                raise LichenError(f"{getattr(self, name)} is out of range", where=f"semi.{name}", fix="use more than 0")

    def expected(self, job: Job) -> Expected:
        """The wrapped work's, with the two counts of unlabelled rows."""
        inner = self.inner.expected(job)
        return replace(inner, metrics={**inner.metrics, "unlabelled": COUNT, "pseudo": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FixAndMixState:
        """The wrapped work's beginning, and a label for every row by the model that it begins with."""
        inner = self.inner.init(job, clients, own_C)
        params_C = {**inner.params_C, **inner.frozen_C}
        found = []
        for c, client in enumerate(clients):
            own = {name: x[c : c + 1] for name, x in params_C.items()}
            found.append(self._labelled(job, client, own, inner.fixed))
        counts = {"unlabelled": [len(f.label_R[f.label_R >= 0]) for f in found], "pseudo": [_size(f) for f in found]}
        sums = {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()}
        return FixAndMixState(inner=inner, step=0, found=tuple(found), sums=sums)

    def _labelled(self, job: Job, client: int, params_C: Tree, fixed: Tree) -> Labelled:
        label_R = torch.full((self.rows.local.shards[client].size,), -1)
        parts: list[Tree] = []
        for batch in self.rows.unlabelled(client):
            # No step has this number, and so no step this view.
            weak = self.views.view(batch, "weak", seed=job.seed, clients=(client,), step=-1)
            chance_CB, label_CB = pseudo_labels_CB(self.inner.model, params_C, fixed, weak)
            index_B = batch["index_CB"][0]
            label_R[index_B[index_B >= 0]] = label_CB[0][index_B >= 0]
            sure_B = (index_B >= 0) & (chance_CB[0] >= self.threshold)
            inputs = {name: batch[name][0][sure_B] for name in _INPUTS if name in batch}
            parts.append({"index_F": index_B[sure_B], **inputs})
        sure = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        return Labelled(label_R=label_R, sure=sure)

    def step(self, state: FixAndMixState, batch: Batch) -> FixAndMixState:
        """One step of every client that was sure of a row."""
        job, clients, take = state.inner.job, state.inner.clients, self.rows.unlabelled_rows
        mix = {name: batch[name][:, -take:].clone() for name in ("index_CB", *_INPUTS) if name in batch}
        fix = {name: x.clone() for name, x in mix.items()}
        chosen_CB = torch.zeros_like(mix["index_CB"], dtype=torch.bool)
        label_CB, other_CB = torch.zeros_like(mix["index_CB"]), torch.zeros_like(mix["index_CB"])
        for c, (client, found) in enumerate(zip(clients, state.found, strict=True)):
            if not batch["active_C"][c] or not _size(found):
                continue
            picked = _sampled(_size(found), take, seed=job.seed, client=client, step=state.step)
            count = len(picked)
            chosen_CB[c, :count] = True
            for name in fix:
                fix[name][c, :count] = found.sure["index_F" if name == "index_CB" else name][picked]
            label_CB[c, :count] = found.label_R[fix["index_CB"][c, :count]]
            other_CB[c, :count] = found.label_R[mix["index_CB"][c, :count]]
        for rows in (fix, mix):
            rows["index_CB"] = rows["index_CB"].masked_fill(~chosen_CB, -1)
        generators = [numpy_generator(job.seed, client, "mixup", state.step) for client in clients]
        share_C = torch.tensor([float(draw.beta(self.mixup, self.mixup)) for draw in generators])
        ready = self._joined(state, fix, mix, share_C)
        classes = int(self.inner.model.classes or 0)
        mean_CB1 = (chosen_CB / chosen_CB.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        fix_CBK, mix_CBK = one_hot(label_CB, classes).float(), one_hot(other_CB, classes).float()
        share_C11 = share_C.view(-1, 1, 1)
        mixed_CBK = self.weight * (share_C11 * fix_CBK + (1 - share_C11) * mix_CBK)
        target_CBK = torch.zeros(len(clients), ready["index_CB"].shape[1], classes)
        target_CBK[:, : 2 * take] = torch.cat([fix_CBK * mean_CB1, mixed_CBK * mean_CB1], 1)
        ready |= {
            "active_C": batch["active_C"] & chosen_CB.any(1),
            "labels_CB": torch.full_like(ready["index_CB"], -100),
            "target_CBK": target_CBK,
        }
        inner = replace(self.inner, model=TargetLoss(self.inner.model)).step(state.inner, ready)
        return replace(state, inner=inner, step=state.step + 1)

    def _joined(self, state: FixAndMixState, fix: Tree, mix: Tree, share_C: Tensor) -> Tree:
        """Strong views of the fix data, and below them mixed rows; of tokens, weak views whose logits will be mixed."""

        def view(batch: Tree, kind: Kind) -> Batch:
            job, clients = state.inner.job, state.inner.clients
            return self.views.view(batch, kind, seed=job.seed, clients=clients, step=state.step)

        strong, lightly, other = view(fix, "strong"), view(fix, "weak"), view(mix, "weak")
        nobody = torch.full_like(fix["index_CB"], -1)
        if "x_CBF" in fix:
            share = share_C.view(-1, *[1] * (fix["x_CBF"].dim() - 1))
            mixed = share * lightly["x_CBF"] + (1 - share) * other["x_CBF"]
            return {
                "index_CB": torch.cat([fix["index_CB"], nobody], 1),
                "x_CBF": torch.cat([strong["x_CBF"], mixed], 1),
            }
        rows = fix["index_CB"].shape[1]
        partner_CB = torch.arange(3 * rows).repeat(len(share_C), 1)
        partner_CB[:, rows : 2 * rows] += rows
        share_CB = torch.ones(len(share_C), 3 * rows)
        share_CB[:, rows : 2 * rows] = share_C.unsqueeze(1)
        joined = {name: torch.cat([part[name] for part in (strong, lightly, other)], 1) for name in _INPUTS[1:]}
        index_CB = torch.cat([fix["index_CB"], nobody, nobody], 1)
        return {**joined, "index_CB": index_CB, "partner_CB": partner_CB, "share_CB": share_CB}

    def final(self, state: FixAndMixState) -> tuple[Message, Tree | None]:
        """The wrapped work's message, with the metrics ``unlabelled`` and ``pseudo``; and its private state."""
        message, own_C = self.inner.final(state.inner)
        return replace(message, metrics={**message.metrics, **state.sums}), own_C


def _size(found: Labelled) -> int:
    return len(found.sure["index_F"]) if found.sure else 0


def _sampled(size: int, take: int, *, seed: int, client: int, step: int) -> Tensor:
    """The step's rows of so many, out of one permutation after another; all of them where they are too few."""
    place_B = step * min(size, take) + np.arange(min(size, take))
    orders = {t: numpy_generator(seed, client, "fix", t).permutation(size) for t in np.unique(place_B // size).tolist()}
    return torch.tensor([orders[at // size][at % size] for at in place_B.tolist()])
