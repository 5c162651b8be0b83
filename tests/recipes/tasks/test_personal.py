"""Models of the clients' own, from recipe to table: what they are, what they leave alone, and of which round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.store import load_tree
from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard
from lichen.present.clients import read_clients
from lichen.present.report import compare_table, summary_table
from lichen.recipes.assemble.sides.personal import rows_of_others
from lichen.recipes.schema.read import read_recipe
from support.own_runs import kept, made, save_home, scores
from support.site_threads import sites_in_threads
from support.sites import SITES, save_sites, sites_recipe
from support.tiny_llama import recipe

CLIENTS = 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_home(tmp_path_factory.mktemp("personal"), clients=CLIENTS)


def equal(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


STEEP: dict[str, Any] = {
    "federation": {"rounds": 8, "clients_per_round": 4, "local_steps": 4, "batch_size": 4},
    "optimizer": {"lr": [0.05]},
}


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> lichen.Result:
    more = {"compare": {"baselines": ["alone"]}}
    return lichen.run(made(home, None, **more), out=tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "personal",
    [{"kind": "ditto"}, {"kind": "apfl"}, {"kind": "finetune", "steps": [2]}],
    ids=lambda personal: personal["kind"],
)
def test_the_shared_model_and_what_goes_up_are_those_of_a_run_without(
    home: Path, tmp_path: Path, plain: lichen.Result, personal: dict[str, Any]
) -> None:
    own = lichen.run(made(home, personal), out=tmp_path / "run")
    for file in ("state/final.safetensors", "adapter/adapter_model.safetensors"):
        assert (own.folder / file).read_bytes() == (plain.folder / file).read_bytes()
    assert own.summary["columns"]["federated"] == plain.summary["columns"]["federated"]
    assert own.summary["bytes_up"] == plain.summary["bytes_up"]
    assert not equal(scores(own, "federated"), scores(own, "personal" if "steps" in personal else "federated.personal"))


def test_ditto_without_a_pull_is_training_alone(home: Path, tmp_path: Path, plain: lichen.Result) -> None:
    own = lichen.run(made(home, {"kind": "ditto", "mu": 0.0}), out=tmp_path / "run")
    alone = kept(plain, "alone", 5, "params/")  # three rounds; alone takes two versions for each
    assert alone
    assert equal(kept(own, "federated", 3, "mine/params/"), alone)
    pulled = lichen.run(made(home, {"kind": "ditto", "mu": 3.0}), out=tmp_path / "pulled")
    shared = load_state(next((pulled.folder / "state/federated").glob("*/server.safetensors"))).shared.trainable

    def far(result: lichen.Result) -> float:
        mine = kept(result, "federated", 3, "mine/params/")
        return sum(float((x - shared[name]).square().sum()) for name, x in mine.items())

    assert far(pulled) < far(own)


@pytest.mark.parametrize(("alpha", "same"), [(0.0, "federated"), (1.0, "personal")])
def test_a_mixture_of_one_part_is_that_part(home: Path, tmp_path: Path, alpha: float, same: str) -> None:
    fixed = {"kind": "apfl", "alpha": alpha, "alpha_rate": 0.0}
    mixed = lichen.run(made(home, fixed), out=tmp_path / "mixed")
    pulled = lichen.run(made(home, {"kind": "ditto", "mu": 0.0}), out=tmp_path / "pulled")
    mean = {"federated": "columns", "personal": "extra_columns"}
    found = mixed.summary["extra_columns"]["personal"]["mean"]
    assert found == pytest.approx(pulled.summary[mean[same]][same]["mean"], rel=1e-4)


def test_a_mixtures_weight_is_learned_within_its_bounds(home: Path, tmp_path: Path) -> None:
    mixed = lichen.run(made(home, {"kind": "apfl", "alpha_rate": 0.5}), out=tmp_path / "run")
    alpha_C = kept(mixed, "federated", 3, "mine/")["alpha"]
    assert len(set(alpha_C.tolist())) > 1
    assert bool(((alpha_C >= 0) & (alpha_C <= 1)).all())


def test_a_start_that_is_not_learned_is_the_shared_model(home: Path, tmp_path: Path, plain: lichen.Result) -> None:
    still = lichen.run(made(home, {"kind": "fedala", "start_rate": 0.0, "layers": 2}), out=tmp_path / "still")
    for file in ("state/final.safetensors", "adapter/adapter_model.safetensors"):
        assert (still.folder / file).read_bytes() == (plain.folder / file).read_bytes()
    learned = lichen.run(made(home, {"kind": "fedala", "start_rate": 9.0, "layers": 1}), out=tmp_path / "learned")
    file = "state/final.safetensors"
    assert (learned.folder / file).read_bytes() != (plain.folder / file).read_bytes()
    assert learned.summary["bytes_up"] == plain.summary["bytes_up"]
    weights = kept(learned, "federated", 3, "mine/weights/")
    assert weights
    assert all(".layers.1." in name and bool(((x >= 0) & (x <= 1)).all()) for name, x in weights.items())
    assert any(bool((x < 1).any()) for x in weights.values())


def test_norms_stay_with_their_clients_and_nothing_else_does(home: Path, tmp_path: Path) -> None:
    full = {"model": {"name": str(home / "model"), "adapter": {"kind": "full"}}, "optimizer": {"lr": [0.01]}}
    plain = {**recipe(home / "model", home / "rows.jsonl", "pair", optimizer=full["optimizer"]), "model": full["model"]}
    shared = lichen.run({**plain, "personal": {"kind": "norms"}}, out=tmp_path / "norms")
    whole = lichen.run(plain, out=tmp_path / "whole")
    mine, sent = (
        kept(shared, "federated", 3, "params/"),
        load_tree(shared.folder / "state/final.safetensors")[0],
    )
    assert mine
    assert all(name.endswith("norm.weight") for name in mine)
    assert all(bool((sent[name] == 1).all()) for name in mine)  # the server's are as they were at the start
    numbers = 4 * sum(x[0].numel() for x in mine.values())
    assert shared.summary["traffic"]["client_up"] < whole.summary["traffic"]["client_up"] - numbers
    assert not equal(scores(shared, "federated"), scores(shared, "federated.personal"))
    with pytest.raises(LichenError, match="none are trained") as wrong:
        lichen.run(made(home, {"kind": "norms"}), out=tmp_path / "lora")
    assert wrong.value.where == "personal.kind"


def test_no_steps_of_fine_tuning_are_the_shared_model(home: Path, tmp_path: Path, plain: lichen.Result) -> None:
    own = lichen.run(made(home, {"kind": "finetune", "steps": [0]}), out=tmp_path / "run")
    assert equal(scores(own, "personal"), scores(plain, "federated"))
    assert own.summary["training"]["personal"]["rows"] == 0
    assert not own.summary["failures"]


def test_each_client_takes_the_number_of_steps_that_its_validation_rows_choose(home: Path, tmp_path: Path) -> None:
    own = lichen.run(made(home, {"kind": "finetune", "steps": [0, 40]}), out=tmp_path / "run")
    none = lichen.run(made(home, {"kind": "finetune", "steps": [0]}), out=tmp_path / "none")
    state, first = (
        kept(own, "personal", 4, ""),
        kept(none, "personal", 2, ""),
    )
    stayed = state["best_version"] < 2
    assert 0 < int(stayed.sum()) < CLIENTS  # else the laws below say nothing
    assert torch.equal(state["best_value"][stayed], first["best_value"][stayed])
    assert bool((state["best_value"][~stayed] < first["best_value"][~stayed]).all())
    for name, x in scores(own, "personal").items():
        assert torch.equal(x[stayed], scores(none, "personal")[name][stayed])
    assert own.summary["training"]["personal"]["rows"] == 40 * 4 * CLIENTS


def test_own_steps_may_be_smaller_than_the_rounds(home: Path, tmp_path: Path, plain: lichen.Result) -> None:
    shared = load_state(next((plain.folder / "state/federated").glob("*/server.safetensors"))).best.trainable

    def moved(scale: float) -> float:
        steps = {"kind": "finetune", "steps": [1], "lr_scale": scale}
        own = lichen.run(made(home, steps), out=tmp_path / f"{scale}")
        return sum(float((x - shared[name]).abs().sum()) for name, x in kept(own, "personal", 2, "params/").items())

    assert moved(0.1) == pytest.approx(0.1 * moved(1.0), rel=1e-3)  # Adam's first step is as long as its rate


def test_own_models_are_those_of_the_round_whose_shared_model_is_kept(home: Path, tmp_path: Path) -> None:
    own = lichen.run(made(home, {"kind": "ditto"}, **STEEP), out=tmp_path / "run")
    best = load_state(next((own.folder / "state/federated").glob("*/server.safetensors"))).best_round
    assert 1 <= best < 7  # else the law below says nothing
    short = {**STEEP, "federation": {**STEEP["federation"], "rounds": best}}
    stopped = lichen.run(made(home, {"kind": "ditto"}, **short), out=tmp_path / "short")
    assert equal(scores(own, "federated.personal"), scores(stopped, "federated.personal"))


def test_the_column_stands_in_table_summary_and_clients(home: Path, tmp_path: Path) -> None:
    own = lichen.run(made(home, {"kind": "ditto"}), out=tmp_path / "run")
    assert own.summary["extra_columns"]["personal"]["mean"] > 1
    shown = [str(cell) for cell in summary_table(own.summary).columns[0].cells]
    assert "personal" in shown
    assert "personal" in [str(column.header) for column in compare_table([own.summary]).columns]
    rows = read_clients(own.folder)
    assert len({row["personal"] for row in rows}) == CLIENTS
    assert sum(row["personal"] for row in rows) / CLIENTS == pytest.approx(
        own.summary["extra_columns"]["personal"]["mean"]
    )


def test_a_test_set_that_is_nobodys_own_mix_is_told(home: Path, tmp_path: Path) -> None:
    words = ("personal.kind=ditto", "federation.rounds=1", "optimizer.lr=0.1", "compare.baselines=[]")
    drawn = lichen.run(read_recipe("digits", words), out=tmp_path / "drawn").summary
    assert "all share" in str(drawn["extra"]["personal.tested on"])
    mixed = lichen.run(read_recipe("digits", [*words, "data.partition.test=own"]), out=tmp_path / "mixed").summary
    assert "personal.tested on" not in mixed["extra"]
    own = lichen.run(made(home, {"kind": "ditto"}), out=tmp_path / "own").summary
    assert "personal.tested on" not in own["extra"]


@pytest.mark.parametrize(
    "personal", [{"kind": "ditto"}, {"kind": "finetune", "steps": [1, 2]}], ids=lambda p: p["kind"]
)
def test_sites_have_the_scores_of_a_simulation(tmp_path: Path, personal: dict[str, Any]) -> None:
    files = save_sites(tmp_path / "sites", "pair")
    fed = {"rounds": 2, "local_steps": 2}
    more = {"engine": {"packing": False}, "federation": fed, "personal": {**personal, "choose": True}}
    local = lichen.run(sites_recipe(tmp_path, "pair", **more), out=tmp_path / "local")
    with sites_in_threads():
        there = sites_recipe(tmp_path, "pair", **{**more, "engine": {"packing": False, "name": "spawned"}})
        apart = lichen.run(there, out=tmp_path / "apart", sites=dict(zip(SITES, files, strict=True)))
    for name in ("personal", "chosen"):
        assert apart.summary["extra_columns"][name] == local.summary["extra_columns"][name]


@pytest.mark.parametrize("personal", [{"kind": "ditto"}, {"kind": "finetune", "steps": [4]}], ids=lambda p: p["kind"])
def test_each_client_takes_the_column_that_its_validation_rows_choose(
    home: Path, tmp_path: Path, personal: dict[str, Any]
) -> None:
    more = {"compare": {"baselines": ["base", "alone"]}}
    own = lichen.run(made(home, {**personal, "choose": True}, **more), out=tmp_path / "run")
    label = "personal" if personal["kind"] == "finetune" else "federated.personal"
    alone = next((own.folder / "state" / "scores").glob("alone.alone.chosen.*"))
    valid = {
        "personal": scores(own, f"{label}.valid"),
        "federated": scores(own, "federated.valid"),
        "alone": load_tree(alone)[0],
        "base": scores(own, "base.valid"),
    }
    loss_N = {name: (x["loss_sum"] / x["count"]).tolist() for name, x in valid.items()}
    rows, counts = read_clients(own.folder), dict.fromkeys(valid, 0)
    for client, row in enumerate(rows):
        best = min(valid, key=lambda name: loss_N[name][client])
        assert row["chosen"] == row[best]
        counts[best] += 1
    assert len([count for count in counts.values() if count]) > 1
    assert own.summary["extra"]["chosen from"] == ", ".join(f"{name} {count}" for name, count in counts.items())


def test_rows_of_others_are_of_others(home: Path, tmp_path: Path) -> None:
    shards = [ArrayShard(np.full((3 + c, 1), c, np.float32), labels=np.zeros(3 + c, np.int64)) for c in range(4)]
    drawn = rows_of_others(shards, 5, seed=3)
    assert [shard.size for shard in drawn] == [5] * 4
    for own, shard in enumerate(drawn):
        assert isinstance(shard, ArrayShard)
        assert own not in shard.x
    assert [s.size for s in rows_of_others(shards, 99, seed=3)] == [15, 14, 13, 12]
    assert [s.size for s in rows_of_others(shards[:1], 5, seed=3)] == [0]
    made_of = made(home, {"kind": "finetune", "steps": [0], "others": 6})
    extra = lichen.run(made_of, out=tmp_path / "run").summary["extra"]
    assert extra["others.personal"] == extra["others.federated"] > 1


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "steps of Ditto": ({"personal": {"kind": "ditto", "steps": [3]}}, "personal.steps", "finetune"),
    "a pull of fine-tuning": ({"personal": {"kind": "finetune", "mu": 0.3}}, "personal.mu", "ditto"),
    "falling steps": ({"personal": {"kind": "finetune", "steps": [4, 2]}}, "personal.steps", "smallest first"),
    "a worker's mixture": (
        {"personal": {"kind": "apfl"}, "federation": {"keep_optimizer": True}},
        "federation.keep_optimizer",
        "ditto or finetune",
    ),
    "parts of a batch": (
        {"personal": {"kind": "fedala"}, "federation": {"gradient_accumulation_steps": 2}},
        "federation.gradient_accumulation_steps",
        "takes every batch for a step",
    ),
    "no rows to choose on": (
        {"personal": {"kind": "finetune", "choose": True}, "data": {"valid": 0.0}},
        "personal.choose",
        "no validation rows",
    ),
    "rows of others at nodes": (
        {"personal": {"kind": "ditto", "others": 4}, "engine": {"name": "spawned"}},
        "personal.others",
        "no rows of other clients",
    ),
    "slopes": ({"personal": {"kind": "ditto"}, "optimizer": {"name": "mezo"}}, "personal.kind", "adamw or sgd"),
    "another rule": (
        {"personal": {"kind": "ditto"}, "federation": {"aggregate": "fedsa"}},
        "federation.aggregate",
        "by this rule already",
    ),
    "a patch": (
        {"personal": {"kind": "ditto"}, "federation": {"aggregate": "flora"}},
        "federation.aggregate",
        "finetune",
    ),
    "unequal ranks": (
        {"personal": {"kind": "finetune"}, "federation": {"aggregate": "hetlora", "ranks": [2, 1]}},
        "federation.ranks",
        "which not every client",
    ),
    "late answers": (
        {
            "personal": {"kind": "ditto"},
            "federation": {"schedule": {"kind": "buffered"}},
            "engine": {"name": "spawned"},
        },
        "federation.schedule.kind",
        "older tensors",
    ),
    "noise on nodes": (
        {
            "personal": {"kind": "finetune"},
            "privacy": {"epsilon": 8.0, "clip": 1.0},
            "federation": {"weighting": "uniform"},
            "engine": {"name": "spawned"},
        },
        "privacy",
        "no node answers",
    ),
    "noise of rows": (
        {
            "personal": {"kind": "ditto"},
            "privacy": {"epsilon": 8.0, "clip": 1.0, "unit": "row"},
            "optimizer": {"clip": 1.0},
            "federation": {"weighting": "uniform"},
        },
        "privacy.unit",
        "sample in parts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_key_and_reason(home: Path, name: str) -> None:
    sections, key, said = REFUSED[name]
    with pytest.raises(LichenError) as wrong:
        read_recipe(recipe(home / "model", home / "rows.jsonl", "pair", **sections))
    assert wrong.value.where == key
    assert said in str(wrong.value)


def test_under_masks_the_bytes_of_own_models_are_the_same(home: Path, tmp_path: Path) -> None:
    more = {"federation": {"rounds": 1, "local_steps": 2, "batch_size": 4}}
    open_run = lichen.run(made(home, {"kind": "ditto"}, **more), out=tmp_path / "open")
    masked = lichen.run(made(home, {"kind": "ditto"}, privacy={"secure": True}, **more), out=tmp_path / "masked")
    assert equal(scores(open_run, "federated.personal"), scores(masked, "federated.personal"))
