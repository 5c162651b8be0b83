"""Adapters in PEFT's own folder format: low-rank ones, IA3, prompts and prefixes.

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, cat, stack

from lichen.core.errors import LichenError
from lichen.core.store import write_atomic
from lichen.core.tree import Tree, check_same
from lichen.models.bitfit import BitFit
from lichen.models.bottleneck import Bottleneck
from lichen.models.ia3 import IA3
from lichen.models.lora import Lora, fits
from lichen.models.peft_config import read_config
from lichen.models.prefix_tuning import Prefix
from lichen.models.prompt import Prompt
from lichen.models.quantized import import_peft
from lichen.models.weights_file import read_tensors
from lichen.models.wrap import Spec

__all__ = ["has_peft_format", "load_adapter", "low_rank_layers", "patches_by_layer", "read_adapter", "save_adapter"]

_PREFIX = "base_model.model."
_BARE = "base_model."
"""What PEFT writes before the names of a model that it has put virtual tokens before."""
_VIRTUAL = "prompt_embeddings"


def has_peft_format(spec: Spec) -> bool:
    """Whether PEFT has such an adapter at all.

    >>> from lichen.models.bitfit import BitFit
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
    begin = _BARE if _VIRTUAL in tensors else _PREFIX
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
        tensors[f"{_PREFIX}{path}.lora_A.weight"], tensors[f"{_PREFIX}{path}.lora_B.weight"] = A_ri, B_or
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
        f"{_PREFIX}{path}.ia3_l": tree[f"{path}.ia3_l"].view((1, -1) if path in inputs else (-1, 1)) for path in layers
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
        return {name}, {_VIRTUAL: x_mH}, prompt.to_dict()
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
    return set(names), {_VIRTUAL: x_mL2kd.reshape(tokens, -1)}, prefix.to_dict()


def _only(tree: Mapping[str, Tensor], end: str) -> str:
    found = [name for name in tree if fits(name, (end,))]
    if len(found) != 1:
        raise LichenError(f"there is no tensor {end} to write", where="export", fix="use the run's own tensors")
    return found[0]


def read_adapter(folder: Path, *, spec: Spec | None = None, like: Iterable[str] = ()) -> tuple[Tree, dict[str, Any]]:
    """``(tree, config)`` of a folder written here or by PEFT: LoRA, IA3, prompt or prefix.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        spec: The run's adapter; the folder's must be of its kind.
        like: Names of the run's own tensors; virtual tokens are put under theirs.

    Returns:
        The tensors by the run's names; a vector of IA3 is a row where it scales inputs, else a column, as in PEFT.

    Raises:
        LichenError: if files are missing or damaged, the adapter asks for something that is not computed here, or
            is not of the kind of ``spec``.
    """
    where, like = str(folder), tuple(like)
    config = read_config(folder)
    file, kind = folder / "adapter_model.safetensors", config["peft_type"]
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        fix = "save it again with safe_serialization=True" if pickled else "give a folder that PEFT wrote"
        what = "the adapter is a pickle, which can run code when it is read" if pickled else f"there is no {file.name}"
        raise LichenError(what, where=where, fix=fix)
    raw = read_tensors(file, fix="write it again")
    if spec is not None and not isinstance(spec, _READ[kind]):
        ours, theirs = (next(name for name, of in _KEYS.items() if of is one) for one in (type(spec), _READ[kind]))
        raise LichenError(
            f"the adapter in {where} is of kind {theirs}, the run's is {ours}",
            where="model.adapter.kind",
            fix=f"set it to {theirs}",
        )
    tree: Tree = {}
    for name, x in raw.items():
        if name == _VIRTUAL:
            tree |= _read_virtual(x, config, like, where)
            continue
        begin = _BARE if _VIRTUAL in raw else _PREFIX
        if not name.startswith(begin):
            raise LichenError(
                f"tensor {name!r} does not begin with {begin!r}: PEFT would leave it out",
                where=where,
                fix="save the adapter with PEFT's save_pretrained",
            )
        short = name.removeprefix(begin)
        for side in ("lora_A", "lora_B"):
            short = short.removesuffix(".weight") if short.endswith(f".{side}.weight") else short
        tree[short] = x
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
    return tree, config


def load_adapter(folder: Path, *, like: Tree | None = None, spec: Spec | None = None) -> tuple[Tree, dict[str, Any]]:
    """``(tree, config)`` of an adapter that a run of exactly this shape has written.

    Args:
        folder: As :func:`read_adapter` takes it.
        like: The run's own start tensors; the adapter must have their names and shapes.
        spec: The run's adapter; the folder's must be of its kind.

    Raises:
        LichenError: as :func:`read_adapter`, or if a tensor is missing, unexpected or of another shape.
    """
    tree, config = read_adapter(folder, spec=spec, like=like or ())
    tree = {name: x.flatten() if name.endswith(".ia3_l") else x for name, x in tree.items()}
    if like is not None:
        check_same(tree, like, where=str(folder))
        tree = {name: x.to(like[name].dtype) for name, x in tree.items()}
    return tree, config


_READ: dict[str, type] = {"LORA": Lora, "IA3": IA3, "PROMPT_TUNING": Prompt, "PREFIX_TUNING": Prefix}
_KEYS: dict[str, type] = {"lora": Lora, "ia3": IA3, "prompt": Prompt, "prefix": Prefix}
_KEYS |= {"bottleneck": Bottleneck, "bitfit": BitFit}
"""What the recipe calls them."""


def _read_virtual(x: Tensor, config: Mapping[str, Any], like: Iterable[str], where: str) -> Tree:
    """PEFT's one tensor, under the names of ``like`` where they are given."""

    def full(end: str) -> str:
        return next((name for name in like if fits(name, (end,))), end)

    layers, heads, wide, count = (
        int(config.get(key) or 0) for key in ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")
    )
    prefix = config["peft_type"] == "PREFIX_TUNING"
    fits_config = x.dim() == 2 and len(x) == (count or len(x))
    if fits_config and prefix:
        fits_config = bool(layers and heads) and x.shape[1] == 2 * layers * (wide or x.shape[1] // (2 * layers))
        fits_config = fits_config and not x.shape[1] % (2 * layers * heads)
    elif fits_config:
        fits_config = x.shape[1] == (wide or x.shape[1])
    if not fits_config:
        sizes = f"num_virtual_tokens={count}, token_dim={wide}"
        sizes += f", num_layers={layers}, num_attention_heads={heads}" if prefix else ""
        raise LichenError(
            f"virtual tokens of shape {tuple(x.shape)} do not fit {sizes}", where=where, fix="save the adapter again"
        )
    if not prefix:
        return {full("prompt.tokens"): x}
    x_mL2kd = x.reshape(x.shape[0], layers, 2, heads, -1)
    return {
        full(f"prefix.{name}"): x_mL2kd[:, :, side].permute(1, 2, 0, 3).contiguous()
        for side, name in enumerate(("keys", "values"))
    }
