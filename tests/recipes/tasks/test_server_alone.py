"""A server without rows: its process opens no file of the data, and its rounds have the bytes of the local engine."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.roster import Member, Roster
from lichen.core.tree import digest
from lichen.recipes.assemble.aggregation import downlink_of
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe, write_recipe
from lichen.recipes.sites.open_server import open_server, refuse_rows
from lichen.server.lowrank.submodel import Capacity
from lichen.transforms.downlink import Deltas, Direct
from lichen.transforms.parse import parse_codecs
from support.tiny_llama import recipe as chat_recipe
from support.tiny_llama import save_model, save_rows

WATCHED = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import lichen
lichen.run(sys.argv[1], out=sys.argv[2], server_alone=True)
print(json.dumps(opened))
"""
"""A server alone in a fresh process, which tells every file that it has opened."""

DIGITS = {
    "data.classes": list(range(10)),
    "data.partition.clients": 4,
    "federation.rounds": 2,
    "federation.local_steps": 2,
    "federation.clients_per_round": 3,
    "federation.sampling": "weighted",
    "federation.weighting": "rows",
    "federation.valid_clients": 2,
    "compare.baselines": ["alone", "alone_best"],
    "compare.alone_epochs": 1,
    "compare.alone_patience": 1,
    "optimizer.lr": [0.3],
    "wire.down": ["int8"],
}


def digits(home: Path, engine: str) -> tuple[Path, str]:
    keys = {**DIGITS, "engine.name": engine, **({"engine.nodes": 1} if engine == "spawned" else {})}
    file = home / f"digits-{engine}.yaml"
    file.write_text(write_recipe(read_recipe("digits", [f"{key}={json.dumps(value)}" for key, value in keys.items()])))
    return file, "digits.csv"


def chat(home: Path, engine: str) -> tuple[Path, str]:
    rows = home / "private-rows.jsonl"
    if not rows.exists():
        save_rows(rows, "pair", rows=12)
        save_model(home / "model")
    more: dict[str, Any] = {
        "engine": {"name": engine, "packing": False, **({"nodes": 1} if engine == "spawned" else {})},
        "federation": {"rounds": 2, "local_steps": 2, "ranks": [1, 2], "aggregate": "hetlora"},
        "compare": {"baselines": ["base"]},
    }
    file = home / f"chat-{engine}.yaml"
    file.write_text(write_recipe(read_recipe(chat_recipe(home / "model", rows, "pair", **more))))
    return file, rows.name


def opened_alone(recipe: Path, out: Path) -> list[str]:
    """The files that a server has opened that runs this recipe without rows."""
    command = [sys.executable, "-c", WATCHED, str(recipe), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    opened: list[str] = json.loads(ran.stdout.splitlines()[-1])
    return opened


def opened_whole(recipe: Path, out: Path) -> list[str]:
    """The same of a run with everybody's rows, in a fork of this process."""

    def program() -> None:
        opened: list[str] = []
        sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
        lichen.run(recipe, out=out)
        told.send(opened)

    heard, told = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    told.close()
    opened: list[str] = heard.recv()
    process.join()
    return opened


def states(run: Path) -> dict[str, bytes]:
    """All that the rounds of a run have left on disk: the server's state, and what was learned."""
    files = [*run.glob("state/*/*/server.safetensors"), *run.glob("adapter/*.safetensors"), *run.glob("model/*.st*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in [*files, run / "state/final.safetensors"]}


@pytest.mark.parametrize("made", [digits, chat])
def test_the_server_opens_no_data_and_its_rounds_have_the_local_bytes(
    made: Callable[[Path, str], tuple[Path, str]], tmp_path: Path
) -> None:
    (spawned, data), (local, _) = made(tmp_path, "spawned"), made(tmp_path, "local")
    opened = opened_alone(spawned, tmp_path / "alone")
    assert any(path.endswith("roster.json") or "roster.json" in path for path in opened)  # the hook sees what is opened
    assert [path for path in opened if data in path] == []
    assert any(data in path for path in opened_whole(local, tmp_path / "local"))

    here, there = states(tmp_path / "local"), states(tmp_path / "alone")
    assert here.keys() == there.keys()
    assert len(here) >= 3
    assert here == there
    assert (tmp_path / "local/roster.json").read_bytes() == (tmp_path / "alone/roster.json").read_bytes()

    whole, alone = lichen.report(tmp_path / "local", tmp_path / "alone").runs
    # Whether all clients are scored on one common test set, a server does not know; each score is the same.
    means = [
        {name: score and score["mean"] for name, score in run.summary["columns"].items()} for run in (whole, alone)
    ]
    assert means[0] == means[1]
    assert means[1]["pooled"] is None
    assert (means[1]["alone"] is None) == (made is chat)
    best = [run.summary["extra_columns"].get("alone_best") for run in (whole, alone)]
    assert best[0] == best[1]
    assert (best[1] is None) == (made is chat)
    assert alone.summary["traffic"] == whole.summary["traffic"]
    assert alone.summary["training"] == whole.summary["training"]
    for mine, other in zip(alone.clients(), whole.clients(), strict=True):
        assert {k: v for k, v in mine.items() if k != "cut"} == {k: other[k] for k in mine if k != "cut"}


def test_a_server_side_alone_is_that_of_the_whole_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(digits(tmp_path, "spawned")[0])
    whole = open_recipe(recipe).experiment.server
    alone = open_server(recipe, Roster.load(json.loads(json.dumps(whole.roster.dump())))).server
    assert digest(alone.start.flat()) == digest(whole.start.flat())
    assert (alone.classes, alone.pad, alone.capacity) == (whole.classes, whole.pad, whole.capacity)
    assert alone.roster == whole.roster


def test_clients_that_declare_unequal_capacities_cannot_be_sent_steps_of_one_view(tmp_path: Path) -> None:
    file, _ = digits(tmp_path, "spawned")
    side = open_recipe(read_recipe(file, ["wire.down=[]"])).experiment.server
    coded = replace(side, recipe=read_recipe(file, ["wire.down=[int8]"]))
    assert downlink_of(coded) == Deltas(parse_codecs(["int8"]), agreed=True)
    unequal = Capacity((2, 1), last_N=(None, None), scaling=1.0)
    assert downlink_of(replace(side, capacity=unequal)) == Direct(unequal)
    with pytest.raises(LichenError, match=r"wire.down: clients of unequal capacity"):
        downlink_of(replace(coded, capacity=unequal))


def test_what_needs_rows_at_the_server_says_so(tmp_path: Path) -> None:
    file, _ = digits(tmp_path, "spawned")
    read = read_recipe(file)
    refuse_rows(read)
    everybody = ("federation.clients_per_round=null", "federation.sampling=uniform", "wire.down=[]")
    cases: dict[str, tuple[list[str], str]] = {
        "compare.baselines": (['compare.baselines=["alone", "pooled"]'], "pooled is one model on everybody's rows"),
        "model.head": (["model.head=ridge"], "scaled on rows"),
        "federation.reward": ([*everybody, "federation.reward=cgsv"], "without having earned"),
    }
    for key, (changes, why) in cases.items():
        with pytest.raises(LichenError, match=why) as told:
            refuse_rows(read_recipe(file, changes))
        assert told.value.where == key
        assert told.value.fix
    for engine, why in (("local", "no nodes"), ("distributed", "ranks hold the rows")):
        with pytest.raises(LichenError, match=why) as told:
            lichen.run(read_recipe(file, [f"engine.name={engine}"]), out=tmp_path / "run", server_alone=True)
        assert (told.value.where, bool(told.value.fix)) == ("engine.name", True)
    with pytest.raises(LichenError, match="pooled is one model") as told:
        lichen.run(read_recipe(file, cases["compare.baselines"][0]), out=tmp_path / "run", server_alone=True)
    assert not (tmp_path / "run").exists()


def test_a_roster_that_fits_no_model_is_told(tmp_path: Path) -> None:
    recipe = read_recipe(digits(tmp_path, "spawned")[0])
    one = Member(name="a", rows={"train": 3}, group="64", labels={"7": 2, "b": 0})
    for group in ("", "nothing", "-1", "0", "64 x", "99999999 99999999", "1 1 1 1 1"):
        with pytest.raises(LichenError, match="which is no shape"):
            open_server(recipe, Roster((replace(one, group=group),)))
    with pytest.raises(LichenError, match="rows of 2 groups"):
        open_server(recipe, Roster((one, replace(one, name="b", group="tokens"))))
    unnamed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": ()})})
    with pytest.raises(LichenError, match="does not know the classes") as told:
        open_server(unnamed, Roster((replace(one, labels={}),)))
    assert told.value.where == "data.classes"
    assert open_server(unnamed, Roster((one,))).server.classes == ("7", "b")
