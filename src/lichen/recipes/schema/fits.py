"""What goes with what: the parts of a recipe declare what they need, and what no longer holds with them.

The rule, the client method, the engine and the adapter are declared beside their code. Here are the recipe's other keys
that need something of them, or of each other. :func:`refuse` puts a recipe's parts side by side and refuses the first
that needs what another does not allow; the sentence comes from the declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from lichen.declared import Declared, Need, Paper, Property

__all__ = ["FEATURES", "Feature", "Part", "member", "refuse"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Another key that cannot be in use beside a feature, though both are fine by themselves.

    Attributes:
        other: The other key.
        used: Whether it is in use in a recipe.
        what: Why not.
        fix: What helps.
        where: The key at fault; empty for the feature's own.
    """

    other: str
    used: Callable[[Any], object]
    what: str
    fix: str
    where: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a recipe.

    Attributes:
        key: The recipe's key that chooses it.
        word: What a sentence calls it.
        needs: What all other parts must allow.
        lacks: What does not hold with it.
        clashes: Other keys that it does not go with.
    """

    key: str
    word: str
    needs: tuple[Need, ...] = ()
    lacks: frozenset[Property] = frozenset()
    clashes: tuple[Clash, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A key that may be in use, what it then needs, and what no longer holds.

    Attributes:
        key: The recipe's key.
        used: Whether it is in use in a recipe.
        needs: What all other parts must allow.
        lacks: What does not hold with it.
        clashes: Other keys that it does not go with.
        summary: What it does, in one line, where it is a method by itself.
        papers: Where that method comes from.
    """

    key: str
    used: Callable[[Any], object]
    needs: tuple[Need, ...] = ()
    lacks: frozenset[Property] = frozenset()
    clashes: tuple[Clash, ...] = ()
    summary: str = ""
    papers: tuple[Paper, ...] = ()


def member(declared: Declared, decides: frozenset[Property], key: str, *, word: str = "") -> Part:
    """A member of a family as a part of a recipe."""
    return Part(key=key, word=word or declared.name, needs=declared.needs, lacks=decides - declared.allows)


def _of_shared_model(key: str, used: Callable[[Any], object], *needs: Need, **more: Any) -> Feature:
    """A key of rounds over one model."""
    return Feature(
        key=key,
        used=used,
        needs=(Need(Property.SHARED_MODEL, "does not go with an {who}", "remove it"), *needs),
        **more,
    )


def _helps(key: str, **more: Any) -> Feature:
    """A section by which a foundation model, or unlabelled rows, help."""
    return Feature(
        key=key,
        used=lambda recipe: getattr(recipe, key) is not None,
        needs=(
            Need(
                Property.ALL_ROWS,
                "nodes of {who} open their own rows alone, without {me}",
                "use local",
                where="engine.name",
            ),
        ),
        clashes=(
            Clash(
                other="exchange",
                used=lambda recipe: recipe.exchange is not None,
                what="was not tried beside an exchange",
                fix="remove one of the two",
            ),
        ),
        **more,
    )


_HETEROGENEOUS = Need(
    Property.HETEROGENEOUS_RANKS, "{who} takes adapters of one rank", "use flora, flexlora, florist, fedex or hetlora"
)
_WHOLE_STEPS = frozenset({Property.EPOCHS, Property.ACCUMULATION})
_ONE_CLOCK = Need(Property.ONE_SERVER, "the processes of {who} have no common clock", "use engine.name: local")
_NO_LATE = frozenset({Property.LATE_ANSWERS})


def _timeless(recipe: Any) -> bool:
    """Whether all clients answer when they are asked."""
    return recipe.engine.name == "local" and recipe.engine.clock is None


_NOBODY_LATE = Clash(
    other="engine.clock",
    used=_timeless,
    what="in one process and without a clock nobody is late",
    fix="set engine.clock: {median: 60}, or engine.name: spawned",
)

FEATURES: tuple[Feature, ...] = (
    _helps(
        "teacher",
        summary="a foundation model's answers to public rows are learned from",
        papers=(
            Paper(short="Hinton et al. NIPS Deep Learning Workshop 2014", url="https://arxiv.org/abs/1503.02531"),
            Paper(short="Kim and Rush. EMNLP 2016", url="https://arxiv.org/abs/1606.07947"),
        ),
    ),
    _helps(
        "synthetic",
        summary="a foundation model writes rows: by label, or towards private rows (Private Evolution)",
        papers=(
            Paper(short="Ye et al. EMNLP 2022", url="https://arxiv.org/abs/2202.07922"),
            Paper(short="Lin et al. ICLR 2024", url="https://arxiv.org/abs/2305.15560"),
            Paper(short="Xie et al. ICML 2024", url="https://arxiv.org/abs/2403.01749"),
        ),
    ),
    _helps(
        "semi",
        lacks=_WHOLE_STEPS,
        summary="rows without a label are labelled by the model as it learns: FixMatch, FlexMatch",
        papers=(
            Paper(short="Sohn et al. NeurIPS 2020", url="https://arxiv.org/abs/2001.07685"),
            Paper(short="Zhang et al. NeurIPS 2021", url="https://arxiv.org/abs/2110.08263"),
        ),
    ),
    Feature(
        key="exchange",
        summary="unequal students share answers, not weights: FedMD, DS-FL, FedDF",
        papers=(
            Paper(
                short="Li and Wang. NeurIPS Workshop on Federated Learning 2019", url="https://arxiv.org/abs/1910.03581"
            ),
            Paper(short="Itahara et al. IEEE TMC 2023", url="https://arxiv.org/abs/2008.06180"),
            Paper(short="Lin et al. NeurIPS 2020", url="https://arxiv.org/abs/2006.07242"),
        ),
        used=lambda recipe: recipe.exchange is not None,
        needs=(
            Need(Property.ALL_ROWS, "an exchange runs in one process", "use local", where="engine.name"),
            Need(Property.ONE_SERVER, "an exchange runs in one process", "use local", where="engine.name"),
            Need(Property.PLAIN_TRAINING, "{who} trains no student", "use adamw or sgd", where="optimizer.name"),
        ),
        lacks=_WHOLE_STEPS | {Property.CODECS, Property.SHARED_MODEL, Property.RECIPE_WEIGHTS},
    ),
    Feature(
        key="wire",
        summary="messages are clipped, quantised, made sparse or of low rank",
        papers=(
            Paper(short="Alistarh et al. NIPS 2017", url="https://arxiv.org/abs/1610.02132"),
            Paper(short="Karimireddy et al. ICML 2019", url="https://arxiv.org/abs/1901.09847"),
            Paper(short="Vogels et al. NeurIPS 2019", url="https://arxiv.org/abs/1905.13727"),
        ),
        used=lambda recipe: recipe.wire.up or recipe.wire.down or recipe.wire.clip is not None,
        needs=(Need(Property.CODECS, "what {who} sends is sent as it is", "remove it"),),
    ),
    Feature(
        key="semi.server",
        lacks=_NO_LATE,
        summary="SemiFL: the server trains on public labelled rows in turns",
        papers=(Paper(short="Diao et al. NeurIPS 2022", url="https://arxiv.org/abs/2106.01432"),),
        used=lambda recipe: recipe.semi is not None and recipe.semi.server,
        needs=(Need(Property.ONE_SERVER, "trains in one process", "use engine.name: local"),),
        clashes=(
            Clash(
                other="federation.fair",
                used=lambda recipe: recipe.federation.fair == "minmax",
                what="minmax and the server's own training are two algorithms",
                fix="remove one",
                where="federation.fair",
            ),
        ),
    ),
    Feature(
        key="federation.server",
        summary="the change is a step of SGD with momentum, Adam or Yogi",
        papers=(Paper(short="Reddi et al. ICLR 2021", url="https://arxiv.org/abs/2003.00295"),),
        used=lambda recipe: (
            (recipe.federation.server.name, recipe.federation.server.lr, recipe.federation.server.momentum)
            != ("sgd", 1.0, 0.0)
        ),
        needs=(
            Need(
                Property.SERVER_STEP,
                "{who} is exact for plain averaging only",
                "use sgd with lr 1 and no momentum",
            ),
        ),
    ),
    _of_shared_model(
        "federation.schedule.kind",
        lambda recipe: recipe.federation.schedule.kind == "buffered",
        Need(
            Property.LATE_ANSWERS,
            "{who} cannot fold in what was made for older tensors",
            "use mean, fedit or ffa and adamw, sgd or mezo, with one layout for all, or schedule.kind: synchronous",
        ),
        _ONE_CLOCK,
        summary="FedBuff: a step after so many answers of whatever age, while the others train on",
        papers=(Paper(short="Nguyen et al. AISTATS 2022", url="https://arxiv.org/abs/2106.06639"),),
        clashes=(
            _NOBODY_LATE,
            Clash(
                other="federation.clients_per_round",
                used=lambda recipe: recipe.federation.clients_per_round is not None,
                what="a buffered step has schedule.arrivals answers of schedule.concurrency clients at work",
                fix="remove it",
                where="federation.clients_per_round",
            ),
            Clash(
                other="federation.sampling",
                used=lambda recipe: recipe.federation.sampling == "poisson",
                what="those at work stay, so that no step draws its clients by their own coins",
                fix="use uniform or weighted",
                where="federation.sampling",
            ),
        ),
    ),
    _of_shared_model(
        "federation.schedule.deadline",
        lambda recipe: recipe.federation.schedule.deadline is not None,
        _ONE_CLOCK,
        clashes=(_NOBODY_LATE,),
    ),
    _of_shared_model("federation.schedule.least", lambda recipe: recipe.federation.schedule.least > 1),
    _of_shared_model(
        "engine.clock",
        lambda recipe: recipe.engine.clock is not None,
        _ONE_CLOCK,
        clashes=(
            Clash(
                other="federation.schedule.deadline",
                used=lambda recipe: recipe.engine.clock.dropout and recipe.federation.schedule.deadline is None,
                what="who drops out never answers, and without a deadline is waited for",
                fix="set federation.schedule.deadline",
                where="engine.clock.dropout",
            ),
        ),
    ),
    _of_shared_model(
        "federation.fair",
        lambda recipe: recipe.federation.fair != "none",
        Need(Property.PLAIN_MEAN, "weighs plain averages of gradient training, not {who}", "use aggregate: mean"),
        Need(Property.GRADIENTS, "weighs plain averages of gradient training, not {who}", "use adamw or sgd"),
        Need(Property.ONE_SERVER, "was not tried on several ranks", "use engine.name: local"),
        lacks=_NO_LATE,
        summary="large losses count more: q-FFL, agnostic federated learning",
        papers=(
            Paper(short="Li et al. ICLR 2020", url="https://arxiv.org/abs/1905.10497"),
            Paper(short="Mohri et al. ICML 2019", url="https://arxiv.org/abs/1902.00146"),
        ),
        clashes=(
            Clash(
                other="wire.up",
                used=lambda recipe: recipe.wire.up,
                what="weighs plain averages of gradient training",
                fix="use no wire.up",
            ),
        ),
    ),
    _of_shared_model("federation.stream_fragments", lambda recipe: recipe.federation.stream_fragments > 1),
    _of_shared_model("federation.drop_prob", lambda recipe: recipe.federation.drop_prob),
    Feature(
        key="federation.local_epochs",
        used=lambda recipe: recipe.federation.local_epochs is not None,
        needs=(Need(Property.EPOCHS, "{who} counts steps", "set federation.local_steps instead"),),
    ),
    Feature(
        key="federation.gradient_accumulation_steps",
        used=lambda recipe: recipe.federation.gradient_accumulation_steps > 1,
        needs=(Need(Property.ACCUMULATION, "{who} takes every batch for a step", "raise federation.batch_size"),),
    ),
    Feature(
        key="federation.weighting",
        used=lambda recipe: recipe.federation.weighting == "rows",
        needs=(Need(Property.RECIPE_WEIGHTS, "{who} has weights of its own", "remove it"),),
    ),
    Feature(
        key="federation.fair",
        used=lambda recipe: recipe.federation.fair == "minmax",
        lacks=frozenset({Property.RECIPE_WEIGHTS}),
    ),
    _of_shared_model(
        "federation.layer_groups",
        lambda recipe: recipe.federation.layer_groups > 1,
        Need(Property.LAYER_TURNS, "{who} says which layers are trained", "remove one of the two"),
        lacks=_NO_LATE,
    ),
    _of_shared_model(
        "federation.ranks",
        lambda recipe: recipe.federation.ranks is not None,
        _HETEROGENEOUS,
        lacks=_NO_LATE,
        clashes=(
            Clash(
                other="federation.memory",
                used=lambda recipe: recipe.federation.memory is not None,
                what="memory chooses the ranks",
                fix="remove one of the two",
            ),
            Clash(
                other="wire.down",
                used=lambda recipe: recipe.wire.down,
                what="clients of unequal ranks hold no common state",
                fix="remove it, or federation.ranks",
                where="wire.down",
            ),
        ),
    ),
    Feature(
        key="federation.memory",  # beside an exchange, each client takes the largest student that fits
        used=lambda recipe: recipe.federation.memory is not None and not recipe.model.students,
        needs=(_HETEROGENEOUS,),
        lacks=frozenset({Property.LAYER_TURNS, Property.LATE_ANSWERS}),
        clashes=(
            Clash(
                other="wire.down",
                used=lambda recipe: recipe.wire.down,
                what="clients of unequal ranks hold no common state",
                fix="remove it, or federation.memory",
                where="wire.down",
            ),
        ),
    ),
    Feature(
        key="compare.baselines",
        used=lambda recipe: {"alone", "pooled"} & set(recipe.compare.baselines),
        needs=(Need(Property.GRADIENTS, "alone and pooled are trained by gradients, not by {who}", "use [base]"),),
    ),
    Feature(
        key="compare.baselines",
        used=lambda recipe: "pooled" in recipe.compare.baselines,
        needs=(Need(Property.SHARED_MODEL, "beside an {who} there is no model for pooled rows", "use [alone]"),),
    ),
)
"""In the order in which a recipe is looked through."""


def refuse(recipe: Any, members: Sequence[Part]) -> None:
    """Refuse the first part that needs what another part does not allow, or that clashes with another key.

    Args:
        recipe: The recipe.
        members: Its rule, client method, engine and what is trained.

    Raises:
        ValueError: naming the key and the fix.
    """
    features = tuple(feature for feature in FEATURES if feature.used(recipe))
    parts = (*map(_part, features), *members)
    for part in parts:
        for need in part.needs:
            for other in parts:
                if other is not part and need.property in other.lacks:
                    what = need.what.format(who=other.word, me=part.word)
                    raise ValueError(f"{need.where or part.key}: {what}; {need.fix}")
        for clash in part.clashes:
            if clash.used(recipe):
                raise ValueError(f"{clash.where or part.key}: {clash.what}; {clash.fix}")


def _part(feature: Feature) -> Part:
    """A feature that is in use."""
    return Part(key=feature.key, word=feature.key, needs=feature.needs, lacks=feature.lacks, clashes=feature.clashes)
