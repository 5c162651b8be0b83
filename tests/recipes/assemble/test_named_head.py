"""A base that classifies already keeps its head under its own names; what cannot be mapped is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.models.loading.named_head import in_base_order
from lichen.models.peft.merge import merge
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.model import spec_of
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from support.bare_checkpoints import FAMILIES, save_bare

NAMES = ("Mortgage", "Debt collection", "Card", "Account")
"""Not in the order of the alphabet."""


def _base(folder: Path, *names: str, classes: int = 4) -> Path:
    """A classifier with a head that somebody trained, its classes named or not."""
    import transformers as hf

    save_bare("bert", folder)
    config = hf.BertConfig(**FAMILIES["bert"][2], num_labels=classes)
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    torch.manual_seed(3)
    hf.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _recipe(home: Path, labels: tuple[str, ...], **model: Any) -> dict[str, Any]:
    rows = [
        {
            "client": f"shop-{i // len(labels) % 2}",
            "text": f"w{(7 * i) % 50 + 5} w{(3 * i) % 50 + 5}",
            "label": labels[i % len(labels)],
        }
        for i in range(24 * len(labels))
    ]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "name": "named",
        "task": "classify",
        "model": {"name": str(home / "base"), "adapter": {"rank": 2, "target_modules": ["query"]}, **model},
        "data": {"name": str(home / "rows.jsonl"), "max_length": 8},
        "federation": {"rounds": 1, "local_steps": 1, "batch_size": 4},
        "optimizer": {"lr": 0.01},
        "compare": {"baselines": []},
    }


def _answers(model: Any, tokenizer: Any) -> list[str]:
    texts = [f"w{a} w{b}" for a in range(5, 50, 6) for b in range(6, 50, 7)]
    with torch.no_grad():
        best = [int(model(**tokenizer(text, return_tensors="pt")).logits[0].argmax()) for text in texts]
    return [model.config.id2label[k] for k in best]


@pytest.mark.parametrize("labels", [NAMES, ("Card", "Mortgage")])
def test_the_base_and_the_merged_model_agree_on_every_text_before_training(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    import transformers as hf

    _base(tmp_path / "base", *NAMES)
    said: list[str] = []
    recipe = read_recipe(_recipe(tmp_path, labels))
    loaded = open_recipe(recipe, say=said.append)
    assert loaded.classes == NAMES  # all of them, so that the base answers as it did
    assert any("is kept, with its classes: Mortgage, Debt collection" in line for line in said)
    merged = merge(loaded.foundation, loaded.experiment.start.trainable, spec=spec_of(recipe, loaded.foundation))
    merged.config.id2label = dict(enumerate(loaded.classes))
    bare = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    answers = _answers(bare, loaded.tokenizer)
    assert len(set(answers)) > 1
    assert _answers(merged, loaded.tokenizer) == answers


@pytest.mark.filterwarnings("ignore")
def test_a_run_keeps_the_bases_order_to_its_end(tmp_path: Path) -> None:
    import transformers as hf

    _base(tmp_path / "base", *NAMES)
    said: list[str] = []
    result = lichen.run(
        _recipe(tmp_path, ("card", "Mortgage", "debt  collection")), out=tmp_path / "a", say=said.append
    )
    order = ("Mortgage", "debt  collection", "card", "Account")
    assert any(line.endswith("in spite of case or blanks: card, debt  collection") for line in said)
    assert class_names(result.folder) == order
    merged = hf.AutoConfig.from_pretrained(lichen.export(result.folder, merge=True))
    assert merged.id2label == dict(enumerate(order))
    bare = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        best = int(bare(**tokenizer("w7 w30", return_tensors="pt")).logits[0].argmax())
    assert lichen.talk(result.folder).answer("w7 w30")[0].startswith(order[best])  # the bare model answers, too
    assert result.summary["columns"]["federated"] is not None


def test_what_the_base_does_not_know_is_refused_by_name_and_a_new_head_can_be_asked_for(tmp_path: Path) -> None:
    _base(tmp_path / "base", *NAMES)
    labels = ("Card", "Loan", "Mortgage")
    with pytest.raises(LichenError, match=r"knows the classes Mortgage, Debt collection.* and not 'Loan'") as caught:
        open_recipe(read_recipe(_recipe(tmp_path, labels)))
    assert "data.classes: [Card, Mortgage]" in str(caught.value)
    loaded = open_recipe(read_recipe(_recipe(tmp_path, labels, head="random")))
    assert loaded.classes == labels
    assert loaded.foundation.classifier.weight.shape == (3, 16)
    with pytest.raises(LichenError, match="the labels 'card' and 'Card' are both the base's 'Card'"):
        in_base_order(("card", "Card"), NAMES)


def test_a_head_without_names_is_never_kept_under_other_names(tmp_path: Path) -> None:
    _base(tmp_path / "base")
    said: list[str] = []
    loaded = open_recipe(read_recipe(_recipe(tmp_path, NAMES)), say=said.append)
    assert loaded.classes == tuple(sorted(NAMES))
    assert any("does not name its classes, and is drawn anew" in line for line in said)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "base" / "model.safetensors")["classifier.weight"]
    assert not torch.equal(loaded.foundation.classifier.weight, saved)
    # As if the files lacked it: the same bits.
    save_bare("bert", tmp_path / "base")
    bare = open_recipe(read_recipe(_recipe(tmp_path, NAMES)))
    assert torch.equal(loaded.foundation.classifier.weight, bare.foundation.classifier.weight)


def test_names_for_another_number_of_classes_name_nothing(tmp_path: Path) -> None:
    _base(tmp_path / "base", classes=5)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"id2label": dict(enumerate(NAMES)), "label2id": {name: k for k, name in enumerate(NAMES)}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    loaded = open_recipe(read_recipe(_recipe(tmp_path, NAMES)), say=said.append)
    assert loaded.classes == tuple(sorted(NAMES))
    assert any("does not name its classes, and is drawn anew" in line for line in said)


def test_names_without_a_head_say_nothing(tmp_path: Path) -> None:
    save_bare("bert", tmp_path / "base", id2label=dict(enumerate(NAMES)))
    labels = ("x", "y", "z")
    assert open_recipe(read_recipe(_recipe(tmp_path, labels))).classes == labels
