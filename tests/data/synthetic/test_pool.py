"""The pool only grows, keeps every real row, and comes back from disk as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.sources.record import Record
from lichen.data.sources.records import load_records
from lichen.data.synthetic.pool import Pool, SyntheticRow, load_pool, mix, save_pool

texts = st.text(min_size=1).filter(str.strip)
rows = st.builds(
    SyntheticRow,
    texts,
    label=st.one_of(st.none(), st.integers(0, 4), st.sampled_from(["good", "bad"])),
    model=st.sampled_from(["", "tiny"]),
    prompt=st.sampled_from(["", "0123456789abcdef"]),
    seed=st.integers(0, 2**63 - 1),
    privacy=st.sampled_from(["", "(ε, δ) = (1.0, 1e-6), one row added or removed"]),
    client=st.sampled_from(["", "7", "dresses"]),
    tokens=st.integers(0, 99),
)
many = st.lists(rows, max_size=6)
real = [Record(client="7", text=f"real {i}", label=i % 3) for i in range(20)]


def pool_of(count: int, **more: str) -> Pool:
    return Pool().grow([SyntheticRow(f"made {i}", label=i % 3, seed=i, **more) for i in range(count)], generation=0)


@given(first=many, second=many)
def test_a_pool_is_the_beginning_of_what_it_grows_into(first: list[SyntheticRow], second: list[SyntheticRow]) -> None:
    small = Pool().grow(first, generation=0)
    large = small.grow(second, generation=2)
    assert large.rows[: len(small.rows)] == small.rows
    assert {row.text for row in large.rows} == {row.text for row in (*first, *second)}
    assert large.tokens == sum(row.tokens for row in large.rows)
    assert sum(large.labels.values()) == len(large.rows)
    assert [row.generation for row in large.rows] == [0] * len(small.rows) + [2] * (len(large.rows) - len(small.rows))
    assert large.generation == (2 if second else 0 if first else -1)


@given(first=many, second=many)
def test_a_generation_repeated_after_a_kill_ends_in_the_same_pool(
    first: list[SyntheticRow], second: list[SyntheticRow]
) -> None:
    whole = Pool().grow(first, generation=0).grow([*first, *second], generation=1)
    # What was found on disk the second time costs nothing, and is still the same row.
    free = [replace(row, tokens=0) for row in (*first, *second)]
    assert whole.grow(free, generation=1) == whole
    assert Pool().grow(first, generation=0).grow(first, generation=1).grow([*first, *second], generation=1) == whole


def test_there_is_no_way_back() -> None:
    pool = pool_of(2).grow([SyntheticRow("later")], generation=3)
    with pytest.raises(LichenError, match="generation 2 comes after generation 3"):
        pool.grow([SyntheticRow("early")], generation=2)
    with pytest.raises(LichenError, match="out of order"):
        Pool(pool.rows[::-1])
    assert not [name for name in dir(pool) if any(word in name for word in ("replace", "remove", "drop", "clear"))]


@given(share=st.floats(0, 0.99), count=st.integers(0, 30), seed=st.integers(0, 99), kept=st.integers(0, 20))
def test_mixing_keeps_every_real_row_and_bounds_the_synthetic_share(
    share: float, count: int, seed: int, kept: int
) -> None:
    mixed = mix(real[:kept], pool_of(count), share=share, seed=seed, client="7")
    assert mixed[:kept] == real[:kept]
    synthetic = [record.text for record in mixed[kept:]]
    assert len(set(synthetic)) == len(synthetic)
    assert set(synthetic) <= {f"made {i}" for i in range(count)}
    assert len(synthetic) <= share * len(mixed) + 1e-6
    # One more would be too many, or there is none left.
    assert len(synthetic) == count or len(synthetic) + 1 > share * (len(mixed) + 1) - 1e-6
    less = mix(real[:kept], pool_of(count), share=share / 2, seed=seed, client="7")
    assert {r.text for r in less} <= {r.text for r in mixed}
    assert all(record.client == "7" for record in mixed)


def test_half_is_half_and_whole_is_refused() -> None:
    assert len(mix(real, pool_of(50), share=0.5, seed=0)) == 40
    assert [len(mix(real[:9], pool_of(50), share=share, seed=0)) for share in (0.1, 0.25, 0.4)] == [10, 12, 15]
    with pytest.raises(LichenError, match="leaves no room for real rows"):
        mix(real, pool_of(50), share=1.0, seed=0)


def test_rows_are_meant_for_someone() -> None:
    pool = pool_of(2).grow([SyntheticRow("for you", client="8"), SyntheticRow("for me", client="7")], generation=1)
    assert [row.text for row in pool.meant_for("7").rows] == ["made 0", "made 1", "for me"]
    assert [(r.client, r.label) for r in pool.records(client="3")] == [("3", 0), ("3", 1), ("8", None), ("7", None)]


@given(first=many, second=many)
@settings(max_examples=25)
def test_disk_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, first: list[SyntheticRow], second: list[SyntheticRow]
) -> None:
    file = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    odd = [SyntheticRow("half \ud800 of a pair,\na line\u2028end and a \x00", label="ж", seed=2**63 - 1)]
    pool = Pool().grow([*first, *odd], generation=0)
    save_pool(file, pool)
    assert load_pool(file) == pool
    grown = pool.grow(second, generation=1)
    before = file.read_bytes()
    save_pool(file, grown)
    assert load_pool(file) == grown
    assert file.read_bytes().startswith(before)


def test_a_file_is_never_cut_or_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    save_pool(file, pool_of(3))
    for other in (pool_of(2), pool_of(3, model="other"), Pool()):
        with pytest.raises(LichenError, match="holds rows that this pool lacks"):
            save_pool(file, other)
    assert load_pool(file) == pool_of(3)
    assert [f.name for f in tmp_path.iterdir()] == ["pool.jsonl"]


def line(**more: object) -> str:
    told = {"text": "x", "label": None, "model": "", "prompt": "", "seed": 0}
    return json.dumps({**told, "generation": 0, "privacy": "", "client": "", "tokens": 0, **more})


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (line()[:20], "damaged"),
        ("[]", "its fields"),
        (line(more=1), "its fields"),
        (line(text=""), "empty"),
        (line(text=3), "text is 3"),
        (line(label=[1]), "label is"),
        (line(seed=True), "seed is True"),
        (line(tokens=-1), "below 0"),
        ("", "damaged"),
    ],
)
def test_a_damaged_line_is_one_error_that_names_it(tmp_path: Path, damaged: str, reason: str) -> None:
    file = tmp_path / "pool.jsonl"
    file.write_text("\n".join([line(), damaged, line()]) + "\n")
    with pytest.raises(LichenError, match=reason) as told:
        load_pool(file)
    assert told.value.where == f"{file}, line 2"
    assert told.value.fix


def test_other_damage(tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    with pytest.raises(LichenError, match="no such pool"):
        load_pool(file)
    file.write_bytes(f"{line()}\n{line()}".encode())
    with pytest.raises(LichenError, match="no end"):
        load_pool(file)
    file.write_bytes(line().encode() + b"\n\xff\xfe\n")
    with pytest.raises(LichenError, match="line 2"):
        load_pool(file)
    file.write_text(f"{line(generation=1)}\n{line()}\n")
    with pytest.raises(LichenError, match="generation comes before"):
        load_pool(file)
    file.write_bytes(b"")
    assert load_pool(file) == Pool()


def test_the_house_reads_a_pool_like_any_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "pool.jsonl"
    pool = pool_of(3, client="7")
    save_pool(file, pool)
    assert load_records(str(file)) == pool.records()
