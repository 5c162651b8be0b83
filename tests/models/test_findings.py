"""What was found of a model is remembered for just that model, and a lost or spoiled memory finds it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lichen.core.tree import digest
from lichen.models import cohort as cohorts
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.findings import behind
from lichen.models.objectives import NextToken
from lichen.recipes.assemble.loaded_model import remembered

ADAPTER = Lora(targets=("q_proj",), rank=2)


def _llama(*, seed: int = 0, **more: Any) -> Any:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **more)
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every pass through a model that looks for something."""
    made: list[str] = []
    for name in ("why_not_packed", "prove_independent"):
        real = getattr(cohorts, name)
        monkeypatch.setattr(cohorts, name, lambda one, name=name, real=real: [made.append(name), real(one)][1])
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    return made


def _made(model: Any = None, adapter: Lora = ADAPTER, **more: Any) -> CausalCohort:
    base = model if model is not None else _llama()
    return CausalCohort(base, adapter=adapter, name="x", recall=remembered, **{"reference": False, **more})


def test_a_model_is_looked_at_once(searches: list[str]) -> None:
    first, again = _made(), _made()
    assert searches == ["why_not_packed", "prove_independent"]
    assert [(one.plain, one.packed, one.alone, one.reference) for one in (first, again)] == [
        (True, True, None, False)
    ] * 2
    fresh = CausalCohort(_llama(), adapter=ADAPTER, name="x", reference=False)
    assert (fresh.plain, fresh.packed, fresh.alone) == (again.plain, again.packed, again.alone)
    ids_CBT = torch.arange(1, 13).view(2, 1, 6)
    batch = {
        "active_C": torch.ones(2, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": torch.ones_like(ids_CBT),
        "labels_CBT": ids_CBT,
    }
    params_C = {name: x.expand(2, *x.shape) for name, x in first.init(0).items()}
    losses = [one.loss(params_C, {}, batch)[0] for one in (first, again, fresh)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    "other",
    [
        {"model": lambda: _llama(seed=1)},
        {"model": lambda: _llama(rope_theta=5e3)},
        {"model": lambda: _llama().double()},
        {"adapter": replace(ADAPTER, rank=3)},
        {"adapter": replace(ADAPTER, rslora=True)},
        {"packed": False},
    ],
    ids=["weights", "config", "dtype", "rank", "scale", "not packed"],
)
def test_another_model_is_looked_at_anew(searches: list[str], other: dict[str, Any]) -> None:
    _made()
    before = len(searches)
    _made(**{name: value() if name == "model" else value for name, value in other.items()})
    assert len(searches) > before


def test_what_is_damaged_is_found_again(searches: list[str], tmp_path: Path) -> None:
    _made()
    (file,) = (tmp_path / "cache" / "findings").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    spoiled = bytearray(file.read_bytes())
    spoiled[-3] ^= 1
    file.write_bytes(spoiled)
    assert _made().packed
    assert len(searches) == 4


def test_an_objective_of_another_package_is_never_remembered() -> None:
    class Foreign:
        classes = None

    model = _llama()
    base = digest(dict(model.named_parameters()))
    assert behind(model, base, objective=NextToken())
    assert behind(model, base, objective=Foreign()) == ()  # type: ignore[arg-type]
