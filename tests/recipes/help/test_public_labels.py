"""Public labels in a teacher's place: no model, the same steps and rows, and equal to a loop written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lichen
from lichen.clients.distillation.distill import public_source
from lichen.clients.training.optimize import lr_factor
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.parts import client_tasks, lr_name
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.help.steps import HelpResult, apply_help
from lichen.recipes.schema.read import read_recipe
from support.toy_cohorts import fold, job

LR = 0.01
DIGITS: dict[str, Any] = {
    "task": "classify",
    "model": {"student": {"kind": "image-mlp", "width": 8}},
    "data": {
        "name": "digits",
        "partition": {"by": "iid", "clients": 2},
        "max_rows": 40,
        "test_rows": 40,
        "public": {"share": 0.2, "labelled": 50, "unlabelled": 0},
    },
    "teacher": {
        "kind": "labels",
        "answer_format": "label",
        "at": "both",
        "server_steps": 6,
        "public_batch_size": 5,
        "weight": 0.5,
    },
    "optimizer": {"name": "adamw", "lr": [LR]},
    "federation": {"rounds": 1, "local_steps": 3, "batch_size": 4},
    "compare": {"baselines": ["no_help"]},
}


def helped(folder: Path, words: list[str]) -> tuple[LoadedExperiment, HelpResult]:
    loaded = open_recipe(read_recipe(DIGITS, words))
    return loaded, apply_help(loaded, RunFolder(folder, recipe_sha256="0" * 64), lambda _: None)


def by_hand(params: Tree, batches: list[Batch], loaded: LoadedExperiment, rates: list[float], clip: float) -> Tree:
    """torch's AdamW on the mean cross entropy of own labels, and half that of the public rows' true labels."""
    params = {name: x.clone().requires_grad_() for name, x in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.0)
    public = loaded.public_split.labelled
    for batch, rate in zip(batches, rates, strict=True):
        x_BF, own_B, row_B = batch["x_CBF"][0].flatten(1), batch["labels_CB"][0], batch["answer_CB"][0]
        losses, known = [], [loaded.classes.index(str(record.label)) for record in public]
        hidden = torch.relu(x_BF @ params["layer0.weight"].t() + params["layer0.bias"])
        logits = hidden @ params["layer1.weight"].t() + params["layer1.bias"]
        for x, row, own, row_logits in zip(x_BF, row_B.tolist(), own_B.tolist(), logits, strict=True):
            if row >= 0:
                assert own == -100, "a public row has its label twice"
                pixels = public[row].features
                assert pixels is not None
                torch.testing.assert_close(x, torch.from_numpy(pixels).flatten())
            if max(row, own) >= 0:
                label = torch.tensor(known[row] if row >= 0 else own)
                losses.append((0.5 if row >= 0 else 1.0) * torch.nn.functional.cross_entropy(row_logits, label))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), clip)
        optimizer.param_groups[0]["lr"] = LR * rate
        optimizer.step()
    return {name: x.detach() for name, x in params.items()}


def close(one: Tree, other: Tree) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def moved(one: Tree, other: Tree) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_server_takes_the_steps_of_a_loop_on_the_public_labels(tmp_path: Path) -> None:
    loaded, result = helped(tmp_path, [])
    before, public = loaded.experiment.start.trainable, result.experiment.server.public
    assert isinstance(public, ArrayShard)
    batches = list(
        public_source(public, batch=32, steps=6).batches((0,), derive(loaded.experiment.recipe.seed, "distilled"))
    )
    end = by_hand(before, batches, loaded, [lr_factor("cosine", step, 6) for step in range(6)], 1.0)
    close(end, dict(result.experiment.start.trainable))
    assert moved(end, before) > LR


def test_a_client_takes_the_steps_of_a_loop_on_its_rows_and_the_public_ones(tmp_path: Path) -> None:
    loaded, result = helped(tmp_path, ["teacher.at=clients"])
    start = result.experiment.start
    assert all(torch.equal(start.trainable[name], x) for name, x in loaded.experiment.start.trainable.items())
    task: ClientTask = client_tasks(result.experiment)[f"train {lr_name(LR)}"]
    batches = list(task.source.batches((0,), 7))
    assert [int((batch["answer_CB"] >= 0).sum()) for batch in batches] == [5, 5, 5]
    message, _ = fold(task.work, job(start.flat(), (0,), seed=7), batches, None)
    params = dict(start.trainable)
    end: dict[str, Tensor] = {name: params[name] + x[0] for name, x in message.tensors.items()}
    close(by_hand(params, batches, loaded, [1.0] * 3, float("inf")), end)


def test_no_model_is_asked_or_fetched_and_what_is_sent_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a foundation model was opened")

    for module, name in (("lichen.recipes.help.teacher", "encoder_of"), ("lichen.recipes.help.steps", "Teachers")):
        monkeypatch.setattr(f"{module}.{name}", refused)
    monkeypatch.setattr(FMRegistry, "_load", refused)
    loaded, result = helped(tmp_path, [])
    pixels = sum(record.features.nbytes for record in loaded.public_split.labelled if record.features is not None)
    assert result.extra["fm.asked"] == 0
    assert result.extra["public_labels"] == 50
    assert result.bytes_down == result.extra["public_texts.bytes"] == 2 * pixels > 0
    assert "base" not in result.columns
    assert tuple(result.experiment.start.frozen["answers.index"].shape) == (50, 1)


def test_where_the_server_alone_learns_clients_are_sent_nothing_more(tmp_path: Path) -> None:
    loaded, result = helped(tmp_path, ["teacher.at=server"])
    assert result.bytes_down == 0
    assert result.experiment.server.public is None
    assert moved(dict(result.experiment.start.trainable), dict(loaded.experiment.start.trainable)) > LR


def test_a_run_and_its_plan_have_the_same_bytes(tmp_path: Path) -> None:
    for at in ("both", "server"):
        recipe = read_recipe(DIGITS, [f"teacher.at={at}"])
        planned, run = lichen.plan(recipe, seconds=0.05), lichen.run(recipe, out=tmp_path / at)
        assert (planned.expected.bytes.up, planned.expected.bytes.down) == (
            run.summary["bytes_up"],
            run.summary["bytes_down"],
        )
        assert "teacher" not in planned.expected.columns
        assert planned.expected.frozen == 0


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["teacher.name=smollm2-135m"], "teacher.name"),
        (["teacher.endpoint={url: 'http://127.0.0.1:1/v1', model: mine}"], "teacher.endpoint"),
        (["teacher.answer_format=all"], "teacher.answer_format"),
        (["teacher.answer_format=top_k"], "teacher.answer_format"),
        (["teacher.answer_format=text"], "teacher.answer_format"),
        (["teacher.temperature=2.0"], "teacher.temperature"),
        (["teacher.template='A {text}'"], "teacher.template"),
        (["teacher.min_confidence=0.5"], "teacher.min_confidence"),
        (["teacher.top_k=2"], "teacher.top_k"),
        (["teacher.layers={1: 3}"], "teacher.layers"),
        (["teacher.select=true"], "teacher.select"),
        (["teacher.may_see=[public, private]"], "teacher.may_see"),
        (["synthetic={filters: [agreement]}"], "synthetic.filters"),
        (["data.labels=5", "teacher.at=server", "semi={kind: fixmatch, teacher_rounds: 1}"], "semi.teacher_rounds"),
        (["data.public.labelled=0"], "data.public.labelled"),
        (["data.public=null"], "data.public"),
        (["task=chat", "model={name: tiny}", "compare.baselines=[]"], "teacher.kind"),
    ],
)
def test_what_only_a_model_has_is_refused_by_its_key(words: list[str], where: str) -> None:
    with pytest.raises(LichenError) as told:
        read_recipe(DIGITS, words)
    assert told.value.where == where
    assert told.value.fix


def test_a_label_is_one_name_without_being_told_so() -> None:
    recipe = read_recipe(DIGITS)
    assert recipe.teacher is not None
    assert recipe.teacher.answer_format == "label"
    assert recipe == read_recipe(DIGITS, ["teacher.answer_format=label"])
