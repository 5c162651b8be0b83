"""A student's folder loads where Lichen is not, gives the same outputs, and is rounded behind a gate alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lichen
from lichen import cli
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.models.students.plain import to_student
from lichen.models.students.rounded import restore_state
from lichen.models.students.students import ImageCNN
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.local.open import form_of
from lichen.recipes.quantize.requested import requested
from lichen.recipes.quantize.student import _open, export_student
from lichen.recipes.schema.read import recipe_of
from support import tiny_llama

SHORT = ("federation.rounds=2", "compare.baselines=[]", "data.partition.clients=3")
TEXTS = ["w1 w2 w3", "w31", "w7 w7 w9 w40 w12 w1 w3 w5"]

ELSEWHERE = """
import sys
sys.modules["lichen"] = None  # an import of it fails
sys.modules["transformers"] = None
from safetensors.torch import save_file
page = open("README.md", encoding="utf-8").read()
code = page.split("```python\\n")[1].split("```")[0]
lines = sum(bool(line.strip()) for line in code.splitlines())
if len(sys.argv) > 1:
    code = code.replace('["some text", "another"]', sys.argv[1])
else:
    first, _, last = code.partition("rows = torch.zeros(")
    code = first + 'rows = load_file("../rows.safetensors")["rows"]' + last[last.index("\\n"):]
scope = {}
exec(code, scope)
save_file({"outputs": scope["outputs"].contiguous()}, "../outputs.safetensors")
print(lines)
"""


def elsewhere(folder: Path, *words: str) -> tuple[torch.Tensor, list[str]]:
    """What the card's own code computes, and what it prints, in a process that cannot import Lichen."""
    command = [sys.executable, "-c", ELSEWHERE, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_file(folder.parent / "outputs.safetensors")["outputs"], done.stdout.splitlines()


def names_in(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small network over pictures."""
    home = tmp_path_factory.mktemp("pictures")
    words = (*SHORT, "model.student={kind: image-cnn, width: 4}")
    return lichen.run(lichen.read_recipe("digits", words), out=home / "run").folder


@pytest.mark.parametrize("bits", ["f32", "int8"])
def test_pictures_are_classified_elsewhere_as_here(pictures: Path, tmp_path: Path, bits: Any) -> None:
    path = lichen.export(pictures, student=True, bits=bits, gate=None if bits == "f32" else 0.5, out=tmp_path / "small")
    assert names_in(path) == {"README.md", "config.json", "model.safetensors"}
    shard = open_recipe(recipe_of(pictures)).experiment.clients.test[0]
    x_B = torch.from_numpy(shard.x[:9]).float()  # type: ignore[union-attr]
    save_file({"rows": x_B}, tmp_path / "rows.safetensors")
    outputs_BK, printed = elsewhere(path)
    tree = load_tree(pictures / "state" / "final.safetensors")[0]
    if bits == "int8":
        tree = to_student(_open(pictures, None).parts, restore_state(load_file(path / "model.safetensors")))
    student = ImageCNN(8, width=4, classes=10)
    batch = {"x_CBF": x_B[None], "active_C": torch.ones(1, dtype=torch.bool)}
    expected_BK = student.logits(trees.broadcast(tree, 1), {}, batch)[0]
    torch.testing.assert_close(outputs_BK, expected_BK, rtol=1e-4, atol=1e-5)
    about = json.loads((path / "config.json").read_text())
    assert printed == [str([about["classes"][k] for k in expected_BK.argmax(1)]), "21" if bits == "f32" else "24"]
    assert (about["architecture"], about["row_shape"], about["bits"]) == ("image-cnn", [1, 8, 8], bits)
    page = (path / "README.md").read_text()
    assert "Rows of 1 x 8 x 8 numbers, channels first. Pixels are scaled to lie from 0 to 1." in page
    assert "image-classification" in page
    assert ("in float32" in page) == (bits == "int8")


@pytest.mark.parametrize("kind", ["text-cnn", "transformer"])
def test_texts_are_classified_elsewhere_as_here(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama.save_model(tmp_path / "words")
    for module in ("assemble.loaded_model", "tasks.adapt"):
        monkeypatch.setattr(f"lichen.recipes.{module}.STUDENT_TOKENIZER", str(tmp_path / "words"))
    tiny_llama.save_rows(tmp_path / "rows.jsonl", "label")
    page = tiny_llama.recipe(tmp_path / "words", tmp_path / "rows.jsonl", "label", federation={"rounds": 2})
    page["model"] = {"student": {"kind": kind, "width": 8}}
    page["optimizer"] = {"lr": [0.5]}
    if kind == "text-cnn":  # and with words of its own, out of public rows
        page["data"] |= {"public": {"share": 0.4, "labelled": 6, "unlabelled": 9}, "split_by": "row"}
        page["data"] |= {"columns": {"text": "said", "label": "mood"}, "on_single_class": "keep"}
        page["data"]["partition"] = {"by": "iid", "clients": 3}
        page["teacher"] = {"kind": "labels", "answer_format": "label"}
    run = lichen.run(page, out=tmp_path / "run").folder
    assert (json.loads((run / "model" / "config.json").read_text())["vocabulary"] is not None) == (kind == "text-cnn")
    done = export_student(run, bits="f16", gate=0.5, out=tmp_path / "small")
    assert names_in(done.path) == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    outputs_BK, printed = elsewhere(done.path, repr(TEXTS))
    answer = lichen.talk(run).answer
    here = [answer(text)[1] for text in TEXTS]
    classes = json.loads((done.path / "config.json").read_text())["classes"]
    shares_BK = outputs_BK.softmax(1)
    assert printed[0] == str([text.split()[0] for text in here])
    for row, text in enumerate(here):
        shares = {part.split()[0]: float(part.split()[1].rstrip("%")) / 100 for part in text.split(", ")}
        assert shares == pytest.approx(dict(zip(classes, shares_BK[row].tolist(), strict=True)), abs=0.006)
    assert float(shares_BK.std(0).max()) > 0.01, "rows that all answer alike would show nothing"


def test_fewer_bits_pass_a_gate_or_nothing_is_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(pictures), "--student", "--bits", "int8", "--out", str(tmp_path / "new" / "small")]
    assert cli.main([*command, "--gate", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "not rounded" in out
    assert "same classes" in out
    assert out.splitlines()[-1] == str(tmp_path / "new" / "small")
    whole, small = ((tmp_path / name) for name in ("whole", "new/small"))
    export_student(pictures, gate=0.0, out=whole)
    with pytest.raises(LichenError, match=r"whole: holds a student(.|\n)*README\.md has the code"):
        form_of(whole)
    sizes = [(one / "model.safetensors").stat().st_size for one in (whole, small)]
    assert sizes[0] > 1.5 * sizes[1]

    def spoilt(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {name: -x for name, x in restore_state(dict(state)).items()}

    monkeypatch.setattr("lichen.recipes.quantize.student.restore_state", spoilt)
    before = names_in(tmp_path) | names_in(pictures)
    for bits in ("int8", "f16"):
        with pytest.raises(LichenError, match=rf"--bits {bits}: {bits} does not pass the gate of 1 %: accuracy on the"):
            export_student(pictures, bits=bits, gate=0.01, out=tmp_path / "deep" / "none")
    assert names_in(tmp_path) | names_in(pictures) == before
    done = export_student(pictures, bits="auto", gate=0.01)
    assert [one.name for one in done.attempts] == ["int8", "f16"]
    assert done.path == pictures / "student"
    assert json.loads((done.path / "config.json").read_text())["bits"] == "f32"


def test_a_clients_own_student_is_private_and_held_against_its_own_rows(tmp_path: Path) -> None:
    words = (*SHORT, "personal={kind: finetune, steps: 4}")
    run = lichen.run(lichen.read_recipe("digits", words), out=tmp_path / "run").folder
    done = export_student(run, bits="f16", gate=0.5, client="client-001")
    assert done.path == run / "own" / "client-001-student-f16"
    assert all(one.stat().st_mode & 0o077 == 0 for one in (done.path, *done.path.iterdir()))
    shared = export_student(run, bits="f16", gate=0.5).path
    assert (shared / "README.md").stat().st_mode & 0o044
    own, all_of_us = (load_file(one / "model.safetensors") for one in (done.path, shared))
    assert any(not torch.equal(own[name], all_of_us[name]) for name in own)


def test_what_does_not_fit_is_one_sentence(pictures: Path, tmp_path: Path) -> None:
    before = names_in(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    bare = lichen.run(lichen.read_recipe("digits", (*SHORT, "data.valid=0.0")), out=tmp_path / "bare").folder
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path, {}, "not finished|no such|is no|no summary|has no"),
        (pictures, {"out": tmp_path / "full"}, "is not empty"),
        (pictures, {"client": "client-1"}, "its clients share one model"),
        (bare, {"bits": "int8"}, "no validation rows to hold a rounded student against"),
    ]
    for folder, words, what in cases:
        with pytest.raises(LichenError, match=what) as caught:
            export_student(folder, **{"gate": 0.01, **words})
        assert caught.value.fix
    config = bare / "model" / "config.json"
    for text in ("{}", "[", '{"classes": 3}'):
        config.write_text(text)
        with pytest.raises(LichenError):
            export_student(bare, gate=0.01)
    assert not [name for name in names_in(tmp_path) - before if "student" in name]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"student": True, "merge": True}, "--merge: a student is whole"),
        ({"student": True, "gguf": True}, "--gguf: a student is whole"),
        ({"student": True, "quantize": "int8"}, "--quantize: a student has formats of its own"),
        ({"student": True, "bits": "q8_0"}, "--bits: a student has no format 'q8_0'"),
        ({"student": True, "gate": 0.1}, "--gate: nothing is rounded"),
        ({"student": True, "bits": "f32", "gate": 0.1}, "--gate: nothing is rounded"),
        ({"student": True, "bits": "int8", "gate": -1.0}, "--gate: -1.0 is no share"),
        ({"student": True, "bits": "int8", "gate": float("nan")}, "--gate: nan is no share"),
        ({"gguf": True, "bits": "int8"}, "--bits: a GGUF file has no format 'int8'"),
        ({"gguf": True, "bits": "f32"}, "--bits: a GGUF file has no format 'f32'"),
        ({"quantize": "int4"}, "--quantize: there is no format 'int4'"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words: dict[str, Any], what: str) -> None:
    with pytest.raises(LichenError) as caught:
        requested(**words)
    assert what in str(caught.value)
    assert caught.value.fix


def test_other_forms_point_to_the_students_own(pictures: Path) -> None:
    for words in ({}, {"merge": True}, {"gguf": True}):
        with pytest.raises(LichenError) as caught:
            lichen.export(pictures, **words)  # type: ignore[arg-type]
        assert "--student" in (caught.value.fix or "")
