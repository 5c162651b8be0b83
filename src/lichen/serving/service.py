"""Answers requests in the OpenAI format with one model: what a path means, whatever carried it here."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Generator
from typing import Any, final

from lichen.serving.contract import ApiError, Completion, Piece, ServedModel, TokenLogprob
from lichen.serving.wire import (
    ChatRequest,
    EmbeddingsRequest,
    TextRequest,
    chat_logprobs,
    error_body,
    read_request,
    text_logprobs,
)

__all__ = ["Service"]

Reply = dict[str, Any] | Generator[bytes, None, None]
"""A whole answer, or the events of one that is streamed."""

Events = Generator[bytes, None, None]
Pieces = Generator[Piece, None, None]


@final
class Service:
    """One model, by the paths of the format.

    Args:
        model: The model.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self._created = int(time.time())
        self._posts: dict[str, Callable[[bytes], Reply]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._text,
            "/v1/embeddings": self._embeddings,
        }

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET.

        Raises:
            ApiError: if there is nothing of that name.
        """
        card = {"id": self.model.name, "object": "model", "created": self._created, "owned_by": "lichen"}
        if path == "/v1/models":
            return {"object": "list", "data": [card]}
        if path == f"/v1/models/{self.model.name}":
            return card
        if path == "/health":
            return {"status": "ok"}
        raise ApiError(405 if path in self._posts else 404, self._paths(), code="path")

    def post(self, path: str, body: bytes) -> Reply:
        """The answer to a POST.

        Raises:
            ApiError: if there is nothing of that name, or the request is refused.
        """
        if path not in self._posts:
            raise ApiError(404, self._paths(), code="path")
        return self._posts[path](body)

    def _paths(self) -> str:
        return f"there are GET /v1/models and POST {', '.join(self._posts)}"

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            what = f"there is no such model here, but {self.model.name!r}"
            raise ApiError(404, what, param="model", code="model_not_found")

    def _head(self, kind: str, name: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "object": name,
            "created": int(time.time()),
            "model": self.model.name,
        }

    def _chat(self, body: bytes) -> Reply:
        request = read_request(ChatRequest, body)
        self._check_model(request.model)
        completion = request.completion()
        pieces = self.model.complete(completion)
        if request.stream:
            return self._chat_events(completion, pieces, counted=request.counted())
        text, tokens, last = _whole(pieces)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": last.finish}
        choice["logprobs"] = None if completion.top is None else chat_logprobs(tokens)
        return {**self._head("chatcmpl", "chat.completion"), "choices": [choice], "usage": _usage(last)}

    def _chat_events(self, completion: Completion, pieces: Pieces, *, counted: bool) -> Events:
        head = self._head("chatcmpl", "chat.completion.chunk")

        def choice(piece: Piece, first: bool) -> dict[str, Any]:
            delta = {"role": "assistant"} if first else {}
            if piece.text or first:
                delta["content"] = piece.text
            logprobs = chat_logprobs(piece.tokens) if completion.top is not None and piece.tokens else None
            return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

        return _events(head, pieces, choice, counted)

    def _text(self, body: bytes) -> Reply:
        request = read_request(TextRequest, body)
        self._check_model(request.model)
        completion = request.completion()
        if request.echo:
            return self._echo(completion)
        pieces = self.model.complete(completion)
        if request.stream:
            return self._text_events(completion, pieces, counted=request.counted())
        text, tokens, last = _whole(pieces)
        logprobs = None if completion.top is None else text_logprobs(tokens)
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": last.finish}
        return {**self._head("cmpl", "text_completion"), "choices": [choice], "usage": _usage(last)}

    def _text_events(self, completion: Completion, pieces: Pieces, *, counted: bool) -> Events:
        at = 0

        def choice(piece: Piece, first: bool) -> dict[str, Any]:
            nonlocal at
            logprobs = text_logprobs(piece.tokens, at) if completion.top is not None and piece.tokens else None
            at += sum(len(one.token) for one in piece.tokens)
            return {"index": 0, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

        return _events(self._head("cmpl", "text_completion"), pieces, choice, counted)

    def _echo(self, completion: Completion) -> dict[str, Any]:
        """The prompt with its log-probabilities, and what follows it."""
        text, tokens = "", tuple[TokenLogprob, ...]()
        prompt = self.model.prompt_logprobs(completion.prompt, completion.top or 0)
        last = Piece(finish="length", tokens_in=len(prompt.tokens))
        if completion.max_tokens:
            text, tokens, last = _whole(self.model.complete(completion))
        logprobs = None
        if completion.top is not None:
            first, then = text_logprobs(prompt.tokens), text_logprobs(tokens, len(completion.prompt))
            first["text_offset"] = [one.offset for one in prompt.tokens]
            logprobs = {name: first[name] + then[name] for name in first}
        whole = completion.prompt + text
        choice = {"index": 0, "text": whole, "logprobs": logprobs, "finish_reason": last.finish}
        return {**self._head("cmpl", "text_completion"), "choices": [choice], "usage": _usage(last)}

    def _embeddings(self, body: bytes) -> dict[str, Any]:
        request = read_request(EmbeddingsRequest, body)
        self._check_model(request.model)
        vectors, tokens = self.model.embed(request.texts())
        data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.model.name, "usage": usage}


def _whole(pieces: Pieces) -> tuple[str, tuple[TokenLogprob, ...], Piece]:
    """``(text, tokens, last piece)`` of an answer that is waited for."""
    every = list(pieces)
    return "".join(one.text for one in every), tuple(token for one in every for token in one.tokens), every[-1]


def _usage(last: Piece) -> dict[str, int]:
    total = last.tokens_in + last.tokens_out
    return {"prompt_tokens": last.tokens_in, "completion_tokens": last.tokens_out, "total_tokens": total}


def _events(
    head: dict[str, Any],
    pieces: Pieces,
    choice: Callable[[Piece, bool], dict[str, Any]],
    counted: bool,
) -> Events:
    """An answer as server-sent events; a fault within it is the last of them."""
    first, last = True, Piece()
    try:
        for last in pieces:
            yield _event({**head, "choices": [choice(last, first)], **({"usage": None} if counted else {})})
            first = False
    except ApiError as error:
        yield _event(error_body(error))
        return
    finally:
        pieces.close()
    if counted:
        yield _event({**head, "choices": [], "usage": _usage(last)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
