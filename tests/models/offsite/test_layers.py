"""An emulator with all blocks is the model; one of some blocks is the model of these; only its ends are trained."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from lichen.core.errors import LichenError
from lichen.core.tree import digest
from lichen.models.adapters.bitfit import BitFit
from lichen.models.adapters.bottleneck import Bottleneck
from lichen.models.adapters.ends.end_blocks import end_blocks, note_ends
from lichen.models.adapters.ia3 import IA3
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.prefix_tuning import Prefix
from lichen.models.adapters.prompt import Prompt
from lichen.models.adapters.wrap import wrap
from lichen.models.full import FullCausal, FullClassifier
from lichen.models.loading.emulator_folder import (
    EMULATOR,
    Manifest,
    folder_tensors,
    read_manifest,
    renumbered,
    require_untouched,
)
from lichen.models.loading.load import load_causal
from lichen.models.offsite.layers import open_owner_model, save_emulator, stride
from lichen.models.whole import Whole
from support.tiny_families import FAMILIES, rows
from support.tiny_llama import save_model

BLOCKS = 6
DEPTH = {"gpt2": "n_layer", "distilbert": "n_layers"}
NAMES = ("llama", "qwen2", "gpt2", "bert", "distilbert", "llama-classifier")


def deep(name: str, folder: Path) -> Any:
    """A tiny model of six blocks, saved; and the model."""
    family = FAMILIES[name]
    sizes = {**family.sizes, DEPTH.get(name, "num_hidden_layers"): BLOCKS}
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(getattr(transformers, family.config)(**sizes)).eval()
    model.save_pretrained(folder)
    return model


def emulated(folder: Path, out: Path, *, ends: tuple[int, int], layers: int) -> Manifest:
    owner = open_owner_model(folder, where="MODEL")
    out.mkdir()
    middle = stride(owner.blocks, ends, layers)
    return save_emulator(out, owner, ends=ends, middle=middle, how="drop", provenance={})


@pytest.mark.parametrize("name", NAMES)
def test_an_emulator_of_all_blocks_is_the_model(name: str, tmp_path: Path) -> None:
    model = deep(name, tmp_path / "model")
    manifest = emulated(tmp_path / "model", tmp_path / "emu", ends=(2, 1), layers=3)
    again = type(model).from_pretrained(tmp_path / "emu").eval()
    assert torch.equal(again(**rows()).logits, model(**rows()).logits)
    assert manifest.emulator == manifest.model == digest(folder_tensors(tmp_path / "model"))
    assert read_manifest(tmp_path / "emu") == manifest


@pytest.mark.parametrize("name", NAMES)
def test_an_emulator_is_the_model_of_the_chosen_blocks(name: str, tmp_path: Path) -> None:
    model = deep(name, tmp_path / "model")
    manifest = emulated(tmp_path / "model", tmp_path / "emu", ends=(2, 1), layers=2)
    assert manifest.middle == (2, 4)
    again = type(model).from_pretrained(tmp_path / "emu").eval()
    stack = next(x for n, x in model.named_modules() if n.endswith(f".{manifest.stack}") or n == manifest.stack)
    by_hand = copy.deepcopy(model)
    name_of = next(n for n, x in model.named_modules() if x is stack)
    by_hand.set_submodule(name_of, torch.nn.ModuleList([stack[i] for i in (0, 1, 2, 4, 5)]))
    by_hand.config.num_hidden_layers = 5
    assert torch.equal(
        again(**rows(), use_cache=False).logits if "bert" not in name else again(**rows()).logits,
        (by_hand(**rows(), use_cache=False) if "bert" not in name else by_hand(**rows())).logits,
    )
    assert AutoConfig.from_pretrained(tmp_path / "emu").num_hidden_layers == 5


def test_lists_of_the_configuration_follow_their_blocks(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    config = transformers.Qwen2Config(**{**FAMILIES["qwen2"].sizes, "num_hidden_layers": 6, "layer_types": kinds})
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    emulated(tmp_path / "model", tmp_path / "emu", ends=(1, 1), layers=2)
    found = json.loads((tmp_path / "emu" / "config.json").read_text())
    assert found["layer_types"] == [kinds[i] for i in (0, 1, 4, 5)]


@pytest.mark.parametrize(
    "spec",
    [
        Lora(targets=("q_proj",), rank=2),
        Lora(targets="all-linear", rank=2),
        IA3(targets=("k_proj",), feedforward=("down_proj",)),
        Bottleneck(width=2),
        Bottleneck(width=2, targets=("o_proj",)),
    ],
)
def test_adapters_go_to_the_ends_alone(spec: Spec, tmp_path: Path) -> None:
    model = deep("llama", tmp_path / "model").requires_grad_(False)
    whole = {name.split(".")[2] for name in wrap(model, spec).layers}
    note_ends(model, (2, 1))
    assert whole == {str(i) for i in range(6)}
    assert {name.split(".")[2] for name in wrap(model, spec).layers} == {"0", "1", "5"}


def test_biases_and_whole_weights_are_those_of_the_ends_and_the_head(tmp_path: Path) -> None:
    model = deep("bert", tmp_path / "model").requires_grad_(False)
    note_ends(model, (1, 1))
    places = {name.rpartition(".")[0] for name in wrap(model, BitFit(heads=("classifier",))).init(0)}
    trained = set(FullClassifier(model, name="x").init(0))
    for name in (*places, *trained):
        assert name.startswith(("bert.encoder.layer.0.", "bert.encoder.layer.5.", "classifier")), name
    assert "classifier.weight" in trained
    assert "bert.encoder.layer.5.attention.self.query.weight" in trained
    causal = deep("llama", tmp_path / "causal").requires_grad_(False)
    note_ends(causal, (0, 2))
    assert {name.split(".")[2] for name in FullCausal(causal, name="x").init(0)} == {"4", "5"}
    assert len(Whole(deep("llama", tmp_path / "causal").requires_grad_(False)).names) > 40


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (Lora(targets=("layers.3.self_attn.q_proj",)), "adapter.target_modules"),
        (Lora(targets=("q_proj", "layers.2.mlp.up_proj")), "adapter.target_modules"),
        (Lora(targets=("q_proj",), last=2), "model.adapter.last"),
        (Lora(targets=("q_proj",), heads=("layers.4.mlp.up_proj",)), "model.adapter.modules_to_save"),
        (Lora(targets=(), heads=("input_layernorm",)), "model.adapter.modules_to_save"),
        (Prefix(tokens=2), "model.adapter.kind"),
    ],
)
def test_what_names_the_middle_is_refused(spec: Spec, where: str, tmp_path: Path) -> None:
    model = deep("llama", tmp_path / "model").requires_grad_(False)
    note_ends(model, (2, 1))
    with pytest.raises(LichenError) as error:
        wrap(model, spec)
    assert error.value.where == where
    assert error.value.fix


def test_virtual_tokens_and_a_named_last_block_may_be_trained(tmp_path: Path) -> None:
    model = deep("llama", tmp_path / "model").requires_grad_(False)
    note_ends(model, (2, 1))
    assert wrap(model, Prompt(tokens=2)).layers
    assert {name.split(".")[2] for name in wrap(model, Lora(targets=("q_proj",), last=1)).layers} == {"5"}


@pytest.mark.parametrize(
    ("blocks", "ends", "layers", "expected"),
    [
        (48, (2, 2), 14, tuple(2 + round(i * 43 / 13) for i in range(14))),
        (6, (2, 2), 2, (2, 3)),
        (12, (0, 2), 3, (0, 4, 9)),
        (30, (2, 2), 26, tuple(range(2, 28))),
    ],
)
def test_the_middle_is_a_uniform_stride(
    blocks: int, ends: tuple[int, int], layers: int, expected: tuple[int, ...]
) -> None:
    assert stride(blocks, ends, layers) == expected
    assert len(set(expected)) == layers


@pytest.mark.parametrize(
    ("ends", "layers", "where"),
    [
        ((0, 0), 2, "--ends"),
        ((3, 3), 1, "--ends"),
        ((2, 2), 0, "--layers"),
        ((2, 2), 3, "--layers"),
        ((-1, 2), 1, "--ends"),
    ],
)
def test_ends_that_leave_no_middle_are_refused(ends: tuple[int, int], layers: int, where: str) -> None:
    with pytest.raises(LichenError) as error:
        stride(6, ends, layers)
    assert error.value.where == where


def test_numbers_of_ends_go_to_the_model_and_back(tmp_path: Path) -> None:
    deep("gpt2", tmp_path / "model")
    manifest = emulated(tmp_path / "model", tmp_path / "emu", ends=(1, 2), layers=1)
    there = {block: manifest.in_model(block) for block in range(manifest.blocks)}
    assert there == {0: 0, 1: None, 2: 4, 3: 5}
    assert [manifest.in_emulator(block) for block in range(6)] == [0, None, None, None, 2, 3]
    assert (
        renumbered("transformer.h.2.attn.c_attn.weight", manifest.stack, there) == "transformer.h.4.attn.c_attn.weight"
    )
    assert renumbered("transformer.wte.weight", manifest.stack, there) == "transformer.wte.weight"


def test_an_emulator_knows_itself_when_it_is_loaded(tmp_path: Path) -> None:
    save_model(tmp_path / "model", layers=6)
    emulated(tmp_path / "model", tmp_path / "emu", ends=(2, 1), layers=2)
    model, _ = load_causal(tmp_path / "emu")
    assert end_blocks(model) == (2, 1)
    assert end_blocks(load_causal(tmp_path / "model")[0]) is None
    for key, more in {"model.layers": {"layers": 2}, "model.random": {"random": 1}}.items():
        with pytest.raises(LichenError) as error:
            load_causal(tmp_path / "emu", **more)  # type: ignore[arg-type]
        assert error.value.where == key
    config = json.loads((tmp_path / "emu" / EMULATOR).read_text())
    (tmp_path / "emu" / EMULATOR).write_text(json.dumps({**config, "emulator": "0" * 64}))
    with pytest.raises(LichenError, match="other weights"):
        load_causal(tmp_path / "emu")
    with pytest.raises(LichenError, match="is an emulator itself"):
        open_owner_model(tmp_path / "emu", where="MODEL")


def test_a_damaged_manifest_is_refused_in_one_sentence(tmp_path: Path) -> None:
    good = Manifest(
        ends=(2, 1), middle=(2, 4), of=6, stack="layers", how="drop", model="a" * 64, model_ends="b" * 64,
        emulator="c" * 64, provenance={},
    )  # fmt: skip
    whole = json.loads(json.dumps({"format": 1, **asdict(good)}))
    file, rng = tmp_path / EMULATOR, random.Random(0)
    file.write_text(json.dumps(whole))
    assert read_manifest(tmp_path) == good
    odd: list[Any] = [None, True, -1, 7, 1.5, "", "x", [], [1], {}, "0" * 63, [2, "1"], 10**30, [5, 1], [[2]]]
    refused = 0
    for key in whole:
        for value in odd:
            file.write_text(json.dumps({**whole, key: value}))
            harmless = (key, value) in [("of", 7), ("stack", "x"), ("provenance", {})]
            if harmless and not isinstance(value, bool):
                read_manifest(tmp_path)
                continue
            with pytest.raises(LichenError):
                read_manifest(tmp_path)
            refused += 1
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(LichenError):
            read_manifest(tmp_path)
    assert refused > 100
    text, shown = json.dumps(whole), list[LichenError]()
    for _ in range(60):
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.5 else data))
        try:
            read_manifest(tmp_path)
        except LichenError as error:
            shown.append(error)
    assert len(shown) > 30
    assert all(error.where == str(tmp_path) and error.fix and "\n" not in error.what for error in shown)
    with pytest.raises(LichenError, match="has no"):
        read_manifest(tmp_path / "nowhere")


def test_weights_that_are_not_the_manifest_s_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", layers=6)
    manifest = emulated(tmp_path / "model", tmp_path / "emu", ends=(2, 1), layers=2)
    require_untouched(tmp_path / "emu", manifest)
    save_model(tmp_path / "other", layers=5, seed=1)
    (tmp_path / "emu" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(LichenError, match="other weights"):
        require_untouched(tmp_path / "emu", manifest)


def test_models_without_one_stack_of_blocks_are_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(LichenError, match="cannot be told apart"):
        open_owner_model(tmp_path / "model", where="MODEL")
