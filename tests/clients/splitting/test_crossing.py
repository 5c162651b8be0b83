"""What crosses a cut is the rows' real tokens, and both sides make the same batch of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.clients.splitting.crossing import Rows, narrow
from lichen.clients.splitting.whole_norm import cut_to_norm, squares
from lichen.clients.training.optimize import clip_C
from lichen.core.errors import LichenError
from lichen.models.client_axis import one_client


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 4), st.integers(30, 40))
def test_flat_and_padded_undo_each_other_whatever_the_lengths(lengths: list[int], width: int, most: int) -> None:
    rows = Rows.of(torch.tensor(lengths, dtype=torch.int32), most)
    flat = torch.randn(1, sum(lengths), width, generator=torch.Generator().manual_seed(0))
    padded = rows.padded(flat)
    assert padded.shape == (1, len(lengths), rows.width, width)
    assert torch.equal(rows.flat(padded), flat)
    assert float(padded.abs().sum()) == pytest.approx(float(flat.abs().sum()))
    mask = rows.batch(flat)["attention_mask_CBT"]
    assert mask.sum(-1).tolist() == [[max(length, 1) for length in lengths]]


def batch_of(mask: list[list[int]], index: list[int]) -> dict[str, torch.Tensor]:
    mask_CBT = torch.tensor([mask])
    return {
        "active_C": torch.tensor([True]),
        "input_ids_CBT": torch.arange(mask_CBT.numel()).reshape(mask_CBT.shape),
        "attention_mask_CBT": mask_CBT,
        "labels_CBT": torch.full(mask_CBT.shape, -100),
        "index_CB": torch.tensor([index]),
    }


def test_a_batch_is_as_narrow_as_the_whole_models_own_call_and_padding_rows_do_not_cross() -> None:
    whole = batch_of([[1] * 9 + [0] * 11, [1] + [0] * 19], [4, -1])
    batch, rows = narrow(whole)
    assert rows.length_B.tolist() == [9, 0]
    assert rows.tokens == 9
    assert batch["labels_CBT"].shape == one_client(whole, 0)["labels_CBT"].shape == (1, 2, 16)
    again = Rows.of(rows.length_B, 20)
    assert again.width == rows.width
    with pytest.raises(LichenError, match="8 tokens came for rows of 9"):
        rows.padded(torch.zeros(1, 8, 2))


def test_rows_that_are_padded_on_the_left_and_clients_together_do_not_cross() -> None:
    with pytest.raises(LichenError, match="padded on the right"):
        narrow(batch_of([[0, 1, 1]], [0]))
    two = {name: torch.cat([x, x]) for name, x in batch_of([[1, 1, 0]], [0]).items()}
    with pytest.raises(LichenError, match="several clients"):
        narrow(two)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_two_sides_cut_by_the_factor_of_the_whole_bit_for_bit(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = {f"layers.{k}.{ab}": torch.randn(1, 7, 3, generator=generator) for k in range(12) for ab in "AB"}
    ends = {name: x for name, x in whole.items() if name.split(".")[1] in ("0", "1", "11")}
    middle = {name: x for name, x in whole.items() if name not in ends}
    expected = clip_C(whole, max_norm)
    both = cut_to_norm(ends, max_norm, squares(ends), list(middle), squares(middle))
    both |= cut_to_norm(middle, max_norm, squares(middle), list(ends), squares(ends))
    assert both.keys() == expected.keys()
    assert all(torch.equal(both[name], expected[name]) for name in whole)
