"""A transformers model that is served: requests that wait go through it as one batch.

One thread computes. It takes the oldest request and all that wait with the same temperature and nucleus, up to the
size of a batch, and decodes them by :func:`lichen.fm.decoding.decode`: a text depends on its prompt and seed, and on
the others of its batch only through rounding. Whoever comes later waits until the batch has ended.

Legend: V vocabulary, T tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.decoding import decode
from lichen.fm.local import LocalFM
from lichen.fm.tokenization import check_length
from lichen.models.loading.load import frozen_eval
from lichen.serving.contract import ApiError, Completion, Finish, Piece, Prompted, TokenLogprob
from lichen.serving.prompts import Prompts, token_logprob
from lichen.serving.text_pieces import ready_length

__all__ = ["TransformersModel"]

_Result = TypeVar("_Result")

_CHAT_TOKENS = 512
"""Tokens of a chat's answer at most, where the request names no number."""


@final
class _Row:
    """A request on its way through a batch; its pieces go to whoever waits for them."""

    def __init__(self, request: Completion, ids: list[int], max_tokens: int) -> None:
        self.request, self.ids, self.max_tokens = request, ids, max_tokens
        self.pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        self.left = False
        """Whoever asked has gone."""
        self.sent = ""
        self.tokens: list[TokenLogprob] = []

    @property
    def batch_key(self) -> tuple[float, float]:
        return self.request.temperature, self.request.top_p


@final
class TransformersModel:
    """A frozen causal model and its tokenizer.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer, a fast one.
        name: How it is called.
        prompts: How it is asked.
        load_seconds: What loading took.
        batch: Requests that are computed at once, at most.

    Raises:
        LichenError: if the model is not frozen.
    """

    kind = "transformers"

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, prompts: Prompts, load_seconds: float = 0.0, batch: int = 8
    ) -> None:
        frozen_eval(model)
        self.name, self.load_seconds = name, load_seconds
        self._model, self._tokenizer, self._prompts, self._batch = model, tokenizer, prompts, batch
        self._embedder: LocalFM | None = None
        self._closing = False
        self._todo: queue.SimpleQueue[_Row | Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def complete(self, request: Completion) -> Generator[Piece, None, None]:
        """The pieces of an answer; see :meth:`lichen.serving.contract.ServedModel.complete`.

        Raises:
            ApiError: if the prompt is empty, or too long with what is to be written.
        """
        ids = self._prompts.chat(request.messages) if request.messages else self._prompts.text(request.prompt)
        most = request.max_tokens
        if most is None:
            config = self._model.config
            positions = getattr(config, "max_position_embeddings", None)
            most = _CHAT_TOKENS if positions is None else max(1, min(_CHAT_TOKENS, positions - len(ids)))
        self._check([ids], most)
        row = _Row(request, ids, most)
        self._todo.put(row)
        return self._pieces(row)

    def _pieces(self, row: _Row) -> Generator[Piece, None, None]:
        try:
            while True:
                piece = row.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            row.left = True

    def prompt_logprobs(self, prompt: str, top: int) -> Prompted:
        """See :meth:`lichen.serving.contract.ServedModel.prompt_logprobs`.

        Raises:
            ApiError: if the prompt is empty or too long.
        """
        encoding = self._tokenizer(prompt, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), list(encoding["offset_mapping"])
        self._check([ids], 0)

        def score() -> Prompted:
            device = self._model.get_input_embeddings().weight.device
            with torch.inference_mode():
                logits_TV = self._model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu()
            found = []
            for t, (token, (first, end)) in enumerate(zip(ids, offsets, strict=True)):
                if t:
                    logp_V = logits_TV[t - 1].log_softmax(-1)
                    one = token_logprob(self._tokenizer, ids[t - 1], token, logp_V, top)
                    likely, logprob = one.top, one.logprob
                else:
                    likely, logprob = (), None
                found.append(TokenLogprob(token=prompt[first:end], logprob=logprob, top=likely, offset=first))
            return Prompted(tokens=tuple(found))

        return self._scheduled(score)

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """See :meth:`lichen.serving.contract.ServedModel.embed`.

        Raises:
            ApiError: if a text is empty or too long.
        """

        def vectors() -> tuple[list[list[float]], int]:
            if self._embedder is None:
                self._embedder = LocalFM(self._model, self._tokenizer, name=self.name)
            before = self._embedder.usage.tokens_in
            rows = self._embedder.embed(texts).tolist()
            return rows, self._embedder.usage.tokens_in - before

        return self._scheduled(vectors)

    def processes(self) -> tuple[int, ...]:
        """None but this one."""
        return ()

    def close(self) -> None:
        """End the thread, and what it is writing; a process that ended before it would be aborted by torch."""
        self._closing = True
        self._todo.put(None)
        self._thread.join()

    def _check(self, rows: Sequence[Sequence[int]], more: int) -> None:
        try:
            check_length(rows, more, self._model.config)
        except LichenError as error:
            raise ApiError(400, error.what, code="context_length_exceeded" if any(rows) else "") from None

    def _scheduled(self, compute: Callable[[], _Result]) -> _Result:
        """What the computing thread finds, once it comes to it."""
        found: queue.SimpleQueue[_Result | Exception] = queue.SimpleQueue()

        def do() -> None:
            try:
                found.put(compute())
            except Exception as error:
                found.put(error)

        self._todo.put(do)
        result = found.get()
        if isinstance(result, LichenError):
            raise ApiError(400, result.what)
        if isinstance(result, Exception):
            raise result
        return result

    def _work(self) -> None:
        waiting: list[_Row] = []
        while waiting or self._accept(self._todo.get(), waiting):
            while not self._todo.empty():
                if not self._accept(self._todo.get(), waiting):
                    for row in waiting:
                        row.pieces.put(ApiError(503, "the server is closing", kind="server_error"))
                    return
            if not waiting:
                continue
            some = [row for row in waiting if row.batch_key == waiting[0].batch_key][: self._batch]
            waiting = [row for row in waiting if row not in some]
            try:
                self._decode([row for row in some if not row.left])
            except Exception as error:
                for row in some:
                    row.pieces.put(error)

    def _accept(self, one: _Row | Callable[[], None] | None, waiting: list[_Row]) -> bool:
        """Let a request wait for its batch, or do what is no request; false where the thread is to end."""
        if isinstance(one, _Row):
            waiting.append(one)
        elif one is not None:
            one()
        return one is not None

    def _decode(self, rows: list[_Row]) -> None:
        if not rows:
            return

        def watch(n: int, ids: Sequence[int], logits_V: Tensor) -> bool:
            row = rows[n]
            ended = self._closing or row.left or len(ids) >= row.max_tokens
            if row.request.top is not None:
                before = ids[-2] if len(ids) > 1 else row.ids[-1]
                logp_V = logits_V.log_softmax(-1)
                row.tokens.append(token_logprob(self._tokenizer, before, ids[-1], logp_V, row.request.top))
            text = self._text(ids)
            ready, stopped = ready_length(text, row.request.stop)
            if not (ended or stopped) and text[:ready].startswith(row.sent) and ready > len(row.sent):
                row.pieces.put(Piece(text=text[len(row.sent) : ready], tokens=tuple(row.tokens)))
                row.sent, row.tokens = text[:ready], []
            return ended or stopped

        written, _ = decode(
            self._model,
            [row.ids for row in rows],
            seeds=[row.request.seed for row in rows],
            max_new_tokens=max(row.max_tokens for row in rows),
            temperature=rows[0].request.temperature,
            top_p=rows[0].request.top_p,
            ends=self._prompts.ends,
            watch=watch,
        )
        for row, ids in zip(rows, written, strict=True):
            text = self._text(ids)
            ready, stopped = ready_length(text, row.request.stop)
            whole = text[:ready] if stopped else text
            finish: Finish = "length" if len(ids) >= row.max_tokens and not stopped else "stop"
            row.pieces.put(
                Piece(
                    text=whole[len(row.sent) :],
                    tokens=tuple(row.tokens),
                    finish=finish,
                    tokens_in=len(row.ids),
                    tokens_out=len(ids),
                )
            )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
