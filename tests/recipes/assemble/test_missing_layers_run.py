"""A run on a checkpoint without a classifier's own layers: it says so, and all ways out of it agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from support.bare_checkpoints import save_bare

TARGETS = {"distilbert": ["q_lin", "v_lin"], "bert": ["query", "value"], "t5": ["q", "v"]}


def _rows(file: Path) -> list[str]:
    texts = []
    lines = []
    for i in range(72):
        text = f"w{(7 * i) % 40 + 20} {('w10 w11', 'w12 w13', 'w14 w15')[i % 3]} w{(11 * i) % 40 + 20}"
        lines.append({"client": f"shop-{i % 2}", "text": text, "label": ("calm", "spam", "urgent")[i % 3]})
        texts.append(text)
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return texts


def _recipe(home: Path, family: str, **adapter: Any) -> dict[str, Any]:
    return {
        "name": "lacked",
        "task": "classify",
        "model": {"name": str(home / family), "adapter": {"rank": 2, "target_modules": TARGETS[family], **adapter}},
        "data": {"name": str(home / "rows.jsonl"), "max_length": 8},
        "federation": {"rounds": 3, "local_steps": 4, "batch_size": 6, "valid_every": 3},
        "optimizer": {"lr": 0.02},
        "compare": {"baselines": []},
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["distilbert", "t5"])
def test_adapter_merged_model_and_try_agree(tmp_path: Path, family: str) -> None:
    import transformers as hf
    from peft import PeftModel

    save_bare(family, tmp_path / family)
    texts, said = _rows(tmp_path / "rows.jsonl"), list[str]()
    result = lichen.run(_recipe(tmp_path, family), out=tmp_path / "run", say=said.append)
    lines = [line for line in said if "lack" in line]
    if family == "distilbert":
        assert len(lines) == 1
        assert "lack pre_classifier: drawn from the seed, trained like the head and saved" in lines[0]
    assert result.adapter is not None
    tokenizer = hf.AutoTokenizer.from_pretrained(result.adapter)
    auto = hf.AutoModelForSequenceClassification
    merged = auto.from_pretrained(lichen.export(result.folder, merge=True)).eval()
    torch.manual_seed(3)
    adapted = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / family, num_labels=3), result.adapter).eval()
    talker = lichen.talk(result.folder)
    for text in texts[:6]:
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            one, other = merged(**ids).logits[0], adapted(**ids).logits[0]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        best = int(one.argmax())
        assert talker.answer(text)[1].startswith(f"{merged.config.id2label[best]} {float(one.softmax(-1)[best]):.0%}")


def test_a_head_left_out_of_modules_to_save_is_trained_and_said(tmp_path: Path) -> None:
    save_bare("bert", tmp_path / "bert")
    _rows(tmp_path / "rows.jsonl")
    recipe, said = _recipe(tmp_path, "bert", modules_to_save=["embeddings.LayerNorm"]), list[str]()
    recipe["federation"] = {"rounds": 1, "local_steps": 1, "batch_size": 2}
    result = lichen.run(recipe, out=tmp_path / "run", say=said.append)
    assert any("trained whole beside modules_to_save" in line and line.endswith(": classifier") for line in said)
    about = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert about["modules_to_save"] == ["embeddings.LayerNorm", "classifier", "bert.pooler.dense"]


def test_a_text_that_holds_the_end_token_is_refused_where_the_model_reads_it(tmp_path: Path) -> None:
    save_bare("t5", tmp_path / "t5")
    _rows(tmp_path / "rows.jsonl")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"client": "shop-0", "text": "w20 </s> w21", "label": "calm"}))
    with pytest.raises(LichenError, match="end token"):
        lichen.run(_recipe(tmp_path, "t5"), out=tmp_path / "run")


def test_t5_is_trained_whole_and_takes_no_prompt(tmp_path: Path) -> None:
    save_bare("t5", tmp_path / "t5")
    _rows(tmp_path / "rows.jsonl")
    recipe = _recipe(tmp_path, "t5")
    recipe["federation"] = {"rounds": 1, "local_steps": 1, "batch_size": 4}
    recipe["model"]["adapter"] = {"kind": "full"}
    result = lichen.run(recipe, out=tmp_path / "run")
    assert result.summary["columns"]["federated"] is not None
    recipe["model"]["adapter"] = {"kind": "prompt", "tokens": 2}
    with pytest.raises(LichenError, match="a prompt stands before one stack of layers"):
        lichen.run(recipe, out=tmp_path / "other")
