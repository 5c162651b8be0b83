"""Names of tensors and settings of each architecture in GGUF, in one table that is read both ways.

A row of the table is a module of transformers and its name in GGUF; ``{}`` stands for the number of the block. What
GGUF holds otherwise than transformers stands beside it: matrices that are transposed, and the queries and keys of
Llama, whose rotary halves are interleaved.

References:
    GGUF, the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    Jianlin Su, Murtadha Ahmed, Yu Lu, Shengfeng Pan, Wen Bo and Yunfeng Liu. "RoFormer: Enhanced transformer with
    Rotary Position Embedding." Neurocomputing 568, 2024. https://arxiv.org/abs/2104.09864

Legend: o out, i in, H heads, D half of a head's width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from lichen.core.errors import LichenError

__all__ = ["ARCHITECTURES", "Architecture", "Value", "architecture_of", "rope_factors", "settings_of"]

Value = str | bool | int | float | list[str] | list[int] | list[float]
"""What stands under a key of the file."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one architecture is written.

    Attributes:
        name: In GGUF.
        modules: Modules outside the blocks, by their name in transformers.
        blocks: Modules of a block, by the name they have there.
        transposed: Which of them transformers holds as (in, out).
        interleaved: Which hold queries or keys whose rotary halves GGUF interleaves, and the setting with their heads.
        settings: Keys of GGUF, without the architecture's name, by settings of transformers.
        fixed: Settings of transformers that llama.cpp takes for granted, and the values it knows.
    """

    name: str
    modules: Mapping[str, str]
    blocks: Mapping[str, str]
    transposed: Collection[str] = ()
    interleaved: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, ...]]

    def names(self, blocks: int) -> dict[str, str]:
        """Every module's name in GGUF by its name in transformers.

        Args:
            blocks: Blocks of the model.
        """
        inside = {one.format(i): other.format(i) for i in range(blocks) for one, other in self.blocks.items()}
        return {**self.modules, **inside}

    def to_gguf(self, module: str, x: np.ndarray, config: Any) -> np.ndarray:
        """A tensor of transformers as GGUF holds it.

        Args:
            module: The module's name in transformers.
            x: Its weight or bias.
            config: Of the model.
        """
        if x.ndim > 1 and self._has(self.transposed, module):
            return np.ascontiguousarray(x.T)
        heads = self._heads(module, config)
        return x if heads is None else _swapped(x, heads, 2, len(x) // heads // 2)

    def from_gguf(self, module: str, x: np.ndarray, config: Any) -> np.ndarray:
        """The inverse of :meth:`to_gguf`."""
        if x.ndim > 1 and self._has(self.transposed, module):
            return np.ascontiguousarray(x.T)
        heads = self._heads(module, config)
        return x if heads is None else _swapped(x, heads, len(x) // heads // 2, 2)

    def _has(self, ends: Collection[str], module: str) -> bool:
        return any(module.endswith(f".{end}") for end in ends)

    def _heads(self, module: str, config: Any) -> int | None:
        for end, setting in self.interleaved.items():
            if module.endswith(f".{end}"):
                return int(getattr(config, setting))
        return None


def _swapped(x: np.ndarray, heads: int, one: int, other: int) -> np.ndarray:
    """Rows of each head, seen as a table of two sides, in the order of its columns."""
    x_H12 = x.reshape(heads, one, other, *x.shape[1:])
    return np.ascontiguousarray(x_H12.swapaxes(1, 2)).reshape(x.shape)


_ROTARY_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROTARY_BLOCKS = {
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}
_ROTARY_SETTINGS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt2": Architecture(
        name="gpt2",
        modules={
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        blocks={
            "transformer.h.{}.ln_1": "blk.{}.attn_norm",
            "transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv",
            "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
            "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
            "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
            "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
        },
        transposed=("c_attn", "c_proj", "c_fc"),
        settings={
            "n_layer": "block_count",
            "n_positions": "context_length",
            "n_embd": "embedding_length",
            "n_head": "attention.head_count",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "llama": Architecture(
        name="llama",
        modules=_ROTARY_MODULES,
        blocks=_ROTARY_BLOCKS,
        interleaved={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
        settings=_ROTARY_SETTINGS,
        fixed={"hidden_act": ("silu", "swish")},
    ),
    "qwen2": Architecture(
        name="qwen2",
        modules=_ROTARY_MODULES,
        blocks=_ROTARY_BLOCKS,
        settings=_ROTARY_SETTINGS,
        fixed={"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)},
    ),
}
"""By ``model_type`` of transformers."""

_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Scalings of rotary positions that are written here, and what each may set."""


def architecture_of(config: Any) -> Architecture:
    """How a model of this configuration is written.

    Raises:
        LichenError: if its architecture is not in the table, or it sets what llama.cpp does otherwise.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise LichenError(
            f"models of architecture {config.model_type!r} are not written as GGUF here",
            where="--gguf",
            fix=f"use --merge; as GGUF there are {', '.join(sorted(ARCHITECTURES))}",
        )
    for setting, known in found.fixed.items():
        value = getattr(config, setting, known[0])
        if value not in known:
            raise LichenError(
                f"llama.cpp runs no {config.model_type} with {setting}={value!r}", where="--gguf", fix="use --merge"
            )
    if config.model_type != "gpt2":
        _require_rope(config)
    return found


def _require_rope(config: Any) -> None:
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    rope.pop("rope_theta", None)
    extra = sorted(key for key in rope if key not in _ROPE.get(kind, ()) and rope[key] is not None)
    if kind not in _ROPE or extra:
        raise LichenError(
            f"positions scaled by {kind}{f' with {extra[0]}' if extra else ''} are not written as GGUF here",
            where="--gguf",
            fix=f"use --merge; as GGUF there are {', '.join(_ROPE)}",
        )


def settings_of(config: Any) -> dict[str, Value]:
    """What llama.cpp must know of a model, under GGUF's keys.

    Args:
        config: Its configuration.

    Raises:
        LichenError: as :func:`architecture_of`.
    """
    found = architecture_of(config)
    out: dict[str, Value] = {"general.architecture": found.name}
    for setting, key in found.settings.items():
        out[f"{found.name}.{key}"] = getattr(config, setting)
    if config.model_type == "gpt2":
        out["gpt2.feed_forward_length"] = int(config.n_inner or 4 * config.n_embd)
        return out
    rope = config.rope_parameters
    out[f"{found.name}.rope.freq_base"] = float(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        out[f"{found.name}.rope.scaling.type"] = kind
        out[f"{found.name}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        whole = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        out[f"{found.name}.rope.scaling.original_context_length"] = int(whole)
    width = _head_width(config)
    if config.model_type == "llama" or width * config.num_attention_heads != config.hidden_size:
        out[f"{found.name}.attention.key_length"] = out[f"{found.name}.attention.value_length"] = width
        out[f"{found.name}.rope.dimension_count"] = width
    if config.model_type == "llama":
        out["llama.vocab_size"] = int(config.vocab_size)
    return out


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> np.ndarray | None:
    """What each rotary frequency is divided by, ``(D,)``, where a model scales them as Llama 3 does; else None.

    Frequencies whose wave is short against the original context stay, long ones are divided by the factor, and those
    between are divided by what lies between.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    width, theta = _head_width(config), float(rope["rope_theta"])
    wave_D = 2 * math.pi * theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    whole, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth_D = (whole / wave_D - low) / (high - low)
    between_D = 1 / ((1 - smooth_D) / factor + smooth_D)
    return np.where(wave_D < whole / high, 1.0, np.where(wave_D > whole / low, factor, between_D)).astype(np.float32)
