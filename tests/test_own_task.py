"""A task that another package declares by an entry point runs from end to end, with no line of Lichen changed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.tasks import registry

REGRESSION = Path(__file__).parents[1] / "examples" / "regression.py"

DIGITS = {
    "name": "sums",
    "task": "regression",
    "model": {"student": {"kind": "image-mlp", "width": 16}},
    "data": {"name": "digits", "partition": {"by": "iid", "clients": 3}, "max_rows": 60, "on_single_class": "refuse"},
    "optimizer": {"name": "adamw", "lr": [0.03]},
    "federation": {"rounds": 8, "local_steps": 12, "batch_size": 16},
    "compare": {"baselines": ["alone", "pooled"]},
}


def package(home: Path, points: str, source: str = "", *, name: str = "foreign") -> None:
    """Put a package that declares tasks into a folder, as pip would install it."""
    about = home / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[lichen.tasks]\n{points}\n")
    if source:
        (home / f"{name}.py").write_text(source)


def declare(home: Path, points: str, monkeypatch: pytest.MonkeyPatch, source: str = "") -> None:
    """Install such a package for this test alone."""
    package(home, points, source)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr(registry, "_LOADED", dict(registry.BUILT_IN))
    monkeypatch.delitem(sys.modules, "foreign", raising=False)


@pytest.fixture
def regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(tmp_path / "home", "regression = foreign:REGRESSION", monkeypatch, REGRESSION.read_text())


@pytest.mark.usefixtures("regression")
def test_it_runs_and_is_scored_by_its_own_metric(tmp_path: Path) -> None:
    summary = lichen.run(DIGITS, out=tmp_path / "run").summary
    assert (summary["task"], summary["metric"], summary["higher_is_better"]) == ("regression", "rmse", False)
    assert set(summary["extra_columns"]) == {"mean"}
    federated, mean = summary["columns"]["federated"]["mean"], summary["extra_columns"]["mean"]["mean"]
    assert 2.5 < mean < 3.2  # the digits 0 to 9 have a standard deviation of 2.87
    assert federated < 0.85 * mean
    assert summary["extra"]["federated.rmse"] == pytest.approx(federated, rel=1e-6)  # all have one test set
    assert 0 < summary["extra"]["federated.mae"] < summary["extra"]["federated.rmse"]
    rows = list(csv.DictReader((tmp_path / "run" / "clients.csv").read_text().splitlines()))
    assert len(rows) == 3
    again = lichen.run(tmp_path / "run" / "recipe.yaml", out=tmp_path / "again").summary
    assert again["columns"] == summary["columns"]
    with pytest.raises(LichenError, match=r"compare\.metric: does not fit task regression") as told:
        lichen.read_recipe({**DIGITS, "compare": {"metric": "accuracy"}})
    assert told.value.fix == "use rmse or mae, or leave it out"


@pytest.mark.usefixtures("regression")
def test_it_takes_the_other_metric(tmp_path: Path) -> None:
    whole: dict[str, Any] = {**DIGITS, "compare": {"baselines": [], "metric": "mae"}}
    here = lichen.run(whole, out=tmp_path / "here").summary
    assert here["metric"] == "mae"
    assert here["columns"]["federated"]["mean"] == pytest.approx(here["extra"]["federated.mae"], rel=1e-6)


def test_nothing_of_it_is_imported_before_a_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(tmp_path, "regression = foreign:REGRESSION", monkeypatch, "raise RuntimeError('not here')")
    assert lichen.read_recipe("digits").task == "classify"
    assert registry.task_names() == ("chat", "classify", "oneshot", "prefer", "regression")
    with pytest.raises(LichenError, match=r"foreign:REGRESSION: cannot be imported: RuntimeError: not here"):
        lichen.read_recipe(DIGITS)
    with pytest.raises(
        LichenError, match=r"did you mean 'regression'\? use one of: chat, classify, oneshot, prefer, regression"
    ):
        lichen.read_recipe({**DIGITS, "task": "regresion"})


@pytest.mark.parametrize(
    ("points", "source", "fault"),
    [
        ("regression = foreign:NOTHING", "", "cannot be imported: AttributeError"),
        ("regression = elsewhere:TASK", "", "cannot be imported: ModuleNotFoundError"),
        ("regression = foreign:TASK", "TASK = 1", "is a int, no Task"),
        ("regression = foreign:CLASSIFY", "from lichen.tasks.classify import CLASSIFY", "is a task called 'classify'"),
        ("chat = foreign:TASK", "", "the built-in task 'chat' is declared again"),
    ],
)
def test_what_is_no_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: str, source: str, fault: str
) -> None:
    declare(tmp_path, points, monkeypatch, source or "A = 1")
    with pytest.raises(LichenError, match=fault):
        lichen.read_recipe(DIGITS)


def test_two_packages_cannot_declare_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(tmp_path, "regression = foreign:REGRESSION", monkeypatch)
    package(tmp_path, "regression = stranger:REGRESSION", name="stranger")
    with pytest.raises(LichenError, match="two packages declare the task 'regression'"):
        lichen.read_recipe(DIGITS)


def test_the_command_line_knows_it_and_its_clients_may_be_processes(tmp_path: Path) -> None:
    package(tmp_path, "regression = foreign:REGRESSION", REGRESSION.read_text())
    whole = {**DIGITS, "federation": {"rounds": 1, "local_steps": 1}, "compare": {"baselines": []}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({**whole, "engine": {"name": "spawned", "nodes": 1}}))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lichen.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "run",
        str(tmp_path / "recipe.yaml"),
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metric"] == "rmse"
