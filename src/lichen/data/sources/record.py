"""One row of data, as every reader makes it and every encoder and partition takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Record"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row.

    Attributes:
        client: Whose it is; empty where the data have no clients of their own.
        text: What is learned or classified.
        prompt: What comes before the text, if anything does.
        label: Its class, if it has one.
        messages: A whole conversation, as :func:`lichen.data.chat.messages.messages_of` gives it.
        group: What must not be torn apart by a split, such as a conversation.
        features: Numbers in place of a text, float32; of a picture the channels first, in [0, 1] in the catalog's data.
        time: When it was written, as the data say it; empty where they do not.
        held_out: Whoever made the data set marked it as a test row; no column of a user's file says so.
        rejected: An answer to the same prompt that somebody liked less than the text.
        rating: How somebody rated the text, if anybody did.
    """

    client: str
    text: str = ""
    prompt: str = ""
    label: str | int | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    group: str = ""
    time: str = ""
    features: np.ndarray | None = field(default=None, compare=False)
    held_out: bool = False
    rejected: str = ""
    rating: float | None = None
