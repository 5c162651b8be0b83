"""Decodes text from a causal model: batched, with a key-value cache and noise seeded by row.

A token is drawn by the Gumbel-max rule: the noise of row n at its token t is a function of (seed of n, t), so
that no global generator is touched and a row's tokens depend on the others only through the rounding of the
model's own sums, as its logits do. Only where two tokens are tied to within that rounding may another
company change one. A nucleus (``top_p``) needs no sorting: the drawn token is kept if the tokens likelier
than it hold less than ``top_p``; if not, neither it nor anything less likely is in the nucleus, and the next
best of the same noise is looked at. That is the same draw as from the nucleus alone.

Rows that ended leave the batch.

References:
    Chris J. Maddison, Daniel Tarlow and Tom Minka. "A* Sampling." NeurIPS 2014.
    https://arxiv.org/abs/1411.0030 (the Gumbel-max rule)
    Ari Holtzman, Jan Buys, Li Du, Maxwell Forbes and Yejin Choi. "The Curious Case of Neural Text
    Degeneration." ICLR 2020. https://arxiv.org/abs/1904.09751 (the nucleus)

Legend: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lichen.core.seeds import numpy_generator
from lichen.models.renamed import CACHE_NAMES, cache_argument, cache_of, takes_logits_to_keep

__all__ = ["decode", "gumbel", "sample_token"]

_LEAVE = 8  # an eighth of the rows must have ended before the cache is copied without them


def gumbel(seed: int, token: int, size: int) -> Tensor:
    """``(V,)`` float32 standard Gumbel noise of one row at one of its tokens.

    >>> bool((gumbel(1, 0, 4) == gumbel(1, 0, 4)).all()), bool((gumbel(1, 0, 4) == gumbel(1, 1, 4)).any())
    (True, False)
    """
    # Single precision would draw an exact 0, a certain choice, every few hundred tokens of a large vocabulary.
    noise = numpy_generator(seed, "token", token).standard_exponential(size)
    return -torch.from_numpy(noise).float().log()


def sample_token(logits_BV: Tensor, noise_BV: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """``(B,)`` int64: one token a row.

    Args:
        logits_BV: float32.
        noise_BV: float32, see :func:`gumbel`; not looked at where the temperature is 0.
        temperature: 0 or more.
        top_p: Share of the nucleus, in (0, 1].
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV / temperature
    keyed_BV = scaled_BV + noise_BV
    token_B = keyed_BV.argmax(-1)
    if top_p >= 1:
        return token_B
    place_B, chance_BV = torch.arange(len(logits_BV)), scaled_BV.softmax(-1)
    while True:
        at_B1 = chance_BV.gather(1, token_B[place_B, None])
        outside_B = (torch.where(chance_BV > at_B1, chance_BV, 0.0).sum(-1) >= top_p).nonzero()[:, 0]
        if not len(outside_B):
            return token_B
        place_B, chance_BV = place_B[outside_B], chance_BV[outside_B]
        keyed_BV = keyed_BV[outside_B].masked_fill(chance_BV <= at_B1[outside_B], -torch.inf)
        token_B[place_B] = keyed_BV.argmax(-1)


def decode(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    ends: Collection[int],
    watch: Callable[[int, Sequence[int], Tensor], bool] | None = None,
) -> tuple[list[list[int]], int]:
    """``(tokens, reads)``: what each row goes on with, its end token left out, and the calls of the model.

    Args:
        model: A frozen causal model of transformers.
        rows: B token rows, none empty.
        seeds: One a row.
        max_new_tokens: Tokens written at most.
        temperature: 0 or more; 0 takes the likeliest.
        top_p: Share of the nucleus, in (0, 1].
        ends: Tokens that end a row.
        watch: Called after each token with the row's number, all it has written so far and the ``(V,)`` float32 logits
            that the token was drawn from; whether the row ends here. An end token is not shown to it.
    """
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    wide = max(len(row) for row in rows)
    ids_BT = torch.tensor([[0] * (wide - len(row)) + list(row) for row in rows], device=device)
    mask_BT = torch.tensor([[0] * (wide - len(row)) + [1] * len(row) for row in rows], device=device)
    signature = inspect.signature(model.forward)
    known, cache_name = signature.parameters, cache_argument(signature) or CACHE_NAMES[0]
    last = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    written: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))  # which row lies at each place of the batch; ended ones stay a while
    ended: set[int] = set()
    with torch.inference_mode():
        past, calls = DynamicCache(config=model.config), 0
        while True:
            place_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            more: dict[str, Any] = {"position_ids": place_BT} if "position_ids" in known else {}
            more |= {**last, cache_name: past}
            outputs = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, **more)
            past, calls = cache_of(outputs), calls + 1
            logits_BV = outputs.logits[:, -1].float().cpu()
            size = logits_BV.shape[1]
            noise_BV = torch.zeros(0)
            if temperature:
                noise_BV = torch.stack([gumbel(seeds[n], len(written[n]), size) for n in active])
            token_B = sample_token(logits_BV, noise_BV, temperature=temperature, top_p=top_p).tolist()
            for n, token, logits_V in zip(active, token_B, logits_BV, strict=True):
                if n in ended:
                    continue
                if token in ends:
                    ended.add(n)
                    continue
                written[n].append(token)
                seen = watch is not None and watch(n, written[n], logits_V)
                if seen or len(written[n]) >= max_new_tokens:
                    ended.add(n)
            if len(ended) == len(rows):
                return written, calls
            gone = sum(n in ended for n in active)
            if gone * _LEAVE >= len(active):
                stay = [b for b, n in enumerate(active) if n not in ended]
                past.batch_select_indices(torch.tensor(stay, device=device))
                mask_BT, active, token_B = mask_BT[stay], [active[b] for b in stay], [token_B[b] for b in stay]
            ids_BT = torch.tensor(token_B, device=device)[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(active), 1)], 1)
