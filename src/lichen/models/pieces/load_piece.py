"""Loads one piece of a model from a folder: its own tensors are read, and no others.

The structure of the whole is built without weights, cut, and what is left is filled from safetensors by name. So the
machine of a piece needs the memory of that piece, while it is loaded as well.

Legend: K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lichen.core.errors import LichenError
from lichen.models.loading.classifier import may_lack
from lichen.models.loading.dtypes import dtype_of
from lichen.models.loading.initial import draw_fresh
from lichen.models.loading.load import LOADING, frozen, read_config, refuse_missing
from lichen.models.loading.model_folder import check_weights, plainly
from lichen.models.loading.weights_file import refuse_not_finite
from lichen.models.pieces.carve import carve
from lichen.models.pieces.families import family_of

__all__ = ["load_piece", "skeleton"]

_WHOLE = "fetch or save the folder again, whole"

Reader = Callable[[Path, str], Tensor]
"""From a file and the name of a tensor to that tensor."""


@final
class _WithoutWeights(TorchFunctionMode):
    """Inside, memory that nobody has written yet is not asked for: weights have a shape and no place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is torch.empty:
            named["device"] = "meta"
        return func(*args, **named)


def skeleton(source: str | Path, *, classes: int | None = None, dtype: str | torch.dtype = "float32") -> Any:
    """The structure of a whole model, frozen; no weight is read and none has a place in memory.

    Args:
        source: Folder or hub id.
        classes: K of a classifier; None: a language model.
        dtype: What its weights would be.

    Raises:
        LichenError: if the family has no pieces, or none for the task.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = read_config(source)
    if family_of(config).causal != (classes is None):
        raise LichenError(
            f"a {config.model_type} cannot be cut into pieces for this task",
            where="model.name",
            fix=f"use task: {'chat' if classes is not None else 'classify'}",
        )
    if classes is not None:
        config.num_labels, config.problem_type = classes, "single_label_classification"
    auto: Any = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
    with LOADING, torch.random.fork_rng(devices=[]), _WithoutWeights():
        made = auto.from_config(config, dtype=dtype_of(dtype), trust_remote_code=False, attn_implementation="sdpa")
    return made.requires_grad_(False).eval()


def load_piece(
    source: str | Path,
    start: int,
    stop: int,
    *,
    classes: int | None = None,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    read: Reader | None = None,
) -> Any:
    """Blocks ``start`` to ``stop`` of a saved model, as :func:`lichen.models.pieces.carve.carve` makes them.

    Args:
        source: Folder or hub id of a model in safetensors.
        start: The first block; 0: with the embeddings before it.
        stop: The block after the last; where there is none: with the norm and the head after it.
        classes: K of a classifier; None: a language model.
        seed: Seed of a head that the files lack, drawn as in :mod:`lichen.models.loading.classifier`.
        dtype: Of its weights.
        device: Where it lies.
        read: Reads one tensor; None: from the file, and nothing else of it.

    Returns:
        The frozen piece.

    Raises:
        LichenError: if the blocks are not there, the family has no pieces, or the files lack a tensor of theirs.
    """
    piece = carve(skeleton(source, classes=classes, dtype=dtype), start, stop)
    where = _files_of(source)
    lacking = set[str]()
    for name, parameter in list(piece.named_parameters(remove_duplicate=False)):
        found = _place(name, where, piece)
        layer = piece.get_submodule(name.rpartition(".")[0])
        if found is None:
            lacking.add(name)
            x = torch.empty(parameter.shape, dtype=parameter.dtype)
        else:
            file, key = found
            with plainly(f"cannot read {key} of {source}", where="model.name", fix=_WHOLE):
                x = (read or _read)(file, key).to(parameter.dtype)
            if x.shape != parameter.shape:
                raise LichenError(
                    f"{key} has shape {tuple(x.shape)}, and config.json says {tuple(parameter.shape)}",
                    where=str(source),
                    fix=_WHOLE,
                )
            refuse_not_finite([(name, x)], where=str(source), fix="fetch or save the weights again")
        layer.register_parameter(name.rpartition(".")[2], nn.Parameter(x, requires_grad=False))
    refuse_missing(lacking, source, allowed=lambda name: classes is not None and may_lack(piece, name))
    draw_fresh(piece, lacking, seed)
    bare = [name for name, x in piece.named_buffers() if x.is_meta]
    if bare:
        raise LichenError(f"{bare[0]} cannot be made without the whole model", where="model.name")
    return frozen(piece, device)


def _files_of(source: str | Path) -> dict[str, Path]:
    """Every tensor's name in the files, and its file."""
    folder = Path(str(source)).expanduser()
    if not folder.is_dir():
        folder = _fetched(str(source))
    return check_weights(folder)


def _fetched(source: str) -> Path:
    """The folder in which a hub's model lies."""
    from transformers.utils.hub import cached_file

    with plainly(f"cannot read a model at {source}", where="model.name", fix="give a folder with safetensors"):
        for name in ("model.safetensors", "model.safetensors.index.json"):
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                return Path(found).parent
    raise LichenError(f"{source} has no safetensors", where="model.name", fix="give a folder with safetensors")


def _place(name: str, where: Mapping[str, Path], piece: Any) -> tuple[Path, str] | None:
    """The file of a tensor and its name there: as it is, without or with what the base model's names begin with."""
    inside = f"{piece.base_model_prefix}."
    names = [name, name.removeprefix(inside), inside + name]
    if piece.config.get_text_config().tie_word_embeddings and name == "lm_head.weight":
        stem = family_of(piece.config).embeddings
        names = [f"{inside}{stem}.weight", f"{stem}.weight", *names]
    # Older files of BERT call a norm's weight and bias otherwise.
    names += [n[: -len("weight")] + "gamma" for n in names if n.endswith("LayerNorm.weight")]
    names += [n[: -len("bias")] + "beta" for n in names if n.endswith("LayerNorm.bias")]
    return next(((where[key], key) for key in names if key in where), None)


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as file_tensors:
        x: Tensor = file_tensors.get_tensor(key)
    return x
