"""The user's own rows and model folder, from one file to an adapter that other tools load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.present.summary import read_summary
from support.tiny_llama import WORDS, recipe, save_model, save_rows

Shape = Literal["pair", "messages", "label"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_model(folder / "model")
    for shape in ("pair", "messages", "label"):
        save_rows(folder / f"{shape}.jsonl", shape)
    return folder


def run(home: Path, out: Path, shape: Shape = "pair", **more: Any) -> lichen.Result:
    return lichen.run(recipe(home / "model", home / f"{shape}.jsonl", shape, **more), out=out)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 7, 9, 20, 11, 2], [1, 30, 31, 8, 8, 12]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def three(home: Path, result: lichen.Result, kind: str, **more: Any) -> tuple[torch.Tensor, ...]:
    """Logits of the bare model, of PEFT with the run's adapter (bare where it has none), and of the merged export."""
    import transformers as hf
    from peft import PeftModel

    auto = getattr(hf, kind)
    bare = auto.from_pretrained(home / "model", **more)
    before = logits(bare)
    adapted = before
    if result.adapter is not None:
        adapted = logits(PeftModel.from_pretrained(bare, result.adapter))
    merged = auto.from_pretrained(lichen.export(result.folder, merge=True, out=result.folder / "whole"))
    return before, adapted, logits(merged)


@pytest.mark.parametrize("shape", ["pair", "messages"])
def test_chat_rows_give_an_adapter_that_peft_reads_as_the_merged_model(
    home: Path, tmp_path: Path, shape: Shape
) -> None:
    result = run(home, tmp_path / "run", shape, compare={"baselines": ["base", "alone", "pooled"]})
    assert result.summary == read_summary(result.folder)
    assert result.summary["clients"] == 5
    columns = result.summary["columns"]
    assert columns["federated"]["mean"] < columns["base"]["mean"]
    assert columns["pooled"]["mean"] < columns["base"]["mean"]
    assert lichen.export(result.folder, merge=False) == result.adapter
    bare, adapted, merged = three(home, result, "AutoModelForCausalLM")
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    assert (merged - bare).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [1, 4])
def test_fedex_writes_its_patch_as_rank_while_it_fits_and_into_the_weights_after(
    home: Path, tmp_path: Path, rank: int
) -> None:
    adapter = {"target_modules": ["q_proj"], "rank": rank, "alpha": 2 * rank}
    federation = {"aggregate": "fedex", "rounds": 1, "local_steps": 3}
    result = run(home, tmp_path / "run", model={"name": str(home / "model"), "adapter": adapter}, federation=federation)
    tree, _ = load_tree(result.folder / "state" / "final.safetensors")
    assert any(name.startswith("patch.") for name in tree)
    bare, adapted, merged = three(home, result, "AutoModelForCausalLM")
    assert (merged - bare).abs().max() > 1e-2
    if rank == 1:
        config = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
        assert max(config["rank_pattern"].values()) > 1
        torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    else:
        assert result.adapter is None
        with pytest.raises(lichen.LichenError, match="use --merge"):
            lichen.export(result.folder, merge=False)


def test_a_classifier_of_the_users_labels(home: Path, tmp_path: Path) -> None:
    result = run(home, tmp_path / "run", "label", federation={"rounds": 2})
    assert result.summary["metric"] == "macro_f1"
    _, adapted, merged = three(home, result, "AutoModelForSequenceClassification", num_labels=3)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    about = json.loads((result.folder / "whole" / "config.json").read_text())
    assert sorted(about["label2id"]) == ["calm", "glad", "sad"]
    talker = lichen.talk(result.folder)
    assert talker.kind == "classify"
    assert talker.answer("w1 w2")[1].split()[0] in ("calm", "glad", "sad")


def test_a_run_starts_from_the_adapter_of_another(home: Path, tmp_path: Path) -> None:
    first = run(home, tmp_path / "first")
    adapter = {"target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4, "init_from": str(first.adapter)}
    again = {"model": {"name": str(home / "model"), "adapter": adapter}, "compare": {"baselines": ["base"]}}
    second = run(home, tmp_path / "second", **again)
    columns, before = second.summary["columns"], first.summary["columns"]["federated"]
    assert columns["base"] == before  # it stands where the first one ended
    assert columns["federated"]["mean"] < before["mean"]
    again["model"]["adapter"] = {**adapter, "rank": 4}  # type: ignore[index]
    with pytest.raises(lichen.LichenError, match=r"model\.adapter\.rank: .*has rank 2, the run 4\n.*set it to 2"):
        run(home, tmp_path / "third", **again)


def test_talking_to_it_gives_the_bare_models_words_and_its_own(home: Path, tmp_path: Path) -> None:
    result = run(home, tmp_path / "run", optimizer={"lr": [0.1]}, federation={"rounds": 4, "local_steps": 6})
    talker = lichen.talk(result.folder)
    assert talker.kind == "chat"
    before, after = talker.answer("w1 w2 w3")
    assert {*before.split(), *after.split()} <= {*WORDS, "<user>", "<assistant>"}
    assert before != after
    assert talker.answer("w1 w2 w3") == (before, after)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(lichen.LichenError):
        lichen.talk(tmp_path / "run")


def test_a_run_refused_before_training_leaves_its_folder_free(home: Path, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match=r"data\.min_rows"):
        run(home, tmp_path / "run", data={"name": str(home / "pair.jsonl"), "min_rows": 10_000})
    assert not (tmp_path / "run").exists()
    run(home, tmp_path / "run", compare={"baselines": []})
    with pytest.raises(LichenError, match="is not empty"):
        run(home, tmp_path / "run", compare={"baselines": []})
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_adapter_of_another_scale_is_refused(home: Path, tmp_path: Path) -> None:
    first = run(home, tmp_path / "first", compare={"baselines": []})
    config = json.loads((first.folder / "adapter" / "adapter_config.json").read_text())
    spec = {"targets": config["target_modules"], "rank": config["r"], "alpha": 3 * config["lora_alpha"]}
    model = {"name": str(home / "model"), "adapter": {**spec, "init_from": str(first.adapter)}}
    with pytest.raises(LichenError, match=r"model\.adapter\.alpha"):
        run(home, tmp_path / "second", model=model)
