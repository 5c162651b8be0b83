"""A key of a recipe that may be in use: what it then needs, what no longer holds, and what it does not go beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from lichen.declared import Need, Paper, Property

__all__ = ["NO_LATE", "Clash", "Feature", "of_shared_model"]

NO_LATE = frozenset({Property.LATE_ANSWERS})


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


def of_shared_model(key: str, used: Callable[[Any], object], *needs: Need, **more: Any) -> Feature:
    """A key of rounds over one model."""
    return Feature(
        key=key,
        used=used,
        needs=(Need(Property.SHARED_MODEL, "does not go with an {who}", "remove it"), *needs),
        **more,
    )
