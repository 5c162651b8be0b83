"""Runs share the bare model's scores where these are the same, and where rows cross coded otherwise they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lichen.recipes.artifacts.shared_scores import shared_key
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe


def key(**more: Any) -> str:
    return shared_key(read_recipe(recipe(Path("model"), Path("rows.jsonl"), "pair", **more)))


def test_coded_and_noisy_crossings_have_scores_of_their_own_and_plain_ones_have_not() -> None:
    cut = {"client": {"first": 2, "last": 1}}
    assert key(split=cut) == key(split={**cut, "kind": "v2"}) == key(split={"client": {"first": 3, "last": 1}}) == key()
    own = [
        key(split={**cut, "code": ["int8"]}),
        key(split={**cut, "code": ["int4"]}),
        key(split={**cut, "noise": 0.5}),
        key(split={"client": {"first": 3, "last": 1}, "code": ["int4"]}),
    ]
    assert len({key(), *own}) == 5
    assert key(split={**cut, "code": ["int4"], "kind": "v2"}) == own[1]


def test_links_of_a_pipeline_count_where_they_are_coded() -> None:
    alone: dict[str, Any] = {"compare": {"baselines": ["base"]}}
    plain = key(pipeline={"hosts": 2}, **alone)
    assert plain == key(pipeline={"hosts": 3}, **alone)
    coded = {key(pipeline={"hosts": hosts, "code": ["int8"]}, **alone) for hosts in (2, 3)}
    assert len({plain, *coded}) == 3
