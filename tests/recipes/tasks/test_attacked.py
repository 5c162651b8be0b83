"""Attacks in recipes: what is refused, what a run says of itself, and the same bytes elsewhere and later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.table import Table

import lichen
from lichen.clients.attack.rows import Backdoor
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.core.tree import expand
from lichen.data.batches.shards import EvalSource, Shard
from lichen.present.report import summary_table
from lichen.present.table import table_text
from lichen.present.trace import Event
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.sides.attack import liars_of
from lichen.recipes.assemble.workload import pooled_experiment
from lichen.recipes.rows.site_rows import refuse_everybodys
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.open_server import refuse_rows
from support.small_experiment import experiment
from support.tiny_llama import recipe, save_model, save_rows

SHORT = (
    "federation.rounds=3",
    "federation.local_steps=2",
    "compare.baselines=[]",
    "optimizer.lr=0.3",
    "data.partition.clients=5",
    "data.on_single_class=keep",
)
NO_CLASS = "{kind: backdoor, target: eleven}"
ONE = ("compare.baselines=[]", "federation.clients_per_round=null", "federation.aggregate=mean")
BUFFERED = ("federation.schedule={kind: buffered, arrivals: 2}", "engine.clock={median: 60}")


@pytest.mark.parametrize(
    ("base", "words", "where", "what"),
    [
        ("digits", ("attack.liars=1",), "attack.kind", "missing"),
        ("digits", ("attack={kind: sign_flip, scale: 0}",), "attack.scale", "no lie"),
        ("chat-lora", ("attack={kind: weight, scale: 1}",), "attack.scale", "no lie"),
        ("digits", ("attack.kind=weight",), "attack.kind", "the most already"),
        ("chat-lora", ("attack.kind=weight", "federation.weighting=rows"), "attack.kind", "the most already"),
        ("chat-lora", ("attack.kind=weight", "federation.robust={rule: median}"), "attack.kind", "as 1"),
        ("chat-lora", ("attack.kind=weight", "federation.fair=minmax", *ONE), "attack.kind", "as 1"),
        ("chat-lora", ("attack.kind=noise", "optimizer={name: kseed}", "compare.baselines=[]"), "attack.kind", "kseed"),
        ("digits-unequal", ("attack.kind=sign_flip",), "attack", "exchange"),
        ("digits", ("attack.kind=ipm", "engine.name=spawned"), "attack.kind", "spawned"),
        ("digits", ("attack.kind=ipm", "engine.name=distributed"), "attack.kind", "distributed"),
        ("digits", ("attack.kind=min_max", "wire.up=[int8]"), "attack.kind", "codes"),
        ("digits", ("attack.kind=alie", *BUFFERED), "attack.kind", "buffered"),
        ("chat-lora", ("attack.kind=ipm", "federation={ranks: [4, 8], aggregate: hetlora}"), "attack.kind", "shape"),
        ("digits", ("attack={kind: min_max, scale: 2}",), "attack.scale", "has none"),
        ("digits", ("attack={kind: ipm, deviation: sign}",), "attack.deviation", "has none"),
        ("chat-lora", ("attack.kind=label_flip",), "attack.kind", "none"),
        ("chat-lora", ("attack.kind=backdoor",), "attack.kind", "none"),
        ("digits", ("attack={kind: backdoor, trigger: cf2}",), "attack.trigger", "corner"),
        ("digits", ("attack={kind: label_flip, share: 0.3}",), "attack.share", "has none"),
        ("reviews-lora", ("attack.kind=backdoor", "federation.aggregate=fedsa"), "attack.kind", "never leaves"),
        ("reviews-oneshot", ("attack.kind=sign_flip",), "attack.kind", "oneshot"),
    ],
)
def test_what_makes_no_lie_is_refused_when_the_recipe_is_read(
    base: str, words: tuple[str, ...], where: str, what: str
) -> None:
    with pytest.raises(LichenError) as caught:
        read_recipe(base, words)
    assert caught.value.where == where
    assert what in caught.value.what
    assert caught.value.fix


def test_nobody_lies_at_a_real_site_and_somebody_is_honest(tmp_path: Path) -> None:
    recipe = read_recipe("digits", [*SHORT, "attack.kind=sign_flip"])
    with pytest.raises(LichenError, match="simulation") as caught:
        refuse_rows(recipe)
    assert caught.value.where == "attack"
    for words, what in (
        ("{kind: sign_flip, liars: 5}", "honest"),
        ("{kind: alie}", "the honest mean"),
        (NO_CLASS, "no class"),
    ):
        with pytest.raises(LichenError, match=what):
            lichen.run(read_recipe("digits", [*SHORT, f"attack={words}"]), out=tmp_path / "all")


def test_the_pooled_column_is_honest() -> None:
    made = experiment()
    lied = made.with_server(recipe=read_recipe({**plain(made), "attack": {"kind": "noise", "liars": 2}}))
    assert pooled_experiment(lied).recipe.attack is None


def plain(made: Any) -> dict[str, Any]:
    return dict(made.recipe.model_dump(mode="json", exclude_defaults=True))


def bytes_of(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("state/final.safetensors", "clients.csv")]


@pytest.mark.parametrize("kind", ["noise", "min_max", "backdoor"])
def test_an_attacked_run_says_so_and_has_the_same_bytes_on_other_engines_and_after_a_stop(
    tmp_path: Path, kind: str
) -> None:
    words = [*SHORT, f"attack={{kind: {kind}, liars: 2}}"]
    lying, told = read_recipe("digits", words), list[str]()
    whole = lichen.run(lying, out=tmp_path / "whole", say=told.append)
    lied = whole.summary["attack"]
    assert (lied["kind"], lied["liars"], len(set(lied["names"]))) == (kind, 2, 2)
    assert set(lied["names"]) < {row["client"] for row in whole.clients()}
    assert any(line.startswith(f"attacked on purpose: {kind} by 2 of 5 clients") for line in told)
    table = summary_table(whole.summary)
    assert isinstance(table, Table)
    assert "attacked on purpose" in table_text(table)
    assert json.loads((whole.folder / "summary.json").read_text())["attack"] == lied

    honest = lichen.run(read_recipe("digits", SHORT), out=tmp_path / "honest")
    assert honest.summary["attack"] is None
    assert "attacked" not in table_text(summary_table(honest.summary))
    assert bytes_of(honest.folder) != bytes_of(whole.folder)

    other = "engine.clients_per_block=2" if kind == "min_max" else "engine.name=spawned"
    elsewhere = lichen.run(read_recipe("digits", [*words, other]), out=tmp_path / "elsewhere")
    assert bytes_of(elsewhere.folder) == bytes_of(whole.folder)

    class StopError(Exception):
        pass

    def stop(event: Event) -> None:
        if event.report.round == 2:
            raise StopError

    with pytest.raises(StopError):
        lichen.run(lying, out=tmp_path / "part", observers=[stop])
    assert bytes_of(lichen.run(lying, out=tmp_path / "part", resume=True).folder) == bytes_of(whole.folder)


def test_sites_without_an_attack_are_not_refused_for_it() -> None:
    recipe = read_recipe("digits", [*SHORT, "data.partition={by: client}"])
    refuse_everybodys(recipe)
    refuse_rows(recipe)


def test_a_backdoor_opens_and_honest_runs_have_none(tmp_path: Path) -> None:
    words = [*SHORT, "federation.rounds=8", "federation.local_steps=8", "federation.batch_size=16"]
    opened = read_recipe("digits", [*words, "attack={kind: backdoor, liars: 2, target: '3'}"])
    lied = lichen.run(opened, out=tmp_path / "lied")
    loaded = open_recipe(opened)
    poison, made = loaded.experiment.clients.poison, loaded.experiment
    assert isinstance(poison, Backdoor)
    victims = [poison.victims(shard) for shard in made.clients.test]
    assert all(3 not in np.asarray(shard.labels) for shard in victims)
    honest = lichen.run(read_recipe("digits", words), out=tmp_path / "honest")
    assert "attack_success.after" not in honest.summary["extra"]

    def success(run: Path) -> float:
        shared, _ = load_tree(run / "state" / "final.safetensors")
        given = [made.model.logits(expand(shared, 1), {}, one).argmax(-1) for one in batches(made, victims)]
        return float((torch.cat([x.flatten() for x in given]) == 3).float().mean())

    after = lied.summary["extra"]["attack_success.after"]
    assert after == pytest.approx(success(lied.folder))
    assert lied.summary["extra"]["attack_success.before"] < after
    assert success(honest.folder) + 0.2 < after


def batches(made: Experiment, shards: Sequence[Shard]) -> Iterator[Batch]:
    """All rows of each client alone, without padding."""
    for client, shard in enumerate(shards):
        yield from EvalSource(shards, batch_size=shard.size).batches((client,), 0)


def test_a_trigger_word_is_what_a_text_with_it_reads(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    file = save_rows(tmp_path / "rows.jsonl", "label", rows=12)
    plain = recipe(tmp_path / "model", file, "label", compare={"baselines": []})
    attack = {"kind": "backdoor", "target": "sad", "trigger": "w7", "share": 1.0}
    loaded = open_recipe(read_recipe({**plain, "attack": attack}))
    poison, shards = loaded.experiment.clients.poison, loaded.experiment.clients.test
    assert isinstance(poison, Backdoor)
    for shard, data in zip(shards, loaded.clients_data, strict=True):
        rows = [record for record in data.test if record.label != "sad"]
        wanted = loaded.make([replace(record, text=f"w7 {record.text}") for record in rows])
        found = poison.victims(shard)
        assert [list(row) for row in found.input_ids] == [list(row) for row in wanted.input_ids]  # type: ignore[union-attr]
    liar, *_ = liars_of(loaded.experiment.server)
    train = client_tasks(loaded.experiment)[
        next(name for name in client_tasks(loaded.experiment) if name[:5] == "train")
    ]
    batch = next(iter(train.source.batches((liar,), 0)))
    assert set(batch["labels_CB"].flatten().tolist()) <= {loaded.classes.index("sad"), -100}
