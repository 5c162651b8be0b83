"""Task prefer from the recipe to the result: one trajectory, a reference scored once a row, and what is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resume
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore, load_tree
from lichen.models.preference.model import PreferenceModel
from lichen.present.clients import read_clients
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.preference import references
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.announced import Assignment
from lichen.recipes.sites.open_site import open_site
from lichen.tasks.prefer import PREFER
from support.tiny_llama import WORDS, save_model, say

CLIENTS = 5


def save_preferences(file: Path, shape: str, *, rows: int = 20) -> Path:
    """Good answers are of the first words, bad ones of the others; one client writes more than the rest."""
    lines: list[dict[str, Any]] = []
    for c in range(CLIENTS):
        rng = numpy_generator(c, "preferences")
        for row in range(rows):
            good, bad = (" ".join(rng.choice(some, 9 if c == 1 else 5)) for some in (WORDS[:20], WORDS[20:]))
            ask, who = say(rng, 3), f"person-{c}"
            if shape == "pairs":
                lines.append({"who": who, "prompt": ask, "chosen": good, "rejected": bad})
            elif shape == "turns":
                turns = [[{"role": "user", "content": ask}, {"role": "assistant", "content": x}] for x in (good, bad)]
                lines.append({"who": who, "chosen": turns[0], "rejected": turns[1]})
            else:
                lines.append({"who": who, "prompt": ask, "completion": good if row % 3 else bad, "liked": row % 3 > 0})
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    save_model(folder / "model")
    for shape in ("pairs", "turns", "rated"):
        save_preferences(folder / f"{shape}.jsonl", shape)
    return folder


def made(home: Path, kind: str, **more: Any) -> dict[str, Any]:
    """A few rounds; ``more`` are whole sections, laid over these key by key."""
    rated = kind in ("kto", "spin", "sft")
    sections: dict[str, Any] = {
        "name": "tiny",
        "task": "prefer",
        "prefer": {"kind": kind},
        "model": {"name": str(home / "model"), "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 2}},
        "data": {
            "name": str(home / ("rated.jsonl" if rated else "pairs.jsonl")),
            "columns": {"client": "who", **({"rating": "liked"} if rated else {})},
            "form": "transcript",
            "max_length": 24,
            "valid": 0.2,
            "test": 0.2,
        },
        "optimizer": {"lr": [0.02]},
        "federation": {"rounds": 2, "local_steps": 2, "batch_size": 4},
        "compare": {"baselines": []},
        "engine": {"packing": False},
    }
    for name, section in more.items():
        if section is None and name == "engine":
            del sections["engine"]
            continue
        sections[name] = {**sections.get(name, {}), **section} if isinstance(section, dict) else section
    return sections


def bytes_of(run: lichen.Result) -> dict[str, bytes]:
    return {name: data for name, data in resume.result_bytes(run.folder).items() if name != "summary.json"}


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


@pytest.mark.parametrize("kind", ["kto", "spin"])
def test_any_block_and_other_processes_give_the_same_bytes(home: Path, tmp_path: Path, kind: str) -> None:
    engines: dict[str, dict[str, Any]] = {f"block-{n}": {"clients_per_block": n} for n in (1, 3, 8)}
    if kind == "kto":
        engines["spawned"] = {"name": "spawned", "nodes": 1}
    results = {
        name: bytes_of(lichen.run(made(home, kind, engine=e), out=tmp_path / name)) for name, e in engines.items()
    }
    first = results["block-1"]
    assert "state/final.safetensors" in first
    assert {name: differing(first, result) for name, result in results.items()} == {name: [] for name in results}


class Killed(BaseException):
    """What a kill is to the process itself."""


def test_a_resumed_run_has_the_same_bytes_and_scores_no_row_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of each client goes through the reference once, over all columns, rates and the stop."""
    seen: Counter[str] = Counter()
    score = references.reference_scores

    def counted(experiment: Any, shard: Any) -> np.ndarray:
        seen["rows"] += shard.size
        return score(experiment, shard)

    monkeypatch.setattr(references, "reference_scores", counted)
    recipe = made(home, "dpo", optimizer={"lr": [0.02, 0.01]}, compare={"baselines": ["alone"]})
    whole = bytes_of(lichen.run(recipe, out=tmp_path / "whole"))
    assert seen["rows"] == 20 * CLIENTS
    save, left = RunFolder.save, [3]

    def save_and_die(folder: RunFolder, path: Path, state: object) -> None:
        save(folder, path, state)  # type: ignore[arg-type]
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save_and_die)
        with pytest.raises(Killed):
            lichen.run(recipe, out=tmp_path / "cut")
    resumed = bytes_of(lichen.run(recipe, out=tmp_path / "cut", resume=True))
    assert differing(whole, resumed) == []
    assert seen["rows"] == 2 * 20 * CLIENTS
    stored = ClientStore(tmp_path / "cut" / "state" / "reference" / "train").load((0,), 0)
    assert stored is not None
    assert stored["scores"].shape == (1, 12, 2)


def test_pairs_are_learned_and_the_bare_model_stands_at_chance(home: Path, tmp_path: Path) -> None:
    federation = {"rounds": 4, "local_steps": 4}
    result = lichen.run(made(home, "dpo", federation=federation, compare={"baselines": ["base"]}), out=tmp_path / "run")
    summary = result.summary
    assert (summary["task"], summary["metric"], summary["higher_is_better"]) == ("prefer", "preference", True)
    assert summary["columns"]["base"]["mean"] == 0.5
    assert summary["columns"]["federated"]["mean"] > 0.8
    extra = summary["extra"]
    assert extra["federated.preference.low"] <= extra["federated.preference"] <= extra["federated.preference.high"]
    assert extra["length.chosen"] == pytest.approx((4 * 6 + 10) / 5)  # nine words of one client, five of others, an end
    assert (result.folder / "adapter" / "adapter_config.json").exists()
    planned = lichen.plan(made(home, "dpo"))
    assert planned.seconds > 0


def test_peft_ranks_as_the_run_does(home: Path, tmp_path: Path) -> None:
    """The exported adapter in PEFT gives the margins that the score was made of."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lichen.core import tree as trees
    from lichen.core.wire.shared import Shared

    recipe = made(home, "dpo", federation={"rounds": 3, "local_steps": 4})
    folder = lichen.run(recipe, out=tmp_path / "run").folder
    experiment = with_references(open_recipe(read_recipe(recipe)).experiment, None)
    shared = Shared.of_flat(load_tree(folder / "state" / "final.safetensors")[0])
    bare = AutoModelForCausalLM.from_pretrained(home / "model")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "model"), folder / "adapter").eval()
    shard, model = experiment.clients.test[1], experiment.model
    assert isinstance(model, PreferenceModel)
    (batch,) = experiment.evaluating([shard]).batches((0,), 0)
    (rows,) = model.scored(trees.expand(shared.trainable, 1), {}, batch, learns=False)
    ours = (rows.reward_R - rows.second_reward_R)[: shard.size]

    def logs(net: Any, which: str) -> torch.Tensor:
        names = ("input_ids_CBT", "labels_CBT") if not which else ("second_ids_CBT", "second_labels_CBT")
        mask = batch["attention_mask_CBT" if not which else "second_mask_CBT"][0]
        ids, labels = (batch[name][0] for name in names)
        with torch.no_grad():
            log = net(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        next_BT = labels[:, 1:]
        each = log.gather(-1, next_BT.clamp(min=0)[..., None])[..., 0]
        return torch.where(next_BT == -100, 0.0, each).sum(1)

    margin = (logs(tuned, "") - logs(bare, "")) - (logs(tuned, "second") - logs(bare, "second"))
    assert float(ours.abs().max()) > 0.1
    assert torch.allclose(ours, margin[: shard.size], atol=1e-4)


@pytest.mark.parametrize("kind", ["orpo", "simpo", "sft"])
@pytest.mark.parametrize(
    "more", [{"model": {"adapter": {"kind": "full"}}, "engine": None}, {"engine": {"packing": True}}]
)
def test_other_losses_and_models_run(home: Path, tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    summary = lichen.run(made(home, kind, **more), out=tmp_path / "run").summary
    assert 0 <= summary["columns"]["federated"]["mean"] <= 1


def test_pairs_as_turns_are_the_pairs_as_texts(home: Path) -> None:
    """TRL's lists of turns: only the last answer has labels."""
    data = {"name": str(home / "turns.jsonl"), "form": "messages", "max_length": 32}
    turns = open_recipe(read_recipe(made(home, "dpo", data=data))).experiment.clients.train
    texts = {"form": "chat", "max_length": 32}
    plain = open_recipe(read_recipe(made(home, "dpo", data=texts))).experiment.clients.train
    for a, b in zip(turns, plain, strict=True):
        assert [x.tolist() for x in a.input_ids] == [x.tolist() for x in b.input_ids]  # type: ignore[union-attr]
        assert [x.tolist() for x in a.labels] == [x.tolist() for x in b.labels]
        for shard in (a, b):
            assert shard.compared.second is not None  # type: ignore[union-attr]


def test_own_answers_follow_from_seed_and_row_and_end_as_the_clients_do(home: Path, tmp_path: Path) -> None:
    def seconds(seed: int) -> list[list[int]]:
        experiment = open_recipe(read_recipe(made(home, "spin", seed=seed))).experiment
        shard = with_references(experiment, tmp_path / str(seed)).clients.test[0]
        return [x.tolist() for x in shard.compared.second().input_ids]  # type: ignore[union-attr, misc]

    first, other = seconds(0), seconds(1)
    assert first == seconds(0)
    assert first != other
    assert all(len(row) <= 24 for row in first)


Change = Callable[[list[dict[str, Any]]], None]


def spoil(home: Path, folder: Path, shape: str, change: Change) -> dict[str, Any]:
    rows = [json.loads(line) for line in (home / f"{shape}.jsonl").read_text(encoding="utf-8").splitlines()]
    change(rows)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return {"name": str(folder / "rows.jsonl")}


def every(key: str, value: Any) -> Change:
    return lambda rows: [row.update({key: value}) for row in rows] and None


@pytest.mark.parametrize(
    ("kind", "shape", "change", "fault"),
    [
        ("kto", "rated", every("liked", True), r"data\.columns\.rating: every rating is 1"),
        ("kto", "rated", every("liked", None), r"data\.columns\.rating: kto learns from rows that are good or bad"),
        ("kto", "rated", every("liked", "nice"), r"row 1: column 'liked' holds 'nice', which is no rating"),
        ("kto", "rated", lambda rows: rows[0].update(liked=3), r"prefer\.good: ratings go from 0 to 3"),
        (
            "dpo",
            "pairs",
            lambda rows: [r.update(rejected=r["chosen"]) for r in rows] and None,
            "no row has a chosen and",
        ),
        ("dpo", "pairs", lambda rows: [row.pop("rejected") for row in rows] and None, r"columns\.rejected: dpo learns"),
        ("dpo", "turns", lambda rows: rows[0]["rejected"].pop(), "is of role user, and an answer is the assistant's"),
        ("dpo", "turns", lambda rows: rows[0].update(rejected="no"), "column 'rejected' holds texts"),
    ],
)
def test_rows_that_say_nothing_are_refused(
    home: Path, tmp_path: Path, kind: str, shape: str, change: Change, fault: str
) -> None:
    data = spoil(home, tmp_path, shape, change)
    form = {"form": "messages"} if shape == "turns" else {}
    with pytest.raises(LichenError, match=fault):
        open_recipe(read_recipe(made(home, kind, data={**data, **form})))


@pytest.mark.parametrize("shape", ["pairs", "turns"])
def test_pairs_of_which_none_is_better_are_left_out_and_counted(home: Path, tmp_path: Path, shape: str) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        empty: Any = "" if shape == "pairs" else []
        rows[0].update(rejected=rows[0]["chosen"])
        rows[1].update(rejected=empty)
        rows[2].update(rejected=None)
        rows[30].update(chosen=empty)
        if shape == "pairs":
            rows[40].update(rejected=f"{rows[40]['chosen']} ")

    form = {"form": "messages"} if shape == "turns" else {}
    data = spoil(home, tmp_path, shape, change)
    loaded = open_recipe(read_recipe(made(home, "dpo", data={**data, **form})), report_counts=True)
    assert loaded.read is not None
    left = {one["why"]: one["rows"] for one in loaded.read["left"]}
    same, absent = left.pop("rows with two equal answers"), sum(left.values())
    assert (same, absent) == ((2, 3) if shape == "pairs" else (1, 3))
    parts = loaded.experiment.clients
    rows = sum(shard.size for part in (parts.train, parts.valid, parts.test) for shard in part)
    assert rows == 20 * CLIENTS - same - absent


def test_a_client_with_nothing_to_rank_counts_in_no_mean(home: Path, tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows[:20]:
            row.update(liked=True)

    data = spoil(home, tmp_path, "rated", change)
    compare = {"baselines": ["base", "alone"]}
    result = lichen.run(made(home, "kto", data=data, compare=compare), out=tmp_path / "run")
    summary, rows = result.summary, read_clients(result.folder)
    assert [row["federated"] is None for row in rows] == [True, *[False] * (CLIENTS - 1)]
    for name in ("base", "alone", "federated"):
        known = [row[name] for row in rows if row[name] is not None]
        assert len(known) == CLIENTS - 1
        assert summary["columns"][name]["mean"] == pytest.approx(sum(known) / len(known))
        assert summary["extra"][f"{name}.scores"] == f"of {CLIENTS - 1} of {CLIENTS} clients; the others have none"
    better = [row for row in rows if row["federated"] is not None and row["federated"] > row["alone"]]
    assert summary["share_gaining"] == pytest.approx(len(better) / (CLIENTS - 1))
    assert summary["gains"]["federated"]["alone"]["clients"] == CLIENTS - 1
    low, high = (summary["extra"][f"federated.preference.{end}"] for end in ("low", "high"))
    assert 0 <= low <= summary["extra"]["federated.preference"] <= high <= 1


def test_where_nobody_has_anything_to_rank_there_is_no_number(home: Path, tmp_path: Path) -> None:
    """Bad rows are one a client, and stay where they are learned."""

    def change(rows: list[dict[str, Any]]) -> None:
        for at, row in enumerate(rows):
            row.update(liked=at % 20 > 0)

    data = {**spoil(home, tmp_path, "rated", change), "test": 0.05, "valid": 0.0}
    summary = lichen.run(made(home, "kto", data=data), out=tmp_path / "run").summary
    assert summary["columns"]["federated"] is None
    assert summary["extra"]["federated.preference"] is None
    assert summary["extra"]["federated.scores"] == f"of 0 of {CLIENTS} clients; the others have none"
    assert summary["extra"]["federated.perplexity"] > 1


def test_scores_say_when_there_is_none_and_when_a_model_has_diverged() -> None:
    one, none, broken = (torch.tensor([x, y]) for x, y in ((1.0, 0.0), (0.0, 0.0), (math.nan, 0.0)))
    pairs = {"right": one, "likelier": one, "pairs": one, "nll": broken, "tokens": one}
    for name in ("preference", "likelihood"):
        value, absent = PREFER.metric_of(name).values(pairs).tolist()
        assert (value, math.isnan(absent)) == (1.0, True)
    worst, absent = PREFER.metric_of("perplexity").values(pairs).tolist()
    assert (worst, math.isnan(absent)) == (math.inf, True)
    bad_K, good_K = (torch.nn.functional.one_hot(torch.tensor([k, 3]), 5).double() for k in (1, 2))
    rated = {"good_K": good_K, "bad_K": bad_K * (one > 0)[:, None], "tokens": none, "nll": none}
    assert PREFER.metric_of("preference").values(rated)[0] == 1.0
    assert PREFER.metric_of("preference").values(rated)[1].isnan()


@pytest.mark.parametrize(
    ("kind", "more", "fault"),
    [
        ("kto", {"prefer": {"good": 2, "bad": 0}}, r"prefer\.good: no row is good: ratings go from 0 to 1"),
        ("kto", {"prefer": {"min_bad": 9}}, r"prefer\.min_bad: no client has 0 good and 9 bad rows"),
    ],
)
def test_bounds_that_leave_nobody_are_refused(home: Path, kind: str, more: dict[str, Any], fault: str) -> None:
    with pytest.raises(LichenError, match=fault):
        open_recipe(read_recipe(made(home, kind, **more)))


@pytest.mark.parametrize(
    ("kind", "more", "fault"),
    [
        ("kto", {"federation": {"batch_size": 3}}, r"federation\.batch_size: kto holds rewards against a mean"),
        ("kto", {"federation": {"gradient_accumulation_steps": 2}}, r"gradient_accumulation_steps: kto's loss"),
        ("dpo", {"prefer": {"gamma": 2.0}}, r"prefer\.gamma: dpo has none"),
        ("dpo", {"prefer": {"good": 2.0}}, r"prefer: good is set alone"),
        ("dpo", {"data": {"form": "stream"}}, r"data\.form: a stream has no single answers"),
        ("dpo", {"model": {"name": None, "student": {"kind": "text-cnn"}}}, r"model\.student: task prefer adapts"),
        (
            "dpo",
            {"privacy": {"unit": "row", "sigma": 1.0, "clip": 1.0}, "federation": {"weighting": "uniform"}},
            r"privacy\.unit: rows are clipped one by one",
        ),
        ("dpo", {"task": "chat"}, r"prefer: task chat learns no preferences"),
        ("dpo", {"prefer": None}, r"prefer: task prefer learns by a loss of preferences"),
        ("dpo", {"compare": {"metric": "macro_f1"}}, r"compare\.metric: does not fit task prefer"),
        ("dpo", {"personal": {"kind": "feddpa"}}, r"personal\.kind: two adapters side by side"),
    ],
)
def test_keys_that_do_not_go_with_it_are_refused(home: Path, kind: str, more: dict[str, Any], fault: str) -> None:
    with pytest.raises(LichenError, match=fault):
        read_recipe(made(home, kind, **more))


def test_init_writes_a_recipe_that_runs(home: Path, tmp_path: Path) -> None:
    from lichen.recipes.init.init import guess

    found = guess(home / "turns.jsonl")
    (tmp_path / "recipe.yaml").write_text(found.recipe(), encoding="utf-8")
    recipe = lichen.read_recipe(
        tmp_path / "recipe.yaml",
        [f"model.name={home / 'model'}", "federation.rounds=1", "federation.local_steps=1", "compare.baselines=[]"],
    )
    assert (recipe.task, recipe.data.form, recipe.preference.kind) == ("prefer", "messages", "dpo")
    assert lichen.run(recipe, out=tmp_path / "run").summary["metric"] == "preference"


def test_a_site_scores_its_own_rows_as_a_simulation_does(home: Path, tmp_path: Path) -> None:
    """Its clients at their places in a roster of other sites; the scores lie in the site's own state."""
    recipe = made(home, "kto")
    whole = with_references(open_recipe(read_recipe(recipe)).experiment, None)
    site = open_site(read_recipe(recipe), home / "rated.jsonl")
    places = Assignment(numbers=tuple(range(1, CLIENTS + 1)), clients=CLIENTS + 1)
    task = site.join(places, tmp_path).client_tasks()["train lr=0.02"]
    for client in (0, 3):
        mine = next(iter(task.source.batches((client + 1,), 0)))
        shard = whole.clients.train[client]
        known = shard.compared.reference()  # type: ignore[union-attr, misc]
        assert np.array_equal(mine["reference_CB2"][0].numpy(), known[mine["index_CB"][0].numpy()])
    assert ClientStore(tmp_path / "reference" / "train").load((1,), 0) is not None
