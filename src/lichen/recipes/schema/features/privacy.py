"""Differential privacy of clients: what goes with a bound on what one of them moves, and with nothing else leaving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.core.errors import LichenError
from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["PRIVACY", "published_whole"]


def _used(recipe: Any) -> bool:
    return recipe.noised is not None


def _of(unit: str) -> Callable[[Any], bool]:
    return lambda recipe: recipe.noised is not None and recipe.noised.unit == unit


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove it") -> Clash:
    return Clash(other=key, used=used, what=f"under privacy {what}", fix=fix, where=key)


def _changed(section: str, key: str) -> Callable[[Any], bool]:
    def changed(recipe: Any) -> bool:
        part = getattr(recipe, section)
        return bool(getattr(part, key) != type(part).model_fields[key].default)

    return changed


_JUDGED = "validation of the clients' rows chooses nothing, for each choice would be a release"

PRIVACY: tuple[Feature, ...] = (
    of_shared_model(
        "privacy",
        _used,
        clashes=(
            _clash(
                "task",
                lambda r: r.task == "oneshot",
                "noise hides clients or rows in rounds of training, and this task has none",
                "use classify, or masks alone: privacy.secure",
            ),
            _clash(
                "federation.schedule.kind",
                lambda r: r.federation.schedule.kind == "buffered",
                "rounds are charged and sampled one by one, and a buffered step is no round",
                "set schedule.kind: synchronous",
            ),
            _clash(
                "optimizer.lr",
                lambda r: len(r.optimizer.lr) > 1,
                "there is one learning rate: to choose among several is a release for each",
                "name one learning rate",
            ),
            _clash("federation.patience", lambda r: r.federation.patience is not None, _JUDGED),
            _clash("federation.valid_clients", _changed("federation", "valid_clients"), _JUDGED),
            _clash("federation.valid_average", lambda r: r.federation.valid_average is not None, _JUDGED),
            _clash(
                "federation.valid_every",
                lambda r: (
                    _changed("federation", "valid_every")(r) and not {"alone", "pooled"} & set(r.compare.baselines)
                ),
                _JUDGED,
                "leave it out or set it to 1, which is not read",
            ),
            _clash("compare.target", lambda r: r.compare.target is not None, _JUDGED),
            _clash(
                "federation.ranks",
                lambda r: r.federation.ranks is not None,
                "all clients send the same tensors, and noise lies over all of them",
            ),
            _clash(
                "federation.memory",
                lambda r: r.federation.memory is not None,
                "all clients send the same tensors, and noise lies over all of them",
            ),
            _clash(
                "teacher",
                lambda r: r.teacher is not None,
                "what a teacher is shown and answers is not accounted for",
            ),
            _clash(
                "synthetic",
                lambda r: r.synthetic is not None,
                "what a writer is shown is not accounted for together with training",
                "remove it, or run it by itself: it has an epsilon of its own",
            ),
            _clash("semi", lambda r: r.semi is not None, "learning from rows without labels was not accounted for"),
            _clash(
                "model.head",
                lambda r: r.model.head in ("ridge", "lda"),
                "a head that is solved from the clients' statistics is a release of them",
                "use base or random",
            ),
            _clash(
                "model.scratch.text",
                lambda r: r.model.scratch is not None and r.model.scratch.text is None,
                "no tokenizer is learned from the clients' rows",
                "name a public text",
            ),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "round",
                "no client sees another's message, as colluding liars do",
                "use an attack of single messages, or remove it",
            ),
        ),
    ),
    of_shared_model(
        "privacy",
        _of("client"),
        Need(
            Property.BOUNDED_SUM,
            "one client may move the sum of a round by privacy.clip and nothing else, and with {who} it moves more",
            "use aggregate: mean, fedit, ffa, fedsvd or rolora, with adamw, sgd or mezo, and no federation.fair",
        ),
        summary="noise hides each client: clipped changes, secret Poisson sampling, a fixed denominator (DP-FedAvg)",
        papers=(
            Paper(short="McMahan et al. ICLR 2018", url="https://arxiv.org/abs/1710.06963"),
            Paper(short="Canonne et al. NeurIPS 2020", url="https://arxiv.org/abs/2004.00010"),
        ),
        clashes=(
            _clash(
                "federation.weighting",
                lambda r: r.federation.weighting != "uniform",
                "each client counts 1, or one with many rows would move more than the clip",
                "set federation.weighting: uniform",
            ),
            _clash(
                "federation.sampling",
                lambda r: r.federation.clients_per_round is not None and r.federation.sampling != "poisson",
                "each client comes by its own coin, or sampling claims nothing",
                "set federation.sampling: poisson, or leave clients_per_round out and let everybody come",
            ),
            _clash(
                "federation.robust",
                lambda r: r.federation.robust is not None,
                "the server makes a sum alone, and a robust rule looks at each message",
            ),
            _clash(
                "wire.gate", lambda r: r.wire.gate is not None, "no message is refused for its norm, which would show"
            ),
            _clash("wire.clip", lambda r: r.wire.clip is not None, "privacy.clip is the clip of changes"),
            _clash("federation.history", lambda r: r.federation.history, "no single message is retained"),
            _clash(
                "federation.schedule.least",
                lambda r: r.federation.schedule.least > 1,
                "a round is a step whoever comes, or a step that is left out would tell how many came",
            ),
        ),
    ),
    Feature(
        key="privacy.unit",
        used=_of("row"),
        summary="noise hides each row: clipped gradients of rows, Poisson batches, noise in every local step (DP-SGD)",
        papers=(Paper(short="Abadi et al. CCS 2016", url="https://arxiv.org/abs/1607.00133"),),
        clashes=(
            _clash(
                "optimizer.name",
                lambda r: r.optimizer.name not in ("sgd", "adamw"),
                "of a row each step is one of gradients, clipped row by row",
                "use sgd or adamw",
            ),
            _clash("optimizer.clip", _changed("optimizer", "clip"), "privacy.clip is the clip of gradients"),
            _clash(
                "federation.local_epochs",
                lambda r: r.federation.local_epochs is not None,
                "of a row a batch is a sample by coins, which has no passes",
                "set federation.local_steps",
            ),
            _clash(
                "federation.gradient_accumulation_steps",
                lambda r: r.federation.gradient_accumulation_steps > 1,
                "of a row a sample is cut into as many parts as it needs",
            ),
            _clash(
                "federation.weighting",
                lambda r: r.federation.weighting not in ("uniform", "rows"),
                "of a row a weight by what was seen tells how many rows were sampled",
                "use uniform or rows",
            ),
            _clash(
                "federation.fair",
                lambda r: r.federation.fair != "none",
                "of a row clients tell no loss that could weigh them",
            ),
            _clash(
                "federation.keep_optimizer",
                lambda r: r.federation.keep_optimizer,
                "of a row DiLoCo's steps were not accounted for",
            ),
            _clash("attack", lambda r: r.attack is not None, "of a row liars' rows are not sampled by coins"),
        ),
    ),
)


def published_whole(recipe: Any) -> LichenError | None:
    """Why this δ hides nobody, where the recipe itself says how many clients there are; None where it does not."""
    config, data = recipe.noised, recipe.data
    known = data.partition.by != "client" and data.on_too_few_rows == "refuse" and data.on_single_class != "drop"
    if config is None or config.unit != "client" or config.delta is None or not known or data.min_rows > 1:
        return None
    clients = min(data.partition.clients, data.max_clients or data.partition.clients)
    if config.delta < 1 / clients:
        return None
    return LichenError(
        f"{config.delta:g} allows that one of {clients} clients is published whole",
        where="privacy.delta",
        fix=f"use less than {1 / clients:.2g}, or leave it out",
    )
