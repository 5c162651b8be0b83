"""Errors call keys by their own names: whatever looks like a key of the recipe in an error's place is one."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import lichen
from lichen.core.errors import LichenError
from lichen.fm.endpoint import Endpoint
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.schema.explain import items_of, section_of
from lichen.recipes.schema.recipe import Recipe

ROOT = Path(lichen.__file__).parent


def known_keys(section: type[BaseModel] = Recipe, path: str = "") -> Iterator[str]:
    """Every dotted key of the schema; those below a free mapping end in a dot and a star."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}"
        inner = section_of(field.annotation) or items_of(field.annotation)
        if inner is not None:
            yield from known_keys(inner, f"{path}{name}.")
        elif "dict[" in str(field.annotation):
            yield f"{path}{name}.*"


KEYS = set(known_keys())
ENDS = {key.split(".")[-2] for key in KEYS if key.count(".") >= 2 and not key.endswith("*")}
"""Sections inside of others, such as adapter: a place that begins with one lacks what stands before it."""


def is_key(place: str) -> bool:
    return place in KEYS or f"{place.rpartition('.')[0]}.*" in KEYS


def looks_like_a_key(place: str) -> bool:
    """A dotted name that begins as one of the recipe's sections, or as a section inside of one."""
    first = place.split(".")[0]
    words = place.replace("_", "").replace(".", "")
    return "." in place and words.isalpha() and words.islower() and first in {*Recipe.model_fields, *ENDS}


def places(source: str) -> Iterator[tuple[int, str]]:
    """Every literal that an error's ``where`` may be, with its line; what is filled in is left out of f-strings."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg == "where":
                for part in ast.walk(keyword.value):
                    if isinstance(part, ast.JoinedStr):
                        break
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield node.lineno, part.value


def wrong(found: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    return [(line, place) for line, place in found if looks_like_a_key(place) and not is_key(place)]


def test_every_place_that_looks_like_a_key_is_one() -> None:
    found = {str(f.relative_to(ROOT)): list(places(f.read_text("utf-8"))) for f in ROOT.rglob("*.py")}
    assert {file: faults for file, some in found.items() if (faults := wrong(some))} == {}
    assert len({place for some in found.values() for _, place in some if is_key(place)}) > 40


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("data.path_client", True),
        ("data.alpha", True),
        ("data.clients", True),
        ("adapter.rank", True),
        ("server.lr", True),
        ("endpoint.url", True),
        ("data.partition.alpha", False),
        ("data.columns.text", False),
        ("teacher.label_words.glad", False),
        ("model", False),
        ("model.adapter", False),
        ("recipe.yaml, line 3", False),
        ("job", False),
        ("aggregator.lda", False),
    ],
)
def test_the_test_itself(place: str, fault: bool) -> None:
    for where in (f"{place!r}", f"{place!r} if y else 'data.name'"):
        assert bool(wrong(places(f"raise LichenError('x', where={where})"))) == fault


@pytest.mark.parametrize(("section", "place"), [("teacher", "teacher.endpoint"), ("synthetic", "synthetic.endpoint")])
def test_an_endpoint_is_called_as_the_recipe_calls_it(
    section: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {
        "task": "classify",
        "model": {"student": {"kind": "text-cnn"}},
        "data": {"name": "clothing-reviews", "public": {"unlabelled": 20, "labelled": 20}},
        section: {"endpoint": {"url": "http://example.org/v1", "model": "m", "api_key_env": "KEY"}},
    }
    if section == "teacher":
        whole["teacher"]["kind"] = "zero-shot"  # type: ignore[index]
    recipe = lichen.read_recipe(whole)
    asked = getattr(recipe, section).endpoint
    with pytest.raises(LichenError) as caught:
        FMRegistry(recipe=recipe, say=print).writer("", asked, ("public",), chat=False)
    assert caught.value.where == f"{place}.url"
    assert is_key(caught.value.where)
    with pytest.raises(LichenError) as caught:
        Endpoint(url="x", model="m")
    assert caught.value.where == "endpoint.url"
