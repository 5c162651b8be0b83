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
from lichen.models.renamed import CACHE_NAMES, cache_argument, cache_of, takes_logits_to_keep

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
    assert takes_logits_to_keep(model), "without it all logits of a prompt are held"
    out = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)
    assert cache_of(out).get_seq_length() == 3
    assert cache_of(model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)) is None


def test_a_wrapped_model_is_asked_what_the_model_inside_takes() -> None:
    """PEFT's own forward does not name the argument, and passes it on."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    lora = LoraConfig(r=1, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM)
    wrapped = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=11, **small)).eval(), lora)
    assert takes_logits_to_keep(wrapped)
    assert wrapped(input_ids=torch.tensor([[1, 2, 3]]), logits_to_keep=1).logits.shape == (1, 1, 11)
    assert not takes_logits_to_keep(SimpleNamespace(forward=lambda input_ids: input_ids))


def test_a_model_without_a_cache_has_no_name_for_it() -> None:
    def forward(input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=input_ids)

    assert cache_argument(inspect.signature(forward)) is None
