"""Parts a model's blocks among hosts, so that the fullest and the busiest have as little as can be.

A block costs bytes and multiplications; the first host also holds the embeddings, which cost bytes alone, and the last
the head, which costs both.

Legend: S hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lichen.core.errors import LichenError
from lichen.models.pieces.families import blocks_of, family_of

__all__ = ["check_parts", "numbers_of", "part_blocks", "spans_of"]


def numbers_of(model: Any) -> tuple[list[int], int, int, int]:
    """``(each block's numbers, those before, those after, the whole's)``; of a matrix at both ends the whole has one.

    Args:
        model: A whole one; its structure is enough.
    """
    family, (path, stack) = family_of(model.config), blocks_of(model)
    each = [sum(x.numel() for x in block.parameters()) for block in stack]
    begins = tuple(f"{model.base_model_prefix}.{name}." for name in (family.embeddings, family.positions) if name)
    before = after = 0
    for name, x in model.named_parameters(remove_duplicate=False):
        if name.startswith(begins):
            before += x.numel()
        elif not name.startswith(f"{path}."):
            after += x.numel()
    return each, before, after, sum(x.numel() for x in model.parameters())


def part_blocks(each: Sequence[int], before: int, after: int, whole: int, hosts: int) -> tuple[int, ...]:
    """How many blocks each host has: the least of the largest share of the bytes or of the work that a host may have.

    Args:
        each: Numbers of each block, which are its bytes and its work.
        before: Numbers before the blocks: bytes, and no work.
        after: Numbers after them: bytes and work.
        whole: Numbers of the whole.
        hosts: S.

    >>> part_blocks([1] * 30, 8, 8, 38, 3), part_blocks([1, 1, 1, 1], 0, 0, 4, 3)
    ((8, 15, 7), (2, 1, 1))

    Raises:
        LichenError: if there are fewer blocks than hosts.
    """
    if hosts > len(each):
        raise LichenError(
            f"{hosts} hosts for {len(each)} blocks", where="pipeline.hosts", fix=f"use {len(each)} at most"
        )
    work = sum(each) + after
    at = [0]
    for numbers in each:
        at.append(at[-1] + numbers)

    def cost(start: int, stop: int, host: int) -> float:
        own = at[stop] - at[start] + (after if host == hosts - 1 else 0)
        return max((own + (before if host == 0 else 0)) / whole, own / work)

    # The best for the first hosts and blocks; of equal ones the more even, then the one that gives earlier hosts more.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for host in range(hosts):
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (worst, uneven, parts) in sorted(best.items()):
            for stop in range(start + 1, len(each) + 1):
                own = cost(start, stop, host)
                one = max(worst, own), uneven + own**2, (*parts, start - stop)
                found[stop] = min(found.get(stop, one), one)
        best = found
    return tuple(-blocks for blocks in best[len(each)][2])


def check_parts(parts: Sequence[int], blocks: int) -> None:
    """Refuse parts that are not the whole.

    Raises:
        LichenError: if they do not add up to the model's blocks.
    """
    if sum(parts) != blocks:
        raise LichenError(
            f"{sum(parts)} blocks are dealt out, and the model has {blocks}",
            where="pipeline.parts",
            fix="let them add up to that, or leave them out",
        )


def spans_of(parts: Sequence[int]) -> list[tuple[int, int]]:
    """``(start, stop)`` of each host.

    >>> spans_of((2, 3))
    [(0, 2), (2, 5)]
    """
    stops = [sum(parts[: n + 1]) for n in range(len(parts))]
    return list(zip([0, *stops[:-1]], stops, strict=True))
