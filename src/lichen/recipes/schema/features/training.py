"""How clients train, who counts how much, and what of the model each of them holds."""

from __future__ import annotations

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, Feature, of_shared_model

__all__ = ["TRAINING"]

_HETEROGENEOUS = Need(
    Property.HETEROGENEOUS_RANKS, "{who} takes adapters of one rank", "use flora, flexlora, florist, fedex or hetlora"
)

TRAINING: tuple[Feature, ...] = (
    of_shared_model(
        "federation.fair",
        lambda recipe: recipe.federation.fair != "none",
        Need(Property.PLAIN_MEAN, "weighs plain averages of gradient training, not {who}", "use aggregate: mean"),
        Need(Property.PLAIN_TRAINING, "weighs plain averages of gradient training, not {who}", "use adamw or sgd"),
        Need(Property.ONE_SERVER, "was not tried on several ranks", "use engine.name: local"),
        lacks=NO_LATE | {Property.MEAN_OF_ONE_LAYOUT, Property.BOUNDED_SUM},
        summary="large losses count more: q-FFL, agnostic federated learning, tilted averages",
        papers=(
            Paper(short="Li et al. ICLR 2020", url="https://arxiv.org/abs/1905.10497"),
            Paper(short="Mohri et al. ICML 2019", url="https://arxiv.org/abs/1902.00146"),
            Paper(short="Li et al. ICLR 2021", url="https://arxiv.org/abs/2007.01162"),
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
    of_shared_model("federation.stream_fragments", lambda recipe: recipe.federation.stream_fragments > 1),
    of_shared_model("federation.drop_prob", lambda recipe: recipe.federation.drop_prob),
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
        # The mean of averages, in feddf, weighs all alike or by examples.
        used=lambda recipe: (
            recipe.federation.weighting == "rows"
            or (
                recipe.federation.weighting == "uniform"
                and not (recipe.exchange is not None and recipe.exchange.kind == "feddf")
            )
        ),
        needs=(Need(Property.RECIPE_WEIGHTS, "{who} has weights of its own", "remove it"),),
    ),
    Feature(
        key="federation.fair",
        used=lambda recipe: recipe.federation.fair == "minmax",
        lacks=frozenset({Property.RECIPE_WEIGHTS}),
    ),
    of_shared_model(
        "federation.layer_groups",
        lambda recipe: recipe.federation.layer_groups > 1,
        Need(
            Property.LAYER_TURNS, "{who} trains all layers in every round, or those of its own", "remove one of the two"
        ),
        lacks=NO_LATE,
    ),
    of_shared_model(
        "federation.ranks",
        lambda recipe: recipe.federation.ranks is not None,
        _HETEROGENEOUS,
        lacks=NO_LATE | {Property.MEAN_OF_ONE_LAYOUT},
        clashes=(
            Clash(
                other="federation.memory",
                used=lambda recipe: recipe.federation.memory is not None,
                what="memory chooses the ranks, or of a split model the blocks",
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
        # Beside an exchange each client takes the largest student that fits, of a split model the largest cut.
        key="federation.memory",
        used=lambda r: r.federation.memory is not None and not r.model.students and r.split is None,
        needs=(_HETEROGENEOUS,),
        lacks=frozenset({Property.LAYER_TURNS, Property.LATE_ANSWERS, Property.MEAN_OF_ONE_LAYOUT}),
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
        used=lambda recipe: {"alone", "alone_best", "pooled"} & set(recipe.compare.baselines),
        needs=(Need(Property.GRADIENTS, "alone and pooled are trained by gradients, not by {who}", "use [base]"),),
    ),
    Feature(
        key="compare.baselines",
        used=lambda recipe: "pooled" in recipe.compare.baselines,
        needs=(Need(Property.SHARED_MODEL, "beside an {who} there is no model for pooled rows", "use [alone]"),),
    ),
    Feature(
        key="compare.proxy",
        used=lambda recipe: recipe.compare.proxy is not None,
        summary="proxy tuning: what tuning changed in a small model's logits, added to those of a large one",
        papers=(Paper(short="Liu et al. COLM 2024", url="https://arxiv.org/abs/2401.08565"),),
        needs=(Need(Property.SHARED_MODEL, "beside an {who} there is no tuned model to steer by", "remove it"),),
        clashes=(
            Clash(
                other="optimizer.name",
                used=lambda recipe: recipe.method.asks_only,
                what="a prompt that is found by asking is no tuned model, whose logits could be told from the base's",
                fix="remove it, or train by gradients",
            ),
            Clash(
                other="federation.aggregate",
                used=lambda recipe: recipe.aggregation.local_params,
                what="parts of what is trained stay with the clients, and there is no one tuned model to steer by",
                fix="remove it, or use federation.aggregate: fedit",
            ),
            Clash(
                other="model.name",
                used=lambda recipe: (
                    recipe.compare.proxy == recipe.model.name
                    and recipe.model.layers is None
                    and not recipe.model.random
                ),
                what="is the model that is tuned, and what is added to it is what was taken away",
                fix="name a larger model with the same tokenizer",
            ),
        ),
    ),
)
