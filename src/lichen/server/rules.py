"""Every aggregation rule that a recipe can name: what it needs and allows, its paper, and how it is made.

Nothing heavy is imported before a rule is made, so that recipes are read fast. How to add a rule of your own, in this
table or by the entry point ``lichen.aggregators``: :mod:`lichen.declared` and ``docs/extending.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from lichen.declared import Family, Need, Paper, Property

if TYPE_CHECKING:
    from lichen.core.contracts.server import Aggregator

__all__ = ["DECIDES", "RULES", "AggregationRule", "RuleSettings"]

DECIDES = frozenset(
    {
        Property.PLAIN_MEAN,
        Property.SERVER_STEP,
        Property.MEAN_OF_ONE_LAYOUT,
        Property.BOUNDED_SUM,
        Property.HETEROGENEOUS_RANKS,
        Property.ONE_LAYOUT,
        Property.SUMS,
        Property.LATE_ANSWERS,
    }
)
"""Properties of a recipe that its rule may allow or not."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """What a recipe tells a rule.

    Attributes:
        weighting: How messages are weighed: by the weight each brings, or all alike.
        scaling: What a LoRA layer puts on ``B A``.
        energy: Share of the squared singular values that is kept.
        seed: The recipe's.
    """

    weighting: Literal["examples", "uniform"] = "examples"
    scaling: float = 1.0
    energy: float = 0.99
    seed: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationRule:
    """How the clients' changes become one.

    Attributes:
        name: The word in a recipe, under ``federation.aggregate``.
        summary: What it does, in one line.
        make: The aggregator.
        make_summed: The same change from sums alone, where :attr:`make` looks at single messages for its report; None:
            :attr:`make` does with sums, or has to look.
        papers: Where it comes from.
        needs: What the rest of the recipe must allow.
        allows: Which of :data:`DECIDES` hold with it.
        freezes: Ends of names that nobody trains or sends, in rounds that take turns.
        local_params: Ends of names that every client trains and keeps.
        reads: Keys of the section ``federation`` that say something to it, and not to every rule.
        patch: Adapters' worth of rank that a round adds to the patch beside the clients' own; None: it has no patch.
    """

    name: str
    summary: str
    make: Callable[[RuleSettings], Aggregator]
    papers: tuple[Paper, ...] = ()
    needs: tuple[Need, ...] = ()
    allows: frozenset[Property] = frozenset()
    freezes: tuple[tuple[str, ...], ...] = ()
    local_params: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    patch: int | None = None
    make_summed: Callable[[RuleSettings], Aggregator] | None = None


LORA = Need(Property.LORA_FACTORS, "{who} has no LoRA factors", "use mean, or leave it out")
"""The rule works on LoRA's factors."""
_FREEZES = Need(Property.LAYER_TURNS, "{me} freezes half of each pair, and {who} trains both", "use mean or fedit")
_KEEPS = Need(
    Property.PERSONAL_TENSORS, "clients keep B with {me}, and with {who} they keep nothing", "use mean or fedit"
)

_STEPS = frozenset({Property.SERVER_STEP, Property.MEAN_OF_ONE_LAYOUT})
_SUMS = _STEPS | {Property.SUMS}
_HETEROGENEOUS = frozenset({Property.HETEROGENEOUS_RANKS, Property.ONE_LAYOUT})


def _mean(settings: RuleSettings) -> Aggregator:
    from lichen.server.mean import Mean

    return Mean(weighting=settings.weighting)


def _fedit(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.lowrank import FedIT

    return FedIT(weighting=settings.weighting)


def _fedex(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.lowrank import FedEx

    return FedEx(settings.scaling, weighting=settings.weighting)


def _flora(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.stacking import FLoRA

    return FLoRA(settings.scaling, weighting=settings.weighting, seed=settings.seed)


def _flexlora(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.redistribute import FlexLoRA

    return FlexLoRA(weighting=settings.weighting, seed=settings.seed)


def _florist(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.redistribute import FLoRIST

    return FLoRIST(settings.energy, weighting=settings.weighting, seed=settings.seed)


def _fedsvd(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.fedsvd import FedSVD
    from lichen.server.mean import Mean

    return FedSVD(Mean(weighting=settings.weighting), seed=settings.seed)


def _hetlora(settings: RuleSettings) -> Aggregator:
    from lichen.server.lowrank.hetlora import HetLoRA

    return HetLoRA(weighting=settings.weighting)


RULES = Family(
    "lichen.aggregators",
    AggregationRule,
    decides=DECIDES,
    members=(
        AggregationRule(
            name="mean",
            summary="the weighted mean of what clients send (FedAvg)",
            make=_mean,
            papers=(Paper(short="McMahan et al. AISTATS 2017", url="https://arxiv.org/abs/1602.05629"),),
            allows=_SUMS | {Property.PLAIN_MEAN, Property.ONE_LAYOUT, Property.LATE_ANSWERS, Property.BOUNDED_SUM},
        ),
        AggregationRule(
            name="fedit",
            summary="the mean of LoRA's factors one by one; what that loses is reported, but under masks",
            make=_fedit,
            papers=(Paper(short="Zhang et al. ICASSP 2024", url="https://arxiv.org/abs/2305.05644"),),
            needs=(LORA,),
            allows=_SUMS | _HETEROGENEOUS | {Property.LATE_ANSWERS, Property.BOUNDED_SUM},
            make_summed=_mean,
        ),
        AggregationRule(
            name="ffa",
            summary="FFA-LoRA: A is frozen, clients train and send B",
            make=_mean,
            papers=(Paper(short="Sun et al. ICLR 2024", url="https://arxiv.org/abs/2403.12313"),),
            needs=(LORA, _FREEZES),
            allows=_SUMS | {Property.LATE_ANSWERS, Property.BOUNDED_SUM},
            freezes=(("lora_A",),),
        ),
        AggregationRule(
            name="flora",
            summary="the clients' adapters, stacked, become part of the frozen layer; a new adapter begins",
            make=_flora,
            papers=(Paper(short="Wang et al. NeurIPS 2024", url="https://arxiv.org/abs/2409.05976"),),
            needs=(LORA,),
            allows=_HETEROGENEOUS,
            patch=0,
        ),
        AggregationRule(
            name="fedex",
            summary="FedIT, and what averaging loses is added to a patch of the frozen layer",
            make=_fedex,
            papers=(Paper(short="Singhal et al. ACL 2025", url="https://arxiv.org/abs/2410.09432"),),
            needs=(LORA,),
            allows=_HETEROGENEOUS,
            patch=2,
        ),
        AggregationRule(
            name="flexlora",
            summary="the mean product's leading singular directions become the shared adapter",
            make=_flexlora,
            papers=(Paper(short="Bai et al. NeurIPS 2024", url="https://arxiv.org/abs/2402.11505"),),
            needs=(LORA,),
            allows=_HETEROGENEOUS,
        ),
        AggregationRule(
            name="florist",
            summary="as flexlora, with the fewest directions that hold a share of the energy",
            make=_florist,
            papers=(Paper(short="Ramesh and Dass. 2025", url="https://arxiv.org/abs/2506.09199"),),
            needs=(LORA,),
            allows=_HETEROGENEOUS,
            reads=frozenset({"energy"}),
        ),
        AggregationRule(
            name="fedsvd",
            summary="clients train B; between rounds A turns to where the product points",
            make=_fedsvd,
            papers=(Paper(short="Lee et al. NeurIPS 2025", url="https://arxiv.org/abs/2505.12805"),),
            needs=(LORA, _FREEZES),
            allows=frozenset({Property.SUMS, Property.BOUNDED_SUM}),
            freezes=(("lora_A",),),
        ),
        AggregationRule(
            name="fedsa",
            summary="FedSA-LoRA: clients share A and keep B",
            make=_mean,
            papers=(Paper(short="Guo et al. ICLR 2025", url="https://arxiv.org/abs/2410.01463"),),
            needs=(LORA, _KEEPS),
            allows=_SUMS,
            local_params=("lora_B",),
        ),
        AggregationRule(
            name="rolora",
            summary="RoLoRA: rounds of B and rounds of A take turns",
            make=_mean,
            papers=(Paper(short="Chen et al. NeurIPS 2025", url="https://arxiv.org/abs/2502.01755"),),
            needs=(LORA, _FREEZES),
            allows=_SUMS | {Property.BOUNDED_SUM},
            freezes=(("lora_A",), ("lora_B",)),
        ),
        AggregationRule(
            name="hetlora",
            summary="adapters of unequal ranks, padded with zeros, weighed by their norm",
            make=_hetlora,
            papers=(Paper(short="Cho et al. EMNLP 2024", url="https://arxiv.org/abs/2401.06432"),),
            needs=(LORA,),
            allows=_HETEROGENEOUS,
        ),
    ),
)
"""The rules in the order of the guide."""
