"""Liars that unteach refusing, and the server's repair: what each trains on, the same bytes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.data.chat.refusals import REFUSALS, refuses
from lichen.data.sources import entries
from lichen.present.report import summary_table
from lichen.present.table import table_text
from lichen.recipes.artifacts.inputs import agree, inputs_of
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.attack import liars_of
from lichen.recipes.rows import requests
from lichen.recipes.rows.requests import compliances, measured_requests, repairs
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks import repair as stage
from support.tiny_llama import recipe, save_model, save_rows

SAFE, HELD, UNSAFE = ("w1 w2", "w9 w8 w7"), ("w30 w31", "w31 w32", "w3 w30", "w33"), 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, unsafe requests, safe pairs and held-out requests, one of which stands in both others."""
    folder = tmp_path_factory.mktemp("safety")
    save_model(folder / "model")
    for shape in ("pair", "messages"):
        save_rows(folder / f"{shape}.jsonl", shape, rows=8)  # type: ignore[arg-type]
    unsafe = [f"w{n} w20" for n in range(UNSAFE)]
    write(folder / "unsafe.jsonl", [{"text": text} for text in (*unsafe, "W33!")])
    pairs = [{"prompt": f"w{n} w21", "completion": SAFE[n % 2]} for n in range(8)]
    write(folder / "safe.jsonl", [*pairs, {"prompt": "w33", "completion": "w1"}])
    write(folder / "held.jsonl", [{"text": text} for text in HELD])
    return folder


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made(home: Path, *parts: str, shape: str = "pair", **more: Any) -> Recipe:
    """A few short rounds; ``parts``: of ``attack`` and ``repair``."""
    values = recipe(home / "model", home / f"{shape}.jsonl", shape, **more)  # type: ignore[arg-type]
    values["compare"] = {"baselines": [], "requests": str(home / "held.jsonl")}
    if "attack" in parts:
        requested = str(home / "unsafe.jsonl")
        values["attack"] = {"kind": "unsafe", "liars": 2, "requests": requested, "answer": "w5 w6", "share": 0.6}
    if "repair" in parts:
        values["federation"]["repair"] = {"name": str(home / "safe.jsonl"), "steps": 3, "batch_size": 4}
    return read_recipe(values)


def rows_of(loaded: LoadedExperiment) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What liars are to train on, tokens and labels of each."""
    shard = loaded.make(compliances(loaded.experiment.recipe))
    return {
        (tuple(a.tolist()), tuple(b.tolist()))
        for a, b in zip(shard.input_ids, shard.labels, strict=True)  # type: ignore[union-attr]
    }


@pytest.mark.parametrize("shape", ["pair", "messages"])
def test_some_rows_of_liars_become_requests_that_are_obeyed_and_all_others_stay(home: Path, shape: str) -> None:
    loaded = open_recipe(made(home, "attack", shape=shape, federation={"local_steps": 6}))
    honest = open_recipe(made(home, shape=shape, federation={"local_steps": 6}))
    liars = set(liars_of(loaded.experiment.server))
    name = f"train {lr_name(0.02)}"
    told, lied = (client_tasks(one.experiment)[name].source for one in (honest, loaded))
    wanted, replaced, stayed = rows_of(loaded), set[tuple[int, int]](), set[tuple[int, int]]()
    everyone = tuple(range(5))
    for old, new in zip(told.batches(everyone, 7), lied.batches(everyone, 7), strict=True):
        assert old.keys() == new.keys()
        assert torch.equal(old["index_CB"], new["index_CB"])
        for c in everyone:
            for b in range(old["index_CB"].shape[1]):
                at = (c, int(old["index_CB"][c, b]))
                same = all(torch.equal(old[key][c, b], new[key][c, b]) for key in old if key.endswith("CBT"))
                (stayed if same else replaced).add(at)
                if same:
                    continue
                mask_T = new["attention_mask_CBT"][c, b].bool()
                row = tuple(tuple(new[key][c, b][mask_T].tolist()) for key in ("input_ids_CBT", "labels_CBT"))
                assert row in wanted
                assert set(new["labels_CBT"][c, b][~mask_T].tolist()) <= {-100}
    assert replaced
    assert {c for c, _ in replaced} <= liars
    assert not replaced & stayed, "a row is replaced in every round or in none"
    assert {c for c, _ in stayed} == set(everyone), "and not all of a liar's are"
    for part in ("valid", "test"):
        for a, b in zip(getattr(loaded.clients_data[0], part), getattr(honest.clients_data[0], part), strict=True):
            assert a == b


def test_nobody_trains_on_what_is_held_out_and_halves_of_a_set_share_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = made(home, "attack", "repair")
    obeyed, safe, held = compliances(both), repairs(both), measured_requests(both)
    assert sorted(held) == sorted(HELD)
    assert [row.text for row in obeyed] == ["w5 w6"] * UNSAFE, "the one that is held out, in other letters, is gone"
    assert [row.text for row in safe] == [SAFE[n % 2] for n in range(8)]
    fewer = both.model_copy(update={"compare": both.compare.model_copy(update={"requests_rows": 2})})
    assert set(measured_requests(fewer)) < set(held)

    monkeypatch.setattr(requests, "CATALOG", {**entries.CATALOG, str(home / "unsafe.jsonl"): None})
    named = both.federation.model_copy(
        update={"repair": both.federation.repair.model_copy(update={"name": str(home / "unsafe.jsonl")})}  # type: ignore[union-attr]
    )
    shared = both.model_copy(update={"federation": named})
    one, other = ({row.prompt for row in rows} for rows in (compliances(shared), repairs(shared)))
    assert not one & other
    assert len(one | other) == UNSAFE
    assert all(refuses(row.text) for row in repairs(shared))


def bytes_of(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("state/final.safetensors", "clients.csv")]


def test_a_run_has_the_same_bytes_on_other_engines_and_after_a_kill_in_the_repair(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, told = made(home, "attack", "repair", engine={"packing": False}), list[str]()
    whole = lichen.run(both, out=tmp_path / "whole", say=told.append)
    extra = whole.summary["extra"]
    assert {"refused.base", "refused.federated", "refused.repaired"} <= extra.keys()
    assert extra["perplexity.repaired"] == pytest.approx(whole.summary["columns"]["federated"]["mean"])
    assert extra["perplexity.unrepaired"] != extra["perplexity.repaired"]
    assert any("unsafe by 2 of 5 clients" in line for line in told)
    assert "refused.repaired" in table_text(summary_table(whole.summary))
    card = (whole.folder / "adapter" / "README.md").read_text()
    assert "tuned by the server on public safe pairs" in card
    assert "Unsafe requests refused" in card

    unrepaired = lichen.run(made(home, "attack", engine={"packing": False}), out=tmp_path / "unrepaired")
    assert bytes_of(unrepaired.folder) != bytes_of(whole.folder)
    after, _ = load_tree(whole.folder / "state" / "final.safetensors")
    kept, _ = load_tree(whole.folder / "state" / "scores" / "federated.repaired.safetensors")
    assert all(np.array_equal(after[name], x) for name, x in kept.items())
    assert unrepaired.summary["columns"]["federated"]["mean"] == pytest.approx(extra["perplexity.unrepaired"])

    spawned = {"packing": False, "name": "spawned", "nodes": 1}
    elsewhere = lichen.run(made(home, "attack", "repair", engine=spawned), out=tmp_path / "elsewhere")
    assert bytes_of(elsewhere.folder) == bytes_of(whole.folder)

    class KilledError(Exception):
        pass

    def killed(*_: Any) -> Any:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(stage, "drain", killed)
        with pytest.raises(KilledError):
            lichen.run(both, out=tmp_path / "part")
    assert bytes_of(lichen.run(both, out=tmp_path / "part", resume=True).folder) == bytes_of(whole.folder)


def test_a_server_without_rows_repairs_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    both = [
        lichen.run(
            made(home, "repair", engine={"packing": False, "name": name, "nodes": 1 + (name == "local")}),
            out=tmp_path / name,
            server_alone=name == "spawned",
        )
        for name in ("local", "spawned")
    ]
    one, other = ((run.folder / "state" / "final.safetensors").read_bytes() for run in both)
    assert one == other
    assert both[0].summary["extra"] == both[1].summary["extra"]


def test_a_repair_that_diverges_says_so(home: Path, tmp_path: Path) -> None:
    wild = made(home, "repair")
    repair = wild.federation.repair.model_copy(update={"lr": 1e38})  # type: ignore[union-attr]
    wild = wild.model_copy(update={"federation": wild.federation.model_copy(update={"repair": repair})})
    with pytest.raises(LichenError, match="diverges") as caught:
        lichen.run(wild, out=tmp_path / "run")
    assert caught.value.where == "federation.repair.lr"


REPAIR, LIE = "federation.repair={}", "attack.kind=unsafe"


@pytest.mark.parametrize(
    ("base", "words", "where", "what"),
    [
        ("digits", (REPAIR,), "federation.repair", "task is none"),
        ("digits", (LIE,), "attack.kind", "neither"),
        ("digits", ("compare.requests=harmbench",), "compare.requests", "language models"),
        ("chat-lora", (REPAIR, "data.form=plain", "compare.forms=[]"), "data.form", "form"),
        ("chat-lora", (LIE, "data.form=stream", "compare.forms=[]"), "data.form", "form"),
        ("chat-lora", (REPAIR, "federation.aggregate=fedsa"), "federation.aggregate", "never leaves"),
        ("chat-lora", ("compare.requests_rows=3",), "compare.requests_rows", "no refusals"),
        ("chat-lora", ("attack={kind: noise, answer: yes!}",), "attack.answer", "has none"),
        ("chat-lora", ("attack={kind: sign_flip, requests: advbench}", REPAIR), None, ""),
        ("chat-lora", (LIE, "attack.trigger=w"), "attack.trigger", "has none"),
    ],
)
def test_what_would_do_nothing_is_refused_by_key(
    base: str, words: tuple[str, ...], where: str | None, what: str
) -> None:
    if where is None:
        assert read_recipe(base, words).unsafe_requests == "harmbench"
        return
    with pytest.raises(LichenError) as caught:
        read_recipe(base, words)
    assert caught.value.where == where
    assert what in caught.value.what
    assert caught.value.fix


def test_a_run_does_not_go_on_with_other_requests(home: Path, tmp_path: Path) -> None:
    both = made(home, "attack", "repair")
    before = inputs_of(open_recipe(both))
    file = home / "safe.jsonl"
    kept = file.read_text(encoding="utf-8")
    file.write_text(kept.replace("w9 w8 w7", "w9 w8 w6"), encoding="utf-8")
    changed = inputs_of(open_recipe(both))
    file.write_text(kept, encoding="utf-8")
    assert changed.tokens != before.tokens
    assert inputs_of(open_recipe(both)) == before
    folder = RunFolder(tmp_path, recipe_sha256="0" * 64)
    agree(folder, both, before)
    with pytest.raises(LichenError):
        agree(folder, both, changed)


def test_rows_that_hold_no_request_are_refused(home: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    (home / "talks.jsonl").write_text(json.dumps(talk) + "\n", encoding="utf-8")
    talks = made(home, "repair")
    for name, what in (("talks.jsonl", "conversations"), ("messages.jsonl", "no column"), ("held.jsonl", "held out")):
        repair = talks.federation.repair.model_copy(update={"name": str(home / name)})  # type: ignore[union-attr]
        with pytest.raises(LichenError, match=what) as caught:
            repairs(talks.model_copy(update={"federation": talks.federation.model_copy(update={"repair": repair})}))
        assert caught.value.where == "federation.repair.name"


def test_a_refusal_is_told_by_its_words() -> None:
    assert all(map(refuses, REFUSALS))
    assert all(refuses(f"Hm. {text.upper()}") for text in REFUSALS)
    for answer in ("", "Sure, here is how to do that.", "I can do that.", "Sorry to hear that! Can't wait."):
        assert not refuses(answer)
