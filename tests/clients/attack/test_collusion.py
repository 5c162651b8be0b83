"""Colluding lies against loops over numbers, as the papers have them."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lichen.clients.attack.collusion import Alie, Deviation, InnerProduct, MinMax, quantile
from lichen.core.tree import Tree

SHAPES = {"b": (3,), "a": (2, 4)}


def honest(count: int = 6, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.normal(0.3, 1, (count, *shape))).float() for name, shape in SHAPES.items()}


def flat(tree: Tree) -> np.ndarray:
    """``(H, D)``, or ``(D,)`` of one without client axis."""
    first = tree["b"].dim() == 1
    parts = [
        tree[name].double().numpy().reshape(-1 if first else len(tree[name]), *() if first else (-1,))
        for name in SHAPES
    ]
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize(("clients", "liars"), [(50, 12), (20, 5), (11, 5), (10, 3), (7, 3)])
def test_alie_takes_its_quantile_from_how_many_lie(clients: int, liars: int) -> None:
    supporters = math.floor(clients / 2 + 1) - liars
    z = NormalDist().inv_cdf((clients - liars - supporters) / (clients - liars))
    assert quantile(clients, liars) == pytest.approx(z)
    tree = honest(clients - liars)
    x_HD = flat(tree)
    wanted = [
        x_HD[:, d].mean() - max(z, 0) * math.sqrt(((x_HD[:, d] - x_HD[:, d].mean()) ** 2).mean()) for d in range(11)
    ]
    np.testing.assert_allclose(flat(Alie().crafted(tree, liars)), wanted, atol=1e-6)


def test_more_liars_go_further_and_few_of_them_nowhere() -> None:
    values = [quantile(20, liars) for liars in range(1, 11)]
    assert values == sorted(values)
    assert quantile(10, 1) < 0
    assert all(math.isfinite(quantile(10, liars)) for liars in range(1, 9))
    tree = honest(9)
    np.testing.assert_allclose(flat(Alie().crafted(tree, 1)), flat(tree).mean(0), atol=1e-6)
    wanted = flat(tree).mean(0) - 1.5 * flat(tree).std(0)
    np.testing.assert_allclose(flat(Alie(1.5).crafted(tree, 1)), wanted, atol=1e-6)


def test_ipm_goes_against_the_mean() -> None:
    tree = honest()
    np.testing.assert_allclose(flat(InnerProduct(0.5).crafted(tree, 2)), -0.5 * flat(tree).mean(0), atol=1e-6)


def bisected(x_HD: np.ndarray, deviation: Deviation) -> np.ndarray:
    """The paper's search: γ between what is hidden and what is not, halved again and again."""
    mean = x_HD.mean(0)
    along = {"std": -x_HD.std(0), "unit": -mean / np.linalg.norm(mean), "sign": -np.sign(mean)}[deviation]
    most = max(np.linalg.norm(a - b) for a in x_HD for b in x_HD)
    low, high = 0.0, 1e3
    for _ in range(200):
        gamma = (low + high) / 2
        hidden = max(np.linalg.norm(mean + gamma * along - x) for x in x_HD) <= most
        low, high = (gamma, high) if hidden else (low, gamma)
    return mean + low * along


@pytest.mark.parametrize("deviation", ["std", "unit", "sign"])
@pytest.mark.parametrize("seed", range(4))
def test_min_max_is_where_halving_ends(deviation: Deviation, seed: int) -> None:
    tree = honest(5, seed)
    x_HD, lie = flat(tree), flat(MinMax(deviation).crafted(tree, 2))
    np.testing.assert_allclose(lie, bisected(x_HD, deviation), atol=1e-5)
    most = max(np.linalg.norm(a - b) for a in x_HD for b in x_HD)
    assert max(np.linalg.norm(lie - x) for x in x_HD) == pytest.approx(most, rel=1e-5)


@pytest.mark.parametrize("collusion", [Alie(), Alie(2.0), MinMax("std"), MinMax("unit"), MinMax("sign")])
def test_clients_that_are_alike_or_one_alone_leave_nothing_to_hide_behind(collusion: Alie | MinMax) -> None:
    for count in (1, 4):
        tree = {name: x[:1].expand(count, *x.shape[1:]) for name, x in honest().items()}
        np.testing.assert_allclose(flat(collusion.crafted(tree, 2)), flat(tree)[0], atol=1e-6)
