"""How likely a model finds each of several answers to one question, which it reads once.

The first tokens of all answers follow from one look at the question. Only answers of more tokens are read themselves,
after the keys and values of the question, which the model keeps from that look.

Legend: L answers of more than one token, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lichen.models.renamed import cache_name, cache_of, takes_logits_to_keep

__all__ = ["answer_scores"]


@torch.no_grad()
def answer_scores(model: Any, before: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """The log probability of each answer after these tokens, in the mean over its own.

    Args:
        model: A causal language model of transformers, in PEFT's wrapper or without.
        before: The tokens of the question.
        answers: Tokens of each answer, one or more.
    """
    name = cache_name(model)
    keeps = takes_logits_to_keep(model)
    question = torch.tensor([before], device=model.device)
    out = model(input_ids=question, use_cache=name is not None, **({"logits_to_keep": 1} if keeps else {}))
    first_V = _logp(out.logits[0, -1])
    totals = [float(first_V[answer[0]]) for answer in answers]
    longer = [n for n, answer in enumerate(answers) if len(answer) > 1]
    if longer:
        # What stands behind an answer is seen by none of its tokens.
        wide = max(len(answers[n]) for n in longer) - 1
        rows = [[*answers[n][:-1], *[answers[n][-1]] * (wide + 1 - len(answers[n]))] for n in longer]
        logp_LTV = _logp(_after(model, before, rows, cache_of(out), name, keeps=keeps))
        for row_TV, n in zip(logp_LTV, longer, strict=True):
            rest = answers[n][1:]
            totals[n] += float(row_TV[torch.arange(len(rest)), torch.tensor(rest)].sum())
    return [total / len(answer) for total, answer in zip(totals, answers, strict=True)]


def _after(
    model: Any, before: Sequence[int], rows: Sequence[Sequence[int]], cache: Any, name: str | None, *, keeps: bool
) -> Tensor:
    """``(L, T, V)``: the logits at each place of the rows, all of one length, that stand after the question."""
    if name is None or cache is None:
        wide = len(rows[0])
        ids = torch.tensor([[*before, *row] for row in rows], device=model.device)
        last = {"logits_to_keep": wide} if keeps else {}
        logits: Tensor = model(input_ids=ids, use_cache=False, **last).logits[:, -wide:]
        return logits
    cache.batch_repeat_interleave(len(rows))
    after: Tensor = model(input_ids=torch.tensor(rows, device=model.device), use_cache=True, **{name: cache}).logits
    return after


def _logp(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).cpu()
