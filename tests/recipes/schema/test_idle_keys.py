"""Keys that were once accepted and did nothing: each is refused by its name now, or acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.recipes.assemble.aggregation import downlink_of, server_of
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import algorithm_of, works_of
from lichen.recipes.schema.read import read_recipe, recipe_of, write_recipe
from lichen.recipes.sites.statistics_node import solver_of
from lichen.server.lda import Lda
from support import small_experiment, tiny_llama

CHAT: dict[str, Any] = {
    "task": "chat",
    "model": {"name": "tiny"},
    "data": {"name": "rows.jsonl"},
    "compare": {"baselines": []},
}
CLASSES = {**CHAT, "task": "classify"}
SMALL = {**CLASSES, "model": {"student": {"kind": "image-mlp"}}}
ONESHOT = {**CHAT, "task": "oneshot"}
MEZO = "optimizer.name=mezo"
PUBLIC = "data.public={share: 0.5}"
JUDGED = [PUBLIC, "teacher={select: true, may_see: [public, private]}"]


@pytest.mark.parametrize(
    ("recipe", "words", "where"),
    [
        (CHAT, [MEZO, "federation.aggregate=fedsa"], "federation.aggregate"),
        (
            CHAT,
            ["optimizer.name=kseed", "model.adapter.kind=full", "federation.aggregate=fedex"],
            "federation.aggregate",
        ),
        (
            CHAT,
            ["optimizer.name=cma", "model.adapter.kind=prompt", "federation.aggregate=fedex"],
            "federation.aggregate",
        ),
        (CHAT, [MEZO, "optimizer.prox=0.1"], "optimizer.prox"),
        (CHAT, [MEZO, "optimizer.weight_decay=0.1"], "optimizer.weight_decay"),
        (CLASSES, [MEZO, "semi.kind=fixmatch", "data.labels=5"], "semi"),
        (SMALL, ["federation.keep_optimizer=true", "semi.kind=fixmatch", "data.labels=5"], "semi"),
        (CLASSES, [MEZO, *JUDGED], "teacher.select"),
        (SMALL, ["federation.keep_optimizer=true", *JUDGED], "teacher.select"),
        (ONESHOT, ["wire.up=[int8]"], "wire.up"),
        (ONESHOT, ["federation.rounds=3"], "federation.rounds"),
        (ONESHOT, ["model.adapter.rank=4"], "model.adapter.rank"),
        (ONESHOT, ["model.quantize=int8"], "model.quantize"),
        (ONESHOT, ["model.layers=1"], "model.layers"),
        (ONESHOT, ["model.head=random"], "model.head"),
        (ONESHOT, ["model.head=lda", "ridge=2"], "ridge"),
        (CHAT, ["federation.server={name: adam, momentum: 0.9}"], "federation.server.momentum"),
        (SMALL, ["federation.fair=minmax", "federation.weighting=uniform"], "federation.weighting"),
        (CHAT, ["optimizer.momentum=0.9"], "optimizer.momentum"),
        (CHAT, ["optimizer.eps=0.1"], "optimizer.eps"),
        (CHAT, ["federation.energy=0.5"], "federation.energy"),
        (CHAT, ["federation.q=2"], "federation.q"),
        (CHAT, ["model.adapter={kind: prefix, rank: 4}"], "model.adapter.rank"),
        (CHAT, ["model.head=ridge"], "model.head"),
        (SMALL, ["model.adapter.rank=4"], "model.adapter.rank"),
        (SMALL, ["engine.packing=false"], "engine.packing"),
        (SMALL, [PUBLIC, "teacher={template: 'is {text}'}"], "teacher.template"),
        (SMALL, [PUBLIC, "teacher={answer_format: all, top_k: 2}"], "teacher.top_k"),
        (SMALL, ["synthetic={iterations: 2}"], "synthetic.iterations"),
        (CHAT, ["optimizer.warmup=10"], "optimizer.warmup"),
        (CHAT, ["compare={baselines: [alone], alone_epochs: 3}"], "compare.alone_epochs"),
        (CHAT, ["compare={baselines: [alone], alone_patience: 3}"], "compare.alone_patience"),
        (ONESHOT, ["compare.baselines=[alone_best]"], "compare.baselines"),
        (CHAT, ["compare.baselines=[alone_best]", "optimizer={name: mezo}"], "compare.baselines"),
        (CHAT, ["optimizer={name: cma, population: 3}", "model.adapter.kind=prompt"], "optimizer.population"),
        (
            CHAT,
            ["federation.schedule={kind: buffered}", "engine.clock={}", "federation.sampling=weighted"],
            "federation.sampling",
        ),
    ],
)
def test_a_key_without_a_reader_is_refused_by_its_name(recipe: dict[str, Any], words: list[str], where: str) -> None:
    with pytest.raises(LichenError) as told:
        read_recipe(recipe, words)
    assert (told.value.where, bool(told.value.fix)) == (where, True)


def test_defaults_may_stand_anywhere_and_what_has_run_is_read_as_it_is(tmp_path: Path) -> None:
    for recipe in (CHAT, SMALL, ONESHOT):
        text = write_recipe(read_recipe(recipe))
        (tmp_path / "recipe.yaml").write_text(text)
        assert recipe_of(tmp_path) == read_recipe(tmp_path / "recipe.yaml") == read_recipe(recipe)
    (tmp_path / "recipe.yaml").write_text(text.replace("rounds: 10", "rounds: 11"))
    assert recipe_of(tmp_path).federation.rounds == 11
    with pytest.raises(LichenError, match=r"federation\.rounds"):
        read_recipe(tmp_path / "recipe.yaml")


def test_what_overrides_leave_without_a_reader_is_told_and_left_out() -> None:
    notes: list[str] = []
    recipe = read_recipe("digits", ["compare.baselines=[]"], note=notes.append)
    assert recipe.compare.pooled_batch_size is None
    assert [note.partition(":")[0] for note in notes] == ["compare.pooled_batch_size"]
    with pytest.raises(LichenError, match="pooled_batch_size"):
        read_recipe("digits", ["compare.baselines=[]", "compare.pooled_batch_size=8"])


@pytest.mark.parametrize(
    "word", ["federation.aggregate=ffa", "federation.aggregate=rolora", "federation.layer_groups=2"]
)
def test_mezo_moves_what_is_trained_in_that_round(tmp_path: Path, word: str) -> None:
    home = tiny_llama.save_model(tmp_path / "model"), tiny_llama.save_rows(tmp_path / "rows.jsonl", "pair")
    recipe = read_recipe(tiny_llama.recipe(*home, "pair"), [MEZO, word, "federation.rounds=1"])
    result = lichen.run(recipe, out=tmp_path / "run")
    state = load_tree(result.folder / "state" / "federated" / "lr=0.02" / "server.safetensors")[0]
    begun = read_recipe(tiny_llama.recipe(*home, "pair"))
    start = open_recipe(begun).experiment.start.trainable
    ends = {name: x for name, x in state.items() if name.partition("/")[2] in start or name in start}
    moved = {name.rpartition("/")[2] for name, x in ends.items() if not torch.equal(x, start[name.rpartition("/")[2]])}
    still = {"federation.aggregate=ffa": "lora_A", "federation.aggregate=rolora": "lora_A"}.get(word, "layers.1.")
    assert moved
    assert not any(still in name for name in moved)


def test_adam_and_yogi_step_by_a_hundredth_unless_told(tmp_path: Path) -> None:
    for name in ("adam", "yogi"):
        assert server_of(read_recipe(CHAT, [f"federation.server.name={name}"])).lr == 0.01  # type: ignore[attr-defined]
        told = read_recipe(CHAT, [f"federation.server={{name: {name}, lr: 1.0}}"])
        (tmp_path / "recipe.yaml").write_text(write_recipe(told))
        assert server_of(recipe_of(tmp_path)).lr == 1.0  # type: ignore[attr-defined]
    assert server_of(read_recipe(CHAT)).lr == 1.0  # type: ignore[attr-defined]


def test_one_shot_solves_for_the_head_that_is_named() -> None:
    assert isinstance(solver_of(read_recipe(ONESHOT, ["model.head=lda"])), Lda)
    assert solver_of(read_recipe(ONESHOT, ["ridge=0.5"])).lam == 0.5  # type: ignore[union-attr]


def test_a_start_that_only_the_server_can_make_is_sent() -> None:
    made = small_experiment.experiment()
    for words, agreed in (([], True), (["model.head=ridge"], False)):
        recipe = read_recipe(small_experiment.RECIPE, ["wire.down=[int8]", *words])
        server = made.with_server(recipe=recipe).server
        assert downlink_of(server).agreed is agreed
        algorithm = algorithm_of(server, 0.1, 2)
        assert algorithm.work in works_of(server)
        state = algorithm.downlink.init(server.start, 4, first=True)
        assert bool((state["held"] == 0).all()) is agreed


def test_a_warm_up_longer_than_a_column_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    home = tiny_llama.save_model(tmp_path / "model"), tiny_llama.save_rows(tmp_path / "rows.jsonl", "pair")
    words = ["optimizer.warmup=2", "federation.rounds=4", "federation.clients_per_round=1"]
    recipe = read_recipe(tiny_llama.recipe(*home, "pair"), [*words, "compare.baselines=[alone]"])
    with pytest.raises(LichenError, match=r"optimizer\.warmup.*column alone") as told:
        lichen.run(recipe, out=tmp_path / "run")
    assert told.value.where == "optimizer.warmup"
    assert not (tmp_path / "run").exists()
