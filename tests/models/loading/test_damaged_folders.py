"""Model folders as they come from anywhere: read, or refused in one sentence with its place and fix."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from lichen.core.errors import LichenError
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import load_causal, load_encoder
from support.tiny_llama import WORDS, save_model

Folder = Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def config(folder: Path, **fields: Any) -> None:
    """Change fields of ``config.json``; None takes one out."""
    file = folder / "config.json"
    found = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    held = {name: x.clone() for name, x in load_file(file).items()}
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def header(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def spoil(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[name][0, 1] = value

    return change


def shards(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json among"),
    "empty config": (lambda f: (f / "config.json").write_bytes(b""), r"config\.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds a list"),
    "config is not UTF-8": (
        lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'),
        r"config\.json cannot be read",
    ),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 10**5), r"config\.json cannot be read"),
    "config without a type": (lambda f: config(f, model_type=None), "model_type=None"),
    "config of an odd type": (lambda f: config(f, model_type=["llama"]), r"model_type=\['llama'\]"),
    "config of an unknown type": (lambda f: config(f, model_type="nonesuch"), "no model_type 'nonesuch'"),
    "config wants code": (
        lambda f: config(f, model_type="own", auto_map={"AutoModelForCausalLM": "model.Own"}),
        "auto_map.*never run",
    ),
    "config of odd sizes": (lambda f: config(f, hidden_size="wide"), "cannot read a model|cannot load the weights"),
    "config of no heads": (lambda f: config(f, num_attention_heads=0), "cannot read a model|cannot load the weights"),
    "config of other sizes": (lambda f: config(f, hidden_size=48), "cannot load the weights"),
    "config of more layers": (lambda f: config(f, num_hidden_layers=3), "lacks weights such as"),
    "an odd dtype": (lambda f: config(f, dtype="float7"), "cannot read a model|cannot load the weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors among"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), r"model\.safetensors: .*it is empty"),
    "five bytes": (lambda f: cut(f / "model.safetensors", 5), "cut short, or no safetensors"),
    "cut in the header": (lambda f: cut(f / "model.safetensors", 100), "cut short, or no safetensors"),
    "cut in the tensors": (lambda f: cut(f / "model.safetensors", 20_000), "bytes where its header says"),
    "nonsense": (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 999), "its header cannot be read"),
    "text": (lambda f: (f / "model.safetensors").write_text("not found\n" * 99), "cut short, or no safetensors"),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "pointer of Git LFS",
    ),
    "header is a list": (lambda f: header(f, b"[]"), "its header cannot be read"),
    "header of odd offsets": (lambda f: header(f, b'{"a": {"data_offsets": 3}}'), "its header cannot be read"),
    "header of an odd tensor": (
        lambda f: header(f, b'{"a": {"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}}'),
        "cannot load the weights",
    ),
    "NaN": (lambda f: tensors(f, spoil("lm_head.weight", float("nan"))), r"'lm_head\.weight' has 1 of .* not finite"),
    "infinite": (lambda f: tensors(f, spoil("lm_head.weight", float("inf"))), r"'lm_head\.weight' has 1 of .* not fin"),
    "a tensor is missing": (lambda f: tensors(f, lambda held: held.pop(NORM)), rf"lacks weights such as '{NORM}'"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin is a pickle(.|\n)*save_pretrained",
    ),
    "another name": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        r"called consolidated\.safetensors",
    ),
    "a shard is missing": (lambda f: shards(f, {NORM: "model-00002-of-00002.safetensors"}), "model-00002.* is missing"),
    "a shard lies elsewhere": (lambda f: shards(f, {NORM: "../config.json"}), "outside the folder"),
    "a shard lacks a tensor": (lambda f: shards(f, {"x": "model-00001-of-00001.safetensors"}), "lacks 'x'"),
    "an odd index": (lambda f: shards(f, [1]), "has no weight_map"),
    "an adapter in it": (lambda f: (f / "adapter_config.json").write_text("{}"), "a model and an adapter"),
    "an adapter alone": (
        lambda f: (
            (f / "config.json").unlink(),
            (f / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
        ),
        r"an adapter, not a model(.|\n)*give org/base as model\.name",
    ),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(b""), "tokenizer"),
    "tokenizer is a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer"),
    "tokenizer of an odd model": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "X"}}'), "tokenizer"),
    "tokenizer settings are a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer"),
    "tokenizer settings of nonsense": (lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff\xfe{"), "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_sentence_with_a_place_and_a_fix(damage: str, folder: Path) -> None:
    change, wanted = DAMAGES[damage]
    change(folder)
    with pytest.raises(LichenError) as caught:
        load_causal(folder)
    error = caught.value
    assert re.search(wanted, str(error)), str(error)
    assert error.where
    assert error.fix
    assert "\n" not in error.what
    assert len(error.what) < 500


def test_an_encoder_that_would_get_a_tokenizer_of_no_words_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.BertModel(hf.BertConfig(vocab_size=31, **small)).save_pretrained(tmp_path)
    assert len(hf.AutoTokenizer.from_pretrained(tmp_path)) == 5, "transformers makes one up"
    with pytest.raises(LichenError, match="has no words"):
        load_encoder(tmp_path)
    with pytest.raises(LichenError, match="has no words"):
        load_classifier(tmp_path, classes=2, seed=0)


def test_ids_beyond_the_embedding_are_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    rows = load_causal(folder)[0].get_input_embeddings().num_embeddings
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another", "word"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(LichenError, match=rf"ids up to {rows + 1}, its model {rows} embeddings.*'another'"):
        load_causal(folder)


def test_a_special_token_without_an_embedding_that_nothing_calls_for_is_left_out(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    rows = load_causal(folder)[0].get_input_embeddings().num_embeddings
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    before = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False)
    tokenizer.save_pretrained(folder)
    _, loaded = load_causal(folder)
    ids = loaded(" ".join((*WORDS, "<picture>")), add_special_tokens=False).input_ids
    assert max(ids) < rows
    assert ids[-1] == loaded.unk_token_id
    assert loaded.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False) == before
    tokenizer.pad_token = "<picture>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(LichenError, match="'<picture>'"):
        load_causal(folder)


def test_weights_in_several_files_are_read(folder: Path) -> None:
    before = load_causal(folder)[0]
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    parts = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for part in set(parts.values()):
        save_file({name: held[name] for name in names if parts[name] == part}, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    after = load_causal(folder)[0]
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items())


def _wound(file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "cut", "insert", "swap", "zero", "digits"))
    at = rng.randrange(min(len(raw), 4000))
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(min(len(raw), 4000))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "insert":
        raw[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
    elif kind == "swap":
        other = rng.randrange(min(len(raw), 4000))
        raw[at], raw[other] = raw[other], raw[at]
    elif kind == "zero":
        raw[at : at + rng.randint(1, 40)] = b"\x00" * 40
    else:
        raw = bytearray(
            re.sub(rb"\d+", lambda m: m[0] if rng.random() < 0.7 else rng.choice((b"0", b"-1", b"1e9")), raw)
        )
    file.write_bytes(bytes(raw))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(6))
def test_forty_wounded_folders_load_or_are_refused(seed: int, whole: Path, tmp_path: Path) -> None:
    rng, refused = random.Random(seed), list[LichenError]()
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
    for number in range(40):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        _wound(folder / rng.choice(files), rng)
        try:
            load_causal(folder)
        except LichenError as error:
            refused.append(error)
    assert all(error.where and error.fix and "\n" not in error.what for error in refused)
    assert len(refused) > 5, "the wounds did nothing"
