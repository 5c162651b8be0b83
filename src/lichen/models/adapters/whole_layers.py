"""Chooses the layers that are trained whole: named ones, a new head, and what the checkpoint lacks.

Weights that a checkpoint lacks are drawn from the seed. No other machine can draw them, so they must travel
with the adapter: they are trained like the head and are among PEFT's ``modules_to_save``.

PEFT itself, in every classifier, trains and expects in the adapter's file whatever module's name *ends* in
``classifier`` or ``score``, without a dot between (``pre_classifier``, too). So do we, or no adapter would load there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lichen.models.adapters.linear_layers import fits

__all__ = [
    "came_with_head",
    "head_layers",
    "lacked_layers",
    "note_lacked",
    "output_layer",
    "whole_layers",
    "within",
]

_HEADS = ("classifier", "score")
"""How names of heads end for PEFT."""


def note_lacked(model: nn.Module, weights: Iterable[str], *, head: bool = False) -> None:
    """Remember on the model which weights its files lacked, by full name, and whether they held a trained head."""
    own = {name for name, _ in model.named_parameters()}
    lacked = sorted({name.rpartition(".")[0] for name in weights if name in own})
    object.__setattr__(model, "_lacked_layers", tuple(lacked))
    object.__setattr__(model, "_came_with_head", head)


def lacked_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers whose weights the model's files lacked, sorted; none for a model that was not loaded here."""
    found: tuple[str, ...] = getattr(model, "_lacked_layers", ())
    return found


def came_with_head(model: nn.Module) -> bool:
    """Whether the files of a classifier held a trained head, of this many classes or another number."""
    return bool(getattr(model, "_came_with_head", False))


def output_layer(model: Any) -> str:
    """The name of a classifier's layer whose output are the logits."""
    last = ""
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if within(name, head_layers(model)) and weight is not None and weight.shape[0] == model.config.num_labels:
            last = name
    return last


def whole_layers(model: Any, named: Sequence[str], *, classifier: bool) -> tuple[str, ...]:
    """Ends of names of what is trained whole, as an adapter's ``heads``.

    Args:
        model: From :mod:`lichen.models.loading.load`.
        named: What the recipe names; of a classifier without names, its head.
        classifier: Whether it is one.

    >>> from transformers import DistilBertConfig, DistilBertForSequenceClassification
    >>> model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=9, dim=8, hidden_dim=8, n_heads=2))
    >>> whole_layers(model, (), classifier=True)
    ('classifier', 'pre_classifier')
    """
    modules = [name for name, _ in model.named_modules() if name]
    heads = list(named)
    if classifier:
        heads = heads or head_layers(model)
        # An outer module comes before what lies in it.
        names = [name for name in modules if name.endswith(_HEADS)] + list(lacked_layers(model))
        for name in names:
            if not within(name, heads):
                heads.append(name)
    return tuple(dict.fromkeys(full for head in heads for full in _written(head, modules)))


def head_layers(model: Any) -> list[str]:
    """A classifier's head: what is called so, else all that has weights beside the model that gives hidden states."""
    base = model.base_model
    other_layers = [
        name for name, x in model.named_children() if x is not base and next(x.parameters(), None) is not None
    ]
    return [name for name in _HEADS if getattr(model, name, None) is not None] or other_layers


def within(name: str, ends: Sequence[str]) -> bool:
    """Whether one of these ends is a module's name, or that of one that it lies in.

    >>> within("bert.pooler.dense", ("pooler",)), within("pre_classifier", ("classifier",))
    (True, False)
    """
    parts = name.split(".")
    return any(fits(".".join(parts[:n]), ends) for n in range(1, len(parts) + 1))


def _written(head: str, modules: Sequence[str]) -> list[str]:
    """The end itself, or full names where PEFT, which asks for no dot, would find it in more of them."""
    ours = [name for name in modules if fits(name, (head,))]
    return [head] if len(ours) == sum(name.endswith(head) for name in modules) else ours or [head]
