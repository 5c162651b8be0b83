"""Recipes in which every client keeps a network of its own size: what they promise, resume and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import ClientStore, load_tree
from lichen.core.tree import digest, nbytes
from lichen.data.batches.shards import ArrayShard
from lichen.models.students.family import need
from lichen.models.students.students import ImageMLP
from lichen.present.trace import Event, read_trace
from lichen.recipes.assemble.heterogeneous import open_heterogeneous
from lichen.recipes.plan.plan import plan
from lichen.recipes.schema.read import read_recipe, write_recipe
from lichen.recipes.schema.recipe import ExchangeConfig, Recipe
from lichen.recipes.schema.yaml import load_yaml
from support.tiny_llama import SPECIAL, WORDS

KINDS = ("image-mlp-12", "image-mlp-48", "image-cnn-4")
ROWS = 120


def digits(*words: str) -> Recipe:
    """Six clients with few digits each, in three sizes of network."""
    whole: dict[str, Any] = {
        "name": "unequal",
        "task": "classify",
        "model": {"students": [{"kind": k.rpartition("-")[0], "width": int(k.rpartition("-")[2])} for k in KINDS]},
        "data": {
            "name": "digits",
            "partition": {"by": "dirichlet", "clients": 6, "alpha": 0.5},
            "max_rows": 60,
            "test_rows": 100,
            "on_single_class": "keep",
            "on_too_few_rows": "drop",
            "public": {"share": 0.3, "labelled": 0, "unlabelled": ROWS},
        },
        "optimizer": {"lr": [0.02]},
        "exchange": {"kind": "dsfl", "first_steps": 50, "distill_steps": 30},
        "federation": {"rounds": 3, "local_steps": 3, "batch_size": 16},
        "compare": {"baselines": ["alone", "alone_best"], "metric": "accuracy", "alone_epochs": 60},
    }
    return read_recipe(whole, words)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> lichen.Result:
    return lichen.run(digits(), out=tmp_path_factory.mktemp("run") / "run")


def test_unlike_networks_learn_from_each_other(ran: lichen.Result) -> None:
    columns, extra = ran.summary["columns"], ran.summary["extra"]
    assert columns["federated"]["mean"] > columns["alone"]["mean"] + 0.1
    assert ran.summary["extra_columns"]["ensemble"]["mean"] > columns["alone"]["mean"] + 0.1
    assert sum(extra[f"{kind}.clients"] for kind in KINDS) == 6
    parts = [extra[f"{kind}.mean"] * extra[f"{kind}.clients"] for kind in KINDS]
    assert sum(parts) / 6 == pytest.approx(columns["federated"]["mean"])
    for column in ("alone", "alone_best"):
        assert all(extra[f"{kind}.mean"] > extra[f"{kind}.{column}"] for kind in KINDS)


def test_the_ensemble_is_the_mean_of_what_the_saved_models_say(ran: lichen.Result) -> None:
    loaded, heterogeneous = open_heterogeneous(digits(), lambda _: None)
    test = loaded.experiment.clients.test[0]
    assert isinstance(test, ArrayShard)
    batch = {"active_C": torch.ones(1, dtype=torch.bool), "x_CBF": torch.from_numpy(test.x)[None]}
    total_BK = torch.zeros(test.size, 10)
    for kind, clients in heterogeneous.architectures.items():
        for client in clients:
            tree, _ = load_tree(ran.folder / "model" / kind / f"{client:04d}.safetensors")
            model = heterogeneous.experiments[kind].model
            total_BK += model.logits({n: x[None] for n, x in tree.items()}, {}, batch)[0].softmax(-1)
    right = float((total_BK.argmax(-1) == torch.from_numpy(test.labels)).double().mean())
    assert right == pytest.approx(ran.summary["extra_columns"]["ensemble"]["mean"], abs=0.011)  # one row of 100


def test_only_answers_cross_and_the_public_rows_once(ran: lichen.Result) -> None:
    first, *later = [e.report for e in read_trace(ran.folder) if e.column == "federated"]
    assert first.bytes_up < 6 * 3000
    for report in later:
        assert 0 < report.bytes_up - 6 * ROWS * 10 * 2 < 6 * 3000
        assert 0 < report.bytes_down - 6 * ROWS * 10 * 3 < 6 * 3000
    assert {f"valid/{kind}" for kind in KINDS} <= first.metrics.keys()
    assert ran.summary["extra"]["public_rows.bytes"] == 6 * ROWS * 64 * 4
    rounds = sum(r.bytes_down for r in (first, *later))
    assert ran.summary["bytes_down"] == rounds + 6 * ROWS * 64 * 4


def test_each_architecture_has_a_folder(ran: lichen.Result) -> None:
    names = []
    for kind in KINDS:
        about = json.loads((ran.folder / "model" / kind / "config.json").read_text())
        assert f"{about['student']['kind']}-{about['student']['width']}" == kind
        for name, file in about["files"].items():
            tree, _ = load_tree(ran.folder / "model" / kind / file)
            assert all(bool(x.isfinite().all()) for x in tree.values())
            names.append(name)
    assert len(names) == len(set(names)) == 6


class KilledError(Exception):
    pass


def killed_and_resumed(recipe: Recipe, folder: Path, *columns: str) -> lichen.Result:
    for place, column in enumerate(columns):

        def kill(event: Event, column: str = column) -> None:
            if (event.column, event.report.round) == (column, 2):
                raise KilledError  # the clients have kept this round, the server has not

        with pytest.raises(KilledError):
            lichen.run(recipe, out=folder, resume=place > 0, observers=[kill])
    return lichen.run(folder / "recipe.yaml", out=folder, resume=True)


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    recipe = digits("exchange={kind: dsfl, first_steps: 10, distill_steps: 6}", "compare.alone_epochs=12")
    whole = lichen.run(recipe, out=tmp_path / "whole")
    again = killed_and_resumed(recipe, tmp_path / "run", "federated", "alone", "alone_best")
    for key in ("columns", "extra_columns", "extra", "bytes_up", "bytes_down"):
        assert again.summary[key] == whole.summary[key], key
    stores = [ClientStore(r.folder / "state" / "federated" / "lr=0.02" / "clients") for r in (whole, again)]
    one, other = (store.load((2,), 6) for store in stores)
    assert one is not None
    assert other is not None
    assert digest(one) == digest(other)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> lichen.Result:
    words = ["exchange={kind: feddf, distill_steps: 20}", "federation.local_steps=25", "compare.baselines=[]"]
    return lichen.run(digits(*words), out=tmp_path_factory.mktemp("feddf") / "run")


def test_feddf_has_one_model_of_each_architecture(fused: lichen.Result, tmp_path: Path) -> None:
    assert fused.summary["columns"]["federated"]["mean"] > 0.5
    assert fused.summary["extra"]["public_rows.bytes"] == 0
    for kind in KINDS:
        assert {f.name for f in (fused.folder / "model" / kind).iterdir()} == {"model.safetensors", "config.json"}
    report = next(e.report for e in read_trace(fused.folder) if e.column == "federated")
    sizes = {kind: nbytes(load_tree(fused.folder / "model" / kind / "model.safetensors")[0]) for kind in KINDS}
    sent = sum(size * fused.summary["extra"][f"{kind}.clients"] for kind, size in sizes.items())
    assert 0 < report.bytes_up - sent < 6 * 3000
    again = killed_and_resumed(read_recipe(fused.folder / "recipe.yaml"), tmp_path / "run", "federated")
    assert again.summary["columns"] == fused.summary["columns"]


def test_a_rate_is_chosen_on_validation_rows_and_clients_may_come_late(tmp_path: Path) -> None:
    words = [
        "optimizer.lr=[1e-6, 0.02]",
        "federation={rounds: 2, local_steps: 3, batch_size: 16, clients_per_round: 3}",
        "exchange.weighting=classes",
        "exchange.min_confidence=0.2",
        "compare.alone_epochs=10",
    ]
    result = lichen.run(digits(*words, "exchange.kind=fedmd"), out=tmp_path / "run")
    assert result.summary["extra"]["lr.federated"] == result.summary["extra"]["lr.alone"] == 0.02
    events = [e for e in read_trace(result.folder) if e.column == "federated" and e.grid == "lr=0.02"]
    assert [len(e.report.clients) for e in events] == [3, 3]


def test_memory_gives_each_client_the_largest_that_fits(tmp_path: Path) -> None:
    batch = {"x_CBF": torch.zeros(1, 32, 64)}
    needs = [need(ImageMLP(64, hidden=(width,), classes=10), batch).total / 2**30 for width in (4, 32)]
    words = ["model.students=[{kind: image-mlp, width: 4}, {kind: image-mlp, width: 32}]"]
    recipe = digits(*words, f"federation.memory=[{needs[0] * 1.05}, {needs[1] * 1.05}, {needs[1] * 0.9}]")
    _, heterogeneous = open_heterogeneous(recipe, lambda _: None)
    assert dict(heterogeneous.architectures) == {"image-mlp-4": (0, 2, 3, 5), "image-mlp-32": (1, 4)}
    with pytest.raises(LichenError, match=r"federation\.memory.*train no model"):
        open_heterogeneous(digits(*words, "federation.memory=[1e-6]"), lambda _: None)


def test_texts_are_read_by_students_of_two_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    known = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL.values(), *WORDS))}, unk_token="<unk>"))
    known.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, **SPECIAL)
    monkeypatch.setattr("lichen.recipes.assemble.loaded_model.resolve_model", lambda _: tmp_path)
    monkeypatch.setattr("lichen.recipes.assemble.loaded_model.load_encoder", lambda _: (None, tokenizer))
    rng, lines = torch.Generator().manual_seed(0), []
    for person in range(6):
        for row in range(14):
            mood = (row + person) % 2
            some = [WORDS[20 * mood + int(i)] for i in torch.randint(20, (6,), generator=rng)]
            lines.append(json.dumps({"who": f"p{person}", "said": " ".join(some), "mood": ("calm", "glad")[mood]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        "model.students=[{kind: text-cnn, width: 8}, {kind: transformer, width: 8}]",
        f"data={{name: '{tmp_path / 'rows.jsonl'}', columns: {{client: who, text: said, label: mood}}, max_length: 16, "
        "split_by: row, public: {share: 0.34, labelled: 0, unlabelled: 20}}",
        "federation={rounds: 2, local_steps: 2, batch_size: 4}",
        "exchange.distill_steps=10",
        "compare.alone_epochs=5",
    ]
    result = lichen.run(digits(*words), out=tmp_path / "run")
    assert result.summary["clients"] == 4
    assert result.summary["columns"]["federated"]["mean"] >= 0.6
    assert json.loads((result.folder / "model" / "text-cnn-8" / "config.json").read_text())["vocabulary"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["exchange=null"], "exchange"),
        (["model={student: {kind: image-mlp}}"], "model.students"),
        (["model.name=minilm-l6"], "model.name"),
        (["model.student={kind: image-mlp}"], "model.student"),
        (["model.adapter={rank: 4}"], "model.adapter"),
        (["model.head=ridge"], "model.head"),
        (["data.public=null"], "data.public"),
        (["data.public.unlabelled=0"], "data.public.unlabelled"),
        (["task=chat", "compare={baselines: []}"], "exchange"),
        (["teacher={kind: head}"], "teacher"),
        (["semi={kind: fixmatch, threshold: 0.9}"], "semi"),
        (["synthetic={per_class: 3}"], "synthetic"),
        (["engine.name=spawned"], "engine.name"),
        (["engine.name=distributed"], "engine.name"),
        (["wire.up=[int8]"], "wire"),
        (["optimizer.name=mezo", "compare.baselines=[]"], "optimizer.name"),
        (["optimizer.prox=0.1"], "optimizer.prox"),
        (["compare.baselines=[pooled]"], "compare.baselines"),
        (["compare.baselines=[no_help]"], "compare.baselines"),
        (["federation.ranks=[2, 4]"], "federation.ranks"),
        (["federation.fair=qffl"], "federation.fair"),
        (["federation.keep_optimizer=true"], "federation.keep_optimizer"),
        (["federation.aggregate=fedex"], "federation.aggregate"),
        (["federation.server={name: adam}"], "federation.server"),
        (["exchange.server_lr=0.1"], "exchange.server_lr"),
        (["exchange.kind=feddf"], "exchange.first_steps"),
        (["exchange={kind: feddf, weighting: classes}"], "exchange.weighting"),
        (["exchange.sharpen=0"], "exchange.sharpen"),
        (["model.students=[{kind: image-mlp, width: 0}]"], "model.students"),
        (["model.students=[{kind: text-mlp}]"], "model.students"),
    ],
)
def test_misfits_are_refused_by_their_key(words: list[str], key: str) -> None:
    with pytest.raises(LichenError) as refused:
        digits(*words)
    assert refused.value.where.startswith(key)
    assert refused.value.fix


def test_what_does_not_read_the_data_and_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match=r"model\.students.*text-cnn does not fit"):
        lichen.run(digits("model.students=[{kind: text-cnn}]"), out=tmp_path / "run")
    with pytest.raises(LichenError, match=r"exchange.*cannot be planned"):
        plan(digits())


def test_words_have_their_kinds_meanings_and_recipes_are_read_back() -> None:
    said = {
        kind: (ExchangeConfig(kind=kind).means, ExchangeConfig(kind=kind).sharpened)
        for kind in ("fedmd", "dsfl", "feddf")
    }
    assert said == {"fedmd": ("prob", None), "dsfl": ("prob", 0.1), "feddf": ("logits", None)}
    assert ExchangeConfig(sharpen=1).sharpened is None
    recipe = digits()
    assert read_recipe(load_yaml(write_recipe(recipe), where="recipe")) == recipe
