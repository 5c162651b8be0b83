"""When a key of a recipe is read, and what is said where it is not: by itself, by a word, or by a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lichen.declared import Family
from lichen.models.adapters.table import BUILT_IN

__all__ = ["Read", "every", "of_adapters", "of_family", "of_words"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """When some keys are read.

    Attributes:
        keys: Keys or sections, dotted.
        when: Whether they are, in a recipe.
        what: Why not, where they are not.
        fix: What helps.
    """

    keys: tuple[str, ...]
    when: Callable[[Any], object]
    what: Callable[[Any], str]
    fix: str = "remove it"


def of_words(
    section: str, choice: str, reads: Mapping[str, Sequence[str]], word: Callable[[Any], str | None]
) -> list[Read]:
    """Keys of a section that only some words of ``choice`` read; a word that is not there, or None, is no matter."""
    found = []
    for key in dict.fromkeys(key for keys in reads.values() for key in keys):
        readers = [one for one, keys in reads.items() if key in keys]

        def when(recipe: Any, key: str = key) -> bool:
            now = word(recipe)
            return now is None or now not in reads or key in reads[now]

        fix = f"remove it, or set {choice}: {' or '.join(readers[:3])}"
        found.append(Read(keys=(f"{section}.{key}",), when=when, what=lambda r: f"{word(r)} has none", fix=fix))
    return found


def of_family(
    section: str, choice: str, family: Family[Any], word: Callable[[Any], str], keys: Sequence[str]
) -> list[Read]:
    """The same for the members of a family; one that declares nothing reads all."""
    found = []
    for key in keys:
        readers = [name for name in family if key in (family[name].reads or ())]

        def when(recipe: Any, key: str = key) -> bool:
            reads = family[word(recipe)].reads
            return reads is None or key in reads

        fix = f"remove it, or set {choice}: {' or '.join(readers[:3])}"
        found.append(Read(keys=(f"{section}.{key}",), when=when, what=lambda r: f"{word(r)} has none", fix=fix))
    return found


def every(family: Family[Any]) -> list[str]:
    """The keys that some members read, in the order in which they first stand."""
    return sorted({key for member in family.values() for key in member.reads or ()})


def of_adapters() -> list[Read]:
    """Keys of the section of adapters that only some built-in kinds have."""
    found = []
    for key in dict.fromkeys(key for facts in BUILT_IN.values() for key in facts.keys):
        readers = [word for word, facts in BUILT_IN.items() if key in facts.keys]

        def when(recipe: Any, key: str = key) -> bool:
            return key in recipe.model.adapter.facts.keys

        found.append(
            Read(
                keys=(f"model.adapter.{key}",),
                when=when,
                what=lambda r: f"{r.model.adapter.kind} has none",
                fix=f"remove it, or use kind: {readers[0]}",
            )
        )
    return found
