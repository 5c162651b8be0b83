"""Sites under privacy train and answer nothing else, and one key gives the bytes of a simulation over all rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.data.sources.records import load_records
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from support.site_threads import sites_in_threads

SITES = {"a.jsonl": (0, 3), "b.jsonl": (1,), "c.jsonl": (2, 4, 5)}
KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with sites_in_threads():
        yield


def save_digits(home: Path) -> dict[str, Path]:
    """Six clients' digits in three files."""
    home.mkdir()
    for name, own in SITES.items():
        rows = [
            {"who": f"client-{at % 6}", "pixels": one.features[0].tolist(), "digit": one.label}  # type: ignore[index]
            for at, one in enumerate(load_records("digits")[:150])
            if at % 6 in own
        ]
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: home / name for name in SITES}


def private(home: Path) -> dict[str, Any]:
    return {
        "name": "private",
        "task": "classify",
        "model": {"student": {"kind": "image-mlp", "width": 8}},
        "data": {
            "name": str(home / "sites"),
            "columns": {"client": "who", "numbers": "pixels", "label": "digit"},
            "valid": 0.2,
            "test": 0.2,
        },
        "optimizer": {"name": "sgd", "lr": [0.1]},
        "federation": {
            **{"rounds": 2, "local_steps": 2, "batch_size": 4, "aggregate": "mean", "weighting": "uniform"},
            **{"sampling": "poisson", "clients_per_round": 3},
        },
        "compare": {"baselines": []},
        "privacy": {"sigma": 2.0, "delta": 1e-2, "clip": 0.5},
    }


def apart(whole: dict[str, Any], **more: Any) -> Recipe:
    """The same, of rows that nobody but the sites knows where to find."""
    return read_recipe({**whole, "engine": {"name": "spawned"}, "data": {**whole["data"], "name": "/nowhere"}, **more})


def with_key(out: Path) -> Path:
    """A folder that has nothing but the key."""
    (out / "state").mkdir(parents=True)
    (out / "state" / "privacy.key").write_bytes(KEY)
    (out / "state" / "privacy.key").chmod(0o600)
    return out


def test_sites_train_and_answer_nothing_else(tmp_path: Path) -> None:
    sites, whole = save_digits(tmp_path / "sites"), private(tmp_path)
    local = lichen.run(whole, out=with_key(tmp_path / "local"), resume=True).summary
    away = lichen.run(apart(whole), out=with_key(tmp_path / "apart"), resume=True, sites=sites).summary
    finals = [(tmp_path / name / "state" / "final.safetensors").read_bytes() for name in ("local", "apart")]
    assert finals[0] == finals[1]
    assert local["columns"]["federated"] is not None
    assert away["columns"]["federated"] is None
    assert away["privacy"]["statement"] == local["privacy"]["statement"]
    assert away["privacy"]["simulated"] == []
    assert away["privacy"]["statement"] in str(lichen.report(tmp_path / "apart"))


@pytest.mark.parametrize(
    ("change", "key"),
    [({"compare": {"baselines": ["alone"]}}, "compare.baselines"), ({"privacy": {"seed": 1}}, "privacy.seed")],
)
def test_sites_are_not_asked_for_scores_nor_for_noise_that_everybody_knows(
    change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    sites, whole = save_digits(tmp_path / "sites"), private(tmp_path)
    recipe = apart(whole, **{name: {**whole[name], **value} for name, value in change.items()})
    with pytest.raises(LichenError) as caught:
        lichen.run(recipe, out=tmp_path / "run", sites=sites)
    assert str(caught.value).startswith(f"{key}: ")
