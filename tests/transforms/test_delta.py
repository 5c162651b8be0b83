"""Steps of a view: what changes its shape goes whole, what is lost comes later, nothing else is sent."""

from __future__ import annotations

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.transforms.codec import Chain
from lichen.transforms.delta import encode_step, take_step, view_name
from lichen.transforms.parse import chain_of

CHAIN = chain_of(["topk:4/32", "int4"])


def tree(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(8, 9, generator=generator), "b": torch.randn(5, generator=generator), **more}


def test_without_codecs_a_step_leads_to_the_tensors_themselves() -> None:
    before, after = tree(0, count=torch.tensor([3])), tree(1, count=torch.tensor([4]))
    payload = encode_step(after, before, Chain(), 0)
    assert payload.keys() == {"wire", "whole.count"}
    there = take_step(before, payload, Chain())
    assert all(torch.allclose(there[name], after[name], atol=1e-6) for name in after)
    assert int(there["count"][0]) == 4


def test_what_is_new_or_of_another_shape_goes_whole_and_what_is_gone_goes() -> None:
    answers = torch.randn(3, 2)
    before = tree(0, **{"patch.l.left": torch.randn(4, 1), "answers.a": answers})
    after = tree(1, **{"patch.l.left": torch.randn(4, 2), "answers.a": answers, "new": torch.randn(2)})
    payload = encode_step(after, before, CHAIN, 0)
    assert payload.keys() == {"wire", "whole.patch.l.left", "whole.new"}
    there = take_step(before, payload, CHAIN)
    assert there.keys() == after.keys()
    assert all(torch.equal(there[n], after[n]) for n in ("patch.l.left", "new", "answers.a"))
    dense = tree(2, **{"patch.l.dense": torch.randn(4, 4), "answers.a": answers})
    payload = encode_step(dense, there, CHAIN, 0)
    assert {"gone.patch.l.left", "gone.new", "whole.patch.l.dense"} < payload.keys()
    assert take_step(there, payload, CHAIN).keys() == dense.keys()


def test_what_stands_still_is_not_sent() -> None:
    view, target, plain = tree(0), tree(1), chain_of(["float32"])
    target["b"] = view["b"].clone()
    half, whole = (encode_step(t, view, plain, 0) for t in (target, tree(1)))
    assert half["still"].tolist() == [1, 0]
    assert (half["wire"].numel(), whole["wire"].numel()) == (4 * 72, 4 * 77)
    there = take_step(view, half, plain)
    assert torch.equal(there["b"], view["b"])
    assert not torch.equal(there["w"], view["w"])
    resting = encode_step(view, view, plain, 0)
    assert resting.keys() == {"still"}
    assert all(torch.equal(x, view[n]) for n, x in take_step(view, resting, plain).items())
    with pytest.raises(LichenError, match="marks other tensors"):
        take_step({"b": view["b"]}, half, plain)


def test_what_one_step_loses_a_later_one_brings() -> None:
    view, target = tree(0), tree(1)
    far = [sum(float((target[n] - view[n]).square().sum()) for n in view)]
    for seed in range(60):
        view = take_step(view, encode_step(target, view, CHAIN, seed), CHAIN)
        far.append(sum(float((target[n] - view[n]).square().sum()) for n in view))
    assert far[0] > 50
    assert far[-1] < 1e-6 * far[0]


def test_dtypes_stay_and_names_tell_views_apart() -> None:
    view, target = ({n: x.bfloat16() for n, x in tree(seed).items()} for seed in (0, 1))
    there = take_step(view, encode_step(target, view, Chain(), 0), Chain())
    assert all(x.dtype == torch.bfloat16 for x in there.values())
    assert view_name(there) == view_name(dict(reversed(there.items()))) != view_name(view)


def test_a_step_that_does_not_fit_is_refused() -> None:
    view = tree(0)
    payload = encode_step(tree(1), view, CHAIN, 0)
    with pytest.raises(LichenError, match="lacks its coded row"):
        take_step(view, {}, CHAIN)
    with pytest.raises(LichenError, match="bytes a client"):
        take_step({"b": view["b"]}, payload, CHAIN)
