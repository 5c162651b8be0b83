"""Real models and real data, cut to seconds: the gallery's ways through the house, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.data.sources.catalog import fetch_entry
from lichen.recipes.schema.read import read_recipe


def need(*names: str) -> None:
    """Fetch catalog entries, or skip where no registry can be reached."""
    for name in names:
        try:
            fetch_entry(name)
        except LichenError as error:
            pytest.skip(f"{name} cannot be fetched here: {error}")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two rounds of FedEx-LoRA on MiniLM over real reviews."""
    need("minilm-l6", "clothing-reviews")
    over = ["data.max_clients=4", "data.max_rows=60", "federation.rounds=2", "federation.clients_per_round=4"]
    over += [
        "data.max_length=32",
        "federation.local_steps=2",
        "compare.alone_epochs=1",
        "optimizer.lr=5e-3",
        "federation.aggregate=fedex",
        "compare.pooled_batch_size=16",
    ]
    recipe = read_recipe("reviews-lora", [*over, "federation.valid_every=1"])
    return lichen.run(recipe, out=tmp_path_factory.mktemp("reviews") / "run")


def test_a_real_run_gives_a_whole_folder(reviews: Any) -> None:
    names = {f.name for f in reviews.folder.iterdir()}
    assert {"recipe.yaml", "trace.jsonl", "summary.json", "curves.png", "clients.png", "adapter", "state"} <= names
    summary = json.loads((reviews.folder / "summary.json").read_text())
    assert summary == reviews.summary
    assert summary["clients"] == 4
    assert summary["columns"]["base"] is None
    assert all(0 <= summary["columns"][c]["mean"] <= 1 for c in ("alone", "federated", "pooled"))
    assert summary["bytes_up"] > 0 < summary["bytes_down"]


def test_fedex_moved_the_average_to_the_true_mean(reviews: Any) -> None:
    lines = [json.loads(line) for line in (reviews.folder / "trace.jsonl").read_text().splitlines()]
    rounds = [line["metrics"] for line in lines if line["column"] == "federated"]
    assert len(rounds) == 2
    assert all(metrics["deviation"] > 1e-4 for metrics in rounds)  # what plain averaging would have lost
    tree, _ = load_tree(reviews.folder / "state" / "final.safetensors")
    assert any(name.startswith("patch.") for name in tree)


def test_the_adapter_and_the_merged_model_answer_alike(reviews: Any, tmp_path: Path) -> None:
    merged = lichen.export(reviews.folder, merge=True, out=tmp_path / "merged")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("I love this dress, it fits perfectly.", return_tensors="pt")
    with torch.no_grad():
        expected = whole(**ids).logits
        base = transformers.AutoModelForSequenceClassification.from_pretrained(fetch_entry("minilm-l6"), num_labels=5)
        got = peft.PeftModel.from_pretrained(base, reviews.adapter).eval()(**ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert whole.config.id2label[0] == "1"


def test_one_shot_equals_pooled_under_every_partition(tmp_path: Path) -> None:
    need("minilm-l6", "clothing-reviews")
    over = ["data.max_clients=4", "data.max_rows=60", "data.max_length=32", "compare.partitions=10"]
    result = lichen.run(read_recipe("reviews-oneshot", over), out=tmp_path / "run")
    extra, columns = result.summary["extra"], result.summary["columns"]
    assert extra["partitions.identical"] == extra["partitions"] == 10
    assert columns["federated"] == columns["pooled"]
    assert columns["federated"]["mean"] > result.summary["extra_columns"]["majority"]["mean"]
    bare, mine = lichen.talk(result.folder).answer("This is the worst shirt I ever bought, it fell apart.")
    assert "no head" in bare
    assert mine[0] in "12345"


def test_a_teacher_reached_by_answers_alone(tmp_path: Path) -> None:
    need("minilm-l6", "clothing-reviews")
    over = ["data.max_clients=6", "data.public.labelled=300", "data.public.unlabelled=200", "federation.rounds=2"]
    over += ["federation.clients_per_round=6", "optimizer.lr=3e-3", "federation.valid_every=2", "data.test_rows=8"]
    over += ["data.max_length=48", "compare.alone_epochs=1"]
    result = lichen.run(read_recipe("reviews-teacher", over), out=tmp_path / "run")
    extra = result.summary["extra"]
    assert result.summary["columns"]["base"]["mean"] > result.summary["extra_columns"]["majority"]["mean"]
    assert {"without", "majority", "alone_best"} == set(result.summary["extra_columns"])
    assert extra["answers"] == 200
    # 200 texts went to the teacher; three classes of one byte and three halves each came back.
    assert 200 * 9 < extra["answers.bytes_from_teacher"] < 200 * 9 + 2000
    assert extra["answers.bytes_to_teacher"] > 200 * 50
    bare, mine = lichen.talk(result.folder).answer("This is the worst shirt I ever bought, it fell apart.")
    assert bare.startswith("(none")
    assert mine[0] in "12345"


def test_a_student_follows_a_teachers_layers_before_the_first_round(tmp_path: Path) -> None:
    need("minilm-l6", "clothing-reviews")
    over = ["data.max_clients=3", "data.public.labelled=100", "data.public.unlabelled=60", "federation.rounds=1"]
    over += [
        "federation.clients_per_round=3",
        "federation.local_steps=1",
        "optimizer.lr=1e-3",
        "data.test_rows=8",
        "data.max_length=32",
    ]
    over += ["compare.baselines=[no_help]", "model.student={kind: transformer, width: 16}", "teacher.at=server"]
    both = {}
    for name, layers in (("answers", "{}"), ("layers", "{1: 3, 2: 6}")):
        more = [f"teacher.layers={layers}", "teacher.server_steps=6"]
        both[name] = lichen.run(read_recipe("reviews-teacher", [*over, *more]), out=tmp_path / name)
    first, second = (load_tree(run.folder / "state" / "scores" / "distilled.safetensors")[0] for run in both.values())
    assert first.keys() == second.keys(), "the projections are left behind"
    assert not torch.equal(first["layer0.qkv.weight"], second["layer0.qkv.weight"])
    assert both["answers"].summary["extra_columns"]["without"] == both["layers"].summary["extra_columns"]["without"]
