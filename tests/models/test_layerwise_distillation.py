"""Layer-wise distillation against loops over rows, heads and tokens; what its terms do not depend on.

Legend: C clients, B rows, T tokens, E student's width, H teacher's width.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import stack
from lichen.models.layerwise_distillation import (
    EncoderStates,
    Layers,
    Layerwise,
    hidden_rows,
    relation_rows,
    renumbering,
)
from lichen.models.students.students import TwoLayerTransformer


@pytest.fixture(scope="module")
def encoder() -> Any:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32
        )
        return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def _batch(clients: int, rows: int = 3, width: int = 9) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for c in range(clients):
        generator = torch.Generator().manual_seed(100 + c)
        length = torch.randint(2, width + 1, (rows, 1), generator=generator)
        mine = {
            "input_ids_CBT": torch.randint(40, (rows, width), generator=generator),
            "attention_mask_CBT": (torch.arange(width) < length).long(),
            "labels_CB": torch.where(torch.arange(rows) == 0, 1, -100),
            "index_CB": torch.where(torch.arange(rows) == rows - 1, -1, torch.arange(rows)),
        }
        for name, x in mine.items():
            columns.setdefault(name, []).append(x)
    return {"active_C": torch.ones(clients, dtype=torch.bool), **{n: torch.stack(x) for n, x in columns.items()}}


def _student() -> TwoLayerTransformer:
    return TwoLayerTransformer(40, width=16, heads=2, classes=3, max_length=16)


def _relations_by_hand(teacher: Tensor, student: Tensor, heads: int) -> Tensor:
    """One row without padding: ``(T, H)`` and ``(T, E)``."""
    total = torch.zeros((), dtype=teacher.dtype)
    tokens = teacher.shape[0]
    for a in range(heads):
        x, y = (z[:, a * z.shape[1] // heads : (a + 1) * z.shape[1] // heads] for z in (teacher, student))
        for i in range(tokens):
            p = torch.stack([x[i] @ x[j] for j in range(tokens)]).div(math.sqrt(x.shape[1])).softmax(0)
            q = torch.stack([y[i] @ y[j] for j in range(tokens)]).div(math.sqrt(y.shape[1])).softmax(0)
            total = total + sum(p[j] * (p[j] / q[j]).log() for j in range(tokens))
    return total / (heads * tokens)


def test_relations_equal_loops_and_their_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    student = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    fast = relation_rows(teacher, student, mask, heads=3)
    slow = torch.stack([_relations_by_hand(teacher[b, :n], student[b, :n], 3) for b, n in enumerate((5, 3))])
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (fast, slow)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_relations_know_neither_the_order_of_heads_nor_their_axes() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(1, 6, 24, generator=generator, dtype=torch.float64)
    student = torch.randn(1, 6, 12, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 6, dtype=torch.int64)
    plain = relation_rows(teacher, student, mask, heads=3)
    order = torch.tensor([2, 0, 1])
    swapped = [torch.unflatten(x, -1, (3, -1))[:, :, order].flatten(2) for x in (teacher, student)]
    torch.testing.assert_close(relation_rows(swapped[0], swapped[1], mask, heads=3), plain)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    turned = (torch.unflatten(student, -1, (3, -1)) @ turn).flatten(2)
    torch.testing.assert_close(relation_rows(teacher, turned, mask, heads=3), plain)
    assert float(relation_rows(teacher, teacher, mask, heads=3).abs().max()) < 1e-12
    assert float(plain) > 0.01


def test_hidden_rows_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 4, 3, generator=generator)
    weight = torch.randn(6, 3, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = hidden_rows(teacher, student, weight, mask)
    for b, n in enumerate((4, 2)):
        expected = torch.nn.functional.mse_loss(student[b, :n] @ weight.T, teacher[b, :n])
        torch.testing.assert_close(rows[b], expected)


def test_the_encoders_states_are_those_its_own_layers_compute(encoder: Any) -> None:
    batch = _batch(1)
    ids, mask = batch["input_ids_CBT"][0], batch["attention_mask_CBT"][0]
    caught: dict[str, Tensor] = {}
    hooks = [
        layer.attention.self.value.register_forward_hook(lambda _m, _i, out, at=i: caught.update({f"value.{at}": out}))
        for i, layer in enumerate(encoder.encoder.layer, 1)
    ]
    with torch.no_grad():
        last = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    for hook in hooks:
        hook.remove()
    states = EncoderStates(encoder)(ids, mask, ["hidden.3", "value.1", "value.3"])
    torch.testing.assert_close(states["hidden.3"], last)
    for name in ("value.1", "value.3"):
        torch.testing.assert_close(states[name], caught[name])


def test_the_whole_loss_adds_up_and_leaves_padding_out(encoder: Any) -> None:
    student, layers = _student(), Layers({0: 0, 2: 3}, relation={1: 2}, kinds=("key", "value"), hidden_weight=0.5)
    words = torch.randint(40, (40,), generator=torch.Generator().manual_seed(5))
    model = Layerwise(student, EncoderStates(encoder), layers, words_V=words)
    params = model.init(1)
    assert {n for n in params if n.startswith("project.")} == {"project.0.weight", "project.2.weight"}
    batch = _batch(1)
    loss_C, count_C = model.loss({n: x[None] for n, x in params.items()}, {}, batch)
    ids, mask = batch["input_ids_CBT"][0], batch["attention_mask_CBT"][0]
    expected = torch.zeros(())
    for b in range(2):  # the last row is padding
        n = int(mask[b].sum())
        one = torch.ones(1, n, dtype=torch.int64)
        with torch.no_grad():
            hidden = encoder(input_ids=ids[b : b + 1, :n], output_hidden_states=True).hidden_states
        mine = student.states(params, words[ids[b : b + 1, :n]], one)
        for s, t in ((0, 0), (2, 3)):
            guess = mine[f"hidden.{s}"] @ params[f"project.{s}.weight"].T
            expected = expected + 0.5 * torch.nn.functional.mse_loss(guess, hidden[t])
        for kind in ("key", "value"):
            theirs = getattr(encoder.encoder.layer[1].attention.self, kind)(hidden[1])[0]
            expected = expected + _relations_by_hand(theirs.double(), mine[f"{kind}.1"][0].double(), 4).float()
        if b == 0:
            expected = expected - mine["logits"].log_softmax(-1)[0, 1]
    torch.testing.assert_close(loss_C[0], expected, rtol=2e-4, atol=1e-5)
    assert count_C.tolist() == [2]
    logits = model.logits({n: x[None] for n, x in params.items()}, {}, batch)
    plain = student.logits({n: x[None] for n, x in params.items()}, {}, {**batch, "input_ids_CBT": words[ids][None]})
    assert torch.equal(logits, plain)


def test_bits_do_not_depend_on_company_and_stacked_is_close(encoder: Any) -> None:
    layers = Layers({2: 3}, relation={2: 3})
    model, batch = Layerwise(_student(), EncoderStates(encoder), layers), _batch(4)
    batch["active_C"][2] = False
    starts = [model.init(c) for c in range(4)]

    def run(first: int, last: int) -> list[Tensor]:
        params_C = {name: x.requires_grad_() for name, x in stack(starts[first:last]).items()}
        loss_C, count_C = model.loss(params_C, {}, {name: x[first:last] for name, x in batch.items()})
        return [loss_C.detach(), count_C, *torch.autograd.grad(loss_C.sum(), list(params_C.values()))]

    together = run(0, 4)
    for c in range(4):
        for whole, one in zip(together, run(c, c + 1), strict=True):
            assert whole[c].numpy().tobytes() == one[0].numpy().tobytes()
    assert all(not bool(x[2].any()) for x in together)
    model.reference = False
    for slow, fast in zip(together, run(0, 4), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(encoder: Any) -> None:
    with pytest.raises(LichenError, match="no pair"):
        Layers()
    with pytest.raises(LichenError, match="below 1"):
        Layers(relation={0: 1})
    with pytest.raises(LichenError, match=r"layers\.kinds"):
        Layers({1: 1}, kinds=("mood",))  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="past the student's 2"):
        Layerwise(_student(), EncoderStates(encoder), Layers({3: 1}))
    with pytest.raises(LichenError, match="a divisor of 8"):
        Layerwise(_student(), EncoderStates(encoder), Layers(relation={2: 3}, heads=3))
    with pytest.raises(LichenError, match="cannot be seen"):
        EncoderStates(torch.nn.Linear(2, 2).eval().requires_grad_(False))
    assert renumbering({3: 1}, unknown=0, vocabulary=5).tolist() == [0, 0, 0, 1, 0]
