"""Holds the model on a new base against the one on the old base, on validation rows, and says which is to be used.

Bases of other vocabularies cut texts into other tokens, so that losses by token do not compare. What is compared is
the loss by byte of the text that is to be predicted, in bits; of tasks with labels the loss by row.

Legend: N clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard, TextShard
from lichen.present.summary import worst_decile
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.tasks.adapt import retention_shard, score_on

__all__ = ["Answer", "Verdict", "answer_of", "judge"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one model does; lower is better everywhere.

    Attributes:
        mean: Loss on validation rows, the mean over clients: bits a byte, or nats a row where rows have labels.
        worst_decile: The mean over the worst tenth of the clients.
        general: Bits a byte on the retention text; None where the recipe names none.
        value_N: Each client's loss; NaN where it has no validation rows.
    """

    mean: float
    worst_decile: float
    general: float | None
    value_N: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Which model is to be used, and why.

    Attributes:
        accepted: The new one is.
        harmed: Share of the clients that it serves worse than the old one.
        faults: What speaks against it, a sentence each; none where it is accepted.
    """

    accepted: bool
    harmed: float
    faults: tuple[str, ...]


def answer_of(loaded: LoadedExperiment, shared: Shared, path: Path) -> Answer:
    """How a model does on its clients' validation rows, and on the retention text.

    Args:
        loaded: The recipe, opened.
        shared: The model's tensors.
        path: A folder that holds no client's private state.

    Raises:
        LichenError: if no client has validation rows.
    """
    experiment = loaded.experiment
    value_N = _losses(loaded, experiment.clients.valid, shared, path)
    known = value_N[~value_N.isnan()].tolist()
    text = experiment.recipe.compare.retention_text if experiment.recipe.writes else None
    general = None if text is None else float(_losses(loaded, (retention_shard(loaded),), shared, path)[0])
    return Answer(
        mean=math.fsum(known) / max(len(known), 1),
        worst_decile=worst_decile(known, higher_is_better=False),
        general=general,
        value_N=tuple(value_N.tolist()),
    )


def _losses(loaded: LoadedExperiment, shards: tuple[Shard, ...], shared: Shared, path: Path) -> Tensor:
    metrics = score_on(loaded.experiment, shards, shared, path)
    loss_N = metrics["loss_sum"].double()
    if not loaded.experiment.recipe.writes:
        return loss_N / metrics["count"].double()
    bytes_N = torch.tensor([_bytes(loaded.tokenizer, shard) for shard in shards], dtype=torch.float64)
    return loss_N / math.log(2) / bytes_N  # 0 / 0 is NaN


def _bytes(tokenizer: Any, shard: Shard) -> int:
    """Bytes of the text that the rows' labels stand for."""
    assert isinstance(shard, TextShard)
    assert not isinstance(shard.labels, np.ndarray)
    rows = [[int(token) for token in row[1:] if token != -100] for row in shard.labels]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)) if rows else 0


def judge(old: Answer, new: Answer, *, tolerance: float, most_harmed: float) -> Verdict:
    """Whether the new model is to be used.

    It is if the mean is no worse, the worst decile and general text are worse by the tolerance at most, and no more
    than a share of the clients are harmed.

    Args:
        old: The model on the old base.
        new: The model on the new base, of the same clients.
        tolerance: Share by which the worst decile and general text may be worse.
        most_harmed: Share of the clients that may be served worse.

    >>> old = Answer(mean=2.0, worst_decile=3.0, general=4.0, value_N=(1.0, 3.0))
    >>> new = Answer(mean=1.9, worst_decile=3.3, general=None, value_N=(0.5, 3.3))
    >>> judge(old, new, tolerance=0.02, most_harmed=0.5).faults
    ('the worst decile rises from 3 to 3.3, by more than 2 %',)
    """
    pairs = [(a, b) for a, b in zip(old.value_N, new.value_N, strict=True) if not math.isnan(a + b)]
    harmed = sum(b > a for a, b in pairs) / max(len(pairs), 1)
    faults = [] if new.mean <= old.mean else [f"the mean rises from {old.mean:.4g} to {new.mean:.4g}"]
    bounded: Mapping[str, tuple[float | None, float | None]] = {
        "the worst decile": (old.worst_decile, new.worst_decile),
        "general text": (old.general, new.general),
    }
    for name, (before, after) in bounded.items():
        if before is not None and after is not None and not after <= before * (1 + tolerance):
            faults.append(f"{name} rises from {before:.4g} to {after:.4g}, by more than {100 * tolerance:g} %")
    if not harmed <= most_harmed:
        faults.append(f"{100 * harmed:.0f} % of the clients are harmed, more than {100 * most_harmed:g} %")
    return Verdict(accepted=not faults, harmed=harmed, faults=tuple(faults))
