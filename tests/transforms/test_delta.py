"""Steps of a view: what changes its shape goes whole, what is lost comes later, nothing else is sent."""

from __future__ import annotations

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.transforms.codec import Chain
from lichen.transforms.delta import apply_delta, encode_delta, snapshot_name
from lichen.transforms.parse import parse_codecs

CHAIN = parse_codecs(["topk:4/32", "int4"])


def tree(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(8, 9, generator=generator), "b": torch.randn(5, generator=generator), **more}


def encode(shared: Tree, snapshot: Tree, chain: Chain, seed: int) -> Tree:
    return encode_delta(Shared.of_flat(shared), Shared.of_flat(snapshot), chain, seed)


def stepped(snapshot: Tree, payload: Tree, chain: Chain) -> Tree:
    return apply_delta(Shared.of_flat(snapshot), payload, chain).flat()


def named(snapshot: Tree) -> str:
    return snapshot_name(Shared.of_flat(snapshot))


def test_without_codecs_a_step_leads_to_the_tensors_themselves() -> None:
    before, after = tree(0, count=torch.tensor([3])), tree(1, count=torch.tensor([4]))
    payload = encode(after, before, Chain(), 0)
    assert payload.keys() == {"wire", "whole.count"}
    there = stepped(before, payload, Chain())
    assert all(torch.allclose(there[name], after[name], atol=1e-6) for name in after)
    assert int(there["count"][0]) == 4


def test_what_is_new_or_of_another_shape_goes_whole_and_what_is_gone_goes() -> None:
    answers = torch.randn(3, 2)
    before = tree(0, **{"patch.l.left": torch.randn(4, 1), "answers.a": answers})
    after = tree(1, **{"patch.l.left": torch.randn(4, 2), "answers.a": answers, "new": torch.randn(2)})
    payload = encode(after, before, CHAIN, 0)
    assert payload.keys() == {"wire", "whole.patch.l.left", "whole.new"}
    there = stepped(before, payload, CHAIN)
    assert there.keys() == after.keys()
    assert all(torch.equal(there[n], after[n]) for n in ("patch.l.left", "new", "answers.a"))
    dense = tree(2, **{"patch.l.dense": torch.randn(4, 4), "answers.a": answers})
    payload = encode(dense, there, CHAIN, 0)
    assert {"gone.patch.l.left", "gone.new", "whole.patch.l.dense"} < payload.keys()
    assert stepped(there, payload, CHAIN).keys() == dense.keys()


def test_what_stands_still_is_not_sent() -> None:
    snapshot, target, plain = tree(0), tree(1), parse_codecs(["float32"])
    target["b"] = snapshot["b"].clone()
    half, whole = (encode(t, snapshot, plain, 0) for t in (target, tree(1)))
    assert half["still"].tolist() == [1, 0]
    assert (half["wire"].numel(), whole["wire"].numel()) == (4 * 72, 4 * 77)
    there = stepped(snapshot, half, plain)
    assert torch.equal(there["b"], snapshot["b"])
    assert not torch.equal(there["w"], snapshot["w"])
    resting = encode(snapshot, snapshot, plain, 0)
    assert resting.keys() == {"still"}
    assert all(torch.equal(x, snapshot[n]) for n, x in stepped(snapshot, resting, plain).items())
    with pytest.raises(LichenError, match="marks other tensors"):
        stepped({"b": snapshot["b"]}, half, plain)


def test_what_one_step_loses_a_later_one_brings() -> None:
    snapshot, target = tree(0), tree(1)
    far = [sum(float((target[n] - snapshot[n]).square().sum()) for n in snapshot)]
    for seed in range(60):
        snapshot = stepped(snapshot, encode(target, snapshot, CHAIN, seed), CHAIN)
        far.append(sum(float((target[n] - snapshot[n]).square().sum()) for n in snapshot))
    assert far[0] > 50
    assert far[-1] < 1e-6 * far[0]


def test_dtypes_stay_and_names_tell_views_apart() -> None:
    snapshot, target = ({n: x.bfloat16() for n, x in tree(seed).items()} for seed in (0, 1))
    there = stepped(snapshot, encode(target, snapshot, Chain(), 0), Chain())
    assert all(x.dtype == torch.bfloat16 for x in there.values())
    assert named(there) == named(dict(reversed(there.items()))) != named(snapshot)


def test_a_step_that_does_not_fit_is_refused() -> None:
    snapshot = tree(0)
    payload = encode(tree(1), snapshot, CHAIN, 0)
    with pytest.raises(LichenError, match="lacks its coded row"):
        stepped(snapshot, {}, CHAIN)
    with pytest.raises(LichenError, match="bytes a client"):
        stepped({"b": snapshot["b"]}, payload, CHAIN)
