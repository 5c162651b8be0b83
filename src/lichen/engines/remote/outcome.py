"""What came of a client's order, read from its frames: whatever is in them, it is an outcome or an error."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple, final

from lichen.core.errors import LichenError
from lichen.core.wire.frames import read_frame, unpack_error
from lichen.engines.remote.errands import SAME

__all__ = ["Answered", "Question", "read_outcome"]

_MOST_MESSAGES = 10_000
"""To one job; the rest is not read."""


@final
class Answered(NamedTuple):
    """The first message of a client to its job, and how many came."""

    first: bytes
    messages: int


@final
@dataclass(frozen=True, slots=True)
class Question:
    """What a client asks."""

    data: bytes


def read_outcome(frames: bytes) -> Answered | Question | LichenError:
    """What a client's frames are: its question, its messages, or an error."""
    source, first, count = io.BytesIO(frames), b"", 0
    while True:
        try:
            frame = read_frame(source)
        except LichenError:
            return LichenError("answered with bytes that are no frames", where="node", fix=SAME)
        if frame is None:
            return LichenError("answered a job with half of its frames", where="node", fix=SAME)
        kind, body = frame
        if kind == b"E":
            return unpack_error(body)
        if kind == b"Q" and not count:
            return Question(body)
        if kind == b".":
            break
        if kind != b"M":
            return LichenError(f"answered with a frame {kind!r}", where="node", fix=SAME)
        first, count = first or body, count + 1
        if count > _MOST_MESSAGES:
            what = f"answered one job with more than {_MOST_MESSAGES} messages"
            return LichenError(what, where="node", fix=SAME)
    if not count:
        return LichenError("answered a job with no message", where="node", fix=SAME)
    return Answered(first, count)
