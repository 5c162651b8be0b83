"""Scores every row of task prefer once by the model that training begins from, and keeps that at its client.

Where the model's own answers stand for rejected ones, they are written in the same way before.

The reference never changes, so neither does what it says of a row. A client scores its rows when a batch of them is
first asked for, by itself, and keeps the numbers in its private state beside a digest of what they follow from; all
columns and learning rates share them, and a resumed run finds them again.

Legend: C clients, N rows of a client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from lichen.core import tree as trees
from lichen.core.tree import Tree, to_device
from lichen.data.batches.rows import Compared, Shard, TextShard
from lichen.models.preference.model import PreferenceModel, row_logprobs
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.preference.own_answers import answers_of_tree, own_answers
from lichen.recipes.assemble.preference.stored import stored

__all__ = ["with_references", "without_references"]

SCORES, ANSWERS = "reference", "own_answers"
"""Folders beside the columns' private state."""


def with_references(experiment: Experiment, state: Path | None) -> Experiment:
    """The experiment whose rows are scored by the start, each at the first time that it is asked for.

    Args:
        experiment: Of any task; only those of preferences change.
        state: The folder of private state; None: scores are kept in memory alone.
    """
    if not experiment.recipe.prefers:
        return experiment

    @cache
    def origin() -> str:
        return f"{experiment.model.base} {trees.digest(experiment.start.for_model.flat())}"

    def score(part: str, client: int, shard: TextShard, compared: Compared) -> Shard:
        def second() -> TextShard:
            make = partial(own_answers, experiment, shard, client, part)
            how = ("own", client, part, experiment.recipe.seed, experiment.recipe.preference.temperature)
            folder = None if state is None else state / ANSWERS / part
            return answers_of_tree(stored(folder, client, shard, make, origin, *how))

        if experiment.recipe.preference.writes_answers and shard.size:
            compared = replace(compared, second=cache(second))
        both = replace(shard, compared=compared)

        def scores() -> np.ndarray:
            def make() -> Tree:
                return {"scores": torch.from_numpy(reference_scores(experiment, both))}

            folder = None if state is None or not shard.size else state / SCORES / part
            return stored(folder, client, both, make, origin)["scores"].numpy()

        return replace(both, compared=replace(compared, reference=cache(scores)))

    return _each(experiment, score)


def without_references(experiment: Experiment) -> Experiment:
    """The experiment whose rows have scores of zero: for plans, which ask how long rows take and not what they say."""
    if not experiment.recipe.prefers:
        return experiment

    def zero(part: str, client: int, shard: TextShard, compared: Compared) -> Shard:
        nothing, plain = np.zeros((shard.size, 2), dtype=np.float32), replace(shard, compared=None)
        if experiment.recipe.preference.writes_answers:  # as long as a person's
            compared = replace(compared, second=lambda: plain)
        return replace(shard, compared=replace(compared, reference=lambda: nothing))

    return _each(experiment, zero)


def _each(experiment: Experiment, change: Callable[[str, int, TextShard, Compared], Shard]) -> Experiment:
    """The experiment with other rows of each part; rows that several clients share stay one."""

    def part_of(part: str, shards: Sequence[Shard]) -> tuple[Shard, ...]:
        made: dict[int, Shard] = {}
        for client, shard in enumerate(shards):
            if id(shard) not in made:
                made[id(shard)] = shard
                if isinstance(shard, TextShard) and shard.compared is not None:
                    made[id(shard)] = change(part, client, shard, shard.compared)
        return tuple(made[id(shard)] for shard in shards)

    rows = experiment.clients
    train, valid, test = (part_of(part, getattr(rows, part)) for part in ("train", "valid", "test"))
    return replace(experiment, clients=replace(rows, train=train, valid=valid, test=test))


def reference_scores(experiment: Experiment, shard: TextShard) -> np.ndarray:
    """``(N, 2)`` float32: the log-probability of each row's answer and of its second one by the start; 0 without one.

    Rows stand in the batches in which they are evaluated, so that a model that has not moved gives the same bits.
    """
    model, start = experiment.model, experiment.start
    assert isinstance(model, PreferenceModel)
    out_N2 = np.zeros((shard.size, 2), dtype=np.float32)
    # As an engine puts it on the device that it computes on.
    device = torch.device(experiment.recipe.model.device)
    params_C, fixed = (to_device(tree, device) for tree in (trees.expand(start.trainable, 1), start.fixed))
    with torch.no_grad():
        for batch in experiment.evaluating([shard]).batches((0,), 0):
            there = "second_ids_CBT" in batch
            both_CB, _ = row_logprobs(model.inner, params_C, fixed, batch, second=there)
            both_B = both_CB[0].float().cpu().numpy()
            index_B = batch["index_CB"][0].numpy()
            real_B = index_B >= 0
            for place, half_B in enumerate(np.split(both_B, 1 + there)):
                out_N2[index_B[real_B], place] = half_B[real_B]
    return out_N2
