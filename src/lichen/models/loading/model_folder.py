"""Checks a model folder before transformers reads it.

Folders come from anywhere: cut downloads, weights as pickles, an adapter in place of a model, a configuration that
wants code of its own to be run. Each is told in one sentence with its fix, and nothing in a folder is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.models.loading.weights_file import check_file

__all__ = ["check_config", "check_weights", "plainly"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WHOLE = "fetch or save the folder again, whole"


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a JSON file of a model folder.

    Raises:
        LichenError: if it cannot be read, is no JSON in UTF-8, or holds something else than named fields.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise LichenError(f"{file.name} cannot be read: {reason}", where=str(file.parent), fix=_WHOLE) from None
    if not isinstance(found, dict):
        raise LichenError(
            f"{file.name} holds a {type(found).__name__}, not named fields", where=str(file.parent), fix=_WHOLE
        )
    return found


def check_config(folder: Path) -> None:
    """Refuse a folder whose model cannot be known from its ``config.json`` without running code of its own.

    Raises:
        LichenError: naming what the folder is, or what it lacks.
    """
    where, adapter = str(folder), folder / "adapter_config.json"
    file = folder / "config.json"
    if adapter.is_file() and not file.is_file():
        base = read_json(adapter).get("base_model_name_or_path") or "its base"
        raise LichenError(
            "the folder holds an adapter, not a model",
            where=where,
            fix=f"give {base} as model.name, and this folder as model.adapter.init_from",
        )
    if adapter.is_file():
        raise LichenError(
            "the folder holds a model and an adapter, which would be put on it unasked",
            where=where,
            fix="move adapter_config.json and the adapter's weights to a folder of their own",
        )
    if not file.is_file():
        raise LichenError(
            f"cannot read a model there: no config.json among {_file_names(folder)}",
            where=where,
            fix="give the folder of a whole model, as save_pretrained writes it",
        )
    config = read_json(file)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise LichenError(
            f"config.json has model_type={kind!r}",
            where=where,
            fix='add the architecture there, as "model_type": "bert"',
        )
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise LichenError(
                f"config.json wants code of its own for model_type={kind!r} (auto_map), which is never run",
                where=where,
                fix="give a model that the installed transformers knows, or a newer transformers",
            )
        raise LichenError(
            f"the installed transformers has no model_type {kind!r}",
            where=where,
            fix="update transformers, or give another model",
        )


def _file_names(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        return "no files at all"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def check_weights(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a folder; refused if weights are missing, pickled, or damaged.

    Raises:
        LichenError: naming the file.
    """
    where, single = str(folder), folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(check_file(single, fix=_WHOLE), single)
    if index.is_file():
        return _check_shards(folder, index)
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise LichenError(
            f"the weights are called {others[0]}, not model.safetensors", where=where, fix="rename the file"
        )
    if any(folder.glob("*.gguf")):
        raise LichenError(
            "the weights are quantised (GGUF)", where=where, fix="give a folder with nothing but the .gguf file"
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickled:
        raise LichenError(
            f"cannot load the weights: {pickled[0]} is a pickle, which can run code when it is read",
            where=where,
            fix="where you trust it, load it with transformers and save_pretrained() it, which writes safetensors",
        )
    raise LichenError(
        f"cannot load the weights: no model.safetensors among {_file_names(folder)}", where=where, fix=_WHOLE
    )


def _check_shards(folder: Path, index: Path) -> dict[str, Path]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise LichenError(f"{index.name} has no weight_map", where=str(folder), fix=_WHOLE)
    tensors_in: dict[str, set[str]] = {}
    for name in sorted(set(parts.values())):
        file = folder / name
        if Path(name).name != name:
            raise LichenError(f"{index.name} names {name!r}, outside the folder", where=str(folder), fix=_WHOLE)
        if not file.is_file():
            raise LichenError(f"{name} is missing, which {index.name} names", where=str(folder), fix=_WHOLE)
        tensors_in[name] = set(check_file(file, fix=_WHOLE))
    for tensor, name in parts.items():
        if tensor not in tensors_in[name]:
            raise LichenError(f"{name} lacks {tensor!r}, which {index.name} names", where=str(folder), fix=_WHOLE)
    return {tensor: folder / name for tensor, name in parts.items()}


@contextmanager
def plainly(what: str, *, where: str, fix: str) -> Iterator[None]:
    """Tell whatever a library raises on a foreign folder in one sentence.

    Libraries raise anything there, down to bare ``Exception``; only what is about the machine goes through.

    Args:
        what: What could not be done.
        where: The file or key that errors name.
        fix: What the reader can do.

    Raises:
        LichenError: in place of any other exception.
    """
    try:
        yield
    except (LichenError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        if "trust_remote_code" in str(error):
            raise LichenError(
                f"{what}: it wants code of its own (auto_map), which is never run",
                where=where,
                fix="give a model that the installed transformers knows, or a newer transformers",
            ) from None
        lines = [" ".join(line.split()) for line in str(error).strip().split("\n")]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:  # the library's own words are about a switch of its own
            reason = "config.json and the weights differ in their sizes"
        reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
        raise LichenError(f"{what}: {reason}", where=where, fix=fix) from None
