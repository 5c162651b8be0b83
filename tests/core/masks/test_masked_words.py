"""A masked word tells nothing of the number under it: a classifier that sees its bits does no better than a coin."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from support.masked_talk import Talk

WORDS = 15_000


def words(message: int, *, masked: bool, seed: int) -> NDArray[np.int64]:
    """What the server gets from client 1, all of whose numbers are the same, or what lies under it."""
    draw = np.random.default_rng(seed)
    units = {c: draw.integers(-(2**40), 2**40, WORDS, dtype=np.int64) for c in range(4)}
    units[1] = message + draw.integers(-(2**20), 2**20, WORDS, dtype=np.int64)
    sent: dict[int, NDArray[np.int64]] = {}

    def change(stage: str, client: int, array: NDArray[np.int64]) -> NDArray[np.int64]:
        if stage == "mask":
            sent[client] = array
        return array

    Talk(units, k=3, threshold=3, context=b"%d" % seed, stages={3: 2}, change=change).total()
    return sent[1] if masked else units[1]


def auc(*, masked: bool) -> float:
    """Of telling numbers near 2^40 from numbers near -2^39 by the bits of words, on words that were not trained on."""
    y = np.repeat([0, 1], WORDS)
    trained, tested = (
        np.concatenate([words(2**40, masked=masked, seed=seed), words(-(2**39), masked=masked, seed=seed + 1)])
        for seed in (0, 2)
    )
    bits = [np.unpackbits(w.view(np.uint8)).reshape(-1, 64) for w in (trained, tested)]
    model = LogisticRegression(max_iter=200).fit(bits[0], y)
    return float(roc_auc_score(y, model.predict_proba(bits[1])[:, 1]))


def test_masked_words_of_two_messages_look_alike() -> None:
    found = auc(masked=True)
    print(f"\nAUC {found:.4f}")
    assert 0.48 <= found <= 0.52


def test_words_without_masks_do_not() -> None:
    assert auc(masked=False) > 0.99
