"""What was read is told: every row that was found goes on or is left out with a reason, on screen and in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.present.reading import reading_lines
from lichen.present.summary import read_summary
from lichen.recipes.rows.prepare import gather, gather_all
from lichen.recipes.rows.public import PublicSplit, split_public
from lichen.recipes.rows.reading import read_of
from lichen.recipes.schema.recipe import Recipe
from support.tiny_llama import recipe, save_model, save_rows

COLUMNS = {"client": "who", "text": "said", "label": "mood"}


def rows_of(shared: int = 0) -> list[dict[str, Any]]:
    """Thirty clients: every third has one label, every fifth few rows, and all hold ``shared`` rows in common."""
    rows: list[dict[str, Any]] = []
    for c in range(30):
        for i in range(4 if c % 5 == 0 else 30):
            text = f"common words {i}" if i < shared else f"words {c} {i}"
            label = "ab"[i % 2] if i < shared or c % 3 else "a"
            rows.append({"who": f"p{c:02d}", "said": text, "mood": label, "talk": f"t{i // 2}"})
    return [*rows, *({"who": "p01", "said": " ", "mood": "a"} for _ in range(7))]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def recipe_of(file: Path, task: str = "classify", columns: dict[str, str] | None = None, **data: Any) -> Recipe:
    plain = {"name": str(file), "columns": columns or COLUMNS, "on_single_class": "drop", "on_too_few_rows": "drop"}
    return lichen.read_recipe({"task": task, "model": {"name": "tiny"}, "data": {**plain, **data}})


def read(made: Recipe) -> tuple[dict[str, Any], PublicSplit]:
    gathered = gather_all(made)
    public_split = split_public(made, gathered.records)
    return read_of(made, gathered, public_split, None).as_dict(), public_split


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"min_rows": 10, "max_clients": 7},
        {"max_rows": 12, "test_rows": 2},
        {"on_too_few_rows": "drop", "valid": 0.3, "test": 0.3, "columns": {**COLUMNS, "group": "talk"}},
        {"copies": "drop"},
        {"copies": "drop", "max_clients": 5, "min_rows": 6},
        {"public": {"share": 0.3, "labelled": 20, "unlabelled": 30}, "copies": "drop"},
        {"labels": 4},
        {"classes": ["a"], "on_single_class": "keep"},
        {"partition": {"by": "iid", "clients": 4}, "columns": {"text": "said", "label": "mood"}},
        {
            "partition": {"by": "dirichlet", "clients": 4, "alpha": 0.3},
            "columns": {"text": "said", "label": "mood", "group": "talk"},
            "test_rows": 9,
            "public": {"share": 0.3, "labelled": 20, "unlabelled": 30},
        },
    ],
)
@pytest.mark.parametrize("shared", [0, 8])
def test_every_row_goes_on_or_is_left_out_for_a_reason(tmp_path: Path, data: dict[str, Any], shared: int) -> None:
    rows = rows_of(shared)
    found, public_split = read(recipe_of(write(tmp_path, rows), **data))
    used = {name: found["used"][name] for name in ("train", "valid", "test", "unlabelled", "public")}
    assert found["rows"] == len(rows)
    assert sum(used.values()) + sum(left["rows"] for left in found["left"]) == len(rows)
    assert {"why": "rows without text", "rows": 7, "clients": 0} in found["left"]
    drawn = "partition" in data
    if not drawn and "public" not in data:
        assert found["used"]["clients"] + sum(left["clients"] for left in found["left"]) == found["clients"] == 30
    assert used["train"] + used["unlabelled"] == sum(
        len(client_data.train) for client_data in public_split.clients_data
    )
    assert used["test"] == (
        len(public_split.clients_data[0].test) if drawn else sum(len(o.test) for o in public_split.clients_data)
    )


def test_clients_of_one_class_are_told_and_not_lost(tmp_path: Path) -> None:
    found, _ = read(recipe_of(write(tmp_path, rows_of())))
    why = "clients whose rows all have one label (data.on_single_class: drop)"
    assert {"why": why, "rows": 2 * 4 + 8 * 30, "clients": 10} in found["left"]
    assert any("10 clients: " + why in line for line in reading_lines(found))
    with pytest.raises(LichenError, match="10 of 30 clients have rows of one label only") as told:
        read(recipe_of(tmp_path / "rows.jsonl", on_single_class="refuse"))
    assert told.value.where == "data.on_single_class"
    single = [{"who": f"p{c}", "said": f"words {c} {i}", "mood": "ab"[c]} for c in range(2) for i in range(9)]
    with pytest.raises(LichenError, match="each of the 2 clients"):
        read(recipe_of(write(tmp_path, single)))


def test_copies_among_clients_are_counted_and_can_be_taken_out(tmp_path: Path) -> None:
    file = write(tmp_path, rows_of(10))
    found, plain = read(recipe_of(file))
    trained = {o.name: {r.text for r in o.train} for o in plain.clients_data}
    seen = [
        sum(any(r.text in texts for name, texts in trained.items() if name != o.name) for r in o.test)
        for o in plain.clients_data
    ]
    tested = sum(len(o.test) for o in plain.clients_data)
    assert found["copies"] == {"rows": sum(seen), "test_rows": tested, "clients": sum(n > 0 for n in seen)}
    assert sum(seen) > 20
    kept, same = read(recipe_of(file, copies="keep"))
    assert kept["copies"] is None
    assert same.clients_data == plain.clients_data
    dropped, clean = read(recipe_of(file, copies="drop"))
    assert dropped["copies"]["rows"] == 0
    by_name = {o.name: o for o in plain.clients_data}
    assert clean.clients_data
    for client_data in clean.clients_data:
        assert client_data.train == by_name[client_data.name].train  # what a client would learn from alone stays
        others = {text for name, texts in trained.items() if name != client_data.name for text in texts}
        assert client_data.test
        assert not others & {r.text for r in (*client_data.valid, *client_data.test)}
        assert {r.text for r in client_data.test} == {r.text for r in by_name[client_data.name].test} - others


def test_a_public_row_is_somebody_elses_too(tmp_path: Path) -> None:
    public = {"share": 0.4, "labelled": 100, "unlabelled": 100}
    _, public_split = read(recipe_of(write(tmp_path, rows_of(6)), public=public, copies="drop"))
    texts = {r.text for r in (*public_split.labelled, *public_split.unlabelled)}
    assert any(text.startswith("common") for text in texts)
    assert not texts & {r.text for o in public_split.clients_data for r in (*o.valid, *o.test)}


def test_clients_that_hold_the_same_rows_cannot_be_scored_without_them(tmp_path: Path) -> None:
    rows = [{"who": f"p{c}", "said": f"words {i}", "mood": "ab"[i % 2]} for c in range(6) for i in range(12)]
    with pytest.raises(LichenError, match="no other client trains on") as told:
        read(recipe_of(write(tmp_path, rows), copies="drop", on_too_few_rows="refuse"))
    assert told.value.where == "data.copies"
    with pytest.raises(LichenError, match="no other client trains on"):
        read(recipe_of(tmp_path / "rows.jsonl", copies="drop"))


def test_a_drawn_partition_has_no_copies_and_tells_of_clients_it_does_not_use(tmp_path: Path) -> None:
    rows = [{**row, "client": row["who"]} for row in rows_of(8)]
    drawn = {"by": "iid", "clients": 4}
    found, _ = read(recipe_of(write(tmp_path, rows), columns={"text": "said", "label": "mood"}, partition=drawn))
    assert found["copies"]["rows"] == 0
    assert found["clients"] == 0
    assert any("rows name 30 clients, which data.partition.by: iid does not use" in note for note in found["alike"])


@pytest.mark.parametrize("form", ["chat", "transcript", "messages"])
def test_rows_of_another_form_are_told(tmp_path: Path, form: str) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    whole = {"who": "a", "messages": talk} if form != "messages" else {"who": "a", "text": "hello"}
    file = write(tmp_path, [whole] * 3)
    made = recipe_of(file, "chat", {"client": "who"}, form=form)
    with pytest.raises(LichenError, match="conversations") as told:
        gather(made)
    assert told.value.where == "data.form"
    both = [{"who": "a", "messages": talk, "text": ""}, {"who": "a", "messages": [], "text": "hello"}]
    found = gather_all(recipe_of(write(tmp_path, both), "chat", {"client": "who"}, form=form))
    assert len(found.records) == 1
    assert found.left[0].rows == 1


def test_the_folder_the_report_and_the_plan_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model")
    file = save_rows(tmp_path / "rows.jsonl", "pair")
    made = recipe(tmp_path / "model", file, "pair", data={"max_length": 12}, federation={"rounds": 1, "local_steps": 1})
    said: list[str] = []
    result = lichen.run(made, out=tmp_path / "run", say=said.append)
    found = read_summary(result.folder)["read"]
    assert (found["rows"], found["clients"], found["used"]["clients"]) == (50, 5, 5)
    assert found["lengths"]["rows"] == 50
    assert found["lengths"]["cut_answer"] >= 10  # one of the five speaks in fifteen words
    assert "what was read" in said
    cut = next(line for line in said if line.startswith("  cut"))
    assert "to 12 tokens (data.max_length)" in cut
    assert "lose part of the answer" in cut
    assert cli.main(["report", str(result.folder)]) == 0
    told = capsys.readouterr().out
    assert "read: cut" in told
    assert "test rows that others train on" in told
    old = json.loads((result.folder / "summary.json").read_text())
    del old["read"]
    (result.folder / "summary.json").write_text(json.dumps(old))
    (result.folder / "manifest.json").unlink()
    assert cli.main(["report", str(result.folder)]) == 0  # a summary of an older run
    capsys.readouterr()
    written = lichen.read_recipe(made)
    (tmp_path / "recipe.yaml").write_text(json.dumps(written.model_dump(mode="json")))
    assert cli.main(["plan", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["read"] == found
    assert "what was read" in streams.err
