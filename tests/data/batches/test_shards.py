"""Sources: one client's batches are the same alone and in company, and cover its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.fold import blocks
from lichen.core.seeds import numpy_generator
from lichen.data.batches.accumulation import MicroBatches
from lichen.data.batches.shards import (
    ArrayShard,
    EvalSource,
    MixedSource,
    Shard,
    TextShard,
    TrainSource,
    count_rows_tokens,
    pooled,
)

KINDS = ("lm", "classify", "array")


def shard(kind: str, lengths: Sequence[int], seed: int, answers: bool = False) -> Shard:
    draw = numpy_generator(seed, kind)
    n = len(lengths)
    answer = draw.integers(0, 50, n) if answers else None
    if kind == "array":
        return ArrayShard(draw.random((n, 1, 3, 3), dtype=np.float32), labels=draw.integers(0, 3, n), answer=answer)
    ids = tuple(draw.integers(1, 99, length).astype(np.int32) for length in lengths)
    if kind == "lm":
        labels = tuple(np.where(draw.random(len(row)) < 0.5, row, -100).astype(np.int32) for row in ids)
        return TextShard(ids, labels=labels, kind="lm", answer=answer)
    return TextShard(ids, labels=draw.integers(0, 3, n), kind="classify", answer=answer)


def only(batch: Batch, position: int) -> dict[str, Tensor]:
    return {name: x[position] for name, x in batch.items()}


def check_law(source: Source, clients: Sequence[int], seed: int) -> None:
    """Alone equals the active slices in the block, bit for bit."""
    for block in blocks(clients, source, 3):
        together = list(source.batches(block, seed))
        for position, client in enumerate(block):
            alone = list(source.batches([client], seed))
            slices = [only(b, position) for b in together if b["active_C"][position]]
            assert len(alone) == len(slices)
            for one, piece in zip(alone, slices, strict=True):
                assert one.keys() == piece.keys()
                assert all(x.shape[0] == 1 for x in one.values())
                assert all(torch.equal(one[name][0], piece[name]) for name in piece)
                assert all(one[name].dtype == piece[name].dtype for name in piece)


clients_lengths = st.lists(st.lists(st.integers(1, 70), max_size=12), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), lengths=clients_lengths, batch=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_a_client_sees_the_same_alone_and_in_company(
    kind: str, lengths: list[list[int]], batch: int, seed: int
) -> None:
    shards = [shard(kind, row, seed + i) for i, row in enumerate(lengths)]
    clients = range(len(shards))
    train = TrainSource(shards, batch_size=batch, steps={c: c + 1 for c in clients}, pad=7, max_length=48)
    check_law(train, clients, seed)
    check_law(EvalSource(shards, batch_size=batch, pad=7, max_length=48), clients, seed)
    public = shard(kind, [3, 20, 33], seed)
    check_law(MixedSource(train, public=public, public_rows=2), clients, seed)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), lengths=clients_lengths, batch=st.integers(1, 5))
def test_evaluation_gives_every_row_once_with_its_own_tokens(kind: str, lengths: list[list[int]], batch: int) -> None:
    shards = [shard(kind, row, i) for i, row in enumerate(lengths)]
    source = EvalSource(shards, batch_size=batch, pad=0)
    for block in blocks(range(len(shards)), source, 4):
        seen: dict[int, list[int]] = {c: [] for c in block}
        total = 0
        for step in source.batches(block, 0):
            total += count_rows_tokens(step)
            for position, client in enumerate(block):
                held = shards[client]
                for b, i in enumerate(step["index_CB"][position].tolist()):
                    if i < 0:
                        continue
                    assert step["active_C"][position]
                    seen[client].append(i)
                    if isinstance(held, ArrayShard):
                        assert np.array_equal(step["x_CBF"][position, b].numpy(), held.x[i])
                        assert step["labels_CB"][position, b] == held.labels[i]
                        continue
                    mask = step["attention_mask_CBT"][position, b].bool()
                    assert np.array_equal(step["input_ids_CBT"][position, b][mask].numpy(), held.input_ids[i])
                    if held.kind == "lm":
                        assert np.array_equal(step["labels_CBT"][position, b][mask].numpy(), held.labels[i])
                        assert (step["labels_CBT"][position, b][~mask] == -100).all()
        assert {c: sorted(rows) for c, rows in seen.items()} == {c: list(range(len(lengths[c]))) for c in block}
        assert total == sum(len(lengths[c]) if kind == "array" else sum(lengths[c]) for c in block)


def test_training_runs_over_whole_epochs_before_a_row_repeats() -> None:
    source = TrainSource({5: shard("lm", [4] * 7, 0)}, batch_size=3, steps=14)
    order = torch.cat([b["index_CB"][0] for b in source.batches([5], 9)]).tolist()
    assert len(order) == 42
    epochs = [tuple(order[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1
    other = torch.cat([b["index_CB"][0] for b in source.batches([5], 10)]).tolist()
    assert other != order


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=clients_lengths,
    batch=st.integers(1, 5),
    epochs=st.integers(1, 3),
    parts=st.integers(1, 4),
)
def test_so_many_passes_give_every_row_as_often_and_micro_batches_the_same_rows(
    kind: str, lengths: list[list[int]], batch: int, epochs: int, parts: int
) -> None:
    shards = [shard(kind, row, i) for i, row in enumerate(lengths)]
    source = TrainSource(shards, batch_size=batch, steps=0, epochs=epochs, pad=7, max_length=48)
    pieces = MicroBatches(source, parts)
    check_law(source, range(len(shards)), 3)
    check_law(pieces, range(len(shards)), 3)
    for client, held in enumerate(shards):
        whole = list(source.batches([client], 3))
        assert len(whole) == source.steps_of(client) == epochs * -(-held.size // batch)
        order = [i for b in whole for i in b["index_CB"][0].tolist() if i >= 0]
        for at in range(0, len(order), max(held.size, 1)):
            assert sorted(order[at : at + held.size]) == list(range(held.size))
        cut = list(pieces.batches([client], 3))
        assert len(cut) == parts * len(whole)
        for step, batch_ in enumerate(whole):
            mine = cut[step * parts : (step + 1) * parts]
            for name, x in batch_.items():
                joined = x if name == "active_C" else torch.cat([piece[name] for piece in mine], 1)
                assert torch.equal(joined, x)
        assert pieces.cost(client) == source.cost(client)
        assert pieces.shape(client) == source.shape(client)


def test_micro_batches_need_a_piece() -> None:
    with pytest.raises(LichenError, match="parts"):
        MicroBatches(TrainSource([shard("lm", [3], 0)], batch_size=1, steps=1), 0)


def test_a_small_client_is_padded_with_rows_nothing_is_learned_from() -> None:
    source = TrainSource([shard("lm", [4, 20], 0), shard("lm", [18] * 9, 1)], batch_size=4, steps={0: 1, 1: 3}, pad=7)
    first, second, third = source.batches([0, 1], 0)
    assert sorted(first["index_CB"][0].tolist()) == [-1, -1, 0, 1]
    padding = first["index_CB"][0] < 0
    assert (first["labels_CBT"][0][padding] == -100).all()
    assert (first["attention_mask_CBT"][0][padding].sum(-1) == 1).all()
    assert (first["input_ids_CBT"][0][padding] == 7).all()
    assert [b["active_C"].tolist() for b in (first, second, third)] == [[True, True], [False, True], [False, True]]
    assert (second["index_CB"][0] == -1).all()
    assert first["input_ids_CBT"].shape == (2, 4, 32)
    assert {name: x.dtype for name, x in first.items()} == {
        "active_C": torch.bool,
        "index_CB": torch.int64,
        "input_ids_CBT": torch.int64,
        "attention_mask_CBT": torch.int64,
        "labels_CBT": torch.int64,
    }
    assert count_rows_tokens(first) == 24 + 4 * 18
    assert count_rows_tokens(second) == 4 * 18


def test_the_width_follows_from_the_clients_own_longest_row() -> None:
    shards = {0: shard("lm", [3, 16], 0), 1: shard("lm", [17], 1), 2: shard("lm", [60], 2), 3: shard("lm", [], 3)}
    own = TrainSource(shards, batch_size=1, steps=1)
    assert [own.shape(c) for c in shards] == [(16,), (32,), (64,), (16,)]
    capped = TrainSource(shards, batch_size=1, steps=1, max_length=40)
    assert [capped.shape(c) for c in shards] == [(16,), (32,), (40,), (16,)]
    fixed = TrainSource(shards, batch_size=1, steps=1, fixed_width=24)
    assert {fixed.shape(c) for c in shards} == {(24,)}
    batch = next(iter(fixed.batches([0, 2, 3], 0)))
    assert batch["input_ids_CBT"].shape == (3, 1, 24)
    assert batch["active_C"].tolist() == [True, True, False]
    with pytest.raises(LichenError, match="shape"):
        next(iter(own.batches([0, 2], 0)))
    with pytest.raises(LichenError, match="client 9"):
        own.shape(9)


def test_evaluation_of_a_client_without_rows_yields_nothing() -> None:
    assert list(EvalSource([shard("lm", [], 0)], batch_size=2).batches([0], 0)) == []


def test_evaluation_widths_waste_little() -> None:
    lengths = list(range(1, 129))
    source = EvalSource([shard("lm", lengths, 0)], batch_size=4)
    widths = [b["input_ids_CBT"].shape[2] for b in source.batches([0], 0)]
    assert sorted(set(widths)) == [16, 32, 48, 64, 96, 128]
    assert widths == sorted(widths, reverse=True)
    assert sum(w * 4 for w in widths) < 1.35 * sum(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_public_rows_carry_answers_instead_of_labels(kind: str) -> None:
    local = TrainSource([shard(kind, [5] * 6, 0), shard(kind, [5], 1)], batch_size=3, steps=2)
    public = shard(kind, [40, 8, 9, 9], 2, answers=True)
    assert public.answer is not None
    source = MixedSource(local, public=public, public_rows=2)
    plain = list(local.batches([0, 1], 4))
    for step, own in zip(source.batches([0, 1], 4), plain, strict=True):
        labels = step["labels_CBT"] if kind == "lm" else step["labels_CB"]
        assert (labels[:, 3:] == -100).all()
        assert (step["answer_CB"][:, :3] == -1).all()
        assert all(a in public.answer for a in step["answer_CB"][:, 3:].flatten().tolist())
        assert torch.equal(step["index_CB"][:, :3], own["index_CB"])
        assert (step["index_CB"][:, 3:] == -1).all()
        if kind == "array":
            assert count_rows_tokens(step) == 3 + 1 + 4
        else:
            assert step["input_ids_CBT"].shape == (2, 5, 48)
            assert count_rows_tokens(step) == int(step["attention_mask_CBT"].sum()) - 2
    drawn = Counter(a for b in source.batches([0], 4) for a in b["answer_CB"][0, 3:].tolist())
    assert drawn == Counter(public.answer.tolist())


def test_public_rows_without_answers_point_by_their_own_number() -> None:
    local = TrainSource([shard("classify", [5] * 6, 0)], batch_size=1, steps=3)
    source = MixedSource(local, public=shard("classify", [8] * 6, 2), public_rows=2)
    assert sorted(a for b in source.batches([0], 0) for a in b["answer_CB"][0, 1:].tolist()) == list(range(6))


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_is_all_rows_in_client_order(kind: str) -> None:
    a, b = shard(kind, [3, 4], 0), shard(kind, [5], 1)
    whole = pooled({1: b, 0: a})
    assert whole.size == 3
    if isinstance(whole, ArrayShard) and isinstance(a, ArrayShard) and isinstance(b, ArrayShard):
        assert np.array_equal(whole.x, np.concatenate([a.x, b.x]))
    else:
        assert isinstance(whole, TextShard)
        assert [len(row) for row in whole.input_ids] == [3, 4, 5]
    assert np.array_equal(np.asarray(whole.labels[2]), np.asarray(b.labels[0]))
    with pytest.raises(LichenError, match="different kinds"):
        pooled([a, shard("array" if kind != "array" else "lm", [2], 0)])


def test_shards_that_do_not_fit_together_are_refused() -> None:
    row = np.array([1, 2], np.int32)
    with pytest.raises(LichenError, match="no tokens"):
        TextShard((row[:0],), labels=np.array([0]), kind="classify")
    with pytest.raises(LichenError, match="differ in length"):
        TextShard((row,), labels=(row[:1],), kind="lm")
    with pytest.raises(LichenError, match="1 rows but 2 labels"):
        TextShard((row,), labels=np.array([0, 1]), kind="classify")
    with pytest.raises(LichenError, match="suit the kind"):
        TextShard((row,), labels=np.array([0]), kind="lm")
    with pytest.raises(LichenError, match="batch_size is 0"):
        TrainSource([TextShard((row,), labels=(row,), kind="lm")], batch_size=0, steps=1)
