"""Folders that were written by old names of keys go on, and what is finished in them counts as finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes import run as running
from lichen.recipes.artifacts.shared_scores import former_shared_key, shared_key
from lichen.recipes.compare import adopt_cells, cells_of, run_comparison
from lichen.recipes.comparison import read_comparison
from lichen.recipes.schema.read import former_sha256, read_recipe, recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.renamed_keys import with_old_names
from lichen.recipes.schema.yaml import dump_yaml


def made_before(folder: Path, recipe: Recipe) -> None:
    """Let a run's folder look as if it had been written by the old names."""
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "recipe.yaml").write_text(dump_yaml(with_old_names(recipe.model_dump(mode="json"))))
    for file in (folder / "state" / "recipe.sha256", folder / "summary.json"):
        if file.exists():
            file.write_text(file.read_text().replace(recipe_sha256(recipe), former_sha256(recipe)))


QUICK = ["federation.rounds=3", "optimizer.lr=0.3", "data.max_rows=30", "data.test=0.1", "engine.clients_per_block=2"]
QUICK += ["compare.alone_epochs=1"]


def test_a_run_begun_before_goes_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    recipe = read_recipe("digits", QUICK)
    assert recipe_sha256(recipe) != former_sha256(recipe)
    whole = lichen.run(recipe, out=tmp_path / "whole")

    def kill(event: Any) -> None:
        if event.report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lichen.run(recipe, out=tmp_path / "parts", observers=[kill])
    made_before(tmp_path / "parts", recipe)
    assert recipe_of(tmp_path / "parts") == recipe
    again = lichen.run(recipe_of(tmp_path / "parts"), out=tmp_path / "parts", resume=True)
    assert again.summary["columns"] == whole.summary["columns"]
    assert again.summary["recipe_sha256"] == recipe_sha256(recipe)
    assert (tmp_path / "parts" / "recipe.yaml").read_text() == write_recipe(recipe)
    assert not [told for told in recwarn if "is now" in str(told.message)], "nobody wrote these names by hand"
    with pytest.raises(LichenError, match="was made by another recipe"):
        lichen.run(read_recipe("digits", [*QUICK, "seed=1"]), out=tmp_path / "parts", resume=True)


def test_cells_of_before_count_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = """
base: digits
set:
  federation.rounds: 1
  optimizer.lr: 0.3
  data: {max_rows: 30, test: 0.1}
  compare.alone_epochs: 1
  engine.clients_per_block: 2
seeds: [0]
methods:
  one:
  two: {federation.server.momentum: 0.5}
"""
    (tmp_path / "page.yaml").write_text(page)
    known = read_comparison([tmp_path / "page.yaml"])
    out = tmp_path / "out"
    for name in ("curves_png", "clients_png"):
        monkeypatch.setattr(running, name, lambda *_, **__: None)
    first = run_comparison(known, out)
    for cell in cells_of(known, out):
        made_before(cell.folder, cell.recipe)
        home = cell.folder.parent
        home.rename(out / f"{cell.method.name}-{former_sha256(cell.method.recipe)[:8]}")
        assert cell.summary() is None
    monkeypatch.setattr(running, "run", lambda *_, **__: pytest.fail("it was run again"))
    again = run_comparison(known, out)
    assert [row.as_dict() for row in again.rows] == [row.as_dict() for row in first.rows]


def test_what_cells_share_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text("base: digits\nseeds: [0]\nmethods:\n  one:\n")
    known, out = read_comparison([tmp_path / "page.yaml"]), tmp_path / "out"
    (recipe,) = (cell.recipe for cell in cells_of(known, out))
    assert shared_key(recipe) != former_shared_key(recipe)
    (out / "shared" / former_shared_key(recipe)).mkdir(parents=True)
    (out / "shared" / former_shared_key(recipe) / "base.safetensors").write_bytes(b"x")
    adopt_cells(known, out)
    assert [file.parent.name for file in (out / "shared").rglob("*.safetensors")] == [shared_key(recipe)]
