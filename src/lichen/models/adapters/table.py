"""The table of adapters: what a recipe must know of each kind before a model is loaded, and where its code lies.

A kind is a word of a recipe (``model.adapter.kind``) with one file of code that holds its
:class:`lichen.models.adapters.kind.AdapterKind`. Nothing else in the house names kinds: what differs between them is
read off these facts and that object. A third party adds a kind by an entry point of its own package::

    [project.entry-points."lichen.adapters"]
    dora = "my_package.dora:DORA"

It is loaded when a recipe names the word, and not before. This file does not import torch, so that recipes are read
quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Protocol, final, runtime_checkable

from lichen.core.errors import LichenError

__all__ = ["BUILT_IN", "GROUP", "Facts", "added", "facts_of", "kind_object", "misregistered", "words_with"]

GROUP = "lichen.adapters"
"""The group of entry points."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a kind of adapter without its code.

    Attributes:
        word: What recipes call it.
        means: What it is, in a few words.
        paper: Where it comes from.
        keys: Keys of the recipe's adapter section that it reads.
        low_rank: It trains factor pairs (:mod:`lichen.core.conventions.factor_pairs`) whose product is added to the
            frozen weight, and nothing beside: what aggregation rules for low-rank adapters, ranks and memory build on.
        whole: It trains the model's own weights and freezes none; such a kind has no code of its own.
        code: Where its object lies, as ``module:name``; empty for a kind of another package.
        section: The recipe's section for it, where it brings keys of its own: a subclass of
            :class:`lichen.recipes.schema.model.AdapterConfig`.
    """

    word: str
    means: str
    paper: str
    keys: tuple[str, ...] = ()
    low_rank: bool = False
    whole: bool = False
    code: str = ""
    section: Any = None


@runtime_checkable
class _WithFacts(Protocol):
    """What another package may have registered; it may be anything."""

    @property
    def facts(self) -> Facts: ...


def _listed(*facts: Facts) -> Mapping[str, Facts]:
    return MappingProxyType({one.word: one for one in facts})


BUILT_IN: Mapping[str, Facts] = _listed(
    Facts(
        word="lora",
        means="W + s B A",
        paper="Hu et al. 2022, arXiv:2106.09685; rslora: Kalajdzievski 2023, arXiv:2312.03732",
        keys=("target_modules", "rank", "alpha", "rslora", "last"),
        low_rank=True,
        code="lichen.models.adapters.lora:LORA",
    ),
    Facts(
        word="ia3",
        means="learned scales",
        paper="Liu et al. 2022, arXiv:2205.05638",
        keys=("target_modules", "feedforward_modules"),
        code="lichen.models.adapters.ia3:LEARNED_SCALES",
    ),
    Facts(
        word="prompt",
        means="virtual tokens",
        paper="Lester et al. 2021, arXiv:2104.08691",
        keys=("num_virtual_tokens", "start"),
        code="lichen.models.adapters.prompt:SOFT_PROMPT",
    ),
    Facts(
        word="prefix",
        means="virtual tokens",
        paper="Li and Liang 2021, arXiv:2101.00190",
        keys=("num_virtual_tokens",),
        code="lichen.models.adapters.prefix_tuning:PREFIX_TUNING",
    ),
    Facts(
        word="bottleneck",
        means="small layers in between",
        paper="Houlsby et al. 2019, arXiv:1902.00751",
        keys=("width",),
        code="lichen.models.adapters.bottleneck:BOTTLENECK",
    ),
    Facts(
        word="bitfit",
        means="the biases",
        paper="Ben Zaken et al. 2022, arXiv:2106.10199",
        code="lichen.models.adapters.bitfit:BIASES",
    ),
    Facts(
        word="full", means="every weight", paper="McMahan et al. 2017, arXiv:1602.05629", keys=("exclude",), whole=True
    ),
)
"""The kinds that come with the house."""


@cache
def added() -> Mapping[str, EntryPoint]:
    """The kinds of other packages, by word; none is loaded."""
    return MappingProxyType({one.name: one for one in entry_points(group=GROUP) if one.name not in BUILT_IN})


def kind_object(word: str) -> Any:
    """A kind's object, its code loaded; :func:`lichen.models.adapters.kind.kind_of` gives it its type.

    Raises:
        LichenError: if there is no such kind, its package does not load, or it has no code of its own.
    """
    if word in BUILT_IN and BUILT_IN[word].code:
        module, _, name = BUILT_IN[word].code.partition(":")
        return getattr(import_module(module), name)
    if word not in added():
        raise LichenError(
            f"{word} is no kind of adapter",
            where="model.adapter.kind",
            fix=f"use one of {', '.join((*BUILT_IN, *added()))}",
        )
    entry = added()[word]
    try:
        return entry.load()
    except Exception as error:  # another's code may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LichenError(
            f"the adapter {word} of {entry.value} does not load: {reason}",
            where="model.adapter.kind",
            fix="mend or update the package that brings it",
        ) from error


def facts_of(word: str) -> Facts:
    """The facts of a kind; only one of another package is loaded for them.

    Raises:
        LichenError: as :func:`kind_object`.

    >>> facts_of("lora").low_rank, facts_of("ia3").low_rank
    (True, False)
    """
    if word in BUILT_IN:
        return BUILT_IN[word]
    found = kind_object(word)
    if not isinstance(found, _WithFacts) or not isinstance(found.facts, Facts) or found.facts.word != word:
        raise misregistered(word)
    return found.facts


def misregistered(word: str) -> LichenError:
    """What to say of an entry point that names something else than a kind of this word."""
    return LichenError(
        f"what is registered as the adapter {word} is no AdapterKind of this word",
        where="model.adapter.kind",
        fix="mend the package that brings it",
    )


def words_with(key: str) -> str:
    """The built-in kinds that read a key of the recipe's adapter section, as its description begins.

    >>> words_with("target_modules")
    'lora, ia3'
    """
    return ", ".join(facts.word for facts in BUILT_IN.values() if key in facts.keys)
