"""Ratings of conversations: a column of the catalog's chats where it is asked for, and cells of a user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.data.chat.preference_rows import answers_of, rating_of
from lichen.data.sources.readers import chitchat

THREE = {"witty": 9, "upbeat": 6, "interesting": 3}


def turn(who: str, text: str) -> list[dict[str, Any]]:
    return [{"sender": who, "text": text, "timestamp": "2018-04-01T00:00:00"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chats = {
        "a": {"messages": [turn("ann", "hi there"), turn("bob", "hello you")], "ratings": THREE},
        "b": {"messages": [turn("ann", "any news")], "ratings": dict.fromkeys(THREE, 5)},  # nobody moved them
        "c": {"messages": [turn("bob", "none at all")]},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(chats), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("column", "first"), [("rating", 6.0), ("witty", 9.0), ("interesting", 3.0)])
def test_a_conversation_is_rated_by_three_or_one(folder: Path, column: str, first: float) -> None:
    assert [record.rating for record in chitchat(folder, {"rating": column})] == [first, first, None, None]
    assert {record.rating for record in chitchat(folder, {})} == {None}
    with pytest.raises(LichenError, match="chitchat has no column 'stars'"):
        chitchat(folder, {"rating": "stars"})


def test_ratings_are_numbers_or_truths() -> None:
    assert [rating_of(x, "liked", "row 1") for x in (True, "no", 3, "2.5", None, " ")] == [
        1.0,
        0.0,
        3.0,
        2.5,
        None,
        None,
    ]
    for cell in ("good", "nan", "inf"):
        with pytest.raises(LichenError, match="which is no rating"):
            rating_of(cell, "liked", "row 1")


def user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def answer(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


KNOWN = {role: (role,) for role in ("prompt", "chosen", "rejected")}


def test_turns_of_a_prompt_stand_before_the_answers_or_within_them() -> None:
    apart = {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]}
    within = {"chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("c")]}
    first, second = (answers_of(row, KNOWN, "row 1") for row in (apart, within))
    assert first == second
    assert (first.prompt, first.chosen, first.rejected) == ("a", "b", "c")
    assert first.messages == (user("a"), answer("b"))
    other = {**within, "rejected": [user("x"), answer("c")]}
    with pytest.raises(LichenError, match="do not answer the same turns"):
        answers_of(other, KNOWN, "row 1")
