"""Losses of preferences and their gradients are TRL's own, and what they say of rows follows their papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.models.full import FullCausal
from lichen.models.preference.kinds import PREFERENCES
from lichen.models.preference.losses import PreferenceLoss, ScoredRows
from lichen.models.preference.model import PreferenceModel, row_logprobs
from lichen.models.preference.objective import BINS, _signed_bins, area
from support.tiny_preferences import NAMES, by_hand, moved, rows_of, weights_of

TRL: dict[str, Any] = json.loads(Path(__file__).with_name("preference_vectors.json").read_text(encoding="utf-8"))
KINDS = tuple(TRL["beta"])


def batch_of(kind: str) -> dict[str, Tensor]:
    """The rows of one client."""
    first, second, good = rows_of(kind)
    names = (("input_ids", "ids"), ("attention_mask", "mask"), ("labels", "labels"))
    return {
        "active_C": torch.ones(1, dtype=torch.bool),
        "index_CB": torch.arange(4)[None],
        "good_CB": torch.tensor(good).long()[None] if kind == "kto" else torch.ones(1, 4, dtype=torch.int64),
        **{f"{name}_CBT": first[name][None] for name, _ in names},
        **{f"second_{short}_CBT": second[name][None] for name, short in names},
    }


def with_reference(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model = FullCausal(by_hand(name), name=name)
    logs_CB, _ = row_logprobs(model, {key: x[None] for key, x in model.init(0).items()}, {}, batch)
    return {**batch, "reference_CB2": torch.stack(logs_CB.chunk(2, 1), -1)}


def learned(name: str, kind: str, **more: float) -> tuple[PreferenceModel, dict[str, Tensor], dict[str, Tensor]]:
    """``(model, its moved tensors, a batch)``."""
    model = FullCausal(by_hand(name), name=name)
    loss = PreferenceLoss(kind, beta=TRL["beta"][kind], gamma=0.7, bad_weight=1.5, **more)
    weights = moved(weights_of(by_hand(name)))
    params_C = {key: weights[key][None].requires_grad_() for key in model.init(0)}
    return PreferenceModel(model, loss, rated=kind == "kto"), params_C, with_reference(name, batch_of(kind))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_trl(name: str, kind: str) -> None:
    model, params_C, batch = learned(name, kind)
    loss_C, count_C = model.loss(params_C, {}, batch)
    mean = loss_C[0] / count_C[0]
    known = TRL["losses"][f"{name} {kind}"]
    assert int(count_C[0]) == 4
    assert float(mean.detach()) == pytest.approx(known["loss"], rel=1e-5)
    grads = torch.autograd.grad(mean, list(params_C.values()))
    norms = {key: float(x.double().norm()) for key, x in zip(params_C, grads, strict=True)}
    seen = 0
    for key, norm in known["norms"].items():
        if key in norms:
            assert norms[key] == pytest.approx(norm, rel=1e-5, abs=1e-6), key
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("kind", [kind for kind in PREFERENCES if kind != "kto"])
def test_rows_add_up_to_the_loss(kind: str) -> None:
    inner = FullCausal(by_hand("llama"), name="llama")
    model = PreferenceModel(inner, PreferenceLoss(kind), rated=False)
    params_C = {key: x[None] for key, x in moved(inner.init(0)).items()}
    batch = with_reference("llama", batch_of("dpo"))
    batch["index_CB"] = torch.tensor([[3, -1, 0, 1]])  # a padding row says nothing
    loss_C, count_C = model.loss(params_C, {}, batch)
    loss_CB, count_CB = model.losses(params_C, {}, batch)
    assert count_CB.tolist() == [[1, 0, 1, 1]]
    assert int(count_C) == 3
    assert torch.allclose(loss_CB.sum(1), loss_C, rtol=1e-6)
    assert float(loss_CB[0, 1]) == 0


def test_a_loss_of_whole_batches_is_no_sum_over_rows() -> None:
    model, params_C, batch = learned("llama", "kto")
    with pytest.raises(LichenError, match=r"prefer\.kind: a loss of whole batches"):
        model.losses(params_C, {}, batch)
    with pytest.raises(LichenError, match="without the reference's scores"):
        model.loss(params_C, {}, batch_of("kto"))
    with pytest.raises(LichenError, match="there is no loss 'ppo'"):
        PreferenceLoss("ppo")


def test_dpo_without_sharpness_has_no_pull() -> None:
    """beta towards 0: the loss is log 2 of every pair, and the gradient vanishes with beta."""
    norms = []
    for beta in (1e-1, 1e-3, 1e-5):
        inner = FullCausal(by_hand("llama"), name="llama")
        model = PreferenceModel(inner, PreferenceLoss("dpo", beta=beta), rated=False)
        params_C = {key: x[None].requires_grad_() for key, x in moved(inner.init(0)).items()}
        loss_C, count_C = model.loss(params_C, {}, with_reference("llama", batch_of("dpo")))
        grads = torch.autograd.grad(loss_C.sum(), list(params_C.values()))
        norms.append(float(torch.cat([x.flatten() for x in grads]).norm()))
    assert float(loss_C[0].detach() / count_C[0]) == pytest.approx(0.6931472, abs=1e-4)
    assert norms[0] > 50 * norms[1] > 50 * 50 * norms[2] > 0


def rows(first: list[float], second: list[float], good: list[bool]) -> ScoredRows:
    x_R, y_R = torch.tensor(first), torch.tensor(second)
    five_R = torch.full((len(first),), 5)
    return ScoredRows(x_R, five_R, y_R, five_R, torch.zeros(len(first), 2), torch.tensor(good))


def test_the_mean_of_mismatched_rows_is_never_below_zero_and_has_no_gradient() -> None:
    loss = PreferenceLoss("kto", beta=1.0)
    low, high = rows([0.0] * 4, [-1.0, -2, -3, -4], [True] * 4), rows([0.0] * 4, [1.0, 2, 3, 4], [True] * 4)
    assert float(loss.shift(low)) == 0
    assert float(loss.shift(high)) == 2.5
    assert not loss.shift(high._replace(second_R=high.second_R.requires_grad_())).requires_grad
    assert loss.losses_R(high).tolist() == pytest.approx([1 - torch.sigmoid(torch.tensor(-2.5)).item()] * 4)
    nobody = high._replace(second_tokens_R=torch.zeros(4, dtype=torch.int64))
    assert float(loss.shift(nobody)) == 0


def test_the_area_from_bins_is_that_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    good_R, bad_R = (torch.randn(n, generator=generator) + shift for n, shift in ((60, 0.5), (40, 0.0)))
    slow = (good_R[:, None] > bad_R).double().mean()
    counts = [torch.bincount(_signed_bins(x_R), minlength=BINS).double() for x_R in (good_R, bad_R)]
    assert float(area(*counts)) == pytest.approx(float(slow), abs=0.01)
    assert 0.55 < float(slow) < 0.75
    assert bool(area(counts[0], torch.zeros(BINS)).isnan())
    assert _signed_bins(torch.tensor([-1e-6, 0.0, 1e-6])).tolist() == [BINS // 2] * 3
