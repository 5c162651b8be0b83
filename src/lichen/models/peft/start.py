"""Starts a run from a PEFT adapter, with the function that PEFT gives it.

What is trained is the recipe's to say: which layers, of which rank, at which scale. What the adapter computes is
PEFT's to say. Where both fit, the run starts with exactly PEFT's logits, and a layer that the adapter leaves alone
starts as the base. Where they do not fit, the key of the recipe that would make them fit is named. What is a kind's
own in this is its object's to do (:class:`lichen.models.adapters.kind.PeftFormat`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.kind import MERGE_FIRST, PeftFormat
from lichen.models.adapters.linear_layers import fits, is_linear
from lichen.models.adapters.wrap import Wrapped
from lichen.models.peft.config import left_out_by
from lichen.models.peft.read import read_adapter

__all__ = ["Begun", "start_from"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """Where a run starts.

    Attributes:
        tree: The run's trainable tensors.
        notes: What was assumed, a sentence each.
    """

    tree: Tree
    notes: tuple[str, ...]


def start_from(
    folder: Path,
    wrapped: Wrapped,
    fresh: Tree,
    *,
    base_names: Sequence[str] = (),
    classes: Sequence[str] = (),
    their_classes: Sequence[str] = (),
) -> Begun:
    """The run's tensors with the function of a PEFT adapter.

    Args:
        folder: Holds the adapter.
        wrapped: The run's model.
        fresh: What the run would start from without it.
        base_names: What the run's base is called; an adapter of another base is noted.
        classes: A classifier's, in the order of the run's logits.
        their_classes: The adapter's, in the order of its own; where it names none, they are taken for the run's.

    Raises:
        LichenError: if the adapter cannot be computed here, or not with what the run trains.
    """
    kind, peft_format = wrapped.spec.kind, wrapped.spec.kind.peft
    if peft_format is None:
        raise LichenError(f"{kind.facts.word} does not start from a PEFT adapter", where="model.adapter.init_from")
    tree, config = read_adapter(folder, spec=wrapped.spec, like=fresh)
    where, notes = str(folder), [*_notes(config, base_names)]
    heads = {name for name in fresh if name.startswith(tuple(f"{path}." for path in wrapped.heads))}
    own = {name for name in tree if name not in heads and name.rpartition(".")[2] in kind.tensors}
    if "target_modules" in peft_format.honoured:
        _check_targets({name.rpartition(".")[0] for name in own}, config, wrapped, peft_format, where)
    _check_rest(tree.keys() - own - heads, wrapped, peft_format, where)
    if any(name in tree for name in heads):
        tree, more = _in_our_order(tree, [name for name in fresh if name in heads], classes, their_classes, where)
        notes += more
    notes += _check_heads(tree, config, heads, fresh, wrapped, where)
    theirs, ours = (
        {name: tree[name] for name in tree if name in own},
        {n: x for n, x in fresh.items() if n not in heads},
    )
    found, more = peft_format.begin(theirs, ours, wrapped.spec, config, where)
    found |= {name: tree.get(name, fresh[name]) for name in heads}
    ready = {name: found[name].to(fresh[name]).contiguous() for name in fresh}
    return Begun(tree=ready, notes=(*notes, *more))


def _notes(config: Mapping[str, Any], base_names: Sequence[str]) -> Iterable[str]:
    made_on = config.get("base_model_name_or_path")
    ours = {PurePath(name).name.lower() for name in base_names}
    if isinstance(made_on, str) and made_on and ours and PurePath(made_on).name.lower() not in ours:
        yield f"the adapter was made on {made_on}; it is computed on {base_names[0]}"
    if config.get("revision"):
        yield f"the adapter names revision {config['revision']} of its base, which is not looked at"
    if config.get("lora_dropout"):
        yield f"the adapter was trained with lora_dropout {config['lora_dropout']}; the run trains without"


def _check_targets(
    layers: set[str], config: Mapping[str, Any], wrapped: Wrapped, peft_format: PeftFormat, where: str
) -> None:
    """The layers of the file are those that its configuration names in this base, and the run trains them all."""
    if config.get("target_modules") is None:
        raise LichenError(
            "the adapter has no target_modules", where=where, fix="name its layers there, as PEFT does when it saves"
        )
    modules = dict(wrapped.model.named_modules())
    for path in sorted(layers):
        made_on = config.get("base_model_name_or_path") or "another model"
        if path not in modules:
            raise LichenError(
                f"the base has no layer {path!r}; the adapter was made on {made_on}",
                where=where,
                fix="name that model in model.name",
            )
        if field := left_out_by(config, path):
            raise LichenError(
                f"the adapter holds layer {path!r}, which PEFT would leave out because of its {field}",
                where=where,
                fix="mend it there",
            )
    missing = layers - set(wrapped.layers)
    if missing:
        _refuse_untrained(sorted(missing), config, wrapped, peft_format, where)
    if config.get(peft_format.initial, True) is not False:
        return
    for path, layer in modules.items():
        if path not in layers and (path in wrapped.layers or is_linear(layer)) and not left_out_by(config, path):
            raise LichenError(
                f"the file has no tensors of layer {path!r}, which PEFT would draw at random "
                f"({peft_format.initial}=False)",
                where=where,
                fix="save the adapter again",
            )


_FIELDS = {"target_modules": "targets", "feedforward_modules": "feedforward"}
"""Where an adapter's specification holds what a key of the recipe says, if it calls it otherwise."""


def _refuse_untrained(
    missing: Sequence[str], config: Mapping[str, Any], wrapped: Wrapped, peft_format: PeftFormat, where: str
) -> None:
    path, spec = missing[0], wrapped.spec
    if getattr(spec, "last", None) is not None and any(fits(p, (path.rpartition(".")[2],)) for p in wrapped.layers):
        key, fix = "model.adapter.last", "leave it out"
    else:
        key = f"model.adapter.{peft_format.key_of(path, config)}"
        name = key.rpartition(".")[2]
        own = () if isinstance(spec, str) else getattr(spec, _FIELDS.get(name, name), ())
        ends = {name.rpartition(".")[2] for name in missing}
        fix = f"set it to [{', '.join(sorted({*own, *ends}))}]" if not isinstance(own, str) else "list the layers"
    raise LichenError(f"the adapter in {where} holds layer {path!r}, which the run does not train", where=key, fix=fix)


def _check_rest(rest: Iterable[str], wrapped: Wrapped, peft_format: PeftFormat, where: str) -> None:
    """Refuse a tensor that neither belongs to the adapter nor to a layer that the run trains whole."""
    for name in sorted(rest):
        for part, key in peft_format.hints.items():
            if part in name:
                raise LichenError(
                    f"the adapter holds {name!r} ({key}), which is not computed here",
                    where=where,
                    fix=MERGE_FIRST,
                )
        layer = name.rpartition(".")[0]
        if name in wrapped.frozen():
            raise LichenError(
                f"the adapter in {where} holds layer {layer!r} whole (modules_to_save), which the run leaves frozen",
                where="model.adapter.modules_to_save",
                fix=f"add {layer.rpartition('.')[2]}",
            )
        raise LichenError(
            f"unexpected tensor {name!r}: it fits nothing in this base",
            where=where,
            fix="name the base and the task that the adapter was made for",
        )


def _check_heads(
    tree: Tree, config: Mapping[str, Any], heads: set[str], fresh: Tree, wrapped: Wrapped, where: str
) -> Iterable[str]:
    """Layers trained whole have the run's shapes, and those that the configuration names are there."""
    saved = config.get("modules_to_save") or ()
    # PEFT takes names from their end, at a dot or not.
    whole = (
        tuple(f"{path}." for path, _ in wrapped.model.named_modules() if path.endswith(tuple(saved))) if saved else ()
    )
    for name in sorted((heads | wrapped.frozen().keys()) - tree.keys()):
        if name.startswith(whole):
            raise LichenError(
                f"the file lacks {name!r}, although modules_to_save names it", where=where, fix="save the adapter again"
            )
    for name in sorted(heads & tree.keys()):
        if tree[name].shape != fresh[name].shape:
            raise LichenError(
                f"the adapter's {name!r} has shape {tuple(tree[name].shape)}, the run's {tuple(fresh[name].shape)}",
                where=where,
                fix="start from an adapter of as many classes, on a base of this size",
            )
    bare = sorted({name.rpartition(".")[0] for name in heads - tree.keys()})
    return [f"the adapter holds no {', '.join(bare)}; the run starts with the base's"] if bare else []


def _in_our_order(
    tree: Tree, heads: Sequence[str], classes: Sequence[str], theirs: Sequence[str], where: str
) -> tuple[Tree, list[str]]:
    """The rows of the layer that gives the logits, the last of ``heads``, in the order of the run's classes."""
    if not theirs or not classes:
        note = f"the adapter does not name its classes; its head's rows are taken for {', '.join(classes)}"
        return tree, [note] if classes else []
    if set(theirs) != set(classes):
        raise LichenError(
            f"the adapter's classes are {', '.join(theirs)}, the run's {', '.join(classes)}",
            where=where,
            fix="start from an adapter of the same classes, or choose rows with data.classes",
        )
    if list(theirs) == list(classes):
        return tree, []
    wide = [name for name in heads if name in tree and tree[name].dim() == 2 and len(tree[name]) == len(theirs)]
    if not wide:
        return tree, []  # of another number of classes, which is told by its shape
    last = wide[-1].rpartition(".")[0]
    rows = [list(theirs).index(name) for name in classes]
    moved = {name: x[rows] for name, x in tree.items() if name.rpartition(".")[0] == last and name in heads}
    return {**tree, **moved}, [f"the head's rows are put in the order {', '.join(classes)}"]
