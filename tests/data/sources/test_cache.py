"""What is kept is what was made: token rows and records come back equal, and damage only costs time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lichen.core.tree import Tree
from lichen.data.batches import token_cache
from lichen.data.batches.rows import TextShard
from lichen.data.batches.text import encode_classify, encode_lm
from lichen.data.batches.token_cache import classify_shard, lm_shard
from lichen.data.sources import cache, record_cache
from lichen.data.sources.cache import keep, key_of, prepared_folder
from lichen.data.sources.record import Record
from lichen.data.sources.record_cache import cached_records
from lichen.data.sources.records import load_records
from lichen.data.sources.table import Table, column_of
from support.tiny_llama import save_model

RECORDS = [
    Record(client=f"p{i % 3}", text=f"w{i % 7} w{i % 11}", prompt=f"w{i % 5}", label="ab"[i % 2]) for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _small_is_worth_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MIN_RECORDS", 1)
    monkeypatch.setattr(record_cache, "MIN_BYTES", 0)


def never(*_: object, **__: object) -> object:
    raise AssertionError("made again")


def rows(shard: TextShard) -> list[tuple[list[int], object]]:
    return [
        (ids.tolist(), np.asarray(label).tolist()) for ids, label in zip(shard.input_ids, shard.labels, strict=True)
    ]


def test_token_rows_are_made_once(tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = encode_lm(RECORDS, tokenizer, form="transcript", max_length=16)
    classes = encode_classify(RECORDS, tokenizer, max_length=16, classes=("a", "b"))
    for again in (False, True):
        if again:
            monkeypatch.setattr(token_cache, "encode_lm", never)
            monkeypatch.setattr(token_cache, "encode_classify", never)
        one = lm_shard(RECORDS, tokenizer, form="transcript", max_length=16, folder=tmp_path)
        assert rows(one) == [(ids.tolist(), labels.tolist()) for ids, labels in lm]
        other = classify_shard(RECORDS, tokenizer, max_length=16, classes=("a", "b"), folder=tmp_path)
        assert rows(other) == [(ids.tolist(), label) for ids, label in classes]
    assert len(list(tmp_path.iterdir())) == 2


def test_whatever_decides_the_tokens_is_part_of_the_key(tokenizer: object, tmp_path: Path) -> None:
    changed = [*RECORDS[:-1], Record(client="p", text="w1")]
    lm_shard(RECORDS, tokenizer, form="plain", max_length=16, folder=tmp_path)
    lm_shard(RECORDS, tokenizer, form="transcript", max_length=16, folder=tmp_path)
    lm_shard(RECORDS, tokenizer, form="plain", max_length=15, folder=tmp_path)
    lm_shard(changed, tokenizer, form="plain", max_length=16, folder=tmp_path)
    classify_shard(RECORDS, tokenizer, max_length=16, classes=("a", "b"), folder=tmp_path)
    classify_shard(RECORDS, tokenizer, max_length=16, classes=("b", "a"), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    tokenizer("w1", truncation=True, max_length=2)  # type: ignore[operator]  # what a call leaves behind is not
    lm_shard(RECORDS, tokenizer, form="plain", max_length=16, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "folder"])
def test_damage_costs_time_and_nothing_else(tokenizer: object, tmp_path: Path, damage: str) -> None:
    def get() -> TextShard:
        return lm_shard(RECORDS, tokenizer, form="plain", max_length=16, folder=tmp_path)

    whole = rows(get())
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        other = good.replace(b'"tokens"', b'"tokans"')
        flipped = good[:-1] + bytes([good[-1] ^ 1])
        file.write_bytes({"cut": good[:-9], "flipped": flipped, "empty": b"", "other": other}[damage])
    assert rows(get()) == whole
    assert damage == "folder" or file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = keep("k", lambda: 5, write=lambda n: {"n": torch.tensor([n])}, read=never, folder=tmp_path / "file")  # type: ignore[arg-type, return-value]
    assert made == 5


def test_those_used_longest_ago_go_first(tmp_path: Path) -> None:
    def get(key: str, most: int = 1 << 20) -> Tree:
        made = {"x": torch.zeros(1000, dtype=torch.uint8)}
        return keep(
            key, lambda: made, write=lambda tree: tree, read=lambda tree: tree, folder=tmp_path, most_bytes=most
        )

    now = time.time()
    for at, key in enumerate("abc"):
        get(key)
        os.utime(tmp_path / f"{key}.safetensors", (now + at - 9, now + at - 9))
    get("a")  # used again
    get("d", most=3500)
    assert sorted(f.stem for f in tmp_path.iterdir()) == ["a", "c", "d"]
    get("e", most=1)
    assert [f.stem for f in tmp_path.iterdir()] == ["e"]


def test_what_nobody_used_for_a_month_goes(tmp_path: Path) -> None:
    def get(key: str) -> Tree:
        made = {"x": torch.zeros(10)}
        return keep(key, lambda: made, write=lambda tree: tree, read=lambda tree: tree, folder=tmp_path)

    for key, days in (("a", 29), ("b", 31), ("c", 31)):
        get(key)
        used = time.time() - days * 24 * 3600
        os.utime(tmp_path / f"{key}.safetensors", (used, used))
    get("c")
    assert sorted(f.stem for f in tmp_path.iterdir()) == ["a", "c"]


def test_without_a_folder_nothing_is_kept(tokenizer: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path))
    lm = encode_lm(RECORDS, tokenizer, form="plain", max_length=16)
    assert rows(lm_shard(RECORDS, tokenizer, form="plain", max_length=16)) == [(i.tolist(), y.tolist()) for i, y in lm]
    classify_shard(RECORDS, tokenizer, max_length=16, classes=("a", "b"))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_earlier_versions_left_open_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path))
    (tmp_path / "prepared").mkdir()
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (tmp_path / "prepared" / f"{name}.safetensors").write_bytes(b"rows")
        (tmp_path / "prepared" / f"{name}.safetensors").chmod(mode)
    assert prepared_folder(private=True) == tmp_path / "private" / "prepared"
    assert prepared_folder(private=False) == tmp_path / "prepared"
    assert [f.stem for f in (tmp_path / "prepared").iterdir()] == ["closed"]


def test_kept_rows_are_mapped(tmp_path: Path) -> None:
    big = {"x": torch.arange(1 << 20, dtype=torch.int32)}
    found = keep("k", lambda: big, write=lambda tree: tree, read=lambda tree: tree, folder=tmp_path)
    assert torch.equal(found["x"], big["x"])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "k.safetensors") in maps.read_text(encoding="utf-8")


def source(folder: Path) -> Path:
    lines = [
        {"who": "ann", "text": "good\nday", "label": 5, "prompt": "hä\u2028", "group": "g"},
        {"who": "bob", "text": "bad", "label": 1},
        {"who": "", "text": "", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_records_are_parsed_once_and_come_back_equal(tmp_path: Path) -> None:
    file = source(tmp_path)

    def make() -> list[Record]:
        return load_records(str(file), columns={"client": "who"}, path_client="none")

    plain = make()
    for maker in (make, never):
        found = cached_records(file, maker, "how", folder=tmp_path / "kept")  # type: ignore[arg-type]
        assert isinstance(found, Table)
        assert list(found) == plain
        assert list(found[1:]) == plain[1:]
        assert found[0] == plain[0]
        for name in ("client", "label", "messages"):
            assert list(column_of(found, name)) == list(column_of(plain, name))
    with pytest.raises(AssertionError, match="made again"):
        cached_records(file, never, "else", folder=tmp_path / "kept")  # type: ignore[arg-type]
    file.write_text(file.read_text() + '{"who": "eve", "text": "more"}\n')
    assert len(cached_records(file, make, "how", folder=tmp_path / "kept")) == 4


@pytest.mark.parametrize(
    "records",
    [
        [Record(client="a", text="x\x1ey"), Record(client="b", text="z")],
        [Record(client="a", features=np.zeros(3, np.float32))],
    ],
)
def test_what_a_table_cannot_hold_is_handed_on(tmp_path: Path, records: list[Record]) -> None:
    assert cached_records(source(tmp_path), lambda: records, folder=tmp_path / "kept") is records
    assert not (tmp_path / "kept").exists()


def test_keys_follow_the_code_that_makes_things(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    keys = set()
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        keys |= {key_of("x", code=(str(file),)), key_of("y", code=(str(file),))}
    assert len(keys) == 4
    assert cache.MOST_BYTES >= 1 << 30
