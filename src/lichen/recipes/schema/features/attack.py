"""Clients that lie on purpose: what a recipe must have for a lie to be one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.clients.attack.kinds import ATTACKS
from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["ATTACK"]

NO_PROMPT = ("plain", "stream")
"""Forms of rows in which nobody asks and nobody answers."""


def _on(*targets: str) -> Callable[[Any], bool]:
    return lambda recipe: recipe.attack is not None and recipe.attack.facts.on in targets


def _is(*kinds: str) -> Callable[[Any], bool]:
    return lambda recipe: recipe.attack is not None and recipe.attack.kind in kinds


def _papers() -> tuple[Paper, ...]:
    return tuple(dict.fromkeys(paper for kind in ATTACKS.values() for paper in kind.papers))


ATTACK: tuple[Feature, ...] = (
    of_shared_model(
        "attack",
        lambda recipe: recipe.attack is not None,
        summary="some clients lie on purpose, so that defences can be tested",
        papers=_papers(),
    ),
    Feature(
        key="attack.kind",
        used=_on("message", "round"),
        needs=(
            Need(
                Property.CODECS,
                "a liar changes its change, and {who} sends something else",
                "use adamw, sgd, scaffold or mezo, or remove the attack",
            ),
        ),
    ),
    Feature(
        key="attack.kind",
        used=_on("round"),
        needs=(
            Need(
                Property.ALL_ROWS,
                "colluding liars see all honest messages of a round, and with {who} no client's process does",
                "use engine.name: local",
            ),
            Need(
                Property.ONE_SERVER,
                "colluding liars see all honest messages of a round, and with {who} no process does",
                "use engine.name: local",
            ),
        ),
        clashes=(
            Clash(
                other="wire.up",
                used=lambda recipe: recipe.wire.up,
                what="colluding liars make their change of honest changes, not of codes",
                fix="remove wire.up, or use an attack of single messages",
            ),
            Clash(
                other="federation.schedule.kind",
                used=lambda recipe: recipe.federation.schedule.kind == "buffered",
                what="colluding liars wait for all honest messages of a round, and a buffered step has no round",
                fix="set schedule.kind: synchronous, or use an attack of single messages",
            ),
            Clash(
                other="federation.ranks",
                used=lambda recipe: recipe.federation.ranks is not None or recipe.federation.memory is not None,
                what="changes of unequal shape have no mean that liars could start from",
                fix="remove federation.ranks and federation.memory, or use an attack of single messages",
            ),
        ),
    ),
    Feature(
        key="attack.kind",
        used=_is("label_flip", "backdoor"),
        clashes=(
            Clash(
                other="task",
                used=lambda recipe: not recipe.classifies,
                what="liars change the classes of their rows, and the task has none",
                fix="use task: classify, or an attack of messages",
            ),
            Clash(
                other="semi",
                used=lambda recipe: recipe.semi is not None,
                what="rows without a label are no liar's to label",
                fix="remove semi, or use an attack of messages",
            ),
        ),
    ),
    Feature(
        key="attack.kind",
        used=_is("backdoor"),
        clashes=(
            Clash(
                other="federation.aggregate",
                used=lambda recipe: recipe.aggregation.local_params,
                what="its success is measured on one model, of which a part never leaves its client here",
                fix="use another federation.aggregate",
            ),
        ),
    ),
    Feature(
        key="attack.kind",
        used=_is("unsafe"),
        clashes=(
            Clash(
                other="task",
                used=lambda recipe: not recipe.writes,
                what="liars answer requests, and the task has neither",
                fix="use task: chat, or an attack of messages",
            ),
        ),
    ),
    Feature(
        key="federation.repair",
        used=lambda recipe: recipe.federation.repair is not None,
        summary="after the rounds the server tunes the model on public pairs of a request and a safe answer",
        papers=(Paper(short="Ye et al. 2024", url="https://arxiv.org/abs/2406.10630"),),
        clashes=(
            Clash(
                other="task",
                used=lambda recipe: not recipe.writes,
                what="its pairs are of a chat, and the task is none",
                fix="remove it, or use task: chat",
            ),
        ),
    ),
    Feature(
        key="compare.requests",
        used=lambda recipe: recipe.writes and recipe.unsafe_requests is not None,
        clashes=(
            Clash(
                other="data.form",
                used=lambda recipe: recipe.data.form in NO_PROMPT,
                what="refusals are counted on answers, and rows of this form have none",
                fix="use form chat, messages or transcript",
                where="data.form",
            ),
            Clash(
                other="federation.aggregate",
                used=lambda recipe: recipe.aggregation.local_params,
                what="refusals are counted on one model, of which a part never leaves its client here",
                fix="use another federation.aggregate",
                where="federation.aggregate",
            ),
            Clash(
                other="optimizer.name",
                used=lambda recipe: recipe.method.asks_only,
                what="a prompt that is found by asking lies outside the model, whose answers are looked at",
                fix="use an optimizer with gradients",
                where="optimizer.name",
            ),
        ),
    ),
    Feature(
        key="attack.kind",
        used=_is("weight"),
        clashes=(
            Clash(
                other="federation.weighting",
                used=lambda recipe: recipe.federation.weighting != "examples" or not recipe.writes,
                what="everybody weighs the most already that admission lets it",
                fix="use task: chat with federation.weighting: examples, where a row's tokens are not known beforehand",
            ),
            Clash(
                other="federation.robust",
                used=lambda recipe: recipe.federation.robust is not None or recipe.federation.fair == "minmax",
                what="robust rules and fair: minmax count every client as 1, whatever it weighs",
                fix="remove federation.robust and federation.fair, or use another attack",
            ),
        ),
    ),
)
