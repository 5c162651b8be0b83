"""Wrapping: which layers, start values, patches, full-rank heads, and that the base stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lichen.core.errors import LichenError
from lichen.models.adapters.heads import ClientEmbedding, ClientLinear, ClientNorm
from lichen.models.adapters.lora import Lora, LoraLinear
from lichen.models.adapters.wrap import wrap
from lichen.models.loading.load import base_digest


@pytest.fixture(scope="module")
def llama() -> Any:
    config = hf.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).requires_grad_(False).eval()


def test_targets_match_by_the_end_of_the_name_and_all_linear_spares_the_output(llama: Any) -> None:
    assert wrap(llama, Lora(targets=("q_proj",))).layers == tuple(
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    )
    assert wrap(llama, Lora(targets=("layers.1.mlp.up_proj",))).layers == ("model.layers.1.mlp.up_proj",)
    every = wrap(llama, Lora(targets="all-linear")).layers
    assert len(every) == 14
    assert "lm_head" not in every
    with pytest.raises(LichenError, match=r"adapter\.target_modules.*query(.|\n)*use some of: .*q_proj"):
        wrap(llama, Lora(targets=("q_proj", "query")))
    with pytest.raises(LichenError, match="nothing would be trained"):
        wrap(llama, Lora(targets=()))
    with pytest.raises(LichenError, match=r"adapter\.rank"):
        Lora(targets=("q_proj",), rank=0)


def test_start_values_follow_from_the_seed_and_the_layer(llama: Any) -> None:
    wrapped = wrap(llama, Lora(targets=("q_proj", "down_proj"), rank=4))
    one, same, other = wrapped.init(1), wrapped.init(1), wrapped.init(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    A, twin = (one[f"model.layers.{i}.mlp.down_proj.lora_A"] for i in (0, 1))
    assert A.shape == (4, 24)
    assert not torch.equal(A, twin)
    assert not torch.equal(A, other["model.layers.0.mlp.down_proj.lora_A"])
    bound = 24**-0.5  # kaiming_uniform_(a=sqrt(5))
    assert float(A.abs().max()) <= bound
    assert float(A.abs().max()) > 0.9 * bound
    assert all(float(x.abs().max()) == 0 for name, x in one.items() if name.endswith("lora_B"))
    few = wrap(llama, Lora(targets=("q_proj",), rank=4)).init(1)
    name = "model.layers.1.self_attn.q_proj.lora_A"
    assert torch.equal(few[name], one[name])


def test_the_base_is_shared_and_untouched(llama: Any) -> None:
    before, kinds = base_digest(llama), [type(m) for m in llama.modules()]
    wrapped = wrap(llama, Lora(targets="all-linear"))
    assert wrapped.model.model.embed_tokens.weight is llama.model.embed_tokens.weight
    layer = wrapped.model.model.layers[0].mlp.up_proj
    assert layer.weight is llama.model.layers[0].mlp.up_proj.weight
    start_C = {name: torch.randn(2, *x.shape) for name, x in wrapped.init(0).items()}
    wrapped.call(start_C, {}, input_ids=torch.arange(8)[None].repeat(4, 1), use_cache=False)
    assert layer.get_buffer("lora_A").numel() == 0
    assert base_digest(llama) == before
    assert [type(m) for m in llama.modules()] == kinds
    changed = copy.deepcopy(llama)
    changed.model.norm.weight[0] += 1
    assert base_digest(changed) != before


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", ["none", "dense", "factored"])
def test_a_wrapped_layer_is_its_formula(conv: bool, kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer: Any = (Conv1D(7, 5) if conv else nn.Linear(5, 7)).double().requires_grad_(False)
    layer.weight.copy_(draw(*layer.weight.shape))
    layer.bias.copy_(draw(7))
    wrapped = LoraLinear(layer, scale=1.5)
    x, A, B = draw(6, 4, 5), draw(3, 2, 5), draw(3, 7, 2)
    left, right = draw(7, 2), draw(2, 5)
    tensors = {"lora_A": A, "lora_B": B}
    weight = layer.weight.t() if conv else layer.weight
    if kind == "dense":
        tensors["patch_dense"] = left @ right
    elif kind == "factored":
        tensors |= {"patch_left": left, "patch_right": right}
    if kind != "none":
        weight = weight + left @ right
    y = torch.func.functional_call(wrapped, tensors, (x,))
    for row in range(6):
        c = row // 2
        slow = x[row] @ (weight + 1.5 * B[c] @ A[c]).t() + layer.bias
        torch.testing.assert_close(y[row], slow, rtol=1e-12, atol=1e-12)


def test_a_tensor_or_patch_without_a_layer_is_refused(llama: Any) -> None:
    wrapped = wrap(llama, Lora(targets=("q_proj",)))
    start_C = {name: x[None] for name, x in wrapped.init(0).items()}
    ids = torch.arange(4)[None]
    with pytest.raises(LichenError, match=r"q_proj\.lora_A' is missing"):
        wrapped.call({k: x for k, x in start_C.items() if "layers.0" not in k or "lora_B" in k}, {}, input_ids=ids)
    with pytest.raises(LichenError, match="belongs to no layer"):
        wrapped.call({**start_C, "x.lora_A": ids}, {}, input_ids=ids)
    with pytest.raises(LichenError, match=r"mlp\.up_proj\.dense' fits no layer"):
        wrapped.call(start_C, {"patch.model.layers.0.mlp.up_proj.dense": ids}, input_ids=ids)


@pytest.mark.parametrize(
    ("layer", "wrapper"),
    [
        (nn.Linear(6, 4), ClientLinear),
        (nn.Linear(6, 4, bias=False), ClientLinear),
        (nn.LayerNorm(6), ClientNorm),
        (nn.Embedding(9, 6, padding_idx=0), ClientEmbedding),
    ],
)
def test_heads_run_each_clients_own_copy(layer: Any, wrapper: Any) -> None:
    wrapped = wrapper(layer)
    generator = torch.Generator().manual_seed(0)
    ids = isinstance(layer, nn.Embedding)
    x = torch.randint(9, (6, 5), generator=generator) if ids else torch.randn(6, 5, 6, generator=generator)
    names = dict(layer.named_parameters())
    tensors = {name: torch.randn(3, *p.shape, generator=generator) for name, p in names.items()}
    y = torch.func.functional_call(wrapped, tensors, (x,))
    for row in range(6):
        slow = torch.func.functional_call(
            layer, {name: t[row // 2] for name, t in tensors.items()}, (x[row : row + 1],)
        )
        torch.testing.assert_close(y[row : row + 1], slow, rtol=1e-5, atol=1e-6)
