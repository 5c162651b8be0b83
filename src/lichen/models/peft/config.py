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
from lichen.models.adapters.kind import MERGE_FIRST, NOTHING, AdapterKind, PeftFormat, kind_claiming, peft_types
from lichen.models.adapters.quantized import import_peft

__all__ = ["HONOURED", "IDLE", "left_out_by", "read_adapter_config"]

HONOURED = frozenset({"peft_type", "base_model_name_or_path", "modules_to_save"})
"""Fields whose meaning is computed for every kind, beside the kind's own."""

IDLE = frozenset({"task_type", "auto_mapping", "peft_version", "revision", "inference_mode"})
"""Fields that say nothing about what a finished adapter computes, of whatever kind."""

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


def read_adapter_config(
    folder: Path, kind: AdapterKind | None = None
) -> tuple[dict[str, Any], AdapterKind, PeftFormat]:
    """The configuration of an adapter that can be computed here, its kind, and that one's way into PEFT.

    Args:
        folder: Holds ``adapter_config.json``.
        kind: The run's; taken where the configuration is of this kind, too.

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
    if kind is None or kind.peft is None or not kind.peft.claims(config):
        kind = kind_claiming(config)
    if kind is None or kind.peft is None:
        raise LichenError(
            f"the adapter has peft_type={config['peft_type']!r}",
            where=where,
            fix=f"use one of {', '.join(peft_types())}",
        )
    for key, value in config.items():
        _check_field(kind.peft, key, value, where)
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if (layers is not None and isinstance(config.get("target_modules"), str)) or (pattern and layers is None):
        raise LichenError(
            "the adapter's layers_pattern goes with layers_to_transform, and both with a list of target_modules",
            where=where,
            fix="mend it there",
        )
    return config, kind, kind.peft


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


def _check_field(peft_format: PeftFormat, key: str, value: Any, where: str) -> None:
    """Refuse a field whose value is not computed here."""
    honoured = HONOURED | peft_format.honoured
    if key in peft_format.plain:
        allowed, fix = peft_format.plain[key]
        plain = value.lower() if isinstance(value, str) else value
        if plain not in allowed and not (allowed == NOTHING and not value):
            raise LichenError(
                f"the adapter has {key}={_short(value)}, which is not computed here", where=where, fix=fix
            )
    elif key in _SHAPES and key in honoured:
        if value is not None and not _has_shape(_SHAPES[key], value):
            raise LichenError(
                f"the adapter has {key}={_short(value)}, which is not {_SHAPES[key]}", where=where, fix="mend it there"
            )
    elif key not in honoured | IDLE | peft_format.idle and value and value != _default(peft_format, key):
        raise LichenError(
            f"the adapter has {key}={_short(value)}, a field that is not known here", where=where, fix=MERGE_FIRST
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


def _default(peft_format: PeftFormat, key: str) -> Any:
    """The value that the installed PEFT gives a field; None where it does not know it."""
    peft = import_peft()

    for field in dataclasses.fields(getattr(peft, peft_format.config)):
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
    requested = config.get("layers_to_transform")
    if requested is None or requested == []:
        return None
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    begins = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for begin in begins if (match := re.match(begin, path))), None)
    number = None if found is None else int(found.group(1))
    return None if number in ([requested] if isinstance(requested, int) else requested) else "layers_to_transform"
