"""The start model's own answers to the prompts of a client's rows, written once and at that client (SPIN).

The next token is drawn by adding Gumbel noise to the logits over the temperature, from a generator of the row's own, so
that an answer follows from the seed, the row and the model, and but for rounding from no other row.

References: that of SPIN in :mod:`lichen.models.preference.losses`; Chris J. Maddison, Daniel Tarlow and Tom Minka. "A*
Sampling." NIPS 2014. https://arxiv.org/abs/1411.0030 (the Gumbel-max trick).

Legend: C clients, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.seeds import derive, numpy_generator
from lichen.core.tree import Tree, to_device
from lichen.data.batches.rows import Ragged, TextShard
from lichen.models.preference.model import PreferenceModel
from lichen.recipes.assemble.experiment import Experiment

__all__ = ["answers_of_tree", "own_answers"]

ROWS = 16
"""Answered in one call."""


def answers_of_tree(tree: Tree) -> TextShard:
    """The answers of :func:`own_answers` as rows."""
    ids, labels, offsets = (tree[name].numpy() for name in ("ids", "labels", "offsets"))
    return TextShard(Ragged(ids, offsets), labels=Ragged(labels, offsets), kind="lm")


def own_answers(experiment: Experiment, shard: TextShard, client: int, part: str) -> Tree:
    """Each row's prompt with the start model's answer: ``ids`` and ``labels``, row after row, and ``offsets``.

    An answer ends with the token that most of the client's own end with, and is no longer than the longest of them.

    Args:
        experiment: With the model, the start, the seed and the temperature.
        shard: The client's rows.
        client: Its number.
        part: Which of its rows they are.
    """
    starts, ends, most = [], Counter[int](), 1
    for ids_T, labels_T in zip(shard.input_ids, shard.labels, strict=True):
        learned = np.flatnonzero(labels_T != -100)
        starts.append(int(learned[0]) if len(learned) else len(ids_T))
        ends[int(ids_T[-1])] += 1
        most = max(most, len(ids_T) - starts[-1])
    stops = frozenset(token for token, _ in ends.most_common(1))
    rows: list[np.ndarray] = []
    for at in range(0, shard.size, ROWS):
        some = range(at, min(at + ROWS, shard.size))
        prompts = [np.asarray(shard.input_ids[n][: max(starts[n], 1)]) for n in some]
        noise = [numpy_generator(derive(experiment.recipe.seed, "own answer", part), client, n) for n in some]
        rows += _written(experiment, prompts, noise, most=most, stops=stops)
    labels = [
        np.where(np.arange(len(row_T)) < max(start, 1), -100, row_T).astype(np.int32)
        for row_T, start in zip(rows, starts, strict=True)
    ]
    flat = Ragged.of(rows)
    return {
        "ids": torch.from_numpy(flat.flat_T.astype(np.int32)),
        "labels": torch.from_numpy(Ragged.of(labels).flat_T.astype(np.int32)),
        "offsets": torch.from_numpy(flat.offset_N1.astype(np.int64)),
    }


def _written(
    experiment: Experiment,
    prompts: Sequence[np.ndarray],
    noise: Sequence[np.random.Generator],
    *,
    most: int,
    stops: frozenset[int],
) -> list[np.ndarray]:
    """The prompts with answers of so many tokens at most."""
    width, temperature = experiment.recipe.data.max_length, experiment.recipe.preference.temperature
    rows, open_rows = [list(map(int, row)) for row in prompts], set(range(len(prompts)))
    for _ in range(most):
        open_rows = {n for n in open_rows if len(rows[n]) < width}
        if not open_rows:
            break
        order = sorted(open_rows)
        for n, scores_V in zip(order, _next_logits(experiment, [rows[n] for n in order]), strict=True):
            if temperature:
                scores_V = scores_V / temperature + noise[n].gumbel(size=scores_V.shape)
            rows[n].append(int(scores_V.argmax()))
            if rows[n][-1] in stops:
                open_rows.discard(n)
    return [np.asarray(row, dtype=np.int32) for row in rows]


def _next_logits(experiment: Experiment, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """``(B, V)`` float64: the start model's logits of the token after each row."""
    model, start = experiment.model, experiment.start
    assert isinstance(model, PreferenceModel)
    width = max(map(len, rows)) + 1
    ids_BT, mask_BT = (np.full((len(rows), width), fill, np.int64) for fill in (experiment.server.pad, 0))
    labels_BT = np.full((len(rows), width), -100, np.int64)
    for n, row in enumerate(rows):
        ids_BT[n, : len(row)], mask_BT[n, : len(row)], labels_BT[n, len(row)] = row, 1, 0
    batch: dict[str, Any] = {"input_ids_CBT": ids_BT, "attention_mask_CBT": mask_BT, "labels_CBT": labels_BT}
    batch = {name: torch.from_numpy(x)[None] for name, x in batch.items()}
    # The place that is asked for is attended to by none before it.
    batch["attention_mask_CBT"][0].scatter_(1, torch.tensor([[len(row)] for row in rows]), 1)
    batch |= {"active_C": torch.ones(1, dtype=torch.bool), "index_CB": torch.arange(len(rows))[None]}
    device = torch.device(experiment.recipe.model.device)
    params_C, fixed = (to_device(tree, device) for tree in (trees.expand(start.trainable, 1), start.fixed))
    with torch.no_grad():
        (at,) = model.inner.positions(params_C, fixed, batch)
        logits_BV: Tensor = at.head(at.hidden_RH)
    return logits_BV.double().cpu().numpy()
