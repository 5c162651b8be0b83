"""The proof at load time passes honest models and names the layer of one that mixes rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lichen.core.errors import LichenError
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.independence import prove_independent


def _bert() -> Any:
    config = hf.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(config).requires_grad_(False).eval()


ADAPTER = Lora(targets=("query",), rank=2, heads=("classifier",))


def test_an_honest_model_passes() -> None:
    cohort = ClassifierCohort(_bert(), adapter=ADAPTER, name="bert")
    assert prove_independent(cohort) is None
    assert cohort.alone is None
    assert (cohort.classes, cohort.name, len(cohort.base)) == (3, "bert", 64)


@pytest.mark.parametrize("where", ["classifier", "encoder"])
def test_batch_statistics_are_named(where: str) -> None:
    model = _bert()
    if where == "classifier":
        model.dropout = nn.BatchNorm1d(16, track_running_stats=False, affine=False)
        match = r"bert: layer 'dropout' \(BatchNorm1d\) lets one row change"
    else:
        # (rows, tokens, width): tokens stand where channels would, statistics run over rows
        model.bert.encoder.layer[0].output.LayerNorm = nn.BatchNorm1d(8, track_running_stats=False, affine=False)
        match = r"layer 'bert\.encoder\.layer\.0\.output\.LayerNorm' \(BatchNorm1d\)"
    model.eval()
    with pytest.raises(LichenError, match=match):
        ClassifierCohort(model, adapter=ADAPTER, name="bert")
    ClassifierCohort(model, adapter=ADAPTER, name="bert", prove=False)


def _mixtral(capacity: int | None = None) -> Any:
    """Experts that take every token sent to them, or the first so many of the batch."""
    config = hf.MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(config).requires_grad_(False).eval()
    if capacity is not None:
        route = model.model.layers[0].mlp.gate.forward

        def full(*inputs: Any, **named: Any) -> Any:
            logits, weight_NK, expert_NK = route(*inputs, **named)
            before_NK = torch.nn.functional.one_hot(expert_NK, 4).sum(1).cumsum(0).gather(1, expert_NK)
            return logits, torch.where(before_NK <= capacity, weight_NK, 0.0), expert_NK

        model.model.layers[0].mlp.gate.forward = full
    return model


def test_experts_that_take_every_token_are_trained_and_those_with_a_capacity_refused() -> None:
    spec = Lora(targets="all-linear", rank=2)
    model = _mixtral()
    cohort = CausalCohort(model, adapter=spec, name="mixtral", reference=False)
    assert {name.rpartition(".")[2] for name in cohort.wrapped.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ids = torch.randint(31, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    batch = {
        "active_C": torch.ones(3, dtype=torch.bool),
        "input_ids_CBT": ids,
        "attention_mask_CBT": torch.ones_like(ids),
        "labels_CBT": ids,
    }
    generator = torch.Generator().manual_seed(1)
    trainable_C = {
        name: x + 0.2 * torch.randn((3, *x.shape), generator=generator) for name, x in cohort.init(0).items()
    }
    together_C, _ = cohort.loss(trainable_C, {}, batch)
    for c in range(3):
        one = {name: x[c : c + 1] for name, x in trainable_C.items()}
        alone_C, _ = cohort.loss(one, {}, {name: x[c : c + 1] for name, x in batch.items()})
        torch.testing.assert_close(together_C[c], alone_C[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(LichenError, match="lets one row change another's result, as experts with room for so many"):
        CausalCohort(_mixtral(capacity=14), adapter=spec, name="mixtral", reference=False)


def test_what_a_model_raises_of_itself_is_one_sentence() -> None:
    model = _bert()

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("rows must have 64 tokens\nand more")

    model.bert.encoder.layer[0].forward = broken
    with pytest.raises(LichenError, match="does not run on rows of tokens: rows must have 64 tokens") as caught:
        ClassifierCohort(model, adapter=ADAPTER, name="bert")
    assert "another family" in str(caught.value)


def test_a_base_in_training_mode_or_with_gradients_is_refused() -> None:
    with pytest.raises(LichenError, match="training mode"):
        ClassifierCohort(_bert().train(), adapter=ADAPTER, name="bert")
    with pytest.raises(LichenError, match="not frozen"):
        ClassifierCohort(_bert().requires_grad_(True), adapter=ADAPTER, name="bert")


def test_language_models_hold_no_logits_and_take_no_answers() -> None:
    config = hf.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    cohort = CausalCohort(
        hf.GPT2LMHeadModel(config).requires_grad_(False).eval(), adapter=Lora(targets=("c_attn",)), name="gpt2"
    )
    assert cohort.classes is None
    with pytest.raises(LichenError, match="never held whole"):
        cohort.logits({}, {}, {})
    with pytest.raises(LichenError, match="cannot learn from class answers"):
        cohort.loss({}, {"answers.prob": torch.ones(1)}, {})


def test_a_head_with_a_cap_after_it_takes_the_whole_logits() -> None:
    config = hf.Gemma2Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
    )
    torch.manual_seed(0)
    model = hf.Gemma2ForCausalLM(config).double().requires_grad_(False).eval()
    model.lm_head.weight.mul_(40)
    cohort = CausalCohort(model, adapter=Lora(targets=("q_proj",)), name="gemma2")
    ids = torch.randint(31, (1, 2, 6), generator=torch.Generator().manual_seed(0))
    batch = {
        "active_C": torch.tensor([True]),
        "input_ids_CBT": ids,
        "attention_mask_CBT": torch.ones_like(ids),
        "labels_CBT": ids,
    }
    loss_C, _ = cohort.loss({k: x[None] for k, x in cohort.init(0).items()}, {}, batch)
    logits = model(input_ids=ids[0]).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[0][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_C[0].detach(), expected, rtol=1e-12, atol=0)
