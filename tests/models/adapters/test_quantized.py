"""Quantised bases: errors within bounds, gradients as through the dense weights, and the memory they save.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

import equality

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree, broadcast, take
from lichen.models.adapters.lora import Lora
from lichen.models.adapters.quantized import (
    KINDS,
    Kind,
    QuantizedLinear,
    QuantizedWeight,
    is_quantized,
    linear_frozen,
    quantize,
    resident_bytes,
    weights_of,
)
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import base_digest, load_causal
from lichen.models.peft.merge import merge
from lichen.recipes.assemble.live_bytes import LiveBytes
from support.tiny_llama import save_model

CASES: dict[str, Lora] = {
    # Layers with an adapter, layers without one above them, and a bias each.
    "llama": Lora(targets=("q_proj", "down_proj"), rank=3),
    "qwen2": Lora(targets=("v_proj",), rank=3),
    "gpt2": Lora(targets=("c_attn",), rank=3),
    "bert": Lora(targets=("query",), rank=3, heads=("classifier",)),
}


def _dense(model: Any) -> Any:
    """The same function with ordinary layers, for autograd to be the oracle."""
    twin = copy.deepcopy(model)
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.weight.dense(), requires_grad=False)
            plain.bias = layer.bias
            twin.set_submodule(path, plain)
    return twin.requires_grad_(False).eval()


def _cohort(case: str, model: Any, **how: Any) -> Any:
    kind = ClassifierCohort if case == "bert" else CausalCohort
    return kind(model, adapter=CASES[case], name=case, **how)


def _batch(case: str, clients: int = 3) -> dict[str, Tensor]:
    length_CB = torch.tensor([[9, 4], [6, 9], [2, 5]])[:clients]
    mask_CBT = (torch.arange(9) < length_CB[..., None]).long()
    ids_CBT = torch.randint(2, equality.VOCABULARY, (3, 2, 9), generator=torch_generator(3, "q"))[:clients] * mask_CBT
    rows = {"labels_CB": torch.tensor([[0, 1], [2, 3], [4, 0]])[:clients]}
    if case != "bert":
        rows = {"labels_CBT": torch.where(mask_CBT == 1, ids_CBT, -100)}
    return {
        "active_C": torch.ones(clients, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": mask_CBT,
        "index_CB": torch.arange(2).expand(clients, 2).clone(),
        **rows,
    }


def _start(cohort: Any, clients: int = 3) -> Tree:
    noise = {n: 0.05 * torch.randn((3, *x.shape), generator=torch_generator(5, n)) for n, x in cohort.init(0).items()}
    return {n: (x + noise[n][:clients].to(x)).requires_grad_() for n, x in broadcast(cohort.init(0), clients).items()}


def _loss_and_grads(cohort: Any, batch: dict[str, Tensor], fixed: Tree | None = None) -> tuple[Tensor, Tree]:
    trainable_C = _start(cohort, batch["active_C"].numel())
    loss_C, _ = cohort.loss(trainable_C, fixed or {}, batch)
    grads = torch.autograd.grad(loss_C.sum(), list(trainable_C.values()))
    return loss_C.detach(), dict(zip(trainable_C, grads, strict=True))


@pytest.mark.parametrize("shape", [(64, 128), (48, 32), (7, 33), (10, 33), (3, 1), (65, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_error_bounds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """int8: half a step of its row's scale. NF4: half its widest gap (-1 to -0.696) of its block's largest weight."""
    weight_oi = torch.randn(shape, generator=torch_generator(0, "w")).to(dtype)
    slack = 2**-8 if dtype == torch.bfloat16 else 1e-5
    exact_oi = weight_oi.double()
    int8_oi, nf4_oi = (QuantizedWeight(weight_oi, kind).dense() for kind in KINDS)
    assert int8_oi.dtype == nf4_oi.dtype == dtype
    largest_o1 = exact_oi.abs().amax(1, keepdim=True)
    assert bool(((int8_oi.double() - exact_oi).abs() <= largest_o1 * (0.5 / 127 + slack)).all())
    blocks = torch.split(exact_oi.flatten(), 64)
    largest_N = torch.cat([b.abs().amax().expand(b.numel()) for b in blocks])
    assert bool(((nf4_oi.double() - exact_oi).abs().flatten() <= largest_N * (0.1520 + slack)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_of_blocks(kind: Kind) -> None:
    for case in CASES:
        model = equality.tiny(case)
        kept, names = {n: x.clone() for n, x in model.state_dict().items()}, set(weights_of(model))
        whole, before = sum(weights_of(model).values()), resident_bytes(model)
        held = quantize(model, kind)
        assert held is model
        assert is_quantized(model)
        assert sum(weights_of(model).values()) == whole
        assert resident_bytes(model) < before
        assert set(weights_of(model)) == names
        state = model.state_dict()
        assert all(torch.equal(state[n], x) for n, x in kept.items() if n in state)
        gone = {n for n in kept if n not in state}
        assert gone == {f"{p}.weight" for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        assert not any(part in n for n in gone for part in ("embed", "wte", "lm_head", "classifier", "norm", "pooler"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["reference", "stacked", "packed"])
def test_gradients_are_those_through_the_dense_weights(case: str, kind: Kind, way: str) -> None:
    model = quantize(equality.tiny(case), kind)
    how = {"reference": way == "reference", "packed": way == "packed"}
    ours, oracle = (_cohort(case, m, **how) for m in (model, _dense(model)))
    assert is_quantized(ours.wrapped.model)
    assert not is_quantized(oracle.wrapped.model)
    batch = _batch(case)
    (loss_C, grads), (wanted_C, wanted) = (_loss_and_grads(cohort, batch) for cohort in (ours, oracle))
    torch.testing.assert_close(loss_C, wanted_C, rtol=1e-6, atol=1e-6)
    for name, grad_C in wanted.items():
        assert float(grad_C.norm()) > 0
        assert float((grads[name] - grad_C).norm() / grad_C.norm()) <= 1e-6, name


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_patch_lies_on_a_quantised_layer(form: str, packed: bool) -> None:
    model = quantize(equality.tiny("llama"), "nf4")
    cohorts = [_cohort("llama", m, reference=False, packed=packed) for m in (model, _dense(model))]
    layer = cohorts[0].wrapped.layers[0]
    out_in = cohorts[0].wrapped.model.get_submodule(layer).weight.shape
    left, right = (0.1 * torch.randn(s, generator=torch_generator(s[0], "p")) for s in ((out_in[0], 2), (2, out_in[1])))
    patch = {"patch.left": left, "patch.right": right} if form == "factored" else {"patch.dense": left @ right}
    fixed = {n.replace("patch.", f"patch.{layer}."): x for n, x in patch.items()}
    (loss_C, grads), (wanted_C, wanted) = (_loss_and_grads(cohort, _batch("llama"), fixed) for cohort in cohorts)
    assert not torch.allclose(wanted_C, _loss_and_grads(cohorts[1], _batch("llama"))[0])
    torch.testing.assert_close(loss_C, wanted_C, rtol=1e-6, atol=1e-6)
    assert all(float((grads[n] - g).norm() / g.norm()) <= 1e-6 for n, g in wanted.items())


def test_a_layer_without_adapter_passes_gradients_on() -> None:
    weight = QuantizedWeight(torch.randn(5, 70, dtype=torch.float64, generator=torch_generator(0, "x")), "nf4")
    x = torch.randn(4, 70, dtype=torch.float64, generator=torch_generator(1, "x"), requires_grad=True)
    bias = torch.ones(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: linear_frozen(x, weight.dense, bias), (x,))


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_in_any_company(case: str) -> None:
    cohort = _cohort(case, quantize(equality.tiny(case), "nf4"), reference=True)
    loss_C, grads = _loss_and_grads(cohort, _batch(case))
    alone, own = _loss_and_grads(cohort, _batch(case, clients=1))
    assert torch.equal(alone[0], loss_C[0])
    assert all(torch.equal(take(own, 0)[name], x) for name, x in take(grads, 0).items())


def test_wrapping_copies_no_codes_and_digests_agree() -> None:
    model = quantize(equality.tiny("llama"), "nf4")
    cohort = _cohort("llama", model)
    inner = {b.data_ptr() for n, b in cohort.wrapped.model.named_buffers() if n.endswith((".codes", ".scales"))}
    outer = {b.data_ptr() for n, b in model.named_buffers() if n.endswith((".codes", ".scales"))}
    assert inner == outer
    assert len(outer) == 2 * 14
    again, other, whole = (equality.tiny("llama") for _ in range(3))
    assert base_digest(quantize(again, "nf4")) == base_digest(model)
    assert base_digest(quantize(other, "int8")) != base_digest(model)
    assert cohort.base == _cohort("llama", again).base
    assert _cohort("llama", whole).base != cohort.base
    code = next(b for n, b in again.named_buffers() if n.endswith(".codes"))
    code[0] ^= 1
    assert base_digest(again) != base_digest(model)


def _step_peak(model: Any, *, padded: bool) -> tuple[int, int]:
    """``(bytes that are there, bytes a step makes at most besides)``."""
    cohort = CausalCohort(model, adapter=Lora(targets=("q_proj",), rank=2), name="x", reference=padded, prove=False)
    batch = _batch("llama", clients=1)
    with LiveBytes() as live:
        _loss_and_grads(cohort, batch)
    return resident_bytes(cohort.wrapped.model), live.peak


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [True, False])
def test_a_step_is_smaller_by_the_weights(kind: Kind, padded: bool) -> None:
    """But for one layer at a time, no dense weight is alive: neither between, nor kept for the way back."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=equality.VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).requires_grad_(False).eval()
    held, made = _step_peak(copy.deepcopy(model), padded=padded)
    held_few, made_few = _step_peak(quantize(model, kind), padded=padded)
    saved, layer = held - held_few, 4 * 256 * 256
    assert saved > 8 * 7 * layer * (0.74 if kind == "int8" else 0.85)
    assert (held + made) - (held_few + made_few) >= saved - 2 * layer
    assert made_few < made + 2 * layer


def test_checkpointing_goes_with_it() -> None:
    found = []
    for again in (False, True):
        cohort = _cohort("qwen2", quantize(equality.tiny("qwen2"), "int8"), reference=True)
        cohort = cohort.checkpointed() if again else cohort
        found.append(_loss_and_grads(cohort, _batch("qwen2")))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], grad) for name, grad in found[0][1].items())


def test_loaded_as_its_files_are_and_quantised(tmp_path: Path) -> None:
    """A bfloat16 file read as it is gives the codes of one read in float32, and everything else in float32."""
    folder = save_model(tmp_path / "model")
    import transformers as hf

    hf.LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    model, _ = load_causal(folder, quantized="nf4")
    wide, _ = load_causal(folder)
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert not any(x.requires_grad for x in model.parameters())
    assert base_digest(model) == base_digest(quantize(wide, "nf4"))
    heads = [load_classifier(folder, classes=3, seed=1, quantized=kind)[0].score.weight for kind in ("int8", None)]
    assert torch.equal(*heads)
    half, _ = load_causal(folder, dtype="bfloat16", quantized="int8")
    first = next(layer for layer in half.modules() if isinstance(layer, QuantizedWeight))
    assert (half.dtype, first.dense().dtype, first.scales.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_what_cannot_be_done_says_so() -> None:
    model = quantize(equality.tiny("llama"), "nf4")
    tree = _cohort("llama", model).init(0)
    with pytest.raises(LichenError, match="load the base at float32"):
        merge(model, tree, spec=CASES["llama"])
    with pytest.raises(LichenError, match="cannot be trained whole"):
        CausalCohort(model, adapter=Lora(targets=("q_proj",), heads=("o_proj",)), name="x")
    with pytest.raises(LichenError, match="use int8 or nf4"):
        quantize(equality.tiny("llama"), "int4")  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="no transformer blocks"):
        quantize(nn.Sequential(nn.Linear(3, 3)), "int8")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(LichenError, match=r"lichen\[quantized\]"):
        quantize(equality.tiny("llama"), "nf4")
