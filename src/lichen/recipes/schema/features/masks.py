"""Masked sums: what goes with a server that sees nothing but the sum of a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lichen.declared import Need, Paper, Property
from lichen.recipes.schema.features.feature import Clash, Feature, of_shared_model

__all__ = ["MASKS"]


def _used(recipe: Any) -> bool:
    return recipe.masked is not None


def _clash(key: str, used: Callable[[Any], object], what: str, fix: str = "remove it") -> Clash:
    return Clash(other=key, used=used, what=f"under masks {what}", fix=fix, where=key)


MASKS: tuple[Feature, ...] = (
    of_shared_model(
        "privacy.secure",
        _used,
        Need(
            Property.SUMS,
            "the server learns the sum of a round alone, and {who} needs to see single messages",
            "use an aggregate that needs sums, such as mean, fedit, ffa, rolora or fedsvd, and no wire.up",
            where="privacy.secure",
        ),
        Need(
            Property.LOST_ANSWERS,
            "with {who} a client remembers what it has sent, and who falls silent in a round would remember wrongly",
            "use adamw, sgd or mezo, and no wire.up",
            where="privacy.secure",
        ),
        summary="masks that cancel hide each message; the server learns the sum of a round (secure aggregation)",
        papers=(
            Paper(short="Bell et al. CCS 2020", url="https://eprint.iacr.org/2020/704"),
            Paper(short="Bonawitz et al. CCS 2017", url="https://eprint.iacr.org/2017/281"),
        ),
        clashes=(
            _clash(
                "optimizer.name",
                lambda r: r.optimizer.name == "scaffold",
                "control variates beside the change are not supported under masks",
                "use adamw, sgd or mezo",
            ),
            _clash(
                "federation.schedule.kind",
                lambda r: r.federation.schedule.kind == "buffered",
                "clients of one round cancel one another's masks, and a buffered step takes them from several",
                "set schedule.kind: synchronous",
            ),
            _clash(
                "federation.schedule.deadline",
                lambda r: r.federation.schedule.deadline is not None,
                "each stage has its own time",
                "set privacy.stage_seconds",
            ),
            _clash(
                "engine.clock",
                lambda r: r.engine.clock is not None,
                "clients answer in four stages, which the virtual clock does not time",
            ),
            _clash(
                "wire.gate", lambda r: r.wire.gate is not None, "nobody sees a message's norm; privacy.clip bounds it"
            ),
            _clash(
                "wire.clip",
                lambda r: r.wire.clip is not None and r.privacy.clip is not None,
                "privacy.clip is the clip of changes",
            ),
            _clash("federation.history", lambda r: r.federation.history, "no single message is retained"),
            _clash(
                "value",
                lambda r: r.value is not None and r.value.kind != "first",
                "nobody sees what a single client sent, and coalitions are made of that",
                "use value.kind: first, which each client finds for itself, or remove it",
            ),
            _clash(
                "federation.robust",
                lambda r: r.federation.robust is not None,
                "a robust rule would look at each message, and the server learns the sum alone",
            ),
            _clash(
                "federation.fair",
                lambda r: r.federation.fair in ("minmax", "tilted"),
                "minmax asks how much each client loses, and tilted counts from a level that clients do not know",
                "use qffl, whose weights the clients take themselves, or none",
            ),
            _clash(
                "federation.valid_average",
                lambda r: r.federation.judged_by != "mean",
                "the server learns the mean of the clients' losses, and no other middle of them",
                "use mean, or leave it out",
            ),
            _clash(
                "federation.ranks",
                lambda r: r.federation.ranks is not None,
                "all clients send the same tensors, or they would not cancel",
            ),
            _clash(
                "federation.memory",
                lambda r: r.federation.memory is not None,
                "all clients send the same tensors, or they would not cancel",
            ),
            _clash(
                "federation.keep_optimizer",
                lambda r: r.federation.keep_optimizer,
                "a worker whose answer is lost would go on wrongly",
            ),
            _clash(
                "synthetic.kind",
                lambda r: r.synthetic is not None and r.synthetic.kind == "evolution",
                "its votes are not masked",
                "use prompted",
            ),
            _clash(
                "model.head",
                lambda r: r.task != "oneshot" and r.model.head in ("ridge", "lda"),
                "the statistics of a head before the first round are not masked",
                "use base or random",
            ),
            _clash(
                "attack.kind",
                lambda r: r.attack is not None and r.attack.facts.on == "round",
                "no client sees another's message, as colluding liars do",
                "use an attack of single messages, or remove it",
            ),
            _clash(
                "privacy.dropout",
                lambda r: r.privacy.dropout is not None and r.engine.name not in ("local", "spawned", "distributed"),
                "silence is simulated where this machine has the clients",
            ),
        ),
    ),
)
