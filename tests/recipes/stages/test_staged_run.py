"""A recipe of stages gives what its stages give by hand; a kill anywhere resumes to the same bytes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import resume
import torch

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.recipes import run as run_module
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.stages import run as stages_run
from lichen.recipes.stages.read import Staged, read_page
from support.staged import save_staged, staged_page

FOLDERS = ("1-whole", "2-chat", "3-again")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_staged(tmp_path_factory.mktemp("staged"))


@pytest.fixture(scope="module")
def whole(home: Path) -> lichen.Result:
    """All three stages, run at once."""
    return lichen.run(staged_page(home), out=home / "whole")


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_tree(folder / "state" / "final.safetensors")[0]


def equal(one: Path, other: Path) -> None:
    assert final(one).keys() == final(other).keys()
    assert all(torch.equal(x, final(other)[name]) for name, x in final(one).items())


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_stages_are_the_runs_that_one_would_make_by_hand(home: Path, whole: lichen.Result, tmp_path: Path) -> None:
    staged = read_page(staged_page(home))
    assert isinstance(staged, Staged)
    assert [(stage.begins, stage.folder) for stage in staged.stages] == list(
        zip(("anew", "base", "start"), FOLDERS, strict=True)
    )
    out = home / "whole"
    assert whole.folder == out / FOLDERS[-1]
    assert [one.folder for one in whole.stages] == [out / name for name in FOLDERS]
    page = staged_page(home)
    del page["stages"]
    first = lichen.run(
        read_recipe(page, ["model.adapter={kind: full}", "data.form=plain", "optimizer.lr=0.005"]), out=tmp_path / "1"
    )
    equal(first.folder, out / FOLDERS[0])
    base = lichen.export(first.folder, merge=True)
    second = lichen.run(read_recipe(page, [f"model.name={base}", "federation.server.momentum=0.5"]), out=tmp_path / "2")
    equal(second.folder, out / FOLDERS[1])
    words = [f"model.name={base}", f"model.adapter.init_from={second.adapter}", "optimizer.lr=0.01"]
    third = lichen.run(read_recipe(page, words), out=tmp_path / "3")
    equal(third.folder, whole.folder)
    assert third.summary["columns"] == whole.summary["columns"]


def test_each_stage_begins_with_the_score_that_the_last_one_ended_with(whole: lichen.Result) -> None:
    general = [one.summary["extra"] for one in whole.stages]
    for before, after in pairwise(general):
        assert after["forgotten.before"] == pytest.approx(before["forgotten.after"], rel=1e-6)
    assert len({one["forgotten.after"] for one in general}) == 3
    federated, base = (one.summary["columns"] for one in whole.stages[1:])
    assert base["base"]["mean"] == pytest.approx(federated["federated"]["mean"], rel=1e-6)


def test_a_kill_at_every_moment_resumes_to_the_same_bytes(
    home: Path, whole: lichen.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: set[tuple[object, ...]] = set()

    def moment(*name: object) -> None:
        if name not in met:
            met.add(name)
            raise KeyboardInterrupt

    save, export, write = RunFolder.save, run_module.export, stages_run.write_atomic

    def saving(folder: RunFolder, path: Path, state: Any) -> None:
        save(folder, path, state)
        moment("saved", folder.path.name, state.round)

    def exporting(folder: Path, **words: Any) -> Path:
        moment("before merging", folder.name)
        done = export(folder, **words)
        moment("merged", folder.name)
        return done

    def writing(path: Path, data: bytes) -> None:
        moment("before writing", path.name, len(data))
        write(path, data)

    monkeypatch.setattr(RunFolder, "save", saving)
    monkeypatch.setattr(run_module, "export", exporting)
    monkeypatch.setattr(stages_run, "write_atomic", writing)
    out, kills = tmp_path / "run", 0
    while True:
        try:
            done = lichen.run(staged_page(home), out=out, resume=out.exists())
            break
        except KeyboardInterrupt:
            kills += 1
            assert kills < 30
    assert {name for kind, name, *_ in met if kind == "saved"} == set(FOLDERS)
    assert ("merged", FOLDERS[0]) in met
    assert kills == len(met) >= 12
    for name in FOLDERS:
        equal(out / name, home / "whole" / name)
        assert (out / name / "clients.csv").read_bytes() == (home / "whole" / name / "clients.csv").read_bytes()
    assert [one.summary["extra"] for one in done.stages] == [one.summary["extra"] for one in whole.stages]
    assert (out / "recipe.yaml").read_bytes() == (home / "whole" / "recipe.yaml").read_bytes()


def test_what_is_finished_is_not_run_again_and_stays_as_it_is(
    home: Path, whole: lichen.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home / "whole"
    before = bytes_in(out)
    monkeypatch.setattr(run_module, "_go", None)  # whoever runs a stage needs it
    assert lichen.run(staged_page(home), out=out, resume=True).summary == whole.summary
    page = staged_page(home)
    page["stages"][1] = {"name": "chat", "federation.server.momentum": 0.25}
    with pytest.raises(LichenError, match=r"is finished.*federation\.server\.momentum differs") as caught:
        lichen.run(page, out=out, resume=True)
    assert caught.value.where == "stages.chat"
    page = staged_page(home)
    del page["stages"][2]
    with pytest.raises(LichenError, match="another stands in its place"):
        lichen.run(page, out=out, resume=True)
    with pytest.raises(LichenError, match="is not empty"):
        lichen.run(staged_page(home), out=out)
    assert bytes_in(out) == before


def test_a_stage_may_follow_what_is_finished(home: Path, whole: lichen.Result, tmp_path: Path) -> None:
    page = staged_page(home)
    lichen.run({**page, "stages": page["stages"][:2]}, out=tmp_path / "run")
    first = bytes_in(tmp_path / "run" / FOLDERS[0])
    done = lichen.run(page, out=tmp_path / "run", resume=True)
    assert [one.folder.name for one in done.stages] == list(FOLDERS)
    equal(done.folder, whole.folder)
    assert bytes_in(tmp_path / "run" / FOLDERS[0]) == first


def test_a_first_stage_that_fails_leaves_no_folder(home: Path, tmp_path: Path) -> None:
    page = staged_page(home, data={**staged_page(home)["data"], "name": str(home / "nowhere.jsonl")})
    with pytest.raises(LichenError, match=r"nowhere\.jsonl"):
        lichen.run(page, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_later_stage_that_fails_says_its_name(home: Path, tmp_path: Path) -> None:
    page = staged_page(home)
    page["stages"] = [page["stages"][0], {"name": "rated", "task": "prefer", "prefer": {"kind": "kto"}}]
    with pytest.raises(LichenError, match="no row has a rating") as caught:
        lichen.run(page, out=tmp_path / "run")
    assert caught.value.where == "stages.rated: data.columns.rating"
    assert (tmp_path / "run" / FOLDERS[0] / "summary.json").is_file()


def test_what_a_resumed_run_must_repeat_is_of_every_stage(home: Path, whole: lichen.Result) -> None:
    found = resume.result_bytes(home / "whole")
    one = resume.result_bytes(home / "whole" / FOLDERS[1])
    assert {name.partition("/")[0] for name in found} == {*FOLDERS, "stages.json"}
    assert (
        one.items() == {name.partition("/")[2]: x for name, x in found.items() if name.startswith(FOLDERS[1])}.items()
    )
    assert f"{FOLDERS[0]}/merged/model.safetensors" in found
    assert b"seconds" not in found["stages.json"]


def test_the_folder_means_its_last_stage(
    home: Path, whole: lichen.Result, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(home / "whole")
    assert cli.main(["report", out]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    (row,) = (line for line in lines if line[:4] == ["again", "the", "adapter", "of"])
    assert row[4:6] == ["chat", "perplexity"]
    assert "three-again" in shown
    assert lichen.report(out).runs[0].summary == whole.summary
    assert cli.main(["export", out]) == 0
    assert capsys.readouterr().out.strip() == str(whole.adapter)
    assert cli.main(["try", out, "w1 w2"]) == 0
    both = capsys.readouterr().out
    assert cli.main(["try", str(whole.folder), "w1 w2"]) == 0
    assert capsys.readouterr().out == both
    assert cli.main(["verify", out, "--json"]) == 0
    assert f'"{whole.folder}"' in capsys.readouterr().out
    page = (home / "whole" / "stages.md").read_text(encoding="utf-8")
    assert "| again | the adapter of chat | perplexity |" in page
    (tmp_path / "recipe.yaml").write_bytes((home / "whole" / "recipe.yaml").read_bytes())
    with pytest.raises(LichenError, match="stage whole of 3 is not finished"):
        lichen.report(tmp_path)


def test_the_command_runs_stages_and_speaks_to_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lichen.recipes.schema.yaml import dump_yaml

    page = staged_page(home)
    page["stages"] = page["stages"][:2]
    (tmp_path / "page.yaml").write_text(dump_yaml(page), encoding="utf-8")
    words = ["-s", "federation.rounds=1", "-s", "stages.chat.federation.rounds=2"]
    assert cli.main(["run", str(tmp_path / "page.yaml"), "--out", str(tmp_path / "run"), "--quiet", *words]) == 0
    shown = capsys.readouterr().out
    assert "the model of whole" in shown
    assert "2 of 2 rounds" in shown
    assert read_recipe(tmp_path / "run" / "1-whole" / "recipe.yaml").federation.rounds == 1
    resume = ["run", "--resume", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*resume, "-s", "stages.whole.federation.rounds=3"]) == 2
    assert "stages.whole: is finished" in capsys.readouterr().err
    assert cli.main([*resume, "--json"]) == 0
    assert '"name": "three-chat"' in capsys.readouterr().out
