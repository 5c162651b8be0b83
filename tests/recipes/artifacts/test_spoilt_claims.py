"""Whatever a person gives `lichen claim` and `lichen fingerprint`, they say what is wrong in a sentence."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lichen
from lichen.audit.fingerprint import ANSWERS, Fingerprint
from lichen.cli import main
from lichen.core.seeds import numpy_generator
from lichen.recipes.artifacts import claim as claims
from lichen.recipes.artifacts.use.export import export
from support.tiny_llama import recipe, save_model, save_rows

KEY = bytes(range(32))
WHOLE: tuple[Any, ...] = (None, True, -7.5, 0, 10**30, "no such", "", [], [[]], {}, {"odd": [None]})
"""What may stand in a JSON file in place of what is meant."""


def key(file: Path, content: bytes = KEY) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("spoilt")
    save_model(home / "model", more=ANSWERS)
    save_rows(home / "rows.jsonl", "pair", clients=2)
    key(home / "secrets" / "person-0.key")
    more: dict[str, Any] = {
        "federation": {"rounds": 1, "local_steps": 1, "batch_size": 4},
        "fingerprint": {"secrets": str(home / "secrets"), "steps": 1},
    }
    lichen.run(recipe(home / "model", home / "rows.jsonl", "pair", **more), out=home / "run")
    export(home / "run", merge=True)
    shutil.move(home / "run" / "merged", home / "merged")
    shutil.copytree(home / "run" / "adapter", home / "adapter")
    return home


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(len(content)))]


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(content)
    for at in rng.integers(len(out), size=8):
        out[int(at)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def other_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(64)))


def other_value(content: bytes, rng: np.random.Generator) -> bytes:
    """One value somewhere in a JSON file; another file comes as one of JSON."""
    try:
        plain: Any = json.loads(content)
    except ValueError:
        plain = None
    value = WHOLE[int(rng.integers(len(WHOLE)))]
    if not isinstance(plain, dict) or not plain:
        return json.dumps(value).encode()
    place, name = plain, str(rng.choice(list(plain)))
    while isinstance(place[name], dict) and place[name] and rng.integers(2):
        place, name = place[name], str(rng.choice(list(place[name])))
    if rng.integers(4):
        place[name] = value
    else:
        del place[name]
    return json.dumps(plain).encode()


SPOILS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (cut, flipped, other_bytes, other_value)


def spoil(folder: Path, rng: np.random.Generator) -> str:
    """Spoil one file of a folder, take it away, or put a folder in its place."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    file = files[int(rng.integers(len(files)))]
    how = int(rng.integers(len(SPOILS) + 2))
    content = file.read_bytes()
    file.unlink()
    if how < len(SPOILS):
        file.write_bytes(SPOILS[how](content, rng))
    elif how == len(SPOILS):
        file.mkdir()
    return f"{file.relative_to(folder)} {how}"


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(words)
    out, err = capsys.readouterr()
    assert code in (0, 2), (words, err[-2000:])
    assert "Traceback" not in err, (words, err)
    if code == 2:
        assert not out
    return code, err


def first(model: Any, ask: Any, tokenizer: Any, fingerprint: Fingerprint) -> int:
    """Whether the model reads a question at all: it is not its scores that are spoilt."""
    model(input_ids=torch.tensor([ask(fingerprint.pairs()[0][0])]))
    return 0


@pytest.mark.filterwarnings("ignore")
def test_claims_of_spoilt_models(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "matches", first)
    rng, codes, secret = numpy_generator(0, "claims"), Counter[int](), str(home / "secrets" / "person-0.key")
    for number in range(75):
        folder = tmp_path / "spoilt"
        shutil.copytree(home / ("run", "adapter", "merged")[number % 3], folder)
        spoil(folder, rng)
        codes[told(["claim", str(folder), "--secret", secret], capsys)[0]] += 1
        shutil.rmtree(folder)
    assert codes[2] > 30, codes
    assert codes[0] > 10, codes  # a readme, or a summary, that nobody asks


def spoilt_key(file: Path, rng: np.random.Generator) -> tuple[str, bool]:
    """Something in place of a key, or one that is named in an odd way; and whether it is a key all the same."""
    how = int(rng.integers(8))
    if how == 0:
        file.mkdir()
    elif how == 1:
        key(file, rng.bytes(int(rng.choice([0, 1, 31, 33, 64, 5000]))))
    elif how == 2:
        key(file).chmod(int(rng.choice([0o644, 0o640, 0o604, 0o777])))
    elif how == 3:
        file.symlink_to(file.with_suffix(".other") if rng.integers(2) else file)
    elif how == 4:
        return str(file / "below" / "x.key"), False
    elif how == 5:
        return str(rng.choice(["", ".", "/", "~", "~nobody/x.key", "x" * 300, "-"])), False
    else:
        key(file, rng.bytes(32))
    return str(file), how > 5


def test_spoilt_keys_of_both_commands(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, codes = numpy_generator(0, "keys"), Counter[tuple[str, int]]()
    monkeypatch.chdir(tmp_path)
    for number in range(225):
        file, good = spoilt_key(tmp_path / f"{number}.key", rng)
        if number % 3:
            model = str(rng.choice([str(home / "none"), str(tmp_path), str(home / "rows.jsonl"), "no-model", ""]))
            more = (["--base", "no-model"], ["--run", str(tmp_path)], ["--form", "chat"], [])[int(rng.integers(4))]
            code, said = told(["claim", model, "--secret", file, *more], capsys)
            assert code == 2
        else:
            code, said = told(["fingerprint", file], capsys)
            assert code == 0 or not good, said
        codes["claim" if number % 3 else "fingerprint", code] += 1
    assert codes["fingerprint", 2] > 20, codes
    assert codes["fingerprint", 0] > 10, codes
