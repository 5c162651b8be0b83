"""Roles of columns, common names of columns, and the user's wishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

from lichen.recipes.init.facts import ColumnFacts

__all__ = ["HOLDS", "NAMES", "QUESTIONS", "Ask", "Roles", "Wishes", "named"]

Ask = Callable[[str, Sequence[str]], int]
"""``(question, answers) -> the number of the one that was chosen``."""

NAMES: dict[str, tuple[str, ...]] = {
    "client": (
        *("client", "client_id", "user", "user_id", "userid", "username", "sender", "speaker", "author", "owner"),
        *("customer", "customer_id", "hospital", "site", "site_id", "device", "device_id", "institution", "person"),
        *("person_id", "patient_id", "annotator", "annotator_id", "reviewer", "reviewerid", "reviewer_id", "subject"),
    ),
    "place": (
        *("company", "organisation", "organization", "org", "institute", "bank", "store", "shop", "branch", "clinic"),
        *(
            "department",
            "department_name",
            "division",
            "division_name",
            "unit",
            "school",
            "team",
            "vendor",
            "seller",
            "publisher",
            "newspaper",
        ),
        *("city", "state", "region", "province", "country", "zip", "zip_code", "zipcode", "postcode", "postal_code"),
    ),
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
    "prompt": ("instruction", "prompt", "question", "query", "problem", "input", "source", "document", "article"),
    "context": ("input", "context", "passage", "background", "paragraph", "story", "article", "document"),
    "system": ("system", "system_prompt"),
    "completion": (
        *("completion", "response", "answer", "output", "reply", "answers", "solution", "target_text", "target"),
        *("summary", "highlights", "translation"),
    ),
    "label": (
        *("label", "labels", "class", "category", "sentiment", "emotion", "intent", "topic", "product", "rating"),
        *("stars", "score", "overall", "genre", "polarity", "stance", "toxic", "spam", "y", "target", "type", "tag"),
    ),
    "text": (
        *("text", "body", "content", "sentence", "utterance", "review", "comment", "message", "document", "tweet"),
        *("post", "narrative", "complaint", "description", "abstract", "article", "question", "prompt"),
    ),
    "numbers": ("numbers", "features", "pixels", "image", "x", "pixel_values", "values", "data", "embedding"),
    "group": (
        *("group", "group_id", "conversation_id", "thread", "thread_id", "session", "session_id", "document_id"),
        *("dialogue_id", "ticket", "ticket_id"),
    ),
    "time": (
        *("time", "date", "timestamp", "datetime", "created_at", "created", "written_at", "published", "published_at"),
        *("date_received", "posted_at", "start", "start_time", "day", "month", "year"),
    ),
}

QUESTIONS = frozenset(("question", "query", "problem"))
"""Prompts that come after their context, where an instruction comes before it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user said: names of columns, a task, a model; None and () where it is for us to see."""

    task: str | None = None
    client: str | None = None
    label: str | None = None
    text: str | None = None
    prompt: tuple[str, ...] = ()
    completion: str | None = None
    model: str | None = None


@final
@dataclass(slots=True, kw_only=True)
class Roles:
    """Which column plays which role, and why others play none.

    Attributes:
        shape: What the data were taken for, in words.
        task: What is learned from it.
        columns: By role; several where they are joined.
        left: Columns that are left out, each with the reason.
        turns: Answers are lists of turns.
    """

    shape: str = ""
    task: str = "chat"
    columns: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    turns: bool = False

    @property
    def used(self) -> set[str]:
        """Every column with a role."""
        found: set[str] = set()
        for some in self.columns.values():
            found.update((some,) if isinstance(some, str) else some)
        return found


HOLDS: dict[str, str] = {
    "empty": "empty", "turns": "conversations", "numbers": "lists of numbers", "list": "lists",
    "object": "objects", "bytes": "bytes", "truth": "true or false", "number": "numbers", "real": "numbers",
    "date": "dates", "link": "addresses", "id": "ids", "word": "words", "text": "texts",
}  # fmt: skip
"""What a column of each kind holds, in words."""


def named(role: str, columns: Sequence[ColumnFacts], fits: Callable[[ColumnFacts], bool]) -> ColumnFacts | None:
    """The column that is called what this role is called most, among those that fit."""
    for known in NAMES[role]:
        for column in columns:
            if column.plain == known and fits(column):
                return column
    return None
