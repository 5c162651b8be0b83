"""Codes and noise at the cuts of a recipe: what is refused when it is read."""

from __future__ import annotations

from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ({"code": ["int9"]}, "no codec is called 'int9'"),
        ({"code": ["int8", "topk:1/2"]}, "leaves nothing"),
        ({"code": ["sketch:2"]}, "a token is a vector"),
        ({"code": ["int8", "change"]}, "change stands first"),
        ({"code": ["change"]}, "change stands first"),
        ({"code": ["change", "sketch:2"]}, "a token is a vector"),
        ({"noise": -0.1}, "must be at least 0"),
        ({"noise": float("inf")}, "finite"),
    ],
)
def test_what_cannot_cross_is_refused_with_its_key(tmp_path: Any, split: dict[str, Any], part: str) -> None:
    with pytest.raises(LichenError) as refused:
        read_recipe(recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", split=split))
    assert part in str(refused.value)
    assert "split" in str(refused.value)


def test_words_and_noise_are_read(tmp_path: Any) -> None:
    about = {"code": ["topk:8/16", "int8~"], "noise": 0.5}
    read = read_recipe(recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", split=about)).split
    assert read is not None
    assert (read.code, read.noise) == (("topk:8/16", "int8~"), 0.5)
