"""What whoever sees the hidden states that cross a cut can read of the rows, with nothing but the blocks below it.

The reader makes up its own text (:func:`lichen.audit.token_recovery.random_rows`), so that neither data nor a network
is needed to say so of any run. Rows cross once each; a code of changes is then the code itself.

Legend: B rows, T tokens of a row, N tokens of all rows, H width, E width of an embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lichen.audit.token_recovery import Recovery, random_rows, token_recovery
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.wire.shared import Shared
from lichen.data.batches.rows import TextShard
from lichen.data.batches.shards import Shard
from lichen.models.cohort import Cohort
from lichen.models.packed_cohort import base_of
from lichen.transforms.activations import ActivationCode, noisy_tokens

__all__ = ["blocks_below", "read_crossing", "recovery_sentence", "some_rows"]

Hidden = Callable[[Tensor, Tensor], Tensor]
"""Token ids and mask ``(B, T)``, padded on the right, to hidden states ``(B, T, H)`` at the cut."""

KNOWN = 16_384
"""Tokens that the reader makes up."""

ABREAST = 16
"""Rows that go through the blocks at once."""


def read_crossing(
    hidden: Hidden,
    rows: Sequence[Tensor],
    embedding_VE: Tensor,
    *,
    code: ActivationCode,
    noise: float,
    seed: int,
    known: int = KNOWN,
) -> Recovery:
    """The share of the rows' tokens that can be read off what crosses.

    The first token of a row is left out where all rows begin with the same.

    Args:
        hidden: What lies below the cut.
        rows: Token ids of each row, int64 ``(T,)``.
        embedding_VE: The model's embeddings.
        code: How tokens are coded.
        noise: As :func:`lichen.transforms.activations.noisy_tokens` takes it.
        seed: Of the made-up text, the noise and stochastic rounding.
        known: Tokens of made-up text.

    Raises:
        LichenError: if no row has a token to read.
    """
    rows = [row for row in rows if len(row)]
    begins = {int(row[0]) for row in rows}
    first = begins.pop() if len(begins) == 1 else None
    skip = first is not None
    if not any(len(row) > skip for row in rows):
        raise LichenError("no row has a token to read", where="split-audit", fix="audit a run with text")
    width = max(8, min(64, max(len(row) for row in rows)))
    made_up = list(random_rows(len(embedding_VE), -(-known // width), width, seed, first=first))

    def crossed(texts: Sequence[Tensor], side: str) -> Tensor:
        parts = []
        for at in range(0, len(texts), ABREAST):
            some, one = texts[at : at + ABREAST], derive(seed, side, at)
            length_B = torch.tensor([len(row) for row in some])
            ids_BT = torch.nn.utils.rnn.pad_sequence(list(some), batch_first=True)
            real_BT = torch.arange(ids_BT.shape[1]) < length_B[:, None]
            with torch.no_grad():
                state_NH = hidden(ids_BT, real_BT.long()).cpu()[real_BT]
            about = length_B, torch.full_like(length_B, -1)
            payload, _ = code.encode(noisy_tokens(state_NH[None], noise, [one]), *about, {}, [one])
            decoded_NH = code.decode(payload, *about, {}, state_NH.shape[1])[0][0]
            parts += [row[skip:] for row in torch.split(decoded_NH, length_B.tolist())]
        return torch.cat(parts)

    return token_recovery(
        crossed(rows, "rows"),
        torch.cat([row[skip:] for row in rows]),
        known_NH=crossed(made_up, "known"),
        known_N=torch.cat([row[skip:] for row in made_up]),
        embedding_VE=embedding_VE,
    )


def recovery_sentence(cut: int, recovery: Recovery) -> str:
    """What that means, in one plain sentence.

    >>> recovery_sentence(2, Recovery(tokens=900, nearest=0.02, linear=0.9, constant=0.05))
    'Who sees what crosses after block 2 reads 90 % of 900 tokens (a guess without looking: 5 %).'
    """
    best = max(recovery.linear, recovery.nearest)
    return (
        f"Who sees what crosses after block {cut} reads {best:.0%} of {recovery.tokens} tokens "
        f"(a guess without looking: {recovery.constant:.0%})."
    ).replace("%", " %")


def blocks_below(model: Cohort, shared: Shared, cut: int) -> Hidden:
    """The blocks below a cut of a model, with what was trained of them."""
    params_C, part = trees.broadcast(shared.trainable, 1), base_of(model.wrapped)
    device = model.wrapped.model.device

    def hidden(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}
        out = model.wrapped.call(params_C, shared.fixed, part=part, output_hidden_states=True, **inputs)
        states: tuple[Tensor, ...] = out.hidden_states
        # What an adapter puts before a row, such as a soft prompt, is no token of it.
        return states[cut][:, -ids_BT.shape[1] :].float()

    return hidden


def some_rows(shards: Sequence[Shard], rows: int) -> list[Tensor]:
    """Token ids of the first rows of each client, so many together at most; none where they are no texts."""
    each = max(1, rows // max(len(shards), 1))
    texts = [row for s in shards if isinstance(s, TextShard) for row in islice(s.input_ids, each)]
    return [torch.as_tensor(row, dtype=torch.int64) for row in texts[:rows]]
