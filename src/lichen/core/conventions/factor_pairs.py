"""Says which shared tensors are low-rank factor pairs: the two names by which every part of the house finds them.

A layer's pair stands for ``B A`` beside its weight and travels as two tensors, ``<layer>.lora_A`` of ``(rank, in)`` and
``<layer>.lora_B`` of ``(out, rank)``, as PEFT writes them. Aggregation rules, submodels and plans see nothing of an
adapter but these names. Whether an adapter is such pairs and nothing more is its kind's to say
(:class:`lichen.models.adapters.table.Facts`).
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["A", "B", "factor_names", "is_factor", "layers_with_factors"]

A, B = "lora_A", "lora_B"

_RANK_AXIS = {A: 0, B: 1}


def rank_axis(name: str) -> int | None:
    """Where a tensor's rank lies: 0 for A, 1 for B, None for what is no factor.

    >>> rank_axis("q.lora_A"), rank_axis("q.lora_B"), rank_axis("head.weight")
    (0, 1, None)
    """
    layer, dot, leaf = name.rpartition(".")
    return _RANK_AXIS.get(leaf) if dot and layer else None


def is_factor(name: str) -> bool:
    """Whether a tensor is one of the two factors of a layer."""
    return rank_axis(name) is not None


def layers_with_factors(names: Iterable[str]) -> list[str]:
    """The layers of which ``names`` has the factor A, sorted.

    >>> layers_with_factors({"v.lora_A": 0, "v.lora_B": 0, "q.lora_A": 0, "head.weight": 0})
    ['q', 'v']
    """
    return sorted(name.removesuffix(f".{A}") for name in names if name.endswith(f".{A}"))


def factor_names(layer: str) -> tuple[str, str]:
    """``(name of A, name of B)`` of a layer.

    >>> factor_names("q")
    ('q.lora_A', 'q.lora_B')
    """
    return f"{layer}.{A}", f"{layer}.{B}"
