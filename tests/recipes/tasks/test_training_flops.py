"""The operations of a run's training, by weights and tokens, beside those of the base where they are published."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import lichen
from lichen.data.sources.entries import CATALOG
from lichen.models.arithmetic import arithmetic_of
from lichen.present.charts.card_terms import compute_text
from lichen.present.trace import read_trace
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.training_flops import compute_of
from support.tiny_llama import recipe, save_model, save_rows

SUMMARY: dict[str, Any] = {
    "compute": {"training_flops": {"federated": 3e12, "alone": 9e20}, "base_flops": 9e20, "base_source": "a page"}
}


def test_a_run_counts_the_tokens_of_all_its_rates_by_the_weights_they_pass(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", "pair")
    made = recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", federation={"rounds": 2, "local_steps": 1})
    made |= {"optimizer": {"lr": [0.01, 0.02]}, "compare": {"baselines": ["alone"]}}
    run = lichen.run(made, out=tmp_path / "run").folder
    summary = json.loads((run / "summary.json").read_text())
    compute = summary["compute"]
    assert (set(compute["training_flops"]), compute["base_flops"]) == ({"federated", "alone"}, None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = arithmetic_of(model, {})
    tokens = sum(event.report.tokens for event in read_trace(run) if event.column == "federated")
    least = 4 * tokens * (weights.token + weights.label)
    assert least < compute["training_flops"]["federated"] < 1.5 * least
    assert "not known" in (run / "adapter" / "README.md").read_text()
    whole = {f"{name}.weight": layer.weight for name, layer in model.named_modules() if name.endswith("_proj")}
    trained = arithmetic_of(model, whole)
    assert (trained.token, trained.adapter) == (0, weights.token)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"name": "HuggingFaceTB/SmolLM2-135M-Instruct"}, True),
        ({"layers": 2}, False),
        ({"name": "minilm-l6"}, False),
    ],
)
def test_a_base_has_a_number_where_one_is_published_and_it_is_whole(changes: dict[str, Any], known: bool) -> None:
    demo = read_recipe("chat-demo")
    whole = demo.model_copy(update={"model": demo.model.model_copy(update=changes)})
    found = compute_of(whole, Nothing(), {}, {}, {}, ())
    assert found is not None
    assert found["base_flops"] == (6 * 134.5e6 * 2e12 if known else None)
    assert bool(found["base_source"]) == known
    assert all(entry.trained_source for entry in CATALOG.values() if entry.trained_flops)
    assert compute_of(whole, None, {}, {}, {}, ()) is None


def test_a_card_tells_a_third_of_the_bases_and_no_more() -> None:
    text = compute_text(SUMMARY)
    assert "about 3e+12 floating-point operations" in text
    assert "A third of those of the base's own training is 3e+20; this is 1e-08 of it." in text
    assert "estimate" in text
    assert "a page" in text
    assert "general-purpose AI" in text
    unknown = {"compute": {**SUMMARY["compute"], "base_flops": None, "base_source": ""}}
    assert "own training: not known." in compute_text(unknown)
    assert compute_text({}) == compute_text({"compute": None}) == ""


class Nothing(nn.Module):
    """A model without layers."""

    @property
    def config(self) -> Any:
        text = SimpleNamespace(num_attention_heads=0, num_hidden_layers=0)
        return SimpleNamespace(get_text_config=lambda: text)
