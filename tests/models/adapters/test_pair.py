"""Two adapters side by side: PEFT's own weighted pair, row by row, and through gates; packed and padded alike."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lichen.clients.personal.pair import pair_of
from lichen.core.parameters import CENTER
from lichen.core.tree import Tree
from lichen.models.adapters.lora import Lora, LoraLinear
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.packing.packing import Packing

CLIENTS, RANK = 3, 4
SPEC = Lora(targets=("q_proj", "down_proj"), rank=RANK, alpha=8.0)


def small(**more: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        initializer_range=0.3,
        **more,
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(small()).requires_grad_(False).eval()


def batch(labelled_from: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    length_CB = torch.tensor([[8, 5], [4, 7], [6, 6]])
    mask_CBT = (torch.arange(8) < length_CB[..., None]).long()
    ids_CBT = torch.randint(1, 31, (CLIENTS, 2, 8), generator=generator) * mask_CBT
    labelled = mask_CBT.bool() & (torch.arange(8) >= labelled_from)
    return {
        "active_C": torch.ones(CLIENTS, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": mask_CBT,
        "labels_CBT": torch.where(labelled, ids_CBT, -100),
        "index_CB": torch.arange(2).expand(CLIENTS, 2).clone(),
    }


def drawn(start: Tree, seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(CLIENTS, *x.shape, generator=generator) for name, x in start.items()}


def of_client(tree: Tree, client: int) -> Tree:
    return {name: x[client : client + 1] for name, x in tree.items()}


def in_peft(model: Any, tree: Tree, client: int, name: str, base: Any | None = None) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    if base is None:
        base = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
    else:
        base.add_adapter(name, config)
    state = {f"base_model.model.{key}.weight": x[client] for key, x in tree.items()}
    peft.set_peft_model_state_dict(base, state, adapter_name=name)
    return base


def test_a_pair_of_constant_weight_is_pefts_weighted_pair(llama: Any) -> None:
    cohort = CausalCohort(llama, adapter=SPEC, name="pair", prove=False)
    first_C, second_C = (drawn(cohort.init(0), seed) for seed in (1, 2))
    pair_C = pair_of(first_C, second_C, second=0.3)
    rows = batch()
    for client in range(CLIENTS):
        both = in_peft(llama, second_C, client, "second", in_peft(llama, first_C, client, "first"))
        both.add_weighted_adapter(["first", "second"], [0.7, 0.3], "pair", combination_type="cat")
        both.set_adapter("pair")
        ids_BT = rows["input_ids_CBT"][client]
        theirs = both(input_ids=ids_BT, attention_mask=rows["attention_mask_CBT"][client]).logits
        ours = cohort.wrapped.call(
            of_client(pair_C, client), {}, input_ids=ids_BT, attention_mask=rows["attention_mask_CBT"][client]
        ).logits
        real_BT = rows["attention_mask_CBT"][client].bool()
        assert torch.allclose(ours[real_BT], theirs[real_BT], atol=1e-5)


@pytest.mark.parametrize("labelled_from", [1, 3])
def test_each_row_has_the_weight_that_it_would_have_alone(llama: Any, labelled_from: int) -> None:
    cohort = CausalCohort(llama, adapter=SPEC, name="pair", reference=True)
    first_C, second_C = (drawn(cohort.init(0), seed) for seed in (1, 2))
    rows = batch(labelled_from)
    states_CBH = cohort.row_states(rows)
    center_CH = 0.5 * states_CBH[:, 0]  # of each client, its first row
    second_CB = torch.einsum("cbh,ch->cb", states_CBH, center_CH).clamp(0, 1)
    assert torch.allclose(second_CB[:, 0], torch.full((CLIENTS,), 0.5))
    assert bool((second_CB[:, 1] < 0.499).all())
    loss_CB, _ = cohort.losses({**pair_of(first_C, second_C), CENTER: center_CH}, {}, rows)
    for row in range(2):
        for client in range(CLIENTS):
            constant = pair_of(first_C, second_C, second=float(second_CB[client, row]))
            alone_CB, _ = cohort.losses(constant, {}, rows)
            assert float(loss_CB[client, row]) == pytest.approx(float(alone_CB[client, row]), rel=1e-5)


def test_what_follows_the_first_label_does_not_weigh_a_row(llama: Any) -> None:
    cohort = CausalCohort(llama, adapter=SPEC, name="pair", prove=False)
    rows = batch()
    other = {**rows, "input_ids_CBT": rows["input_ids_CBT"].clone()}
    other["input_ids_CBT"][:, :, 3:] = 7
    assert torch.allclose(cohort.row_states(rows), cohort.row_states(other), atol=1e-6)
    other["input_ids_CBT"][:, :, 2] = 7
    assert not torch.allclose(cohort.row_states(rows), cohort.row_states(other), atol=1e-3)


@pytest.mark.parametrize("kind", ["rows", "gates"])
def test_packed_stacked_and_alone_give_the_same_loss_and_gradients(llama: Any, kind: str) -> None:
    found = []
    for reference, packed in ((True, False), (False, False), (False, True)):
        cohort = CausalCohort(llama, adapter=SPEC, name="pair", reference=reference, packed=packed)
        assert (cohort.reference, cohort.packed) == (reference, packed)
        start = cohort.init(0)
        pair_C = pair_of(drawn(start, 1), drawn(start, 2))
        if kind == "rows":
            pair_C[CENTER] = cohort.row_states(batch())[:, 0]
        else:
            pair_C |= drawn({f"{path}.lora_gate": start[f"{path}.lora_A"][:2] for path in cohort.wrapped.layers}, 3)
        leaves_C = {name: x.clone().requires_grad_(name != CENTER) for name, x in pair_C.items()}
        loss_C, _ = cohort.loss(leaves_C, {}, batch())
        grads = torch.autograd.grad(loss_C.sum(), [x for name, x in leaves_C.items() if name != CENTER])
        found.append((loss_C.detach(), torch.cat([x.flatten() for x in grads])))
    for loss_C, grads in found[1:]:
        assert torch.allclose(loss_C, found[0][0], rtol=1e-5)
        assert torch.allclose(grads, found[0][1], rtol=1e-3, atol=1e-6)


def test_a_gate_mixes_token_by_token() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5).requires_grad_(False)
    layer = LoraLinear(linear, scale=2.0, packing=Packing())
    x_BTi = torch.randn(2, 3, 6)
    A_wri, B_wor, G_wi = torch.randn(2, RANK, 6), torch.randn(2, 5, RANK), torch.randn(2, 6)
    given = {"lora_A": torch.cat([*A_wri])[None], "lora_B": torch.cat([*B_wor], 1)[None], "lora_gate": G_wi[None]}
    ours = torch.func.functional_call(layer, given, (x_BTi,))
    for row in range(2):
        for token in range(3):
            x = x_BTi[row, token]
            mix = (G_wi @ x).softmax(0)
            low = sum(mix[w] * 2.0 * (B_wor[w] @ (A_wri[w] @ x)) for w in range(2))
            assert torch.allclose(ours[row, token], linear(x) + low, atol=1e-5)


def test_a_classifiers_rows_are_weighed_as_well() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForSequenceClassification(small(num_labels=3)).requires_grad_(False).eval()
    spec = Lora(targets=("q_proj",), rank=RANK, alpha=8.0, heads=("score",))
    rows = {name: x for name, x in batch().items() if name != "labels_CBT"}
    rows["labels_CB"] = torch.tensor([[0, 1], [2, 0], [1, 1]])
    found = []
    for reference, packed in ((True, False), (False, True)):
        cohort = ClassifierCohort(model, adapter=spec, name="pair", reference=reference, packed=packed)
        start = cohort.init(0)
        factors = {name: x for name, x in start.items() if "lora" in name}
        first_C, second_C = drawn(factors, 1), drawn(start, 2)
        center_CH = cohort.row_states(rows)[:, 1]
        pair_C = {**pair_of(first_C, second_C), CENTER: center_CH}
        found.append(cohort.logits(pair_C, {}, rows))
        second_CB = torch.einsum("cbh,ch->cb", cohort.row_states(rows), center_CH)
        assert torch.allclose(second_CB[:, 1], torch.ones(CLIENTS))
        own = cohort.logits(second_C, {}, rows)
        assert torch.allclose(found[-1][:, 1], own[:, 1], atol=1e-4)  # all own where the row is the centre itself
        assert not torch.allclose(found[-1][:, 0], own[:, 0], atol=1e-3)
    assert torch.allclose(found[0], found[1], atol=1e-4)
