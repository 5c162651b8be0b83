"""Lists every method that a recipe can name: its paper, what it needs, and what it refuses.

All of it follows from declarations: :mod:`lichen.server.rules`, :mod:`lichen.clients.methods`,
:mod:`lichen.engines.kinds`, :mod:`lichen.models.adapters.table` and :mod:`lichen.recipes.schema.features`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

from lichen.clients import method as client_method
from lichen.clients.methods import DILOCO, METHODS
from lichen.declared import Declared, Family, Need, Property
from lichen.engines.kinds import ENGINES
from lichen.models.adapters import table
from lichen.recipes.schema.features.feature import Feature
from lichen.recipes.schema.fits import FEATURES
from lichen.server.robust.table import ROBUST
from lichen.server.rules import RULES

__all__ = ["Entry", "every_method"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One method.

    Attributes:
        kind: What it is one of.
        name: How a recipe names it, as ``key: word``, or the key where it is a section.
        summary: What it does.
        papers: Where it comes from.
        needs: What the rest of the recipe must allow.
        refuses: Keys that need what it does not allow.
        allows: Properties that it decides, and that hold with it.
    """

    kind: str
    name: str
    summary: str
    papers: tuple[str, ...]
    needs: tuple[str, ...]
    refuses: tuple[str, ...]
    allows: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[str, ...]:
        """``refuses``, the words of one key together."""
        words: dict[str, list[str]] = {}
        for name in self.refuses:
            key, _, word = name.partition(": ")
            words.setdefault(key, []).extend([word] if word else [])
        return tuple(f"{key}: {', '.join(some)}" if some else key for key, some in words.items())

    def as_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return {
            "kind": self.kind,
            "name": self.name,
            "summary": self.summary,
            "papers": list(self.papers),
            "needs": list(self.needs),
            "refuses": list(self.refuses),
            "allows": list(self.allows),
        }


_NEEDY: tuple[tuple[str, tuple[Need, ...]], ...] = (
    *((feature.key, feature.needs) for feature in FEATURES),
    *((f"optimizer.name: {one.name}", one.needs) for one in METHODS.values()),
    (DILOCO.key, DILOCO.needs),
    *((f"federation.aggregate: {one.name}", one.needs) for one in RULES.values()),
)
"""Every key or word that needs something."""


def _refused(lacks: Iterable[Property], own: str) -> tuple[str, ...]:
    """The keys that need one of these, in order; none is named twice."""
    gone = frozenset(lacks)
    return tuple(
        dict.fromkeys(key for key, needs in _NEEDY if key != own and any(need.property in gone for need in needs))
    )


def _clashing(feature: Feature) -> tuple[str, ...]:
    """The keys that clash with a feature, whichever of the two says so."""
    back = (one.key for one in FEATURES for clash in one.clashes if clash.other == feature.key)
    return (*(clash.other for clash in feature.clashes), *back)


def _of(declared: Declared, kind: str, key: str, decides: frozenset[Property]) -> Entry:
    return Entry(
        kind=kind,
        name=f"{key}: {declared.name}",
        summary=declared.summary,
        papers=tuple(map(str, declared.papers)),
        needs=tuple(str(need.property) for need in declared.needs),
        refuses=_refused(decides - declared.allows, key),
        allows=tuple(sorted(map(str, declared.allows))),
    )


def _family(family: Family[Any], kind: str, key: str) -> Iterator[Entry]:
    for name in (*family, *family.others()):
        yield _of(family[name], kind, key, family.decides)


def _adapters() -> Iterator[Entry]:
    for word in (*table.BUILT_IN, *table.added()):
        facts = table.facts_of(word)
        holds = {
            Property.LORA_FACTORS: facts.low_rank,
            Property.EVERY_WEIGHT: facts.whole,
            Property.SOFT_PROMPT: word == "prompt",
            Property.SMALL_MODEL: False,
        }
        yield Entry(
            kind="adapter",
            name=f"model.adapter.kind: {word}",
            summary=facts.means,
            papers=(facts.paper,),
            needs=(),
            refuses=_refused((one for one, there in holds.items() if not there), "model.adapter.kind"),
        )


def _robust() -> Iterator[Entry]:
    for rule in ROBUST.values():
        yield Entry(
            kind="robust rule",
            name=f"federation.robust.rule: {rule.name}",
            summary=rule.summary,
            papers=tuple(map(str, rule.papers)),
            needs=(str(Property.MEAN_OF_ONE_LAYOUT),),
            refuses=(),
        )


def every_method() -> tuple[Entry, ...]:
    """Every rule, client method, adapter, engine and other method, those of other packages among them.

    Raises:
        LichenError: if another package's entry point does not give what it should.
    """
    others = (
        Entry(
            kind="section",
            name=feature.key,
            summary=feature.summary,
            papers=tuple(map(str, feature.papers)),
            needs=tuple(str(need.property) for need in feature.needs),
            refuses=tuple(dict.fromkeys((*_refused(feature.lacks, feature.key), *_clashing(feature)))),
        )
        for feature in FEATURES
        if feature.summary
    )
    return (
        *_family(RULES, "rule", "federation.aggregate"),
        *_robust(),
        *_family(METHODS, "client method", "optimizer.name"),
        _of(DILOCO, "client method", DILOCO.key, client_method.DECIDES),
        *_adapters(),
        *_family(ENGINES, "engine", "engine.name"),
        *others,
    )
