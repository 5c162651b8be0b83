"""Who lies in a recipe, and how: the section ``attack`` as parts of the clients' works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lichen.clients.attack.liars import liars
from lichen.clients.attack.lying import Lying, MessageAttack
from lichen.clients.attack.messages import FreeRide, Noise, SignFlip, Weight
from lichen.core.contracts.client import ClientWork
from lichen.recipes.assemble.sides.limits import limits_of
from lichen.recipes.assemble.sides.server import ServerSide

__all__ = ["liars_of", "lying", "who_lied"]


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
