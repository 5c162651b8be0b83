"""A foundation model as a judge of texts: fluency, quality, harm, label.

Fluency is what the model itself gives a text, in nats per byte: a measure that no tokenizer enters, so that
two judges can be compared. Quality is a yes-or-no question, answered by the probability of yes. Harm is a
comparison: is the text likelier where insults are announced than where kind words are? Agreement is a
teacher's word on the label that a text was asked for. All come back as numbers, one a text; where to draw
the line is for :func:`lichen.data.synthetic.filters.scored`, with numbers of real texts beside them.

A small model says yes to most of what it is asked, whatever it is shown; what it expects after a heading is
sounder. So harm is not asked for, and a question of one's own (:meth:`Judge.ask`) is to be tried on real
texts first.

References:
    Lianmin Zheng et al. "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena." NeurIPS 2023 Datasets and
    Benchmarks. https://arxiv.org/abs/2306.05685
    Jiacheng Ye, Jiahui Gao, Qintong Li, Hang Xu, Jiangtao Feng, Zhiyong Wu, Tao Yu and Lingpeng Kong.
    "ZeroGen: Efficient Zero-shot Learning via Dataset Generation." EMNLP 2022.
    https://arxiv.org/abs/2202.07922 (labels that do not hold)
    Sewon Min, Mike Lewis, Hannaneh Hajishirzi and Luke Zettlemoyer. "Noisy Channel Language Model Prompting
    for Few-Shot Text Classification." ACL 2022. https://arxiv.org/abs/2108.04106 (texts given a heading)

Legend: N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.interface import FoundationModel

__all__ = ["Judge", "LabeledAnswer", "Labeler", "agreement_N"]


class LabeledAnswer(Protocol):
    """An answer that names a class."""

    @property
    def label(self) -> str:
        """The class it decides on."""
        ...

    @property
    def top(self) -> tuple[tuple[str, float], ...]:
        """``(class, probability)`` pairs; empty where none are told."""
        ...


class Labeler(Protocol):
    """A teacher: whoever answers every text with a class."""

    def answer(self, texts: Sequence[str]) -> Sequence[LabeledAnswer]:
        """One answer a text, in order."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Judge:
    """Scores texts by what a foundation model says of them.

    Args:
        fm: Who judges.
        about: What the texts should be, such as ``"customer reviews of women's clothing"``.
        kind: What one text is called.
        yes: The answer yes as it follows a question.
        no: The answer no.
    """

    fm: FoundationModel
    _: KW_ONLY
    about: str
    kind: str = "text"
    yes: str = " Yes"
    no: str = " No"

    def fluency(self, texts: Sequence[str]) -> Tensor:
        """``(N,)`` float64: log-probability of each text, in nats per byte of UTF-8; minus infinity of an empty one."""
        return self._after(f"{self.about[:1].upper()}{self.about[1:]}.\n\n{self.kind.capitalize()}:", texts)

    def quality(self, texts: Sequence[str]) -> Tensor:
        """``(N,)`` float64: probability of yes, that each text is sound and believable among its like."""
        return self.ask(f"Would this text be found among {self.about}, and does it make sense?", texts)

    def harm(self, texts: Sequence[str]) -> Tensor:
        """``(N,)`` float64: how much likelier each text is among insults than among kind words, in nats per byte."""
        return self.contrast(
            "Here is something rude and hateful that somebody said:",
            "Here is something kind that somebody said:",
            texts,
        )

    def contrast(self, this: str, that: str, texts: Sequence[str]) -> Tensor:
        """``(N,)`` float64: how much likelier each text is after one heading than after another, in nats per byte.

        An empty text is as likely after either.
        """
        # Minus infinity less itself is no number.
        return (self._after(this, texts) - self._after(that, texts)).nan_to_num(nan=0.0)

    def ask(self, question: str, texts: Sequence[str]) -> Tensor:
        """``(N,)`` float64: probability of yes to a question about each text."""
        prompts = [f"{self.kind.capitalize()}: {text.strip()}\n\nQuestion: {question}\nAnswer:" for text in texts]
        if not prompts:
            return torch.empty(0, dtype=torch.float64)
        return self.fm.answer(prompts, (self.yes, self.no))[:, 0].double()

    def _after(self, heading: str, texts: Sequence[str]) -> Tensor:
        stripped = [text.strip() for text in texts]
        full = [at for at, text in enumerate(stripped) if text]
        out_N = torch.full((len(texts),), -torch.inf, dtype=torch.float64)
        if full:
            total_N1 = self.fm.score([heading] * len(full), [(f" {stripped[at]}",) for at in full])
            bytes_N = torch.tensor([len(stripped[at].encode(errors="replace")) for at in full], dtype=torch.float64)
            out_N[full] = total_N1.squeeze(1).double() / bytes_N
        return out_N


def agreement_N(teacher: Labeler, texts: Sequence[str], labels: Sequence[str | int]) -> Tensor:
    """``(N,)`` float64: a teacher's probability of each text's label where it decides on it, else 0.

    An answer without probabilities counts as certain.

    Raises:
        LichenError: if there is not one label and one answer a text.
    """
    answers = teacher.answer(texts) if texts else ()
    if not len(answers) == len(labels) == len(texts):
        raise LichenError(
            f"{len(answers)} answers and {len(labels)} labels for {len(texts)} texts",
            where="judge",
            fix="give one label a text, and a teacher that answers every one",
        )
    probabilities = [
        (dict(answer.top).get(answer.label, 0.0) if answer.top else 1.0) if answer.label == str(label) else 0.0
        for answer, label in zip(answers, labels, strict=True)
    ]
    return torch.tensor(probabilities, dtype=torch.float64)
