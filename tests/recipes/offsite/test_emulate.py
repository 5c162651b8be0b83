"""How an emulator's middle is made: distilled and raised on public text, rounded; a stop changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast

from lichen.core.errors import LichenError
from lichen.models.loading.emulator_folder import Manifest, folder_tensors, read_manifest
from lichen.models.loading.load import load_causal
from lichen.models.offsite import training as training_module
from lichen.models.offsite.low_rank import low_rank
from lichen.models.offsite.training import Distil, measure, middle_tensors, train_middle
from lichen.recipes.offsite.emulate import Training, emulate
from support.tiny_llama import WORDS, save_model

ENDS = (2, 1)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``model`` of six blocks, public ``text.jsonl``, and an emulator of each kind."""
    top = tmp_path_factory.mktemp("emulate")
    save_model(top / "model", layers=6)
    lines = [json.dumps({"text": " ".join((WORDS * 8)[i * 7 : i * 7 + 70])}) for i in range(30)]
    (top / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made(top, "drop")
    made(top, "distil", training=public(top))
    made(top, "raised", training=public(top, margin=0.5))
    made(top, "low-rank", rank=3)
    return top


def public(top: Path, **more: Any) -> Training:
    return Training(**{"public": str(top / "text.jsonl"), "steps": 40, "rows": 4, "lr": 2e-3, **more})


def made(top: Path, how: str, *, out: Path | None = None, **more: Any) -> Manifest:
    return emulate(str(top / "model"), out=out or top / how, ends="2,1", layers=2, how=how, **more)


@pytest.mark.parametrize("how", ["distil", "raised", "low-rank"])
def test_nothing_but_the_middle_differs_from_what_is_dropped(there: Path, how: str) -> None:
    before, after = folder_tensors(there / "drop"), folder_tensors(there / how)
    assert before.keys() == after.keys()
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert changed
    assert {name.split(".")[2] for name in changed} == {"2", "3"}
    manifests = [read_manifest(there / one) for one in ("drop", how)]
    assert manifests[0].model_ends == manifests[1].model_ends
    assert manifests[0].emulator != manifests[1].emulator
    assert manifests[1].how == how
    assert not (there / f"{how}.part").exists()


def test_distillation_brings_hidden_states_nearer_and_says_so(there: Path) -> None:
    about = read_manifest(there / "distil").provenance
    assert about["after"]["distance"] < 0.7 * about["before"]["distance"]
    assert (about["model"], about["public"]) == ("model", "text.jsonl")
    assert str(there) not in (there / "distil" / "emulator.json").read_text()
    assert "margin" not in about
    model, emulator = (load_causal(there / name)[0] for name in ("model", "distil"))
    rows = [list(range(6, 46))]
    plan = Distil(goal="hidden", ends=ENDS, steps=1, rows=1, lr=1e-3, margin=1.0, seed=0, pad=0)
    # The distance by hand: after two ends and two blocks of the middle, and after five of six blocks.
    ids = torch.tensor(rows)
    with torch.no_grad():
        a = emulator(ids, output_hidden_states=True).hidden_states[4][0]
        b = model(ids, output_hidden_states=True).hidden_states[5][0]
        loss = torch.nn.functional.cross_entropy(emulator(ids).logits[0, :-1], ids[0, 1:])
    expected = ((a - b).square().sum(-1) / b.square().sum(-1)).mean()
    found = measure(model, emulator, rows, plan)
    assert found.distance == pytest.approx(float(expected), rel=1e-5)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


def test_a_raised_loss_lies_a_margin_above_the_model_s(there: Path) -> None:
    about = read_manifest(there / "raised").provenance
    before, after = (abs(about[x]["loss"] - about[x]["model_loss"] - 0.5) for x in ("before", "after"))
    assert after < before
    assert about["margin"] == 0.5


def test_attention_has_the_rank_that_was_named(there: Path) -> None:
    tensors, plain = folder_tensors(there / "low-rank"), folder_tensors(there / "drop")
    for name in ("self_attn.q_proj", "self_attn.o_proj"):
        x = tensors[f"model.layers.2.{name}.weight"]
        assert int(torch.linalg.matrix_rank(x.double(), rtol=1e-5)) == 3
        assert torch.equal(x, low_rank(plain[f"model.layers.2.{name}.weight"], 3))
    assert torch.equal(tensors["model.layers.2.mlp.up_proj.weight"], plain["model.layers.2.mlp.up_proj.weight"])


def test_a_stopped_distillation_goes_on_to_the_same_bytes(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, lines = there / "stopped", list[str]()
    monkeypatch.setattr(training_module, "_EVERY", 10)
    save, count = training_module.save_tree, iter(range(9))

    def killed(*inputs: Any) -> str:
        if next(count) == 2:
            raise KeyboardInterrupt
        return save(*inputs)

    monkeypatch.setattr(training_module, "save_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        made(there, "distil", out=out, training=public(there))
    assert not out.exists()
    monkeypatch.setattr(training_module, "save_tree", save)
    with pytest.raises(LichenError, match="other settings"):
        made(there, "distil", out=out, training=public(there, lr=1e-3))
    made(there, "distil", out=out, training=public(there), say=lines.append)
    assert "goes on from step 20" in lines
    for name in ("model.safetensors", "emulator.json"):
        assert (out / name).read_bytes() == (there / "distil" / name).read_bytes(), name


def test_the_ends_stay_frozen_and_the_gradients_go(there: Path, tmp_path: Path) -> None:
    model, emulator = (load_causal(there / name)[0] for name in ("model", "drop"))
    plan = Distil(goal="hidden", ends=ENDS, steps=2, rows=2, lr=1e-3, margin=1.0, seed=0, pad=0)
    before = {name: x.clone() for name, x in emulator.named_parameters()}
    train_middle(model, emulator, [list(range(6, 20)), list(range(9, 30))], plan, state=tmp_path / "state")
    middle = middle_tensors(emulator, ENDS)
    for name, x in emulator.named_parameters():
        assert torch.equal(x, before[name]) is (name not in middle), name
        assert not x.requires_grad


def test_an_encoder_is_distilled_and_not_raised(there: Path, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    how: dict[str, Any] = {"ends": "1,1", "layers": 1, "training": public(there, steps=20)}
    manifest = emulate(str(tmp_path / "bert"), out=tmp_path / "emu", how="distil", **how)
    assert manifest.provenance["after"]["distance"] < manifest.provenance["before"]["distance"]
    assert manifest.provenance["after"]["loss"] is None
    assert AutoModel.from_pretrained(tmp_path / "emu").config.num_hidden_layers == 3
    with pytest.raises(LichenError, match="no loss of its own"):
        emulate(str(tmp_path / "bert"), out=tmp_path / "raised", how="raised", **how)


def test_settings_that_do_nothing_are_refused(there: Path, tmp_path: Path) -> None:
    for how, more, where in (
        ("drop", {"training": public(there)}, "--public"),
        ("distil", {}, "--public"),
        ("drop", {"rank": 2}, "--rank"),
        ("low-rank", {"rank": 99}, "--rank"),
        ("distil", {"training": public(there, margin=2.0)}, "--margin"),
        ("other", {}, "--how"),
    ):
        with pytest.raises(LichenError) as error:
            made(there, how, out=tmp_path / "out", **more)
        assert error.value.where == where
        assert not (tmp_path / "out").exists()
    for name in ("steps", "rows", "lr", "margin", "seed"):
        with pytest.raises(LichenError, match="out of range"):
            public(there, **{name: -1})
