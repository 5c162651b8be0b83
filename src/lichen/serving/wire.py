"""Requests and answers in the OpenAI format, to the letter.

A field that is not known, or that would change nothing here, is refused by name.

References:
    OpenAI. "API reference: Completions, Chat completions, Embeddings, Models."
    https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal, TypeVar, final

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from lichen.serving.contract import ApiError, Completion, Message, TokenLogprob

__all__ = [
    "ChatRequest",
    "EmbeddingsRequest",
    "TextRequest",
    "chat_logprobs",
    "error_body",
    "read_request",
    "text_logprobs",
]

_STOPS = 16
_TOP = 20
_TOKENS = 1_000_000
_SEED = 2**63


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


@final
class _TextPart(_Body):
    type: Literal["text"]
    text: str


@final
class _Turn(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]
    name: str | None = None


@final
class _StreamOptions(_Body):
    include_usage: bool = False


class _Sampled(_Body):
    """What requests for a text and for a chat share."""

    model: str
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_STOPS)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Annotated[FiniteFloat, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=0, le=0)] | None = None
    user: str | None = None

    def settings(self) -> dict[str, Any]:
        """What both have of a :class:`lichen.serving.contract.Completion`; without a seed one is chosen at random."""
        seed = secrets.randbits(31) if self.seed is None else self.seed % _SEED
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return {
            "temperature": 1.0 if self.temperature is None else float(self.temperature),
            "top_p": 1.0 if self.top_p is None else float(self.top_p),
            "seed": seed,
            "stop": stop,
        }

    def counted(self) -> bool:
        """Whether a stream ends with what was counted."""
        return self.stream_options is not None and self.stream_options.include_usage


@final
class ChatRequest(_Sampled):
    """A body of ``/v1/chat/completions``."""

    messages: Annotated[list[_Turn], Field(min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_TOP)] | None = None

    def completion(self) -> Completion:
        """What the model is asked.

        Raises:
            ApiError: if two fields contradict one another.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same: give one", param="max_tokens")
        turns = []
        for turn in self.messages:
            content = turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content)
            turns.append(Message(role="system" if turn.role == "developer" else turn.role, content=content))
        return Completion(
            messages=tuple(turns),
            max_tokens=self.max_tokens if self.max_tokens is not None else self.max_completion_tokens,
            top=(self.top_logprobs or 0) if self.logprobs else None,
            **self.settings(),
        )


@final
class TextRequest(_Sampled):
    """A body of ``/v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=_TOP)] | None = None
    echo: bool | None = None

    def completion(self) -> Completion:
        """What the model is asked; 16 tokens, as the format has it, where no number is given.

        Raises:
            ApiError: if two fields contradict one another.
        """
        if self.echo and self.stream:
            raise ApiError(400, "an echo is not streamed", param="echo")
        most = 16 if self.max_tokens is None else self.max_tokens
        if most < 1 and not self.echo:
            raise ApiError(400, "max_tokens is 0, and nothing is echoed", param="max_tokens")
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return Completion(prompt=prompt, max_tokens=most, top=self.logprobs, **self.settings())


@final
class EmbeddingsRequest(_Body):
    """A body of ``/v1/embeddings``."""

    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float"] | None = None
    user: str | None = None

    def texts(self) -> list[str]:
        """The texts, always as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


_Read = TypeVar("_Read", bound=BaseModel)


def read_request(shape: type[_Read], data: bytes) -> _Read:
    """A body as one of the requests above.

    Raises:
        ApiError: naming the field that is wrong.
    """
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a character") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except ValueError:
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object")
    try:
        return shape.model_validate(value)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Places among the kinds that a field may have are pydantic's own words, not the request's.
        place = [str(part) for part in first["loc"] if isinstance(part, int) or part in _names(shape)]
        name = ".".join(place) or str(first["loc"][0])[:100]
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{name!r} is not known here, or changes nothing", param=name) from None
        raise ApiError(400, f"{name}: {first['msg']}", param=name) from None


def _names(shape: type[BaseModel]) -> set[str]:
    return {*shape.model_fields, "role", "content", "type", "text", "name", "include_usage"}


def chat_logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Log-probabilities in the form of chat completions."""

    def entry(token: str, logprob: float | None) -> dict[str, Any]:
        whole = "�" not in token
        return {"token": token, "logprob": logprob, "bytes": list(token.encode()) if whole else None}

    return {
        "content": [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(text, value) for text, value in one.top]}
            for one in tokens
        ]
    }


def text_logprobs(tokens: tuple[TokenLogprob, ...], start: int = 0) -> dict[str, Any]:
    """Log-probabilities in the older form of completions.

    Args:
        tokens: Of the text.
        start: Where the first of them begins, in characters.
    """
    offsets, at = [], start
    for one in tokens:
        offsets.append(at)
        at += len(one.token)
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [dict(reversed(one.top)) if one.top else None for one in tokens],
        "text_offset": offsets,
    }


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as the format has it."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.param or None,
            "code": error.code or None,
        }
    }
