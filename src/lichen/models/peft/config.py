"""Reads PEFT's ``adapter_config.json``: every field is honoured, without effect, or refused by name.

A field is *honoured* where what it says is computed, *idle* where it says nothing about the function of a
finished adapter (how it was trained, what it began with), and otherwise only its plain value is taken: an adapter
that would compute something else here than in PEFT is refused, with what to do about it. A field that this table
does not know is refused too, unless it has its plain value.

References:
    Mangrulkar, Gugger, Debut, Belkada, Paul and Bossan (2022). PEFT: State-of-the-art
    Parameter-Efficient Fine-Tuning methods. https://github.com/huggingface/peft
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lichen.core.errors import LichenError
from lichen.models.adapters.quantized import import_peft

__all__ = ["HONOURED", "IDLE", "KINDS", "PLAIN", "alpha_of", "left_out_by", "rank_of", "read_config"]

KINDS = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING")
"""What of PEFT can be read, by ``peft_type``."""

_EVERY = {"peft_type", "base_model_name_or_path", "modules_to_save"}
_LAYERS = _EVERY | {"target_modules", "exclude_modules"}
_VIRTUAL = _EVERY | {"num_virtual_tokens", "token_dim"}

HONOURED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "LORA": frozenset(
            _LAYERS
            | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
            | {"layers_to_transform", "layers_pattern"}
        ),
        "IA3": frozenset(_LAYERS | {"feedforward_modules"}),
        "PROMPT_TUNING": frozenset(_VIRTUAL),
        "PREFIX_TUNING": frozenset(_VIRTUAL | {"num_attention_heads", "num_layers"}),
    }
)
"""Fields whose meaning is computed."""

_IDLE = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}

IDLE: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "LORA": frozenset(
            _IDLE
            # How it was trained; how weights lie in a layer; what other fields, which are refused, would read.
            | {"lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
            | {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}
        ),
        "IA3": frozenset(_IDLE | {"fan_in_fan_out", "init_ia3_weights"}),
        "PROMPT_TUNING": frozenset(
            _IDLE
            | {"num_attention_heads", "num_layers"}
            | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
        ),
        "PREFIX_TUNING": frozenset(_IDLE | {"encoder_hidden_size", "init_weights"}),
    }
)
"""Fields that say nothing about what a finished adapter computes."""

_MERGE = "merge it into its base (PEFT's merge_and_unload), and give the merged folder as model.name"
_CONVERT = (
    "it changed the base's own weights when it began: save it again with PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"
)
_OTHER = "train a plain adapter, or start without init_from"
_NONE: tuple[Any, ...] = (None, False)
_ONE = (None, 1)

PLAIN: Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]] = MappingProxyType(
    {
        "LORA": {
            "bias": (("none",), _MERGE),
            "use_dora": (_NONE, _MERGE),
            "lora_bias": (_NONE, _MERGE),
            "init_lora_weights": ((True, False, "gaussian", "orthogonal", "eva", "mica"), _CONVERT),
            "trainable_token_indices": (_NONE, _MERGE),
            "layer_replication": (_NONE, _OTHER),
            "megatron_config": (_NONE, _OTHER),
            "use_qalora": (_NONE, _OTHER),
            "alora_invocation_tokens": (_NONE, _OTHER),
            "velora_config": (_NONE, _OTHER),
            "monteclora_config": (_NONE, _OTHER),
            "target_parameters": (_NONE, _MERGE),
            "use_bdlora": (_NONE, _OTHER),
            "arrow_config": (_NONE, _OTHER),
            "kasa_config": (_NONE, _MERGE),
            "ensure_weight_tying": (_NONE, _MERGE),
        },
        "IA3": {},
        "PROMPT_TUNING": {"num_transformer_submodules": (_ONE, _OTHER)},
        "PREFIX_TUNING": {"num_transformer_submodules": (_ONE, _OTHER), "prefix_projection": (_NONE, _OTHER)},
    }
)
"""Fields of which only these values can be computed, and what to do about any other."""

_WHOLE, _REAL, _WORDS = "a whole number above 0", "a number", "a list of names, or one pattern"
_SHAPES: Mapping[str, str] = MappingProxyType(
    {
        "r": _WHOLE,
        "num_virtual_tokens": _WHOLE,
        "token_dim": _WHOLE,
        "num_attention_heads": _WHOLE,
        "num_layers": _WHOLE,
        "lora_alpha": _REAL,
        "use_rslora": "true or false",
        "target_modules": _WORDS,
        "exclude_modules": _WORDS,
        "feedforward_modules": _WORDS,
        "modules_to_save": "a list of names",
        "layers_pattern": _WORDS,
        "layers_to_transform": "a whole number, or a list of them",
        "rank_pattern": f"names with {_WHOLE} each",
        "alpha_pattern": f"names with {_REAL} each",
    }
)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter that can be computed here.

    Raises:
        LichenError: if there is none, it is damaged, or it asks for something that is not computed here.
    """
    where = str(folder)
    fix = "give a folder that PEFT wrote"
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _nothing_there(folder) from None
    except (ValueError, OSError, RecursionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise LichenError(f"the adapter is damaged: adapter_config.json: {reason}", where=where, fix=fix) from None
    if not isinstance(config, dict):
        raise LichenError("the adapter is damaged: adapter_config.json holds no fields", where=where, fix=fix)
    config.setdefault("peft_type", "LORA")
    kind = config["peft_type"]
    if kind not in KINDS:
        raise LichenError(f"the adapter has peft_type={kind!r}", where=where, fix=f"use one of {', '.join(KINDS)}")
    for key, value in config.items():
        _check_field(kind, key, value, where)
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if (layers is not None and isinstance(config.get("target_modules"), str)) or (pattern and layers is None):
        raise LichenError(
            "the adapter's layers_pattern goes with layers_to_transform, and both with a list of target_modules",
            where=where,
            fix="mend it there",
        )
    return dict(config)


def _nothing_there(folder: Path) -> LichenError:
    where = str(folder)
    if folder.is_file():
        return LichenError("an adapter is a folder, not a file", where=where, fix=f"give {folder.parent}")
    if not folder.is_dir():
        fix = "give an existing folder; an adapter of the hub is fetched first, with hf download ID --local-dir FOLDER"
        return LichenError("there is no adapter_config.json: the folder does not exist", where=where, fix=fix)
    # PEFT gives every named adapter, and a trainer every checkpoint, a folder inside.
    inside = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    what = "there is no adapter_config.json"
    if inside:
        what += f", but {len(inside)} of its folders have one"
        return LichenError(what, where=where, fix=f"give one of them, such as {inside[-1]}")
    return LichenError(what, where=where, fix="give a folder that PEFT wrote")


def _check_field(kind: str, key: str, value: Any, where: str) -> None:
    """Refuse a field whose value is not computed here."""
    if key in PLAIN[kind]:
        allowed, fix = PLAIN[kind][key]
        plain = value.lower() if isinstance(value, str) else value
        if plain not in allowed and not (allowed is _NONE and not value):
            raise LichenError(
                f"the adapter has {key}={_short(value)}, which is not computed here", where=where, fix=fix
            )
    elif key in _SHAPES and key in HONOURED[kind]:
        if value is not None and not _has_shape(_SHAPES[key], value):
            raise LichenError(
                f"the adapter has {key}={_short(value)}, which is not {_SHAPES[key]}", where=where, fix="mend it there"
            )
    elif key not in HONOURED[kind] | IDLE[kind] and value and value != _default(kind, key):
        raise LichenError(
            f"the adapter has {key}={_short(value)}, a field that is not known here", where=where, fix=_MERGE
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _has_shape(shape: str, value: Any) -> bool:
    def whole(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)

    def real(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < float("inf")

    def words(x: Any) -> bool:
        return isinstance(x, list) and all(isinstance(word, str) for word in x)

    if shape == _WHOLE:
        return whole(value) and value > 0
    if shape == _REAL:
        return real(value)
    if shape == "true or false":
        return isinstance(value, bool)
    if shape == "a list of names":
        return words(value)
    if shape == _WORDS:
        return words(value) or (isinstance(value, str) and _compiles(value))
    if shape.startswith("a whole number, or"):
        return whole(value) or (isinstance(value, list) and all(map(whole, value)))
    one = (lambda x: whole(x) and x > 0) if _WHOLE in shape else real
    return isinstance(value, dict) and all(_compiles(name) and one(x) for name, x in value.items())


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _default(kind: str, key: str) -> Any:
    """The value that the installed PEFT gives a field; None where it does not know it."""
    import_peft()
    import peft

    classes = {
        "LORA": peft.LoraConfig,
        "IA3": peft.IA3Config,
        "PROMPT_TUNING": peft.PromptTuningConfig,
        "PREFIX_TUNING": peft.PrefixTuningConfig,
    }
    for field in dataclasses.fields(classes[kind]):
        if field.name == key and field.default is not dataclasses.MISSING:
            return field.default
    return None


def _ends(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def left_out_by(config: Mapping[str, Any], path: str) -> str | None:
    """The field because of which PEFT does not adapt the layer ``path`` of its base; None if it does.

    >>> config = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]}
    >>> [left_out_by(config, f"model.layers.{i}.self_attn.{x}_proj") for i, x in ((0, "q"), (1, "q"), (1, "v"))]
    ['layers_to_transform', None, 'exclude_modules']
    """
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if excluded and (re.fullmatch(excluded, path) if isinstance(excluded, str) else _ends(path, excluded)):
        return "exclude_modules"
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in config.get("modules_to_save") or ()):
        return "modules_to_save"
    if isinstance(targets, str):
        fitting = targets.lower() == "all-linear" or re.fullmatch(targets, path) is not None
        return None if fitting else "target_modules"
    if path in (targets or ()):
        return None
    if not _ends(path, targets or ()):
        return "target_modules"
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return None
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    begins = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for begin in begins if (match := re.match(begin, path))), None)
    number = None if found is None else int(found.group(1))
    return None if number in ([wanted] if isinstance(wanted, int) else wanted) else "layers_to_transform"


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
