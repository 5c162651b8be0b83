"""Adapters on disk: PEFT reads what is written and gives the run's logits, and the other way round."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import equality
import peft
import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.wrap import wrap
from lichen.models.causal_cohort import CausalCohort
from lichen.models.peft.format import save_adapter
from lichen.models.peft.merge import merge
from lichen.models.peft.read import load_adapter

WITH_LOGITS = [a for a in equality.ARCHITECTURES if a != "t5-encoder"]


def _own_logits(model: Any, spec: Lora, tree: Tree, patch: Tree) -> Tensor:
    batch = equality.batch_of("llama", clients=1)
    inputs = {"input_ids": batch["input_ids_CBT"][0], "attention_mask": batch["attention_mask_CBT"][0]}
    fixed = {f"patch.{name}": x for name, x in patch.items()}
    with torch.no_grad():
        logits: Tensor = wrap(model, spec).call({k: x[None] for k, x in tree.items()}, fixed, **inputs).logits
    return logits


def _plain_logits(model: Any) -> Tensor:
    batch = equality.batch_of("llama", clients=1)
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=batch["input_ids_CBT"][0], attention_mask=batch["attention_mask_CBT"][0]
        ).logits
    return logits


def _patch(tree: Tree, *, rank: int, dense: bool = False, every: int = 2) -> Tree:
    """A patch on every second layer with an adapter."""
    generator = torch.Generator().manual_seed(5)
    patch: Tree = {}
    for path in sorted(name.removesuffix(".lora_A") for name in tree if name.endswith("lora_A"))[::every]:
        out, inside = tree[f"{path}.lora_B"].shape[0], tree[f"{path}.lora_A"].shape[1]
        left = 0.1 * torch.randn(out, rank, generator=generator).to(tree[f"{path}.lora_A"].dtype)
        right = torch.randn(rank, inside, generator=generator).to(left.dtype)
        patch |= {f"{path}.dense": left @ right} if dense else {f"{path}.left": left, f"{path}.right": right}
    return patch


def _export(folder: Path, architecture: str, tree: Tree, spec: Lora, patch: Tree | None = None) -> None:
    save_adapter(
        folder,
        tree,
        spec=spec,
        base_name="tiny",
        task="SEQ_CLS" if architecture == "bert" else "CAUSAL_LM",
        patch=patch,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", WITH_LOGITS)
@pytest.mark.parametrize("patched", [False, True])
def test_peft_gives_the_runs_logits(architecture: str, patched: bool, tmp_path: Path) -> None:
    model, spec = equality.tiny(architecture, dtype=torch.float64), equality.spec_of(architecture)
    tree = equality.start_of(wrap(model, spec), 1)[0]
    patch = _patch(tree, rank=3) if patched else {}
    _export(tmp_path, architecture, tree, spec, patch)
    lone = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path), autocast_adapter_dtype=False).eval()
    own = _own_logits(model, spec, tree, patch)
    torch.testing.assert_close(_plain_logits(lone), own, rtol=1e-10, atol=1e-12)
    assert float((own - _plain_logits(model)).abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", WITH_LOGITS)
@pytest.mark.parametrize("dense", [False, True])
def test_merged_model_gives_the_runs_logits_and_leaves_the_base(architecture: str, dense: bool, tmp_path: Path) -> None:
    model, spec = equality.tiny(architecture, dtype=torch.float64), equality.spec_of(architecture)
    before = _plain_logits(model)
    tree = equality.start_of(wrap(model, spec), 1)[0]
    patch = _patch(tree, rank=2, dense=dense)
    merged = merge(model, tree, patch, spec=spec)
    own = _own_logits(model, spec, tree, patch)
    torch.testing.assert_close(_plain_logits(merged), own, rtol=1e-10, atol=1e-12)
    assert torch.equal(_plain_logits(model), before)
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(_plain_logits(again), own, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_a_head_tied_to_the_embedding_is_trained_and_merged_apart(tmp_path: Path) -> None:
    model = equality.tiny("qwen2", dtype=torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(LichenError, match=r"no layer is called 'nonsense'"):
        wrap(model, Lora(targets=("q_proj",), heads=("nonsense",)))
    spec = Lora(targets=("q_proj",), rank=2, alpha=4.0, heads=("lm_head",))
    tree = equality.start_of(wrap(model, spec), 1)[0]
    merged = merge(model, tree, spec=spec)
    own = _own_logits(model, spec, tree, {})
    torch.testing.assert_close(_plain_logits(merged), own, rtol=1e-10, atol=1e-12)
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(_plain_logits(again), own, rtol=1e-10, atol=1e-12)
    cohort = CausalCohort(model, adapter=spec, name="tied")
    batch = equality.batch_of("qwen2", clients=1)
    loss_C, count_C = cohort.loss({k: x[None] for k, x in tree.items()}, {}, batch)
    labels = batch["labels_CBT"][0][:, 1:]
    expected = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss_C[0].detach(), expected, rtol=1e-12, atol=0)
    assert int(count_C) == int((labels != -100).sum())


def test_an_adapted_output_layer_leaves_the_embedding_it_is_tied_to() -> None:
    model, spec = equality.tiny("qwen2", dtype=torch.float64), Lora(targets=("lm_head",), rank=2, alpha=4.0)
    tree = equality.start_of(wrap(model, spec), 1)[0]
    merged = merge(model, tree, spec=spec)
    torch.testing.assert_close(_plain_logits(merged), _own_logits(model, spec, tree, {}), rtol=1e-10, atol=1e-12)


def test_round_trip_and_what_is_refused(tmp_path: Path) -> None:
    model, spec = equality.tiny("bert"), equality.spec_of("bert")
    tree = equality.start_of(wrap(model, spec), 1)[0]
    _export(tmp_path, "bert", tree, spec)
    again, config = load_adapter(tmp_path, like=wrap(model, spec).init(3))
    assert again.keys() == tree.keys()
    assert all(torch.equal(again[name], tree[name]) for name in tree)
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 12.0, ["classifier"])
    other = wrap(model, Lora(targets=spec.targets, rank=2, heads=spec.heads)).init(0)
    with pytest.raises(LichenError, match=r"lora_A' has shape \(4, 32\), expected \(2, 32\)"):
        load_adapter(tmp_path, like=other)
    with pytest.raises(LichenError, match=r"there is no adapter_config\.json"):
        load_adapter(tmp_path / "nowhere")
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(text | {"use_dora": True}))
    with pytest.raises(LichenError, match="use_dora"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    raw = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(LichenError, match="damaged"):
        load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_made_by_peft_starts_a_run(tmp_path: Path) -> None:
    model = equality.tiny("gpt2", dtype=torch.float64)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["c_attn"], fan_in_fan_out=True)
    lone = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).eval()
    for name, x in lone.named_parameters():
        if "lora_B" in name:
            x.data.normal_(generator=torch.Generator().manual_seed(1))
    lone.save_pretrained(tmp_path)
    spec = Lora(targets=("c_attn",), rank=4, alpha=12.0)
    tree, _ = load_adapter(tmp_path, like=wrap(model, spec).init(0))
    torch.testing.assert_close(_own_logits(model, spec, tree, {}), _plain_logits(lone), rtol=1e-10, atol=1e-12)


def test_patches_that_fit_no_adapter_are_refused(tmp_path: Path) -> None:
    model, spec = equality.tiny("llama"), equality.spec_of("llama")
    tree = wrap(model, spec).init(0)
    with pytest.raises(LichenError, match=r"is dense and fits no adapter(.|\n)*export a merged model"):
        _export(tmp_path, "llama", tree, spec, _patch(tree, rank=2, dense=True))
    # 4 + 6 stays below half of 32, but not below half of the narrow values' 16
    with pytest.raises(LichenError, match=r"v_proj would need an adapter of rank 10(.|\n)*export a merged model"):
        _export(tmp_path, "llama", tree, spec, _patch(tree, rank=6, every=1))
    stray = {
        "model.layers.0.mlp.up_proj.left": torch.ones(48, 1),
        "model.layers.0.mlp.up_proj.right": torch.ones(1, 32),
    }
    with pytest.raises(LichenError, match="up_proj has no adapter"):
        _export(tmp_path, "llama", tree, spec, stray)
    assert not list(tmp_path.iterdir())
