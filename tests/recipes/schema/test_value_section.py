"""What values do not go beside is refused when a recipe is built, by key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe

PLAIN: dict[str, Any] = {
    "task": "classify",
    "model": {"student": {"kind": "image-mlp"}},
    "data": {"name": "digits", "partition": {"by": "iid", "clients": 8}},
    "federation": {"aggregate": "mean"},
    "compare": {"baselines": []},
}
PUBLIC = {**PLAIN["data"], "public": {"share": 0.2, "labelled": 100, "unlabelled": 1}}


@pytest.mark.parametrize(
    ("value", "more", "key"),
    [
        (
            {"kind": "exact"},
            {"federation": {"aggregate": "mean", "sampling": "poisson", "clients_per_round": 4}},
            "kind",
        ),
        ({"kind": "exact"}, {"data": {"name": "digits", "partition": {"by": "iid", "clients": 13}}}, "value.kind"),
        ({"kind": "gtg", "rows": "public"}, {}, "value.rows"),
        ({"kind": "gtg"}, {"data": {**PLAIN["data"], "valid": 0}}, "value.rows"),
        (
            {"kind": "gtg", "rows": "public"},
            {"data": PUBLIC, "teacher": {"kind": "labels", "answer_format": "label"}},
            "value.rows",
        ),
        ({"kind": "first", "of": "coalition"}, {}, "value.of"),
        ({"kind": "first"}, {"federation": {"aggregate": "mean", "server": {"name": "adam"}}}, "value.kind"),
        ({"kind": "gtg", "every": 99}, {}, "value.every"),
        ({"kind": "gtg"}, {"optimizer": {"name": "scaffold"}}, "value"),
        ({"kind": "gtg"}, {"optimizer": {"name": "mezo"}}, "value"),
        ({"kind": "gtg"}, {"engine": {"name": "distributed"}}, "engine.name"),
        ({"kind": "gtg"}, {"federation": {"aggregate": "mean", "fair": "qffl"}}, "federation.fair"),
        ({"kind": "gtg"}, {"federation": {"aggregate": "mean", "robust": {"rule": "median"}}}, "federation.robust"),
        ({"kind": "loo"}, {"privacy": {"secure": True}}, "value"),
        ({"kind": "loo"}, {"privacy": {"sigma": 1.0, "clip": 1.0}}, "privacy"),
        ({"kind": "mine"}, {}, "value.kind"),
        ({}, {}, "value.kind"),
    ],
)
def test_what_does_not_go_with_values_is_named(value: dict[str, Any], more: dict[str, Any], key: str) -> None:
    read_recipe({**PLAIN, "value": {"kind": "gtg"}})
    with pytest.raises(LichenError) as error:
        read_recipe({**PLAIN, **more, "value": value})
    assert key in f"{error.value.where} {error.value.what}"
    assert error.value.fix


WORDS = st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.text(max_size=8)
VALUES = st.dictionaries(
    st.sampled_from(["kind", "of", "rows", "every", "seconds"]),
    WORDS | st.sampled_from(["exact", "gtg", "first", "loo", "cohort", "coalition", "public", "valid"]),
    max_size=5,
)


MORE = st.sampled_from([{}, {"data": PUBLIC}, {"engine": {"name": "spawned"}}, {"privacy": {"secure": True}}])
PAID = st.dictionaries(
    st.sampled_from(["reward", "reward_beta", "fair", "q", "tilt", "fair_rate", "clients_per_round", "weighting"]),
    WORDS | st.sampled_from(["cgsv", "none", "qffl", "tilted", "minmax", "uniform", "rows"]),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(st.none() | VALUES, PAID, MORE)
def test_any_sections_are_read_or_refused_with_a_fix(
    value: dict[str, Any] | None, paid: dict[str, Any], more: dict[str, Any]
) -> None:
    try:
        recipe = read_recipe({**PLAIN, **more, "value": value, "federation": {"aggregate": "mean", **paid}})
    except LichenError as error:
        assert error.where  # noqa: PT017
        assert error.fix  # noqa: PT017
    else:
        assert (recipe.value is None) == (value is None)


def test_what_goes_with_values() -> None:
    for value, more in (
        ({"kind": "exact", "of": "coalition", "rows": "public"}, {"data": PUBLIC}),
        ({"kind": "first"}, {"federation": {"aggregate": "mean", "server": {"momentum": 0.5}}}),
        ({"kind": "gtg", "every": 5}, {"engine": {"name": "spawned"}, "wire": {"up": ["int8"], "down": ["int8"]}}),
        ({"kind": "gtg"}, {"attack": {"kind": "free_ride", "liars": 1}}),
    ):
        assert read_recipe({**PLAIN, **more, "value": value}).value is not None
