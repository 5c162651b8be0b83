"""Writes LoRA adapters in PEFT's format, reads them, and starts a run from one.

A factored patch of the frozen weights is written as more rank: with s the adapter's scale,
``left right + s B A = s [B, left / s] [A; right]``. That pays while the joined rank stays below half
of the layer's smaller side; past that, and for a dense patch, only a merged model is honest.

A run that goes on from an adapter starts with exactly its function: a layer of another scale has the difference
multiplied into B, a layer of smaller rank gets rows of A as a fresh adapter has them beside columns of B that are
zero, and a layer that the adapter leaves alone starts as the base.

References:
    Singhal, Ponkshe and Vepakomma (2025). FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Large Language Models. ACL 2025, arXiv:2410.09432.

Legend: r rank, i in, o out, R rank of a factored patch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, cat

from lichen.core.conventions.factor_pairs import factor_names, is_factor, layers_with_factors
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.kind import BEFORE_LAYERS, MERGE_FIRST, NOTHING, START_PLAIN, PeftFormat, PeftTensors
from lichen.models.adapters.linear_layers import fits

__all__ = ["LORA_PEFT", "begin", "read", "write"]

_CONVERT = (
    "it changed the base's own weights when it began: save it again with PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"
)


def _joined(path: str, A_ri: Tensor, B_or: Tensor, part: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """A and B with the patch as more rank."""
    fix = "export a merged model instead"
    if "dense" in part:
        raise LichenError(f"the patch of layer {path} is dense and fits no adapter", where="export", fix=fix)
    left_oR, right_Ri = part["left"].double(), part["right"].double()
    rank = A_ri.shape[0] + right_Ri.shape[0]
    if rank >= min(A_ri.shape[1], B_or.shape[0]) / 2:
        raise LichenError(f"layer {path} would need an adapter of rank {rank}", where="export", fix=fix)
    A = cat([A_ri.double(), right_Ri]).to(A_ri.dtype)
    return A, cat([B_or.double(), left_oR / scale], dim=1).to(B_or.dtype)


def write(tree: Tree, spec: Any, patches: Mapping[str, Mapping[str, Tensor]]) -> PeftTensors:
    """Factors as they are, a factored patch as more rank.

    Raises:
        LichenError: if there is nothing to write, or a patch does not fit as more rank.
    """
    # A layer that nobody trains any more lives on in its patch alone.
    alone = {p for p in patches if isinstance(spec.targets, str) or fits(p, spec.targets)}
    layers = sorted({*layers_with_factors(tree), *alone})
    if not layers:
        raise LichenError("there is no low-rank adapter to write", where="export", fix="export a merged model instead")
    stray = sorted(patches.keys() - set(layers))
    if stray:
        raise LichenError(f"the patch of layer {stray[0]} has no adapter beside it", where="export")
    tensors: Tree = {}
    ranks: dict[str, int] = {}
    for path in layers:
        part = patches.get(path, {})
        if f"{path}.lora_A" in tree:
            A_ri, B_or = tree[f"{path}.lora_A"], tree[f"{path}.lora_B"]
        else:
            size_o, size_i = part["dense"].shape if "dense" in part else (len(part["left"]), part["right"].shape[1])
            some = next(iter(part.values()))
            A_ri, B_or = some.new_zeros(0, size_i), some.new_zeros(size_o, 0)
        if part:
            A_ri, B_or = _joined(path, A_ri, B_or, part, spec.scale)
        if A_ri.shape[0] != spec.rank:
            ranks[path] = A_ri.shape[0]
        tensors[f"{BEFORE_LAYERS}{path}.lora_A.weight"], tensors[f"{BEFORE_LAYERS}{path}.lora_B.weight"] = A_ri, B_or
    # Ends of names would fit layers that are not adapted, too.
    whole = isinstance(spec.targets, str) or spec.last is not None
    names = layers if whole else sorted(spec.targets)
    own = frozenset(name for path in layers for name in factor_names(path))
    fields = {
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": names,
        "rank_pattern": ranks,
        "alpha_pattern": {path: spec.scale * (r**0.5 if spec.rslora else r) for path, r in ranks.items()},
    }
    return PeftTensors(own=own, tensors=tensors, fields=fields)


def read(tensors: Tree, config: Mapping[str, Any], names: Iterable[str], where: str) -> Tree:
    """The factors under the run's names.

    Raises:
        LichenError: if they are not pairs.
    """
    tree: Tree = {}
    for name, x in tensors.items():
        short = name.removesuffix(".weight")
        tree[short if is_factor(short) else name] = x
    for path in sorted({name.rpartition(".")[0] for name in tree if name.endswith((".lora_A", ".lora_B"))}):
        A_ri, B_or = tree.get(f"{path}.lora_A"), tree.get(f"{path}.lora_B")
        whole = A_ri is not None and B_or is not None and A_ri.dim() == B_or.dim() == 2
        if A_ri is None or B_or is None or not whole or A_ri.shape[0] != B_or.shape[1]:
            shapes = " and ".join("none" if x is None else str(tuple(x.shape)) for x in (A_ri, B_or))
            other = next((name for name in tree if name.startswith((f"{path}.lora_A.", f"{path}.lora_B."))), "")
            raise LichenError(
                f"layer {path} has A and B of shapes {shapes}{', and holds ' if other else ''}{other}",
                where=where,
                fix="save the adapter again with PEFT's save_pretrained",
            )
    return tree


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits a layer's name from its end."""
    fitting = (x for key, x in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(fitting, otherwise)


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank that PEFT gives the layer ``path``.

    >>> rank_of({"r": 8, "rank_pattern": {"layers.1.*q_proj": 2}}, "model.layers.1.self_attn.q_proj")
    2
    """
    return int(_by_pattern(config.get("rank_pattern"), path, config.get("r", 8)))


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """The numerator that PEFT scales the layer ``path`` by.

    >>> alpha_of({"lora_alpha": 16, "alpha_pattern": {"v_proj": 64}}, "model.layers.0.self_attn.q_proj")
    16.0
    """
    return float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)))


def _scale(rank: int, alpha: float, *, rslora: bool) -> float:
    return alpha / (rank**0.5 if rslora else rank)


def begin(tree: Tree, fresh: Tree, spec: Any, config: Mapping[str, Any], where: str) -> tuple[Tree, list[str]]:
    """A and B of the run's rank, with the adapter's product.

    Raises:
        LichenError: naming the key of the recipe that would make it fit.
    """
    layers, rslora = layers_with_factors(tree), bool(config.get("use_rslora"))
    if not layers:
        raise LichenError("the adapter holds no layer", where=where, fix="give a folder that PEFT wrote")
    sizes = {path: (rank_of(config, path), alpha_of(config, path)) for path in layers}
    for path, (rank, _) in sizes.items():
        own_rank = tree[f"{path}.lora_A"].shape[0]
        if own_rank != rank:
            raise LichenError(
                f"layer {path!r} has rank {own_rank}, its r or rank_pattern says {rank}",
                where=where,
                fix="mend it there",
            )
    _check_scale(sizes, spec, config, where)
    found: Tree = {}
    folded = 0
    for path in layers_with_factors(fresh):
        name_A, name_B = f"{path}.lora_A", f"{path}.lora_B"
        A_ri, B_or = fresh[name_A], fresh[name_B]
        if path in sizes:
            factor = _scale(*sizes[path], rslora=rslora) / spec.scale
            folded += factor != 1.0
            A_ri, B_or = _wider(tree[name_A], tree[name_B], A_ri, B_or, factor=factor, where=where, path=path)
        found |= {name_A: A_ri, name_B: B_or}
    notes = [f"{folded} layers have a scale of their own, which B takes in"] if folded else []
    alone = len(layers_with_factors(fresh)) - len(layers)
    notes += [f"{alone} of the run's layers are not in the adapter; they start as the base"] if alone else []
    return found, notes


def _check_scale(sizes: Mapping[str, tuple[int, float]], spec: Any, config: Mapping[str, Any], where: str) -> None:
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


LORA_PEFT = PeftFormat(
    type="LORA",
    config="LoraConfig",
    write=write,
    read=read,
    begin=begin,
    honoured=frozenset(
        {"target_modules", "exclude_modules", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
        | {"layers_to_transform", "layers_pattern"}
    ),
    idle=frozenset(
        # How it was trained; how weights lie in a layer; what other fields, which are refused, would read.
        {"lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
        | {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}
    ),
    plain={
        "bias": (("none",), MERGE_FIRST),
        "use_dora": (NOTHING, MERGE_FIRST),
        "lora_bias": (NOTHING, MERGE_FIRST),
        "init_lora_weights": ((True, False, "gaussian", "orthogonal", "eva", "mica"), _CONVERT),
        "trainable_token_indices": (NOTHING, MERGE_FIRST),
        "layer_replication": (NOTHING, START_PLAIN),
        "megatron_config": (NOTHING, START_PLAIN),
        "use_qalora": (NOTHING, START_PLAIN),
        "alora_invocation_tokens": (NOTHING, START_PLAIN),
        "velora_config": (NOTHING, START_PLAIN),
        "monteclora_config": (NOTHING, START_PLAIN),
        "target_parameters": (NOTHING, MERGE_FIRST),
        "use_bdlora": (NOTHING, START_PLAIN),
        "arrow_config": (NOTHING, START_PLAIN),
        "kasa_config": (NOTHING, MERGE_FIRST),
        "ensure_weight_tying": (NOTHING, MERGE_FIRST),
    },
    initial="init_lora_weights",
    hints={
        ".lora_embedding_": "target_modules",
        ".token_adapter.": "trainable_token_indices",
        ".lora_magnitude_vector": "use_dora",
        ".lora_B.bias": "lora_bias",
    },
)
"""What PEFT calls ``LORA``, without its variants."""
