"""Loads a frozen sequence classifier; a head that its files lack is drawn from a seed.

Every node of a federation that loads the same folder with the same seed holds the same bytes.

Legend: K classes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lichen.core.errors import LichenError
from lichen.models.adapters.quantized import Kind
from lichen.models.adapters.whole_layers import note_lacked, output_layer
from lichen.models.loading.dtypes import dtype_of
from lichen.models.loading.initial import draw_fresh
from lichen.models.loading.load import frozen, read_config, read_weights, refuse_missing
from lichen.models.loading.tokenizer_folder import read_tokenizer

__all__ = ["load_classifier", "may_lack"]


def may_lack(model: Any, name: str) -> bool:
    """Whether a tensor of a classifier may be drawn: it lies outside the base model, or in its pooler."""
    return not name.startswith(f"{model.base_model_prefix}.") or "pooler" in name


def load_classifier(
    source: str | Path,
    *,
    classes: int,
    seed: int,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    quantized: Kind | None = None,
    layers: int | None = None,
    random: int | None = None,
    anew: bool = False,
) -> tuple[Any, Any]:
    """A frozen sequence classifier and its tokenizer; what its files lack is drawn from ``seed``.

    Which layers these are, :func:`lichen.models.adapters.whole_layers.lacked_layers` tells.

    Args:
        source: Folder or hub id.
        classes: K, at least 2.
        seed: Seed of a fresh head.
        dtype: As in :func:`load_causal`.
        device: Where it lies.
        quantized: Linear layers of its blocks in 8 or 4 bits (:mod:`lichen.models.adapters.quantized`); None: as they
            are.
        layers: Its first blocks alone, so many; None: all.
        random: Seed of weights drawn in place of the saved ones; None: the saved ones.
        anew: Draw the layer that gives the logits though the files hold one, as if they lacked it.

    Raises:
        LichenError: no such folder, no classifier of this architecture, tokenizer or pad token missing.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if classes < 2:
        raise LichenError(f"{classes} classes", where="classes", fix="a classifier needs at least 2")
    config = read_config(source)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise LichenError(
            f"{source} is a {config.model_type}, which has no classifier",
            where="model.name",
            fix="give an encoder such as BERT or MiniLM, or a causal model that transformers can classify with",
        )
    config.num_labels = classes
    config.problem_type = "single_label_classification"
    model, info = read_weights(
        AutoModelForSequenceClassification,
        source,
        config,
        dtype_of(dtype),
        quantized,
        layers=layers,
        random=random,
        ignore_mismatched_sizes=True,
    )
    fresh = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    refuse_missing(fresh, source, allowed=partial(may_lack, model))
    last = output_layer(model)
    head = random is None and last != "" and f"{last}.weight" not in info["missing_keys"]
    fresh |= {f"{last}.weight", f"{last}.bias"} if anew else set()
    draw_fresh(model, fresh, seed)
    note_lacked(model, fresh, head=head)
    tokenizer = read_tokenizer(source, model)
    model.config.pad_token_id = tokenizer.pad_token_id
    return frozen(model, device), tokenizer
