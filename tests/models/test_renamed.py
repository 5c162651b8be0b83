"""Every name of transformers and PEFT that the house uses exists in the versions installed here."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lichen
from lichen.models.renamed import CACHE_NAMES, cache_argument, cache_of

SOURCE = Path(lichen.__file__).parent
LIBRARIES = ("transformers", "peft", "accelerate", "safetensors", "gguf")


@functools.cache
def imported_names() -> list[tuple[str, str]]:
    """``(module, name)`` of every ``from library import name`` in the package."""
    found = set()
    texts = [file.read_text(encoding="utf-8") for file in SOURCE.rglob("*.py")]
    for text in texts:
        if not any(f"from {library}" in text for library in LIBRARIES):
            continue  # every worker collects this, and to parse the whole package took it seconds
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                found |= {(str(node.module), alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported_names())
def test_every_name_we_import_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_the_walk_sees_the_imports() -> None:
    assert ("transformers", "AutoConfig") in imported_names()
    assert len(imported_names()) > 20


@pytest.mark.parametrize(
    "name", ["LlamaModel", "Qwen2Model", "GPT2Model", "BertModel", "MistralModel", "OPTModel", "GPTNeoXModel"]
)
def test_every_model_takes_its_cache_under_a_name_we_know(name: str) -> None:
    import transformers

    assert cache_argument(inspect.signature(getattr(transformers, name).forward)) in CACHE_NAMES


def test_a_models_output_carries_its_cache_under_a_name_we_know() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **small)).eval()
    known = inspect.signature(model.forward).parameters
    assert "logits_to_keep" in known, "without it all logits of a prompt are held"
    out = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)
    assert cache_of(out).get_seq_length() == 3
    assert cache_of(model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)) is None


def test_a_model_without_a_cache_has_no_name_for_it() -> None:
    def forward(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=input_ids)

    assert cache_argument(inspect.signature(forward)) is None
