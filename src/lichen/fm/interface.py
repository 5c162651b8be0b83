"""The interface of a foundation model: classify, generate, embed; usage and price of every call.

Whoever has no access to weights still has texts and their log-probabilities. :class:`FoundationModel` is
all that methods of this kind may use; :class:`lichen.fm.local.LocalFM` puts it before a local
model, :class:`lichen.fm.http.HttpFM` before any endpoint that speaks the OpenAI format. Who needs
a part of it alone asks for a :class:`Scorer`, a :class:`Generator` or an :class:`Embedder`. What was asked and
what it cost stands in a :class:`Usage`.

References:
    Tianxiang Sun, Yunfan Shao, Hong Qian, Xuanjing Huang and Xipeng Qiu. "Black-Box Tuning for
    Language-Model-as-a-Service." ICML 2022. https://arxiv.org/abs/2201.03514

Legend: C clients, B rows, T tokens, N prompts, K continuations of each, P positions of a soft prompt,
H width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError

__all__ = [
    "Embedder",
    "FoundationModel",
    "Generator",
    "Scorer",
    "SoftModel",
    "Sourced",
    "Usage",
    "answer_by_score",
    "check_choices",
    "check_generation",
    "token_rows",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a model was asked so far.

    Attributes:
        calls: Answers computed or paid for; a batch of a local model is one.
        tokens_in: Tokens read, padding left out.
        tokens_out: Tokens scored or written.
        cached: Answers found on disk instead.
        retries: Calls that failed and were made again.
        missed: Continuations an endpoint did not list, whose log-probability is only known to be low, and
            written answers that name none of the choices.

    >>> Usage(calls=1, tokens_in=8) + Usage(calls=1, retries=2)
    Usage(calls=2, tokens_in=8, tokens_out=0, cached=0, retries=2, missed=0)
    """

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0
    retries: int = 0
    missed: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


class FMBase(Protocol):
    """What every foundation model has."""

    name: str

    @property
    def usage(self) -> Usage:
        """What it was asked so far."""
        ...


class Scorer(FMBase, Protocol):
    """Texts in, log-probabilities out."""

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        """``(N, K)`` float64: log-probability (natural) of each continuation of each prompt, 0 or less.

        Args:
            prompts: N texts.
            continuations: K texts a prompt, each as it follows the prompt, its leading space included.

        Raises:
            LichenError: if the numbers of texts do not fit, or the model cannot be asked so.
        """
        ...


class Generator(FMBase, Protocol):
    """Texts in, texts out."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """What follows each prompt, without the prompt; N texts that depend on their prompt and seed.

        Args:
            prompts: N texts.
            seeds: One a prompt: the same prompt with another seed is another text.
            max_new_tokens: Tokens written at most.
            temperature: Above 0; 0 takes the likeliest token always, whatever the seed.
            top_p: Only the likeliest tokens that together have this probability are drawn from, in (0, 1].
            stop: A text ends before the first of these; they are left out.

        Raises:
            LichenError: if a setting is out of range, or the model cannot write.
        """
        ...


class Embedder(FMBase, Protocol):
    """Texts in, vectors out."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, H)`` float32, rows of length one.

        Raises:
            LichenError: if the model cannot embed.
        """
        ...


class FoundationModel(Scorer, Generator, Embedder, Protocol):
    """All of it, and a choice between few answers."""

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        """``(N, K)`` float64: probabilities of the same K choices after each prompt; rows sum to one.

        Args:
            prompts: N texts, each ending where the answer begins.
            choices: K different texts, each as it follows the prompt, its leading space included.

        Raises:
            LichenError: if there is nothing to choose between, or the model cannot be asked so.
        """
        ...


@runtime_checkable
class Sourced(Protocol):
    """What a foundation model may also have: which weights, or which endpoint, its answers come from."""

    @property
    def source(self) -> str:
        """``sha256:`` and the digest of the weights, or an endpoint's address; and how it is asked, if that matters."""
        ...


class SoftModel(Protocol):
    """A foundation model that also takes a soft prompt: vectors before the text, in place of words.

    An offset ``(P, H)`` moves the prompt away from where the model starts it, in units of the spread of
    the model's own embeddings, so that whoever asks need not see one.
    """

    name: str
    base: str
    """Digest of its weights."""
    positions: int
    """P."""
    width: int
    """H."""

    @property
    def usage(self) -> Usage:
        """What it was asked so far."""
        ...

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without special ones."""
        ...

    def choose(self, rows: Sequence[Sequence[int]], words: Sequence[str], *, offset_PH: Tensor) -> Tensor:
        """``(N, K)`` float32: log-probability of each single-token word, or class name, after each token row."""
        ...

    def follow(
        self, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, offset_PH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(loss, count)``: cross entropy of the labelled tokens (others are -100), summed in nats; their number."""
        ...


def token_rows(batch: Batch, client: int) -> list[tuple[int, list[int]]]:
    """The rows of the client at this place of a batch that are no padding: ``(place among B, tokens)``."""
    lengths = batch["attention_mask_CBT"][client].sum(1).tolist()
    real = batch["index_CB"][client].tolist() if "index_CB" in batch else [0] * len(lengths)
    ids_BT = batch["input_ids_CBT"][client]
    return [(b, ids_BT[b, : lengths[b]].tolist()) for b, index in enumerate(real) if index >= 0]


def answer_by_score(fm: Scorer, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
    """``(N, K)`` float64: the scores of the choices, made to sum to one.

    This is the model's own probability of a choice given that the answer is one of them. Scores are taken
    whole, not by the token: dividing by length would make them no probabilities, and would differ between
    tokenizers. A choice of many tokens is therefore seldom taken; give words of like length, or calibrate.

    Raises:
        LichenError: if there are fewer than two choices, or one is given twice.
    """
    check_choices(choices)
    if not prompts:
        return torch.zeros(0, len(choices), dtype=torch.float64)
    return fm.score(prompts, [tuple(choices)] * len(prompts)).softmax(-1)


def check_choices(choices: Sequence[str]) -> None:
    """Refuse choices that are none.

    Raises:
        LichenError: if there are fewer than two, or one is given twice.
    """
    if len(choices) < 2 or len(set(choices)) != len(choices):
        raise LichenError("nothing to choose between", where="choices", fix="give 2 or more different texts")


def check_generation(
    prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    """Refuse settings of :meth:`Generator.generate` that mean nothing.

    Raises:
        LichenError: naming the setting.
    """
    if len(seeds) != len(prompts):
        raise LichenError(f"{len(seeds)} seeds for {len(prompts)} prompts", where="seeds", fix="give one a prompt")
    if max_new_tokens < 1:
        raise LichenError(f"{max_new_tokens} tokens at most", where="max_new_tokens", fix="write at least one")
    if not 0 <= temperature < float("inf"):
        raise LichenError(f"a temperature of {temperature}", where="temperature", fix="use 0 or more")
    if not 0 < top_p <= 1:
        raise LichenError(f"{top_p} is no share", where="top_p", fix="use a number above 0, at most 1")
