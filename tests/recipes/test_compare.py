"""A comparison run in sittings: nothing twice, nothing lost, and a bad method does not stop the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.core.files.lock import one_process
from lichen.present.charts.frontier import frontier_png
from lichen.present.summary import read_summary
from lichen.recipes import compare
from lichen.recipes import run as run_module
from lichen.recipes.artifacts.shared_scores import link_shared, shared_key
from lichen.recipes.cells import cells_of
from lichen.recipes.compare import Compared, run_comparison
from lichen.recipes.comparison import Comparison, read_comparison
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe, save_model, save_rows

PAGE = """
question: Which server gets further?
base: digits
set:
  federation: {rounds: 2, local_steps: 2, valid_every: 2}
  optimizer.lr: 0.3
  compare.baselines: []
  data: {max_rows: 30, test: 0.1, partition.clients: 3}
seeds: [0, 1]
methods:
  average:
  momentum: {federation.server.momentum: 0.5}
"""
BAD = PAGE + "  bad: {model.student: {kind: text-cnn}}\n"


def known(folder: Path, text: str = PAGE) -> Comparison:
    (folder / "page.yaml").write_text(text)
    return read_comparison([folder / "page.yaml"])


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these runs."""
    for room, name in ((run_module, "curves_png"), (run_module, "clients_png"), (compare, "frontier_png")):
        monkeypatch.setattr(room, name, lambda *_, **__: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were really run, in order."""
    told: list[str] = []
    real: Callable[..., Any] = run_module.run

    def run(recipe: Any, *, out: Path, **more: Any) -> Any:
        told.append(f"{recipe.name} {recipe.seed}")
        return real(recipe, out=out, **more)

    monkeypatch.setattr(run_module, "run", run)
    return told


def numbers(done: Compared) -> list[Any]:
    """All of the rows but their times."""
    return [{**row.as_dict(), "seconds": None} for row in done.rows]


def test_two_methods_two_seeds_in_one_sitting_or_three(
    tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = known(tmp_path)
    with monkeypatch.context() as drawing:
        drawing.setattr(compare, "frontier_png", frontier_png)
        whole = run_comparison(comparison, tmp_path / "whole")
    assert (tmp_path / "whole" / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    order = ["average 0", "momentum 0", "average 1", "momentum 1"]
    assert calls == order
    assert (whole.cells, whole.left, whole.failed) == (4, 0, 0)

    calls.clear()
    seen = 0

    def kill(event: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 4:  # the second run's last round: a kill in the middle
            raise KeyboardInterrupt

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison, tmp_path / "parts", observers=[kill])
    part = json.loads((tmp_path / "parts" / "compare.json").read_text())
    assert [len(row["seeds"]) for row in part["rows"]] == [1, 0], "the tables of what is finished are there"
    second = run_comparison(comparison, tmp_path / "parts", only=["momentum"], say=lines.append)
    assert (second.cells, second.left) == (2, 0)
    third = run_comparison(comparison, tmp_path / "parts", say=lines.append)
    assert calls == ["average 0", "momentum 0", "momentum 0", "momentum 1", "average 1"]
    assert numbers(third) == numbers(whole)
    assert any(line.startswith("run 4 of 4: average, seed 1; about ") for line in lines)
    assert any("3 of 4 runs are finished" in line for line in lines)

    calls.clear()
    again = run_comparison(comparison, tmp_path / "parts")
    assert calls == []
    assert (numbers(again), again.cells, again.left) == (numbers(whole), 4, 0)
    for name in ("compare.md", "compare.csv"):
        assert (tmp_path / "parts" / name).stat().st_size > 100
    row = whole.rows[0]
    assert row.value is not None
    assert len(row.value.values) == 2
    finished = [cell.summary() for cell in cells_of(comparison, tmp_path / "whole")]
    assert row.value.values == tuple(s["columns"]["federated"]["mean"] for s in (finished[0], finished[2]) if s)
    assert row.memory is not None
    assert row.memory > 0


def test_a_bad_method_is_told_in_its_row(tmp_path: Path, calls: list[str]) -> None:
    done = run_comparison(known(tmp_path, BAD), tmp_path / "out")
    average, momentum, bad = done.rows
    assert (done.failed, done.left, len(calls)) == (2, 0, 6)
    assert len(average.seeds) == len(momentum.seeds) == 2
    assert bad.seeds == ()
    assert len(bad.faults) == 2
    assert "seed 0: model.student.kind: text-cnn does not fit this data" in bad.faults
    assert "text-cnn does not fit" in (tmp_path / "out" / "compare.md").read_text()
    assert not list((tmp_path / "out").glob("bad-*/seed-*")), "nothing was trained, nothing is left"
    calls.clear()
    run_comparison(known(tmp_path, BAD), tmp_path / "out")
    assert calls == ["bad 0", "bad 1"], "it is tried again, the others are not"


def test_a_crash_is_told_in_its_row_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = run_module.run

    def run(recipe: Any, **more: Any) -> Any:
        if recipe.name == "average":
            raise RuntimeError("boom\nsecond line")
        return real(recipe, **more)

    monkeypatch.setattr(run_module, "run", run)
    done = run_comparison(known(tmp_path), tmp_path / "out", minutes=60)
    (fault, _) = done.rows[0].faults
    assert fault.startswith("seed 0: crashed: RuntimeError: boom (average-")
    assert len(done.rows[1].seeds) == 2
    (kept, _) = sorted((tmp_path / "out").glob("average-*/seed-*/crash.txt"))
    assert "second line" in kept.read_text()
    monkeypatch.undo()
    assert run_comparison(known(tmp_path), tmp_path / "out").failed == 0, "the same command goes on"


def test_no_run_starts_after_the_time(tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(compare.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(run_module, "run", lambda recipe, **_: calls.append(recipe.name))
    done = run_comparison(known(tmp_path), tmp_path / "out", minutes=1)
    assert (len(calls), done.left, done.failed) == (2, 2, 0)


def test_another_recipe_is_another_run(tmp_path: Path) -> None:
    first, second = known(tmp_path), known(tmp_path, PAGE.replace("rounds: 2", "rounds: 3"))
    places = [{cell.folder for cell in cells_of(c, tmp_path / "out")} for c in (first, second)]
    assert len(places[0]) == len(places[1]) == 4
    assert not places[0] & places[1]
    asked_otherwise = known(tmp_path, PAGE.replace("Which", "What"))
    assert {cell.folder for cell in cells_of(asked_otherwise, tmp_path / "out")} == places[0]


def test_a_summary_of_another_recipe_is_none(tmp_path: Path) -> None:
    comparison = known(tmp_path)
    run_comparison(comparison, tmp_path / "out", only=["average"])
    cell = cells_of(comparison, tmp_path / "out")[0]
    found = read_summary(cell.folder)
    assert cell.summary() == found
    (cell.folder / "summary.json").write_text(json.dumps({**found, "recipe_sha256": "0" * 64}))
    assert cell.summary() is None
    (cell.folder / "summary.json").write_text("{")
    assert cell.summary() is None


def test_folders_and_metrics_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for out, told in (("full", "no comparison's"), ("page.yaml", "is a file")):
        with pytest.raises(LichenError, match=told):
            run_comparison(known(tmp_path), tmp_path / out)
    mixed = read_comparison(["digits", "reviews-lora"])
    with pytest.raises(LichenError, match="macro_f1 cannot be compared with accuracy of digits"):
        run_comparison(mixed, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_two_processes_do_not_run_one_comparison(tmp_path: Path, calls: list[str]) -> None:
    out = tmp_path / "out"
    with one_process(out, compare.LOCK, say=pytest.fail), pytest.raises(LichenError, match="another process works"):
        run_comparison(known(tmp_path), out)
    assert calls == []
    run_comparison(known(tmp_path), out, only=["average"])
    assert calls == ["average 0", "average 1"]


def test_what_the_bare_models_score_depends_on() -> None:
    def key(*changes: str) -> str:
        return shared_key(read_recipe("chat-demo", changes))

    same = ("federation.rounds=9", "optimizer.lr=1", "model.adapter.rank=2", "name=other", "compare.baselines=[base]")
    assert {key(change) for change in same} == {key()}
    other = (
        "seed=1",
        "data.max_length=9",
        "model.dtype=bfloat16",
        "compare.retention_text=sotu",
        "engine.packing=false",
    )
    assert len({key(), *(key(change) for change in other)}) == 1 + len(other)
    start = "model.adapter.init_from=somewhere"
    assert key(start) != key(start, "model.adapter.rank=2"), "an adapter one starts from moves the scores"


def test_shared_scores_are_taken_from_the_first_run(tmp_path: Path) -> None:
    shared, first, second = (tmp_path / name for name in ("shared", "first", "second"))
    for name in ("base", "base.plain", "forgotten.before", "forgotten.after", "federated", "features/test-0"):
        file = first / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    link_shared(first, shared)
    link_shared(shared, second)
    found = {str(f.relative_to(second)): f.read_bytes() for f in second.rglob("*.safetensors")}
    kept = ("base", "base.plain", "forgotten.before", "features/test-0")
    assert found == {f"{name}.safetensors": name.encode() for name in kept}


def test_rows_that_change_between_its_runs_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    (tmp_path / "base.yaml").write_text(json.dumps(recipe(tmp_path / "model", data, "pair", federation={"rounds": 1})))
    page = "base: base.yaml\nseeds: [0, 1]\nmethods:\n  plain:\n  slow: {federation.local_steps: 1}\n"
    comparison = known(tmp_path, page)
    out = tmp_path / "out"
    assert run_comparison(comparison, out, only=["plain"]).failed == 0
    good = data.read_text()
    data.write_text("".join(good.splitlines(keepends=True)[1:]))
    done = run_comparison(comparison, out)
    assert done.failed == 2
    assert "has changed since the run began: 50 rows then, 49 now" in (out / "compare.md").read_text()
    data.write_text(good)
    assert run_comparison(comparison, out).failed == 0
