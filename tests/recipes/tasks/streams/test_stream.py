"""Streams: periods one after the other, each an ordinary run, scored before it is trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.present.clients import read_clients
from lichen.present.trace import read_trace
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.rows.prepare import gather_periods
from lichen.recipes.rows.public import split_public
from lichen.recipes.schema.read import read_recipe
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import save_model

REPLAY = {"replay": 0.4, "replay_share": 0.25}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    save_model(folder / "model")
    for count in (1, 2, 3):
        save_dated(folder / f"rows{count}.jsonl", MONTHS[:count])
    return folder


@pytest.fixture(scope="module")
def whole(home: Path) -> lichen.Result:
    """Three months, from the start to the end."""
    return lichen.run(stream(home / "model", home / "rows3.jsonl", stream=REPLAY), out=home / "whole")


def files(folder: Path) -> dict[str, bytes]:
    """What of a period follows from recipe and rows: its tensors, scores and clients, and who took part."""
    names = ("state/final.safetensors", "adapter/adapter_model.safetensors", "clients.csv", "roster.json")
    return {name: (folder / name).read_bytes() for name in names}


def scores(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "state" / "scores").glob(pattern))}


def loss(folder: Path, model: str, month: str) -> float:
    tree, _ = load_tree(folder / f"state/scores/stream.valid.{model}.on.{month}.safetensors")
    return float(tree["loss_sum"].sum() / tree["count"].sum())


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "periods.json").read_text())
    return {
        **found,
        "periods": [{k: v for k, v in one.items() if k != "record_sha256"} for one in found["periods"]],
    }


def test_a_stream_says_who_was_there_and_scores_every_model_on_every_period(whole: lichen.Result) -> None:
    found = told(whole.folder)
    assert [one["name"] for one in found["periods"]] == list(MONTHS[:3])
    assert [sorted(one["clients"]) for one in found["periods"]] == [
        ["person-0", "person-1", "person-2"],
        ["person-0", "person-1", "person-3"],
        ["person-0", "person-2", "person-3"],
    ]
    matrix = found["matrix"]
    assert [len(row) for row in matrix] == [3] * 4
    assert found["prequential"] == [matrix[0][0], matrix[1][1], matrix[2][2]]
    for number, month in enumerate(MONTHS[:3]):  # a model after its period is what the period's own run was scored with
        own = lichen.report(whole.folder / "periods" / month).runs[0].summary["columns"]["federated"]["mean"]
        assert own == pytest.approx(matrix[number + 1][number], rel=1e-12)
    assert whole.summary["clients"] == 4
    assert {"base", "federated", "pooled", "alone"} == set(whole.summary["columns"])
    assert set(whole.summary["extra_columns"]) == {"after", "last"}
    assert whole.summary["extra"]["stream.forgetting"] == found["mean_forgetting"]
    last = whole.folder / "periods" / MONTHS[2] / "state" / "final.safetensors"
    assert (whole.folder / "state" / "final.safetensors").read_bytes() == last.read_bytes()
    assert (whole.folder / "periods.png").exists()
    assert verify(whole.folder).files > verify(whole.folder / "periods" / MONTHS[0]).files


def test_a_clients_column_is_over_its_rows_of_all_periods(whole: lichen.Result) -> None:
    columns: dict[str, Callable[[int], str]] = {
        "federated": lambda number: (["start", *MONTHS])[number],
        "after": lambda number: MONTHS[number],
        "last": lambda number: MONTHS[2],
    }
    for column, model in columns.items():
        sums: dict[str, list[float]] = {}
        for number, month in enumerate(MONTHS[:3]):
            tree, _ = load_tree(whole.folder / f"state/scores/stream.test.{model(number)}.on.{month}.safetensors")
            names = [row["client"] for row in read_clients(whole.folder / "periods" / month)]
            for name, loss, count in zip(names, tree["loss_sum"], tree["count"], strict=True):
                one = sums.setdefault(name, [0.0, 0.0])
                one[0], one[1] = one[0] + float(loss), one[1] + float(count)
        for row in whole.clients():
            loss, count = sums[row["client"]]
            assert row[column] == pytest.approx(float(torch.exp(torch.tensor(loss / count, dtype=torch.float64))))


def test_clients_train_again_on_rows_of_their_own_past_alone(home: Path) -> None:
    recipe = read_recipe(stream(home / "model", home / "rows3.jsonl", stream={**REPLAY, "period": MONTHS[2]}))
    loaded = open_recipe(recipe)
    bare = read_recipe(stream(home / "model", home / "rows3.jsonl"))
    gathered, waiting = gather_periods(bare)
    assert waiting == 0
    past: dict[str, set[str]] = {}
    for month in MONTHS[:2]:
        for one in split_public(bare, gathered[month].records).clients_data:
            past.setdefault(one.name, set()).update(row.text for row in one.train)
    own = {one.name: one for one in split_public(bare, gathered[MONTHS[2]].records).clients_data}
    assert {one.name for one in loaded.clients_data} == set(own)
    for one in loaded.clients_data:
        assert (one.valid, one.test) == (own[one.name].valid, own[one.name].test)
        count = len(own[one.name].train)
        assert one.train[:count] == own[one.name].train
        again = one.train[count:]
        assert len(again) == round(count / 3)  # a quarter of both
        assert {row.text for row in again} <= past[one.name]
        assert {row.client for row in again} == {one.name}


def test_a_stream_of_one_period_is_an_ordinary_run(home: Path, tmp_path: Path) -> None:
    sections = stream(home / "model", home / "rows1.jsonl")
    lines: list[str] = []
    streamed = lichen.run(sections, out=tmp_path / "stream", say=lines.append)
    assert any("one period only" in line for line in lines)
    del sections["stream"]
    plain = lichen.run(sections, out=tmp_path / "plain")
    inside = tmp_path / "stream" / "periods" / MONTHS[0]
    assert files(inside) == files(plain.folder)
    assert (inside / "adapter/adapter_config.json").read_bytes() == (
        plain.folder / "adapter/adapter_config.json"
    ).read_bytes()
    assert lichen.report(inside).runs[0].summary["columns"] == plain.summary["columns"]
    assert streamed.summary["extra_columns"]["after"] == plain.summary["columns"]["federated"]
    rounds = [[(e.report.round, e.report.metrics) for e in read_trace(run)] for run in (inside, plain.folder)]
    assert rounds[0] == rounds[1]
    (only,) = {path.name for path in (tmp_path / "stream" / "periods").iterdir()}
    assert only == MONTHS[0]


def test_stopped_at_any_line_and_given_later_rows_it_ends_in_the_same_bytes(
    home: Path, whole: lichen.Result, tmp_path: Path
) -> None:
    """First with the rows of two months, stopped a little later each time; then with those of three."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "stopped"
    shutil.copyfile(home / "rows2.jsonl", data)
    sections = stream(home / "model", data, stream=REPLAY)
    stops = 0

    def until(lines: int) -> Callable[[str], None]:
        left = [lines]

        def say(line: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        return say

    for lines in range(2, 60, 3):
        try:
            lichen.run(sections, out=out, resume=out.exists(), say=until(lines))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    early = lichen.run(sections, out=out, resume=True)
    before = {path: path.read_bytes() for path in sorted((out / "periods").rglob("*")) if path.is_file()}
    was = told(out)
    with open(data, "a", encoding="utf-8") as file:
        file.write((home / "rows3.jsonl").read_text().removeprefix((home / "rows2.jsonl").read_text()))
    later = lichen.run(sections, out=out, resume=True)
    assert early.summary["extra"]["stream.periods"] == 2
    assert later.summary["extra"]["stream.periods"] == 3
    assert {path: path.read_bytes() for path in before} == before
    now = told(out)
    assert now == told(whole.folder)
    assert now["periods"][:2] == was["periods"]
    assert now["prequential"][:2] == was["prequential"]
    for month in MONTHS[:3]:
        assert files(out / "periods" / month) == files(whole.folder / "periods" / month)
    assert scores(out, "stream.*") == scores(whole.folder, "stream.*")
    assert later.summary["columns"] == whole.summary["columns"]
    verify(out)
    with pytest.raises(LichenError, match="has no row of 2018-06 now") as caught:
        lichen.run({**sections, "data": {**sections["data"], "name": str(home / "rows2.jsonl")}}, out=out, resume=True)
    assert caught.value.where == str(home / "rows2.jsonl")
    lines_of = data.read_text().splitlines()
    data.write_text("\n".join([lines_of[0].replace('"reply": "', '"reply": "w1 '), *lines_of[1:]]) + "\n")
    with pytest.raises(LichenError, match="was trained on other rows"):
        lichen.run(sections, out=out, resume=True)
    early_rows = [line.replace("2018-04", "2018-03") for line in lines_of if "2018-04" in line]
    data.write_text("\n".join([*early_rows, *lines_of]) + "\n")
    with pytest.raises(LichenError, match="has rows of 2018-03 now, which is before 2018-06"):
        lichen.run(sections, out=out, resume=True)
    with pytest.raises(LichenError, match="rounds are those of each period"):
        lichen.run({**sections, "federation": {**sections["federation"], "rounds": 9}}, out=out, resume=True)


def test_a_period_that_was_killed_while_its_last_files_were_written_is_not_finished(
    home: Path, whole: lichen.Result, tmp_path: Path
) -> None:
    out = tmp_path / "moved"
    shutil.copytree(whole.folder, out)
    inside = out / "periods" / MONTHS[2]
    for file in ("manifest.json", "record.json", "clients.csv"):
        (inside / file).unlink()
    for file in ("manifest.json", "summary.json"):
        (out / file).unlink()
    found = lichen.run(stream(home / "model", home / "rows3.jsonl", stream=REPLAY), out=out, resume=True)
    assert files(inside) == files(whole.folder / "periods" / MONTHS[2])
    assert found.summary["columns"] == whole.summary["columns"]
    assert told(out) == told(whole.folder)
    assert verify(inside).rounds == 2


def test_a_result_that_is_worse_is_rolled_back_and_restarting_forgets_what_was_learned(
    home: Path, tmp_path: Path
) -> None:
    wild = {"optimizer": {"lr": [20.0]}}
    back = lichen.run(
        stream(home / "model", home / "rows2.jsonl", stream={"react": "roll-back"}, **wild), out=tmp_path / "back"
    )
    found, model = told(back.folder), "start"
    for number, (month, one) in enumerate(zip(MONTHS, found["periods"], strict=False)):
        before, after = (loss(back.folder, name, month) for name in (model, month))
        assert (one["rolled_back"] is not None) == (after > before)
        begun = read_recipe(back.folder / "periods" / month / "recipe.yaml").model.adapter.init_from
        assert begun == (None if model == "start" else str((back.folder / "periods" / model / "adapter").absolute()))
        model = month if after <= before else model
        assert one["in_force"] == model
        assert found["matrix"][number + 1] != found["matrix"][number] or one["rolled_back"]
    rolled = [one["name"] for one in found["periods"] if one["rolled_back"]]
    assert rolled[0] == MONTHS[0]
    assert back.summary["extra"]["stream.rolled back"] == ", ".join(rolled)
    assert found["matrix"][1] == found["matrix"][0]
    general = {
        "stream": {"react": "roll-back", "keep": {"recent": 1e9, "general": 0.0}},
        "compare": {"retention_text": str(home / "general.jsonl"), "retention_rows": 8},
    }
    (home / "general.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w5 w6 w7 w8"}\n')
    text = lichen.run(stream(home / "model", home / "rows1.jsonl", **general, **wild), out=tmp_path / "general")
    (only,) = told(text.folder)["periods"]
    assert text.adapter is None
    assert text.summary["extra"]["forgotten.after"] == text.summary["extra"]["forgotten.before"]
    assert only["rolled_back"].startswith(f"the perplexity of {home / 'general.jsonl'} is ")
    again = lichen.run(stream(home / "model", home / "rows2.jsonl", stream={"react": "restart"}), out=tmp_path / "anew")
    second = again.folder / "periods" / MONTHS[1]
    assert read_recipe(second / "recipe.yaml").model.adapter.init_from is None
    assert [one["in_force"] for one in told(again.folder)["periods"]] == list(MONTHS[:2])


def test_a_class_without_rows_in_a_period_is_a_class_there(home: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (home / "rows2.jsonl").read_text().splitlines()]
    for row in rows[-3:]:
        row["mood"] = "sad"
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    columns = {"client": "who", "text": "reply", "label": "mood", "time": "when"}
    sections = stream(home / "model", tmp_path / "rows.jsonl", stream={"replay": 0.5})
    sections |= {
        "task": "classify",
        "data": {**sections["data"], "columns": columns, "classes": ["calm", "glad", "sad"]},
    }
    del sections["data"]["form"]
    sections["federation"]["rounds"] = 1
    found = lichen.run(sections, out=tmp_path / "run")
    assert json.loads((found.folder / "classes.json").read_text()) == ["calm", "glad", "sad"]
    assert found.summary["metric"] == "macro_f1"
    assert found.summary["extra"]["stream.periods"] == 2
    with pytest.raises(LichenError, match="all periods must have the same ones"):
        read_recipe({**sections, "data": {**sections["data"], "classes": []}})


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "a row without a date": ({"data": {"name": "gap.jsonl"}}, "data.columns.time", "row 3 says not when"),
    "a date that is none": (
        {"data": {"name": "odd.jsonl"}},
        "data.columns.time",
        "row 2 has '5/2018', which is no date",
    ),
    "no length": ({"stream": {"by": "fortnight"}}, "stream.by", "is no length of a period"),
    "no whole period": ({"stream": {"by": "500 rows"}}, "stream.by", "30 rows make no whole period"),
    "nothing to replay": ({"stream": {"replay": 0.5}}, "stream.replay", "there is one period, and nothing before it"),
    "nothing before": (
        {"stream": {"replay": 0.5, "period": "2018-04"}},
        "stream.replay",
        "nothing comes before 2018-04",
    ),
    "no such period": ({"stream": {"period": "2017-04"}}, "stream.period", "has no rows of '2017-04'"),
    "no adapter of PEFT's": ({"model": {"adapter": {"kind": "bitfit"}}}, "model.adapter.kind", "has no form"),
    "a patch": ({"federation": {"aggregate": "flora"}}, "federation.aggregate", "leaves more than an adapter"),
    "masks": ({"privacy": {"secure": True}}, "privacy", "under masks nobody learns one client's score"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(home: Path, tmp_path: Path, name: str) -> None:
    more, where, what = BAD[name]
    lines = (home / "rows1.jsonl").read_text().splitlines()
    for file, at, time in (("gap.jsonl", 2, ""), ("odd.jsonl", 1, "5/2018")):
        row = {**json.loads(lines[at]), "when": time}
        (tmp_path / file).write_text("\n".join([*lines[:at], json.dumps(row), *lines[at + 1 :]]) + "\n")
    sections = {key: dict(section) for key, section in more.items()}
    file = sections.get("data", {}).pop("name", None)
    data = home / "rows1.jsonl" if file is None else tmp_path / file
    if "model" in sections:
        sections["model"] = {"name": str(home / "model"), **sections["model"]}
    with pytest.raises(LichenError, match=what) as caught:
        lichen.run(stream(home / "model", data, **sections), out=tmp_path / "out")
    assert caught.value.where.startswith(where)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_whole_stream_is_opened_by_period_alone(home: Path) -> None:
    with pytest.raises(LichenError, match="is a stream of periods") as caught:
        open_recipe(read_recipe(stream(home / "model", home / "rows2.jsonl")))
    assert "stream.period" in caught.value.fix
    with pytest.raises(LichenError, match="one period alone has none before it"):
        read_recipe(stream(home / "model", home / "rows2.jsonl", stream={"period": "2018-05", "react": "restart"}))
    with pytest.raises(LichenError, match="no row of the past is trained on again"):
        read_recipe(stream(home / "model", home / "rows2.jsonl", stream={"replay_share": 0.3}))
    with pytest.raises(LichenError, match="react: continue accepts every result"):
        read_recipe(stream(home / "model", home / "rows2.jsonl", stream={"keep": {"recent": 0.1}}))
    with pytest.raises(LichenError, match="others hold them"):
        lichen.run(stream(home / "model", home / "rows2.jsonl"), sites={"a": home / "rows2.jsonl"}, out=home / "no")


def test_a_period_in_which_nobody_has_enough_rows_is_left_out_where_clients_may_stay_out(
    home: Path, tmp_path: Path
) -> None:
    rows = (home / "rows2.jsonl").read_text().splitlines()
    some = [row for row in rows if "2018-04" not in row]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:2], *some, rows[-1].replace("2018-05", "2019-05")]) + "\n")
    sections = stream(home / "model", tmp_path / "rows.jsonl", data={"min_rows": 5})
    sections["federation"]["rounds"] = 1
    with pytest.raises(LichenError, match="no client has 5 rows; the largest has 2") as caught:
        lichen.run(sections, out=tmp_path / "refused")
    assert caught.value.where == "period 2018-04: data.min_rows"
    lines: list[str] = []
    sections["data"]["on_too_few_rows"] = "drop"
    found = lichen.run(sections, out=tmp_path / "run", say=lines.append)
    assert [one["name"] for one in told(found.folder)["periods"]] == ["2018-05"]
    assert [line.split(":")[0] for line in lines if "left out" in line and line.startswith("period")] == [
        "period 2018-04",
        "period 2019-05",
    ]
    sections["data"]["min_rows"] = 50
    with pytest.raises(LichenError, match="no client has enough rows in any period"):
        lichen.run(sections, out=tmp_path / "nobody")
    assert not (tmp_path / "nobody").exists()


def test_a_period_may_be_named_as_yaml_reads_it(home: Path) -> None:
    sections = stream(home / "model", home / "rows2.jsonl")
    assert read_recipe(sections, ["stream.by=year", "stream.period=2018"]).stream.period == "2018"  # type: ignore[union-attr]
    assert read_recipe(sections, ["stream.by=day", "stream.period=2018-05-03"]).stream.period == "2018-05-03"  # type: ignore[union-attr]
