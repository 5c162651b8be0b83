"""The data card: what an owner says of its rows, in ``card.yaml`` beside them.

A card is read as strictly as a recipe. What its owner has not filled in yet is null, and is asked for where a recipe's
``data.require`` needs it.

References:
    Regulation (EU) 2016/679 (General Data Protection Regulation), Article 6: the six lawful bases of processing.
    Pushkarna, Zaldivar, Kjartansson. "Data Cards: Purposeful and Transparent Dataset Documentation for Responsible AI".
    ACM FAccT, 2022. arXiv:2204.01075.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.visible import clipped, visible
from lichen.data.cards.card_files import card_place, rows_sha256
from lichen.data.cards.licences import licence_of
from lichen.recipes.schema.data import refuse_purposes
from lichen.recipes.schema.explain import choices
from lichen.recipes.schema.model import Section
from lichen.recipes.schema.strict import check, plain, read_mapping, text_of

__all__ = ["DataCard", "card_text", "read_card", "renew_card", "write_card"]

LARGEST = 32 * 1024
"""Bytes of a card at most."""

MOST_LETTERS = 1000
"""Of one of its texts."""

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DIGEST_LINE = re.compile(r"(?m)^rows_sha256:[^\n]*$")
_FIX = "write one: lichen card DATA --write"


class DataCard(Section):
    """What an owner says of its rows."""

    owner: str | None = Field(default=None, description="who answers for the rows", examples=["Clinic North"])
    source: str | None = Field(
        default=None,
        description="where the rows come from: a sentence, or an address",
        examples=["Letters of 2025, without names"],
    )
    rows_sha256: str | None = Field(
        default=None, description="digest of the rows; lichen card DATA --write makes it", examples=["0" * 64]
    )
    licence: str | None = Field(
        default=None,
        description="an SPDX expression, or LicenseRef-NAME for terms of your own",
        examples=["MIT OR Apache-2.0"],
    )
    consent: (
        Literal[
            "consent",
            "contract",
            "legal_obligation",
            "vital_interests",
            "public_task",
            "legitimate_interests",
            "none_needed",
        ]
        | None
    ) = Field(default=None, description="lawful basis, of GDPR Art. 6; none_needed: the rows are about nobody")
    purposes: tuple[str, ...] = Field(
        default=(), description="what the rows may be used for, in words", examples=[["research", "training"]]
    )
    until: str | None = Field(
        default=None,
        description="the last day on which they may be used, in UTC; null: no end",
        examples=["2027-12-31"],
    )
    contact: str | None = Field(default=None, description="whom to ask", examples=["data@example.org"])

    @field_validator("owner", "source", "contact")
    @classmethod
    def _lines(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is blank; fill it in, or write null")
        if text is not None and (len(text) > MOST_LETTERS or "\n" in text or visible(text) != text):
            raise ValueError(f"is no line of at most {MOST_LETTERS} letters; use one plain line")
        return text

    @field_validator("rows_sha256")
    @classmethod
    def _hex(cls, text: str | None) -> str | None:
        if text is not None and not _DIGEST.fullmatch(text):
            raise ValueError("is no digest of 64 small hex digits; lichen card DATA --write makes it")
        return text

    @field_validator("licence")
    @classmethod
    def _spdx(cls, text: str | None) -> str | None:
        if text is None:
            return None
        try:
            return licence_of(text)
        except LichenError as error:
            raise ValueError(f"{error.what.replace(';', ',')}; {error.fix}") from None

    @field_validator("purposes")
    @classmethod
    def _words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return refuse_purposes(words)

    @field_validator("until")
    @classmethod
    def _day(cls, text: str | None) -> str | None:
        try:
            if text is not None and (not _DAY.fullmatch(text) or not date.fromisoformat(text)):
                raise ValueError
        except ValueError:
            raise ValueError(f"{clipped(str(text), 40)!r} is no day; write YYYY-MM-DD, or null") from None
        return text

    @property
    def blank(self) -> bool:
        """Whether nobody has filled anything in but the digest."""
        return self.model_copy(update={"rows_sha256": None}) == DataCard()

    def ended(self, today: date) -> bool:
        """Whether its last day is over."""
        return self.until is not None and date.fromisoformat(self.until) < today


def card_text(card: DataCard) -> str:
    """A card as YAML, with the meaning of each key behind it; :func:`read_card` reads it back equal."""
    lines = ["# What the owner says of these rows: fill in what is null. See docs/guide.md, Data cards."]
    for name, value in card.model_dump(mode="json").items():
        comment = str(DataCard.model_fields[name].description)
        if words := choices(DataCard.model_fields[name].annotation):
            comment += f"; one of: {', '.join(words)}"
        lines += [f"# {comment}", f"{name}: {json.dumps(value, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def read_card(path: Path) -> tuple[DataCard, str]:
    """A card and the SHA-256 of its file.

    Raises:
        LichenError: for whatever is no card, with the file and the key.
    """
    try:
        if not path.is_file():
            raise LichenError("is no file", where=str(path), fix=_FIX)
        if path.stat().st_size > LARGEST:
            what = f"is larger than {LARGEST // 1024} KiB, which no data card is"
            raise LichenError(what, where=str(path), fix=_FIX)
        data = path.read_bytes()
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from None
    except ValueError:
        raise LichenError("is no file", where=repr(str(path)), fix=_FIX) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LichenError("is not a text file", where=str(path), fix="save it as UTF-8") from None
    return _card_in(text, path), hashlib.sha256(data).hexdigest()


def _card_in(text: str, path: Path) -> DataCard:
    values: Any = read_mapping(text, where=str(path), kind="data card", fix=_FIX)
    try:
        return check(DataCard, dict(plain(values, "recipe")))
    except LichenError as error:
        raise LichenError(error.what, where=f"{path}, {error.where}", fix=error.fix) from None


def write_card(rows: Path) -> Path | None:
    """Write a card for a file or folder of rows, to be filled in; None where there is one already.

    Raises:
        LichenError: if the rows cannot be read, or the card not written.
    """
    place = card_place(rows)
    if place.exists() or place.is_symlink():
        return None
    _write(place, card_text(DataCard(rows_sha256=rows_sha256(rows))))
    return place


def renew_card(rows: Path) -> bool:
    """Write the rows' digest into their card, and leave all else as it stands; whether it was another one.

    Raises:
        LichenError: if there is no card, or it cannot be read or written.
    """
    place, now = card_place(rows), rows_sha256(rows)
    card, _ = read_card(place)
    if card.rows_sha256 == now:
        return False
    text = text_of(place, kind="data card")
    line = f'rows_sha256: "{now}"'
    new = _DIGEST_LINE.sub(line, text, count=1) if _DIGEST_LINE.search(text) else f"{text.rstrip()}\n{line}\n"
    renewed = card.model_copy(update={"rows_sha256": now})
    try:
        good = _card_in(new, place) == renewed
    except LichenError:
        good = False
    if not good:  # such as in a card in braces
        raise LichenError("has its digest where it cannot be renewed", where=str(place), fix=f"write {line} on a line")
    _write(place, new)
    return True


def _write(place: Path, text: str) -> None:
    try:
        write_atomic(place, text.encode(), shared=True)
    except OSError as error:
        raise LichenError(f"cannot be written: {error.strerror}", where=str(place), fix="check its folder") from None
