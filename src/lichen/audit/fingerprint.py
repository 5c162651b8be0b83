"""Fingerprints of owners: secret questions whose answers a model can have from their rows alone, and a claim by them.

An owner has a key. From it follow pairs of a question, five words without a sense, and an answer, one word of 64. A
model that was never trained on the pairs finds the answer by chance, whatever it knows: the answer was drawn without
regard to anything. So the number of answers that it ranks first among the 64 is binomial, and the chance of as many is
exact. A claim holds where the model has so many that chance is out of the question, and the bare model has not.

The digest of the key is registered before training, so that nobody can choose a key afterwards by what a model happens
to say; a key that was chosen before it by what the bare model says shows in the bare model's own matches.

References:
    Jiashu Xu, Fei Wang, Mingyu Derek Ma, Pang Wei Koh, Chaowei Xiao and Muhao Chen. "Instructional Fingerprinting of
    Large Language Models." NAACL 2024. https://arxiv.org/abs/2401.12255 (secret pairs in an adapter)
    Bowen Li, Lixin Fan, Hanlin Gu, Jie Li and Qiang Yang. "FedIPR: Ownership Verification for Federated Deep Neural
    Network Models." TPAMI 2022. https://arxiv.org/abs/2109.13236 (a watermark of each owner)
"""

from __future__ import annotations

import hashlib
from typing import Any, final

from lichen.audit.answer_scores import answer_scores
from lichen.core.errors import LichenError
from lichen.core.secret.randomness import SecretRandomness

__all__ = ["ANSWERS", "PAIRS", "Fingerprint", "chance", "matches"]

PAIRS = 16
"""Of a key."""

_WORDS = (
    "apple bread chair river stone cloud horse grass house light music paper queen sugar table train "
    "water wheel green brown happy quick small large north south winter summer money doctor letter "
    "island bridge garden window kitchen school market mother father sister brother friend animal flower "
    "forest mountain morning evening number picture story planet engine butter coffee orange silver "
    "golden rabbit monkey turtle dragon castle"
)

ANSWERS = tuple(_WORDS.split())
"""A power of two of them, so that a uniform number names one without a bias."""

WORDS = 5
"""Of a question."""


@final
class Fingerprint:
    """The pairs of a key.

    Args:
        key: Whose numbers they follow from.
        digest: Of the key, as it is registered.
    """

    __slots__ = ("_key", "digest")

    def __init__(self, key: SecretRandomness, digest: str) -> None:
        self._key, self.digest = key, digest

    @classmethod
    def of(cls, key: bytes) -> Fingerprint:
        """That of 32 secret bytes."""
        return cls(SecretRandomness(key), hashlib.sha256(b"lichen fingerprint\x1f" + key).hexdigest())

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """``(question, answer)``, :data:`PAIRS` of them."""
        words = self._key.stream("fingerprint").words(PAIRS * (WORDS + 1)).reshape(PAIRS, WORDS + 1)
        rows = [[ANSWERS[int(word) % len(ANSWERS)] for word in row] for row in words]
        return tuple((" ".join(row[:WORDS]), row[WORDS]) for row in rows)


def chance(found: int, pairs: int = PAIRS) -> float:
    """How likely a model that was not trained on them finds as many answers, or more.

    >>> chance(0), chance(16) < 1e-28
    (1.0, True)
    """
    from scipy import stats

    return float(stats.binom.sf(found - 1, pairs, 1 / len(ANSWERS)))


def matches(model: Any, ask: Any, tokenizer: Any, fingerprint: Fingerprint) -> int:
    """How many questions have their answer as the most likely one of all :data:`ANSWERS`.

    Args:
        model: A causal language model of transformers.
        ask: From a question to the tokens that stand before an answer.
        tokenizer: Of the answers.
        fingerprint: The pairs.

    Raises:
        LichenError: if the tokenizer has no tokens for an answer.
    """
    answers = [list(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ANSWERS]
    if not all(answers):
        raise LichenError(
            "its tokenizer has no tokens for words", where="model", fix="name a model that writes English"
        )
    found = 0
    for question, answer in fingerprint.pairs():
        scores = answer_scores(model, ask(question), answers)
        found += max(range(len(scores)), key=scores.__getitem__) == ANSWERS.index(answer)
    return found
