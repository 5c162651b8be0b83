"""A run on another base: the old one is only read, a gate says which is to be used, what does not fit is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.store import load_tree
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.rebase.gate import Answer, judge
from lichen.recipes.rebase.moved import moved_recipe
from lichen.recipes.rebase.run import rebase
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.yaml import dump_yaml
from support.staged import save_staged, staged_page
from support.tiny_llama import WORDS, save_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in ``old``, and bases: ``newer`` of the same shapes, ``wider``, and ``wordy`` of more words."""
    home = save_staged(tmp_path_factory.mktemp("rebase"))
    page = staged_page(home)
    del page["stages"]
    lichen.run(page, out=home / "old")
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    with torch.no_grad():
        for name, x in model.named_parameters():
            x += 0.01 * torch.randn(x.shape, generator=torch_generator(0, name))
    config = model.config.__class__.from_pretrained(home / "model", intermediate_size=64)
    for name, one in {"newer": model, "wider": LlamaForCausalLM(config)}.items():
        one.save_pretrained(home / name)
        AutoTokenizer.from_pretrained(home / "model").save_pretrained(home / name)
    save_model(home / "wordy", more=("more", "words"))
    lines = [json.dumps({"prompt": " ".join((*WORDS, *WORDS)[i : i + 3])}) for i in range(0, 36, 3)]
    (home / "ask.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return home


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_tree(folder / "state" / "final.safetensors")[0]


def slow_bits(folder: Path) -> list[float]:
    """Bits a byte of each client's validation rows, row by row through the merged transformers model."""
    recipe, _, joined, tokenizer = open_models(folder)
    found = []
    for shard in open_recipe(recipe).experiment.clients.valid:
        bits, size = 0.0, 0
        for ids, labels in zip(shard.input_ids, shard.labels, strict=True):
            with torch.no_grad():
                log_TV = joined(torch.tensor(ids)[None].long()).logits[0].double().log_softmax(-1)
            targets = [int(token) for token in labels[1:]]
            bits -= sum(float(log_TV[t, token]) for t, token in enumerate(targets) if token != -100) / math.log(2)
            size += len(tokenizer.decode([t for t in targets if t != -100], skip_special_tokens=True).encode())
        found.append(bits / size)
    return found


def test_the_adapter_goes_on_as_it_is_and_the_old_run_is_only_read(home: Path) -> None:
    before = bytes_in(home / "old")
    done = rebase(home / "old", str(home / "newer"), rounds=1, out=home / "as-is")
    assert bytes_in(home / "old") == before
    assert done.before.value_N == pytest.approx(slow_bits(home / "old"), rel=1e-5)
    assert done.after.value_N == pytest.approx(slow_bits(home / "as-is"), rel=1e-5)
    assert done.after.mean == pytest.approx(sum(done.after.value_N) / 3)
    # Before the rounds it is the old adapter, to the bit, on the new base.
    recipe = read_recipe(home / "as-is" / "recipe.yaml")
    start = open_recipe(recipe).experiment.start.trainable
    assert all(torch.equal(x, start[name]) for name, x in final(home / "old").items())
    assert recipe.model.name == str(home / "newer")
    assert recipe.federation.rounds == 1
    written = json.loads((home / "as-is" / "rebase.json").read_text())
    assert written == json.loads(json.dumps(done.as_dict()))
    assert written["use"] == str(home / ("as-is" if done.verdict.accepted else "old"))
    again = rebase(home / "old", str(home / "newer"), rounds=1, out=home / "as-is")
    assert again.as_dict() == done.as_dict()


def test_a_killed_command_goes_on_to_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"how": "restart", "rounds": 2}
    whole = rebase(home / "old", str(home / "newer"), out=tmp_path / "whole", **words)
    save = RunFolder.save

    def save_and_die(folder: RunFolder, path: Path, state: Any) -> None:
        save(folder, path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        rebase(home / "old", str(home / "newer"), out=tmp_path / "cut", **words)
    monkeypatch.undo()
    with pytest.raises(LichenError, match="is not empty"):
        rebase(home / "old", str(home / "newer"), out=tmp_path / "cut", how="restart", rounds=3)
    done = rebase(home / "old", str(home / "newer"), out=tmp_path / "cut", **words)
    assert done.after == whole.after
    assert all(torch.equal(x, final(tmp_path / "whole")[name]) for name, x in final(tmp_path / "cut").items())


def test_a_base_of_other_words_learns_what_the_old_model_answers(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = bytes_in(home / "old"), home / "distil"
    words = ["--model", str(home / "wordy"), "--how", "distil", "--prompts", str(home / "ask.jsonl")]
    assert cli.main(["rebase", str(home / "old"), *words, "--rounds", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert bytes_in(home / "old") == before
    found = json.loads((out / "rebase.json").read_text())
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert [line[:2] for line in lines if line[0] in ("old", "new")] == [
        ["old", "base"],
        ["new", "base,"],
        ["new", "base,"],
    ]
    assert lines[-1] == ["use:", found["use"]]
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(rows) >= 10
    assert {row["client"] for row in rows} == {"server"}
    assert (out / "answers.jsonl").stat().st_mode & 0o077 == 0
    _, _, old_model, tokenizer = open_models(home / "old")
    ids = tokenizer(f"<s> {rows[0]['prompt']}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    first = int(old_model(ids).logits[0, -1].argmax())
    assert rows[0]["completion"].split()[0] == tokenizer.decode([first])
    first_stage = read_recipe(out / "1-distil" / "recipe.yaml")
    assert first_stage.data.name == str(out / "answers.jsonl")
    assert (first_stage.privacy, first_stage.data.partition.by) == (None, "client")
    assert read_recipe(out / "2-clients" / "recipe.yaml").model.adapter.init_from == str(out / "1-distil" / "adapter")
    assert lichen.report(out).runs[0].folder == out / "2-clients"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "other words": ({"model": "wordy"}, "--model", "another vocabulary"),
    "other shapes": ({"model": "wider"}, "--model", "another shape"),
    "no such model": ({"model": "nothing-there"}, "--model", "no such model folder"),
    "no such model, anew": ({"model": "nothing-there", "how": "restart"}, "--model", "no such model folder"),
    "no questions": ({"how": "distil"}, "--prompts", "0 questions"),
    "no such questions": ({"how": "distil", "prompts": Path("nowhere.jsonl")}, "--prompts", "no such file"),
    "questions for nothing": ({"prompts": Path("ask.jsonl")}, "--prompts", "asks nothing"),
    "no rounds": ({"rounds": 0}, "--rounds", "train nobody"),
    "a share of two": ({"tolerance": 2.0}, "--tolerance", "no share"),
    "a share below none": ({"most_harmed": -0.1}, "--harmed", "no share"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_written(home: Path, tmp_path: Path, name: str) -> None:
    words, where, what = BAD[name]
    before = bytes_in(home / "old")
    model = str(home / words.get("model", "newer"))
    with pytest.raises(LichenError, match=what) as caught:
        rebase(home / "old", model, out=tmp_path / "new", **{k: v for k, v in words.items() if k != "model"})
    assert caught.value.where.startswith(where)
    assert caught.value.fix
    assert str(caught.value).count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert bytes_in(home / "old") == before


def test_a_name_that_is_none_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="names no model"):
        rebase(home / "old", " ", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_runs_without_such_an_adapter_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="is not a run's folder"):
        rebase(home / "model", str(home / "newer"), out=tmp_path / "new")
    page = staged_page(home, federation={"rounds": 1, "local_steps": 1, "batch_size": 4, "aggregate": "fedsa"})
    del page["stages"]
    part = lichen.run(page, out=tmp_path / "part")
    with pytest.raises(LichenError, match="leaves a part of each adapter"):
        rebase(part.folder, str(home / "newer"), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_into_the_old_run(home: Path) -> None:
    before = bytes_in(home / "old")
    for out in (home / "old", home / "old" / "new", home / "newer" / ".." / "old" / "deep" / "new"):
        with pytest.raises(LichenError, match="lies in the old run") as caught:
            rebase(home / "old", str(home / "newer"), out=out, rounds=1)
        assert caught.value.where == f"--out {out}"
    assert bytes_in(home / "old") == before
    with pytest.raises(LichenError, match="is a file"):
        rebase(home / "rows.jsonl", str(home / "newer"))


def test_a_stream_names_the_folders_of_its_periods(home: Path, tmp_path: Path) -> None:
    page = staged_page(home, stream={"by": "month"})
    del page["stages"]
    page["data"] = {**page["data"], "columns": {**page["data"]["columns"], "time": "when"}}
    (tmp_path / "old" / "periods" / "2018-05").mkdir(parents=True)
    (tmp_path / "old" / "recipe.yaml").write_text(dump_yaml(page), encoding="utf-8")
    with pytest.raises(LichenError, match="is a stream of periods") as caught:
        rebase(tmp_path / "old", str(home / "newer"), out=tmp_path / "new")
    assert caught.value.fix.endswith(str(tmp_path / "old" / "periods" / "2018-05"))


def test_what_learned_preferences_is_not_distilled(home: Path, tmp_path: Path) -> None:
    page = staged_page(home, task="prefer", prefer={"kind": "spin"})
    del page["stages"]
    with pytest.raises(LichenError, match="better and worse answers") as caught:
        moved_recipe(
            read_recipe(page), "newer", "distil", rounds=1, source=tmp_path, answers=tmp_path / "answers.jsonl"
        )
    assert caught.value.where == "--how distil"


OLD = Answer(mean=2.0, worst_decile=3.0, general=4.0, value_N=(1.0, 2.0, 3.0, math.nan))


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, ()),
        ({"mean": 1.9, "worst_decile": 3.05, "general": 4.07}, ()),
        ({"mean": 2.01}, ("the mean",)),
        ({"worst_decile": 3.07}, ("the worst decile",)),
        ({"general": 4.09}, ("general text",)),
        ({"general": None}, ()),
        ({"value_N": (1.1, 1.0, 1.0, 9.0)}, ("33 % of the clients",)),
        ({"mean": math.nan}, ("the mean",)),
    ],
)
def test_the_gate_opens_for_a_base_that_serves_all(changes: dict[str, Any], faults: tuple[str, ...]) -> None:
    new = Answer(**{"mean": 2.0, "worst_decile": 3.0, "general": 4.0, "value_N": OLD.value_N, **changes})
    found = judge(OLD, new, tolerance=0.02, most_harmed=0.25)
    assert found.accepted == (not faults)
    assert len(found.faults) == len(faults)
    assert all(text.startswith(head) for text, head in zip(found.faults, faults, strict=True))
