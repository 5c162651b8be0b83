"""Tokenises prompts and choices for local models behind the interface.

A prompt and its continuation are tokenised as one text, as an endpoint that echoes log-probabilities does,
and a token that lies across the border counts to the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from lichen.core.errors import LichenError

__all__ = ["Span", "Texts", "by_length", "check_length"]

Span = tuple[list[int], int]
"""A text's tokens, and where its continuation begins."""


@final
class Texts:
    """A fast tokenizer, and whether prompts are messages of a user.

    Args:
        tokenizer: The model's.
        chat: Prompts are put into its chat template.
        template: A chat template in place of its own.

    Raises:
        LichenError: if it gives no offsets, or has no chat template where one is needed.
    """

    __slots__ = ("_template", "_tokenizer", "chat", "lead", "pad")

    def __init__(self, tokenizer: Any, *, chat: bool, template: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise LichenError("the tokenizer gives no offsets", where="model.name", fix="use a fast tokenizer")
        if chat and not (template or getattr(tokenizer, "chat_template", None)):
            raise LichenError("has no chat template", where="model.name", fix="use an instruct model, or chat: false")
        self._tokenizer, self.chat, self._template = tokenizer, chat, template
        self.pad = int(tokenizer.pad_token_id)
        bare, full = self.tokens("a"), self.whole("a")
        # Special tokens that the tokenizer puts before a text by itself.
        self.lead = next((t for t in range(len(full)) if full[t : t + len(bare)] == bare), 0)

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without special ones."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def whole(self, text: str) -> list[int]:
        """Token numbers of a text, with the special ones the tokenizer adds."""
        return list(self._tokenizer(text)["input_ids"])

    def head(self, prompt: str) -> str:
        """The text that a model reads of a prompt: the prompt, or the template filled with it."""
        if not self.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        rendered = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token numbers of :meth:`head`; a chat template writes the special ones itself."""
        return list(self._tokenizer(self.head(prompt), add_special_tokens=not self.chat)["input_ids"])

    def span(self, prompt: str, text: str) -> Span:
        """A prompt and what follows it, as one text; of a chat the assistant's turn has no leading space.

        Raises:
            LichenError: if the continuation has no tokens, or there is nothing before it.
        """
        head, text = self.head(prompt), text.lstrip() if self.chat else text
        encoding = self._tokenizer(head + text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        # Special tokens of the tokenizer's own have an empty place and belong to no continuation.
        at = next((t for t, (a, z) in enumerate(encoding["offset_mapping"]) if z > len(head) and z > a), len(ids))
        if at == 0 or at == len(ids):
            raise LichenError(
                "a continuation has no tokens, or nothing before it", where="score", fix="give both some text"
            )
        return ids, at

    def decode(self, ids: Sequence[int]) -> str:
        """The text of what was written, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def ends(self, model: Any) -> set[int]:
        """Tokens that end a text: the model's and the tokenizer's."""
        eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        listed = eos if isinstance(eos, list) else [eos]
        return {int(x) for x in [*listed, self._tokenizer.eos_token_id] if x is not None}


def by_length(rows: Sequence[Sequence[int]]) -> list[int]:
    """The rows' numbers, shortest row first; rows of one length in their order.

    >>> by_length([[1, 2], [], [3], [4]])
    [1, 2, 3, 0]
    """
    return sorted(range(len(rows)), key=lambda n: len(rows[n]))


def check_length(rows: Sequence[Sequence[int]], more: int, config: Any) -> None:
    """Refuse rows that a model cannot read, with so many tokens to be written after them.

    Raises:
        LichenError: if one is empty, or longer than the model's positions.
    """
    max_positions = getattr(config, "max_position_embeddings", None)
    for row in rows:
        if not row:
            raise LichenError("a text has no tokens", where="prompts", fix="give each some text")
        if max_positions is not None and len(row) + more > max_positions:
            raise LichenError(
                f"a text of {len(row)} tokens and {more} to write are more than the model's {max_positions}",
                where="prompts",
                fix="shorten the text, or write less",
            )
