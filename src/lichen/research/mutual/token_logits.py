"""Reports a language model's top token logits and its loss on public texts.

Research: no recipe and no public name reaches this module.

What leaves is small, and so are its bytes: the ``top_k`` likeliest tokens at every labelled place in two or
four bytes each, their probabilities in two, and a loss for each text, from which the hearers choose whom to
believe (:class:`lichen.research.mutual.select.Select`).

A text's loss is the sum over its tokens in nats. Every text begins with a token that nobody predicts, so
that all models are asked for the whole text, and their sums compare whatever their tokens are.

References:
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224

Legend: C clients, B rows of a batch, N texts, R places with a label, text by text, k answers kept of a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import FAILED, Expected, MetricSpec, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.data.batches.rows import TextShard
from lichen.models.tokens.token_targets import LogitsProvider, top_answers
from lichen.research.mutual.vocabulary import Vocabulary

__all__ = [
    "REPORTED_LOSS",
    "ReportLogits",
    "ReportLogitsState",
    "fitting",
    "labelled_tokens",
    "own_params",
    "public_shard",
    "starts",
]

REPORTED_LOSS = "told/loss"
"""Where a client keeps the losses it told, to compare them with what it hears."""


def fitting(texts: Sequence[str], tokenizers: Sequence[Any], *, most: int) -> tuple[str, ...]:
    """The texts, each cut after a word so that no tokenizer needs more than ``most`` tokens, the first one included.

    Raises:
        LichenError: if nothing of a text is left.
    """

    def fits(text: str) -> bool:
        return all(len(t(text, add_special_tokens=False, verbose=False)["input_ids"]) < most for t in tokenizers)

    cut_texts = []
    for text in texts:
        words = text.split(" ")
        low, high = 0, len(words)
        # Fewer words never need more tokens by much; halving finds a cut, and the last look makes it sure.
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(" ".join(words[:middle])) else (low, middle - 1)
        cut_texts.append(" ".join(words[:low]))
        if not cut_texts[-1].strip():
            raise LichenError(
                f"no word of {text[:40]!r} fits into {most} tokens", where="public texts", fix="allow more tokens"
            )
    return tuple(cut_texts)


def public_shard(texts: Sequence[str], tokenizer: Any, *, begin: int | None = None) -> TextShard:
    """Public texts as rows: a token that begins each and has no label, then the text's own, all labelled.

    Args:
        texts: From :func:`fitting`, so that no row need be cut.
        tokenizer: A transformers tokenizer.
        begin: The first token; None: the tokenizer's begin token, or else its end token.

    Raises:
        LichenError: if the tokenizer has neither, or a text has no token.
    """
    first = next((n for n in (begin, tokenizer.bos_token_id, tokenizer.eos_token_id) if n is not None), None)
    if first is None:
        raise LichenError("the tokenizer has no token to begin with", where="public texts", fix="name one: begin=0")
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise LichenError(f"{text!r} has no token", where="public texts", fix="drop empty texts")
        row = np.array([first, *ids], np.int32)
        rows.append((row, np.concatenate([[-100], row[1:]]).astype(np.int32)))
    return TextShard.of(rows, kind="lm")


def labelled_tokens(public: TextShard) -> list[np.ndarray]:
    """The labelled tokens of each text, the first token left out, for nobody predicts it."""
    return [row[1:][row[1:] != -100] for row in map(np.asarray, public.labels)]


def starts(public: TextShard) -> Tensor:
    """``(N + 1,)`` int64: the place where each text's labelled tokens begin, and where the last one's end."""
    return torch.tensor([0, *np.cumsum([len(row) for row in labelled_tokens(public)])], dtype=torch.int64)


def own_params(job: Job, clients: Sequence[int], own_C: Tree | None, *, personal: bool) -> tuple[Tree, Tree]:
    """``(params_C, fixed)``: the clients' own tensors where ``personal``, which then are not sent, else the job's.

    Raises:
        LichenError: if a client has none of its own, or the job none.
    """
    trainable, fixed = job.shared.trainable, job.shared.fixed
    if personal:
        params_C, _ = trees.split(own_C or {}, "params/")
    else:
        params_C = trees.broadcast(trainable, len(clients))
    if not params_C:
        raise LichenError(
            f"client {clients[0]} holds no trained tensors",
            where=f"job {job.work!r}",
            fix="let it train first" if personal else "send them with the job",
        )
    return params_C, fixed


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReportLogitsState:
    """A block of clients in the middle of telling.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        params_C: Who speaks.
        fixed: Shared tensors without client axis.
        own_C: Private state, carried along.
        reported: ``(place of the client in the block, positions (R',), index (R', k), prob (R', k), loss (R',))``.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    fixed: Tree
    own_C: Tree
    reported: tuple[tuple[int, Tensor, Tensor, Tensor, Tensor], ...] = ()


@final
@dataclass(frozen=True, slots=True)
class ReportLogits:
    """Telling as a client work; serve it with an :class:`lichen.data.batches.shards.EvalSource` of the public texts.

    Args:
        model: Who speaks, C clients at once.
        public: The texts, the same for every client, from :func:`public_shard`.
        vocabulary: The model's; only messages of one vocabulary stack.
        top_k: Tokens told of each place.
        personal: The clients' own tensors speak, and each keeps its losses; else the job's.

    Raises:
        LichenError: if ``top_k`` is not positive, or there is no text.
    """

    model: LogitsProvider
    _: KW_ONLY
    public: TextShard
    vocabulary: Vocabulary
    top_k: int = 16
    personal: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise LichenError(f"{self.top_k} answers a place", where="tell.top_k", fix="use 1 or more")
        if not self.public.size or self.public.kind != "lm":
            raise LichenError("there is no public text", where="tell.public", fix="give some, from public_shard")

    def expected(self, job: Job) -> Expected:
        """Answers at every place, and a loss for each text."""
        count, texts = int(starts(self.public)[-1]), self.public.size
        return Expected(
            group=self._group,
            tensors={
                "index": TensorSpec((count, self.top_k), self._narrow),
                "prob": TensorSpec((count, self.top_k), torch.float16),
                "loss": TensorSpec((texts,), torch.float32),
            },
            metrics={"loss_sum": MetricSpec(0.0), "count": MetricSpec(0.0, count), "failed": FAILED},
            weight=(0.0, texts),
        )

    @property
    def _group(self) -> str:
        return f"tokens/{self.vocabulary.digest}/{self.top_k}"

    @property
    def _narrow(self) -> torch.dtype:
        return torch.int16 if self.vocabulary.size <= 1 << 15 else torch.int32

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> ReportLogitsState:
        """Whoever is to speak; raises as :func:`own_params`."""
        params_C, fixed = own_params(job, clients, own_C, personal=self.personal)
        return ReportLogitsState(
            job=job, clients=tuple(clients), params_C=params_C, fixed=fixed, own_C=dict(own_C or {})
        )

    def step(self, state: ReportLogitsState, batch: Batch) -> ReportLogitsState:
        """What they say of one more batch.

        Raises:
            LichenError: if a row was cut, so that it has fewer labels than the public text.
        """
        begin_N1 = starts(self.public)
        with torch.no_grad():
            every = self.model.positions(state.params_C, state.fixed, batch)
        reported = list(state.reported)
        for c, positions in enumerate(every):
            if not bool(batch["active_C"][c]):
                continue
            row_B = batch["index_CB"][c].cpu()
            real_B = row_B >= 0
            count_B = (batch["labels_CBT"][c].cpu()[:, 1:] != -100).sum(1)
            begin_B, end_B = begin_N1[row_B.clamp(min=0)], begin_N1[row_B.clamp(min=0) + 1]
            if bool((real_B & (count_B != end_B - begin_B)).any()):
                raise LichenError("a public text was cut", where="tell", fix="let the source's max_length hold it")
            pieces = [torch.arange(a, b) for a, b in zip(begin_B[real_B].tolist(), end_B[real_B].tolist(), strict=True)]
            place_R = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)
            index_Rk, prob_Rk, loss_R = (x.cpu() for x in top_answers(positions, self.top_k, size=self.vocabulary.size))
            small = index_Rk.to(self._narrow)
            reported.append((c, place_R, small, prob_Rk.half(), loss_R.double()))
        return replace(state, reported=tuple(reported))

    def final(self, state: ReportLogitsState) -> tuple[Message, Tree | None]:
        """``index`` ``(C, R, k)`` int16 (int32 beyond 32768 tokens), ``prob`` float16, ``loss`` ``(C, N)`` float32.

        A client whose loss is not finite sends losses of zero, and weight 0. The private state, where there is
        any, gains ``told/loss``.
        """
        at, clients = starts(self.public), len(state.clients)
        shape = (clients, int(at[-1]), self.top_k)
        index_CRk = torch.full(shape, -1, dtype=self._narrow)
        prob_CRk = torch.zeros(shape, dtype=torch.float16)
        # Sums by text in double precision: batches of any size give the same single-precision numbers.
        loss_CR = torch.full(shape[:2], torch.nan, dtype=torch.float64)
        for c, place_R, index_Rk, prob_Rk, loss_R in state.reported:
            index_CRk[c, place_R], prob_CRk[c, place_R], loss_CR[c, place_R] = index_Rk, prob_Rk, loss_R
        text_R = torch.repeat_interleave(torch.arange(self.public.size), at[1:] - at[:-1])
        loss_CN = torch.zeros(clients, self.public.size, dtype=torch.float64).index_add_(1, text_R, loss_CR).float()
        finite_C = loss_CN.isfinite().all(1)
        total_C = torch.where(finite_C, loss_CN.double().sum(1), torch.zeros(clients, dtype=torch.float64))
        message = Message(
            group=self._group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((clients,), state.job.version, dtype=torch.int64),
            tensors={"index": index_CRk, "prob": prob_CRk, "loss": torch.where(finite_C[:, None], loss_CN, 0.0)},
            weight_C=finite_C.double() * self.public.size,
            metrics={"loss_sum": total_C, "count": finite_C.double() * shape[1], "failed": (~finite_C).double()},
        )
        return message, {**state.own_C, REPORTED_LOSS: loss_CN} if self.personal else None
