"""Local training: equal to a plain loop, independent of company, and unable to poison a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.clients.training.gradient_steps import Clip, Proximal
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.row_weights import ByRows
from lichen.clients.training.train import Train
from lichen.clients.training.training_sums import tokens_seen_C
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.message import concatenate_messages, pack_message, take_client, unpack_message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.accumulation import MicroBatches
from lichen.server.lowrank.lowrank import FedEx
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated
from support.toy_cohorts import Bigram, LoraLinear, Softmax, fold, job, rows

SGD = ClientOptimizer("sgd", lr=0.2, momentum=0.9)


def plain_loop(shared: Tree, batches: Any, client: int, *, clip: Any = None, prox: float = 0.0, lr: float = 0.2) -> Any:
    """One client, one torch module, torch.optim: what a textbook would write."""
    layer = torch.nn.Linear(5, 3).double()
    layer.load_state_dict(shared)
    stepper = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    for batch in batches:
        if not batch["active_C"][client]:
            continue
        stepper.zero_grad()
        logits = layer(batch["x_CBF"][client].double())
        torch.nn.functional.cross_entropy(logits, batch["labels_CB"][client]).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(layer.parameters(), clip)
        for name, w in layer.named_parameters():
            w.grad += prox * (w.detach() - shared[name])
        stepper.step()
    return {name: w.detach() - shared[name] for name, w in layer.named_parameters()}


def links(clip: Any = None, prox: float = 0.0) -> Any:
    return (*((Clip(clip),) if clip else ()), *((Proximal(prox),) if prox else ()))


@pytest.mark.parametrize("more", [{}, {"clip": 0.5}, {"prox": 0.3}, {"clip": 0.5, "prox": 0.3}])
def test_equals_a_plain_loop_for_each_client(more: Any) -> None:
    model = Softmax()
    shared = model.init(0)
    batches = [rows(t, range(3), active=[True, t < 2, t != 1]) for t in range(4)]
    work = Train(model, optimizer=SGD, gradient_steps=links(**more))
    message, own = fold(work, job(shared, range(3), settings={"lr_scale": 0.5}), batches)
    assert own is None
    assert message.metrics["steps"].tolist() == [4, 2, 3]
    assert message.weight_C.tolist() == [16, 8, 12]
    for c in range(3):
        expected = plain_loop(shared, batches, c, lr=0.1, **more)
        for name in shared:
            torch.testing.assert_close(message.tensors[name][c], expected[name], rtol=1e-12, atol=1e-13)


class Given:
    """A source of batches that are there already."""

    def __init__(self, batches: Any) -> None:
        self.given = batches

    def shape(self, client: int) -> Any:
        return 0

    def batches(self, clients: int, seed: int) -> None:
        yield from self.given


@pytest.mark.parametrize("parts", [2, 3, 8, 11])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("more", [{}, {"gradient_steps": links(0.05, 0.3)}])
def test_micro_batches_take_the_step_of_one_batch(parts: Any, name: str, more: Any) -> None:
    model = Softmax()
    shared = model.init(0)
    batches = [rows(t, range(3), count=8, active=[True, t < 2, t != 1]) for t in range(4)]
    for t, batch in enumerate(batches):  # rows without a label, and padding, are not spread evenly over the pieces
        batch["labels_CB"][:, :t] = -100
        batch["labels_CB"][2, 2:] = -100
        batch["index_CB"][2, 2:] = -1
    whole, _ = fold(Train(model, optimizer=ClientOptimizer(name, lr=0.1), **more), job(shared, range(3)), batches)
    work = Train(model, optimizer=ClientOptimizer(name, lr=0.1), accumulate=parts, **more)
    cut, own = fold(work, job(shared, range(3)), list(MicroBatches(Given(batches), parts).batches(range(3), 0)))
    assert own is None
    for name, x in whole.tensors.items():
        assert x.abs().max() > 1e-3
        torch.testing.assert_close(cut.tensors[name], x, rtol=1e-9, atol=1e-12)
    assert cut.metrics.keys() == whole.metrics.keys()
    for metric, x in whole.metrics.items():
        torch.testing.assert_close(cut.metrics[metric], x, rtol=1e-12, atol=0)
    assert torch.equal(cut.weight_C, whole.weight_C)


def test_a_mean_of_micro_batch_means_would_be_another_step() -> None:
    """What the test above could not tell apart if every piece held equally many labels."""
    model, shared = Softmax(), Softmax().init(0)
    batch = rows(0, [0], count=4)
    batch["labels_CB"][0, 1:3] = -100
    batch["labels_CB"][0, 3] = (batch["labels_CB"][0, 0] + 1) % 3
    batch["labels_CB"][0, 2] = 1
    halves = list(MicroBatches(Given([batch]), 2).batches([0], 0))
    plain = ClientOptimizer("sgd", lr=1.0)
    whole, cut = (
        fold(Train(model, optimizer=plain, accumulate=k), job(shared, [0]), some)[0].tensors["weight"]
        for k, some in ((1, [batch]), (2, halves))
    )
    means = sum(fold(Train(model, optimizer=plain), job(shared, [0]), [half])[0].tensors["weight"] for half in halves)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-14)
    assert (means / 2 - whole).abs().max() > 1e-2


def test_a_weight_by_rows_is_the_clients_size_whatever_it_saw() -> None:
    model, shared = Softmax(), Softmax().init(0)
    batches = [rows(t, [4, 0, 2], active=[True, True, False]) for t in range(2)]
    seen, _ = fold(Train(model), job(shared, [4, 0, 2]), batches)
    told, own = fold(ByRows(Train(model, local_params=("bias",)), (1000, 7, 3, 1, 10)), job(shared, [4, 0, 2]), batches)
    assert seen.weight_C.tolist() == [8, 8, 0]
    assert told.weight_C.tolist() == [10, 1000, 0]  # nobody is weighed who trained on nothing
    assert torch.equal(told.tensors["weight"], seen.tensors["weight"])
    assert set(own) == {"params/bias"}


def test_tokens_of_padding_rows_are_not_counted() -> None:
    batch = {
        "active_C": torch.tensor([True, False]),
        "attention_mask_CBT": torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]]),
        "index_CB": torch.tensor([[3, -1], [0, 1]]),
    }
    assert tokens_seen_C(batch).tolist() == [2, 0]
    assert tokens_seen_C({**batch, "answer_CB": torch.tensor([[-1, 5], [0, 0]])}).tolist() == [3, 0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_together_and_alone_give_the_same_bytes(name: str) -> None:
    model = Softmax(dtype=torch.float32)
    shared = model.init(0)
    work = Train(model, optimizer=ClientOptimizer(name, lr=0.1), gradient_steps=links(0.7, 0.1))
    together, _ = fold(work, job(shared, range(5)), [rows(t, range(5)) for t in range(3)])
    alone = [fold(work, job(shared, [c]), [rows(t, [c]) for t in range(3)])[0] for c in range(5)]
    assert pack_message(together) == pack_message(concatenate_messages(alone))


def test_a_client_without_batches_sends_zero_weight_and_zeros() -> None:
    model = Softmax()
    batch = rows(0, range(2), active=[True, False])
    batch["x_CBF"][1] = torch.nan
    message, _ = fold(Train(model, weigh_by="one"), job(model.init(0), range(2)), [batch])
    assert message.weight_C.tolist() == [1, 0]
    assert message.metrics["failed"].tolist() == [0, 0]
    assert all(not x[1].any() for x in message.tensors.values())
    assert message.tensors["weight"][0].abs().sum() > 0


@pytest.mark.parametrize("personal", [False, True])
def test_a_diverged_client_cannot_poison_the_sum_or_itself(personal: Any) -> None:
    model = Softmax()
    shared = model.init(0)
    work = Train(model, optimizer=SGD, personal=personal)
    start, own_before = fold(work, job(shared, range(3)), [rows(0, range(3))])
    batch = rows(1, range(3))
    batch["x_CBF"][1, 0, 0] = torch.inf
    message, own = fold(work, job(shared, range(3), version=1), [batch], own_before)
    assert message.metrics["failed"].tolist() == [0, 1, 0]
    assert message.weight_C.tolist() == [4, 0, 4]
    assert all(x.isfinite().all() for x in [*message.tensors.values(), *message.metrics.values()])
    clean, own_clean = fold(work, job(shared, range(3), version=1), [rows(1, range(3))], own_before)
    for c in (0, 2):
        assert pack_message(take_client(message, c)) == pack_message(take_client(clean, c))
    if personal:
        assert all(torch.equal(own[n][1], own_before[n][1]) for n in own)
        assert all(torch.equal(own[n][0], own_clean[n][0]) for n in own)
    else:
        assert all(not x[1].any() for x in message.tensors.values())
    assert start.metrics["failed"].sum() == 0


def test_personal_training_goes_on_from_its_own_and_nothing_leaves() -> None:
    model = Softmax()
    shared = model.init(0)
    work = Train(model, optimizer=ClientOptimizer("adamw", lr=0.1), personal=True)
    batches = [rows(t, range(2)) for t in range(4)]
    at_once, own_at_once = fold(work, job(shared, range(2)), batches)
    _, half = fold(work, job(shared, range(2)), batches[:2])
    half = {**half, "best_value": torch.ones(2)}
    message, own = fold(work, job(shared, range(2), version=1), batches[2:], half)
    assert message.tensors == at_once.tensors == {}
    assert unpack_message(pack_message(message)).tensors == {}
    assert trees.digest({n: x for n, x in own.items() if n != "best_value"}) == trees.digest(own_at_once)
    assert own["opt/step"].tolist() == [4, 4]
    assert torch.equal(own["best_value"], torch.ones(2))
    assert not torch.equal(own["params/weight"][0], own["params/weight"][1])


def test_frozen_names_are_neither_trained_nor_sent_and_patch_is_fixed() -> None:
    model = LoraLinear()
    shared = {**model.init(0), "patch.layer.dense": torch.ones(4, 6)}
    batch = rows(0, range(2), features=6, classes=4)
    message, _ = fold(Train(model, freeze_schedule=(("lora_A",),)), job(shared, range(2)), [batch, batch])
    assert set(message.tensors) == {"layer.lora_B"}
    both, _ = fold(Train(model), job(shared, range(2)), [batch, batch])
    assert set(both.tensors) == {"layer.lora_A", "layer.lora_B"}
    assert both.tensors["layer.lora_A"].abs().sum() > 0
    with pytest.raises(LichenError, match="no tensor is left to train"):
        fold(Train(model, freeze_schedule=(("lora_A", "lora_B"),)), job(shared, range(2)), [batch])


def test_phases_take_turns_by_version() -> None:
    model = LoraLinear()
    shared = {**model.init(0), "layer.lora_B": torch.full((4, 2), 0.1)}
    work = Train(model, optimizer=SGD, freeze_schedule=(("lora_A",), ("lora_B",)))
    batch = rows(0, range(2), features=6, classes=4)
    sent = [set(fold(work, job(shared, range(2), version=v), [batch])[0].tensors) for v in range(4)]
    assert sent == [{"layer.lora_B"}, {"layer.lora_A"}] * 2


def test_what_stays_at_home_goes_on_from_there_and_is_not_sent() -> None:
    """One half at home: each client's two rounds equal its training both halves itself with the other one averaged."""
    model = LoraLinear()
    shared = {**model.init(0), "layer.lora_B": torch.full((4, 2), 0.1)}
    work = Train(model, optimizer=SGD, local_params=("lora_B",))
    batches = [rows(t, range(2), features=6, classes=4) for t in range(2)]
    first, own = fold(work, job(shared, range(2)), batches)
    plain, _ = fold(Train(model, optimizer=SGD), job(shared, range(2)), batches)
    assert set(first.tensors) == {"layer.lora_A"}
    assert set(own) == {"params/layer.lora_B"}
    assert torch.equal(first.tensors["layer.lora_A"], plain.tensors["layer.lora_A"])
    torch.testing.assert_close(own["params/layer.lora_B"], shared["layer.lora_B"] + plain.tensors["layer.lora_B"])
    after = {
        "layer.lora_A": shared["layer.lora_A"] + first.tensors["layer.lora_A"].mean(0),
        "layer.lora_B": shared["layer.lora_B"],
    }
    second, own_after = fold(work, job(after, range(2), version=1), batches, own)
    for c in range(2):
        mine = {**after, "layer.lora_B": own["params/layer.lora_B"][c]}
        alone, _ = fold(
            Train(model, optimizer=SGD), job(mine, [c]), [{k: x[c : c + 1] for k, x in b.items()} for b in batches]
        )
        assert torch.equal(second.tensors["layer.lora_A"][c], alone.tensors["layer.lora_A"][0])
        torch.testing.assert_close(
            own_after["params/layer.lora_B"][c], mine["layer.lora_B"] + alone.tensors["layer.lora_B"][0]
        )


def test_tokens_are_attended_and_examples_are_labelled() -> None:
    ids = torch.tensor([[[1, 2, 3, 0], [2, 3, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
    mask = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
    batch = {
        "active_C": torch.tensor([True, True]),
        "input_ids_CBT": ids,
        "attention_mask_CBT": mask,
        "labels_CBT": ids.masked_fill(mask == 0, -100),
    }
    model = Bigram()
    message, _ = fold(Train(model), job(model.init(0), range(2)), [batch, batch])
    assert message.metrics["tokens"].tolist() == [10, 8]
    assert message.weight_C.tolist() == message.metrics["count"].tolist() == [6, 6]
    by_tokens, _ = fold(Train(model, weigh_by="tokens"), job(model.init(0), range(2)), [batch])
    assert by_tokens.weight_C.tolist() == [5, 4]


def test_fedex_rounds_give_the_mean_of_what_the_clients_learnt() -> None:
    """The model is linear in its weight, so the mean model's logits must be the mean of the logits."""
    model, server = LoraLinear(), ServerSGD()
    fedex = FedEx(model.scaling)
    shared = model.init(0)
    for t in range(4):
        batches = [rows(10 * t + i, range(3), features=6, classes=4, active=[True, True, i == 0]) for i in range(3)]
        message, _ = fold(Train(model, optimizer=SGD), job(shared, range(3), version=t), batches)
        trained_C = {n: shared[n] + x for n, x in message.tensors.items()}
        fixed = Shared.of_flat(shared).fixed
        probe = rows(99, [7], features=6, classes=4)
        logits_CBK = model.logits(trained_C, fixed, {n: x.repeat(3, *[1] * (x.dim() - 1)) for n, x in probe.items()})
        share_C = (message.weight_C / message.weight_C.sum()).float()
        expected_BK = torch.einsum("c,cbk->bk", share_C, logits_CBK)
        change, metrics = closed(fedex, fedex.add(fedex.zero(), message), shared)
        shared, _ = updated(server, change, {}, shared)
        parts = Shared.of_flat(shared)
        trainable, fixed = parts.trainable, parts.fixed
        got_BK = model.logits(trees.broadcast(trainable, 1), fixed, probe)[0]
        torch.testing.assert_close(got_BK, expected_BK, rtol=1e-5, atol=1e-5)
        assert metrics["deviation"] > 1e-4
    assert "patch.layer.dense" in shared


@pytest.mark.parametrize("bad", [{"accumulate": 0}, {"weigh_by": "age"}])
def test_refuses_values_out_of_range(bad: Any) -> None:
    with pytest.raises(LichenError, match=r"train\."):
        Train(Softmax(), **bad)


def test_refuses_private_state_of_another_model() -> None:
    work = Train(Softmax(), personal=True)
    _, own = fold(work, job(Softmax().init(0), [0]), [rows(0, [0])])
    wide = Softmax(features=7)
    with pytest.raises(LichenError, match="private state"):
        fold(Train(wide, personal=True), job(wide.init(0), [0]), [], own)
