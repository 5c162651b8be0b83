"""Loading the user's own files: every ending, and a kind word for every kind of damage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lichen.core.errors import LichenError
from lichen.data.periods.moments import moment_of
from lichen.data.sources.catalog import CATALOG, cache_dir, looks_like_hub_id, resolve_model
from lichen.data.sources.fetch import fetched
from lichen.data.sources.readers import READERS
from lichen.data.sources.records import Record, load_records

ROWS: list[dict[str, Any]] = [
    {"who": "ann", "body": 'good, "very" good', "stars": 5, "thread": "t1"},
    {"who": "bob", "body": "bad\nreally", "stars": 1, "thread": "t2"},
    {"who": "bob", "body": "  ", "stars": 2, "thread": "t2"},
]
COLUMNS = {"client": "who", "text": "body", "label": "stars", "group": "thread"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    elif path.suffix == ".csv":
        cells = [",".join('"' + str(v).replace('"', '""') + '"' for v in row.values()) for row in rows]
        path.write_text("\ufeff" + "\n".join([",".join(rows[0]), *cells]), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_ending_gives_the_same_records(tmp_path: Path, ending: str) -> None:
    said: list[str] = []
    records = load_records(str(write(tmp_path / f"reviews.{ending}", ROWS)), columns=COLUMNS, say=said.append)
    labels: tuple[Any, Any] = ("5", "1") if ending == "csv" else (5, 1)
    assert records == [
        Record(client="ann", text='good, "very" good', label=labels[0], group="t1"),
        Record(client="bob", text="bad\nreally", label=labels[1], group="t2"),
    ]
    assert len(said) == 1
    assert "1 rows without text" in said[0]


def test_a_folder_has_a_client_a_file_or_a_client_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "north" / "ann.jsonl", [{"text": "a"}])
    write(tmp_path / "south" / "bob.csv", [{"text": "b"}])
    (tmp_path / "notes.md").write_text("not data")
    assert [r.client for r in load_records(str(tmp_path))] == ["ann", "bob"]
    assert [r.client for r in load_records(str(tmp_path), path_client="folder")] == ["north", "south"]
    assert [r.client for r in load_records(str(tmp_path), path_client="none")] == ["", ""]
    with pytest.raises(LichenError, match="path_client"):
        load_records(str(tmp_path), path_client="planet")


def test_prompts_completions_and_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "extra": 1}]
    file = write(tmp_path / "a.jsonl", [{"q": "1+1?", "r": "2"}, {"q": "2+2?", "r": "4"}])
    made = load_records(str(file), columns={"prompt": "q", "completion": "r"})
    assert [(r.prompt, r.text) for r in made] == [("1+1?", "2"), ("2+2?", "4")]
    for value in (talk, json.dumps(talk)):
        (record,) = load_records(str(write(tmp_path / "b.jsonl", [{"messages": value}])))
        assert record.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    for wrong in ("no list", [{"role": "robot", "content": "x"}], [{"role": "user", "content": None}], [1], 5):
        with pytest.raises(LichenError, match="row 1"):
            load_records(str(write(tmp_path / "c.jsonl", [{"messages": wrong}])))


def test_texts_are_read_as_they_stand(tmp_path: Path) -> None:
    code = {"prompt": "def f(x):\n", "completion": "    return x\n"}
    (record,) = load_records(str(write(tmp_path / "a.jsonl", [code, {"prompt": "def g(x):", "completion": " \n"}])))
    assert (record.prompt, record.text) == ("def f(x):\n", "    return x\n")


def test_a_column_nobody_asks_for_may_hold_anything(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.jsonl", [{"text": "a", "label": ["x", "y"]}]))
    with pytest.raises(LichenError, match="holds a list"):
        load_records(file)
    assert load_records(file, unread=("label",)) == [Record(client="a", text="a")]


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(LichenError) as caught:
        load_records(file, columns={**COLUMNS, "label": "rating"})
    assert caught.value.where == "data.columns.label"
    assert "who, body, stars, thread" in caught.value.fix
    with pytest.raises(LichenError) as caught:
        load_records(file)
    assert caught.value.where == "data.columns.text"
    with pytest.raises(LichenError, match="unknown role"):
        load_records(file, columns={"colour": "who"})


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2"),
        ("a.jsonl", b"\xff\xfe\x00", "a.jsonl"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b"", "a.jsonl"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl"),
        ("a.json", b'{"text": "a"}', "a.json"),
        ("a.json", b"7", "a.json"),
        ("a.json", b"", "a.json"),
        ("a.csv", b"text,who\na,b,c\n", "line 2"),
        ("a.csv", b'text,who\n"a"b,c\n', "line 2"),
        ("a.csv", b"", "a.csv"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet"),
        ("a.xls", b"text", "a.xls"),
    ],
)
def test_damage_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, where: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LichenError) as caught:
        load_records(str(tmp_path / name))
    assert where in caught.value.where
    assert "\n" not in caught.value.what


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LichenError, match="no such file"):
        load_records(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LichenError, match="no data files"):
        load_records(str(tmp_path / "empty"))
    with pytest.raises(LichenError, match="is a model"):
        load_records("minilm-l6")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LichenError) as caught:
        load_records("chitchatt")
    assert "chitchat" in caught.value.fix
    assert "lichen[hub]" in caught.value.fix


def test_a_hub_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(name: str, *, split: str) -> list[dict[str, Any]]:
            if name != "org/reviews":
                raise ValueError("not on the hub\nlong story")
            return [{"body": f"from {split}", "who": "ann"}]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert load_records("org/reviews", columns={"text": "body", "client": "who"}) == [
        Record(client="ann", text="from train")
    ]
    with pytest.raises(LichenError, match="not on the hub"):
        load_records("org/other")


def test_models_resolve_to_folders_hub_ids_or_a_list_of_names(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("org/name") == "org/name"
    assert resolve_model("gpt2") == "gpt2"
    with pytest.raises(LichenError) as caught:
        resolve_model("./smollm2-135")
    assert "smollm2-135m" in caught.value.fix
    with pytest.raises(LichenError, match="is data"):
        resolve_model("chitchat")
    assert not looks_like_hub_id(str(tmp_path))


def test_digits_come_without_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path))
    records = load_records("digits")
    assert len(records) == 1797
    assert {r.label for r in records} == set(range(10))
    x = records[0].features
    assert x is not None
    assert (x.shape, x.dtype.name, float(x.min()), float(x.max())) == ((1, 8, 8), "float32", 0.0, 0.9375)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LichenError, match="own text"):
        load_records("digits", columns={"text": "body"})


def test_a_time_is_read_in_the_words_of_the_file(tmp_path: Path) -> None:
    rows = [{"client": "a", "text": "x", "when": when} for when in ("2018-05-03", 1790, None, [2018])]
    path = write(tmp_path / "a.jsonl", rows)
    assert [r.time for r in load_records(str(path), columns={"time": "when"})] == ["2018-05-03", "1790", "", ""]
    assert [r.time for r in load_records(str(path))] == ["", "", "", ""]


def test_chitchat_joins_a_turn_and_drops_copies(tmp_path: Path) -> None:
    def say(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text} for text in texts]

    talks = {"c1": {"messages": [say("ann", "hi", " "), say("bob", "yo", "you?"), []]}}
    talks["c2"] = {
        "messages": [say("ann", "hi"), say("ann", "again"), say("bob", "yo\nyou?")],
        "start": "2018-05-03T01:38:01Z",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(talks))
    assert READERS["chitchat"](tmp_path, {}) == [
        Record(client="ann", text="hi", group="c1"),
        Record(client="bob", text="yo\nyou?", prompt="hi", group="c1"),
        Record(client="ann", text="hi\nagain", group="c2", time="2018-05-03T01:38:01Z"),
    ]


def test_medmcqa_is_labelled_by_the_answer_or_by_the_specialty(tmp_path: Path) -> None:
    row = {"question": " What? ", "options": "A. this\nB. that ", "answer": "B. that"}
    (tmp_path / "Surgery.jsonl").write_text(json.dumps(row) + "\n\n")
    read, text = READERS["medmcqa"], "What?\nA. this\nB. that"
    assert read(tmp_path, {}) == [Record(client="Surgery", text=text, label="B")]
    assert read(tmp_path, {"label": "specialty"}) == [Record(client="Surgery", text=text, label="Surgery")]
    with pytest.raises(LichenError, match="no column 'topic'") as error:
        read(tmp_path, {"label": "topic"})
    assert "answer, specialty" in str(error.value)


FACTS = {
    "chitchat": (1315, None),
    "clothing-reviews": (None, {1, 2, 3, 4, 5}),
    "medmcqa": (21, {"A", "B", "C", "D"}),
    "sotu": (43, {None}),
    "changelogs": (34, {None}),
    "advbench": (1, {None}),
    "harmbench": (1, {None}),
    "mnist-5k": (1, set(range(10))),
    "fashion-mnist": (1, set(range(10))),
}


@pytest.mark.parametrize("name", sorted(FACTS))
def test_catalog_data_as_fetched(name: str) -> None:
    folder = fetched(name)
    if folder is None:
        pytest.skip(f"{name} is not in {cache_dir()}")
    records = READERS[name](folder, {})
    clients, labels = FACTS[name]
    assert clients is None or len({r.client for r in records}) == clients
    assert labels is None or {r.label for r in records} == labels
    assert all((r.features is None) == bool(r.text) for r in records)
    if name in ("chitchat", "sotu", "changelogs"):
        assert all(moment_of(r.time) for r in records)


def test_every_data_entry_has_a_reader_and_every_download_a_digest() -> None:
    assert set(READERS) == {e.name for e in CATALOG.values() if e.kind == "data"}
    for entry in CATALOG.values():
        assert (len(entry.sha256) == 64 and entry.size_bytes > 0) == (entry.registry != "bundled")
