"""Every robust rule that a recipe can name: its papers, what it reads, and how many clients it needs.

Nothing heavy is imported here, so that recipes are read fast. The rules themselves:
:mod:`lichen.server.robust.robust`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from lichen.core.errors import LichenError
from lichen.declared import Paper

__all__ = ["NNM", "ROBUST", "too_many_liars"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RobustRule:
    """A rule that some clients may lie to.

    Attributes:
        name: The word in a recipe, under ``federation.robust.rule``.
        summary: What it does, in one line.
        papers: Where it comes from.
        looks_at: The distances between clients, each number by itself, or the server's own change.
        reads: Keys of the section that say something to it, and not to every rule.
        more: Clients that must come beside two for each liar.
        radius: Whether it makes no sense without a radius.
        drops: Whether it leaves clients out.
    """

    name: str
    summary: str
    papers: tuple[Paper, ...]
    looks_at: Literal["distances", "coordinates", "reference"] = "distances"
    reads: frozenset[str] = frozenset()
    more: int = 1
    radius: bool = False
    drops: bool = False

    def least(self, liars: int) -> int:
        """The fewest clients of which so many may lie.

        >>> ROBUST["krum"].least(2), ROBUST["median"].least(2)
        (7, 5)
        """
        return 1 if self.looks_at == "reference" else 2 * liars + self.more


_KRUM = Paper(short="Blanchard et al. NeurIPS 2017", url="https://arxiv.org/abs/1703.02757")
_YIN = Paper(short="Yin et al. ICML 2018", url="https://arxiv.org/abs/1803.01498")
NNM = Paper(short="Allouah et al. AISTATS 2023", url="https://arxiv.org/abs/2302.01772")
"""Mixing with nearest neighbours, before any rule."""

_OF = frozenset({"of", "mixing", "liars"})

ROBUST: Mapping[str, RobustRule] = {
    rule.name: rule
    for rule in (
        RobustRule(
            name="krum",
            summary="the change of the one client whose nearest n - f - 2 others are nearest",
            papers=(_KRUM,),
            reads=_OF,
            more=3,
            drops=True,
        ),
        RobustRule(
            name="multi_krum",
            summary="the mean of the n - f clients that Krum likes best",
            papers=(_KRUM,),
            reads=_OF,
            more=3,
            drops=True,
        ),
        RobustRule(
            name="geometric_median",
            summary="RFA: the point of the least sum of distances to all clients",
            papers=(Paper(short="Pillutla et al. IEEE TSP 2022", url="https://arxiv.org/abs/1912.13445"),),
            reads=_OF | {"iterations"},
        ),
        RobustRule(
            name="centred_clipping",
            summary="steps by the mean of what clients lie off, each cut to a radius",
            papers=(Paper(short="Karimireddy et al. ICML 2021", url="https://arxiv.org/abs/2012.10333"),),
            reads=_OF | {"radius", "iterations"},
            radius=True,
        ),
        RobustRule(
            name="norm_bound",
            summary="the mean of changes that are cut to a radius, or to the median norm of the round",
            papers=(Paper(short="Sun et al. 2019", url="https://arxiv.org/abs/1911.07963"),),
            reads=_OF | {"radius"},
        ),
        RobustRule(
            name="median",
            summary="the median of each number",
            papers=(_YIN,),
            looks_at="coordinates",
            reads=frozenset({"mixing", "liars"}),
        ),
        RobustRule(
            name="trimmed_mean",
            summary="the mean of each number without its f lowest and f highest",
            papers=(_YIN,),
            looks_at="coordinates",
            reads=frozenset({"mixing", "liars"}),
        ),
        RobustRule(
            name="fltrust",
            summary="the mean by how much a change points where the server's own does, on public labelled rows",
            papers=(Paper(short="Cao et al. NDSS 2021", url="https://arxiv.org/abs/2012.13995"),),
            looks_at="reference",
            drops=True,
        ),
    )
}
"""In the order of the guide."""


def too_many_liars(rule: str, liars: int, clients: int) -> LichenError | None:
    """Why this rule does not stand so many liars in a round of so many clients; None where it does.

    >>> print(too_many_liars("krum", 1, 5), too_many_liars("median", 2, 4).what)
    None with 2 liars median needs 5 clients, and a round has 4
    """
    least = ROBUST[rule].least(liars)
    if clients >= least:
        return None
    return LichenError(
        f"with {liars} liars {rule} needs {least} clients, and a round has {clients}",
        where="federation.robust.liars",
        fix="lower it, or let more clients come to a round",
    )
