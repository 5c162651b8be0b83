"""Turns conversations and texts into the tokens that a transformers model goes on from.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.data.chat.chat_template import render
from lichen.fm.tokenization import Texts
from lichen.serving.contract import ApiError, Message, TokenLogprob

__all__ = ["Prompts", "folder_prompts", "token_logprob"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How one model is asked.

    Attributes:
        chat: Tokens before the next turn of a conversation.
        text: Tokens of a text that is gone on with.
        ends: Tokens that end an answer.
    """

    chat: Callable[[Sequence[Message]], list[int]]
    text: Callable[[str], list[int]]
    ends: frozenset[int]


def folder_prompts(model: Any, tokenizer: Any) -> Prompts:
    """As :class:`lichen.fm.local.LocalFM` asks: by the tokenizer's own chat template, and by its own special tokens.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer, a fast one.
    """
    texts = Texts(tokenizer, chat=False)

    def chat(messages: Sequence[Message]) -> list[int]:
        if not getattr(tokenizer, "chat_template", None):
            raise ApiError(400, "the model has no chat template: ask /v1/completions", param="messages")
        try:
            turns = [{"role": one.role, "content": one.content} for one in messages]
            prompt = render(turns, tokenizer, ask=True)
        except LichenError as error:
            raise ApiError(400, error.what, param="messages") from None
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    return Prompts(chat=chat, text=texts.whole, ends=frozenset(texts.ends(model)))


def token_logprob(tokenizer: Any, before: int, token: int, logp_V: Tensor, top: int) -> TokenLogprob:
    """A token, and the likeliest ones where it stands.

    Args:
        tokenizer: Whose token it is.
        before: The token before it, as what a token adds to a text may hang on that.
        token: The token.
        logp_V: float32 log-probabilities there.
        top: How many likely tokens are listed.
    """

    def text(number: int) -> str:
        first = str(tokenizer.decode([before]))
        both = str(tokenizer.decode([before, number]))
        return both.removeprefix(first) if both.startswith(first) else str(tokenizer.decode([number]))

    best = logp_V.topk(min(top, len(logp_V))) if top else None
    listed = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(
        token=text(token),
        logprob=float(logp_V[token]),
        top=tuple((text(number), float(value)) for number, value in listed),
    )
