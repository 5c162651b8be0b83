"""What was trained on an emulator goes into the model; an emulator that nobody has trained gives the model back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.models.loading.emulator_folder import EMULATOR
from lichen.recipes.offsite.emulate import emulate
from lichen.recipes.offsite.plug import PLUGGED, plug
from support.tiny_llama import recipe, save_model, save_rows

FAST: dict[str, Any] = {"federation": {"rounds": 1}}
LORA = {"target_modules": ["q_proj", "up_proj"], "rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``model`` of six blocks, its emulator ``emu`` (ends 2 and 1), an ``other`` model, rows, and runs on ``emu``."""
    top = tmp_path_factory.mktemp("offsite")
    save_model(top / "model", layers=6)
    save_model(top / "other", layers=6, seed=1)
    save_rows(top / "rows.jsonl", "pair")
    save_rows(top / "labels.jsonl", "label")
    emulate(str(top / "model"), out=top / "emu", ends="2,1", layers=2)
    emulate(str(top / "model"), out=top / "emu3", ends="2,1", layers=3)
    rows = top / "rows.jsonl"
    lichen.run(recipe(top / "emu", rows, "pair", model={"adapter": LORA}, **FAST), out=top / "lora")
    lichen.run(recipe(top / "emu", rows, "pair", model={"adapter": {"kind": "full"}}, **FAST), out=top / "full")
    label = recipe(top / "emu", top / "labels.jsonl", "label", model={"adapter": LORA}, **FAST)
    lichen.run(label, out=top / "label")
    return top


def ids() -> torch.Tensor:
    return torch.randint(6, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def test_an_untouched_emulator_gives_the_model_s_bytes(there: Path, tmp_path: Path) -> None:
    plug(there / "emu", str(there / "model"), out=tmp_path / "new")
    for file in (there / "model").iterdir():
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {one.name for one in (tmp_path / "new").iterdir()} == {
        *(one.name for one in (there / "model").iterdir()),
        PLUGGED,
    }


def by_hand(there: Path, adapter: dict[str, torch.Tensor]) -> Any:
    """The whole model with each factor pair added to the layer that its block is: 0, 1 and, for the emulator's 4, 5."""
    model = AutoModelForCausalLM.from_pretrained(there / "model")
    with torch.no_grad():
        for name, A in adapter.items():
            if "lora_A" not in name:
                continue
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            parts = path.split(".")
            parts[2] = {"0": "0", "1": "1", "4": "5"}[parts[2]]
            B = adapter[name.replace("lora_A", "lora_B")]
            model.get_parameter(f"{'.'.join(parts)}.weight").add_(2.0 * B @ A)
    return model


def test_ends_trained_on_the_emulator_equal_a_reference_made_by_hand(there: Path, tmp_path: Path) -> None:
    adapter = load_file(there / "lora" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 3 * 2 * 2
    assert any(bool(x.any()) for name, x in adapter.items() if "lora_B" in name)
    expected = by_hand(there, adapter)(ids()).logits
    plug(there / "lora", str(there / "model"), out=tmp_path / "new")
    bare = AutoModelForCausalLM.from_pretrained(there / "model")
    with torch.no_grad():
        before = bare(ids()).logits
        found = PeftModel.from_pretrained(bare, str(tmp_path / "new")).eval()(ids()).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float((found - before).abs().max()) > 1e-3
    # From the adapter's folder alone, merged: two parties exchange no more than that.
    plug(there / "lora" / "adapter", str(there / "model"), out=tmp_path / "merged", emulator=there / "emu", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids()).logits, expected, atol=2e-5, rtol=1e-5)
    assert not (tmp_path / "merged" / "adapter").exists()


def test_weights_that_were_trained_land_in_the_model_s_ends(there: Path, tmp_path: Path) -> None:
    trained = load_file(there / "full" / "model" / "model.safetensors")
    assert {name.split(".")[2] for name in trained} == {"0", "1", "4"}
    plug(there / "full", str(there / "model"), out=tmp_path / "new")
    before, after = (load_file(folder / "model.safetensors") for folder in (there / "model", tmp_path / "new"))
    moved = {name.replace("layers.4.", "layers.5."): x for name, x in trained.items()}
    assert before.keys() == after.keys()
    for name, x in after.items():
        assert torch.equal(x, moved.get(name, before[name])), name
    assert any(not torch.equal(after[name], before[name]) for name in moved)
    AutoModelForCausalLM.from_pretrained(tmp_path / "new")


def test_a_classifier_comes_back_with_its_head_and_classes(there: Path, tmp_path: Path) -> None:
    plug(there / "label", str(there / "model"), out=tmp_path / "new", merge=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    head = load_file(there / "label" / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.score.weight, head)
    assert model.config.id2label == {0: "calm", 1: "glad", 2: "sad"}


def test_an_adapter_of_a_run_names_its_layers_in_full(there: Path) -> None:
    config = json.loads((there / "lora" / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 6
    assert "model.layers.4.mlp.up_proj" in config["target_modules"]
    manifests = [there / "emu", there / "lora" / "adapter", there / "full" / "model"]
    assert len({(folder / EMULATOR).read_bytes() for folder in manifests}) == 1


def test_what_does_not_belong_together_is_refused(there: Path, tmp_path: Path) -> None:
    other, model = str(there / "other"), str(there / "model")
    with pytest.raises(LichenError, match="another model") as error:
        plug(there / "lora", other, out=tmp_path / "new")
    assert "--into" in error.value.where
    with pytest.raises(LichenError, match="another emulator"):
        plug(there / "lora", model, out=tmp_path / "new", emulator=there / "emu3")
    with pytest.raises(LichenError, match="not trained on an emulator"):
        plug(there / "other", model, out=tmp_path / "new")
    with pytest.raises(LichenError, match="is an emulator itself"):
        plug(there / "lora", str(there / "emu"), out=tmp_path / "new")
    with pytest.raises(LichenError, match="no such folder"):
        plug(there / "nowhere", model, out=tmp_path / "new")
    with pytest.raises(LichenError, match="not empty"):
        plug(there / "lora", model, out=there / "other")
    assert not (tmp_path / "new").exists()


def test_an_adapter_with_layers_of_the_middle_is_refused(there: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for file in (there / "lora" / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.4", "layers.3"): x for name, x in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(LichenError, match="middle of the emulator"):
        plug(tmp_path, str(there / "model"), out=tmp_path / "new")


def test_a_recipe_that_names_the_middle_is_refused_with_key_and_fix(there: Path, tmp_path: Path) -> None:
    for adapter, where in (
        ({**LORA, "target_modules": ["layers.3.mlp.up_proj"]}, "adapter.target_modules"),
        ({**LORA, "last": 2}, "model.adapter.last"),
        ({"kind": "prefix"}, "model.adapter.kind"),
    ):
        with pytest.raises(LichenError) as error:
            lichen.run(
                recipe(there / "emu", there / "rows.jsonl", "pair", model={"adapter": adapter}, **FAST),
                out=tmp_path / "run",
            )
        assert error.value.where == where
    for more, where in ({"layers": 2}, "model.layers"), ({"random": True}, "model.random"):
        page = recipe(there / "emu", there / "rows.jsonl", "pair", model={**more, "adapter": LORA}, **FAST)
        with pytest.raises(LichenError) as error:
            lichen.run(page, out=tmp_path / "run")
        assert error.value.where == where


def test_both_commands_work_from_the_command_line(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "emu"
    model = str(there / "model")
    assert cli.main(["emulate", model, "--ends", "2,1", "--layers", "2", "--out", str(out)]) == 0
    assert (out / EMULATOR).read_text() == (there / "emu" / EMULATOR).read_text()
    assert cli.main(["plug", str(there / "lora"), "--into", model, "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "new")]
    assert cli.main(["emulate", model, "--ends", "2;1", "--out", str(tmp_path / "x")]) == 2
    assert "--ends" in capsys.readouterr().err
