"""Filters synthetic texts, and reports every row that was rejected.

What a foundation model writes is of uneven worth: it repeats itself, drifts into signs and other tongues,
says one thing a hundred times. A :class:`Rule` looks at the texts still alive and names those that
must go, with a reason; a :class:`Filter` applies rules in order and tells what became of every single
row. Rules are pure: the same texts give the same answer, and sifting what was kept drops nothing more.

Copies of private rows are found where those rows are, by :class:`lichen.data.synthetic.near_duplicates.NearDuplicates`;
their answer comes in as bits through :func:`flagged`. Scores of a judge come in through :func:`scored`.

References:
    Jack W. Rae et al. "Scaling Language Models: Methods, Analysis & Insights from Training Gopher." 2021.
    https://arxiv.org/abs/2112.11446 (repetition and quality rules)
    Yue Yu, Yuchen Zhuang, Jieyu Zhang, Yu Meng, Alexander Ratner, Ranjay Krishna, Jiaming Shen and Chao
    Zhang. "Large Language Model as Attributed Training Data Generator: A Tale of Diversity and Bias."
    NeurIPS 2023. https://arxiv.org/abs/2306.15895
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lichen.core.errors import LichenError
from lichen.data.synthetic.near_duplicates import NearDuplicates, twins, words

__all__ = ["Filter", "Rule", "Sifted", "copied", "duplicates", "flagged", "foreign", "junk", "length", "repetition"]
__all__ += ["scored"]

Rule = Callable[[Sequence[str], Sequence[int]], Mapping[int, str]]
"""``(all texts, positions still alive) -> {position that must go: why}``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sifted:
    """What became of every row.

    Attributes:
        passed: Positions, rising.
        dropped: ``(rule, reason)`` by position.
        rules: Names of the rules, in order.
    """

    passed: tuple[int, ...]
    dropped: Mapping[int, tuple[str, str]]
    rules: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Rows dropped by each rule, those by none included."""
        found = Counter(rule for rule, _ in self.dropped.values())
        return {rule: found[rule] for rule in self.rules}

    def __str__(self) -> str:
        of = len(self.passed) + len(self.dropped)
        return "; ".join([f"kept {len(self.passed)} of {of}", *(f"{rule} {n}" for rule, n in self.counts.items() if n)])


@final
@dataclass(frozen=True, slots=True)
class Filter:
    """Rules by name, applied in order, each to what those before it left.

    Raises:
        LichenError: if a rule names a row it was not asked about.

    >>> sifted = Filter({"length": length(least=2), "duplicates": duplicates()})(["ok", "It fits.", "it FITS"])
    >>> print(sifted, "|", sifted.dropped[2])
    kept 1 of 3; length 1; duplicates 1 | ('duplicates', 'says what row 1 says')
    """

    rules: Mapping[str, Rule]

    def __call__(self, texts: Sequence[str]) -> Sifted:
        """Sift some texts."""
        alive = list(range(len(texts)))
        dropped: dict[int, tuple[str, str]] = {}
        for name, rule in self.rules.items():
            gone = rule(texts, tuple(alive))
            if not gone.keys() <= set(alive):
                raise LichenError(
                    f"rule {name!r} drops rows it was not asked about",
                    where="filters",
                    fix="drop positions among those alive",
                )
            dropped |= {at: (name, why) for at, why in gone.items()}
            alive = [at for at in alive if at not in gone]
        return Sifted(passed=tuple(alive), dropped=dict(sorted(dropped.items())), rules=tuple(self.rules))


def length(*, least: int = 3, most: int = 400) -> Rule:
    """Texts of fewer than ``least`` or more than ``most`` words go."""

    def why(text: str) -> str:
        count = len(words(text))
        return "" if least <= count <= most else f"has {count} words, not {least} to {most}"

    return _each(why)


def repetition(*, size: int = 3, most: float = 0.3) -> Rule:
    """Texts go of whose runs of ``size`` words more than the share ``most`` are repeats of earlier ones."""

    def why(text: str) -> str:
        found = words(text)
        runs = [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]
        share = 1 - len(set(runs)) / len(runs) if runs else 0.0
        return f"{share:.0%} of its runs of {size} words are repeats" if share > most else ""

    return _each(why)


def junk(*, letters: float = 0.6) -> Rule:
    """Texts go with an unreadable sign, or less than a share ``letters`` of letters of any script among their signs."""

    def why(text: str) -> str:
        signs = [unicodedata.category(sign) for sign in text if not sign.isspace()]
        if "\ufffd" in text or any(kind in ("Cc", "Cn", "Co", "Cs") for kind in signs):
            return "has unreadable signs"
        # Marks are parts of letters in many scripts.
        share = sum(kind[0] in "LM" for kind in signs) / len(signs) if signs else 0.0
        return "" if share >= letters else f"{share:.0%} of its signs are letters"

    return _each(why)


def foreign(known: Iterable[str], *, least: float = 0.5) -> Rule:
    """Texts go of whose words less than a share ``least`` occurs in ``known`` texts of the right language and field.

    Args:
        known: Public texts, as many as there are; the more, the fairer.
        least: Share, from 0 to 1.
    """
    vocabulary = {word for text in known for word in words(text)}

    def why(text: str) -> str:
        found = words(text)
        share = sum(word in vocabulary for word in found) / len(found) if found else 0.0
        return "" if share >= least else f"{share:.0%} of its words are known"

    return _each(why)


def duplicates(*, threshold: float = 0.7, size: int = 3, against: Sequence[str] = ()) -> Rule:
    """Texts go that say nearly what one before them says (:func:`lichen.data.synthetic.near_duplicates.twins`).

    Args:
        threshold: Jaccard similarity of word shingles from which two texts are near.
        size: Words of a shingle.
        against: Public texts that count as being before, such as the examples a writer was shown.
    """

    def rule(texts: Sequence[str], alive: Sequence[int]) -> dict[int, str]:
        first = twins([texts[at] for at in alive], against=against, threshold=threshold, size=size)
        before = [f"given text {i}" for i in range(len(against))] + [f"row {at}" for at in alive]
        return {at: f"says what {before[twin]} says" for at, twin in zip(alive, first, strict=True) if twin >= 0}

    return rule


def copied(private: NearDuplicates) -> Rule:
    """Drop copies of private rows, for whoever holds the rows; else see :mod:`lichen.clients.statistics.leakage`."""

    def rule(texts: Sequence[str], alive: Sequence[int]) -> dict[int, str]:
        found = private.found([texts[at] for at in alive])
        return {at: f"copies a private row: {reason}" for at, reason in zip(alive, found, strict=True) if reason}

    return rule


def flagged(bits: Sequence[bool], *, reason: str = "a client flagged it as a copy of a private row") -> Rule:
    """Texts go whose bit is set; one bit for every text the filter is given."""

    def rule(texts: Sequence[str], alive: Sequence[int]) -> dict[int, str]:
        _fits(len(bits), len(texts), "bits")
        return {at: reason for at in alive if bits[at]}

    return rule


def scored(scores: Sequence[float], *, least: float | None = None, most: float | None = None) -> Rule:
    """Texts go whose score is under ``least``, over ``most`` or no number; one score for every text given."""

    def rule(texts: Sequence[str], alive: Sequence[int]) -> dict[int, str]:
        _fits(len(scores), len(texts), "scores")
        low, high = float("-inf") if least is None else least, float("inf") if most is None else most
        return {at: f"scores {scores[at]:.4g}" for at in alive if not low <= scores[at] <= high}

    return rule


def _each(why: Callable[[str], str]) -> Rule:
    """A rule that looks at every text alone."""

    def rule(texts: Sequence[str], alive: Sequence[int]) -> dict[int, str]:
        return {at: reason for at in alive if (reason := why(texts[at]))}

    return rule


def _fits(given: int, texts: int, what: str) -> None:
    if given != texts:
        raise LichenError(f"{given} {what} for {texts} texts", where="filters", fix="give one a text, in their order")
