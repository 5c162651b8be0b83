"""Writes prompts and prefixes in PEFT's format, reads them, and starts a run from one.

Legend: m virtual tokens, L layers, k key and value heads, d width of a head, H width of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, stack

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.kind import NOTHING, START_PLAIN, VIRTUAL, PeftFormat, PeftTensors
from lichen.models.adapters.linear_layers import fits

__all__ = ["PREFIX_PEFT", "PROMPT_PEFT"]


def _only(tree: Mapping[str, Tensor], end: str) -> str:
    found = [name for name in tree if fits(name, (end,))]
    if len(found) != 1:
        raise LichenError(f"there is no tensor {end} to write", where="export", fix="use the run's own tensors")
    return found[0]


def _write_prompt(tree: Tree, spec: Any, patches: Mapping[str, Mapping[str, Tensor]]) -> PeftTensors:
    name = _only(tree, "prompt.tokens")
    x_mH = tree[name]
    # PEFT reads no more of a prompt, but asks some models in vain for the rest of what it calls its size.
    fields = {
        "num_virtual_tokens": len(x_mH),
        "token_dim": x_mH.shape[1],
        "num_transformer_submodules": 1,
        "num_layers": 1,
        "num_attention_heads": 1,
    }
    return PeftTensors(own=frozenset({name}), tensors={VIRTUAL: x_mH}, fields=fields)


def _write_prefix(tree: Tree, spec: Any, patches: Mapping[str, Mapping[str, Tensor]]) -> PeftTensors:
    names = _only(tree, "prefix.keys"), _only(tree, "prefix.values")
    layers, heads, tokens, wide = tree[names[0]].shape
    # PEFT's own order: token, layer, key or value, head.
    x_mL2kd = stack([tree[name].permute(2, 0, 1, 3) for name in names], dim=2)
    fields = {
        "num_virtual_tokens": tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * wide,
        "num_transformer_submodules": 1,
    }
    return PeftTensors(own=frozenset(names), tensors={VIRTUAL: x_mL2kd.reshape(tokens, -1)}, fields=fields)


def _full(end: str, names: Iterable[str]) -> str:
    """The run's name that ends so, where there is one."""
    return next((name for name in names if fits(name, (end,))), end)


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    layers, heads, wide, count = (
        int(config.get(key) or 0) for key in ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")
    )
    return layers, heads, wide, count


def _misfit(x: Tensor, sizes: str, where: str) -> LichenError:
    return LichenError(
        f"virtual tokens of shape {tuple(x.shape)} do not fit {sizes}", where=where, fix="save the adapter again"
    )


def _read_prompt(tensors: Tree, config: Mapping[str, Any], names: Iterable[str], where: str) -> Tree:
    tree = dict(tensors)
    if (x := tree.pop(VIRTUAL, None)) is None:
        return tree
    _, _, wide, count = _sizes(config)
    if x.dim() != 2 or len(x) != (count or len(x)) or x.shape[1] != (wide or x.shape[1]):
        raise _misfit(x, f"num_virtual_tokens={count}, token_dim={wide}", where)
    return {_full("prompt.tokens", names): x, **tree}


def _read_prefix(tensors: Tree, config: Mapping[str, Any], names: Iterable[str], where: str) -> Tree:
    tree = dict(tensors)
    if (x := tree.pop(VIRTUAL, None)) is None:
        return tree
    layers, heads, wide, count = _sizes(config)
    fitting = x.dim() == 2 and len(x) == (count or len(x))
    if fitting:
        fitting = bool(layers and heads) and x.shape[1] == 2 * layers * (wide or x.shape[1] // (2 * layers))
        fitting = fitting and not x.shape[1] % (2 * layers * heads)
    if not fitting:
        sizes = f"num_virtual_tokens={count}, token_dim={wide}, num_layers={layers}, num_attention_heads={heads}"
        raise _misfit(x, sizes, where)
    x_mL2kd = x.reshape(x.shape[0], layers, 2, heads, -1)
    sides = {
        _full(f"prefix.{name}", names): x_mL2kd[:, :, side].permute(1, 2, 0, 3).contiguous()
        for side, name in enumerate(("keys", "values"))
    }
    return sides | tree


def begin(tree: Tree, fresh: Tree, spec: Any, config: Mapping[str, Any], where: str) -> tuple[Tree, list[str]]:
    """The virtual tokens, which must be as many as the run's.

    Raises:
        LichenError: naming the key of the recipe that would make them fit.
    """
    found: Tree = {}
    for name in fresh:
        if name not in tree:
            raise LichenError(f"tensor {name!r} is missing", where=where, fix="give a folder that PEFT wrote")
        theirs, ours = tuple(tree[name].shape), tuple(fresh[name].shape)
        at = 0 if name.endswith("tokens") else 2
        if theirs[at] != ours[at]:
            raise LichenError(
                f"the adapter in {where} has {theirs[at]} virtual tokens, the run {ours[at]}",
                where="model.adapter.num_virtual_tokens",
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


_EVERY = frozenset({"num_virtual_tokens", "token_dim"})
_ONE: tuple[tuple[Any, ...], str] = ((None, 1), START_PLAIN)

PROMPT_PEFT = PeftFormat(
    type="PROMPT_TUNING",
    config="PromptTuningConfig",
    write=_write_prompt,
    read=_read_prompt,
    begin=begin,
    honoured=_EVERY,
    idle=frozenset(
        {"num_attention_heads", "num_layers"}
        | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    ),
    plain={"num_transformer_submodules": _ONE},
)
PREFIX_PEFT = PeftFormat(
    type="PREFIX_TUNING",
    config="PrefixTuningConfig",
    write=_write_prefix,
    read=_read_prefix,
    begin=begin,
    honoured=_EVERY | {"num_attention_heads", "num_layers"},
    idle=frozenset({"encoder_hidden_size", "init_weights"}),
    plain={"num_transformer_submodules": _ONE, "prefix_projection": (NOTHING, START_PLAIN)},
)
