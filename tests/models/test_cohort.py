"""Cohorts beyond the equivalence classes: chunked output layers, a causal model as classifier, half precision."""

from __future__ import annotations

import equality
import pytest
import torch
import transformers as hf

from lichen.core.tree import stack
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort


def test_chunks_of_the_output_layer_change_only_rounding() -> None:
    model, spec = equality.tiny("llama", dtype=torch.float64), Lora(targets=("q_proj",), rank=2, heads=("lm_head",))
    batch, results = equality.batch_of("llama", clients=3), []
    for chunk in (1000, 7):
        cohort = CausalCohort(model, adapter=spec, name="llama", chunk=chunk)
        params_C = {name: x.requires_grad_() for name, x in stack(equality.start_of(cohort, 3)).items()}
        loss_C, count_C = cohort.loss(params_C, {}, batch)
        results.append((loss_C, count_C, *torch.autograd.grad(loss_C.sum(), list(params_C.values()))))
        with torch.no_grad():
            torch.testing.assert_close(cohort.loss(params_C, {}, batch)[0], loss_C, rtol=1e-13, atol=0)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_patch_moves_the_loss_and_a_zero_patch_does_not() -> None:
    cohort = equality.cohort_of("gpt2", equality.tiny("gpt2", dtype=torch.float64))
    start_C, batch = stack(equality.start_of(cohort, 2)), equality.batch_of("gpt2", clients=2)
    plain, _ = cohort.loss(start_C, {}, batch)
    path = "transformer.h.0.attn.c_attn"
    zero, _ = cohort.loss(start_C, {f"patch.{path}.dense": torch.zeros(96, 32, dtype=torch.float64)}, batch)
    assert torch.equal(zero, plain)
    left, right = torch.full((96, 1), 0.3, dtype=torch.float64), torch.ones(1, 32, dtype=torch.float64)
    thin, _ = cohort.loss(start_C, {f"patch.{path}.left": left, f"patch.{path}.right": right}, batch)
    dense, _ = cohort.loss(start_C, {f"patch.{path}.dense": left @ right}, batch)
    torch.testing.assert_close(thin, dense, rtol=1e-12, atol=0)
    assert float((dense - plain).abs().min()) > 1e-6


def test_a_causal_model_as_a_classifier_reads_each_rows_last_token() -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        num_labels=5,
    )
    model = hf.LlamaForSequenceClassification(config).requires_grad_(False).eval()
    cohort = ClassifierCohort(model, adapter=Lora(targets=("q_proj",), rank=2, heads=("score",)), name="llama")
    batch = equality.batch_of("bert", clients=3)
    start_C = stack([cohort.init(0)] * 3)
    logits_CBK = cohort.logits(start_C, {}, batch)
    for c in range(3):
        slow = model(input_ids=batch["input_ids_CBT"][c], attention_mask=batch["attention_mask_CBT"][c]).logits
        torch.testing.assert_close(logits_CBK[c], slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_half_precision_base_trains_single_precision_tensors(architecture: str, dtype: torch.dtype) -> None:
    model = equality.tiny(architecture, dtype=dtype)
    cohort = equality.cohort_of(architecture, model)
    start_C, batch = stack(equality.start_of(cohort, 2)), equality.batch_of(architecture, clients=2)
    trained, losses = equality.train_cohort(cohort, start_C, [batch] * 4, "sgd")
    assert {x.dtype for x in trained.values()} == {torch.float32}
    assert losses[0].dtype == torch.float32
    assert bool((losses[-1] < losses[0]).all())
