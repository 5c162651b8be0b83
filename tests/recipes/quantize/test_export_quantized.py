"""Fewer bits behind a gate: what is written passed, what fails leaves nothing, and the numbers are those of the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.models.gguf.read import read_gguf, state_of
from lichen.recipes.artifacts.sampling import ask_ids
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.quantize import run as quantize_run
from lichen.recipes.quantize.gate import Scores, judge, score_model
from lichen.recipes.quantize.merged import merged_run
from lichen.recipes.quantize.run import export_quantized
from lichen.recipes.tasks.adapt import retention_shard, score_on
from support import tiny_llama
from support.tiny_gguf import TEMPLATE, save


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in ``run``, and one that names no general text and leaves no rows to validate on in ``bare``."""
    home = tmp_path_factory.mktemp("export")
    save("llama-tied", home / "base")
    tiny_llama.save_rows(home / "rows.jsonl", "pair")
    lines = [json.dumps({"text": f"the stone and the moss, {i} of them"}) for i in range(6)]
    (home / "general.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    more: dict[str, Any] = {"federation": {"rounds": 1}, "compare": {"retention_text": str(home / "general.jsonl")}}
    page = tiny_llama.recipe(home / "base", home / "rows.jsonl", "pair", **more)
    lichen.run(page, out=home / "run")
    bare = {**page, "compare": {"baselines": []}, "data": {**page["data"], "valid": 0.0}}
    lichen.run(bare, out=home / "bare")
    return home


def names_in(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


def test_the_merged_model_scores_what_the_run_scores(home: Path) -> None:
    recipe, model, _ = merged_run(home / "run")
    loaded = open_recipe(recipe)
    valid, general = loaded.experiment.clients.valid, retention_shard(loaded)
    ours = score_model(model, valid, general)  # type: ignore[arg-type]
    learned = quantize_learned(home / "run")
    theirs = values_N(recipe, score_on(loaded.experiment, valid, learned, home))
    assert ours.clients == pytest.approx(float(theirs.mean()), rel=1e-4)
    whole = score_on(loaded.experiment, [general], learned, home)
    assert ours.general == pytest.approx(math.exp(float(whole["loss_sum"] / whole["count"])), rel=1e-4)
    assert len(ours.choices) == sum(int((np.asarray(row)[1:] != -100).sum()) for one in valid for row in one.labels)


def quantize_learned(folder: Path) -> Any:
    from lichen.core.store import load_tree
    from lichen.core.wire.shared import Shared

    return Shared.of_flat(load_tree(folder / "state" / "final.safetensors")[0])


@pytest.mark.parametrize("bits", ["f16", "q8_0"])
def test_a_file_holds_the_merged_model_and_its_tokenizer(home: Path, tmp_path: Path, bits: Any) -> None:
    before = names_in(home / "run")
    done = export_quantized(home / "run", bits=bits, gate=0.05, out=tmp_path / "new" / "m.gguf")
    assert done.path == tmp_path / "new" / "m.gguf"
    assert names_in(tmp_path) == {"new", "new/m.gguf"}
    assert names_in(home / "run") == before
    _, model, tokenizer = merged_run(home / "run")
    template = read_gguf(done.path).fields["tokenizer.chat_template"]
    turns = [{"role": "user", "content": "what?"}, {"role": "user", "content": "the stone"}]
    asked = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, return_dict=False)
    assert asked == ask_ids(tokenizer, "transcript", "the stone"), "as it was trained, and not by the base's template"
    assert tokenizer.chat_template == TEMPLATE, "and the run's own stays"
    bound = {"f16": 5e-4, "q8_0": 5e-3}[bits]
    for name, x in state_of(done.path, model).items():
        y = model.get_parameter(name)
        assert float((x - y).abs().max()) <= bound, name
    (attempt,) = done.attempts
    assert attempt.size_bytes == done.path.stat().st_size
    assert attempt.faults == ()
    assert 0.9 < attempt.agreement <= 1
    assert [name.partition(".")[2] for name in attempt.larger] == (
        [] if bits == "f16" else ["0.ffn_down.weight", "1.ffn_down.weight"]
    )


def test_llama_cpp_is_asked_as_the_run_was_trained(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from lichen.recipes.local.open import open_model
    from lichen.serving.contract import Completion, Message

    file = export_quantized(home / "run", bits="f16", gate=0.05, out=tmp_path / "m.gguf").path
    text, found = "the stone and the moss", []
    for path in (file, home / "run"):
        model = open_model(path)
        asked = Completion(messages=(Message(role="user", content=text),), max_tokens=2, temperature=0.0)
        found.append(sum(piece.tokens_in for piece in model.complete(asked)))
        model.close()
    tokenizer = merged_run(home / "run")[2]
    ids = ask_ids(tokenizer, "transcript", text)
    assert found == [len(ids)] * 2
    assert len(ids) != len(ask_ids(tokenizer, "chat", text))


def test_auto_writes_the_smallest_that_passes(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[str] = []

    def fake(before: Scores, after: Scores, gate: float) -> tuple[str, ...]:
        tried.append(str(gate))
        return () if len(tried) == 2 else ("it rises",)

    monkeypatch.setattr(quantize_run, "judge", fake)
    done = export_quantized(home / "run", gate=0.02, out=tmp_path / "m.gguf")
    assert [one.name for one in done.attempts] == ["q4_0", "q4_1"]
    assert read_gguf(done.path).fields["general.file_type"] == 3
    assert tried == ["0.02", "0.02"]


def test_what_fails_the_gate_is_refused_with_what_would_pass_and_nothing_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names_in(home)
    with pytest.raises(LichenError) as caught:
        export_quantized(home / "run", bits="q4_0", gate=1e-6, out=tmp_path / "deep" / "m.gguf")
    words = str(caught.value)
    assert "q4_0 does not pass the gate of 0.0001 %" in words or "no format passes the gate" in words
    monkeypatch.setattr(quantize_run, "judge", lambda old, new, gate: ("it rises",) if len(seen(new)) < 3 else ())
    marks.clear()
    with pytest.raises(LichenError, match=r"--bits q4_0: q4_0 does not pass(.|\n)*it rises(.|\n)*use --bits q5_0"):
        export_quantized(home / "run", bits="q4_0", out=tmp_path / "deep" / "m.gguf")
    monkeypatch.setattr(quantize_run, "judge", lambda *_: ("it rises",))
    with pytest.raises(LichenError, match=r"no format passes the gate of 1 %: f16: it rises"):
        export_quantized(home / "run", bits="auto")
    assert names_in(home) == before
    assert not list(tmp_path.iterdir())


marks: list[Scores] = []


def seen(scores: Scores) -> list[Scores]:
    marks.append(scores)
    return marks


def test_the_gate_is_a_share_of_each_perplexity() -> None:
    def of(clients: float | None, general: float | None) -> Scores:
        return Scores(clients=clients, general=general, choices=np.zeros(1))

    assert judge(of(100, 50), of(101, 51), 0.01) == ()
    assert len(judge(of(100, 50), of(101.01, 51.01), 0.01)) == 2
    assert len(judge(of(100, None), of(math.inf, None), 0.5)) == 1
    assert len(judge(of(100, None), of(math.nan, None), 0.5)) == 1
    assert judge(of(None, 50), of(None, 40), 0.0) == ()


def test_an_int8_folder_loads_by_itself(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = export_quantized(home / "run", bits="int8", gate=0.1, out=tmp_path / "small")
    read = AutoModelForCausalLM.from_pretrained(done.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    _, model, own = merged_run(home / "run")
    assert tokenizer.chat_template == own.chat_template
    ids = torch.tensor([tokenizer("the stone and the moss").input_ids])
    assert ids.tolist() == [own("the stone and the moss").input_ids]
    with torch.no_grad():
        assert 0 < float((read(ids).logits - model(ids).logits).abs().max()) < 0.5
    about = json.loads((done.path / "config.json").read_text())
    assert about["quantization_config"]["load_in_8bit"] is True
    assert str(tmp_path) not in (done.path / "config.json").read_text()
    assert (done.path / "README.md").is_file()
    before = names_in(tmp_path)
    with pytest.raises(LichenError, match="int8 does not pass the gate of 0 %"):
        export_quantized(home / "run", bits="int8", gate=0.0, out=tmp_path / "other")
    assert names_in(tmp_path) == before


def test_bad_input_is_one_sentence_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"x")
    lone = tiny_llama.save_model(tmp_path / "words")
    tiny_llama.save_rows(tmp_path / "rows.jsonl", "pair")
    tiny_llama.save_rows(tmp_path / "moods.jsonl", "label")
    once = {"federation": {"rounds": 1, "local_steps": 1}}
    lichen.run(tiny_llama.recipe(lone, tmp_path / "rows.jsonl", "pair", **once), out=tmp_path / "run")
    lichen.run(tiny_llama.recipe(lone, tmp_path / "moods.jsonl", "label", **once), out=tmp_path / "moods")
    before = names_in(home) | names_in(tmp_path)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (home / "bare", {}, "no text to hold a rounded model against"),
        (tmp_path / "run", {}, "tokenizer has no GGUF form: it is of kind WordLevel"),
        (tmp_path / "moods", {}, "only language models are written so"),
        (tmp_path, {}, "not finished|no such|is no|no summary|has no"),
        (home / "run", {"gate": -1}, "--gate: -1 is no share"),
        (home / "run", {"bits": "q2_k"}, "--bits: a GGUF file has no format 'q2_k'"),
        (home / "run", {"out": tmp_path / "m.bin"}, "does not end in .gguf"),
        (home / "run", {"out": tmp_path / "there.gguf"}, "is there already"),
        (home / "run", {"client": "person-1"}, "its clients share one model"),
    ]
    for folder, words, what in cases:
        with pytest.raises(LichenError, match=what) as caught:
            export_quantized(folder, **words)
        assert caught.value.fix
    assert names_in(home) | names_in(tmp_path) == before


def test_a_run_without_a_student_says_what_to_use(home: Path) -> None:
    with pytest.raises(LichenError, match="this run trained no student") as caught:
        lichen.export(home / "run", student=True)
    assert "--gguf" in (caught.value.fix or "")


def test_a_student_is_refused_with_the_reason(tmp_path: Path) -> None:
    short = ("federation.rounds=1", "compare.baselines=[]", "data.partition.clients=3")
    lichen.run(lichen.read_recipe("digits", short), out=tmp_path / "run")
    for words in ({"bits": "int8"}, {"bits": "auto"}):
        with pytest.raises(LichenError, match="this run's model is of kind image-mlp"):
            export_quantized(tmp_path / "run", **words)  # type: ignore[arg-type]


def test_a_clients_own_model_is_held_against_its_own_rows_and_is_private(home: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"federation": {"rounds": 1}, "personal": {"kind": "finetune", "steps": 4}}
    page = tiny_llama.recipe(home / "base", home / "rows.jsonl", "pair", **more)
    lichen.run(page, out=tmp_path / "run")
    done = export_quantized(tmp_path / "run", bits="f16", client="person-1")
    assert done.path == tmp_path / "run" / "own" / "person-1-f16.gguf"
    assert done.path.stat().st_mode & 0o077 == 0
    _, own, _ = merged_run(tmp_path / "run", client="person-1")
    _, shared, _ = merged_run(tmp_path / "run")
    state = state_of(done.path, own)
    assert all(float((own.get_parameter(name) - x).abs().max()) < 5e-4 for name, x in state.items())
    assert any(not torch.equal(own.get_parameter(name), shared.get_parameter(name)) for name in state)
    loaded = open_recipe(merged_run(tmp_path / "run")[0])
    mine = [one.name for one in loaded.clients_data].index("person-1")
    assert done.before.clients == score_model(own, [loaded.experiment.clients.valid[mine]], None).clients  # type: ignore[list-item]


def test_the_command_shows_what_fewer_bits_cost(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.gguf"
    assert cli.main(["export", str(home / "run"), "--gguf", "--bits", "q8_0", "--gate", "0.1", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(file)
    assert "merged, not rounded" in out
    assert "float16, as their rows do not divide into blocks of 32: 2 matrices" in out
    for words, what in (
        (["--bits", "q8_0"], "only GGUF files and students have such formats"),
        (["--gate", "0.1"], "nothing is rounded"),
        (["--gguf", "--merge"], "merged anyway"),
        (["--gguf", "--quantize", "int8"], "formats of its own"),
    ):
        assert cli.main(["export", str(home / "run"), *words]) == 2
        assert what in capsys.readouterr().err
    path = lichen.export(home / "run", gguf=True, bits="f16", out=tmp_path / "python.gguf")
    assert path.stat().st_size > file.stat().st_size
