"""The section ``data`` of a recipe: where rows lie, whose they are, and how each owner's are parted."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.data.cards.licences import is_one_licence, licence_of
from lichen.recipes.schema.help import PublicConfig
from lichen.recipes.schema.model import Positive, Section, Share

__all__ = ["DataConfig", "RequireConfig", "refuse_purposes"]

_PURPOSE = re.compile(r"[a-z][a-z0-9_-]{0,59}")
MOST_PURPOSES = 50


class PartitionConfig(Section):
    """Who owns which rows."""

    by: Literal["client", "dirichlet", "iid"] = Field(default="client", description="the data's own owners, or a draw")
    clients: Positive = Field(default=10, description="how many, for a draw")
    alpha: float = Field(default=1.0, gt=0, description="Dirichlet concentration: small is skewed")
    test: Literal["shared", "own"] = Field(
        default="shared",
        description="`shared`: clients that are drawn are scored on one test set, with its share of each class; `own`: "
        "each on its part of its own rows, which have its own shares",
    )


def refuse_purposes(words: tuple[str, ...]) -> tuple[str, ...]:
    """The same words, each a plain one that stands there once.

    Raises:
        ValueError: for any other, as a schema's checker wants it.
    """
    for word in words[: MOST_PURPOSES + 1]:
        if not _PURPOSE.fullmatch(word):
            raise ValueError(f"{clipped(word, 60)!r} is no word; use small letters, such as research or commercial")
        if words.count(word) > 1:
            raise ValueError(f"{word!r} stands there twice; name each once")
    if len(words) > MOST_PURPOSES:
        raise ValueError(f"names more than {MOST_PURPOSES} purposes; use fewer")
    return words


class RequireConfig(Section):
    """What the data card of every owner must say; it must be there, whole, and of these rows."""

    licences: tuple[str, ...] = Field(
        default=(), description="licences that rows may have, by SPDX; none: any", examples=[["MIT", "CC-BY-4.0"]]
    )
    purposes: tuple[str, ...] = Field(
        default=(), description="purposes that each owner must have granted", examples=[["research", "training"]]
    )
    consent: bool = Field(default=False, description="whether each owner must name its lawful basis")
    expired: Literal["refuse", "leave_out"] = Field(
        default="refuse", description="what becomes of the run, or of an owner's rows, whose card has ended"
    )

    @field_validator("licences")
    @classmethod
    def _each_one(cls, licences: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for licence in licences:
                if not is_one_licence(licence_of(licence)):
                    raise ValueError(f"{clipped(licence, 60)!r} is several licences; list them one by one")
            return tuple(map(licence_of, licences))
        except LichenError as error:
            raise ValueError(f"{error.what.replace(';', ',')}; {error.fix}") from None

    @field_validator("purposes")
    @classmethod
    def _words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return refuse_purposes(words)


class DataConfig(Section):
    """The private data of the clients."""

    name: str = Field(
        description="catalog name, hub id, a file (CSV, JSONL, JSON, Parquet), or a folder of them, each a client",
        examples=["mydata.jsonl"],
    )
    columns: dict[
        Literal[
            "client",
            "text",
            "prompt",
            "completion",
            "messages",
            "numbers",
            "label",
            "group",
            "time",
            "chosen",
            "rejected",
            "rating",
        ],
        str | tuple[str, ...],
    ] = Field(default_factory=dict, description="which of your columns plays which role; several are joined in order")
    classes: tuple[str | int, ...] = Field(
        default=(),
        description="classify: only rows with one of these labels; none: all rows, and each has one",
    )
    form: Literal["plain", "transcript", "chat", "messages", "stream"] = Field(
        default="chat",
        description="how a text is put before a language model; `stream`: all of a client's, cut into full rows",
    )
    system: str | None = Field(
        default=None,
        description="forms chat and messages: system message of conversations without one, "
        '`""` for none; none: what the template writes by itself',
        examples=["Answer in one sentence."],
    )
    template: str | None = Field(
        default=None,
        description="forms chat and messages: a Jinja file in place of the tokenizer's chat template",
        examples=["chat.jinja"],
    )
    thinking: bool = Field(
        default=False,
        description="forms chat and messages: the answers hold thoughts, so that the template may open one",
    )
    max_length: Positive = Field(default=64, description="tokens a row at most")
    partition: PartitionConfig = Field(default=PartitionConfig(), description="who owns which rows")
    max_clients: Positive | None = Field(default=None, description="how many clients at most, drawn by the seed")
    min_rows: Positive = Field(default=1, description="clients with fewer rows stay out")
    max_rows: Positive | None = Field(default=None, description="rows a client at most")
    test_rows: Positive | None = Field(
        default=None, description="held-out rows a client at most, for each of valid and test"
    )
    valid: Share = Field(default=0.1, description="share of each client's rows that choose learning rate and round")
    test: Share = Field(default=0.2, description="share of each client's rows that are only scored")
    split_by: Literal["group", "row"] = Field(default="group", description="what stays together in a split")
    on_too_few_rows: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="clients with too few rows or conversations to leave some for every part, and rows of no client",
    )
    on_single_class: Literal["refuse", "keep", "drop"] = Field(
        default="refuse", description="clients whose rows all have one label"
    )
    copies: Literal["count", "keep", "drop"] = Field(
        default="count",
        description="test rows that another client trains on: `count` tells how many, `drop` takes them (and such "
        "validation rows) out of the scores, `keep` does neither",
    )
    public: PublicConfig | None = Field(default=None, description="rows kept out of the federation, for all to see")
    require: RequireConfig | None = Field(
        default=None, description="what the data card of every owner must say before a row is used"
    )
    cards: str | None = Field(
        default=None,
        description="a folder with the data card of each client, `NAME.card.yaml`, where one file holds everybody's "
        "rows; who has none there takes no part",
        examples=["people"],
    )
    labels: Positive | None = Field(
        default=None, description="labelled rows a client has, and as many to choose by; its others lose their labels"
    )

    @model_validator(mode="after")
    def _leave_something(self) -> DataConfig:
        if self.valid + self.test >= 1:
            raise ValueError("data: valid and test leave no rows to train on; keep their sum below 1")
        if "client" in self.columns and self.partition.by != "client":
            raise ValueError(
                f"data.partition.by: {self.partition.by} deals rows out, and data.columns.client says whose they are; "
                "use by: client, or leave the column out"
            )
        if self.cards is not None and self.partition.by != "client":
            raise ValueError(
                f"data.cards: {self.partition.by} deals rows out, and no card is of such clients; remove it, or use "
                "data.partition.by: client"
            )
        return self
