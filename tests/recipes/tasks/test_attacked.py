"""Attacks in recipes: what is refused, what a run says of itself, and the same bytes elsewhere and later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

import lichen
from lichen.core.errors import LichenError
from lichen.present.report import summary_table
from lichen.present.table import table_text
from lichen.present.trace import Event
from lichen.recipes.assemble.workload import pooled_experiment
from lichen.recipes.rows.site_rows import refuse_everybodys
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.open_server import refuse_rows
from support.small_experiment import experiment

SHORT = (
    "federation.rounds=3",
    "federation.local_steps=2",
    "compare.baselines=[]",
    "optimizer.lr=0.3",
    "data.partition.clients=5",
    "data.on_single_class=keep",
)
BUFFERED = ("federation.schedule={kind: buffered, arrivals: 2}", "engine.clock={median: 60}")


@pytest.mark.parametrize(
    ("base", "words", "where", "what"),
    [
        ("digits", ("attack.liars=1",), "attack.kind", "missing"),
        ("digits", ("attack={kind: sign_flip, scale: 0}",), "attack.scale", "no lie"),
        ("chat-lora", ("attack={kind: weight, scale: 1}",), "attack.scale", "no lie"),
        ("digits", ("attack.kind=weight",), "attack.kind", "the most already"),
        ("chat-lora", ("attack.kind=weight", "federation.weighting=rows"), "attack.kind", "the most already"),
        ("chat-lora", ("attack.kind=noise", "optimizer={name: kseed}", "compare.baselines=[]"), "attack.kind", "kseed"),
        ("digits-unequal", ("attack.kind=sign_flip",), "attack", "exchange"),
        ("digits", ("attack.kind=ipm", "engine.name=spawned"), "attack.kind", "spawned"),
        ("digits", ("attack.kind=ipm", "engine.name=distributed"), "attack.kind", "distributed"),
        ("digits", ("attack.kind=min_max", "wire.up=[int8]"), "attack.kind", "codes"),
        ("digits", ("attack.kind=alie", *BUFFERED), "attack.kind", "buffered"),
        ("chat-lora", ("attack.kind=ipm", "federation={ranks: [4, 8], aggregate: hetlora}"), "attack.kind", "shape"),
        ("digits", ("attack={kind: min_max, scale: 2}",), "attack.scale", "has none"),
        ("digits", ("attack={kind: ipm, deviation: sign}",), "attack.deviation", "has none"),
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
    for words, what in (("{kind: sign_flip, liars: 5}", "honest"), ("{kind: alie}", "the honest mean")):
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


@pytest.mark.parametrize("kind", ["noise", "min_max"])
def test_an_attacked_run_says_so_and_has_the_same_bytes_on_other_engines_and_after_a_stop(
    tmp_path: Path, kind: str
) -> None:
    words = [*SHORT, f"attack={{kind: {kind}, liars: 2}}"]
    recipe, told = read_recipe("digits", words), list[str]()
    whole = lichen.run(recipe, out=tmp_path / "whole", say=told.append)
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
        lichen.run(recipe, out=tmp_path / "part", observers=[stop])
    assert bytes_of(lichen.run(recipe, out=tmp_path / "part", resume=True).folder) == bytes_of(whole.folder)


def test_sites_without_an_attack_are_not_refused_for_it() -> None:
    recipe = read_recipe("digits", [*SHORT, "data.partition={by: client}"])
    refuse_everybodys(recipe)
    refuse_rows(recipe)
