"""Holds a rounded model against the one it was made from, on validation rows and on general text.

Both are scored in float32 by the same code, so that what differs is the rounding alone. A client's perplexity is that
of the run's table; the mean over clients is gated, and general text apart, which may lose twice as much.

Legend: N clients, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from lichen.core.errors import LichenError
from lichen.data.batches.shards import TextShard

__all__ = ["Scores", "judge", "score_model"]

GENERAL = 2.0
"""How much more general text may lose than the clients' rows."""

_LARGEST = 700.0
"""Of a mean loss whose exponential is still a number."""

_TOKENS = 1024
"""Of a batch, so that logits over a large vocabulary fit."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How one model does; lower perplexity is better.

    Attributes:
        clients: Perplexity on validation rows, the mean over clients; None where no client has any.
        general: Perplexity on general text; None where the recipe names none.
        choices: The likeliest token at each labelled place of the validation rows, or of general text without them.
    """

    clients: float | None
    general: float | None
    choices: np.ndarray

    def agreement(self, other: Scores) -> float:
        """Share of places at which both take the same token."""
        return float((self.choices == other.choices).mean())


def score_model(model: Any, valid: Sequence[TextShard], general: TextShard | None) -> Scores:
    """Score a transformers language model.

    Args:
        model: In evaluation mode.
        valid: Each client's validation rows.
        general: Rows of general text.

    Raises:
        LichenError: if there are no rows at all.
    """
    found = [_of_shard(model, shard) for shard in valid if shard.size]
    apart = _of_shard(model, general) if general is not None and general.size else None
    values = [value for value, _ in found if not math.isnan(value)]
    if not values and apart is None:
        raise LichenError(
            "the run has no text to hold a rounded model against: no validation rows and no retention text",
            where="--gate",
            fix="run it with data.valid above 0 or with compare.retention_text, or use --merge",
        )
    choices = [chosen for _, chosen in found] or [apart[1] if apart is not None else np.zeros(0, int)]
    return Scores(
        clients=math.fsum(values) / len(values) if values else None,
        general=None if apart is None else apart[0],
        choices=np.concatenate(choices),
    )


def _of_shard(model: Any, shard: TextShard) -> tuple[float, np.ndarray]:
    """``(perplexity, likeliest tokens)`` over the labelled places of a shard's rows; NaN without any."""
    loss, count, chosen = 0.0, 0, []
    for ids_BT, mask_BT, labels_BT in _batches(shard):
        with torch.no_grad():
            logits_BTV = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)).logits
        target_BT = labels_BT[:, 1:]
        place_BT = target_BT != -100
        logits_LV = logits_BTV[:, :-1].cpu()[place_BT].float()
        target_L = target_BT[place_BT]
        loss += float(torch.nn.functional.cross_entropy(logits_LV, target_L, reduction="none").double().sum())
        count += len(target_L)
        chosen.append(logits_LV.argmax(-1).numpy())
    if not count:
        return math.nan, np.zeros(0, int)
    value = math.inf if math.isnan(loss) else math.exp(min(loss / count, _LARGEST))
    return value, np.concatenate(chosen)


def _batches(shard: TextShard) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows of similar work together, padded on the right: ids, mask and labels."""
    rows = max(1, _TOKENS // max(1, int(shard.longest_N.max(initial=1))))
    for first in range(0, shard.size, rows):
        ids = [torch.tensor(np.asarray(row)).long() for row in shard.input_ids[first : first + rows]]
        labels = [torch.tensor(np.asarray(row)).long() for row in shard.labels[first : first + rows]]
        pad = torch.nn.utils.rnn.pad_sequence
        mask_BT = pad([torch.ones_like(row) for row in ids], batch_first=True)
        yield pad(ids, batch_first=True), mask_BT, pad(labels, batch_first=True, padding_value=-100)


def judge(before: Scores, after: Scores, gate: float) -> tuple[str, ...]:
    """What speaks against a rounded model, a sentence each; nothing where it passes.

    Args:
        before: The merged model, not rounded.
        after: The rounded one.
        gate: Share by which perplexity on the clients' rows may rise; twice that on general text.

    >>> one = Scores(clients=10.0, general=50.0, choices=np.zeros(1))
    >>> judge(one, Scores(clients=10.05, general=52.0, choices=np.zeros(1)), 0.01)
    ('perplexity on general text rises from 50 to 52, by 4 % and not 2 % at most',)
    """
    faults = []
    pairs = (
        ("the clients' validation rows", before.clients, after.clients, gate),
        ("general text", before.general, after.general, GENERAL * gate),
    )
    for name, old, new, most in pairs:
        if old is not None and new is not None and not new <= old * (1 + most):
            share = 100 * (new / old - 1)
            faults.append(
                f"perplexity on {name} rises from {old:.4g} to {new:.4g}, by {share:.3g} % "
                f"and not {100 * most:g} % at most"
            )
    return tuple(faults)
