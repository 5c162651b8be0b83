"""Writes adapters in PEFT's own folder format, as far as PEFT has such adapters.

What is written of a kind is its own object's to say (:class:`lichen.models.adapters.kind.PeftFormat`); layers trained
whole are written beside it.

References:
    Mangrulkar, Gugger, Debut, Belkada, Paul and Bossan (2022). PEFT: State-of-the-art
    Parameter-Efficient Fine-Tuning methods. https://github.com/huggingface/peft
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.tree import Tree
from lichen.models.adapters.kind import BEFORE_LAYERS, BEFORE_VIRTUAL, VIRTUAL, Spec
from lichen.models.adapters.quantized import import_peft

__all__ = ["has_peft_format", "patches_by_layer", "save_adapter"]


def has_peft_format(spec: Spec) -> bool:
    """Whether PEFT has such an adapter at all.

    >>> from lichen.models.adapters.bitfit import BitFit
    >>> from lichen.models.adapters.prompt import Prompt
    >>> has_peft_format(Prompt()), has_peft_format(BitFit())
    (True, False)
    """
    return spec.kind.peft is not None


def patches_by_layer(patch: Mapping[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
    """By layer, then by kind; names may carry the ``patch.`` they have in a job."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in (patch or {}).items():
        path, _, kind = name.removeprefix("patch.").rpartition(".")
        if x.numel():
            found.setdefault(path, {})[kind] = x
    return found


def save_adapter(
    folder: Path,
    tree: Tree,
    *,
    spec: Spec,
    base_name: str,
    task: str,
    patch: Tree | None = None,
    full_names: bool = False,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained`` reads.

    Args:
        folder: Where to; made if need be.
        tree: The run's trainable tensors without client axis.
        spec: What the run trained.
        base_name: Folder or hub id of the base model, for the config.
        task: ``"CAUSAL_LM"`` or ``"SEQ_CLS"``.
        patch: The run's patch, factored.
        full_names: Name every adapted layer in full, where ends of names would fit layers that are not adapted.

    Raises:
        LichenError: if PEFT has no such adapter, the tree has none, or the patch does not fit as more rank.
    """
    peft_format = spec.kind.peft
    if peft_format is None:
        raise LichenError(
            f"export of {type(spec).__name__} is not possible in PEFT's format",
            where="export",
            fix="use the tensors that the run has written",
        )
    written = peft_format.write(tree, spec, patches_by_layer(patch))
    fields = dict(written.fields)
    if full_names and "target_modules" in fields:
        fields["target_modules"] = sorted({name.rpartition(".")[0] for name in written.own})
    about: dict[str, Any] = {
        "task_type": task,
        "base_model_name_or_path": base_name,
        "modules_to_save": list(spec.heads) or None,
        "inference_mode": True,
        **fields,
    }
    peft = import_peft()

    config = getattr(peft, peft_format.config)(**about)
    begin = BEFORE_VIRTUAL if VIRTUAL in written.tensors else BEFORE_LAYERS
    tensors = written.tensors | {begin + name: x for name, x in tree.items() if name not in written.own}
    plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_atomic(folder / "adapter_model.safetensors", save(plain, metadata={"format": "pt"}), shared=True)
    # PEFT makes sets of lists of names, whose order is no run's own.
    text = json.dumps(config.to_dict() | fields, indent=2, sort_keys=True, default=str)
    write_atomic(folder / "adapter_config.json", text.encode(), shared=True)
