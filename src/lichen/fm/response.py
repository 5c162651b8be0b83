"""What an endpoint in the OpenAI format may answer, checked to the letter before anybody uses it.

References:
    OpenAI. "API reference: Completions, Chat completions, Embeddings."
    https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, final

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

__all__ = ["Choice", "Completion", "Echo", "Embeddings", "Logprobs", "read_as", "read_object"]

_Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Part(BaseModel):
    """Numbers are numbers and texts are texts; what else stands there is left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


@final
class Usage(_Part):
    """Tokens, where they are counted."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


@final
class Candidate(_Part):
    """A token that could have been next."""

    token: str
    logprob: FiniteFloat


@final
class Position(_Part):
    """What could have stood at one place of a chat's answer."""

    top_logprobs: list[Candidate]


@final
class Logprobs(_Part):
    """Of the first token, in the newer form (``content``) or the older one (``top_logprobs``)."""

    content: list[Position] | None = None
    top_logprobs: list[dict[str, FiniteFloat] | None] | None = None

    def first(self) -> list[tuple[str, float]]:
        """What is listed of the first token; nothing where nothing is."""
        if self.content:
            return [(one.token, one.logprob) for one in self.content[0].top_logprobs]
        return list((self.top_logprobs[0] or {}).items()) if self.top_logprobs else []


@final
class Echo(_Part):
    """Every token of a prompt, where it begins, and its log-probability; the first has none."""

    tokens: list[str]
    text_offset: list[_Count]
    token_logprobs: list[FiniteFloat | None]


@final
class Written(_Part):
    """A chat's answer."""

    content: str | None = None


@final
class Choice(_Part):
    """One answer, as it is kept: a text, a message, and what log-probabilities it has."""

    text: str | None = None
    message: Written | None = None
    logprobs: dict[str, Any] | None = None


@final
class Completion(_Part):
    """The answer to a prompt."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: Usage | None = None


@final
class Vector(_Part):
    """One text's."""

    index: _Count
    embedding: Annotated[list[FiniteFloat], Field(min_length=1)]


@final
class Embeddings(_Part):
    """Vectors of some texts, in any order."""

    data: list[Vector]
    usage: Usage | None = None


_Read = TypeVar("_Read", bound=BaseModel)


def read_as(shape: type[_Read], value: object) -> _Read | None:
    """A value as one of the shapes above; None if it is none."""
    try:
        return shape.model_validate(value)
    except (ValidationError, RecursionError):
        return None


def read_object(data: bytes) -> dict[str, Any]:
    """JSON's object, of whole characters.

    Raises:
        ValueError: if it is no such thing.
    """
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("the answer is nested too deep") from None
    if not isinstance(found, Mapping):
        raise ValueError("the answer is no object")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("the answer holds half a character") from None
    return dict(found)
