"""Models of the clients' own: what goes with tensors that are trained at home beside the shared ones."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import NO_LATE, Clash, Feature, of_shared_model
from lichen.tasks.registry import task_of

__all__ = ["PERSONAL"]


def _kind(*kinds: str) -> Callable[[Any], bool]:
    return lambda recipe: recipe.personal is not None and recipe.personal.kind in kinds


def _in_rounds(recipe: Any) -> bool:
    """Whether clients train their own tensors beside the shared ones, in every round."""
    return recipe.personal is not None and recipe.personal.in_rounds


def _set(key: str) -> Callable[[Any], bool]:
    """Whether a key is there."""
    return lambda recipe: attrgetter(key)(recipe) is not None


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove one of the two") -> Clash:
    return Clash(other=key, used=used, what=what, fix=fix, where=key)


PERSONAL: tuple[Feature, ...] = (
    of_shared_model(
        "personal.kind",
        lambda recipe: recipe.personal is not None,
        Need(
            Property.PLAIN_TRAINING, "own tensors are trained by SGD or AdamW, and {who} does more", "use adamw or sgd"
        ),
        summary="a model for each client beside the shared one: steps from it (finetune), Ditto, APFL, FedALA, FedDPA, "
        "FedALT, FedBN",
        papers=(
            Paper(short="Yu et al. 2020", url="https://arxiv.org/abs/2002.04758"),
            Paper(short="Li et al. ICML 2021", url="https://arxiv.org/abs/2012.04221"),
            Paper(short="Deng et al. 2020", url="https://arxiv.org/abs/2003.13461"),
            Paper(short="Zhang et al. AAAI 2023", url="https://arxiv.org/abs/2212.01197"),
            Paper(short="Yang et al. NeurIPS 2024", url="https://arxiv.org/abs/2403.19211"),
            Paper(short="Bian et al. AAAI 2026", url="https://arxiv.org/abs/2503.11880"),
            Paper(short="Li et al. ICLR 2021", url="https://arxiv.org/abs/2102.07623"),
        ),
        clashes=(
            *(
                _clash(key, _set(key), "own models were not tried beside it")
                for key in ("teacher", "synthetic", "semi")
            ),
            *(
                _clash(key, _set(key), "own tensors are as large as the shared ones, which not every client holds here")
                for key in ("federation.ranks", "federation.memory")
            ),
            _clash(
                "personal.kind",
                lambda r: (r.personal.kind == "ridge") == task_of(r.task).procedure.rounds,
                "heads in closed form are of task oneshot, and it has no others",
                "use kind: ridge with task: oneshot, and another kind with any other task",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.local_params,
                "clients keep a part of the model by this rule already",
                "use fedit or mean, or leave the section personal out",
            ),
            _clash(
                "federation.repair",
                lambda r: r.federation.repair is not None,
                "the server's repair would not reach the models that are at home",
            ),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "rows",
                "a liar's own model would learn from the rows that it has changed",
                "use an attack of messages, or remove it",
            ),
            _clash(
                "privacy",
                lambda r: r.privacy is not None and r.engine_kind.nodes,
                "under privacy no node answers with its scores, and nobody else has its clients' own models",
                "use engine.name: local",
            ),
        ),
    ),
    of_shared_model(
        "personal.kind",
        _kind("ridge"),
        clashes=(
            _clash(
                "model.head",
                lambda r: r.model.head == "lda",
                "own rows are weighed in ridge regression, and lda is another solution",
                "use model.head: ridge",
            ),
            _clash(
                "personal.choose",
                lambda r: r.personal.choose,
                "each client chooses among the weights, and 0 is the shared head",
                "remove it",
            ),
            _clash(
                "personal.others",
                lambda r: r.personal.others is not None,
                "heads in closed form are scored on own rows alone",
                "remove it",
            ),
        ),
    ),
    of_shared_model(
        "personal.choose",
        lambda recipe: recipe.personal is not None and recipe.personal.choose,
        clashes=(
            _clash(
                "personal.choose",
                lambda r: not r.data.valid,
                "clients have no validation rows to choose on",
                "set data.valid, or remove it",
            ),
        ),
    ),
    of_shared_model(
        "personal.others",
        lambda recipe: recipe.personal is not None and recipe.personal.others is not None,
        Need(Property.ALL_ROWS, "nodes of {who} have no rows of other clients", "remove it, or use engine.name: local"),
    ),
    of_shared_model(
        "personal.kind",
        _in_rounds,
        lacks=NO_LATE,
        clashes=(
            _clash(
                "privacy.unit",
                lambda r: r.noised is not None and r.noised.unit == "row",
                "own tensors are trained on whole batches, and here a batch is a sample in parts",
                "use personal.kind: finetune",
            ),
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.patch is not None,
                "the frozen layers move with the shared model, and own tensors would no longer fit them",
                "use fedit or mean, or personal.kind: finetune",
            ),
        ),
    ),
    of_shared_model(
        "personal.kind",
        _kind("apfl", "fedala"),
        lacks=frozenset({Property.ACCUMULATION}),
        clashes=(
            _clash(
                "federation.keep_optimizer",
                lambda r: r.federation.keep_optimizer,
                "a DiLoCo worker is somewhere else than where its round began",
                "use personal.kind: ditto or finetune",
            ),
        ),
    ),
    of_shared_model(
        "personal.kind",
        _kind("feddpa", "fedalt"),
        Need(
            Property.LORA_FACTORS,
            "a shared and an own LoRA stand side by side, and {who} trains no LoRA",
            "use model.adapter.kind: lora, or another personal.kind",
        ),
        clashes=(
            _clash(
                "federation.aggregate",
                lambda r: r.aggregation.patch is not None,
                "the frozen layers move with the shared model, and own adapters would no longer fit them",
                "use fedit or mean",
            ),
        ),
    ),
    of_shared_model(
        "personal.kind",
        _kind("fedalt"),
        Need(Property.PERSONAL_TENSORS, "clients keep their adapters, and with {who} they keep nothing", "remove it"),
        Need(Property.LAYER_TURNS, "own adapters are trained whole, beside {who}", "remove one of the two"),
        lacks=frozenset(
            {Property.LATE_ANSWERS, Property.LOST_ANSWERS, Property.SERVER_STEP, Property.MEAN_OF_ONE_LAYOUT}
        ),
        clashes=(
            _clash(
                "federation.aggregate",
                lambda r: r.rule not in ("fedit", "mean"),
                "clients take their own part out of a plain mean",
                "use fedit or mean",
            ),
            _clash(
                "federation.weighting",
                lambda r: r.federation.weighting != "uniform",
                "clients take their own part out of a mean in which all count alike",
                "set federation.weighting: uniform",
            ),
            _clash(
                "federation.keep_optimizer",
                lambda r: r.federation.keep_optimizer,
                "own adapters keep their optimizer in any case, and their steps are plain ones",
                "remove it",
            ),
            *(
                _clash(
                    key,
                    used,
                    "what is sent is how an adapter that was never replaced differs from the mean, not a change",
                    fix,
                )
                for key, used, fix in (
                    ("wire.clip", lambda r: r.wire.clip is not None, "remove it"),
                    ("wire.gate", lambda r: r.wire.gate is not None, "remove it"),
                    ("privacy", _set("privacy"), "use personal.kind: feddpa, ditto or finetune"),
                    ("value", _set("value"), "use personal.kind: feddpa, ditto or finetune"),
                    ("audit.canaries", _set("audit"), "remove it"),
                    ("federation.layer_groups", lambda r: r.federation.layer_groups > 1, "remove it"),
                )
            ),
        ),
    ),
    of_shared_model(
        "personal.kind",
        _kind("norms"),
        Need(Property.PERSONAL_TENSORS, "clients keep norms, and with {who} they keep nothing", "remove it"),
        clashes=(
            _clash(
                "value",
                lambda r: r.value is not None,
                "a part of the model never leaves its client, and no coalition can be judged without it",
            ),
            _clash(
                "audit.canaries",
                lambda r: r.audit is not None,
                "an audit asks one model, of which a part never leaves its client here",
            ),
        ),
    ),
)
