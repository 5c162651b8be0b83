"""What is found out of a model when it is loaded, and what that depends on.

Whether clients may share a call, whether rows can be packed and whether the output layer is all that follows the hidden
states takes several passes through the model. For one base, adapter, library and processor that is done once, where
somebody remembers it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch

from lichen import __version__
from lichen.core.contracts.model import Objective

__all__ = ["Findings", "Recall", "anew", "behind"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found of a model.

    Attributes:
        plain: Logits are the output layer of the hidden states, with no cap or factor after it.
        padded: Why its rows cannot be packed; None: they can, or need not.
        alone: Because of what every client has a call of its own; None: clients may share one.
    """

    plain: bool
    padded: str | None
    alone: str | None


Recall = Callable[[tuple[object, ...], Callable[[], Findings]], Findings]
"""From what findings depend on (nothing: who knows) and what finds them to those of an earlier time, or new ones."""


def anew(behind: tuple[object, ...], find: Callable[[], Findings]) -> Findings:
    """Find again; a :data:`Recall` that remembers nothing."""
    del behind
    return find()


def behind(model: Any, base: str, *setup: object, objective: Objective) -> tuple[object, ...]:
    """Whatever decides what is found: weights, structure, adapter, libraries, code and processor.

    Args:
        model: The wrapped one.
        base: Digest of its frozen weights.
        setup: The adapter, and what is to be found.
        objective: What its outputs are held against.

    Returns:
        Values whose ``repr`` tells them apart; none for an objective of another package, whose code is not known here.
    """
    kind = type(objective)
    if not kind.__module__.startswith("lichen."):
        return ()
    import transformers

    return (
        base,
        *setup,
        (kind.__qualname__, objective.classes),
        (type(model).__qualname__, model.dtype, getattr(model.config, "_attn_implementation", None)),
        model.config.to_json_string(use_diff=False),
        (model.device.type, torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision()),
        (__version__, torch.__version__, transformers.__version__, _code()),
    )


@cache
def _code() -> str:
    """A digest of all files of this room: an edited one finds anew."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()
