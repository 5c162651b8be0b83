"""Generates training texts with a foundation model, by label and by client, never from a private row.

:meth:`Writer.write` asks for new texts of one label. The prompt says what the texts are about and what the
label means, and varies by attributes that the user lists (article, occasion, tone), since one prompt asked a
thousand times gives one text a thousand times; it may show public examples. :meth:`Writer.rewrite` asks
for variations of texts that are synthetic already: in other words, with some words blanked and filled in
again, or with the end written anew. Every row has a seed of its own, so that a row can be written again.

A model that follows instructions is told what to write. A small or base model does better with ``plain``
prompts: labelled examples in a row, of which it writes the next.

References:
    Jiacheng Ye, Jiahui Gao, Qintong Li, Hang Xu, Jiangtao Feng, Zhiyong Wu, Tao Yu and Lingpeng Kong.
    "ZeroGen: Efficient Zero-shot Learning via Dataset Generation." EMNLP 2022.
    https://arxiv.org/abs/2202.07922
    Yue Yu, Yuchen Zhuang, Jieyu Zhang, Yu Meng, Alexander Ratner, Ranjay Krishna, Jiaming Shen and Chao
    Zhang. "Large Language Model as Attributed Training Data Generator: A Tale of Diversity and Bias."
    NeurIPS 2023. https://arxiv.org/abs/2306.15895
    Chulin Xie et al. "Differentially Private Synthetic Data via Foundation Model APIs 2: Text." ICML 2024.
    https://arxiv.org/abs/2403.01749 (rephrasing and filling in)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, final

from lichen.core.errors import LichenError
from lichen.core.seeds import derive, numpy_generator
from lichen.fm.generation.cleanup import clean, word_count
from lichen.fm.interface import Generator

__all__ = ["Label", "Way", "Writer", "prompt_digest"]

Label = str | int
Way = Literal["rephrase", "fill", "continue"]


def prompt_digest(prompt: str) -> str:
    """A prompt's digest, 16 hex digits: what a pool says of it."""
    return hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:16]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """One text and how it came about.

    Attributes:
        text: The text, cleaned.
        label: What was asked for.
        prompt: Digest of the prompt (16 hex digits); empty where no try was usable and the text is the old one.
        seed: Of the generation.
        client: Whom it was asked for, as it was described to the model.
        tokens: Its part of the tokens its call was charged for, those of unusable tries included.
    """

    text: str
    label: Label
    prompt: str
    seed: int
    client: str = ""
    tokens: int = 0


@final
@dataclass(frozen=True, slots=True)
class Writer:
    """Writes texts of a label, and variations of texts.

    Args:
        fm: Who writes.
        about: What all texts are, such as ``"customer reviews of women's clothing"``.
        labels: What each label means, such as ``{"5": "5 stars, delighted"}``.
        kind: What one text is called.
        attributes: Values to draw one of for every text, by attribute.
        examples: Public ``(label, text)`` pairs, never private rows; those of a label are shown for it.
        shots: Examples in a prompt, at most.
        style: How to write, in words.
        plain: Prompt by examples alone, without instructions.
        ways: How texts are varied, one drawn for each; by default ``continue`` where ``plain``, else the others.
        mask: Share of words blanked by ``fill`` and written anew by ``continue``.
        least: Words of a usable text.
        max_new_tokens: Tokens written, at most.
        temperature: Of the draw.
        top_p: Of the draw.
        stop: Ends a text; where ``plain``, the end of a line does as well.
        max_attempts: Times a text is asked for before it is given up.

    Raises:
        LichenError: if there is no label, an example's label is unknown, or a number is out of range.
    """

    fm: Generator
    _: KW_ONLY
    about: str
    labels: Mapping[Label, str]
    kind: str = "text"
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    examples: Sequence[tuple[Label, str]] = ()
    shots: int = 4
    style: str = ""
    plain: bool = False
    ways: Sequence[Way] = ()
    mask: float = 0.5
    least: int = 5
    max_new_tokens: int = 96
    temperature: float = 0.7
    top_p: float = 0.9
    stop: Sequence[str] = ()
    max_attempts: int = 3

    def __post_init__(self) -> None:
        if not self.labels or not all(self.attributes.values()):
            raise LichenError("no label, or an attribute without values", where="writer", fix="give each one or more")
        for label, _ in self.examples:
            self._meaning(label)
        fitting = ("continue",) if self.plain else ("rephrase", "fill")
        if not set(self.ways) <= set(fitting):
            raise LichenError(
                f"cannot vary by {', '.join(sorted(set(self.ways) - set(fitting)))} here",
                where="writer.ways",
                fix=f"with plain: {str(self.plain).lower()}, use {' or '.join(fitting)}",
            )
        object.__setattr__(self, "ways", tuple(self.ways) or fitting)
        if not 0 < self.mask < 1 or min(self.least, self.max_attempts) < 1 or self.shots < 0:
            raise LichenError(
                "a number is out of range", where="writer", fix="mask between 0 and 1, least and max_attempts 1 or more"
            )

    def fresh(self, label: Label, count: int, seed: int, client: str | None = None) -> list[str]:
        """Texts of :meth:`write`."""
        return [row.text for row in self.write(label, count, seed=seed, client=client or "")]

    def vary(self, texts: Sequence[str], labels: Sequence[Label], seed: int) -> list[str]:
        """Texts of :meth:`rewrite`."""
        return [row.text for row in self.rewrite(texts, labels, seed=seed)]

    def write(self, label: Label, count: int, *, seed: int, client: str = "") -> list[GeneratedText]:
        """New texts of a label; fewer than ``count`` where no try for a row was usable.

        Args:
            label: One of the labels.
            count: How many.
            seed: Row i's prompt and seed follow from it, the label, the client and i.
            client: Whom they are for, in public words such as ``"the dresses department"``.

        Raises:
            LichenError: if the label is unknown.
        """
        self._meaning(label)

        def ask(row: int, attempt: int) -> tuple[str, int]:
            own = derive(seed, "fresh", label, client, row, attempt)
            return self._fresh_prompt(label, client, own), own

        found = self._ask([label] * count, ask, [""] * count)
        return [replace(row, client=client) for row in found if row is not None]

    def rewrite(self, texts: Sequence[str], labels: Sequence[Label], *, seed: int) -> list[GeneratedText]:
        """A variation of every text, in order; where no try was usable, the text as it was.

        Args:
            texts: Synthetic or public ones.
            labels: One a text.
            seed: Row i's prompt and seed follow from it and i.

        Raises:
            LichenError: if the numbers of texts and labels differ, or a label is unknown.
        """
        if len(texts) != len(labels):
            raise LichenError(f"{len(labels)} labels for {len(texts)} texts", where="writer", fix="give one a text")
        heads = [self._head(text) if "continue" in self.ways else "" for text in texts]

        def ask(row: int, attempt: int) -> tuple[str, int]:
            own = derive(seed, "vary", row, attempt)
            return self._vary_prompt(texts[row], labels[row], heads[row], own), own

        found = self._ask(labels, ask, heads)
        old = [
            GeneratedText(text=text, label=label, prompt="", seed=seed)
            for text, label in zip(texts, labels, strict=True)
        ]
        return [before if after is None else after for before, after in zip(old, found, strict=True)]

    def _ask(
        self, labels: Sequence[Label], ask: Callable[[int, int], tuple[str, int]], heads: Sequence[str]
    ) -> list[GeneratedText | None]:
        """One text a label; what is unusable is asked for again with another seed."""
        shown = {" ".join(text.split()).casefold() for _, text in self.examples}
        stop = (*self.stop, "\n") if self.plain else tuple(self.stop)
        before = self.fm.usage.tokens_out
        found: dict[int, GeneratedText] = {}
        for attempt in range(self.max_attempts):
            rows = [row for row in range(len(labels)) if row not in found]
            if not rows:
                break
            queries = [ask(row, attempt) for row in rows]
            generations = self.fm.generate(
                [prompt for prompt, _ in queries],
                seeds=[own for _, own in queries],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                stop=stop,
            )
            for row, (prompt, own), text in zip(rows, queries, generations, strict=True):
                text = clean(f"{heads[row]} {text.strip()}", kind=self.kind, least=self.least, stop=stop)
                if word_count(text) >= self.least and text.casefold() not in shown:
                    found[row] = GeneratedText(text=text, label=labels[row], prompt=prompt_digest(prompt), seed=own)
        tokens_used = self.fm.usage.tokens_out - before
        for place, row in enumerate(sorted(found)):
            found[row] = replace(found[row], tokens=(tokens_used + place) // len(found))
        return [found.get(row) for row in range(len(labels))]

    def _meaning(self, label: Label) -> str:
        if label not in self.labels:
            known = ", ".join(str(one) for one in self.labels)
            raise LichenError(f"no label {label!r}", where="writer.labels", fix=f"known: {known}")
        return self.labels[label]

    def _fresh_prompt(self, label: Label, client: str, seed: int) -> str:
        draw = numpy_generator(seed, "attributes")
        chosen = {name: values[int(draw.integers(len(values)))] for name, values in self.attributes.items()}
        if self.plain:
            description = "; ".join([self._meaning(label), *chosen.values(), *([client] if client else [])])
            return f"{self._row(label, seed)}{self.kind.capitalize()} ({description}):"
        lines = [f"Write one {self.kind} as it would stand among {self.about}.", f"It is: {self._meaning(label)}."]
        lines += [f"{name.capitalize()}: {value}." for name, value in chosen.items()]
        lines += ([f"It is for: {client}."] if client else []) + ([f"Style: {self.style}."] if self.style else [])
        shown = self._shown(label, seed)
        lines += ["", "Such as:", *(f"- {text}" for text in shown), ""] if shown else []
        return "\n".join([*lines, f"Write only the {self.kind}, with nothing before or after it."])

    def _vary_prompt(self, text: str, label: Label, head: str, seed: int) -> str:
        draw = numpy_generator(seed, "way")
        way = self.ways[int(draw.integers(len(self.ways)))]
        if way == "continue":
            return f"{self._row(label, seed)}{self.kind.capitalize()} ({self._meaning(label)}): {head}".rstrip()
        description = self._meaning(label) + (f"; style: {self.style}" if self.style else "")
        if way == "rephrase":
            return f"Say this {self.kind} ({description}) in other words. Write only the new {self.kind}.\n\n{text}"
        words = text.split()
        blanks = set(draw.permutation(len(words))[: max(round(self.mask * len(words)), 1)].tolist())
        masked = " ".join("___" if i in blanks else word for i, word in enumerate(words))
        return (
            f"Fill in every blank (___) so that this becomes a whole {self.kind} ({description}). "
            f"Write only the finished {self.kind}.\n\n{masked}"
        )

    def _shown(self, label: Label, seed: int) -> list[str]:
        """Some public examples of the label, in an order of this row's own."""
        texts = [" ".join(text.split()) for one, text in self.examples if one == label]
        order = numpy_generator(seed, "examples").permutation(len(texts))[: self.shots]
        return [texts[i] for i in order.tolist()]

    def _row(self, label: Label, seed: int) -> str:
        """What stands above the text that a plain prompt asks for."""
        title = self.about[:1].upper() + self.about[1:] + (f", {self.style}" if self.style else "")
        named = f"{self.kind.capitalize()} ({self._meaning(label)})"
        return "\n\n".join([f"{title}.", *(f"{named}: {text}" for text in self._shown(label, seed)), ""])

    def _head(self, text: str) -> str:
        """The words that ``continue`` keeps."""
        words = text.split()
        return " ".join(words[: min(max(round((1 - self.mask) * len(words)), 1), max(len(words) - 1, 0))])
