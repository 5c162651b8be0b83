"""Packed rows against the padded reference, one client a call: losses, gradients, logits.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import equality
import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.packing.packing import pack_rows

CPU = torch.device("cpu")


def _windowed(dtype: torch.dtype) -> Any:
    """Llama's shape with a sliding window narrower than the rows."""
    import transformers as hf

    config = hf.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.MistralForCausalLM(config).to(dtype).requires_grad_(False).eval()


def _distilbert(dtype: torch.dtype) -> Any:
    import transformers as hf

    config = hf.DistilBertConfig(
        vocab_size=97, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0, num_labels=5
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.DistilBertForSequenceClassification(config).to(dtype).requires_grad_(False).eval()


CASES: dict[str, tuple[str, Lora]] = {
    "llama": ("llama", Lora(targets=("q_proj", "v_proj", "down_proj"), rank=4)),
    "qwen2": ("qwen2", Lora(targets="all-linear", rank=3)),
    "gpt2": ("gpt2", Lora(targets=("c_attn", "c_fc"), rank=4)),
    "window": ("window", Lora(targets=("q_proj", "v_proj"), rank=4)),
    "output layer": ("llama", Lora(targets=("v_proj", "lm_head"), rank=4)),
    "output layer whole": ("llama", Lora(targets=("v_proj",), rank=4, heads=("lm_head",))),
    "embeddings": ("gpt2", Lora(targets=("c_attn",), rank=2, heads=("wte", "ln_f"))),
    "bert": ("bert", Lora(targets=("query", "value", "dense"), rank=4, heads=("classifier",))),
    "distilbert": ("distilbert", Lora(targets=("q_lin",), rank=4, heads=("pre_classifier", "classifier"))),
}


def _model(architecture: str, dtype: torch.dtype) -> Any:
    if architecture in ("window", "distilbert"):
        return {"window": _windowed, "distilbert": _distilbert}[architecture](dtype)
    return equality.tiny(architecture, dtype=dtype)


def _cohort(case: str, dtype: torch.dtype = torch.float64, **how: bool) -> Any:
    architecture, adapter = CASES[case]
    cohort = ClassifierCohort if architecture in ("bert", "distilbert") else CausalCohort
    return cohort(_model(architecture, dtype), adapter=adapter, name=case, **how)


def _batch(case: str, *, clients: int = 4, rows: int = 3, width: int = 11) -> dict[str, Tensor]:
    """Rows of 1 to ``width`` tokens; the last client is inactive and the first one's last row is padding."""
    generator = torch_generator(7, case)
    length_CB = torch.randint(1, width + 1, (clients, rows), generator=generator)
    length_CB[1, 0] = width
    mask_CBT = (torch.arange(width) < length_CB[..., None]).long()
    index_CB = torch.arange(rows).expand(clients, rows).clone()
    index_CB[0, -1] = -1
    active_C = torch.ones(clients, dtype=torch.bool)
    active_C[-1] = False
    batch = {
        "active_C": active_C,
        "index_CB": index_CB,
        "input_ids_CBT": torch.randint(2, 97, (clients, rows, width), generator=generator) * mask_CBT,
        "attention_mask_CBT": mask_CBT,
    }
    if CASES[case][0] in ("bert", "distilbert"):
        labels_CB = torch.randint(5, (clients, rows), generator=generator)
        return {**batch, "labels_CB": labels_CB.masked_fill((index_CB < 0) | ~active_C[:, None], -100)}
    hidden_CBT = (mask_CBT == 0) | (index_CB < 0)[..., None]
    # Some words in the middle and at the end have no label.
    hidden_CBT = hidden_CBT | (torch.rand(mask_CBT.shape, generator=generator) < 0.3)
    return {**batch, "labels_CBT": batch["input_ids_CBT"].masked_fill(hidden_CBT, -100)}


def _parameters(cohort: Any, clients: int) -> Tree:
    start = cohort.init(0)
    return {
        name: (x + 0.1 * torch.randn((clients, *x.shape), generator=torch_generator(3, name)).to(x)).requires_grad_()
        for name, x in start.items()
    }


def _both(cohort: Any, params_C: Tree, batch: dict[str, Tensor], fixed: Tree | None = None) -> tuple[Tensor, ...]:
    loss_C, count_C = cohort.loss(params_C, fixed or {}, batch)
    leaves = list(params_C.values())
    grads = torch.autograd.grad(loss_C.sum(), leaves, allow_unused=True, materialize_grads=True)
    return (loss_C.detach(), count_C, *grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_is_the_padded_reference(case: str, dtype: torch.dtype, near: float) -> None:
    slow, fast = _cohort(case, dtype, reference=True), _cohort(case, dtype, reference=False, packed=True)
    batch, params_C = _batch(case), _parameters(slow, 4)
    assert fast.packed
    for padded, packed in zip(_both(slow, params_C, batch), _both(fast, params_C, batch), strict=True):
        assert float((padded - packed).abs().max()) <= near * max(float(padded.abs().max()), 1e-3)
    assert float(_both(fast, params_C, batch)[0][-1]) == 0, "an inactive client has no loss"


@pytest.mark.parametrize("case", ["bert", "distilbert"])
def test_logits_of_real_rows_are_the_reference(case: str) -> None:
    slow, fast = _cohort(case, reference=True), _cohort(case, reference=False, packed=True)
    batch, params_C = _batch(case), _parameters(slow, 4)
    real_CB = (batch["index_CB"] >= 0) & batch["active_C"][:, None]
    a, b = (cohort.logits(params_C, {}, batch)[real_CB] for cohort in (slow, fast))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["llama", "gpt2", "window", "bert", "embeddings"])
def test_layers_computed_again_change_nothing(case: str) -> None:
    cohort = _cohort(case, reference=False, packed=True)
    batch, params_C = _batch(case), _parameters(cohort, 4)
    results = []
    for model in (cohort, cohort.checkpointed()):
        results.append(_both(model, params_C, batch))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


UPPER = {
    "llama": Lora(targets=("q_proj", "down_proj"), rank=2, last=1),
    "gpt2": Lora(targets=("c_attn",), rank=2, last=1),
    "bert": Lora(targets=("query",), rank=2, last=1, heads=("classifier",)),
}


@pytest.mark.parametrize("case", UPPER)
def test_frozen_layers_below_are_computed_once_a_row(case: str) -> None:
    model = _model(case, torch.float64)
    kind = ClassifierCohort if case == "bert" else CausalCohort
    slow = kind(model, adapter=UPPER[case], name=case, reference=True)
    fast = kind(model, adapter=UPPER[case], name=case, reference=False, packed=True)
    assert fast.prefix is not None
    assert len(slow.wrapped.layers) == len(UPPER[case].targets)
    batch, params_C = _batch(case), _parameters(slow, 4)
    calls: list[int] = []
    first = next(m for m in fast.wrapped.model.modules() if type(m).__name__ in ("LlamaMLP", "GPT2MLP", "BertOutput"))
    first.register_forward_hook(lambda *_: calls.append(1))
    wanted = _both(slow, params_C, batch)
    for again in range(3):
        for padded, packed in zip(wanted, _both(fast, params_C, batch), strict=True):
            torch.testing.assert_close(padded, packed, rtol=1e-10, atol=1e-12)
        if again == 0:
            computed = len(calls)
    rows = len(pack_rows(batch, to_label=case != "bert", device=CPU).lengths)
    assert 0 < computed <= rows
    assert len(calls) == computed, "the second and third time nothing below was computed"
    for padded, packed in zip(wanted, _both(fast.checkpointed(), params_C, batch), strict=True):
        torch.testing.assert_close(padded, packed, rtol=1e-10, atol=1e-12)


def test_what_is_kept_of_frozen_layers_is_bounded() -> None:
    fast = CausalCohort(
        _model("llama", torch.float32), adapter=UPPER["llama"], name="llama", reference=False, packed=True
    )
    batch, params_C = _batch("llama"), _parameters(fast, 4)
    assert fast.prefix is not None
    whole = _both(fast, params_C, batch)
    assert fast.prefix.bytes == sum(x.numel() * x.element_size() for x in fast.prefix.cached.values()) > 600
    fast.prefix.limit = 600
    fast.prefix.cached.clear()
    fast.prefix.bytes = 0
    less = _both(fast, params_C, batch)
    assert fast.prefix.bytes <= 600
    assert all(torch.equal(a, b) for a, b in zip(whole, less, strict=True)), "bits do not depend on what is kept"


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(LichenError, match="2 layers"):
        CausalCohort(_model("llama", torch.float32), adapter=Lora(targets=("q_proj",), last=3), name="llama")


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_patches_count_on_packed_rows_too(kind: str) -> None:
    slow, fast = _cohort("llama", reference=True), _cohort("llama", reference=False, packed=True)
    batch, params_C = _batch("llama"), _parameters(slow, 4)
    layer = slow.wrapped.layers[0]
    size = slow.wrapped.model.get_submodule(layer)
    generator = torch_generator(5, kind)
    left, right = (
        torch.randn(s, generator=generator).double() for s in ((size.out_features, 2), (2, size.in_features))
    )
    patch = {f"patch.{layer}.dense": left @ right}
    if kind == "factored":
        patch = {f"patch.{layer}.left": left, f"patch.{layer}.right": right}
    with_C, without_C = _both(fast, params_C, batch, patch), _both(fast, params_C, batch)
    for padded, packed in zip(_both(slow, params_C, batch, patch), with_C, strict=True):
        torch.testing.assert_close(padded, packed, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(with_C[0], without_C[0])


def test_a_batch_without_a_label_is_no_loss() -> None:
    cohort = _cohort("llama", reference=False, packed=True)
    batch, params_C = _batch("llama"), _parameters(cohort, 4)
    batch["labels_CBT"] = torch.full_like(batch["labels_CBT"], -100)
    results = _both(cohort, params_C, batch)
    assert all(float(x.abs().sum()) == 0 for x in results)


def test_only_what_a_label_needs_is_kept() -> None:
    batch = {
        "active_C": torch.tensor([True, True]),
        "input_ids_CBT": torch.arange(2, 18).view(2, 2, 4),
        "attention_mask_CBT": torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 1]]]),
        "labels_CBT": torch.tensor(
            [[[-100, 3, 4, -100], [-100, -100, 0, 0]], [[5, -100, -100, -100], [-100, 6, -100, 7]]]
        ),
    }
    pack = pack_rows(batch, to_label=True, device=CPU)
    # A label on a first token has nothing to be predicted from; the token before the last label is the last one needed.
    assert pack.lengths == (2, 3)
    assert pack.rows == (0, 3)
    assert pack.client_offsets == (0, 2, 5)
    assert pack.ids_N.tolist() == [2, 3, 14, 15, 16]
    assert pack.position_N.tolist() == [0, 1, 0, 1, 2]
    assert pack.at_R.tolist() == [0, 1, 2, 4]
    assert pack.label_R.tolist() == [3, 4, 6, 7]
    assert pack.labels == (2, 2)
    whole = pack_rows(batch, to_label=False, device=CPU)
    assert whole.lengths == (4, 2, 3, 4)


def test_holes_in_a_row_are_refused() -> None:
    batch = _batch("llama")
    batch["attention_mask_CBT"][1, 0, 3] = 0
    with pytest.raises(LichenError, match="pad on the right"):
        pack_rows(batch, to_label=True, device=CPU)


def test_what_cannot_be_packed_says_so_or_is_padded() -> None:
    import transformers as hf

    config = hf.Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = hf.Gemma2ForCausalLM(config).requires_grad_(False).eval()
    adapter = Lora(targets=("q_proj",), rank=2)
    assert not CausalCohort(model, adapter=adapter, name="gemma2", reference=False).packed
    with pytest.raises(LichenError, match="packed"):
        CausalCohort(model, adapter=adapter, name="gemma2", reference=False, packed=True)
