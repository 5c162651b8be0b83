"""Answers scored after one look at the question have the scores of whole rows, each read alone."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from lichen.audit.answer_scores import answer_scores
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.wrap import wrap
from lichen.models.peft.merge import attach
from lichen.models.renamed import cache_name
from support.tiny_families import FAMILIES, made

QUESTION = [5, 17, 80, 3]
ANSWERS = [[7], [9, 11], [9, 12, 40], [13], [14, 15, 16, 2], [8, 8]]
CAUSAL = [name for name, family in FAMILIES.items() if family.task == "CAUSAL_LM"]


def alone(model: Any, answer: list[int]) -> float:
    """Slow and plain: the whole row, all logits, nothing kept from another call."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([QUESTION + answer]), use_cache=False).logits[0]
    logp_TV = logits_TV[-len(answer) - 1 : -1].log_softmax(-1)
    return float(logp_TV[range(len(answer)), answer].mean())


def same(model: Any) -> None:
    slow = [alone(model, answer) for answer in ANSWERS]
    assert max(slow) - min(slow) > 0.1
    for _ in range(2):  # nothing of a call is left behind
        torch.testing.assert_close(answer_scores(model, QUESTION, ANSWERS), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_of_any_architecture(name: str) -> None:
    same(made(name))


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix", "bare of prompt"])
def test_in_pefts_wrapper(kind: str) -> None:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    config: Any
    if kind == "lora":
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **common)
    elif kind == "prefix":
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, **common)
    else:
        config = peft.PromptTuningConfig(num_virtual_tokens=3, **common)
    model = peft.get_peft_model(copy.deepcopy(made("llama")), config).eval()
    assert (cache_name(model) is None) == (kind != "lora")
    bare = [alone(made("llama"), answer) for answer in ANSWERS]
    if kind == "bare of prompt":
        with model.disable_adapter():
            torch.testing.assert_close(answer_scores(model, QUESTION, ANSWERS), bare, rtol=1e-4, atol=1e-4)
        return
    same(model)
    assert max(abs(a - b) for a, b in zip(answer_scores(model, QUESTION, ANSWERS), bare, strict=True)) > 1e-3


@pytest.mark.parametrize("spec", [Prompt(tokens=3), Prefix(tokens=3)], ids=["prompt", "prefix"])
def test_behind_a_runs_own_virtual_tokens(spec: Any) -> None:
    start = wrap(made("llama"), spec).init(0)
    same(attach(made("llama"), start, spec=spec))
