"""Old words leave the code and do not come back: each count may only fall, down to none."""

from __future__ import annotations

from pathlib import Path

import words

LEFT: dict[str, int] = {"kept": 1, "rooms": 2, "wanted": 8}
"""How often each word may stand: as a field of files that people have. Any other may not stand at all."""


def test_each_old_word_stands_no_more_often_than_it_may() -> None:
    found = {word: sum(files.values()) for word, files in words.counts().items()}
    more = {word: (times, dict(words.counts()[word])) for word, times in found.items() if times > LEFT.get(word, 0)}
    assert not more, more


def test_the_table_names_no_word_that_is_not_counted() -> None:
    assert set(LEFT) <= {old.word for old in words.WORDS}


def test_words_of_an_identifier_are_counted_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text('told_of = Told = retold = "told"  # told\n', encoding="utf-8")
    assert words.counts(tmp_path)["told"] == {"one.py": 2}


def test_an_entry_of_several_parts_counts_where_they_follow_one_another(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("OrNothing = nothing_or = or_nothing_C = 1\n", encoding="utf-8")
    assert words.counts(tmp_path)["or_nothing"] == {"one.py": 2}
