"""Rows of numbers out of cells: what is read, and what is refused by its column."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lichen.core.errors import LichenError
from lichen.data.formats.numbers import numbers_of_row
from lichen.data.sources.records import load_records

COLUMNS = {"client": "who", "numbers": "pixels", "label": "digit"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            cells = [{n: json.dumps(x) if isinstance(x, list) else x for n, x in row.items()} for row in rows]
            writer.writerows(cells)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_own_digits_are_those_of_the_catalog(tmp_path: Path, ending: str) -> None:
    catalog = load_records("digits")[:60]
    rows = [{"who": f"c{i % 3}", "pixels": r.features[0].tolist(), "digit": r.label} for i, r in enumerate(catalog)]  # type: ignore[index]
    records = load_records(str(write(tmp_path / f"own.{ending}", rows)), columns=COLUMNS)
    for mine, other in zip(records, catalog, strict=True):
        assert mine.features is not None
        assert other.features is not None
        assert (mine.features.dtype, mine.features.shape) == (np.float32, other.features.shape)
        assert mine.features.tobytes() == other.features.tobytes()
        assert str(mine.label) == str(other.label)


@pytest.mark.parametrize(
    ("cells", "shape", "numbers"),
    [
        ({"x": [1, 2.5]}, (2,), [1, 2.5]),
        ({"x": "[1, 2.5]"}, (2,), [1, 2.5]),
        ({"x": [[1, 2], [3, 4]]}, (1, 2, 2), [1, 2, 3, 4]),
        ({"x": [[[1], [2]], [[3], [4]]]}, (2, 2, 1), [1, 2, 3, 4]),
        ({"x": 7}, (1,), [7]),
        ({"x": "0.5"}, (1,), [0.5]),
        ({"x": 1, "y": "2", "z": [3, 4]}, (4,), [1, 2, 3, 4]),
        ({"x": 1 / 3}, (1,), [np.float32(1 / 3)]),
    ],
)
def test_cells_as_numbers(cells: dict[str, Any], shape: tuple[int, ...], numbers: list[float]) -> None:
    found = numbers_of_row(cells, list(cells), "row 1")
    assert found is not None
    assert (found.dtype, found.shape, found.reshape(-1).tolist()) == (np.float32, shape, numbers)


def test_empty_cells_are_no_numbers() -> None:
    for empty in (None, "", " \t"):
        assert numbers_of_row({"x": empty, "y": empty}, ["x", "y"], "row 1") is None


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ([1, float("nan")], "not finite"),
        ([1, None], "nothing in one of its places"),
        (["1", 2], "the text '1'"),
        ("some words", "the text 'some words'"),
        ([[1, 2], [3]], "lists of unequal length"),
        ([1e39], "not finite"),
        ([10**400], "too large"),
        ([True, False], "the truth value 'True'"),
        ([], "an empty list"),
        ({"a": 1}, "an object"),
        ([{"a": 1}], "an object"),
    ],
)
def test_what_is_no_number_is_refused_by_its_column(cell: Any, why: str) -> None:
    with pytest.raises(LichenError, match=f"'x' holds .*{why}") as told:
        numbers_of_row({"x": cell}, ["x"], "a.jsonl, row 3")
    assert told.value.where == "a.jsonl, row 3"
    assert told.value.fix


def test_columns_that_cannot_be_joined_are_refused() -> None:
    for other, why in ((None, "is empty"), ([[1]], "holds lists of lists")):
        with pytest.raises(LichenError, match=f"'y' {why}"):
            numbers_of_row({"x": 1, "y": other}, ["x", "y"], "row 1")


def test_files_of_numbers_are_of_one_shape_and_no_texts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"x": [1, 2], "text": "t"}, {"x": [[1, 2]], "text": "t"}])
    with pytest.raises(LichenError, match="rows of 2 numbers and rows of 1 x 1 x 2"):
        load_records(str(file), columns={"numbers": "x"})
    with pytest.raises(LichenError, match="numbers or a text") as told:
        load_records(str(file), columns={"numbers": "x", "text": "text"})
    assert told.value.where == "data.columns.text"
    assert load_records(str(file))[0].features is None  # a text is read where nobody names the numbers
    rows = [{"numbers": [1, 2], "label": "a"}, {"numbers": None, "label": "b"}]
    said: list[str] = []
    (record,) = load_records(str(write(tmp_path / "b.jsonl", rows)), say=said.append)
    assert record.features is not None
    assert "1 rows without numbers" in said[0]
    with pytest.raises(LichenError, match="no row with numbers"):
        load_records(str(write(tmp_path / "c.jsonl", rows[1:])))
