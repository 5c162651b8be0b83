"""A stream that goes on another base: what fits, what is scored on which base, the gate, and bytes after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lichen
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.adapt import score_on
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import save_model

SECOND = MONTHS[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three months, and bases: ``newer`` of the same shapes, ``loud`` that is too sure, and ``wordy`` of more words."""
    home = tmp_path_factory.mktemp("rebased")
    save_model(home / "model")
    save_model(home / "wordy", more=("more", "words"))
    save_model(home / "biased", biases=True)
    save_dated(home / "rows.jsonl", MONTHS[:3])
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    with torch.no_grad():
        for name, x in model.named_parameters():
            x += 0.01 * torch.randn(x.shape, generator=torch_generator(0, name))
    model.save_pretrained(home / "newer")
    with torch.no_grad():
        model.lm_head.weight *= 6
    model.save_pretrained(home / "loud")
    for base in ("newer", "loud"):
        AutoTokenizer.from_pretrained(home / "model").save_pretrained(home / base)
    return home


def page(home: Path, base: str, how: str = "as-is", **more: Any) -> dict[str, Any]:
    rebase = {"period": SECOND, "model": str(home / base), "how": how}
    sections = {"federation": {"rounds": 1}, **more, "stream": {**more.get("stream", {}), "rebase": rebase}}
    return stream(home / "model", home / "rows.jsonl", **sections)


@pytest.fixture(scope="module")
def whole(home: Path) -> lichen.Result:
    return lichen.run(page(home, "newer"), out=home / "whole")


def periods(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "periods.json").read_text(encoding="utf-8"))
    for one in found["periods"]:
        one.pop("record_sha256")
    return found


def final(folder: Path, period: str) -> dict[str, torch.Tensor]:
    return load_tree(folder / "periods" / period / "state" / "final.safetensors")[0]


def slow_mean(home: Path, base: str, tree: dict[str, torch.Tensor], period: str, aside: Path) -> float:
    """The mean perplexity of an adapter on the test rows of a period, on a base that is named."""
    plain = read_recipe(stream(home / "model", home / "rows.jsonl", stream={"period": period}))
    experiment = open_recipe(on_base(plain, str(home / base))).experiment
    sums = score_on(experiment, experiment.clients.test, Shared.of_flat(tree), aside)
    return float((sums["loss_sum"] / sums["count"]).double().exp().mean())


def test_each_model_is_scored_on_the_base_that_it_was_made_on(home: Path, whole: lichen.Result, tmp_path: Path) -> None:
    found, folder = periods(whole.folder), whole.folder
    bases = ("model", "newer", "newer")
    assert [one["base"] for one in found["periods"]] == [str(home / base) for base in bases]
    for number, (model, base) in enumerate(zip(MONTHS, bases, strict=False)):
        for place, month in enumerate(MONTHS[:3]):
            expected = slow_mean(home, base, final(folder, model), month, tmp_path)
            assert found["matrix"][number + 1][place] == pytest.approx(expected, rel=1e-6)
    rebased = found["rebased"]
    assert (rebased["period"], rebased["model"], rebased["how"]) == (SECOND, str(home / "newer"), "as-is")
    assert rebased["before"] == found["matrix"][1][1] == found["prequential"][1]
    expected = slow_mean(home, "newer", final(folder, MONTHS[0]), SECOND, tmp_path)
    assert rebased["beginning"] == pytest.approx(expected, rel=1e-6)
    assert rebased["beginning"] != rebased["before"]
    assert rebased["after"] == found["matrix"][2][1]
    assert rebased["accepted"]
    assert found["on_new_base"]
    assert whole.summary["extra"]["stream.rebased"] == f"{SECOND}: newer, as-is"
    for key in ("before", "beginning", "after"):
        assert whole.summary["extra"][f"stream.rebased.{key}"] == rebased[key]
    own = read_recipe(folder / "periods" / SECOND / "recipe.yaml")
    assert own.model.name == str(home / "newer")
    assert own.model.adapter.init_from == str((folder / "periods" / MONTHS[0] / "adapter").absolute())


def test_what_the_stream_ends_with_is_put_on_the_new_base(home: Path, whole: lichen.Result) -> None:
    recipe, bare, _, _ = open_models(whole.folder)
    assert recipe.model.name == str(home / "newer")
    newer = AutoModelForCausalLM.from_pretrained(home / "newer").state_dict()
    assert all(torch.equal(x, newer[name]) for name, x in bare.state_dict().items())
    config = json.loads((whole.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(home / "newer")
    card = (whole.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert card == card.replace(str(home / "model"), "")
    merged = AutoModelForCausalLM.from_pretrained(lichen.export(whole.folder, merge=True))
    inside = lichen.export(whole.folder / "periods" / MONTHS[2], merge=True)
    expected = AutoModelForCausalLM.from_pretrained(inside).state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in merged.state_dict().items())


def test_killed_at_each_round_it_ends_in_the_same_bytes(
    home: Path, whole: lichen.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = RunFolder.save, tmp_path / "cut"
    for _ in range(3):
        died: list[Path] = []

        def save_and_die(folder: RunFolder, path: Path, state: Any, died: list[Path] = died) -> None:
            save(folder, path, state)
            if not died:
                died.append(path)
                raise KeyboardInterrupt

        monkeypatch.setattr(RunFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            lichen.run(page(home, "newer"), out=out, resume=out.exists())
        monkeypatch.undo()
    done = lichen.run(page(home, "newer"), out=out, resume=True)
    assert periods(out) == periods(whole.folder)
    assert done.summary["columns"] == whole.summary["columns"]
    for month in MONTHS[:3]:
        assert all(torch.equal(x, final(whole.folder, month)[name]) for name, x in final(out, month).items())
    scores = {path.name: path.read_bytes() for path in (whole.folder / "state" / "scores").glob("stream.*")}
    assert {path.name: path.read_bytes() for path in (out / "state" / "scores").glob("stream.*")} == scores


def test_the_gate_sends_the_stream_back_to_the_base_before(home: Path, tmp_path: Path) -> None:
    keep = {"react": "roll-back", "keep": {"recent": 0.1}}
    lines: list[str] = []
    back = lichen.run(page(home, "loud", "restart", stream=keep), out=tmp_path / "back", say=lines.append)
    found = periods(back.folder)
    assert [one["rolled_back"] is None for one in found["periods"]] == [True, False, True]
    assert [Path(one["base"]).name for one in found["periods"]] == ["model", "loud", "model"]
    assert not found["rebased"]["accepted"]
    assert not found["on_new_base"]
    assert found["matrix"][2] == found["matrix"][1]
    assert back.summary["extra"]["stream.rebased"] == f"{SECOND}: loud, restart, rolled back"
    last = read_recipe(back.folder / "periods" / MONTHS[2] / "recipe.yaml").model
    assert (last.name, Path(str(last.adapter.init_from)).parent.name) == (str(home / "model"), MONTHS[0])
    assert open_models(back.folder)[0].model.name == str(home / "model")
    assert any(f"on {home / 'loud'} from here on, restart" in line for line in lines)


def test_general_text_is_held_against_the_model_before_on_its_own_base(home: Path, tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w5 w6 w7 w8"}\n', encoding="utf-8")
    compare = {"retention_text": str(tmp_path / "general.jsonl"), "retention_rows": 8}
    keep = {"react": "roll-back", "keep": {"recent": 1e9, "general": 0.0}}
    done = lichen.run(page(home, "loud", "restart", stream=keep, compare=compare), out=tmp_path / "run")
    summaries = [lichen.report(done.folder / "periods" / month).runs[0].summary["extra"] for month in MONTHS[:3]]
    first, second = periods(done.folder)["periods"][:2]
    there = summaries[0]["forgotten.after" if first["in_force"] == MONTHS[0] else "forgotten.before"]
    assert summaries[1]["forgotten.before"] != there  # of the other base
    assert (second["rolled_back"] is None) == (summaries[1]["forgotten.after"] <= there)


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, str]] = {
    "other words": ("wordy", {}, {}, "stream.rebase.model", "another vocabulary"),
    "other words, by token": ("wordy", {"how": "restart"}, {}, "stream.rebase.model", "another vocabulary"),
    "other shapes": ("biased", {}, {}, "stream.rebase.model", "another shape"),
    "no base": ("nowhere", {}, {}, "stream.rebase.model", "no such model folder"),
    "no such period": ("newer", {"period": "2018-07"}, {}, "stream.rebase.period", "has no rows of '2018-07'"),
    "the first period": ("newer", {"period": MONTHS[0]}, {}, "stream.rebase.period", "nothing comes before 2018-04"),
    "the same base": ("model", {}, {}, "stream.rebase.model", "is the base that the stream begins on"),
    "anew in any case": ("newer", {}, {"react": "restart"}, "stream.rebase.how", "every period begins anew"),
    "one period": ("newer", {}, {"period": SECOND}, "stream.rebase", "one period alone"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_base_that_does_not_fit_is_refused_before_anything_is_trained(home: Path, tmp_path: Path, name: str) -> None:
    base, more, section, where, what = BAD[name]
    sections = page(home, base, stream=section)
    sections["stream"]["rebase"] |= more
    with pytest.raises(LichenError, match=what) as caught:
        lichen.run(sections, out=tmp_path / "out")
    assert caught.value.where.startswith(where)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_rows_with_labels_begin_anew_on_a_base_of_other_words(home: Path, tmp_path: Path) -> None:
    sections = page(home, "wordy", "restart")
    columns = {"client": "who", "text": "reply", "label": "mood", "time": "when"}
    sections |= {
        "task": "classify",
        "data": {**sections["data"], "columns": columns, "classes": ["calm", "glad"]},
    }
    del sections["data"]["form"]
    done = lichen.run(sections, out=tmp_path / "run")
    assert [Path(one["base"]).name for one in periods(done.folder)["periods"]] == ["model", "wordy", "wordy"]
    assert lichen.talk(done.folder).answer("w1 w2")[1]


def test_a_stream_that_has_begun_is_given_another_base_for_a_period_to_come(
    home: Path, whole: lichen.Result, tmp_path: Path
) -> None:
    data, out, sections = tmp_path / "rows.jsonl", tmp_path / "run", page(home, "newer")
    save_dated(data, MONTHS[:1])
    sections["data"]["name"] = str(data)
    plain = {**sections, "stream": {"by": "month"}}
    lichen.run(plain, out=out)
    late = {**sections, "stream": {**sections["stream"], "rebase": {"period": MONTHS[0], "model": str(home / "newer")}}}
    with pytest.raises(LichenError, match=r"stream\.rebase differs"):
        lichen.run(late, out=out, resume=True)
    save_dated(data, MONTHS[:3])
    lines = data.read_text(encoding="utf-8")
    data.write_text(lines + lines.splitlines()[0].replace(MONTHS[0], "2018-12") + "\n", encoding="utf-8")
    with pytest.raises(LichenError, match="has 1 rows") as caught:
        lichen.run(sections, out=out, resume=True)
    assert caught.value.fix.startswith("take these rows out until there are more")
    assert read_recipe(out / "recipe.yaml") == read_recipe(plain)
    data.write_text(lines, encoding="utf-8")
    done = lichen.run(sections, out=out, resume=True)
    assert {**periods(out), "rows": 0} == {**periods(whole.folder), "rows": 0}
    assert done.summary["columns"] == whole.summary["columns"]


def test_where_every_period_was_rolled_back_there_is_no_model_and_it_is_said_how_to_go_on(
    home: Path, tmp_path: Path
) -> None:
    save_dated(tmp_path / "rows.jsonl", MONTHS[:1])
    wild = {"stream": {"react": "roll-back"}, "optimizer": {"lr": [50.0]}, "federation": {"rounds": 1}}
    done = lichen.run(stream(home / "model", tmp_path / "rows.jsonl", **wild), out=tmp_path / "run")
    requests: tuple[Callable[[], object], ...] = (
        lambda: lichen.talk(done.folder),
        lambda: lichen.export(done.folder),
        lambda: lichen.export(done.folder, merge=True),
    )
    for request in requests:
        with pytest.raises(LichenError, match="every period was rolled back") as caught:
            request()
        assert "periods" in caught.value.fix
