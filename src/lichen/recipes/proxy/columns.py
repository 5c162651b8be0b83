"""Scores a large model by itself and steered by the federation's small one: the columns ``big`` and ``proxy``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.models.tokens.proxied import BIG_LOSS, FrozenLM, ProxiedLM
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import Experiment, values_N
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.proxy.big import open_big, require_fit
from lichen.recipes.rows.prepare import first_of

__all__ = ["proxy_columns", "refuse_proxy"]

PROXY, BIG = "proxy", "big"

_KEY = "compare.proxy"


class Score(Protocol):
    """What a model scores on rows: sums over each shard."""

    def __call__(self, experiment: Experiment, shards: Sequence[Shard], shared: Shared, /) -> Tree: ...


def refuse_proxy(loaded: LoadedExperiment, say: Callable[[str], None]) -> None:
    """Refuse a large model that does not fit the small one, before anything is trained.

    Args:
        loaded: The opened recipe.
        say: Called with lines of progress.

    Raises:
        LichenError: as :func:`lichen.recipes.proxy.big.require_fit`.
    """
    name = loaded.experiment.recipe.compare.proxy
    if name is not None:
        require_fit(name, loaded.tokenizer, where=_KEY, say=say)


def proxy_columns(
    loaded: LoadedExperiment, folder: RunFolder, tuned: Shared, say: Callable[[str], None], *, score: Score
) -> dict[str, Column]:
    """The two columns by their names; none where the recipe names no large model.

    Both are scored in one pass over the clients' test rows, in the form that the small model was trained in. A test
    set that clients share is scored once for all of them.

    Args:
        loaded: The opened recipe.
        folder: The run folder.
        tuned: What the federation learned.
        say: Called with lines of progress.
        score: Scores rows.

    Raises:
        LichenError: if the large model cannot be loaded.
    """
    experiment, recipe = loaded.experiment, loaded.experiment.recipe
    name = recipe.compare.proxy
    if name is None:
        return {}
    distinct, place_N = torch.unique(torch.tensor(first_of(experiment.clients.test)), return_inverse=True)

    def sums() -> Tree:
        say(f"scoring {name} by itself and steered by the tuned model")
        model = experiment.model
        assert isinstance(model, CausalCohort | FullCausal)
        big = open_big(name, loaded.tokenizer, where=_KEY, dtype=recipe.model.dtype, device=recipe.model.device)
        proxied = ProxiedLM(model, untuned=experiment.start, big=FrozenLM(big))
        shards = [experiment.clients.test[client] for client in distinct.tolist()]
        return {key: x_M[place_N] for key, x_M in score(experiment.with_server(model=proxied), shards, tuned).items()}

    metrics = dict(folder.tree(PROXY, sums))
    alone = metrics.pop(BIG_LOSS)
    both = {BIG: {**metrics, "loss_sum": alone}, PROXY: metrics}
    return {column: Column(value_N=values_N(recipe, sums), metrics=sums) for column, sums in both.items()}
