"""Where a local model lies changes no byte of what crosses, nor of what is learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import lichen
from support.tiny_llama import recipe, save_model, save_rows

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"model": {"adapter": {"kind": "full"}}, "optimizer": {"lr": [0.001]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_path_sends_no_more(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "m")
    save_rows(tmp_path / "rows.jsonl", "pair", clients=3)
    long = tmp_path / "a folder with a name that is longer than the other" / "model"
    shutil.copytree(tmp_path / "m", long)
    changes = {"federation": {"rounds": 1, "local_steps": 1}, **KINDS[kind]}
    pages = [recipe(model, tmp_path / "rows.jsonl", "pair", **changes) for model in (tmp_path / "m", long)]
    if kind == "full":
        for page in pages:
            page["model"]["adapter"] = {"kind": "full"}
    short, other = (lichen.run(page, out=tmp_path / str(place)) for place, page in enumerate(pages))
    for way in ("bytes_up", "bytes_down"):
        assert short.summary[way] == other.summary[way] > 0
    final = "state/final.safetensors"
    assert (short.folder / final).read_bytes() == (other.folder / final).read_bytes()
