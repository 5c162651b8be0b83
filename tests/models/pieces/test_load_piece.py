"""A piece that is loaded alone is the piece of the whole, and nothing else of the files was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lichen.core.errors import LichenError
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import base_digest
from lichen.models.pieces.carve import carve
from lichen.models.pieces.load_piece import load_piece
from support import tiny_llama
from support.pieces import BLOCKS, NAMES, four_blocks


def saved(name: str, folder: Path, *, shard: str = "50GB") -> Path:
    four_blocks(name).save_pretrained(folder, max_shard_size=shard)
    return folder


def with_record(read: list[str]) -> Any:
    def reader(file: Path, key: str) -> torch.Tensor:
        read.append(key)
        return load_file(file)[key]

    return reader


@pytest.mark.parametrize("name", NAMES)
def test_a_piece_alone_is_that_piece_of_the_whole(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    classes = 3 if name in ("bert", "distilbert") else None
    for start, stop in ((0, 1), (1, 3), (3, BLOCKS)):
        read = list[str]()
        piece = load_piece(tmp_path, start, stop, classes=classes, read=with_record(read))
        carved = carve(four_blocks(name), start, stop)
        assert base_digest(piece) == base_digest(carved)
        buffers = dict(carved.named_buffers())
        assert all(torch.equal(x, buffers[n]) for n, x in piece.named_buffers())
        own = [n for n, _ in carved.named_parameters()]
        numbers = {int(part) for key in read for part in key.split(".") if part.isdecimal()}
        assert len(read) == len(own)
        assert numbers == set(range(start, stop))
        assert not any(x.is_meta for x in (*piece.parameters(), *piece.buffers()))


def test_shards_are_read_where_their_tensors_lie(tmp_path: Path) -> None:
    saved("qwen2", tmp_path, shard="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    files = set[Path]()

    def read(file: Path, key: str) -> torch.Tensor:
        files.add(file)
        return load_file(file)[key]

    piece = load_piece(tmp_path, 2, 3, read=read)
    assert base_digest(piece) == base_digest(carve(four_blocks("qwen2"), 2, 3))
    assert files == {tmp_path / file for key, file in index.items() if ".layers.2." in key}


def test_files_of_the_base_model_alone_and_a_drawn_head(tmp_path: Path) -> None:
    tiny = tiny_llama.save_model(tmp_path / "words")
    four_blocks("distilbert").distilbert.save_pretrained(tmp_path / "base")
    for file in tiny.glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    whole, _ = load_classifier(tmp_path / "base", classes=5, seed=3)
    piece = load_piece(tmp_path / "base", 2, BLOCKS, classes=5, seed=3)
    assert base_digest(piece) == base_digest(carve(whole, 2, BLOCKS))


def test_older_names_of_norms_are_known(tmp_path: Path) -> None:
    file = saved("bert", tmp_path) / "model.safetensors"
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for n, x in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    assert base_digest(load_piece(tmp_path, 0, 2, classes=3)) == base_digest(carve(four_blocks("bert"), 0, 2))


def test_what_the_files_lack_is_refused_by_name(tmp_path: Path) -> None:
    file = saved("llama", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({n: x for n, x in tensors.items() if n != lost}, file, metadata={"format": "pt"})
    load_piece(tmp_path, 2, 3)
    with pytest.raises(LichenError, match=f"lacks weights such as '{lost}'"):
        load_piece(tmp_path, 0, 2)
    save_file({**tensors, lost: tensors[lost][:, :3].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(LichenError, match=r"has shape \(48, 3\), and config.json says \(48, 32\)"):
        load_piece(tmp_path, 0, 2)
    with pytest.raises(LichenError, match="for this task"):
        load_piece(tmp_path, 0, 2, classes=2)
    save_file({**tensors, lost: tensors[lost] * float("nan")}, file, metadata={"format": "pt"})
    with pytest.raises(LichenError, match="not finite"):
        load_piece(tmp_path, 0, 2)
