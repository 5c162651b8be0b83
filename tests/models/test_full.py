"""Whole models: plain transformers and autograd are the oracle; tied weights; company; export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equality
import pytest
import torch
import transformers as hf
from torch.nn import functional

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, digest, stack
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.full import FullCausal, FullClassifier
from lichen.models.whole import filled, save_whole

CAUSAL = ("llama", "qwen2", "gpt2")


def whole_of(architecture: str, model: Any, **more: Any) -> Any:
    return (FullClassifier if architecture == "bert" else FullCausal)(model, name=architecture, **more)


def apart(tree: Tree, clients: int) -> Any:
    """Each client's own tensors, so that nobody's could be taken for another's."""
    g = torch.Generator().manual_seed(0)
    return stack(
        [{n: x + 0.02 * torch.randn(x.shape, generator=g).to(x) for n, x in tree.items()} for _ in range(clients)]
    )


def oracle(architecture: str, model: Any, tensors: Tree, batch: Batch, client: int) -> Any:
    """Loss and gradients of one client by transformers itself."""
    copied = filled(model, tensors).requires_grad_(True)
    ids, mask = batch["input_ids_CBT"][client], batch["attention_mask_CBT"][client]
    if architecture == "bert":
        logits, wanted = copied(input_ids=ids, attention_mask=mask).logits, batch["labels_CB"][client]
    else:
        logits = copied(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        wanted = batch["labels_CBT"][client][:, 1:].flatten()
    loss = functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in copied.named_parameters()}, int((wanted != -100).sum())


@pytest.mark.parametrize("architecture", [*CAUSAL, "bert"])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_equals_transformers_and_autograd(architecture: str, chunk: Any) -> None:
    if architecture == "bert" and chunk == 7:
        return
    model = equality.tiny(architecture)
    more = {} if architecture == "bert" else {"chunk": chunk}
    cohort, batch = whole_of(architecture, model, **more), equality.batch_of(architecture, clients=2)
    leaves_C = {name: x.requires_grad_() for name, x in apart(cohort.init(0), 2).items()}
    loss_C, count_C = cohort.loss(leaves_C, {}, batch)
    grads = torch.autograd.grad(loss_C.sum(), list(leaves_C.values()), allow_unused=True, materialize_grads=True)
    for c in range(2):
        mine = {name: x[c].detach() for name, x in leaves_C.items()}
        loss, expected, count = oracle(architecture, model, mine, batch, c)
        assert int(count_C[c]) == count > 0
        torch.testing.assert_close(loss_C[c], loss, rtol=1e-6, atol=1e-6)
        assert leaves_C.keys() == expected.keys()
        for name, grad in zip(leaves_C, grads, strict=True):
            right = expected[name] if expected[name] is not None else torch.zeros_like(grad[c])
            assert float((grad[c] - right).norm()) <= 3e-6 * (1 + float(right.norm())), name


@pytest.mark.parametrize("architecture", [*CAUSAL, "bert"])
def test_has_the_loss_of_the_adapted_model_before_any_step(architecture: str) -> None:
    model = equality.tiny(architecture, dtype=torch.float64)
    batch = equality.batch_of(architecture, clients=2)
    kind = ClassifierCohort if architecture == "bert" else CausalCohort
    target = ("query",) if architecture == "bert" else ("c_attn",) if architecture == "gpt2" else ("q_proj",)
    adapted = kind(model, adapter=Lora(targets=target, rank=1), name="adapted")
    whole = whole_of(architecture, model)
    expected, count_C = adapted.loss(stack([adapted.init(0)] * 2), {}, batch)
    got, counts_C = whole.loss(stack([whole.init(0)] * 2), {}, batch)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert torch.equal(count_C, counts_C)


@pytest.mark.parametrize("architecture", ["qwen2", "bert"])
def test_together_and_alone_give_the_same_bits(architecture: str) -> None:
    cohort, batch = whole_of(architecture, equality.tiny(architecture)), equality.batch_of(architecture, clients=3)
    params_C = apart(cohort.init(0), 3)

    def run(chosen: Any) -> Any:
        leaves_C = {name: x[chosen].clone().requires_grad_() for name, x in params_C.items()}
        loss_C, _ = cohort.loss(leaves_C, {}, {name: x[chosen] for name, x in batch.items()})
        grads = torch.autograd.grad(loss_C.sum(), list(leaves_C.values()), allow_unused=True, materialize_grads=True)
        return loss_C.detach(), grads

    together, grads = run([0, 1, 2])
    for c in range(3):
        alone, mine = run([c])
        assert torch.equal(together[c : c + 1], alone)
        assert all(torch.equal(a[c : c + 1], b) for a, b in zip(grads, mine, strict=True))
    if architecture == "bert":
        with torch.no_grad():
            logits_CBK = cohort.logits(params_C, {}, batch)
            one = {name: x[1:2] for name, x in params_C.items()}
            assert torch.equal(cohort.logits(one, {}, {n: x[1:2] for n, x in batch.items()}), logits_CBK[1:2])


@pytest.mark.parametrize("architecture", ["qwen2", "bert"])
def test_who_is_not_there_neither_learns_nor_counts(architecture: str) -> None:
    cohort, batch = whole_of(architecture, equality.tiny(architecture)), equality.batch_of(architecture, clients=2)
    batch = {**batch, "active_C": torch.tensor([False, True])}
    leaves_C = {name: x.requires_grad_() for name, x in apart(cohort.init(0), 2).items()}
    loss_C, count_C = cohort.loss(leaves_C, {}, batch)
    grads = torch.autograd.grad(loss_C.sum(), list(leaves_C.values()), allow_unused=True, materialize_grads=True)
    assert float(loss_C[0].detach()) == 0
    assert int(count_C[0]) == 0
    assert all(not g[0].any() for g in grads)
    assert any(g[1].any() for g in grads)


def test_tied_weights_are_one_tensor_and_starting_copies_nothing() -> None:
    model = equality.tiny("qwen2")
    cohort = FullCausal(model, name="q")
    tree = cohort.init(0)
    assert "lm_head.weight" not in tree
    assert cohort.base == ""
    parameters = dict(model.named_parameters())
    assert all(x.data_ptr() == parameters[name].data_ptr() for name, x in tree.items())
    with_other_seed = cohort.init(1)
    assert digest(with_other_seed) == digest(tree)


def test_what_is_excluded_is_frozen_under_any_of_its_names() -> None:
    model = equality.tiny("qwen2")
    whole, less = FullCausal(model, name="q"), FullCausal(model, name="q", exclude=("lm_head", "layers.0"))
    out = whole.init(0).keys() - less.init(0).keys()
    assert "model.embed_tokens.weight" in out
    assert {name for name in out if ".layers." in name} == {n for n in whole.init(0) if ".layers.0." in n}
    assert less.base != whole.base == ""
    assert less.group != whole.group
    batch = equality.batch_of("qwen2", clients=2)
    left, _ = less.loss(stack([less.init(0)] * 2), {}, batch)
    right, _ = whole.loss(stack([whole.init(0)] * 2), {}, batch)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=0)


def test_a_smaller_dtype_is_trained_in_single_precision() -> None:
    cohort = FullCausal(equality.tiny("llama", dtype=torch.bfloat16), name="l")
    leaves_C = {name: x.requires_grad_() for name, x in stack([cohort.init(0)]).items()}
    loss_C, _ = cohort.loss(leaves_C, {}, equality.batch_of("llama", clients=1))
    loss_C.sum().backward()
    assert loss_C.dtype == torch.float32
    assert all(x.dtype == x.grad.dtype == torch.float32 for x in leaves_C.values())


def test_a_written_folder_loads_and_is_the_trained_model(tmp_path: Path) -> None:
    model = equality.tiny("qwen2")
    tree = {name: x + 0.1 for name, x in FullCausal(model, name="q").init(0).items()}
    before = digest(dict(model.named_parameters()))
    save_whole(tmp_path, model, tree)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, x in loaded.named_parameters():
        assert torch.equal(x, tree[name]), name
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert digest(dict(model.named_parameters())) == before


def test_refuses_what_does_not_fit() -> None:
    model = equality.tiny("llama")
    with pytest.raises(LichenError, match="no tensor is called 'heads'"):
        FullCausal(model, name="l", exclude=("heads",))
    with pytest.raises(LichenError, match="no tensor is left"):
        FullCausal(model, name="l", exclude=("model", "lm_head"))
    cohort, batch = FullCausal(model, name="l"), equality.batch_of("llama", clients=1)
    params_C = stack([cohort.init(0)])
    with pytest.raises(LichenError, match="is missing"):
        cohort.loss({n: x for n, x in params_C.items() if n != "lm_head.weight"}, {}, batch)
    with pytest.raises(LichenError, match="patches weights"):
        cohort.loss(params_C, {"patch.lm_head.dense": torch.zeros(1)}, batch)
    with pytest.raises(LichenError, match="class answers"):
        cohort.loss(params_C, {"answers.prob": torch.zeros(1)}, batch)
    with pytest.raises(LichenError, match="never held whole"):
        cohort.logits(params_C, {}, batch)
    with pytest.raises(LichenError, match="fits no weight"):
        filled(model, {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(LichenError, match="not frozen"):
        FullCausal(equality.tiny("llama").requires_grad_(True), name="l")
