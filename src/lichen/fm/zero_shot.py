"""Zero-shot classification with a foundation model: a probability for each class.

:class:`Teacher` is anything that labels texts, one :class:`Answer` each, and :class:`ZeroShot` makes one of any
model. The text is put into a template that ends where the answer begins, each class is a word, and the
probabilities of the words are calibrated (:mod:`lichen.fm.calibration`). The confidence of an answer is
its top probability.

References:
    Tony Z. Zhao, Eric Wallace, Shi Feng, Dan Klein and Sameer Singh. "Calibrate Before Use: Improving
    Few-Shot Performance of Language Models." ICML 2021. https://arxiv.org/abs/2102.09690
    Han Zhou, Xingchen Wan, Lev Proleev, Diana Mincu, Jilin Chen, Katherine Heller and Subhrajit Roy. "Batch
    Calibration: Rethinking Calibration for In-Context Learning and Prompt Engineering." ICLR 2024.
    https://arxiv.org/abs/2309.17249

Legend: N texts, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, Protocol, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.calibration import at_temperature, divided, fit_temperature
from lichen.fm.interface import FoundationModel

__all__ = ["Answer", "Calibration", "Teacher", "ZeroShot"]

Calibration = Literal["none", "context", "batch"]
_FREE = ("N/A", "[MASK]", "")


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher says of one text.

    Args:
        label: The class it decides on.
        top: ``(class, probability)`` pairs, likeliest first; may be empty where the teacher gives none.
    """

    label: str
    _: KW_ONLY
    top: tuple[tuple[str, float], ...] = ()


class Teacher(Protocol):
    """Anything that answers texts: one call, and no other way in."""

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """One answer a text, in order."""
        ...


@final
@dataclass(frozen=True, slots=True)
class ZeroShot:
    """A teacher that was shown no example.

    Args:
        fm: Whom to ask.
        template: Holds ``{text}`` once, and ends where the answer begins.
        words: For each class the word that stands for it, as it follows the template, its leading space included.
        calibrate: ``context`` divides by the mean over ``free``; ``batch`` by the mean over the texts of the
            call, or over those of :meth:`over`, and expects them to be of all classes; ``none`` leaves things.
        free: Texts without content.
        temperature: Of the calibrated probabilities; see :meth:`fitted`.
        prior: What each class gets anyway, once it is known; see :meth:`over`.

    Raises:
        LichenError: if the template lacks its place, or there are fewer than two classes or words.
    """

    fm: FoundationModel
    _: KW_ONLY
    template: str
    words: Mapping[str, str]
    calibrate: Calibration = "context"
    free: tuple[str, ...] = _FREE
    temperature: float = 1.0
    prior: tuple[float, ...] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1:
            raise LichenError("lacks a place", where="teacher.template", fix="write {text} in it, once")
        if len(self.words) < 2 or len(set(self.words.values())) != len(self.words):
            raise LichenError(
                "classes share a word", where="teacher.label_words", fix="give 2 or more classes, a word each"
            )
        if self.calibrate not in ("none", "context", "batch"):
            raise LichenError(f"no way {self.calibrate!r}", where="teacher.calibrate", fix="use none, context or batch")
        if self.calibrate == "context" and not self.free:
            raise LichenError("no text without content", where="free", fix="give one, such as N/A")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return tuple(self.words)

    def over(self, texts: Sequence[str]) -> ZeroShot:
        """The same teacher with its prior fixed: the mean over these texts, or over ``free`` for ``context``."""
        calibration_texts = self.free if self.calibrate == "context" else texts
        if self.calibrate == "none" or not calibration_texts:
            raise LichenError("nothing to calibrate with", where="teacher.calibrate", fix="use context, or give texts")
        return replace(self, prior=tuple(self._raw(calibration_texts).mean(0).tolist()))

    def fitted(self, texts: Sequence[str], labels: Sequence[str]) -> ZeroShot:
        """The same teacher with the temperature that makes these public labels likeliest (Guo et al., ICML 2017).

        Raises:
            LichenError: if a label is no class, or texts and labels do not pair up.
        """
        if unknown := sorted(set(labels) - set(self.words)):
            raise LichenError(f"no class {unknown[0]!r}", where="labels", fix=f"known: {', '.join(self.classes)}")
        label_N = torch.tensor([self.classes.index(label) for label in labels], dtype=torch.int64)
        return replace(self, temperature=fit_temperature(replace(self, temperature=1.0).chances(texts), label_N))

    def chances(self, texts: Sequence[str]) -> Tensor:
        """``(N, K)`` float64 probabilities, calibrated; rows sum to one."""
        if not texts:
            return torch.zeros(0, len(self.words), dtype=torch.float64)
        chance_NK = self._raw(texts)
        if self.prior is not None:
            chance_NK = divided(chance_NK, torch.tensor(self.prior, dtype=torch.float64))
        elif self.calibrate == "context":
            chance_NK = divided(chance_NK, self._raw(self.free).mean(0))
        elif self.calibrate == "batch":
            chance_NK = divided(chance_NK, chance_NK.mean(0))
        return chance_NK if self.temperature == 1 else at_temperature(chance_NK, self.temperature)

    def answer(self, texts: Sequence[str]) -> list[Answer]:
        """One answer a text, with the probabilities of all classes; of equal ones the first named class wins."""
        answers = []
        for row in self.chances(texts).tolist():
            top = sorted(zip(self.classes, row, strict=True), key=lambda pair: -pair[1])
            answers.append(Answer(top[0][0], top=tuple(top)))
        return answers

    def _raw(self, texts: Sequence[str]) -> Tensor:
        # Cut before anything is put in: a text may hold braces of its own.
        head, tail = self.template.split("{text}")
        return self.fm.answer([head + text + tail for text in texts], tuple(self.words.values()))
