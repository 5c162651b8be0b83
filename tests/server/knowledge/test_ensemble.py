"""The ensemble against the formulas of its papers, in plain float64.

Legend: C clients, N rows, K classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.models.losses import soft_loss
from lichen.server.knowledge.ensemble import Ensemble, as_answers
from support.flat import closed

N, K = 7, 4
some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**20)


def message(seed: int, clients: int = 3, **more: Any) -> Message:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(clients, N, K, generator=g)
    return Message(
        group=f"answers/{N}/{K}",
        client_C=torch.arange(clients),
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={"logits": logits.half(), **more},
        weight_C=torch.randint(1, 9, (clients,), generator=g).double(),
    )


def said(member: Ensemble, *messages: Message) -> torch.Tensor:
    total = member.zero()
    for one in messages:
        total = member.add(total, one)
    return member.probabilities(total)


@given(seed=seeds)
@some
def test_is_the_mean_of_probabilities_or_the_softmax_of_mean_logits(seed: int) -> None:
    one = message(seed)
    logits_CNK, share_C = one.tensors["logits"].double(), one.weight_C / one.weight_C.sum()
    near = {"rtol": 0, "atol": 1e-7}
    torch.testing.assert_close(said(Ensemble(classes=K), one), logits_CNK.softmax(-1).mean(0), **near)
    torch.testing.assert_close(said(Ensemble("logits", classes=K), one), logits_CNK.mean(0).softmax(-1), **near)
    by = said(Ensemble(classes=K, weigh="examples"), one)
    torch.testing.assert_close(by, torch.einsum("c,cnk->nk", share_C, logits_CNK.softmax(-1)), **near)
    sharp = said(Ensemble(classes=K, sharpen=0.1), one)
    torch.testing.assert_close(sharp, (logits_CNK.softmax(-1).mean(0) / 0.1).softmax(-1), rtol=0, atol=1e-6)


@given(seed=seeds)
@some
def test_confidence_and_class_counts_weigh_rows_and_classes(seed: int) -> None:
    p_CNK = message(seed).tensors["logits"].double().softmax(-1)
    sure_CN = 1 - torch.special.entr(p_CNK).sum(-1) / torch.log(torch.tensor(float(K)).double())
    want = torch.einsum("cn,cnk->nk", sure_CN / sure_CN.sum(0), p_CNK)
    got = said(Ensemble(classes=K, weigh="confidence"), message(seed))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    n_CK = torch.tensor([[3, 0, 1, 0], [1, 0, 0, 2], [4, 5, 0, 1]]).double()
    want = torch.einsum("ck,cnk->nk", n_CK / n_CK.sum(0), p_CNK)
    got = said(Ensemble(classes=K, weigh="classes"), message(seed, n=n_CK))
    torch.testing.assert_close(got, want / want.sum(1, keepdim=True), rtol=0, atol=1e-6)


def test_a_class_nobody_has_seen_is_never_answered() -> None:
    n_CK = torch.tensor([[3.0, 0, 1, 1]] * 3)
    for mean in ("prob", "logits"):
        got = said(Ensemble(mean, classes=K, weigh="classes"), message(0, n=n_CK))  # type: ignore[arg-type]
        assert not got[:, 1].any()
        torch.testing.assert_close(got.sum(1), torch.ones(N).double())


def test_rows_nobody_is_sure_of_keep_their_even_mean() -> None:
    flat = message(0)
    flat.tensors["logits"].zero_()
    torch.testing.assert_close(
        said(Ensemble(classes=K, weigh="confidence"), flat), torch.full((N, K), 0.25).double(), rtol=0, atol=1e-4
    )


@given(seed=seeds)
@some
def test_a_shift_of_a_rows_logits_is_forgotten(seed: int) -> None:
    one, other = message(seed), message(seed)
    other.tensors["logits"] = other.tensors["logits"].float() + torch.randint(-5, 5, (3, N, 1)).float()
    one.tensors["logits"] = one.tensors["logits"].float()
    for mean in ("prob", "logits"):
        a, b = (said(Ensemble(mean, classes=K), x) for x in (one, other))  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_top_answers_spread_what_they_leave_and_skip_the_unknown() -> None:
    told = Message(
        group="answers/4/2",
        client_C=torch.tensor([0]),
        version_C=torch.tensor([0]),
        tensors={
            "index": torch.tensor([[[1, 3], [2, -1]]], dtype=torch.int8),
            "prob": torch.tensor([[[0.5, 0.25], [0.4, 0.0]]]).half(),
        },
        weight_C=torch.ones(1).double(),
    )
    want = torch.tensor([[0.125, 0.5, 0.125, 0.25], [0.2, 0.2, 0.4, 0.2]]).double()
    torch.testing.assert_close(said(Ensemble(classes=4), told), want, rtol=0, atol=1e-3)


@given(seed=seeds, keep=st.integers(1, K))
@some
def test_closes_into_what_students_learn_from(seed: int, keep: int) -> None:
    member = Ensemble(classes=K, keep=keep)
    total = member.add(member.zero(), message(seed))
    change, metrics = closed(member, total, {})
    prob_Nk, index_Nk = change["answers.prob"], change["answers.index"]
    assert (prob_Nk.shape, prob_Nk.dtype, index_Nk.dtype) == ((N, keep), torch.float16, torch.int8)
    p_NK = member.probabilities(total)
    torch.testing.assert_close(p_NK.gather(1, index_Nk.long()), prob_Nk.double(), rtol=0, atol=1e-3)
    assert bool((prob_Nk[:, 1:] <= prob_Nk[:, :-1]).all())
    assert metrics["clients"] == 3
    assert metrics["entropy"] == pytest.approx(float(torch.special.entr(p_NK).sum(-1).mean()))
    if keep == K:
        logits_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
        loss, count = soft_loss(logits_NK, torch.arange(N), prob_Nk, index_Nk)
        assert count == N
        assert float(loss) == pytest.approx(-float((p_NK * logits_NK.double().log_softmax(-1)).sum()), rel=2e-3)


def test_many_classes_need_wider_positions() -> None:
    assert as_answers(torch.rand(2, 300))["answers.index"].dtype == torch.int16


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"mean": "median"}, "no mean"),
        ({"weigh": "luck"}, "cannot weigh"),
        ({"sharpen": 0.0}, "no temperature"),
        ({"classes": 1}, "1 classes"),
        ({"keep": 9}, "9 of 4"),
    ],
)
def test_refuses_nonsense(more: dict[str, Any], fault: str) -> None:
    with pytest.raises(LichenError, match=fault):
        Ensemble(**{"classes": K, **more})


def test_refuses_messages_that_are_no_answers_to_the_same_rows() -> None:
    member = Ensemble(classes=K)
    with pytest.raises(LichenError, match="no client answered"):
        closed(member, member.zero(), {})
    with pytest.raises(LichenError, match="class counts"):
        said(Ensemble(classes=K, weigh="classes"), message(0))
    with pytest.raises(LichenError, match="shape"):
        said(Ensemble(classes=5), message(0))
    broken = message(0)
    broken.tensors["logits"][1, 0, 0] = torch.nan
    with pytest.raises(LichenError, match="client 1"):
        said(member, broken)
    far = message(0, clients=1)
    far.tensors.clear()
    far.tensors.update(index=torch.full((1, N, 1), K), prob=torch.ones(1, N, 1))
    with pytest.raises(LichenError, match=r"outside 0\.\.3"):
        said(member, far)
