"""Views: what may move, what must stay, and that a row's view follows from seed, client, row and step alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lichen.core.errors import LichenError
from lichen.data.batches.augment import TextViews, Words, uniform
from lichen.data.batches.augment_images import ImageViews, Pixels, _moved
from lichen.data.batches.scarce_labels import ScarceLabels, hide
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource
from support.tiny_llama import save_model

PAD, CLS, SEP, MASK = 0, 1, 2, 3
HARD = Words(drop=0.3, mask=0.2, swap=0.4, crop=0.3)
VIEWS = TextViews(PAD, special=(CLS, SEP), mask=MASK, strong=HARD)


def batch(lengths: list[list[int]], width: int, *, index: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    """Rows CLS words SEP padding; word j of row (c, b) is 10 + j."""
    clients, rows = len(lengths), len(lengths[0])
    ids = torch.zeros(clients, rows, width, dtype=torch.int64)
    for c, some in enumerate(lengths):
        for b, words in enumerate(some):
            ids[c, b, : words + 2] = torch.tensor([CLS, *range(10, 10 + words), SEP])
    mask = (ids != PAD).long()
    made = {"active_C": torch.ones(clients, dtype=torch.bool), "input_ids_CBT": ids, "attention_mask_CBT": mask}
    return {**made, "index_CB": torch.tensor(index or [list(range(rows))] * clients)}


def strong(views: Any, of: Any, **more: Any) -> Any:
    return views.view(of, "strong", **{"seed": 5, "clients": range(len(of["active_C"])), "step": 2, **more})


def test_numbers_are_uniform_and_no_two_streams_agree() -> None:
    drawn = uniform(3, np.arange(400), 1, 50)
    assert drawn.shape == (400, 50)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / 12) < 0.003
    assert np.abs(np.corrcoef(drawn[:40]) - np.eye(40)).max() < 0.7
    others = [
        uniform(4, np.arange(400), 1, 50),
        uniform(3, np.arange(400), 2, 50),
        uniform(3, np.arange(1, 401), 1, 50),
    ]
    assert not any((other == drawn).any() for other in others)
    assert (others[2][:-1] == drawn[1:]).all()


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.integers(0, 9),
    st.builds(Words, **{name: st.sampled_from([0.0, 0.1, 0.5, 0.95]) for name in ("drop", "mask", "swap", "crop")}),
)
def test_words_come_from_the_row_and_special_tokens_frame_it(lengths: list[int], step: int, words: Words) -> None:
    of = batch([lengths], 24)
    seen = strong(replace(VIEWS, strong=words), of, step=step)
    for b, length in enumerate(lengths):
        left = int(seen["attention_mask_CBT"][0, b].sum())
        row = seen["input_ids_CBT"][0, b].tolist()
        assert seen["attention_mask_CBT"][0, b].tolist() == [1] * left + [0] * (24 - left)
        assert row[left:] == [PAD] * (24 - left)
        assert (row[0], row[left - 1]) == (CLS, SEP)
        inner = [t for t in row[1 : left - 1] if t != MASK]
        assert len(inner) == len(set(inner))
        assert set(inner) <= set(range(10, 10 + length))
        assert left >= 3
        if not words.swap:
            assert inner == sorted(inner)
        if not words.drop:
            assert left - 2 == length - int(words.crop * length)
    assert torch.equal(seen["index_CB"], of["index_CB"])


@given(st.integers(0, 4), st.integers(24, 40), st.integers(0, 5))
def test_a_row_has_one_view_in_any_place_width_and_company(row: int, width: int, client: int) -> None:
    lengths = [3, 9, 14, 20, 7]
    whole = strong(VIEWS, batch([lengths, lengths], 22), clients=(client, 11))
    alone = strong(VIEWS, batch([[lengths[row]]], width, index=[[row]]), clients=(client,))
    left = int(alone["attention_mask_CBT"].sum())
    assert int(whole["attention_mask_CBT"][0, row].sum()) == left
    assert torch.equal(alone["input_ids_CBT"][0, 0, :left], whole["input_ids_CBT"][0, row, :left])
    assert not torch.equal(whole["input_ids_CBT"][0], whole["input_ids_CBT"][1])


def test_how_much_goes_is_what_was_asked_for() -> None:
    of = batch([[20] * 300], 22)
    kept = strong(replace(VIEWS, strong=Words(drop=0.2)), of)["attention_mask_CBT"].sum(-1).double() - 2
    assert abs(float(kept.mean()) - 16) < 0.4
    masked = (strong(replace(VIEWS, strong=Words(mask=0.2)), of)["input_ids_CBT"] == MASK).sum(-1).double()
    assert abs(float(masked.mean()) - 4) < 0.4
    swapped = strong(replace(VIEWS, strong=Words(swap=0.2)), of)["input_ids_CBT"]
    assert torch.equal(swapped.sort(-1).values, of["input_ids_CBT"].sort(-1).values)
    moved = (swapped != of["input_ids_CBT"]).sum(-1).double()
    assert 3 < float(moved.mean()) <= 4


def test_rows_that_are_not_the_clients_own_stay_and_steps_differ() -> None:
    of = batch([[20, 20, 20]], 22, index=[[-1, 4, -1]])
    one, two = strong(VIEWS, of), strong(VIEWS, of, step=3)
    for b in (0, 2):
        assert torch.equal(one["input_ids_CBT"][0, b], of["input_ids_CBT"][0, b])
    assert not torch.equal(one["input_ids_CBT"], two["input_ids_CBT"])
    assert VIEWS.view(of, "weak", seed=5, clients=(0,), step=2) is of


def test_what_cannot_be_changed_is_refused() -> None:
    with pytest.raises(LichenError, match="no share"):
        Words(drop=1.0)
    with pytest.raises(LichenError, match="no mask token"):
        TextViews(PAD, strong=Words(mask=0.1))
    with pytest.raises(LichenError, match="tokens that have labels"):
        strong(VIEWS, {**batch([[3]], 8), "labels_CBT": torch.zeros(1, 1, 8)})
    with pytest.raises(LichenError, match="no square picture"):
        strong(ImageViews(), {**batch([[3]], 8), "x_CBF": torch.zeros(1, 1, 63)})
    with pytest.raises(LichenError, match="out of range"):
        Pixels(shift=-1)


def test_a_tokenizer_says_what_stays(tmp_path: Any) -> None:
    views = TextViews.of(AutoTokenizer.from_pretrained(save_model(tmp_path)), strong=Words(drop=0.1, mask=0.2))
    assert views.special == (1, 2, 3)  # all but the unknown word
    assert views.mask is None
    assert views.strong == Words(drop=0.1 + 0.9 * 0.2)


def pictures(count: int, side: int = 8) -> dict[str, torch.Tensor]:
    x = torch.rand(1, count, 1, side, side, generator=torch.Generator().manual_seed(0)) + 0.1
    return {"active_C": torch.ones(1, dtype=torch.bool), "x_CBF": x, "index_CB": torch.arange(count)[None]}


def test_a_weak_picture_is_the_same_one_shifted_by_a_pixel() -> None:
    of = pictures(60)
    new = ImageViews().view(of, "weak", seed=1, clients=(3,), step=0)["x_CBF"][0, :, 0]
    seen = set()
    for x, y in zip(of["x_CBF"][0, :, 0], new, strict=True):
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        places = [(a, b) for a in range(3) for b in range(3) if torch.equal(padded[a : a + 8, b : b + 8], y)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_a_quarter_turn_is_exact_and_a_square_is_erased() -> None:
    of = pictures(30)
    turned = replace(ImageViews(), strong=Pixels(rotate=90))
    new = turned.view(of, "strong", seed=1, clients=(3,), step=0)["x_CBF"]
    assert float(new.max()) <= float(of["x_CBF"].max()) + 1e-6
    exact = _moved(of["x_CBF"][0].double().numpy(), [np.pi / 2] * 30, np.zeros((30, 2)))
    torch.testing.assert_close(torch.from_numpy(exact), torch.rot90(of["x_CBF"][0].double(), -1, (2, 3)))
    erased = replace(ImageViews(), strong=Pixels(erase=0.25)).view(of, "strong", seed=1, clients=(3,), step=0)["x_CBF"]
    gone = (erased == 0)[0, :, 0]
    assert gone.flatten(1).sum(1).tolist() == [4] * 30
    assert torch.equal(erased[0, :, 0][~gone], of["x_CBF"][0, :, 0][~gone])


def test_flat_pictures_and_any_company_give_the_same_views() -> None:
    of = pictures(6)
    flat = {**of, "x_CBF": of["x_CBF"].flatten(2)}
    square = ImageViews().view(of, "strong", seed=1, clients=(3,), step=0)["x_CBF"]
    lines = ImageViews(side=8).view(flat, "strong", seed=1, clients=(3,), step=0)["x_CBF"]
    assert torch.equal(lines, square.flatten(2))
    some = {name: x[:, 2:3] if name != "active_C" else x for name, x in of.items()}
    assert torch.equal(ImageViews().view(some, "strong", seed=1, clients=(3,), step=0)["x_CBF"], square[:, 2:3])


def test_few_labels_and_the_rest_are_drawn_apart() -> None:
    shards = [
        hide(
            ArrayShard(x=np.full((20, 2), c, np.float32), labels=np.arange(20) % 4),
            5,
            seed=0,
            client=c,
        )
        for c in range(3)
    ]
    assert all((shard.labels >= 0).sum() == 5 for shard in shards)
    assert all(len(set(shard.labels[shard.labels >= 0].tolist())) == 4 for shard in shards)
    source = ScarceLabels(TrainSource(shards, batch_size=4, steps={0: 3, 1: 2, 2: 5}), unlabelled_rows=6)
    together = list(source.batches((0, 1, 2), 9))
    assert [b["active_C"].tolist() for b in together[2:4]] == [[True, False, True], [False, False, True]]
    for b in together[:2]:
        assert bool((b["labels_CB"][:, :4] >= 0).all())
        assert bool((b["labels_CB"][:, 4:] == -100).all())
        assert bool((b["index_CB"] >= 0).all())
    for c in range(3):
        alone = list(source.batches((c,), 9))
        for one, many in zip(alone, together, strict=False):
            assert all(torch.equal(x[0], many[name][c]) for name, x in one.items())
    rows = torch.cat([b["index_CB"][2, 4:] for b in together]).tolist()
    assert set(rows[:15]) == set(np.flatnonzero(shards[2].labels < 0).tolist())


def test_a_client_may_have_labels_only_or_none() -> None:
    row = np.array([1, 10, 2])
    shards = [TextShard([row] * 3, labels=np.array(y), kind="classify") for y in ([0, 1, 1], [-100] * 3)]
    source = ScarceLabels(TrainSource(shards, batch_size=2, steps=1), unlabelled_rows=2)
    (made,) = source.batches((0, 1), 0)
    assert (made["index_CB"] >= 0).tolist() == [[True, True, False, False], [False, False, True, True]]
    with pytest.raises(LichenError, match="no class"):
        next(
            ScarceLabels(
                TrainSource([TextShard([row], labels=[row], kind="lm")], batch_size=2, steps=1), unlabelled_rows=2
            ).batches((0,), 0)
        )
