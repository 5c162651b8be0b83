"""Says which blocks of an emulator may be trained: its first and last ones, where its maker has said so.

An emulator (:mod:`lichen.models.loading.emulator_folder`) stands in for a model whose middle its owner does not hand
out. What is learned is to go back into that model, so that nothing of the middle may be trained, whatever the kind of
adapter. The note lies on the model, as does that of layers which its files lacked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lichen.core.errors import LichenError

__all__ = ["blocks_of", "end_blocks", "end_prefixes", "note_ends", "note_patched", "patched_middle", "refuse_middle"]


def note_ends(model: nn.Module, ends: tuple[int, int]) -> None:
    """Remember on the model that only so many of its first and of its last blocks may be trained.

    Args:
        model: A transformers model.
        ends: First and last blocks, at least one in all, and fewer than it has.
    """
    object.__setattr__(model, "_end_blocks", ends)


def note_patched(model: nn.Module) -> None:
    """Remember on an emulator that the linear layers of its middle take patches, which its owner sends."""
    object.__setattr__(model, "_middle_patched", True)


def patched_middle(model: Any) -> tuple[str, ...]:
    """How names in the middle begin, where it takes patches; none elsewhere."""
    return middle_prefixes(model) if getattr(model, "_middle_patched", False) else ()


def end_blocks(model: nn.Module) -> tuple[int, int] | None:
    """How many first and last blocks may be trained; None where all may."""
    found: tuple[int, int] | None = getattr(model, "_end_blocks", None)
    return found


def blocks_of(model: Any) -> tuple[str, ...]:
    """The names of the blocks of the model's stack, from its input to its output."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return tuple(name for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer))


def end_prefixes(model: Any) -> tuple[str, ...]:
    """How names in the blocks that may be trained begin; none where all may be."""
    ends, blocks = end_blocks(model), blocks_of(model)
    if ends is None:
        return ()
    return tuple(f"{name}." for name in (*blocks[: ends[0]], *blocks[len(blocks) - ends[1] :]))


def middle_prefixes(model: Any) -> tuple[str, ...]:
    """How names in the blocks that may not be trained begin; none where all may be."""
    ends, blocks = end_blocks(model), blocks_of(model)
    return () if ends is None else tuple(f"{name}." for name in blocks[ends[0] : len(blocks) - ends[1]])


def refuse_middle(model: Any, names: Iterable[str], *, where: str) -> None:
    """Refuse layers of an emulator's middle, by name.

    Args:
        model: A transformers model.
        names: Layers that are to be trained.
        where: The key that names them.

    Raises:
        LichenError: naming the first of them.
    """
    middle = middle_prefixes(model)
    inside = next((name for name in names if middle and f"{name}.".startswith(middle)), None)
    if inside is not None:
        first, last = end_blocks(model) or (0, 0)
        raise LichenError(
            f"{inside} lies in the middle of an emulator, which stays as it is",
            where=where,
            fix=f"name what lies in its first {first} or last {last} blocks",
        )
