"""Packed rows: every token of the stream once, in order, in full rows, all of them learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.batches.pack_rows import lm_rows
from lichen.data.batches.shards import TextShard, TrainSource
from support.tiny_llama import SPECIAL, WORDS, save_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = save_model(tmp_path_factory.mktemp("model"))
    return AutoTokenizer.from_pretrained(folder)


def slow(texts: Sequence[str], tokenizer: Any, length: Any) -> Any:
    """Token by token."""
    rows, row = [], []
    for text in texts:
        if not text:
            continue
        for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
            row.append(token)
            if len(row) == length:
                rows.append(row)
                row = []
    return rows


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), max_size=20),
    length=st.integers(2, 16),
)
def test_the_stream_is_cut_into_full_rows_and_nothing_is_lost_but_the_tail(
    tokenizer: Any, texts: Sequence[str], length: Any
) -> None:
    shard = lm_rows(texts, tokenizer, length)
    expected = slow(texts, tokenizer, length)
    assert [row.tolist() for row in shard.input_ids] == expected
    assert [row.tolist() for row in shard.labels] == expected
    assert (shard.length_N == length).all()
    assert shard.kind == "lm"


def test_more_texts_than_one_call_takes(tokenizer: Any) -> None:
    texts = [WORDS[i % 40] for i in range(700)]
    shard = lm_rows(iter(texts), tokenizer, 10)
    assert [row.tolist() for row in shard.input_ids] == slow(texts, tokenizer, 10)
    assert shard.size == 140


def test_batches_of_packed_rows_have_no_padding(tokenizer: Any) -> None:
    shard = lm_rows([" ".join(WORDS)] * 3, tokenizer, 16)
    source = TrainSource([shard, shard], batch_size=2, steps=3, fixed_width=16)
    for batch in source.batches([0, 1], 1):
        assert batch["input_ids_CBT"].shape == (2, 2, 16)
        assert bool((batch["attention_mask_CBT"] == 1).all())
        assert bool((batch["labels_CBT"] == batch["input_ids_CBT"]).all())


def test_too_little_text_is_an_empty_shard_and_without_an_end_token_texts_touch(tokenizer: Any) -> None:
    empty = lm_rows(["w1 w2"], tokenizer, 8)
    assert isinstance(empty, TextShard)
    assert empty.size == 0
    assert lm_rows([], tokenizer, 8).size == 0

    class Endless:
        eos_token_id = None

        def __call__(self, texts: Sequence[str], **more: Any) -> Any:
            return tokenizer(texts, **more)

    ids = np.concatenate(list(lm_rows(["w1 w2", "w3 w4"], Endless(), 2).input_ids)).tolist()
    assert ids == [len(SPECIAL) + 2 + n for n in (1, 2, 3, 4)]


def test_refuses_rows_without_anything_to_predict(tokenizer: Any) -> None:
    with pytest.raises(LichenError, match=r"data\.max_length"):
        lm_rows(["w1"], tokenizer, 1)
