"""Which blocks of a model a loaded structure holds, and what a later part takes in place of tokens.

A model whose first blocks lie elsewhere (:mod:`lichen.models.pieces.carve`) takes hidden states. Whoever tries a model
on rows of its own making asks here for what it takes.

Legend: C clients, B rows, T tokens, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

__all__ = ["Span", "entered", "note_span", "span_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive blocks of a model.

    Attributes:
        start: Its first block; 0: the embeddings come before it.
        stop: The block after its last.
        blocks: How many the whole model has; where ``stop`` is one of them, norm and head come after it.
    """

    start: int
    stop: int
    blocks: int

    @property
    def first(self) -> bool:
        """It takes tokens, and not hidden states."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """It gives what the model gives, and not hidden states."""
        return self.stop == self.blocks

    def __str__(self) -> str:
        """The blocks, as a slice.

        >>> str(Span(start=0, stop=2, blocks=12))
        '0:2'
        """
        return f"{self.start}:{self.stop}"


def note_span(model: nn.Module, span: Span) -> None:
    """Remember on a model which blocks of another it holds."""
    object.__setattr__(model, "_span", span)


def span_of(model: nn.Module) -> Span | None:
    """The blocks of another model that this one holds; None for a whole one."""
    found: Span | None = getattr(model, "_span", None)
    return found


def entered(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A made-up batch of tokens, with hidden states that follow from them where the model takes hidden states.

    Args:
        model: A whole one, or a part of one.
        batch: With ``input_ids_CBT``, on the model's device.
    """
    span = span_of(model)
    if span is None or span.first:
        return batch
    wave_H = torch.arange(1, model.config.get_text_config().hidden_size + 1, device=model.device)
    hidden_CBTH = torch.sin(batch["input_ids_CBT"][..., None] * wave_H).to(model.dtype)
    return {**batch, "hidden_CBTH": hidden_CBTH}
