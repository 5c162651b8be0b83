"""Noise once on an exact sum, and what is drawn from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.server.knowledge.votes import Votes, concentration, most_voted, resample, vote_probabilities
from support.flat import closed as closed_flat


def histogram(votes_CM: Tensor, *, bits: int = 0) -> Message:
    clients = votes_CM.shape[0]
    return Message(
        group=f"votes/{votes_CM.shape[1]}/{bits}",
        client_C=torch.arange(clients),
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={"votes": votes_CM.int()},
        weight_C=torch.ones(clients, dtype=torch.float64),
    )


def closed(member: Votes, *messages: Message) -> Tensor:
    total = member.zero()
    for message in messages:
        total = member.add(total, message)
    return closed_flat(member, total, {})[0]["votes"]


@given(seed=st.integers(0, 2**20), clients=st.integers(1, 9), bits=st.sampled_from([0, 10]))
def test_without_noise_it_is_the_sum(seed: int, clients: int, bits: int) -> None:
    votes_CM = torch.randint(0, 99, (clients, 5), generator=torch.Generator().manual_seed(seed))
    got = closed(Votes(bits=bits), histogram(votes_CM, bits=bits))
    assert torch.equal(got, votes_CM.double().sum(0) / 2**bits)


def test_many_votes_fit_in_their_finest_unit() -> None:
    """Those of 9,000 rows in units of 2^-16 are summed exactly, not refused."""
    votes_CM = torch.full((3, 2), 3000 * 2**16)
    assert closed(Votes(bits=16), histogram(votes_CM, bits=16)).tolist() == [9000.0, 9000.0]


def test_noise_comes_once_whatever_the_number_of_clients() -> None:
    few, many = (histogram(torch.ones(n, 4000)) for n in (1, 64))
    for message, n in ((few, 1), (many, 64)):
        noise = closed(Votes(5.0, seed=3), message) - n
        assert float(noise.std()) == pytest.approx(5.0, rel=0.05)
        assert abs(float(noise.mean())) < 0.4
    assert torch.equal(closed(Votes(5.0, seed=3), few) - 1, closed(Votes(5.0, seed=3), many) - 64)
    assert not torch.equal(closed(Votes(5.0, seed=3), few), closed(Votes(5.0, seed=4), few))


def test_nobody_voting_is_noisy_too_but_no_sum() -> None:
    assert float(Votes(5.0, seed=1).noisy(torch.zeros(900)).std()) == pytest.approx(5.0, rel=0.1)
    with pytest.raises(LichenError, match="no client"):
        closed_flat(Votes(), Votes().zero(), {})


@given(seed=st.integers(0, 2**20), threshold=st.sampled_from([0.0, 2.0, 99.0]))
def test_chances_are_chances_of_every_label(seed: int, threshold: float) -> None:
    g = torch.Generator().manual_seed(seed)
    votes_M, label_M = torch.randn(12, generator=g, dtype=torch.float64) * 4, torch.arange(12) % 3
    chance_M = vote_probabilities(votes_M, label_M, threshold=threshold)
    for label in range(3):
        mine, voted = chance_M[label_M == label], votes_M[label_M == label]
        assert float(mine.sum()) == pytest.approx(1)
        if bool((voted > threshold).any()):
            assert bool((mine[voted <= threshold] == 0).all())
            assert torch.allclose(mine * (voted - threshold).clamp(min=0).sum(), (voted - threshold).clamp(min=0))
        else:
            assert torch.allclose(mine, torch.full_like(mine, 0.25))


def test_draws_follow_the_chances_and_never_fall_on_none() -> None:
    label_M = torch.tensor([0, 1, 0, 1, 0])
    chance_M = torch.tensor([0.2, 1.0, 0.0, 0.0, 0.8], dtype=torch.float64)
    drawn = resample(chance_M, label_M, {0: 4000, 1: 7}, seed=2)
    assert torch.equal(drawn, resample(chance_M, label_M, {1: 7, 0: 4000}, seed=2))
    assert drawn[4000:].tolist() == [1] * 7
    counts = drawn[:4000].bincount(minlength=5)
    assert counts[2] == 0
    assert float(counts[0]) / 4000 == pytest.approx(0.2, abs=0.025)
    assert not torch.equal(drawn, resample(chance_M, label_M, {0: 4000, 1: 7}, seed=3))


@given(seed=st.integers(0, 2**20), keep=st.integers(1, 4))
def test_rank_is_what_sorting_gives(seed: int, keep: int) -> None:
    g = torch.Generator().manual_seed(seed)
    votes, labels = torch.randint(0, 3, (12,), generator=g).double(), torch.arange(12) % 3
    expected = [
        i for label in range(3) for i in sorted((i for i in range(label, 12, 3)), key=lambda i: (-votes[i], i))[:keep]
    ]
    assert most_voted(votes, labels, dict.fromkeys(range(3), keep)).tolist() == expected


def test_concentration_runs_from_even_to_one() -> None:
    assert concentration(torch.ones(8)) == pytest.approx(1 / 8)
    assert concentration(torch.tensor([0.0, 5.0, -3.0])) == 1
    assert concentration(-torch.ones(3)) == 0


def test_refuses_what_is_no_histogram() -> None:
    member = Votes(bits=10)
    with pytest.raises(LichenError, match="units"):
        member.add(member.zero(), histogram(torch.ones(2, 3)))
    plain = Votes()
    floats = histogram(torch.ones(2, 3))
    floats.tensors["votes"] = floats.tensors["votes"].double()
    with pytest.raises(LichenError, match="whole numbers"):
        plain.add(plain.zero(), floats)
    with pytest.raises(LichenError, match="groups"):
        plain.add(plain.add(plain.zero(), histogram(torch.ones(2, 3))), histogram(torch.ones(2, 4)))
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(LichenError, match="noise"):
            Votes(bad)
    with pytest.raises(LichenError, match="no candidate has label 4"):
        resample(torch.ones(1), torch.zeros(1, dtype=torch.int64), {4: 1}, 0)
    with pytest.raises(LichenError, match="cannot be chosen"):
        most_voted(torch.ones(1), torch.zeros(1, dtype=torch.int64), {0: 2})
