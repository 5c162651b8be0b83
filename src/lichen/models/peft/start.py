"""Starts a run from a PEFT adapter, with the function that PEFT gives it.

What is trained is the recipe's to say: which layers, of which rank, at which scale. What the adapter computes is
PEFT's to say. Where both fit, the run starts with exactly PEFT's logits: a layer of another scale has the
difference multiplied into B, a layer of smaller rank gets rows of A as a fresh adapter has them beside columns of
B that are zero, and a layer that the adapter leaves alone starts as the base. Where they do not fit, the key of
the recipe that would make them fit is named.

Legend: r rank, i in, o out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, final

from torch import Tensor, cat

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.ia3 import IA3, IA3Linear
from lichen.models.adapters.lora import Lora, LoraLinear, fits, is_linear
from lichen.models.adapters.wrap import Wrapped
from lichen.models.peft.config import alpha_of, left_out_by, rank_of
from lichen.models.peft.format import low_rank_layers
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
    spec = wrapped.spec
    tree, config = read_adapter(folder, spec=spec, like=fresh)
    where, notes = str(folder), [*_notes(config, base_names)]
    heads = {name for name in fresh if name.startswith(tuple(f"{path}." for path in wrapped.heads))}
    if isinstance(spec, Lora | IA3):
        _check_targets(tree, config, wrapped, where)
    own = {name for name in tree if name not in heads and _is_adapter(name)}
    _check_rest(tree.keys() - own - heads, wrapped, where)
    if any(name in tree for name in heads):
        tree, more = _in_our_order(tree, [name for name in fresh if name in heads], classes, their_classes, where)
        notes += more
    notes += _check_heads(tree, config, heads, fresh, wrapped, where)
    if isinstance(spec, Lora):
        found, more = _low_rank(tree, fresh, spec, config, where)
    elif isinstance(spec, IA3):
        found, more = _vectors(tree, fresh, wrapped, spec, where)
    else:
        found, more = _virtual(tree, fresh, heads, where)
    found |= {name: tree.get(name, fresh[name]) for name in heads}
    ready = {name: found[name].to(fresh[name]).contiguous() for name in fresh}
    return Begun(tree=ready, notes=(*notes, *more))


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B", ".ia3_l")) or fits(
        name, ("prompt.tokens", "prefix.keys", "prefix.values")
    )


def _notes(config: Mapping[str, Any], base_names: Sequence[str]) -> Iterable[str]:
    made_on = config.get("base_model_name_or_path")
    ours = {PurePath(name).name.lower() for name in base_names}
    if isinstance(made_on, str) and made_on and ours and PurePath(made_on).name.lower() not in ours:
        yield f"the adapter was made on {made_on}; it is computed on {base_names[0]}"
    if config.get("revision"):
        yield f"the adapter names revision {config['revision']} of its base, which is not looked at"
    if config.get("lora_dropout"):
        yield f"the adapter was trained with lora_dropout {config['lora_dropout']}; the run trains without"


def _check_targets(tree: Tree, config: Mapping[str, Any], wrapped: Wrapped, where: str) -> None:
    """The layers of the file are those that its configuration names in this base, and the run trains them all."""
    layers = {name.rpartition(".")[0] for name in tree if name.endswith((".lora_A", ".ia3_l"))}
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
        if f"{path}.ia3_l" in tree:
            _check_side(path, tree[f"{path}.ia3_l"], config.get("feedforward_modules") or (), where)
    missing = layers - set(wrapped.layers)
    if missing:
        _refuse_untrained(sorted(missing), tree, wrapped, where)
    begins = "init_ia3_weights" if isinstance(wrapped.spec, IA3) else "init_lora_weights"
    if config.get(begins, True) is not False:
        return
    kinds = (LoraLinear, IA3Linear)
    for path, layer in modules.items():
        if path not in layers and (isinstance(layer, kinds) or is_linear(layer)) and not left_out_by(config, path):
            raise LichenError(
                f"the file has no tensors of layer {path!r}, which PEFT would draw at random ({begins}=False)",
                where=where,
                fix="save the adapter again",
            )


def _check_side(path: str, vector: Tensor, feedforward: str | Sequence[str], where: str) -> None:
    """PEFT lays a vector as a row where its configuration says that it scales inputs."""
    if isinstance(feedforward, str):
        inputs = re.fullmatch(feedforward, path) is not None
    else:
        inputs = path.endswith(tuple(feedforward))
    if vector.dim() != 2 or vector.shape[0 if inputs else 1] != 1:
        raise LichenError(
            f"the vector of {path!r} has shape {tuple(vector.shape)}, which its feedforward_modules do not fit",
            where=where,
            fix="mend them there",
        )


def _refuse_untrained(missing: Sequence[str], tree: Tree, wrapped: Wrapped, where: str) -> None:
    path, spec = missing[0], wrapped.spec
    if getattr(spec, "last", None) is not None and any(fits(p, (path.rpartition(".")[2],)) for p in wrapped.layers):
        key, fix = "model.adapter.last", "leave it out"
    else:
        key = "model.adapter.targets"
        if isinstance(spec, IA3) and tree[f"{path}.ia3_l"].shape[0] == 1:
            key = "model.adapter.feedforward"
        own = () if isinstance(spec, str) else getattr(spec, key.rpartition(".")[2], ())
        ends = {name.rpartition(".")[2] for name in missing}
        fix = f"set it to [{', '.join(sorted({*own, *ends}))}]" if not isinstance(own, str) else "list the layers"
    raise LichenError(f"the adapter in {where} holds layer {path!r}, which the run does not train", where=key, fix=fix)


_NAMED = {".lora_embedding_": "target_modules", ".token_adapter.": "trainable_token_indices"}
_NAMED |= {".lora_magnitude_vector": "use_dora", ".lora_B.bias": "lora_bias"}


def _check_rest(rest: Iterable[str], wrapped: Wrapped, where: str) -> None:
    """Refuse a tensor that neither belongs to the adapter nor to a layer that the run trains whole."""
    for name in sorted(rest):
        for part, key in _NAMED.items():
            if part in name:
                raise LichenError(
                    f"the adapter holds {name!r} ({key}), which is not computed here",
                    where=where,
                    fix="merge it into its base (PEFT's merge_and_unload), and give the merged folder as model.name",
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


def _scale(rank: int, alpha: float, *, rslora: bool) -> float:
    return alpha / (rank**0.5 if rslora else rank)


def _low_rank(tree: Tree, fresh: Tree, spec: Lora, config: Mapping[str, Any], where: str) -> tuple[Tree, list[str]]:
    """A and B of the run's rank, with the adapter's product."""
    layers, rslora = low_rank_layers(tree), bool(config.get("use_rslora"))
    if not layers:
        raise LichenError("the adapter holds no layer", where=where, fix="give a folder that PEFT wrote")
    sizes = {path: (rank_of(config, path), alpha_of(config, path)) for path in layers}
    for path, (rank, _) in sizes.items():
        held = tree[f"{path}.lora_A"].shape[0]
        if held != rank:
            raise LichenError(
                f"layer {path!r} has rank {held}, its r or rank_pattern says {rank}", where=where, fix="mend it there"
            )
    _check_scale(sizes, spec, config, where)
    found: Tree = {}
    folded = 0
    for path in low_rank_layers(fresh):
        name_A, name_B = f"{path}.lora_A", f"{path}.lora_B"
        A_ri, B_or = fresh[name_A], fresh[name_B]
        if path in sizes:
            factor = _scale(*sizes[path], rslora=rslora) / spec.scale
            folded += factor != 1.0
            A_ri, B_or = _wider(tree[name_A], tree[name_B], A_ri, B_or, factor=factor, where=where, path=path)
        found |= {name_A: A_ri, name_B: B_or}
    notes = [f"{folded} layers have a scale of their own, which B takes in"] if folded else []
    alone = len(low_rank_layers(fresh)) - len(layers)
    notes += [f"{alone} of the run's layers are not in the adapter; they start as the base"] if alone else []
    return found, notes


def _check_scale(sizes: Mapping[str, tuple[int, float]], spec: Lora, config: Mapping[str, Any], where: str) -> None:
    """Rank and scale of the adapter must be the recipe's; only layers that differ among themselves are made to fit."""
    every = set(sizes.values())
    rank = max(rank for rank, _ in every)
    alpha = next(iter(every))[1] if len(every) == 1 else float(config.get("lora_alpha", 8))
    if alpha <= 0:
        raise LichenError(
            f"the adapter has lora_alpha={alpha:g}, which is not positive",
            where=where,
            fix="train one with a positive alpha, or start without init_from",
        )
    theirs = f"the adapter in {where} has"
    if spec.rank != rank:
        raise LichenError(
            f"{theirs} rank {rank}, the run {spec.rank}", where="model.adapter.rank", fix=f"set it to {rank}"
        )
    if spec.alpha != alpha:
        raise LichenError(
            f"{theirs} lora_alpha {alpha:g}, the run {spec.alpha:g}",
            where="model.adapter.alpha",
            fix=f"set it to {alpha:g}",
        )
    rslora = bool(config.get("use_rslora"))
    if spec.rslora != rslora:
        yes, no = str(rslora).lower(), str(spec.rslora).lower()
        raise LichenError(
            f"{theirs} use_rslora {yes}, the run {no}", where="model.adapter.rslora", fix=f"set it to {yes}"
        )


def _wider(
    A_ri: Tensor, B_or: Tensor, fresh_A: Tensor, fresh_B: Tensor, *, factor: float, where: str, path: str
) -> tuple[Tensor, Tensor]:
    """A and B with the run's rank, and ``factor`` times their product."""
    rank = A_ri.shape[0]
    if A_ri.shape[1] != fresh_A.shape[1] or B_or.shape[0] != fresh_B.shape[0]:
        ours = (fresh_B.shape[0], fresh_A.shape[1])
        raise LichenError(
            f"layer {path!r} is {(B_or.shape[0], A_ri.shape[1])} in the adapter and {ours} in the base",
            where=where,
            fix="name the base that the adapter was made for",
        )
    B_or = B_or.to(fresh_B.dtype) if factor == 1.0 else (B_or.double() * factor).to(fresh_B.dtype)
    A_ri = A_ri.to(fresh_A.dtype)
    if rank == fresh_A.shape[0]:
        return A_ri, B_or
    return cat([A_ri, fresh_A[rank:]]), cat([B_or, fresh_B[:, rank:]], dim=1)


def _vectors(tree: Tree, fresh: Tree, wrapped: Wrapped, spec: IA3, where: str) -> tuple[Tree, list[str]]:
    """The vectors of the run's layers; those that the adapter leaves alone are ones."""
    found: Tree = {}
    for path in wrapped.layers:
        name = f"{path}.ia3_l"
        if name not in tree:
            found[name] = fresh[name]
            continue
        inputs, theirs = fits(path, spec.feedforward), tree[name].shape[0] == 1
        if inputs != theirs:
            side, fix = ("input", f"add {path.rpartition('.')[2]}") if theirs else ("output", "leave it out there")
            raise LichenError(
                f"the adapter in {where} scales the {side} of {path!r}", where="model.adapter.feedforward", fix=fix
            )
        if tree[name].numel() != fresh[name].numel():
            raise LichenError(
                f"layer {path!r} has {tree[name].numel()} numbers in the adapter and {fresh[name].numel()} in the base",
                where=where,
                fix="name the base that the adapter was made for",
            )
        found[name] = tree[name].flatten()
    alone = sum(f"{path}.ia3_l" not in tree for path in wrapped.layers)
    return found, [f"{alone} of the run's layers are not in the adapter; they start as the base"] if alone else []


def _virtual(tree: Tree, fresh: Tree, heads: set[str], where: str) -> tuple[Tree, list[str]]:
    """The virtual tokens, which must be as many as the run's."""
    found: Tree = {}
    for name in fresh.keys() - heads:
        if name not in tree:
            raise LichenError(f"tensor {name!r} is missing", where=where, fix="give a folder that PEFT wrote")
        theirs, ours = tuple(tree[name].shape), tuple(fresh[name].shape)
        at = 0 if name.endswith("tokens") else 2
        if theirs[at] != ours[at]:
            raise LichenError(
                f"the adapter in {where} has {theirs[at]} virtual tokens, the run {ours[at]}",
                where="model.adapter.tokens",
                fix=f"set it to {theirs[at]}",
            )
        if theirs != ours:
            axes = "num_virtual_tokens, token_dim" if at == 0 else "num_layers, num_attention_heads, tokens, width"
            raise LichenError(
                f"the virtual tokens have shape {theirs} ({axes}), those of the base {ours}",
                where=where,
                fix="name the base that the adapter was made for",
            )
        found[name] = tree[name]
    return found, []
