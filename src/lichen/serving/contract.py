"""What a served model is asked, and what it answers, whatever computes it.

An answer comes in pieces, so that whoever reads it need not wait for its end. The last piece says why it ended and
what was counted.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

__all__ = ["ApiError", "Completion", "Finish", "Message", "Piece", "Prompted", "ServedModel", "TokenLogprob"]

Finish = Literal["stop", "length"]
"""Why a text ended: at an end token or a stop text, or because no more was to be written."""


@final
class ApiError(Exception):
    """A request that is refused, or could not be answered.

    Args:
        status: Of HTTP: 400 and more.
        message: One sentence.
        kind: As the OpenAI format calls it: ``invalid_request_error`` or ``server_error``.
        param: The field of the request that it lies in.
        code: One word for it, for programs.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str = "", code: str = ""
    ) -> None:
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        super().__init__(message)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: Its text.
    """

    role: str
    content: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A text to go on with, and how.

    Attributes:
        prompt: The text; empty where there are messages.
        messages: A conversation, whose next turn is written; none for a plain text.
        max_tokens: Tokens written at most; None: as the model has it.
        temperature: 0 takes the likeliest token.
        top_p: Share of the nucleus, in (0, 1].
        seed: The same request with the same seed is the same text.
        stop: The text ends before the first of these.
        top: How many likely tokens are listed with each that is written; None: no log-probabilities.
    """

    prompt: str = ""
    messages: tuple[Message, ...] = ()
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top: int | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and its natural log-probability, before temperature and nucleus.

    Attributes:
        token: Its text, with the blank before it if it has one.
        logprob: 0 or less; None for the first token of a prompt.
        top: The likeliest tokens there, the likeliest first.
        offset: Where it begins in a prompt, in characters.
    """

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    offset: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next part of an answer.

    Attributes:
        text: What comes next; may be empty.
        tokens: Those written since the last piece, where log-probabilities were asked for.
        finish: Why the text ended; None for all but the last piece.
        tokens_in: Tokens of the prompt; of the last piece.
        tokens_out: Tokens written; of the last piece.
    """

    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    tokens_in: int = 0
    tokens_out: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """The log-probability of every token of a prompt."""

    tokens: tuple[TokenLogprob, ...]


class ServedModel(Protocol):
    """A model behind an address. Several threads ask it at once."""

    name: str
    kind: str
    """What computes it: ``transformers`` or ``llama.cpp``."""
    load_seconds: float

    def complete(self, request: Completion) -> Generator[Piece, None, None]:
        """The pieces of an answer; closing the generator ends it early.

        Raises:
            ApiError: if the request cannot be answered.
        """
        ...

    def prompt_logprobs(self, prompt: str, top: int) -> Prompted:
        """The log-probabilities of a prompt's own tokens, with so many likely ones listed at each.

        Raises:
            ApiError: if the model does not give them, or the prompt is empty or too long.
        """
        ...

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """``(vectors of length one, tokens read)``.

        Raises:
            ApiError: if the model gives no vectors, or a text is empty or too long.
        """
        ...

    def processes(self) -> tuple[int, ...]:
        """The processes that its weights lie in."""
        ...

    def close(self) -> None:
        """End it."""
        ...
