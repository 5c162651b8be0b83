"""Who lies in a recipe, and how: the section ``attack`` as parts of the clients' works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lichen.clients.attack.collusion import Alie, Collusion, InnerProduct, MinMax, quantile
from lichen.clients.attack.liars import liars
from lichen.clients.attack.lying import Lying, MessageAttack
from lichen.clients.attack.messages import FreeRide, Noise, SignFlip, Weight
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.engines.attack.colluding import ColludingEngine
from lichen.recipes.assemble.sides.limits import limits_of
from lichen.recipes.assemble.sides.server import ServerSide, participants

__all__ = ["colluding", "liars_of", "lying", "refuse_truth", "who_lied"]


def liars_of(server: ServerSide) -> tuple[int, ...]:
    """The clients that lie, ascending; none where the recipe has no attack.

    Raises:
        LichenError: if no client would be honest.
    """
    attack = server.recipe.attack
    return () if attack is None else liars(attack.liars, len(server.roster), server.recipe.seed)


def who_lied(server: ServerSide) -> Mapping[str, Any] | None:
    """What a summary says of it; None where nobody lies on purpose."""
    attack, lied = server.recipe.attack, liars_of(server)
    if attack is None:
        return None
    return {"kind": attack.kind, "liars": len(lied), "names": [server.roster[client].name for client in lied]}


def lying(server: ServerSide, work: ClientWork) -> ClientWork:
    """A work of training in which liars change their messages, where the recipe says so."""
    attack = server.recipe.attack
    if attack is None or attack.facts.on != "message":
        return work
    return Lying(work, _message_attack(server), frozenset(liars_of(server)))


def colluding(server: ServerSide, engine: Engine) -> Engine:
    """The engine, its liars making their messages of all honest ones of a round, where the recipe says so."""
    attack = server.recipe.attack
    if attack is None or attack.facts.on != "round":
        return engine
    collusion: Collusion
    if attack.kind == "alie":
        collusion = Alie(attack.scale)
    else:
        collusion = MinMax(attack.deviation) if attack.kind == "min_max" else InnerProduct(attack.strength)
    return ColludingEngine(engine, collusion, liars_of(server), attacked=lambda job: job.work.startswith("train "))


def refuse_truth(server: ServerSide) -> None:
    """Refuse an attack that is none with these clients, before anything is trained.

    Raises:
        LichenError: if nobody would be honest, or so few lie that what they would send is no lie.
    """
    attack, count = server.recipe.attack, participants(server)
    if attack is None or not liars_of(server):
        return
    if attack.kind == "alie" and attack.scale is None and quantile(count, min(attack.liars, count - 1)) <= 0:
        raise LichenError(
            f"{attack.liars} of {count} clients of a round are so few that alie sends the honest mean",
            where="attack.scale",
            fix="set it, for example to 1, or raise attack.liars",
        )


def _message_attack(server: ServerSide) -> MessageAttack:
    attack = server.recipe.attack
    assert attack is not None
    if attack.kind == "weight":
        limits = limits_of(server)
        most = {client: limits("train", client).weight for client in liars_of(server)}
        return Weight(attack.strength, most)
    made: Mapping[str, Callable[[float], MessageAttack]] = {
        "sign_flip": SignFlip,
        "noise": Noise,
        "free_ride": FreeRide,
    }
    return made[attack.kind](attack.strength)
