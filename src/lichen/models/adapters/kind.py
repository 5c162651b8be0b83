"""The contract of a kind of adapter: one object places, starts and merges it, and writes and reads it as PEFT does.

As in PEFT's ``lora/variants.py``, what sets a kind apart stands in one place: its own file beside this one, or one file
of another package (``examples/extending/dora.py``). All else in the house asks this object, and never which kind it is.

References:
    Mangrulkar, Gugger, Debut, Belkada, Paul and Bossan (2022). PEFT: State-of-the-art
    Parameter-Efficient Fine-Tuning methods. https://github.com/huggingface/peft

Legend: i in, o out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import Tensor

from lichen.core.tree import Tree
from lichen.models.adapters.table import BUILT_IN, Facts, added, kind_object, misregistered
from lichen.models.packing.packing import Packing

__all__ = [
    "BEFORE_LAYERS",
    "BEFORE_VIRTUAL",
    "MERGE_FIRST",
    "NOTHING",
    "START_PLAIN",
    "VIRTUAL",
    "AdapterKind",
    "Merge",
    "PeftFormat",
    "PeftTensors",
    "Spec",
    "kind_claiming",
    "kind_of",
    "kinds_in_peft",
    "peft_types",
]

BEFORE_LAYERS = "base_model.model."
"""What PEFT writes before the names of a model's layers."""
BEFORE_VIRTUAL = "base_model."
"""And before those of a model that it has put virtual tokens before."""
VIRTUAL = "prompt_embeddings"
"""What it calls virtual tokens."""

MERGE_FIRST = "merge it into its base (PEFT's merge_and_unload), and give the merged folder as model.name"
"""What to do about an adapter that computes something else."""
START_PLAIN = "train a plain adapter, or start without init_from"
"""And where it cannot be merged."""
NOTHING: tuple[Any, ...] = (None, False)
"""The plain values of a field that must say nothing."""


class Spec(Protocol):
    """What of a model is trained, and how: a kind's own frozen dataclass."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Ends of names of layers trained whole beside the adapter (PEFT's ``modules_to_save``)."""
        ...

    @property
    def kind(self) -> AdapterKind:
        """The object of its kind."""
        ...


class Merge(Protocol):
    """How an adapter goes into a layer's own weights."""

    def __call__(self, layer: Any, path: str, own: Tree, spec: Any, change_oi: Tensor) -> Tree:
        """New values of the layer's parameters, by their names and as they lie there.

        Args:
            layer: A layer of the plain model; it is not changed.
            path: Its name.
            own: The adapter's tensors of this layer, by the last part of their names.
            spec: What the run trained.
            change_oi: What is added to the frozen weight beside the adapter, float64: its patch, or zeros.

        Returns:
            Best in float64; the caller rounds.
        """
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeftTensors:
    """An adapter as PEFT has it.

    Attributes:
        own: The run's tensors that stand in it; what is left are layers trained whole.
        tensors: By PEFT's names, all that it writes before a layer's name included.
        fields: Of PEFT's configuration.
    """

    own: frozenset[str]
    tensors: Tree
    fields: dict[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeftFormat:
    """A kind's way into PEFT's folder format and back.

    A field of PEFT's configuration is *honoured* where what it says is computed, *idle* where it says nothing about
    the function of a finished adapter, and otherwise only its *plain* values are taken.

    Attributes:
        type: PEFT's ``peft_type``.
        config: PEFT's class of configurations.
        write: ``(tree, spec, patches by layer)`` to what is written.
        read: ``(tensors, config, names, where)`` to the run's tensors. ``tensors`` carry the names of the file without
            what PEFT writes before a layer's; ``names`` are those of the run's own.
        begin: ``(tree, fresh, spec, config, where)`` to the run's tensors with the adapter's function, and notes, a
            sentence each. ``tree`` is what ``read`` gave, and ``fresh`` what the run would start from.
        honoured: Fields whose meaning is computed.
        idle: Fields that say nothing about what a finished adapter computes.
        plain: Fields of which only some values can be computed: these, and what to do about any other.
        needed: Fields without whose value it is an adapter of another kind, with that value.
        initial: PEFT's field that says whether a layer without tensors in the file is drawn at random.
        hints: Parts of names of tensors that other settings of the same type would write, and the setting.
        key_of: ``(layer, config)`` to the recipe's key that would name that layer.
    """

    type: str
    config: str
    write: Callable[[Tree, Any, Mapping[str, Mapping[str, Tensor]]], PeftTensors]
    read: Callable[[Tree, Mapping[str, Any], Iterable[str], str], Tree]
    begin: Callable[[Tree, Tree, Any, Mapping[str, Any], str], tuple[Tree, list[str]]]
    honoured: frozenset[str]
    idle: frozenset[str]
    plain: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    needed: Mapping[str, Any] = field(default_factory=dict)
    initial: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)
    key_of: Callable[[str, Mapping[str, Any]], str] = lambda layer, config: "target_modules"

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration is of this kind and no other."""
        return config.get("peft_type") == self.type and all(config.get(k) == v for k, v in self.needed.items())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKind:
    """One way of adapting a frozen model.

    Attributes:
        facts: What a recipe must know of it.
        build: ``(section of the recipe, ends of names of what is trained whole)`` to what is trained.
        place: ``(model, spec, packing, heads)``: put its layers into a model, whose weights they share, and give their
            names. Such a layer has ``buffer_names``, the names of its tensors, which come in as buffers with a leading
            client axis. One that cannot run on packed rows has ``padded_only``, the reason.
        start: ``(model, name of a layer, spec, seed)`` to that layer's tensors at the start, without client axis.
        tensors: Ends of the names of its tensors; empty where they have the names of the weights that they replace.
        optional: Ends of names of tensors that a call may bring beside them, or leave out.
        patched: Its layers take a patch of the frozen weight beside it, and run without their own tensors.
        merge: How it goes into a layer's weights; None: weights cannot hold it.
        peft: Its way into PEFT's format; None: PEFT has no such adapter.
    """

    facts: Facts
    build: Callable[[Any, tuple[str, ...]], Spec]
    place: Callable[[Any, Any, Packing, Sequence[str]], tuple[str, ...]]
    start: Callable[[Any, str, Any, int], Tree]
    tensors: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    patched: bool = False
    merge: Merge | None = None
    peft: PeftFormat | None = None


def kind_of(word: str) -> AdapterKind:
    """The object of a kind, by the recipe's word.

    Raises:
        LichenError: if there is none, or another package brings something else under this word.
    """
    found = kind_object(word)
    if not isinstance(found, AdapterKind) or found.facts.word != word:
        raise misregistered(word)
    return found


def _in_peft() -> Iterator[AdapterKind]:
    for word in (*(word for word, facts in BUILT_IN.items() if facts.code), *added()):
        kind = kind_of(word)
        if kind.peft is not None:
            yield kind


def kinds_in_peft() -> tuple[str, ...]:
    """The kinds that PEFT has, too, by the recipe's word."""
    return tuple(kind.facts.word for kind in _in_peft())


def kind_claiming(config: Mapping[str, Any]) -> AdapterKind | None:
    """The kind that a configuration of PEFT is of, the built-in ones asked first; None if there is none."""
    return next((kind for kind in _in_peft() if kind.peft is not None and kind.peft.claims(config)), None)


def peft_types() -> tuple[str, ...]:
    """What of PEFT can be read, by ``peft_type``."""
    return tuple(dict.fromkeys(kind.peft.type for kind in _in_peft() if kind.peft is not None))
