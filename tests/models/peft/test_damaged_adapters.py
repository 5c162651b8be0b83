"""Adapter folders as they come from anywhere: PEFT's logits, or one sentence with its place and fix."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.wrap import wrap
from lichen.models.peft.start import start_from
from support.tiny_families import made, rows

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = Lora(targets=("q_proj", "v_proj"), rank=4, alpha=12.0)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lone = peft.get_peft_model(copy.deepcopy(made("llama")), config)
    for parameter in lone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    lone.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def begin(folder: Path) -> Tensor:
    """The run's logits where it starts."""
    wrapped = wrap(made("llama"), SPEC)
    tree = start_from(folder, wrapped, wrapped.init(0)).tree
    with torch.no_grad():
        logits: Tensor = wrapped.call({name: x[None] for name, x in tree.items()}, {}, **rows()).logits
    return logits


def fields(folder: Path, **more: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    held = {name: x.clone() for name, x in load_file(file).items()}
    change(held)
    save_file(held, file)


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({name: value(held[name])})


def moved(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if old in name]:
            held[name.replace(old, new)] = held.pop(name)

    return change


def inside(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-9")
    (folder / "adapter_config.json").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"no adapter_config\.json"),
    "a checkpoint inside": (inside, r"1 of its folders have one\n.*checkpoint-9"),
    "no folder": (lambda f: shutil.rmtree(f), r"folder does not exist(.|\n)*hf download"),
    "config of nonsense": (lambda f: (f / "adapter_config.json").write_text("{"), "damaged: adapter_config"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no fields"),
    "config is not UTF-8": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff"), "damaged: adapter_config"),
    "config is deep": (lambda f: (f / "adapter_config.json").write_text("[" * 10**5), "damaged: adapter_config"),
    "another kind": (lambda f: fields(f, peft_type="LOHA"), "peft_type='LOHA'"),
    "a kind that is a list": (lambda f: fields(f, peft_type=["LORA"]), r"peft_type=\['LORA'\]"),
    "an odd rank": (lambda f: fields(f, r="four"), "r='four', which is not a whole number"),
    "rank zero": (lambda f: fields(f, r=0), "r=0, which is not"),
    "an odd alpha": (lambda f: fields(f, lora_alpha=[12]), r"lora_alpha=\[12\], which is not a number"),
    "no alpha": (lambda f: fields(f, lora_alpha=0), "lora_alpha=0, which is not positive"),
    "alpha without end": (lambda f: fields(f, lora_alpha=float("inf")), "lora_alpha=inf, which is not"),
    "an odd pattern": (lambda f: fields(f, rank_pattern={"(": 2}), "rank_pattern="),
    "odd targets": (lambda f: fields(f, target_modules=[1]), r"target_modules=\[1\]"),
    "a pattern that is none": (lambda f: fields(f, target_modules="*q_proj"), "target_modules="),
    "no targets": (lambda f: fields(f, target_modules=None), "no target_modules"),
    "another model's layers": (
        lambda f: tensors(f, moved("model.layers", "model.blocks")),
        r"no layer 'model\.blocks\.0",
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "is a pickle(.|\n)*safe_serialization=True",
    ),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"1234567890"), "damaged: it is cut short"),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "damaged: it is empty"),
    "nothing in it": (lambda f: tensors(f, lambda held: held.clear()), "holds no layer"),
    "NaN": (lambda f: tensors(f, put(f"{Q}.lora_A.weight", lambda x: x * float("nan"))), "q_proj.lora_A.* not finite"),
    "whole numbers": (lambda f: tensors(f, put(f"{Q}.lora_A.weight", lambda x: x.int())), "holds int32"),
    "B is missing": (lambda f: tensors(f, lambda held: held.pop(f"{Q}.lora_B.weight")), "A and B of shapes"),
    "A is missing": (lambda f: tensors(f, lambda held: held.pop(f"{Q}.lora_A.weight")), r"shapes none and \(32, 4\)"),
    "another width": (
        lambda f: tensors(f, put(f"{Q}.lora_A.weight", lambda x: x[:, :9].contiguous())),
        r"q_proj' is \(32, 9\) in the adapter and \(32, 32\) in the base",
    ),
    "another rank": (
        lambda f: tensors(
            f,
            lambda held: (
                put(f"{Q}.lora_A.weight", lambda x: x[:2].contiguous())(held),
                put(f"{Q}.lora_B.weight", lambda x: x[:, :2].contiguous())(held),
            ),
        ),
        "has rank 2, its r or rank_pattern says 4",
    ),
    "a name of an adapter inside": (lambda f: tensors(f, moved(".lora_A.", ".lora_A.default.")), "lora_A.default"),
    "no prefix": (lambda f: tensors(f, moved("base_model.model.", "")), r"does not begin with 'base_model\.model\.'"),
    "the base's embedding": (
        lambda f: tensors(
            f, lambda held: held.update({"base_model.model.model.embed_tokens.weight": torch.ones(97, 32)})
        ),
        r"model\.adapter\.modules_to_save: .*'model\.embed_tokens' whole(.|\n)*add embed_tokens",
    ),
    "an adapted embedding": (
        lambda f: tensors(
            f, lambda held: held.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 97)})
        ),
        r"lora_embedding_A' \(target_modules\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_sentence_with_a_place_and_a_fix(damage: str, folder: Path) -> None:
    change, wanted = DAMAGES[damage]
    change(folder)
    with pytest.raises(LichenError) as caught:
        begin(folder)
    error = caught.value
    assert re.search(wanted, str(error)), str(error)
    assert error.where
    assert error.fix
    assert "\n" not in error.what


@pytest.mark.parametrize("seed", range(4))
def test_wounded_adapters_give_pefts_logits_or_are_refused(seed: int, whole: Path, tmp_path: Path) -> None:
    rng, refused = random.Random(seed), list[LichenError]()
    config = json.loads((whole / "adapter_config.json").read_text())
    odd = (
        None,
        True,
        False,
        0,
        1,
        3,
        -1,
        1e9,
        0.5,
        "",
        "q_proj",
        "all",
        [],
        [1],
        ["q_proj"],
        {},
        {"q_proj": 2},
        {"a": 1},
    )
    for number in range(40):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        if rng.random() < 0.7:
            fields(folder, **{rng.choice(sorted(config)): rng.choice(odd) for _ in range(rng.randint(1, 3))})
        else:
            file = folder / rng.choice(("adapter_config.json", "adapter_model.safetensors"))
            raw = bytearray(file.read_bytes())
            raw[rng.randrange(min(len(raw), 2000))] ^= 1 << rng.randrange(8)
            file.write_bytes(bytes(raw))
        try:
            logits = begin(folder)
        except LichenError as error:
            refused.append(error)
            continue
        try:
            lone = peft.PeftModel.from_pretrained(copy.deepcopy(made("llama")), str(folder)).eval()
        except Exception:
            continue  # PEFT's own checks of what an adapter began with
        with torch.no_grad():
            assert float((lone(**rows()).logits - logits).abs().max()) <= 1e-5, (
                folder / "adapter_config.json"
            ).read_text()
    assert all(error.where and error.fix and "\n" not in error.what for error in refused)
    assert len(refused) > 10
