"""A key of a recipe that may be in use: what it then needs, what no longer holds, and what it does not go beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.declared import Need, Paper, Property

__all__ = ["NO_LATE", "Clash", "FaultsError", "Feature", "of_shared_model"]

MOST = 900
"""Letters of a list of reasons, or of fixes: an error's parts are short."""

NO_LATE = frozenset({Property.LATE_ANSWERS})


@final
class FaultsError(ValueError):
    """What of a recipe does not go together; a schema's checker takes no other kind of error.

    Args:
        key: The key that the others do not go with.
        faults: At least one, each with its key, its reason and its fix.
    """

    def __init__(self, key: str, faults: Sequence[LichenError]) -> None:
        self.key = key
        self.faults = tuple({(fault.where, fault.what): fault for fault in faults}.values())
        super().__init__(str(self.faults[0]))

    def whole(self) -> LichenError:
        """All of them as one error: a single one as it is, several as lines of reasons and lines of fixes."""
        if len(self.faults) == 1:
            return self.faults[0]
        reasons = [f"\n    {fault.where}: {fault.what}" for fault in self.faults]
        fixes = [f"\n    {fault.where}: {fault.fix}" for fault in self.faults]
        shown = next(n for n in range(len(reasons), 0, -1) if max(len("".join(x[:n])) for x in (reasons, fixes)) < MOST)
        more = f"\n    and {len(reasons) - shown} more" if shown < len(reasons) else ""
        return LichenError(
            f"{len(reasons)} things do not go with it{''.join(reasons[:shown])}{more}",
            where=self.key,
            fix=f"change each of these{''.join(fixes[:shown])}",
        )


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
