"""Many clients over flat arrays: lazily cut shards give what eager ones give, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.contracts.client import Source
from lichen.core.errors import LichenError
from lichen.core.fold import blocks
from lichen.core.seeds import numpy_generator
from lichen.data.batches.rows import ArrayShard, Ragged, Shard, TextShard
from lichen.data.batches.shards import EvalSource, MixedSource, TrainSource
from lichen.research.roster import Roster

ROWS = st.lists(st.integers(1, 40), max_size=6)


def eager(kind: str, lengths: list[int], seed: int) -> Shard:
    """One client's own arrays, as a reader makes them."""
    draw = numpy_generator(seed, kind)
    if kind == "array":
        return ArrayShard(draw.random((len(lengths), 2), dtype=np.float32), labels=draw.integers(0, 3, len(lengths)))
    ids = tuple(draw.integers(1, 99, length).astype(np.int32) for length in lengths)
    if kind == "lm":
        return TextShard(ids, labels=tuple(np.where(row % 2, row, -100).astype(np.int32) for row in ids), kind="lm")
    return TextShard(ids, labels=draw.integers(0, 3, len(ids)), kind="classify")


def roster(shards: list[Shard], folder: Path | None = None) -> Roster:
    """The same rows one after another; in files mapped into memory where a folder is given."""
    offsets = np.cumsum([0, *(shard.size for shard in shards)])
    first = shards[0]
    if isinstance(first, ArrayShard):
        x = np.concatenate([s.x for s in shards if isinstance(s, ArrayShard)])
        return Roster(ArrayShard(x, labels=np.concatenate([np.asarray(s.labels) for s in shards])), offsets)
    ids = Ragged.of([row for s in shards if isinstance(s, TextShard) for row in s.input_ids])
    if folder is not None:
        np.save(folder / "tokens.npy", ids.flat_T)
        ids = Ragged(np.load(folder / "tokens.npy", mmap_mode="r"), ids.offset_N1)
    if first.kind == "lm":
        labels = Ragged.of([row for s in shards for row in s.labels])
        return Roster(TextShard(ids, labels=labels, kind="lm"), offsets)
    return Roster(
        TextShard(ids, labels=np.concatenate([np.asarray(s.labels) for s in shards]), kind="classify"), offsets
    )


def same_batches(one: Source, other: Source, clients: range) -> int:
    """How many batches there were, all of them equal."""
    assert blocks(clients, one, 3) == blocks(clients, other, 3)
    count = 0
    for block in blocks(clients, one, 3):
        for a, b in zip(one.batches(block, 7), other.batches(block, 7), strict=True):
            assert a.keys() == b.keys()
            assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
            count += 1
    return count


@pytest.mark.parametrize("kind", ["lm", "classify", "array"])
@given(lengths=st.lists(ROWS, min_size=1, max_size=6), batch=st.integers(1, 4))
def test_lazy_shards_give_the_batches_of_eager_ones(kind: str, lengths: list[list[int]], batch: int) -> None:
    shards = [eager(kind, rows, c) for c, rows in enumerate(lengths)]
    lazy = roster(shards)
    clients = range(len(shards))
    assert lazy.size_N.tolist() == [shard.size for shard in shards]
    for made in (shards, lazy):
        assert [shard.size for shard in made] == [len(rows) for rows in lengths]
    train = [TrainSource(s, batch_size=batch, steps={c: c % 3 for c in clients}, max_length=32) for s in (shards, lazy)]
    assert same_batches(train[0], train[1], clients) == sum(
        max((c % 3 for c in block if lengths[c]), default=0) for block in blocks(clients, train[0], 3)
    )
    evals = [EvalSource(s, batch_size=batch, max_length=32) for s in (shards, lazy)]
    same_batches(evals[0], evals[1], clients)
    public = eager(kind, [3, 9, 30], 99)
    mixed = [MixedSource(source, public=public, public_rows=2) for source in train]
    same_batches(mixed[0], mixed[1], clients)


def test_rows_of_a_file_are_read_through_its_mapping(tmp_path: Path) -> None:
    shards = [eager("lm", [5, 3], 0), eager("lm", [7], 1), eager("lm", [2, 2, 2], 2)]
    lazy = roster(shards, tmp_path)
    base = lazy[2].input_ids[1].base  # type: ignore[union-attr]
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    sources = [TrainSource(s, batch_size=2, steps=2) for s in (shards, lazy)]
    assert same_batches(sources[0], sources[1], range(3)) == 2  # one block, two steps


def test_a_roster_is_a_sequence_of_its_clients() -> None:
    lazy = roster([eager("classify", [3] * n, n) for n in (2, 0, 5)])
    assert (len(lazy), lazy[-1].size, [s.size for s in lazy[1:]]) == (3, 5, [0, 5])
    with pytest.raises(IndexError):
        lazy[3]
    with pytest.raises(LichenError, match="client 3 has no data"):
        TrainSource(lazy, batch_size=1, steps=1).shape(3)


@pytest.mark.parametrize("offsets", [[], [0, 4], [1, 5], [0, 3, 2, 5], [0, 6]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    rows = eager("classify", [2] * 5, 0)
    with pytest.raises(LichenError) as told:
        Roster(rows, np.array(offsets, np.int64))
    assert told.value.where == "roster"


@given(rows=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=8), data=st.data())
def test_ragged_rows_are_a_sequence_of_views(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.of([np.array(row, np.int32) for row in rows])
    assert [row.tolist() for row in ragged] == rows
    assert [ragged[i].tolist() for i in range(-len(rows), len(rows))] == rows + rows
    assert all(row.base is not None for row in ragged)
    start, stop = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))
    step = data.draw(st.sampled_from([1, 2, -1]))
    assert [row.tolist() for row in ragged[start:stop:step]] == rows[start:stop:step]
    assert Ragged.of(ragged) is ragged


@pytest.mark.parametrize(("flat", "offsets"), [(3, [0, 4]), (3, [-1, 2]), (3, [0, 2, 1, 3]), (3, [])])
def test_ragged_offsets_outside_the_rows_are_refused(flat: int, offsets: list[int]) -> None:
    with pytest.raises(LichenError, match="offsets"):
        Ragged(np.zeros(flat, np.int32), np.array(offsets, np.int64))
