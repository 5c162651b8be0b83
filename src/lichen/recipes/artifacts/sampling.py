"""Prompts and sampling settings of ``lichen try``, as the run was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.data.batches.text import start_id
from lichen.data.chat.chat_template import render
from lichen.recipes.schema.recipe import Recipe

__all__ = ["Sampling", "ask_ids", "end_ids", "generate_text", "settings_text", "write"]

Steer = Callable[[Tensor, Tensor], Tensor] | None
"""From the tokens so far ``(1, T)`` and a model's logits ``(1, V)`` to those that stand in their place."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and how many.

    Attributes:
        max_new_tokens: Tokens written at most.
        temperature: Of the draw; 0 takes the likeliest token.
        top_p: The draw is among the likeliest tokens that have so much of the probability together.
        repetition_penalty: Logits of tokens that stand there already are divided by it; 1 for none.
        seed: Of the draw.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        for key, right, fix in (
            ("max_new_tokens", self.max_new_tokens >= 1, "use 1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "use 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "use a number above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "use a number above 0, 1 for none"),
            ("seed", 0 <= self.seed < 2**63, "use 0 or more"),
        ):
            if not right:
                raise LichenError(f"{getattr(self, key)} is out of range", where=key, fix=fix)
        if self.temperature == 0 and self.top_p != 1:
            raise LichenError("nothing is drawn at temperature 0", where="top_p", fix="set temperature as well")

    def __str__(self) -> str:
        sampled = f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"
        chosen = sampled if self.temperature else "greedy"
        return f"{chosen}, repetition penalty {self.repetition_penalty:g}, at most {self.max_new_tokens} new tokens"


def ask_ids(tokenizer: Any, form: str, text: str) -> list[int]:
    """The tokens before an answer, as a training row of this form has them.

    Args:
        tokenizer: With the chat template of the run.
        form: ``data.form`` of the run.
        text: What is asked, or in form plain what is to be continued.

    Raises:
        LichenError: if the tokenizer has no template or start token where one is needed.
    """
    if form in ("chat", "messages"):
        prompt = render([{"role": "user", "content": text}], tokenizer, ask=True)
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    prompt = f"{text}\n" if form == "transcript" else text
    return [start_id(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def end_ids(model: Any, tokenizer: Any, form: str) -> list[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and what the template puts behind one."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if form in ("chat", "messages"):
        answer = "That one."
        turns = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": answer}]
        behind = render(turns, tokenizer, ask=False).rpartition(answer)[2].strip()
        special = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        ends |= special & set(tokenizer(behind, add_special_tokens=False)["input_ids"][:1]) if behind else set()
    return sorted(int(token) for token in ends)


def generate_text(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    ends: Sequence[int],
    steer: Steer = None,
) -> str:
    """What the model writes after these tokens, special tokens left out.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: The tokens before.
        sampling: How the next token is chosen.
        ends: Tokens that end a text.
        steer: Gives other logits in the place of the model's, before anything else is done to them.
    """
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
    if steer is not None:  # those of a caller come after the penalty, which is to see what they give
        after = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
        penalty = {"repetition_penalty": 1.0, "logits_processor": [steer, *after]}
    row = torch.tensor([list(ids)], device=model.device)
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        out = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=bool(sampled),
            **penalty,
            pad_token_id=tokenizer.pad_token_id,
            **({"eos_token_id": list(ends)} if ends else {}),
            **sampled,
        )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()


def settings_text(recipe: Recipe, sampling: Sampling) -> str:
    """How a run is asked, in words."""
    if not {"chat", "messages"} & {recipe.data.form}:
        return f"{sampling}; form {recipe.data.form}"
    system = recipe.data.system
    named = "the template's own" if system is None else repr(system) if system else "none"
    return f"{sampling}; chat template, system message: {named}"


def write(recipe: Recipe, model: Any, tokenizer: Any, text: str, sampling: Sampling, *, steer: Steer = None) -> str:
    """One answer in the form the run was trained in; ``steer`` as for :func:`generate_text`."""
    form = recipe.data.form
    ids = ask_ids(tokenizer, form, text)
    return generate_text(model, tokenizer, ids, sampling, ends=end_ids(model, tokenizer, form), steer=steer)
