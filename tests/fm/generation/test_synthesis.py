"""The writer's prompts vary and its rows stand alone; what is unusable is asked for again, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.fm.generation.balance import texts_to_write
from lichen.fm.generation.cleanup import clean, word_count
from lichen.fm.generation.synthesis import Label, Writer
from lichen.fm.interface import Usage
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal
from support.tiny_llama import save_model

LABELS: dict[Label, str] = {"1": "1 star, unhappy", "5": "5 stars, delighted"}
ARTICLES = ("dress", "shirt", "coat")
TONES = ("dry", "warm")
SHOWN: list[tuple[Label, str]] = [("5", f"Bright\nexample number {i} here.") for i in range(6)]
SHOWN += [("1", "A dark example it is.")]


@dataclass
class Scripted:
    """Says what ``say`` makes of the prompt and the seed; remembers what it was asked."""

    say: Callable[[str, int], str] = lambda prompt, seed: f"Text number {seed} is written here."
    name: str = "scripted"
    asked: list[tuple[str, int]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        return Usage(calls=len(self.calls), tokens_out=7 * len(self.asked))

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], **more: Any) -> list[str]:
        self.calls.append(more)
        self.asked += zip(prompts, seeds, strict=True)
        return [self.say(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def writer(fm: Any, **more: Any) -> Writer:
    given = {"about": "reviews of clothes", "labels": LABELS, "kind": "review", "examples": SHOWN, "shots": 2}
    attributes = {"article": ARTICLES, "tone": TONES}
    return Writer(fm, **{**given, "attributes": attributes, **more})


@pytest.mark.parametrize("plain", [True, False])
def test_prompts_hold_label_attributes_client_and_public_examples_of_the_label_alone(plain: bool) -> None:
    fm = Scripted()
    rows = writer(fm, plain=plain, style="terse").write("5", 40, seed=3, client="the attic")
    assert len(rows) == 40
    prompts = [prompt for prompt, _ in fm.asked]
    for prompt in prompts:
        assert "5 stars, delighted" in prompt
        assert "the attic" in prompt
        assert "terse" in prompt
        assert sum(value in prompt for value in ARTICLES) == sum(value in prompt for value in TONES) == 1
        assert prompt.count("Bright example number") == 2
        assert "dark" not in prompt
        assert prompt.endswith(":") == plain
    for value in (*ARTICLES, *TONES, *(f"number {i} " for i in range(6))):
        assert any(value in prompt for prompt in prompts)
    assert len({row.prompt for row in rows}) == len(set(prompts)) > 20
    assert {row.client for row in rows} == {"the attic"}
    assert all(("\n" in call["stop"]) == plain for call in fm.calls)


def test_a_row_follows_from_seed_label_client_and_place_alone() -> None:
    five = writer(Scripted()).fresh("5", 5, 1)
    assert writer(Scripted()).fresh("5", 3, 1) == five[:3]
    others = [writer(Scripted()).fresh(*asked) for asked in (("5", 5, 2), ("1", 5, 1), ("5", 5, 1, "x"))]
    assert len({*five, *(text for some in others for text in some)}) == 20


def test_unusable_rows_are_asked_again_with_other_seeds_and_a_bounded_number_of_times() -> None:
    fm = Scripted(lambda prompt, seed: "Good enough to be kept." if seed % 4 == 0 else "no.")
    rows = writer(fm, max_attempts=3).write("5", 20, seed=0)
    assert len(fm.calls) == 3
    assert len({seed for _, seed in fm.asked}) == len(fm.asked)
    assert 0 < len(rows) < 20
    assert all(row.seed % 4 == 0 for row in rows)
    assert len(rows) == sum(seed % 4 == 0 for _, seed in fm.asked)
    assert len(fm.asked) == 20 + sum(seed % 4 > 0 for _, seed in fm.asked) - (20 - len(rows))
    assert sum(row.tokens for row in rows) == fm.usage.tokens_out
    assert max(row.tokens for row in rows) - min(row.tokens for row in rows) <= 1
    assert writer(Scripted(lambda *_: "")).fresh("5", 4, 0) == []


def test_an_example_given_back_is_no_new_text() -> None:
    assert writer(Scripted(lambda *_: '"bright example NUMBER 3 here."')).fresh("5", 2, 0) == []


OLD = ["The first old text has quite a few words in it.", "And the second one of them is no shorter than that."]


def test_variations_keep_their_places_and_what_cannot_be_varied_stays() -> None:
    fm = Scripted(lambda prompt, seed: "no." if "1 star," in prompt else f"New words for {seed} come out.")
    rows = writer(fm, ways=("rephrase",)).rewrite(OLD, ["5", "1"], seed=2)
    assert rows[0].text.startswith("New words")
    assert (rows[1].text, rows[1].prompt, rows[1].label) == (OLD[1], "", "1")
    assert len(fm.asked) == 2 + 1 + 1
    assert all(OLD["1 star," in prompt] in prompt for prompt, _ in fm.asked)
    assert writer(fm).vary([], [], 0) == []


@pytest.mark.parametrize("mask", [0.2, 0.5, 0.8])
def test_filling_in_blanks_the_share_of_words_and_continuing_keeps_the_rest(mask: float) -> None:
    fm = Scripted()
    writer(fm, ways=("fill",), mask=mask).vary(OLD * 5, ["5"] * 10, 1)
    masked = [prompt.rpartition("\n\n")[2].split() for prompt, _ in fm.asked]
    for text, found in zip(OLD * 5, masked, strict=True):
        assert len(found) == len(text.split()) == 11
        assert found.count("___") == round(mask * 11)
        assert all(new in ("___", old) for new, old in zip(found, text.split(), strict=True))
    assert len({tuple(found) for found in masked[::2]}) > 1
    fm = Scripted(lambda prompt, seed: " and it goes on.\nReview (")
    told = writer(fm, plain=True, mask=mask).vary(OLD, ["5", "1"], 1)
    for text, new, (prompt, _) in zip(OLD, told, fm.asked, strict=True):
        head = " ".join(text.split()[: round((1 - mask) * 11)])
        assert prompt.endswith(f"): {head}")
        assert new == f"{head} and it goes on."


def test_both_ways_of_an_instructed_model_are_drawn() -> None:
    fm = Scripted()
    writer(fm).vary(OLD * 10, ["5"] * 20, 1)
    assert 4 < sum("___" in prompt for prompt, _ in fm.asked) < 16


@dataclass
class Ended:
    """A real model whose texts are given an end, for its few words know none."""

    fm: LocalFM
    name: str = "tiny"

    @property
    def usage(self) -> Usage:
        return self.fm.usage

    def generate(self, prompts: Sequence[str], **more: Any) -> list[str]:
        return [f"{text}." for text in self.fm.generate(prompts, **more)]


@pytest.mark.parametrize("chat", [True, False])
def test_with_a_real_model_rows_do_not_depend_on_their_company(tmp_path: Any, chat: bool) -> None:
    model, tokenizer = load_causal(save_model(tmp_path))
    made = [Ended(LocalFM(model, tokenizer, batch=batch, chat=chat)) for batch in (1, 4)]
    alone, together = (writer(fm, plain=not chat, least=3, max_new_tokens=8).write("5", 6, seed=1) for fm in made)
    assert [(row.text, row.prompt, row.seed) for row in alone] == [(r.text, r.prompt, r.seed) for r in together]
    assert len({row.text for row in together}) > 3
    assert sum(row.tokens for row in together) == made[1].usage.tokens_out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"labels": {}}, "no label"),
        ({"attributes": {"tone": ()}}, "without values"),
        ({"examples": [("9", "x")]}, "no label '9'"),
        ({"ways": ("continue",)}, "cannot vary by continue"),
        ({"plain": True, "ways": ("fill",)}, "cannot vary by fill"),
        ({"mask": 0.0}, "out of range"),
        ({"max_attempts": 0}, "out of range"),
    ],
)
def test_refuses_nonsense(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(LichenError, match=reason):
        writer(Scripted(), **more)


def test_refuses_unknown_labels_and_miscounted_ones() -> None:
    with pytest.raises(LichenError, match="known: 1, 5"):
        writer(Scripted()).fresh("3", 1, 0)
    with pytest.raises(LichenError, match="1 labels for 2 texts"):
        writer(Scripted()).vary(OLD, ["5"], 0)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ('Sure! Here is a review:\n\n"It fits me well. The colour is', "It fits me well."),
        ("Here’s the new review: I like it, and so will you!", "I like it, and so will you!"),
        ("**Review (5 stars):** It is great. Buy it!", "It is great. Buy it!"),
        ("Rating: 5/5\nTitle: Nice\n\nI like it a lot.", "I like it a lot."),
        ('"Nice and warm." That is what I said.', '"Nice and warm." That is what I said.'),
        ("- 1. I love this one... It", "I love this one..."),
        ("Sure, it is pretty, but it fell apart.", "Sure, it is pretty, but it fell apart."),
        ("This dress is so soft. I wear it: often.", "This dress is so soft. I wear it: often."),
        ("Ok.\n\nA longer paragraph is the one to take. And", "A longer paragraph is the one to take."),
        ("这件衣服很好看。我很喜", "这件衣服很好看。"),
        ("no sentence ends here", ""),
        ("  \n ", ""),
        ("It fits well. STOP And so on.", "It fits well."),
    ],
)
def test_tidying_changes_no_word(raw: str, cleaned: str) -> None:
    assert clean(raw, kind="review", least=3, stop=("STOP",)) == cleaned


@given(st.text(alphabet="ab .!?\n\"'*:-", max_size=40))
def test_what_is_tidy_is_a_part_of_the_text_and_stays_as_it_is(text: str) -> None:
    cleaned = clean(text, least=1)
    assert " ".join(cleaned.split()) in " ".join(text.replace("**", "").split()) or cleaned == ""
    assert cleaned == "" or word_count(cleaned) >= 1
    assert clean(cleaned, least=1) == cleaned


@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 12), min_size=1),
    most=st.integers(0, 40),
    floor=st.integers(0, 15),
)
def test_what_is_wanted_fills_the_scarcest_first(counts: dict[str, int], most: int, floor: int) -> None:
    added = texts_to_write(counts, most=most, floor=floor)
    assert list(added) == list(counts)
    target = max(floor, *counts.values(), 0)
    room = sum(target - count for count in counts.values())
    assert sum(added.values()) == min(most, room)
    after = {label: counts[label] + n for label, n in added.items()}
    assert max(after.values()) <= target
    # The level no budget can lift further: the largest for which filling up to it costs no more than there is.
    level = max(x for x in range(target + 1) if sum(max(x - c, 0) for c in counts.values()) <= most)
    assert min(after.values()) == max(level, min(counts.values()))
    assert all(after[label] <= level + 1 for label, n in added.items() if n)


def test_wanted_refuses_negative_numbers() -> None:
    with pytest.raises(LichenError, match="below 0"):
        texts_to_write({"a": -1}, most=2)
    assert texts_to_write({"a": 0, "b": 5}, most=100, floor=8) == {"a": 8, "b": 3}
