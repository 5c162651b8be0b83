"""Every loss of preferences that a recipe can name: what rows it needs, what it reads, and where it comes from.

Nothing heavy is imported here, so that recipes are read fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from lichen.declared import Paper

__all__ = ["PREFERENCES", "PreferenceKind"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceKind:
    """One way of learning what is preferred.

    Attributes:
        name: The word in a recipe, under ``prefer.kind``.
        summary: What it does, in one line.
        papers: Where it comes from.
        needs: What rows must have: a ``rejected`` answer each, a ``rating``, ``either``, or an ``answer`` alone.
        beta: What ``prefer.beta`` is where the recipe names none.
        reads: Keys of the section ``prefer`` that say something to it, beside ``kind``.
        of_batch: A row's loss depends on the other rows of its batch.
    """

    name: str
    summary: str
    papers: tuple[Paper, ...] = ()
    needs: Literal["rejected", "rating", "either", "answer"] = "rejected"
    beta: float = 0.1
    reads: frozenset[str] = frozenset()
    of_batch: bool = False


_RATED = frozenset({"good", "bad", "min_good", "min_bad"})

PREFERENCES: Mapping[str, PreferenceKind] = {
    kind.name: kind
    for kind in (
        PreferenceKind(
            name="dpo",
            summary="the better answer gains on the worse one, both held against the model that training begins from",
            papers=(Paper(short="Rafailov et al. NeurIPS 2023", url="https://arxiv.org/abs/2305.18290"),),
            reads=frozenset({"beta"}),
        ),
        PreferenceKind(
            name="kto",
            summary="good rows gain and bad ones lose, each held against the mean of mismatched answers",
            papers=(Paper(short="Ethayarajh et al. ICML 2024", url="https://arxiv.org/abs/2402.01306"),),
            needs="rating",
            reads=frozenset({"beta", "good_weight", "bad_weight"}) | _RATED,
            of_batch=True,
        ),
        PreferenceKind(
            name="orpo",
            summary="the better answer is learned, and its odds gain on those of the worse one; no reference",
            papers=(Paper(short="Hong et al. EMNLP 2024", url="https://arxiv.org/abs/2403.07691"),),
            reads=frozenset({"beta", "own_answers", "temperature"}) | _RATED,
        ),
        PreferenceKind(
            name="simpo",
            summary="the better answer is likelier by a margin, a token of it on average; no reference",
            papers=(Paper(short="Meng et al. NeurIPS 2024", url="https://arxiv.org/abs/2405.14734"),),
            beta=2.0,
            reads=frozenset({"beta", "gamma", "own_answers", "temperature"}) | _RATED,
        ),
        PreferenceKind(
            name="spin",
            summary="DPO with the clients' own texts as the better and the model's own answers as the worse ones",
            papers=(Paper(short="Chen et al. ICML 2024", url="https://arxiv.org/abs/2401.01335"),),
            needs="answer",
            reads=frozenset({"beta", "temperature"}) | _RATED,
        ),
        PreferenceKind(
            name="sft",
            summary="the better answers, or good rows, are learned and nothing else: what the others are held against",
            needs="either",
            reads=_RATED,
        ),
    )
}
"""By name."""
