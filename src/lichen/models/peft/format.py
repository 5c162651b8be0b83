"""Writes adapters in PEFT's folder format: LoRA, IA3, prompt and prefix tuning.

A factored patch of the frozen weights is written as more rank: with s the adapter's scale,
``left right + s B A = s [B, left / s] [A; right]``. That pays while the joined rank stays below half
of the layer's smaller side; past that, and for a dense patch, only a merged model is honest.

PEFT has no bottleneck adapter and no biases alone: those are refused here.

References:
    Mangrulkar, Gugger, Debut, Belkada, Paul and Bossan (2022). PEFT: State-of-the-art
    Parameter-Efficient Fine-Tuning methods. https://github.com/huggingface/peft
    Singhal, Ponkshe and Vepakomma (2025). FedEx-LoRA: Exact Aggregation for Federated and Efficient
    Fine-Tuning of Large Language Models. ACL 2025, arXiv:2410.09432.

Legend: r rank, i in, o out, R rank of a factored patch, m virtual tokens, L layers, k key and value heads, d width
of a head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, cat, stack

from lichen.core.errors import LichenError
from lichen.core.store import write_atomic
from lichen.core.tree import Tree
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.lora import Lora, fits
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.quantized import import_peft
from lichen.models.adapters.wrap import Spec

__all__ = ["BARE", "PREFIX", "VIRTUAL", "has_peft_format", "low_rank_layers", "patches_by_layer", "save_adapter"]

PREFIX = "base_model.model."
"""What PEFT writes before the names of a model's layers."""
BARE = "base_model."
"""And before those of a model that it has put virtual tokens before."""
VIRTUAL = "prompt_embeddings"
"""What it calls virtual tokens."""


def has_peft_format(spec: Spec) -> bool:
    """Whether PEFT has such an adapter at all.

    >>> from lichen.models.adapters.bitfit import BitFit
    >>> has_peft_format(Prompt()), has_peft_format(BitFit())
    (True, False)
    """
    return isinstance(spec, Lora | IA3 | Prompt | Prefix)


def low_rank_layers(tree: Mapping[str, Tensor]) -> list[str]:
    """The layers with a low-rank adapter in a tree, sorted."""
    return sorted(name.removesuffix(".lora_A") for name in tree if name.endswith(".lora_A"))


def patches_by_layer(patch: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """By layer, then by kind; names may carry the ``patch.`` they have in a job."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in (patch or {}).items():
        path, _, kind = name.removeprefix("patch.").rpartition(".")
        if x.numel():
            found.setdefault(path, {})[kind] = x
    return found


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


def save_adapter(folder: Path, tree: Tree, *, spec: Spec, base_name: str, task: str, patch: Tree | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained`` reads.

    Args:
        folder: Where to; made if need be.
        tree: The run's trainable tensors without client axis.
        spec: What the run trained.
        base_name: Folder or hub id of the base model, for the config.
        task: ``"CAUSAL_LM"`` or ``"SEQ_CLS"``.
        patch: The run's patch, factored.

    Raises:
        LichenError: if PEFT has no such adapter, the tree has none, or the patch does not fit as more rank.
    """
    about: dict[str, Any] = {
        "task_type": task,
        "base_model_name_or_path": base_name,
        "modules_to_save": list(spec.heads) or None,
        "inference_mode": True,
    }
    if isinstance(spec, Lora):
        own, tensors, config = _low_rank(tree, spec, patches_by_layer(patch), about)
    elif isinstance(spec, IA3):
        own, tensors, config = _vectors(tree, spec, about)
    elif isinstance(spec, Prompt | Prefix):
        own, tensors, config = _virtual(tree, spec, about)
    else:
        raise LichenError(
            f"export of {type(spec).__name__} is not possible in PEFT's format",
            where="export",
            fix="use the tensors that the run has written",
        )
    begin = BARE if VIRTUAL in tensors else PREFIX
    tensors |= {begin + name: x for name, x in tree.items() if name not in own}
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_atomic(folder / "adapter_model.safetensors", save(plain, metadata={"format": "pt"}), shared=True)
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    write_atomic(folder / "adapter_config.json", text.encode(), shared=True)


_Written = tuple[set[str], Tree, dict[str, Any]]
"""Names taken from the tree, PEFT's tensors, PEFT's configuration."""


def _low_rank(tree: Tree, spec: Lora, patches: dict[str, dict[str, Tensor]], about: dict[str, Any]) -> _Written:
    import_peft()
    from peft import LoraConfig

    # A layer that nobody trains any more lives on in its patch alone.
    alone = {p for p in patches if isinstance(spec.targets, str) or fits(p, spec.targets)}
    layers = sorted({*low_rank_layers(tree), *alone})
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
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = A_ri, B_or
    # Ends of names would fit layers that are not adapted, too.
    whole = isinstance(spec.targets, str) or spec.last is not None
    names = layers if whole else sorted(spec.targets)
    config: Any = LoraConfig(
        **about,
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        use_rslora=spec.rslora,
        target_modules=names,
        rank_pattern=ranks,
        alpha_pattern={path: spec.scale * (r**0.5 if spec.rslora else r) for path, r in ranks.items()},
    )
    own = {f"{path}.lora_{x}" for path in layers for x in "AB"}
    return own, tensors, config.to_dict() | {"target_modules": names}


def _vectors(tree: Tree, spec: IA3, about: dict[str, Any]) -> _Written:
    import_peft()
    from peft import IA3Config

    own = {name for name in tree if name.endswith(".ia3_l")}
    if not own:
        raise LichenError("there is no IA3 vector to write", where="export", fix="name targets")
    layers = sorted(name.removesuffix(".ia3_l") for name in own)
    inputs = [path for path in layers if fits(path, spec.feedforward)]
    # PEFT lays the vector as a row where it scales inputs, and as a column where it scales outputs.
    tensors = {
        f"{PREFIX}{path}.ia3_l": tree[f"{path}.ia3_l"].view((1, -1) if path in inputs else (-1, 1)) for path in layers
    }
    config: Any = IA3Config(**about, target_modules=layers, feedforward_modules=inputs)
    return own, tensors, config.to_dict() | {"target_modules": layers, "feedforward_modules": inputs}


def _virtual(tree: Tree, spec: Prompt | Prefix, about: dict[str, Any]) -> _Written:
    import_peft()
    from peft import PrefixTuningConfig, PromptTuningConfig

    if isinstance(spec, Prompt):
        name = _only(tree, "prompt.tokens")
        x_mH = tree[name]
        # PEFT reads no more of a prompt, but asks some models in vain for the rest of what it calls its size.
        prompt: Any = PromptTuningConfig(
            **about,
            num_virtual_tokens=len(x_mH),
            token_dim=x_mH.shape[1],
            num_transformer_submodules=1,
            num_layers=1,
            num_attention_heads=1,
        )
        return {name}, {VIRTUAL: x_mH}, prompt.to_dict()
    names = _only(tree, "prefix.keys"), _only(tree, "prefix.values")
    layers, heads, tokens, wide = tree[names[0]].shape
    # PEFT's own order: token, layer, key or value, head.
    x_mL2kd = stack([tree[name].permute(2, 0, 1, 3) for name in names], dim=2)
    prefix: Any = PrefixTuningConfig(
        **about,
        num_virtual_tokens=tokens,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * wide,
        num_transformer_submodules=1,
    )
    return set(names), {VIRTUAL: x_mL2kd.reshape(tokens, -1)}, prefix.to_dict()


def _only(tree: Mapping[str, Tensor], end: str) -> str:
    found = [name for name in tree if fits(name, (end,))]
    if len(found) != 1:
        raise LichenError(f"there is no tensor {end} to write", where="export", fix="use the run's own tensors")
    return found[0]
