"""What a cell means as a text, a name and a class."""

from __future__ import annotations

from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.data.formats.cells import label_of, name_of, text_of

NAN = float("nan")


@pytest.mark.parametrize(
    ("cell", "text", "name", "label"),
    [
        ("a", "a", "a", "a"),
        ("    return x\n", "    return x\n", "    return x\n", "    return x\n"),
        ("01", "01", "01", "01"),
        ("1.0", "1.0", "1.0", "1.0"),
        ("nan", "nan", "nan", "nan"),
        ("None", "None", "None", "None"),
        (" \t\n", "", "", None),
        ("", "", "", None),
        (None, "", "", None),
        (NAN, "", "", None),
        (7, "7", "7", 7),
        (7.0, "7.0", "7", 7),
        (-0.0, "-0.0", "0", 0),
        (0.5, "0.5", "0.5", "0.5"),
        (1e22, "1e+22", "10000000000000000000000", 10**22),
        (float("inf"), "inf", "inf", "inf"),
        (True, "True", "True", "true"),
        (False, "False", "False", "false"),
    ],
)
def test_a_cell_as_text_name_and_class(cell: Any, text: str, name: str, label: str | int | None) -> None:
    assert text_of(cell, "c", "row 1") == text
    assert name_of(cell, "c", "row 1") == name
    assert label_of(cell, "c", "row 1") == label
    assert type(label_of(cell, "c", "row 1")) is type(label)


@pytest.mark.parametrize("cell", [["a"], [], ("a",), {"a": 1}, b"\xff"])
def test_what_is_no_single_value_is_refused_by_its_column(cell: Any) -> None:
    for read in (text_of, name_of, label_of):
        with pytest.raises(LichenError, match="'kind' holds") as told:
            read(cell, "kind", "rows.jsonl, row 3")
        assert told.value.where == "rows.jsonl, row 3"
        assert told.value.fix
