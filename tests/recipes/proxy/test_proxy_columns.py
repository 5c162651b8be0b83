"""The columns ``big`` and ``proxy``: by hand from exported models; the same however a run went; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lichen
from lichen.core.errors import LichenError
from lichen.models.loading.load import load_causal
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.plan.plan import plan
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.open_server import needs_rows
from support import bare_checkpoints
from support.tiny_llama import WORDS, recipe, save_model, save_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proxy")
    save_model(folder / "model")
    save_model(folder / "large", seed=5)
    save_rows(folder / "rows.jsonl", "pair")
    return folder


def made(home: Path, rounds: int = 2, **more: Any) -> dict[str, Any]:
    more = {"compare": {"baselines": ["base"], "proxy": str(home / "large"), **more.pop("compare", {})}, **more}
    return recipe(home / "model", home / "rows.jsonl", "pair", federation={"rounds": rounds}, **more)


def perplexities(home: Path, run: Path) -> tuple[list[float], list[float]]:
    """Of every client's test rows, under the sum of logits and under the large model: three models of transformers."""
    merged = lichen.export(run, merge=True)
    models = [load_causal(folder)[0] for folder in (home / "large", merged, home / "model")]
    z_N, big_N = [], []
    experiment = open_recipe(read_recipe(made(home))).experiment
    source = experiment.evaluating(experiment.clients.test)
    for client in range(len(experiment.clients.test)):
        z_sum = big_sum = count = 0.0
        for batch in source.batches((client,), 0):
            rows = (batch[f"{name}_CBT"][0] for name in ("input_ids", "attention_mask", "labels"))
            for ids, mask, labels in zip(*rows, strict=True):
                length = int(mask.sum())
                if not length:
                    continue
                label_T = labels[1:length]
                big, tuned, bare = (model(input_ids=ids[None, :length]).logits[0, :-1].double() for model in models)
                z_sum += float(functional.cross_entropy(big + tuned - bare, label_T, reduction="sum"))
                big_sum += float(functional.cross_entropy(big, label_T, reduction="sum"))
                count += int((label_T != -100).sum())
        z_N.append(z_sum / count)
        big_N.append(big_sum / count)
    return torch.tensor(z_N).exp().tolist(), torch.tensor(big_N).exp().tolist()


def test_both_columns_are_what_three_models_of_transformers_give(home: Path, tmp_path: Path) -> None:
    result = lichen.run(made(home), out=tmp_path / "run")
    proxy_N, big_N = perplexities(home, result.folder)
    found = result.summary["extra_columns"]
    assert found["proxy"]["mean"] == pytest.approx(sum(proxy_N) / len(proxy_N), rel=1e-4)
    assert found["big"]["mean"] == pytest.approx(sum(big_N) / len(big_N), rel=1e-4)
    lines = (result.folder / "clients.csv").read_text(encoding="utf-8").splitlines()
    assert {"big", "proxy"} <= set(lines[0].split(","))
    bare = lichen.run(
        recipe(home / "large", home / "rows.jsonl", "pair", federation={"rounds": 1}, compare={"baselines": ["base"]}),
        out=tmp_path / "bare",
    )
    assert found["big"]["mean"] == pytest.approx(bare.summary["columns"]["base"]["mean"], rel=1e-6)


def test_a_run_that_went_on_and_one_over_ranks_give_the_same_columns(home: Path, tmp_path: Path) -> None:
    whole = lichen.run(made(home), out=tmp_path / "whole").summary
    shorter = lichen.run(made(home, rounds=1), out=tmp_path / "longer")
    assert shorter.summary["extra_columns"]["proxy"] != whole["extra_columns"]["proxy"]
    longer = lichen.run(made(home), out=shorter.folder, resume=True).summary
    ranks = lichen.run(made(home, engine={"name": "distributed", "nodes": 2}), out=tmp_path / "ranks").summary
    for other in (longer, ranks):
        assert other["extra_columns"] == whole["extra_columns"]


Damage = Callable[[Path, Path], dict[str, Any]]


def _worded(home: Path, folder: Path) -> dict[str, Any]:
    return {"compare": {"proxy": str(save_model(folder / "wordy", more=("x1",)))}}


def _numbered(home: Path, folder: Path) -> dict[str, Any]:
    """As many words, of which two have changed numbers."""
    file = save_model(folder / "other") / "tokenizer.json"
    text = json.loads(file.read_text(encoding="utf-8"))
    words = text["model"]["vocab"]
    words[WORDS[3]], words[WORDS[4]] = words[WORDS[4]], words[WORDS[3]]
    file.write_text(json.dumps(text), encoding="utf-8")
    return {"compare": {"proxy": str(folder / "other")}}


def _encoder(home: Path, folder: Path) -> dict[str, Any]:
    return {"compare": {"proxy": str(bare_checkpoints.save_bare("bert", folder / "bert"))}}


REFUSED: dict[str, tuple[Damage, str, str]] = {
    "a token more": (_worded, "compare.proxy", "another vocabulary.*'x1' is number 46 in it, and missing"),
    "tokens of other numbers": (
        _numbered,
        "compare.proxy",
        "another vocabulary.*'w3' is number 10 in it, and number 9",
    ),
    "no logits": (_encoder, "compare.proxy", "bert, not a causal language model"),
    "no folder": (lambda home, folder: {"compare": {"proxy": str(folder / "none")}}, "compare.proxy", "no such"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_trained(case: str, home: Path, tmp_path: Path) -> None:
    damage, where, what = REFUSED[case]
    whole = made(home, **damage(home, tmp_path))
    with pytest.raises(LichenError, match=f"(?s){what}") as error:
        lichen.run(whole, out=tmp_path / "run")
    assert error.value.where == where
    assert error.value.fix
    assert not (tmp_path / "run").exists()
    with pytest.raises(LichenError, match=f"(?s){what}"):
        plan(whole, seconds=0.01)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "the same model": ({"compare": {"proxy": "MODEL"}}, "is the model that is tuned"),
    "parts at the clients": ({"federation": {"aggregate": "fedsa"}}, "no one tuned model"),
    "found by asking": (
        {
            "model": {"adapter": {"kind": "prompt", "num_virtual_tokens": 2}},
            "optimizer": {"name": "cma", "dimensions": 4},
        },
        "no tuned model",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_has_no_tuned_model_to_steer_by_is_refused(case: str, home: Path) -> None:
    more, what = UNFIT[case]
    whole = recipe(home / "model", home / "rows.jsonl", "pair", compare={"proxy": str(home / "large")})
    for section, keys in more.items():
        whole[section] = {**whole.get(section, {}), **keys}
    if whole["compare"]["proxy"] == "MODEL":
        whole["compare"]["proxy"] = whole["model"]["name"]
    if case == "found by asking":
        whole["model"] = {"name": whole["model"]["name"], **more["model"]}
        whole["optimizer"] = more["optimizer"]
    with pytest.raises(LichenError, match=what):
        read_recipe(whole)


def test_another_task_and_a_server_without_rows_have_no_such_column(home: Path, tmp_path: Path) -> None:
    save_rows(tmp_path / "rows.jsonl", "label")
    whole = recipe(home / "model", tmp_path / "rows.jsonl", "label", compare={"proxy": str(home / "large")})
    with pytest.raises(LichenError, match=r"compare\.proxy.*task classify does not score"):
        read_recipe(whole)
    (need,) = (one for one in needs_rows(read_recipe(made(home))) if one.key == "compare.proxy")
    assert need.change == "compare.proxy=null"


def test_a_path_beside_the_recipe_is_found(home: Path) -> None:
    from lichen.recipes.schema.yaml import dump_yaml

    file = home / "recipe.yaml"
    file.write_text(dump_yaml(made(home, compare={"proxy": "large"})), encoding="utf-8")
    assert read_recipe(file).compare.proxy == str(home / "large")


def test_a_plan_says_that_the_large_model_comes_on_top(home: Path) -> None:
    notes = plan(made(home, rounds=1), seconds=0.01).expected.notes
    assert [note for note in notes if note.startswith(f"scoring {home / 'large'} by itself and steered")]
