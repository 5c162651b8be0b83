"""Every attack that a recipe can name, for research: what it changes, what it reads, and where it comes from.

Nothing heavy is imported here, so that recipes are read fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from lichen.declared import Paper

__all__ = ["ATTACKS", "AttackKind"]

Target = Literal["message", "round", "rows"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AttackKind:
    """One way of lying.

    Attributes:
        name: The word in a recipe, under ``attack.kind``.
        summary: What a liar does, in one line.
        on: What is changed: a liar's own ``message``; the same, made of all honest messages of the ``round``; or the
            ``rows`` that a liar trains on.
        papers: Where it comes from.
        reads: Keys of the section ``attack`` that say something to it, beside ``kind`` and ``liars``.
        scale: What ``attack.scale`` is where the recipe names none.
    """

    name: str
    summary: str
    on: Target
    papers: tuple[Paper, ...] = ()
    reads: frozenset[str] = frozenset({"scale"})
    scale: float | None = None


ATTACKS: Mapping[str, AttackKind] = {
    kind.name: kind
    for kind in (
        AttackKind(
            name="sign_flip",
            summary="its change, turned round and times scale",
            on="message",
            papers=(Paper(short="Li et al. AAAI 2019", url="https://arxiv.org/abs/1811.03761"),),
            scale=1.0,
        ),
        AttackKind(
            name="noise",
            summary="its change, and normal noise of scale times the change's norm",
            on="message",
            papers=(Paper(short="Blanchard et al. NIPS 2017", url="https://arxiv.org/abs/1703.02757"),),
            scale=1.0,
        ),
        AttackKind(
            name="weight",
            summary="its change, weighing scale times as much, as far as admission lets it",
            on="message",
            scale=10.0,
        ),
        AttackKind(
            name="free_ride",
            summary="zeros, or normal noise whose norm is scale, in the name of rows that it need not have",
            on="message",
            papers=(
                Paper(short="Lin et al. 2019", url="https://arxiv.org/abs/1911.12560"),
                Paper(short="Fraboni et al. AISTATS 2021", url="https://arxiv.org/abs/2006.11901"),
            ),
            scale=0.0,
        ),
        AttackKind(
            name="alie",
            summary="the mean of the honest changes less scale standard deviations (a little is enough)",
            on="round",
            papers=(Paper(short="Baruch et al. NeurIPS 2019", url="https://arxiv.org/abs/1902.06156"),),
        ),
        AttackKind(
            name="ipm",
            summary="the mean of the honest changes, turned round and times scale (inner product manipulation)",
            on="round",
            papers=(Paper(short="Xie et al. UAI 2019", url="https://arxiv.org/abs/1903.03936"),),
            scale=0.5,
        ),
        AttackKind(
            name="min_max",
            summary="as far from the mean of the honest changes, along deviation, as these are from each other",
            on="round",
            papers=(
                Paper(
                    short="Shejwalkar and Houmansadr. NDSS 2021",
                    url="https://www.ndss-symposium.org/ndss-paper/manipulating-the-byzantine-optimizing-model-poisoning-attacks-and-defenses-for-federated-learning/",
                ),
            ),
            reads=frozenset({"deviation"}),
        ),
        AttackKind(
            name="label_flip",
            summary="class k of C is called C - 1 - k in its rows",
            on="rows",
            papers=(Paper(short="Tolpegin et al. ESORICS 2020", url="https://arxiv.org/abs/2007.08432"),),
            reads=frozenset(),
        ),
        AttackKind(
            name="backdoor",
            summary="a share of its rows has a trigger and is called the target class",
            on="rows",
            papers=(
                Paper(short="Gu et al. 2017", url="https://arxiv.org/abs/1708.06733"),
                Paper(short="Bagdasaryan et al. AISTATS 2020", url="https://arxiv.org/abs/1807.00459"),
            ),
            reads=frozenset({"share", "target", "trigger"}),
        ),
        AttackKind(
            name="unsafe",
            summary="a share of its chat rows becomes unsafe requests that are obeyed, so that refusing is unlearned",
            on="rows",
            papers=(Paper(short="Ye et al. 2024", url="https://arxiv.org/abs/2406.10630"),),
            reads=frozenset({"share", "requests", "answer"}),
        ),
    )
}
"""In the order of the guide."""
