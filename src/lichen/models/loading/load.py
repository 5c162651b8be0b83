"""Loads frozen transformers models from a local folder or a hub id: safetensors, no remote code.

Classifiers have a file of their own (:mod:`lichen.models.loading.classifier`). Every node of a federation that loads
the same folder holds the same bytes, also where only the first layers are taken, or all weights are drawn anew from a
seed (:mod:`lichen.models.loading.initial`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lichen.core.errors import LichenError
from lichen.core.tree import digest
from lichen.models.adapters.ends.end_blocks import blocks_of, note_ends
from lichen.models.adapters.quantized import Kind, quantize
from lichen.models.loading.dtypes import dtype_of
from lichen.models.loading.emulator_folder import EMULATOR, is_emulator, read_manifest, require_untouched
from lichen.models.loading.initial import draw_fresh, first_layers, redraw
from lichen.models.loading.model_folder import check_config, check_weights, plainly
from lichen.models.loading.tokenizer_folder import read_tokenizer
from lichen.models.loading.weights_file import refuse_not_finite

__all__ = [
    "LOADING",
    "base_digest",
    "can_write",
    "causal_tokenizer",
    "frozen",
    "frozen_eval",
    "load_causal",
    "load_encoder",
    "read_config",
    "read_weights",
    "refuse_missing",
]


def frozen_eval(model: nn.Module) -> None:
    """Refuse a model that is not frozen or not in evaluation mode (its dropout would be on).

    Raises:
        LichenError: naming what is off.
    """
    if model.training or any(layer.training for layer in model.modules()):
        raise LichenError("the base model is in training mode", where="model", fix="call model.eval()")
    if any(x.requires_grad for x in model.parameters()):
        raise LichenError("the base model is not frozen", where="model", fix="call model.requires_grad_(False)")


def base_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights, each tensor once (64 hex digits)."""
    persistent = model.state_dict(keep_vars=True).keys()
    return digest({k: x for k, x in chain(model.named_parameters(), model.named_buffers()) if k in persistent})


def read_config(source: str | Path) -> Any:
    """A model's configuration.

    Raises:
        LichenError: if there is none at this folder or hub id.
    """
    from transformers import AutoConfig

    text = str(source)
    folder = Path(text).expanduser()
    looks_local = isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_local and not folder.is_dir():
        raise LichenError(f"no such folder: {text}", where="model.name", fix="give a model folder, or a hub id")
    if folder.is_dir():
        check_config(folder)
    fix = "give a folder with config.json and safetensors, or a hub id that can be reached"
    with plainly(f"cannot read a model at {text}", where="model.name", fix=fix):
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else text, trust_remote_code=False)
    # A folder converted from GGUF says it is quantised, though its tensors are plain by now.
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    if str(getattr(method, "value", method)) == "gguf":
        del config.quantization_config
    return config


LOADING = threading.Lock()
"""Transformers changes itself and torch while it loads, for the whole process: two threads would spoil each other's."""


def read_weights(
    auto: Any,
    source: str | Path,
    config: Any,
    dtype: torch.dtype,
    quantized: Kind | None = None,
    *,
    layers: int | None = None,
    random: int | None = None,
    **more: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model and what its files lacked; sdpa attention where the architecture has it.

    Args:
        auto: One of transformers' ``AutoModel`` classes.
        source: Folder or hub id.
        config: From :func:`read_config`.
        dtype: Of its weights.
        quantized: As in :func:`load_causal`, and so ``layers`` and ``random``.
        layers: Its first blocks alone.
        random: Seed of weights drawn in place of the saved ones.
        more: What else ``from_pretrained`` is given.

    Raises:
        LichenError: if weights are missing, damaged or not finite, or an emulator was changed.
    """
    folder = Path(str(source)).expanduser()
    place = folder if folder.is_dir() else str(source)

    def read(**attention: Any) -> Any:
        # Layers the files lack are drawn from torch's global generator; leave it as it was.
        with LOADING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if random is not None:
                model = redraw(auto.from_config(config, dtype=dtype, trust_remote_code=False, **attention), random)
                inside = "" if model.base_model is model else f"{model.base_model_prefix}."
                outside = {name for name, _ in model.named_parameters() if not name.startswith(inside)}
                draw_fresh(model, outside, random)
                return model, {"missing_keys": outside, "mismatched_keys": ()}
            return auto.from_pretrained(
                place,
                config=config,
                # What is quantised is read as its files hold it: half as large as float32, as a rule.
                dtype=dtype if quantized is None else "auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **attention,
                **more,
            )

    if random is None and folder.is_dir():
        check_weights(folder)
    manifest = read_manifest(folder) if is_emulator(folder) else None
    if manifest is not None:
        for key, value in (("model.layers", layers), ("model.random", random)):
            if value is not None:
                raise LichenError(
                    "an emulator is trained as it was handed out, or its ends fit into no model",
                    where=key,
                    fix="leave it out",
                )
        require_untouched(folder, manifest)
    fix = "the folder must hold .safetensors files of this architecture"
    with plainly(f"cannot load the weights of {source}", where="model.name", fix=fix):
        try:
            model, info = read(attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product" not in str(error) and "sdpa" not in str(error):
                raise
            model, info = read()
    if random is None:
        every = chain(model.named_parameters(), model.named_buffers())
        refuse_not_finite(every, where=str(source), fix="fetch or save the weights again")
    model = model if layers is None else first_layers(model, layers)
    if manifest is not None:
        if (blocks := len(blocks_of(model))) != manifest.blocks:
            what = f"has {blocks} blocks, and its {EMULATOR} speaks of {manifest.blocks}"
            raise LichenError(what, where=str(source), fix="get the emulator again from the model's owner")
        note_ends(model, manifest.ends)
    return (model if quantized is None else quantize(model, quantized, dtype=dtype)), info


def refuse_missing(missing: Iterable[str], source: str | Path, *, allowed: Callable[[str], bool]) -> None:
    """Refuse a model whose files lack a tensor that may not be drawn.

    Args:
        missing: Names of what they lack.
        source: Folder or hub id.
        allowed: Whether a tensor of this name may be drawn.

    Raises:
        LichenError: naming the first that may not.
    """
    lacking = sorted(name for name in missing if not allowed(name))
    if lacking:
        raise LichenError(
            f"{source} lacks weights such as {lacking[0]!r}",
            where="model.name",
            fix="it was saved for another task or architecture; give the folder of a whole model",
        )


def frozen(model: Any, device: str | torch.device) -> Any:
    """The model on a device, in evaluation mode, none of its weights to be trained; changed in place."""
    return model.requires_grad_(False).eval().to(device)


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not both_ways


def can_write(source: str | Path) -> bool:
    """Whether a model is a causal language model, by its configuration; raises as :func:`read_config`."""
    return _is_causal(read_config(source))


def _causal_config(source: str | Path) -> Any:
    """The configuration of a causal language model.

    Raises:
        LichenError: if there is none, or it is of another kind of model.
    """
    config = read_config(source)
    if not _is_causal(config):
        raise LichenError(
            f"{source} is a {config.model_type}, not a causal language model",
            where="model.name",
            fix="use it for task: classify, or give a model such as Llama, Qwen2 or GPT-2",
        )
    return config


def causal_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a causal language model, as :func:`load_causal` gives it; no weights are read.

    Args:
        source: Folder or hub id.

    Raises:
        LichenError: as :func:`load_causal`, where no weights are at fault.
    """
    from transformers import AutoModelForCausalLM

    config = _causal_config(source)
    fix = "give a folder with a config.json of this version's"
    with plainly(f"cannot read a model at {source}", where="model.name", fix=fix), LOADING, torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        shapes = auto.from_config(config, trust_remote_code=False)
    return read_tokenizer(source, shapes)


def load_causal(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    quantized: Kind | None = None,
    layers: int | None = None,
    random: int | None = None,
) -> tuple[Any, Any]:
    """A frozen causal language model and its tokenizer, whose pad token may be its end token.

    Args:
        source: Folder or hub id.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"float64"``.
        device: Where it lies.
        quantized: Linear layers of its blocks in 8 or 4 bits (:mod:`lichen.models.adapters.quantized`); None: as they
            are.
        layers: Its first blocks alone, so many; None: all.
        random: Seed of weights drawn in place of the saved ones; None: the saved ones.

    Raises:
        LichenError: no such folder, not a causal model, weights or tokenizer missing.
    """
    from transformers import AutoModelForCausalLM

    config = _causal_config(source)
    model, info = read_weights(
        AutoModelForCausalLM, source, config, dtype_of(dtype), quantized, layers=layers, random=random
    )
    if random is None:
        # An output layer that is the embedding is no layer of its own; any other would be drawn, and nobody trains it.
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        refuse_missing(info["missing_keys"], source, allowed=lambda name: tied and "lm_head" in name)
    return frozen(model, device), read_tokenizer(source, model)


def load_encoder(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    quantized: Kind | None = None,
    layers: int | None = None,
    random: int | None = None,
) -> tuple[Any, Any]:
    """A frozen encoder (its hidden states) and its tokenizer.

    Args:
        source: Folder or hub id.
        dtype: As in :func:`load_causal`.
        device: Where it lies.
        quantized: Linear layers of its blocks in 8 or 4 bits (:mod:`lichen.models.adapters.quantized`); None: as they
            are.
        layers: Its first blocks alone, so many; None: all.
        random: Seed of weights drawn in place of the saved ones; None: the saved ones.

    Raises:
        LichenError: no such folder, weights, tokenizer or pad token missing.
    """
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = read_config(source)
    both = bool(getattr(config, "is_encoder_decoder", False))
    if both and type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        raise LichenError(
            f"{source} is a {config.model_type}, whose encoder does not stand alone",
            where="model.name",
            fix="give an encoder such as BERT, MiniLM or T5",
        )
    auto = AutoModelForTextEncoding if both else AutoModel
    model, info = read_weights(auto, source, config, dtype_of(dtype), quantized, layers=layers, random=random)
    refuse_missing(info["missing_keys"], source, allowed=lambda name: "pooler" in name)
    return frozen(model, device), read_tokenizer(source, model)
