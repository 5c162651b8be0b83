"""Blocks are dealt out so that the fullest and the busiest host has as little as can be."""

from __future__ import annotations

from itertools import combinations

import pytest

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.models.pieces.partition import check_parts, numbers_of, part_blocks, spans_of
from support.pieces import four_blocks


def worst(each: list[int], before: int, after: int, whole: int, parts: tuple[int, ...]) -> float:
    found = []
    for host, (start, stop) in enumerate(spans_of(parts)):
        work = sum(each[start:stop]) + (after if host == len(parts) - 1 else 0)
        found.append(max((work + (before if host == 0 else 0)) / whole, work / (sum(each) + after)))
    return max(found)


def test_no_other_parts_are_better() -> None:
    rng = numpy_generator(0, "parts")
    for _ in range(40):
        each = [int(x) for x in rng.integers(1, 9, rng.integers(2, 8))]
        before, after = (int(x) for x in rng.integers(0, 20, 2))
        whole = sum(each) + max(before, after)
        for hosts in range(1, len(each) + 1):
            parts = part_blocks(each, before, after, whole, hosts)
            assert (len(parts), sum(parts)) == (hosts, len(each))
            cuts = combinations(range(1, len(each)), hosts - 1)
            every = [tuple(b - a for a, b in zip((0, *c), (*c, len(each)), strict=True)) for c in cuts]
            assert worst(each, before, after, whole, parts) == min(
                worst(each, before, after, whole, other) for other in every
            )


def test_numbers_are_the_models() -> None:
    for name in ("llama", "qwen2", "gpt2", "bert"):
        model = four_blocks(name)
        each, before, after, whole = numbers_of(model)
        assert whole == sum(x.numel() for x in model.parameters())
        tied = model.config.tie_word_embeddings and name in ("qwen2", "gpt2")
        assert sum(each) + before + after == whole + (model.get_input_embeddings().weight.numel() if tied else 0)


def test_parts_that_are_not_the_whole_are_refused() -> None:
    check_parts((1, 3), 4)
    with pytest.raises(LichenError, match="3 blocks are dealt out, and the model has 4"):
        check_parts((1, 2), 4)
    with pytest.raises(LichenError, match="5 hosts for 4 blocks"):
        part_blocks([1] * 4, 0, 0, 4, 5)
