"""Reading what people bring: delimiters, encodings, nesting, damage. What cannot be read right is one sentence."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lichen.core.errors import LichenError
from lichen.data.formats import delimited, encodings, json_rows
from lichen.data.sources.files import data_files, owners_of_files, read_notes, read_rows
from lichen.data.sources.record_cache import cached_records
from lichen.data.sources.records import load_records

ROWS = [{"who": "ann", "text": 'Käse, "gut"'}, {"who": "bob", "text": "über; zwei\nZeilen | und\tmehr"}]


def table(delimiter: str = ",", rows: list[dict[str, str]] = ROWS, **how: Any) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), delimiter=delimiter, **how)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def refused(path: Path, *words: str) -> LichenError:
    with pytest.raises(LichenError) as caught:
        read_rows(path)
    assert caught.value.fix
    assert str(path) in caught.value.where
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 3200
    return caught.value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_in_any_letters_and_with_any_delimiter(
    tmp_path: Path, encoding: str, delimiter: str, *, packed: bool
) -> None:
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    data = table(delimiter).encode(encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_rows(path) == ROWS
    (note,) = read_notes(path) or [""]
    assert ("Windows-1252" in note) == (encoding == "cp1252")
    assert ("UTF-16" in note) == encoding.startswith("utf-16")
    assert ("parted by" in note) == (delimiter != ",")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_rows_of_json_in_any_letters(tmp_path: Path, encoding: str) -> None:
    for name, text in (
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("a.json", json.dumps(ROWS, ensure_ascii=False)),
    ):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read_rows(tmp_path / name) == ROWS


SHAPES: dict[str, tuple[str, str]] = {
    "blank lines": ("a.jsonl", '\n{"text": "a"}\n\n   \n{"text": "b"}\n\n'),
    "a list on one line": ("a.jsonl", '[{"text": "a"}, {"text": "b"}]'),
    "a list over lines": ("a.jsonl", '[\n{"text": "a"},\n{"text": "b"}\n]\n'),
    "a list": ("a.json", '[{"text": "a"}, {"text": "b"}]'),
    "rows a line": ("a.json", '{"text": "a"}\n{"text": "b"}\n'),
    "objects in a row": ("a.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}'),
    "a list under a key": ("a.json", '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'),
    "columns": ("a.json", '{"text": ["a", "b"]}'),
    "pandas columns": ("a.json", '{"text": {"0": "a", "1": "b"}}'),
    "pandas split": ("a.json", '{"columns": ["text"], "index": [0, 1], "data": [["a"], ["b"]]}'),
    "ndjson": ("a.ndjson", '{"text": "a"}\r\n{"text": "b"}\r\n'),
    "old line breaks": ("a.jsonl", '{"text": "a"}\r{"text": "b"}'),
    "one column": ("a.csv", "text\na\nb\n"),
    "no last break": ("a.csv", "text\r\na\r\nb"),
    "blank rows": ("a.csv", "text,n\n\na,1\n\nb,2\n"),
    "tabs": ("a.tsv", "n\ttext\n1\ta\n2\tb\n"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_two_rows_are_two_rows_in_every_shape(tmp_path: Path, shape: str) -> None:
    name, text = SHAPES[shape]
    (tmp_path / name).write_bytes(text.encode())
    assert [row["text"] for row in read_rows(tmp_path / name)] == ["a", "b"]


def test_a_line_separator_inside_a_text_is_part_of_it(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\u2029four\x85five\x0bsix\x1cseven"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [row["text"] for row in read_rows(path)] == texts
    path = tmp_path / "a.csv"
    path.write_text(table(rows=[{"text": text} for text in texts]), encoding="utf-8")
    assert [row["text"] for row in read_rows(path)] == texts


def test_commas_belong_to_the_text_of_a_single_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nHello, world\nfine; thank you, all\n")
    assert [row["text"] for row in read_rows(path)] == ["Hello, world", "fine; thank you, all"]
    assert "commas belong to the text" in read_notes(path)[0]


def test_quotes_of_a_table_that_never_meant_them(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('n\ttext\n1\t"quoted" he said\n2\tthe 5" pipe\n3\t"open\n4\tlast\n')
    assert [row["text"] for row in read_rows(path)] == ['"quoted" he said', 'the 5" pipe', '"open', "last"]
    assert "quotes are plain letters" in read_notes(path)[0]


def test_blanks_and_empty_names_at_the_edge(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('who, text\nann, "a, b"\nbob, c\n')
    assert read_rows(path) == [{"who": "ann", "text": "a, b"}, {"who": "bob", "text": "c"}]
    path.write_text(",text,\n0,a,\n1,b,\n")
    assert read_rows(path) == [{"column 1": "0", "text": "a"}, {"column 1": "1", "text": "b"}]


def test_a_cell_of_two_hundred_thousand_letters(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("who,text\nann," + "x" * 200_000 + "\n")
    assert len(read_rows(path)[0]["text"]) == 200_000


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "names twice": ("a.csv", b"text,who,text\na,b,c\n", "two columns named 'text'"),
    "too narrow": ("a.csv", b"text,who\na,b\nc\n", "line 3"),
    "too wide": ("a.csv", b"text,who\na,b\nc,d,e\n", "line 3"),
    "open quote": ("a.csv", b'text,who\n"a,b\nc,d\n', "a quote is never closed"),
    "key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n', "'text' stands twice"),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    "deep list": ("a.json", b"[" * 100_000, "nested too deeply"),
    "no end": ("a.json", b'[{"text": "a"}', "never closed"),
    "more after": ("a.json", b'[{"text": "a"}] x', "something follows"),
    "no comma": ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "line 2"),
    "a list of lists": ("a.json", b"[[1]]", "is a list, not an object"),
    "lists of rows": ("a.json", b'{"train": [{"t": "a"}], "test": [{"t": "b"}]}', "several lists of rows"),
    "unequal": ("a.json", b'{"a": ["x"], "b": ["x", "y"]}', "unequal length"),
    "huge number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    "a bad byte": ("a.jsonl", '{"t": "äöü"}\n'.encode() + b'{"t": "\xff"}', "line 2"),
    "cyrillic": ("a.csv", "text\nпривет, как дела\n".encode("cp1251"), "alphabet cannot be told"),
    "odd UTF-16": ("a.csv", "text\na".encode("utf-16") + b"\0", "not whole UTF-16"),
    "zero": ("a.csv", b"text\nab\0cd\nef\n", "zero byte"),
    "cut gzip": ("a.csv.gz", gzip.compress(b"text\n" + bytes(range(65, 90)) * 999)[:-20], "ends before"),
    "spoilt gzip": ("a.csv.gz", gzip.compress(b"text\nhello\n")[:10] + b"\xff" * 20, "cannot be read"),
    "Excel": ("a.xlsx", b"PK\x03\x04", "save it as CSV"),
    "Excel as CSV": ("a.csv", b"PK\x03\x04\0\0", "save it as CSV"),
    "text": ("a.txt", b"hello", "as .jsonl"),
    "no ending": ("a", b"hello", "files without an ending"),
    "parquet": ("a.parquet", b"PAR1 nothing PAR1", "not a readable parquet file"),
    "parquet as CSV": ("a.csv", b"PAR1 nothing PAR1", "the ending .parquet"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_sentence_with_its_cause(tmp_path: Path, kind: str) -> None:
    name, data, words = DAMAGE[kind]
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, words)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_one_line_without_end_is_bounded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (delimited, encodings, json_rows):
        monkeypatch.setattr(module, "MOST_LETTERS", 1 << 21)
    begin = {"a.csv": 'text\n"', "a.jsonl": '{"text": "', "a.json": '[{"text": "'}[name]
    limit = csv.field_size_limit(1 << 20)
    try:
        (tmp_path / name).write_text(begin + "x" * (3 << 21))
        refused(tmp_path / name, "million letters")
    finally:
        csv.field_size_limit(limit)


def test_a_hundred_thousand_columns_are_a_short_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    names = [f"c{i}" for i in range(100_000)]
    path.write_text(",".join(names) + "\n" + ",".join("1" * 100_000) + "\n")
    begin = time.perf_counter()
    with pytest.raises(LichenError) as caught:
        load_records(str(path), columns={"text": "c99999x"})
    assert len(str(caught.value)) < 1000
    with pytest.raises(LichenError) as caught:
        load_records(str(path))
    assert len(str(caught.value)) < 1000
    assert "99,988 more" in caught.value.fix
    assert time.perf_counter() - begin < 20


def test_an_error_of_any_length_is_short_and_steers_nothing() -> None:
    error = LichenError("x" * 10**6 + "\x1b]0;title\x07\u202e", where="\x9b2J\n" * 999, fix="y" * 10**6)
    assert len(str(error)) < 3200
    assert "\x1b" not in str(error)
    assert str(error).count("\n") == 1


def test_what_systems_leave_behind_is_nobodys(tmp_path: Path) -> None:
    for name in ("ann.jsonl", ".hidden.jsonl", "._ann.jsonl", ".ipynb_checkpoints/ann.jsonl", "__MACOSX/ann.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "bob.csv").write_text("text\nb\n")
    (tmp_path / "notes.md").write_text("notes")
    assert [path.name for path in data_files(tmp_path)] == ["ann.jsonl", "bob.csv"]
    assert [record.client for record in load_records(str(tmp_path), path_client="auto")] == ["ann", "bob"]
    assert read_notes(tmp_path) == ["left out, no data: notes.md"]


OWNERS: dict[str, dict[str, str]] = {
    "a file a client": {"ann.csv": "ann", "bob.csv": "bob"},
    "two endings": {"a.csv": "a.csv", "a.jsonl": "a.jsonl", "b.csv": "b"},
    "a folder a client": {"site0/train.csv": "site0", "site0/test.csv": "site0", "site1/train.csv": "site1"},
    "files in folders": {"north/a.csv": "north", "north/b.csv": "north", "south/a.csv": "south"},
    "parts above clients": {"train/ann.csv": "ann", "test/ann.csv": "ann", "train/bob.csv": "bob"},
    "parts above folders": {"train/s0/x.csv": "s0", "test/s0/y.csv": "s0", "train/s1/x.csv": "s1"},
    "parts alone": {"train.csv": "", "test.csv": ""},
    "shards": {"train-00000-of-00002.csv": "", "train-00001-of-00002.csv": ""},
    "a wrapper": {"data/ann.csv": "ann", "data/bob.csv": "bob"},
    "one file": {"reviews.csv": ""},
    "packed": {"ann.csv.gz": "ann", "bob.csv": "bob"},
    "deep": {"eu/x/1.csv": "eu/x", "eu/y/1.csv": "eu/y", "us/x/1.csv": "us/x"},
}


@pytest.mark.parametrize("shape", OWNERS)
def test_whose_a_file_is(tmp_path: Path, shape: str) -> None:
    for name in OWNERS[shape]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text\na\n")
    found = owners_of_files(tmp_path, data_files(tmp_path))
    assert {str(path.relative_to(tmp_path)): owner for path, owner in found.items()} == OWNERS[shape]


def test_pipes_sockets_and_circles_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        server.bind("socket.csv")
        os.chdir(here)
        for name in ("pipe.jsonl", "socket.csv"):
            refused(tmp_path / name, "a pipe or a device")
        (tmp_path / "circle").symlink_to(tmp_path)
        (tmp_path / "broken.csv").symlink_to("nothing")
        (tmp_path / "ann.csv").write_text("text\na\n")
        assert data_files(tmp_path) == [tmp_path / "ann.csv"]
        (note,) = read_notes(tmp_path)
    for name in ("pipe.jsonl", "socket.csv", "broken.csv", "circle"):
        assert name in note
    (tmp_path / "self.csv").symlink_to("self.csv")
    with pytest.raises(LichenError):
        data_files(tmp_path / "self.csv")


def test_a_linked_folder_is_part_of_what_finds_the_cached_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lichen.data.sources import record_cache

    monkeypatch.setattr(record_cache, "MIN_BYTES", 0)
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    (tmp_path / "far" / "ann.csv").write_text("text\na\n")
    (tmp_path / "near" / "site").symlink_to(tmp_path / "far")
    near = tmp_path / "near"

    def read() -> list[str]:
        make: Callable[[], Any] = lambda: load_records(str(near))  # noqa: E731
        return [record.text for record in cached_records(near, make, files=data_files(near), folder=tmp_path / "kept")]

    assert read() == ["a"]
    (tmp_path / "far" / "ann.csv").write_text("text\nb\n")
    assert read() == ["b"]


def test_cells_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "bytes": pa.array([b"caf\xc3\xa9", b"b"]),
        "dictionary": pa.array(["x", "y"]).dictionary_encode(),
        "date": pa.array([datetime.date(2024, 2, 1), None]),
        "decimal": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.25")]),
        "null": pa.nulls(2),
        "list": pa.array([["a"], ["b", "c"]]),
        "struct": pa.array([{"k": b"v"}, None]),
        "large": pa.array(["p", "q"], type=pa.large_string()),
        "raw": pa.array([b"\xff\xfe", b"\x00"]),
    }
    pq.write_table(pa.table(columns), path)
    first, second = read_rows(path)
    assert (first["bytes"], first["dictionary"], first["date"], first["decimal"]) == ("café", "x", "2024-02-01", "1.50")
    assert (first["list"], first["struct"], first["large"], second["date"]) == (["a"], {"k": "v"}, "p", None)
    assert [r.text for r in load_records(str(path), columns={"text": "bytes"})] == ["café", "b"]
    for column, words in (("list", "holds a list"), ("struct", "holds an object"), ("raw", "bytes that are no text")):
        with pytest.raises(LichenError, match=words) as caught:
            load_records(str(path), columns={"text": column})
        assert "row 1" in caught.value.where
    with pytest.raises(LichenError, match="no row with text"):
        load_records(str(path), columns={"text": "null"})


def test_a_folder_that_cannot_be_entered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ann.csv").write_text("text\na\n")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(LichenError, match="Permission denied") as caught:
        data_files(tmp_path)
    assert caught.value.where == str(tmp_path / "locked")


def test_a_list_is_read_as_fast_as_lines(tmp_path: Path) -> None:
    rows = [{"text": f"some words of row {i}"} for i in range(20_000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spent = {}
    for name in ("a.json", "a.jsonl"):
        begin = time.process_time()
        assert read_rows(tmp_path / name) == rows
        spent[name] = time.process_time() - begin
    assert spent["a.json"] < 8 * spent["a.jsonl"] + 0.2


def test_tools_of_sharegpt_are_calls_and_answers(tmp_path: Path) -> None:
    call = {"name": "look", "arguments": {"at": "sky"}}
    turns = [
        ("human", "What is up?"),
        ("function_call", json.dumps(call)),
        ("observation", "blue"),
        ("gpt", "It is blue."),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": who, "value": said} for who, said in turns]}))
    (record,) = load_records(str(path), columns={"messages": "conversations"})
    assert [turn["role"] for turn in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    path.write_text(json.dumps({"conversations": [{"from": "function_call", "value": "look at the sky"}]}))
    with pytest.raises(LichenError, match="list of turns"):
        load_records(str(path), columns={"messages": "conversations"})


def test_half_a_character_is_told_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(LichenError, match="half a character") as caught:
        load_records(str(tmp_path / "a.jsonl"))
    assert "row 2" in caught.value.where


def test_several_columns_are_joined_in_order(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "fox", "output": "renard"},
        {"instruction": "Say hi.", "output": "hi"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = load_records(str(path), columns={"prompt": ["instruction", "input"], "completion": "output"})
    assert [(r.prompt, r.text) for r in made] == [("Translate.\n\nfox", "renard"), ("Say hi.", "hi")]
    asked, said = {"role": "user", "content": "hi"}, {"from": "gpt", "value": "hello"}
    path.write_text(json.dumps({"prompt": [asked], "completion": [said]}))
    (record,) = load_records(str(path), columns={"messages": ["prompt", "completion"]})
    assert record.messages == (asked, {"role": "assistant", "content": "hello"})
    with pytest.raises(LichenError, match="is one column"):
        load_records(str(path), columns={"messages": "prompt", "label": ["prompt", "completion"]})
