"""A run folder, and the adapter in it, name their classes without a row of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.assemble.class_names import class_names
from support.tiny_llama import recipe, save_model, save_rows

NAMES = ("calm", "glad", "sad")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    save_model(folder / "model")
    save_rows(folder / "label.jsonl", "label")
    save_rows(folder / "pair.jsonl", "pair")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_loads_elsewhere_with_the_names_of_its_classes(home: Path, tmp_path: Path) -> None:
    import transformers as hf
    from peft import AutoPeftModelForSequenceClassification as AutoPeft

    one_round = {"rounds": 1, "local_steps": 1}
    result = lichen.run(recipe(home / "model", home / "label.jsonl", "label", federation=one_round), out=tmp_path / "a")
    assert result.adapter is not None
    assert class_names(result.folder) == NAMES
    names = json.loads((result.adapter / "classes.json").read_text())
    about = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    for auto in (AutoPeft, hf.AutoModelForSequenceClassification):
        assert auto.from_pretrained(result.adapter, **about).config.id2label == {0: "calm", 1: "glad", 2: "sad"}
    # With a config.json beside it, transformers takes the folder for a whole model and looks for its weights.
    assert not (result.adapter / "config.json").exists()


def test_a_language_model_has_no_classes(home: Path, tmp_path: Path) -> None:
    federation = {"rounds": 1, "local_steps": 1}
    result = lichen.run(recipe(home / "model", home / "pair.jsonl", "pair", federation=federation), out=tmp_path / "a")
    assert class_names(result.folder) == ()
    assert not (result.folder / "classes.json").exists()


def test_students_and_heads_in_one_round_name_them_in_their_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"classes": list(NAMES), "encoder": "e"}))
    assert class_names(tmp_path) == NAMES
    (tmp_path / "classes.json").write_text('["a"')
    with pytest.raises(LichenError, match="holds no list of class names"):
        class_names(tmp_path)
