"""Trees: algebra, stacking, digests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

LEAVES = hnp.arrays("float32", (2, 3), elements=st.floats(-8, 8, width=32)).map(torch.from_numpy)
TREES = st.fixed_dictionaries({"q.lora_A": LEAVES, "patch.q": LEAVES, "b": LEAVES})


def equal(a: Any, b: Any) -> Any:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@given(st.lists(TREES, min_size=1, max_size=4))
def test_stack_take_concatenate(several: Any) -> None:
    stacked = trees.stack(several)
    assert all(equal(trees.take(stacked, c), tree) for c, tree in enumerate(several))
    singles = [trees.stack([tree]) for tree in several]
    assert equal(trees.concatenate(singles), stacked)
    assert trees.nbytes(stacked) == len(several) * trees.nbytes(several[0])


@given(TREES, TREES)
def test_algebra(a: Any, b: Any) -> None:
    assert equal(trees.sub(a, a), trees.zeros_like(a))
    assert equal(trees.add(a, b), trees.add(b, a))
    assert equal(trees.scale(a, 2.0), trees.add(a, a))


@given(TREES)
def test_split_join(tree: Tree) -> None:
    inside, rest = trees.split(tree, "patch.")
    assert set(inside) == {"q"}
    assert equal(trees.join("patch.", inside, rest), tree)


@given(TREES, st.integers(1, 5))
def test_norm_has_the_same_bits_in_any_company(tree: Tree, company: Any) -> None:
    alone = trees.norm_C(trees.broadcast(tree, 1))
    assert torch.equal(trees.norm_C(trees.broadcast(tree, company)), alone.repeat(company))
    flat = torch.cat([x.flatten() for x in tree.values()])
    torch.testing.assert_close(alone[0], flat.norm())


@given(TREES)
def test_digest_sees_every_change(tree: Tree) -> None:
    other = {**tree, "b": tree["b"] + 1}
    assert trees.digest(tree) == trees.digest(dict(reversed(tree.items())))
    assert trees.digest(tree) != trees.digest(other)
    assert trees.digest(tree) != trees.digest({**tree, "b": tree["b"].reshape(3, 2)})


def test_other_names_are_refused() -> None:
    with pytest.raises(LichenError, match="names"):
        trees.add({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(LichenError, match="'a' has shape"):
        trees.check_same({"a": torch.ones(2)}, {"a": torch.ones(3)}, where="here")
    with pytest.raises(LichenError, match="missing"):
        trees.check_same({}, {"a": torch.ones(3)}, where="here")
