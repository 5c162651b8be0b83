"""Two tokenisations side by side: all ways through are the oracle; carrying by a dictionary is another."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_vocabulary import real, slow  # noqa: F401  (a fixture is taken by its name)

from lichen.core.errors import LichenError
from lichen.research.mutual.alignment import Bridge, align, partners
from lichen.research.mutual.vocabulary import Translation, Vocabulary, edit_distances
from support.two_tokenizers import TEXTS, tokenizer

rows = st.lists(st.text(alphabet="ab ", min_size=0, max_size=3), min_size=1, max_size=5)


def every_way(n: Any, m: Any) -> Any:
    """All paths from (0, 0) to (n - 1, m - 1)."""
    if n == m == 1:
        return [[(0, 0)]]
    steps = [(n - 1, m - 1), (n - 1, m), (n, m - 1)]
    return [[*way, (n - 1, m - 1)] for a, b in steps if a and b for way in every_way(a, b)]


def price(way: Any, a: Any, b: Any) -> Any:
    return sum(slow(a[i], b[j]) for i, j in way)


@given(a=rows, b=rows)
def test_the_path_is_a_cheapest_of_all(a: Any, b: Any) -> None:
    path = align(a, b)
    ways = every_way(len(a), len(b))
    assert path in ways
    assert price(path, a, b) == min(price(way, a, b) for way in ways)
    single = [j for i, j in path if sum(p[0] == i for p in path) == 1 and sum(p[1] == j for p in path) == 1]
    if "".join(a) == "".join(b):
        return
    found = partners(a, b)
    assert [j for j in range(len(b)) if found[j] >= 0] == single
    assert all((int(found[j]), j) in path for j in single)


@given(text=st.text(alphabet="abc ", min_size=1, max_size=12), cuts=st.data())
def test_of_one_text_tokens_over_the_same_characters_are_partners(text: Any, cuts: Any) -> None:
    row = []
    for _ in range(2):
        at = sorted({0, len(text), *cuts.draw(st.lists(st.integers(0, len(text)), max_size=6))})
        row.append(list(pairwise(at)))
    words = [[text[x:y] for x, y in spans] for spans in row]
    found = partners(*words)
    common = sorted({end for _, end in row[0]} & {end for _, end in row[1]})
    for j, span in enumerate(row[1]):
        if span in row[0]:
            assert found[j] == row[0].index(span)
        elif found[j] >= 0:
            # Others are partners only within a stretch that begins and ends together.
            assert bisect_right(common, span[0]) == bisect_right(common, row[0][found[j]][0])
    taken = [i for i in found.tolist() if i >= 0]
    assert taken == sorted(set(taken))


def test_real_tokenizers_align_as_the_recursion_does(real: Any) -> None:  # noqa: F811
    texts = ["And so, my fellow citizens, the insurance programs were extended.", "hahaha  that’s sooo cool"]
    for text in texts:
        a, b = (Vocabulary.of(t).read(t(text, add_special_tokens=False)["input_ids"]) for t in real)
        cost = edit_distances(a, b)

        @cache
        def least(i: Any, j: Any, cost: Any = cost) -> Any:
            if i == j == 0:
                return int(cost[0, 0])
            before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            return int(cost[i, j]) + min(least(*p) for p in before if min(p) >= 0)

        path = align(a, b)
        assert sum(int(cost[p]) for p in path) == least(len(a) - 1, len(b) - 1)
        together = [(i, j) for i, j in path if a[i] == b[j]]
        assert len(together) >= 4
        assert all(align(row, row) == [(i, i) for i in range(len(row))] for row in (a, b))


def labelled_tokens_of(vocabulary: Any) -> Any:
    return [np.array(tokenizer(vocabulary)(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]


def bridge(source: Any, target: Any) -> Any:
    translation = Translation(*(Vocabulary.of(tokenizer(v)) for v in (source, target)))
    return Bridge.between(translation, labelled_tokens_of(source), labelled_tokens_of(target))


def answers(places: Any, size: Any, k: int = 5, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    prob, index = torch.rand(2, places, size, generator=g).softmax(-1).topk(k)
    return index.to(torch.int16), prob.half()


def test_one_tokenizer_is_the_identity() -> None:
    made, plain = bridge(300, 300), Bridge.same(Vocabulary.of(tokenizer(300)), labelled_tokens_of(300))
    assert torch.equal(made.place_R, torch.arange(made.sender_size))
    assert torch.equal(made.place_R, plain.place_R)
    assert made.share == 1.0
    index, prob = answers(made.sender_size, 256)
    for one in (made, plain):
        got, chance = one.carry(index, prob)
        # Specials map by role, ordinary tokens to themselves: nothing changes, bit for bit.
        assert torch.equal(got, index)
        assert torch.equal(chance, prob)
        assert got.dtype == torch.int16


def test_carrying_equals_a_dictionary() -> None:
    over = bridge(300, 330)
    assert 0.1 < over.share < 1.0
    index, prob = answers(over.sender_size, 300)
    index[0, 3, 2:] = -1
    got, chance = over.carry(index, prob)
    teller, hearer = np.concatenate(labelled_tokens_of(300)), np.concatenate(labelled_tokens_of(330))
    for c in range(2):
        for place, origin in enumerate(over.place_R.tolist()):
            sums: dict[int, float] = {}
            if origin >= 0:
                assert over.translation(teller[[origin]]).tolist() == [hearer[place]]
                for token, p in zip(index[c, origin].tolist(), prob[c, origin].float().tolist(), strict=True):
                    if token >= 0 and (to := int(over.translation(np.array([token]))[0])) >= 0:
                        sums[to] = sums.get(to, 0.0) + p
            told = {t: p for t, p in zip(got[c, place].tolist(), chance[c, place].tolist(), strict=True) if t >= 0}
            assert told.keys() == sums.keys()
            assert all(abs(told[t] - p) < 1e-3 for t, p in sums.items())
            falling = chance[c, place].tolist()
            assert falling == sorted(falling, reverse=True)


def test_other_texts_are_refused() -> None:
    over = bridge(300, 330)
    with pytest.raises(LichenError, match="answers of shape"):
        over.carry(*answers(over.sender_size + 1, 300))
    with pytest.raises(LichenError, match="texts on one side"):
        Bridge.between(over.translation, labelled_tokens_of(300)[:2], labelled_tokens_of(330))
