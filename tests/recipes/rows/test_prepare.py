"""From records to owners: every client has what it needs, or one error names the key that mends it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.core.errors import LichenError
from lichen.data.sources.record import Record
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.rows.prepare import ClientData, classes_of, encode, gather, split_clients
from lichen.recipes.rows.public import split_public
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from support.tiny_llama import save_model


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def people(clients: int = 3, rows: int = 8, **fixed: Any) -> list[dict[str, Any]]:
    return [
        {"who": f"p{c}", "said": f"words {c} {r}", "mood": "ab"[r % 2], **fixed}
        for c in range(clients)
        for r in range(rows)
    ]


def recipe_of(file: Path, *, task: str = "classify", model: str = "tiny", **data: Any) -> Recipe:
    plain: dict[str, Any] = {"columns": {"client": "who", "text": "said", "label": "mood"}, "valid": 0.2, "test": 0.2}
    return read_recipe({"task": task, "model": {"name": model}, "data": {**plain, **data, "name": str(file)}})


def prepared(recipe: Recipe) -> tuple[ClientData, ...]:
    records = gather(recipe)
    classes = classes_of(recipe, records)
    clients_data = split_clients(recipe, records)
    assert recipe.task == "chat" or classes
    return clients_data


def refused(recipe: Recipe) -> LichenError:
    with pytest.raises(LichenError) as told:
        prepared(recipe)
    assert told.value.fix
    assert str(told.value).count("\n") == 1
    return told.value


@pytest.mark.parametrize("role", ["client", "text", "label"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, role: str) -> None:
    columns = {"client": "who", "text": "said", "label": "mood", role: "absent"}
    error = refused(recipe_of(write(tmp_path, people()), columns=columns))
    assert error.where == f"data.columns.{role}"
    assert "no column 'absent'" in error.what
    assert "who, said, mood" in error.fix


def test_a_label_column_is_needed_to_classify(tmp_path: Path) -> None:
    rows = [{"who": "p", "said": str(r)} for r in range(8)]
    error = refused(recipe_of(write(tmp_path, rows), columns={"client": "who", "text": "said"}))
    assert error.where == "data.columns.label"


def test_rows_without_a_label_are_refused(tmp_path: Path) -> None:
    rows = people()
    rows[5]["mood"] = None
    error = refused(recipe_of(write(tmp_path, rows)))
    assert error.where == "data.columns.label"
    assert "1 of 24 rows" in error.what


def test_only_rows_of_the_named_classes_stay(tmp_path: Path) -> None:
    rows = people()
    rows[5]["mood"], rows[6]["mood"] = None, "odd"
    recipe = recipe_of(write(tmp_path, rows), classes=["b", "a"])
    records = gather(recipe)
    assert len(records) == 22
    assert classes_of(recipe, records) == ("a", "b")
    assert [r.text for r in records] == [row["said"] for row in rows if row["mood"] in ("a", "b")]
    assert sum(len(o.train) + len(o.valid) + len(o.test) for o in prepared(recipe)) == 22


def test_a_class_that_no_row_has_is_refused(tmp_path: Path) -> None:
    error = refused(recipe_of(write(tmp_path, people()), classes=["a", "bb"]))
    assert error.where == "data.classes"
    assert "'bb'" in error.what


def test_classes_may_be_numbers(tmp_path: Path) -> None:
    rows = [{**row, "mood": 1 + i % 3} for i, row in enumerate(people())]
    records = gather(recipe_of(write(tmp_path, rows), classes=[1, 3]))
    assert Counter(r.label for r in records) == {1: 8, 3: 8}


def test_one_class_is_one_however_it_is_written(tmp_path: Path) -> None:
    rows = [{**row, "mood": (1, "1", 1.0, "2", 2)[i % 5]} for i, row in enumerate(people(rows=10))]
    recipe = recipe_of(write(tmp_path, rows), classes=[1, "2"])
    assert classes_of(recipe, gather(recipe)) == ("1", "2")
    learned = [
        r for client_data in prepared(recipe) for r in (*client_data.train, *client_data.valid, *client_data.test)
    ]
    assert Counter(str(r.label) for r in learned) == {"1": 18, "2": 12}
    classed = encode_labels(recipe, learned)
    assert Counter(classed) == {0: 18, 1: 12}


def encode_labels(recipe: Recipe, rows: list[Record]) -> list[int]:
    """The class numbers that a model without a tokenizer is given."""
    pixels = [replace(row, features=np.zeros((1, 2, 2), np.float32)) for row in rows]
    return np.asarray(encode(recipe, None, ("1", "2"))(pixels).labels).tolist()


@pytest.mark.parametrize("odd", ["None", "nan", "NA", "null"])
def test_a_class_may_bear_the_name_of_nothing(tmp_path: Path, odd: str) -> None:
    rows = [{**row, "mood": odd if row["mood"] == "a" else "b"} for row in people()]
    recipe = recipe_of(write(tmp_path, [*rows, {"who": "p0", "said": "unlabelled", "mood": None}]), classes=[odd, "b"])
    assert classes_of(recipe, gather(recipe)) == tuple(sorted([odd, "b"]))
    assert len(gather(recipe)) == 24
    assert "1 of 25 rows" in refused(recipe_of(tmp_path / "rows.jsonl")).what


def test_real_numbers_are_no_classes(tmp_path: Path) -> None:
    rows = [{**row, "mood": 0.1 + 0.37 * i} for i, row in enumerate(people(3, 14))]
    error = refused(recipe_of(write(tmp_path, rows), on_single_class="keep"))
    assert error.where == "data.columns.label"
    assert "regression" in error.what
    half_stars = [{**row, "mood": 1 + (i % 9) / 2} for i, row in enumerate(rows)]
    recipe = recipe_of(write(tmp_path, half_stars))
    assert classes_of(recipe, gather(recipe)) == ("1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5")


def test_a_class_for_nearly_every_row_is_no_class(tmp_path: Path) -> None:
    rows = [{**row, "mood": f"text {i}"} for i, row in enumerate(people(3, 14))]
    assert "42 classes in 42 rows" in refused(recipe_of(write(tmp_path, rows), on_single_class="keep")).what


def test_several_classes_a_row_are_refused_where_classes_are_learned(tmp_path: Path) -> None:
    rows = [{**row, "label": ["a", "b"]} for row in people()]
    error = refused(recipe_of(write(tmp_path, rows), columns={"client": "who", "text": "said"}))
    assert "holds a list" in error.what
    assert "'label'" in error.what
    assert prepared(recipe_of(tmp_path / "rows.jsonl", task="chat", columns={"client": "who", "text": "said"}))


def test_a_client_is_one_however_its_number_is_written(tmp_path: Path) -> None:
    rows = [{**row, "who": (1, 1.0, "1", 2)[i % 4], "group": i // 2} for i, row in enumerate(people())]
    columns = {"client": "who", "text": "said", "label": "mood"}
    clients_data = prepared(recipe_of(write(tmp_path, rows), columns=columns, on_single_class="keep", split_by="row"))
    assert [(o.name, len(o.train) + len(o.valid) + len(o.test)) for o in clients_data] == [("1", 18), ("2", 6)]


def test_rows_that_name_no_client_are_not_a_client(tmp_path: Path) -> None:
    rows = [{**row, "who": "  " if i < 5 else row["who"]} for i, row in enumerate(people())]
    error = refused(recipe_of(write(tmp_path, rows)))
    assert error.where == "data.columns.client"
    assert "5 of 24 rows" in error.what


@pytest.mark.parametrize("by", ["iid", "dirichlet"])
def test_a_named_client_column_is_never_ignored(tmp_path: Path, by: str) -> None:
    with pytest.raises(LichenError, match=r"data\.columns\.client says whose they are") as told:
        recipe_of(write(tmp_path, people()), partition={"by": by})
    assert told.value.where == "data.partition.by"
    assert "by: client" in told.value.fix


def test_one_class_in_all_is_nothing_to_learn(tmp_path: Path) -> None:
    error = refused(recipe_of(write(tmp_path, people(mood="a")), on_single_class="keep"))
    assert error.where == "data.columns.label"
    assert "1 class" in error.what


def test_a_label_nobody_has_seen_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, people()), model=str(save_model(tmp_path / "model")))
    loaded = open_recipe(recipe)
    assert loaded.classes == ("a", "b")
    with pytest.raises(LichenError, match="unknown label 'c'") as told:
        encode(recipe, loaded.tokenizer, loaded.classes)([Record(client="p", text="w1", label="c")])
    assert told.value.where == "data.columns.label"


def test_rows_of_one_file_need_a_client_column(tmp_path: Path) -> None:
    rows = [{"said": f"words {r}", "mood": "ab"[r % 2]} for r in range(12)]
    columns = {"text": "said", "label": "mood"}
    error = refused(recipe_of(write(tmp_path, rows), columns=columns))
    assert error.where == "data.columns.client"
    drawn = recipe_of(write(tmp_path, rows), columns=columns, partition={"by": "iid", "clients": 2})
    assert len(prepared(drawn)) == 2


def test_a_folder_with_a_file_a_client_needs_none(tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, people(1)).rename(tmp_path / f"{name}.jsonl")
        (tmp_path / name).rmdir()
    clients_data = prepared(recipe_of(tmp_path, columns={"text": "said", "label": "mood"}))
    assert [o.name for o in clients_data] == ["ann", "bob"]


@pytest.mark.parametrize("task", ["classify", "chat"])
@pytest.mark.parametrize(("rows", "key"), [(1, "data.valid"), (2, "data.valid")])
def test_a_client_too_small_to_split_is_named(tmp_path: Path, task: str, rows: int, key: str) -> None:
    small = [{"who": "tiny", "said": f"mine {r}", "mood": "ab"[r % 2]} for r in range(rows)]
    file = write(tmp_path, people() + small)
    error = refused(recipe_of(file, task=task, on_single_class="keep"))
    assert error.where == key
    assert "client 'tiny' has" in error.what
    for way in ({"min_rows": rows + 1}, {"on_too_few_rows": "drop"}):
        assert [o.name for o in prepared(recipe_of(file, task=task, on_single_class="keep", **way))] == [
            "p0",
            "p1",
            "p2",
        ]


def test_no_client_with_enough_rows_is_refused(tmp_path: Path) -> None:
    error = refused(recipe_of(write(tmp_path, people()), min_rows=9))
    assert error.where == "data.min_rows"
    assert "the largest has 8" in error.what


def test_clients_of_one_class_are_refused_dropped_or_kept(tmp_path: Path) -> None:
    file = write(tmp_path, people() + [{"who": "same", "said": f"mine {r}", "mood": "a"} for r in range(8)])
    error = refused(recipe_of(file))
    assert error.where == "data.on_single_class"
    assert "client 'same'" in error.what
    assert [o.name for o in prepared(recipe_of(file, on_single_class="drop"))] == ["p0", "p1", "p2"]
    assert [o.name for o in prepared(recipe_of(file, on_single_class="keep"))] == ["p0", "p1", "p2", "same"]


def test_a_classifier_without_a_token_to_pad_with_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, people())
    bare = save_model(tmp_path / "bare", without=("pad_token", "eos_token"))
    with pytest.raises(LichenError, match="no pad token") as told:
        open_recipe(recipe_of(file, model=str(bare)))
    assert told.value.where == "model.name"
    ends = save_model(tmp_path / "ends", without=("pad_token",))
    loaded = open_recipe(recipe_of(file, model=str(ends)))
    assert loaded.experiment.server.pad == loaded.tokenizer.eos_token_id  # the end token serves


@pytest.mark.parametrize("by", ["dirichlet", "iid"])
def test_drawn_clients_share_one_test_set_with_a_share_of_each_class(by: str) -> None:
    skew = ["data.partition.alpha=0.3"] if by == "dirichlet" else []
    recipe = read_recipe("digits", [f"data.partition.by={by}", "data.partition.clients=8", *skew])
    records = gather(recipe)
    clients_data = split_clients(recipe, records)
    assert len(clients_data) == 8
    assert all(o.test is clients_data[0].test for o in clients_data)
    counts, whole = (Counter(str(r.label) for r in rows) for rows in (clients_data[0].test, records))
    assert all(abs(counts[label] - 0.3 * whole[label]) <= 1 for label in whole)
    assert counts.total() == round(0.3 * len(records))
    tested = {r.features.tobytes() for r in clients_data[0].test if r.features is not None}
    learned = [
        r.features.tobytes()
        for o in clients_data
        for part in (o.train, o.valid)
        for r in part
        if r.features is not None
    ]
    assert not tested & set(learned)
    assert len(learned) + len(clients_data[0].test) <= len(records)
    sizes = np.array([[sum(str(r.label) == c for r in o.train) for c in sorted(counts)] for o in clients_data])
    skew = (sizes.max(1) / sizes.sum(1)).mean()
    assert skew > 0.25 if by == "dirichlet" else skew < 0.2


@pytest.mark.parametrize("public", ["null", "{labelled: 100, unlabelled: 200, share: 0.2}"])
def test_drawn_clients_may_be_tested_on_their_own_shares_of_classes(public: str) -> None:
    words = ["data.partition={by: dirichlet, clients: 8, alpha: 0.3, test: own}", f"data.public={public}"]
    recipe = read_recipe("digits", [*words, "data.test=0.3"])
    records = gather(recipe)
    clients_data = split_public(recipe, records).clients_data
    every = [r for o in clients_data for r in (*o.train, *o.valid, *o.test)]
    assert len({id(r) for r in every}) == len(every) <= len(records)
    labels = sorted({str(r.label) for r in records})

    def shares(rows: tuple[Record, ...]) -> np.ndarray:
        return np.array([sum(str(r.label) == label for r in rows) for label in labels]) / len(rows)

    own = [np.abs(shares(o.train) - shares(o.test)).sum() for o in clients_data]
    others = [np.abs(shares(o.train) - shares(clients_data[i - 1].test)).sum() for i, o in enumerate(clients_data)]
    assert max(own) < 0.5 < np.mean(others)
    assert all(abs(len(o.test) / (len(o.train) + len(o.valid) + len(o.test)) - 0.3) < 0.1 for o in clients_data)


def test_clients_of_their_own_are_tested_on_their_own_rows_in_any_case(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match=r"partition\.test"):
        recipe_of(write(tmp_path, people()), partition={"by": "client", "test": "own"})


def parts_of(clients_data: tuple[ClientData, ...]) -> tuple[list[Record], list[Record]]:
    """What drawn owners learn from and choose by, and their common test set."""
    return [r for o in clients_data for r in (*o.train, *o.valid)], list(clients_data[0].test)


@pytest.mark.parametrize("by", ["dirichlet", "iid"])
def test_a_rare_class_neither_shrinks_the_test_set_nor_goes_into_it_whole(tmp_path: Path, by: str) -> None:
    rare = {3: "rare"}
    rows = [{"said": f"words {i}", "mood": rare.get(i % 250, "ab"[i % 2])} for i in range(1000)]
    rows[0]["mood"] = "once"
    recipe = recipe_of(
        write(tmp_path, rows), columns={"text": "said", "label": "mood"}, partition={"by": by, "clients": 5}
    )
    learned, tested = parts_of(prepared(recipe.model_copy(update={"data": recipe.data.model_copy(update=KEEP)})))
    assert 195 <= len(tested) <= 205
    assert Counter(r.label for r in tested)["rare"] == 1
    assert Counter(r.label for r in learned)["rare"] == 3
    assert Counter(r.label for r in learned)["once"] == 1
    few = recipe.data.model_copy(update={**KEEP, "test_rows": 30})
    learned, tested = parts_of(prepared(recipe.model_copy(update={"data": few})))
    assert len(tested) == 30
    assert {"a", "b"} <= {r.label for r in tested}


KEEP = {"on_single_class": "keep", "on_too_few_rows": "drop"}


@pytest.mark.parametrize("task", ["classify", "chat"])
@pytest.mark.parametrize("split_by", ["row", "group"])
def test_the_common_test_set_holds_no_copy_and_no_part_of_a_group(tmp_path: Path, task: str, split_by: str) -> None:
    rows = [{"said": f"words {i % 60}", "mood": "ab"[i % 2], "talk": f"t{i // 5}"} for i in range(300)]
    recipe = recipe_of(
        write(tmp_path, rows),
        task=task,
        columns={"text": "said", "label": "mood", "group": "talk"},
        partition={"by": "iid", "clients": 3},
        split_by=split_by,
        **KEEP,
    )
    if split_by == "group":  # sixty texts in sixty groups of five, each text five times: every test row has a copy
        with pytest.raises(LichenError, match="no row to test on") as told:
            prepared(recipe)
        assert "split_by: row" in told.value.fix
        rows += [{"said": f"other words {i}", "mood": "ab"[i % 2], "talk": f"u{i // 3}"} for i in range(90)]
        write(tmp_path, rows)
    learned, tested = parts_of(prepared(recipe))
    assert tested
    assert not {r.text for r in learned} & {r.text for r in tested}
    if split_by == "group":
        assert not {r.group for r in learned} & {r.group for r in tested}


def test_a_users_group_called_test_is_a_group_like_any_other(tmp_path: Path) -> None:
    rows = [{"said": f"words {i}", "mood": "ab"[i % 2], "talk": "test" if i < 4 else f"t{i}"} for i in range(200)]
    columns = {"text": "said", "label": "mood", "group": "talk"}
    recipe = recipe_of(write(tmp_path, rows), columns=columns, partition={"by": "iid", "clients": 2})
    learned, tested = parts_of(prepared(recipe))
    assert len(tested) == 40
    assert len(learned) == 160
    assert sum(r.group == "test" for r in tested) in (0, 4)


def test_a_test_set_that_comes_with_the_data_stays_it(tmp_path: Path) -> None:
    columns = {"text": "said", "label": "mood"}
    recipe = recipe_of(write(tmp_path, people()), columns=columns, partition={"by": "iid", "clients": 3})
    rows = [Record(client="", text=f"words {i}", label="ab"[i % 2], held_out=i >= 90) for i in range(120)]
    rows.append(Record(client="", text="Words  95", label="a"))
    learned, tested = parts_of(split_clients(recipe, rows))
    assert tested == rows[90:120]
    assert len(learned) == 90  # the copy of a test row is out
    few = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test_rows": 10})})
    learned, tested = parts_of(split_clients(few, rows))
    assert Counter(r.label for r in tested) == {"a": 5, "b": 5}
    assert not any(r.held_out for r in learned)


def test_short_answers_reach_every_part_of_every_client(tmp_path: Path) -> None:
    rows = [
        {"who": f"bank-{c}", "ask": f"headline {c}-{i}", "reply": ("up", "down", "flat")[i % 3], "case": f"{c}-{i}"}
        for c in range(2)
        for i in range(30)
    ]
    columns = {"client": "who", "prompt": "ask", "completion": "reply"}
    for more in ({}, {"group": "case"}):
        plain = recipe_of(write(tmp_path, rows), task="chat", columns={**columns, **more}, valid=0.1)
        for client_data in prepared(plain):
            for part, each in ((client_data.train, 7), (client_data.valid, 1), (client_data.test, 2)):
                assert Counter(r.text for r in part) == {"up": each, "down": each, "flat": each}


def test_held_out_rows_are_cut_to_some_of_every_class(tmp_path: Path) -> None:
    rows = [{"who": "p", "said": f"words {i}", "mood": "a" if i < 80 else "b"} for i in range(100)]
    (client_data,) = prepared(recipe_of(write(tmp_path, rows), test_rows=5))
    assert Counter(r.label for r in client_data.test) == {"a": 4, "b": 1}
    assert Counter(r.label for r in client_data.valid) == {"a": 4, "b": 1}


def test_owners_follow_from_the_seed_alone(tmp_path: Path) -> None:
    rows = people(6, 10)
    plain = recipe_of(write(tmp_path, rows), max_clients=4, max_rows=8)
    assert prepared(plain) == prepared(plain)
    assert len(prepared(plain)) == 4
    assert all(len(o.train) + len(o.valid) + len(o.test) == 8 for o in prepared(plain))
    other = plain.model_copy(update={"seed": 1})
    assert prepared(other) != prepared(plain)
    # Another order of clients in the file changes nobody's rows.
    mixed = write(tmp_path, [r for c in (3, 1, 5, 0, 2, 4) for r in rows if r["who"] == f"p{c}"])
    assert prepared(recipe_of(mixed, max_clients=4, max_rows=8)) == prepared(plain)


def test_nobody_is_tested_on_a_text_it_learned(tmp_path: Path) -> None:
    rows = [*people(3, 8), {"who": "p0", "said": " Words  0 1", "mood": "a"}]
    for client_data in prepared(recipe_of(write(tmp_path, rows))):
        learned = {" ".join(r.text.lower().split()) for r in client_data.train}
        assert client_data.train
        assert client_data.valid
        assert client_data.test
        assert not learned & {" ".join(r.text.lower().split()) for r in (*client_data.valid, *client_data.test)}
