"""The commands of docs/next-step.md: run one after another on small models, where their tools are installed."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lichen
from lichen import cli
from support.tiny_llama import recipe, save_model, save_rows

PAGE = Path(__file__).parent.parent / "docs" / "next-step.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
PYTHON = [block for language, block in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "sh"
    for line in block.replace("\\\n", "").splitlines()
    if line.strip()
]
SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs and the models that the page names."""
    folder = tmp_path_factory.mktemp("next")
    save_model(folder / "path" / "to" / "base")
    rounds = {"rounds": 1, "local_steps": 1, "batch_size": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for shape, name in (("pair", "mydata-1"), ("label", "labels-1")):
            save_rows(folder / f"{shape}.jsonl", shape)  # type: ignore[arg-type]
            whole = recipe(Path("path/to/base"), Path(f"{shape}.jsonl"), shape, federation=rounds)  # type: ignore[arg-type]
            if shape == "pair":
                whole["data"]["form"] = "chat"
            lichen.run(whole, out=f"runs/{name}")
        for line in COMMANDS:
            if line.startswith("lichen "):
                assert cli.main(shlex.split(line)[1:]) == 0, line
        yield folder


def test_the_page_is_read() -> None:
    assert len(PYTHON) >= 5
    tools = {shlex.split(line)[0] for line in COMMANDS}
    assert tools == {"lichen", "vllm", "curl", "python", "llama-cli", "hf"}


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python(
    home: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each block by itself, as somebody would paste it."""
    monkeypatch.chdir(home)
    (tmp_path / "block.py").write_text(PYTHON[number])
    left = runpy.run_path(str(tmp_path / "block.py"))
    assert {"model", "ask"} & set(left)
    assert bool(capsys.readouterr().out) == ("print(" in PYTHON[number])


def test_a_merged_classifier_tells_the_names_of_its_classes(home: Path) -> None:
    about = json.loads((home / "labels-whole" / "config.json").read_text())
    assert sorted(about["label2id"]) == ["calm", "glad", "sad"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(("lichen ", "curl "))])
def test_other_tools(home: Path, line: str) -> None:
    """Conversions are run; servers and uploads are asked whether they know what is asked of them."""
    words = shlex.split(line)
    tool = next((word for word in words if word in SCRIPTS), words[0])
    here = Path(sys.executable).parent  # of a virtual environment that is not active
    found = shutil.which(tool) or shutil.which(tool, path=str(here))
    if found is None:
        pytest.skip(f"{tool} is not installed")
    if tool in SCRIPTS:
        done = subprocess.run(
            [sys.executable, found, *words[2:]], cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return
    verbs = [word for word in words[1:3] if word.isalpha()][: 2 if words[1] == "auth" else 1]
    done = subprocess.run([found, *verbs, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    known = done.stdout + done.stderr
    for flag in (word for word in words if word.startswith("--")):
        assert flag in known, f"{tool} knows no {flag}"
