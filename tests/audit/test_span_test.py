"""DAGER's span test: exact below its bound, silent above it and under noise; for whole weights and both factors.

Legend: T tokens of a batch, H width, r rank, o outputs.
"""

from __future__ import annotations

from typing import Any

import equality
import pytest
import torch

from lichen.audit.span_test import Probe, found_in, is_placed, layer_inputs, reads_tokens, span_of
from lichen.core.errors import LichenError
from lichen.core.tree import broadcast
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort

LAYER = "model.layers.0.self_attn.v_proj"


def change_of(rank: int, ids: torch.Tensor, *, zero: bool) -> tuple[Any, Any, Any]:
    """``(model, start, gradient)`` of LoRA on one batch of one client; B is zero at a first round."""
    spec = Lora(targets=("v_proj",), rank=rank)
    cohort = CausalCohort(equality.tiny("llama", seed=3), adapter=spec, name="llama", prove=False)
    start = cohort.init(0)
    if not zero:
        start = {
            n: x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for n, x in start.items()
        }
    batch = {
        "active_C": torch.tensor([True]),
        "input_ids_CBT": ids[None],
        "attention_mask_CBT": torch.ones_like(ids[None]),
        "labels_CBT": ids[None],
        "index_CB": torch.arange(len(ids))[None],
    }
    leaves = {n: x.requires_grad_() for n, x in broadcast(start, 1).items()}
    loss, _ = cohort.loss(leaves, {}, batch)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return cohort.wrapped.model, start, {n: g[0] for n, g in zip(leaves, grads, strict=True)}


def tokens(ids: torch.Tensor) -> set[tuple[int, int]]:
    """All but each row's last, of which nothing is predicted and which nobody attends to."""
    return {(0, token) for row in ids for token in row[:-1].tolist()}


IDS = torch.tensor([[5, 9, 14, 33, 70], [9, 41, 5, 88, 2]])


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_tokens_are_read_exactly_while_they_are_fewer_than_the_rank(factor: str) -> None:
    zero = factor == "lora_B"
    model, start, change = change_of(12, IDS, zero=zero)
    through = start[f"{LAYER}.lora_A"] if zero else None
    probe = Probe(span=span_of(change[f"{LAYER}.{factor}"]), through_rH=through)
    (found,) = found_in(model, LAYER, [probe], tokens=equality.VOCABULARY)
    assert found == tokens(IDS)
    assert not probe.span.is_full


def test_a_span_at_its_bound_says_nothing() -> None:
    model, _, change = change_of(4, IDS, zero=False)
    span = span_of(change[f"{LAYER}.lora_A"])
    assert span.is_full
    assert span.most == 4 < len(tokens(IDS))
    assert found_in(model, LAYER, [Probe(span=span)], tokens=equality.VOCABULARY) == [set()]
    assert found_in(model, LAYER, [Probe(span=span_of(torch.zeros(3, 8)))], tokens=9) == [set()]


def test_little_noise_fills_the_span() -> None:
    model, _, change = change_of(12, IDS, zero=False)
    exact = change[f"{LAYER}.lora_A"]
    noise = 0.01 * exact.std() * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    noisy = span_of(exact + noise)
    assert noisy.is_full
    assert found_in(model, LAYER, [Probe(span=noisy)], tokens=equality.VOCABULARY) == [set()]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_only_layers_below_attention_read_single_tokens(architecture: str) -> None:
    model = equality.tiny(architecture)
    first, later = {
        "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"),
        "bert": ("bert.encoder.layer.0.attention.self.key", "classifier"),
    }[architecture]
    assert reads_tokens(model, first)
    assert not reads_tokens(model, later)
    assert is_placed(model, first) == (architecture != "llama")
    if architecture == "bert":
        assert not reads_tokens(model, "bert.embeddings.word_embeddings")


def test_an_input_alone_is_the_input_in_its_row() -> None:
    model, place = equality.tiny("bert"), torch.arange(4)[None]
    ids = torch.tensor([[3, 8, 8, 20]])
    whole = layer_inputs(model, "bert.encoder.layer.0.attention.self.key", ids, place)
    assert whole is not None
    for t in range(4):
        alone = layer_inputs(model, "bert.encoder.layer.0.attention.self.key", ids[:, t : t + 1], place[:, t : t + 1])
        assert alone is not None
        torch.testing.assert_close(alone[0, 0], whole[0, t])


def test_a_change_that_is_no_matrix_of_numbers_is_refused() -> None:
    for bad in (torch.zeros(3), torch.full((2, 2), torch.nan)):
        with pytest.raises(LichenError, match="spans nothing"):
            span_of(bad)
