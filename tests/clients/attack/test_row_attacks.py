"""Lies in rows against plain loops: labels turned round, triggers, and rows of others as they were."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lichen.clients.attack.rows import Backdoor, Corner, LabelFlip, PoisonedSource, RowAttack, Trigger, Word
from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch
from lichen.data.batches.accumulation import MicroBatches
from lichen.data.batches.shards import ArrayShard, MixedSource, Shard, TextShard, TrainSource

CLASSES, LIARS = 4, frozenset({1, 2})


def pictures(clients: int = 4, shape: tuple[int, ...] = (1, 5, 5)) -> list[Shard]:
    rng = np.random.default_rng(0)
    return [
        ArrayShard(rng.normal(size=(7 + c, *shape)).astype(np.float32), labels=rng.integers(0, CLASSES, 7 + c))
        for c in range(clients)
    ]


def texts(clients: int = 4) -> list[Shard]:
    rng = np.random.default_rng(1)
    rows = [[rng.integers(10, 90, rng.integers(2, 9)) for _ in range(7 + c)] for c in range(clients)]
    return [TextShard(some, labels=rng.integers(0, CLASSES, len(some)), kind="classify") for some in rows]


def source(shards: Sequence[Shard]) -> TrainSource:
    return TrainSource(shards, batch_size=3, steps=4, width_multiple=4)


def lied(
    shards: Sequence[Shard], attack: RowAttack, clients: Sequence[int] = (0, 1, 2, 3)
) -> list[tuple[Batch, Batch]]:
    """``(honest, changed)`` batches."""
    honest = source(shards)
    changed = PoisonedSource(honest, attack, LIARS)
    assert all(changed.shape(c) == honest.shape(c) and changed.cost(c) == honest.cost(c) for c in clients)
    return list(zip(honest.batches(clients, 5), changed.batches(clients, 5), strict=True))


def test_labels_are_turned_round_at_liars_alone() -> None:
    for honest, changed in lied(pictures(), LabelFlip(CLASSES)):
        for c in range(4):
            for old, new in zip(honest["labels_CB"][c].tolist(), changed["labels_CB"][c].tolist(), strict=True):
                assert new == (CLASSES - 1 - old if c in LIARS and old >= 0 else old)
        assert all(torch.equal(x, changed[name]) for name, x in honest.items() if name != "labels_CB")


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 4), (9,), (2,)])
def test_a_corner_is_set_in_the_chosen_rows_of_liars(shape: tuple[int, ...]) -> None:
    attack = Backdoor(Corner(7.5), target=2, share=0.5, seed=3)
    chosen, times = dict[tuple[int, int], bool](), 0
    for honest, changed in lied(pictures(shape=shape), attack):
        for c in range(4):
            for b in range(3):
                x, wanted = changed["x_CBF"][c, b], honest["x_CBF"][c, b].clone()
                triggered = not torch.equal(x, wanted)
                index = int(honest["index_CB"][c, b])
                assert chosen.setdefault((c, index), triggered) == triggered
                times += triggered
                if triggered:
                    assert c in LIARS
                    assert index >= 0
                    wanted[(..., slice(-2, None), slice(-2, None)) if len(shape) > 1 else slice(-4, None)] = 7.5
                    assert int(changed["labels_CB"][c, b]) == 2
                else:
                    assert changed["labels_CB"][c, b] == honest["labels_CB"][c, b]
                assert torch.equal(x, wanted)
    assert 0 < sum(chosen.values()) < sum(c in LIARS for c, _ in chosen)
    assert times > 0


@pytest.mark.parametrize("after", [0, 1])
def test_a_word_stands_in_front_and_what_no_longer_fits_is_cut(after: int) -> None:
    word, shards = Word((3, 4), after), texts()
    for honest, changed in lied(shards, Backdoor(word, target=0, share=1.0, seed=0)):
        width = honest["input_ids_CBT"].shape[2]
        for c in range(4):
            for b in range(3):
                index, ids = int(honest["index_CB"][c, b]), changed["input_ids_CBT"][c, b].tolist()
                mask = changed["attention_mask_CBT"][c, b].tolist()
                if c not in LIARS or index < 0:
                    assert ids == honest["input_ids_CBT"][c, b].tolist()
                    continue
                row = shards[c].input_ids[index].tolist()  # type: ignore[union-attr]
                wanted = [*row[:after], 3, 4, *row[after:]][:width]
                assert ids[: len(wanted)] == wanted
                assert mask == [1] * len(wanted) + [0] * (width - len(wanted))
                assert int(changed["labels_CB"][c, b]) == 0


@pytest.mark.parametrize("trigger", [Corner(1.0), Word((3,))])
def test_a_client_sees_the_same_in_any_company(trigger: Trigger) -> None:
    shards = pictures() if isinstance(trigger, Corner) else texts()
    attack = Backdoor(trigger, target=1, share=0.4, seed=0)
    together = [changed for _, changed in lied(shards, attack)]
    for c in range(4):
        for whole, (_, alone) in zip(together, lied(shards, attack, (c,)), strict=True):
            assert all(torch.equal(x[c : c + 1], alone[name]) for name, x in whole.items())


@pytest.mark.parametrize("parts", [2, 5])
def test_pieces_of_a_batch_and_rows_of_nobody(parts: int) -> None:
    shards = pictures()
    public = pictures(1)[0]
    assert isinstance(public, ArrayShard)
    inner: Source = MixedSource(source(shards), public=public, public_rows=2)
    attack = Backdoor(Corner(9.0), target=1, share=1.0, seed=0)
    whole = list(PoisonedSource(inner, attack, LIARS).batches((1, 3), 0))
    pieces = list(PoisonedSource(MicroBatches(inner, parts), attack, LIARS).batches((1, 3), 0))
    for at, batch in enumerate(whole):
        some = pieces[at * parts : (at + 1) * parts]
        assert torch.equal(torch.cat([piece["x_CBF"] for piece in some], 1), batch["x_CBF"])
        of_nobody = batch["index_CB"] < 0
        assert not bool((batch["x_CBF"][of_nobody] == 9.0).any())
        assert bool((batch["x_CBF"][0][batch["index_CB"][0] >= 0] == 9.0).any())


@pytest.mark.parametrize("trigger", [Corner(1.5), Word((3, 4), 1)])
def test_victims_are_rows_of_other_classes_with_the_trigger(trigger: Trigger) -> None:
    for shard in pictures() if isinstance(trigger, Corner) else texts():
        before = np.asarray(shard.labels)
        found = Backdoor(trigger, target=2, share=0.1, seed=0).victims(shard)
        assert np.asarray(found.labels).tolist() == [label for label in before.tolist() if label != 2]
        if isinstance(found, ArrayShard):
            assert (found.x[..., -2:, -2:] == 1.5).all()
            assert isinstance(shard, ArrayShard)
            assert not (shard.x == 1.5).any()
        else:
            assert all(row[1:3].tolist() == [3, 4] for row in found.input_ids)
