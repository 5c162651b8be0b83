"""Clients that never took part, and the states that a run keeps so that somebody can be forgotten later."""

from __future__ import annotations

from typing import Any

from lichen.recipes.schema.features.feature import Clash, Feature

__all__ = ["ABSENT"]


def _clashes(stream: str, exchange: str) -> tuple[Clash, ...]:
    return (
        Clash(other="stream", used=lambda recipe: recipe.stream is not None, what=stream, fix="remove it"),
        Clash(other="exchange", used=lambda recipe: recipe.exchange is not None, what=exchange, fix="remove it"),
    )


def _canaries(recipe: Any) -> bool:
    return recipe.audit is not None


ABSENT = (
    Feature(
        key="federation.absent",
        used=lambda recipe: bool(recipe.federation.absent),
        clashes=(
            *_clashes(
                "each period of a stream has a roster of its own, in which a client of another one has no name",
                "in an exchange every client's own model is what comes out, and one that never took part has none",
            ),
            Clash(
                other="audit",
                used=_canaries,
                what="canaries are dealt to every client, and those of an absent one would count as trained on",
                fix="remove it, or audit",
            ),
        ),
    ),
    Feature(
        key="engine.history",
        used=lambda recipe: recipe.engine.history > 0,
        clashes=_clashes(
            "periods of a stream go on from each other, so that no client can be forgotten in one of them",
            "clients of an exchange keep models of their own, and forgetting one begins at round 0 anyway",
        ),
    ),
)
