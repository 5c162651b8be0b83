"""Filters drop what they should, say why, and lose nothing; copies of private rows are found however disguised."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.sources.records import load_records
from lichen.data.synthetic import filters
from lichen.data.synthetic.filters import Filter
from lichen.data.synthetic.near_duplicates import NearDuplicates, jaccard, shingles, words

some = st.lists(st.text(alphabet="ab .é!衣", max_size=14), max_size=12)


def chain() -> Filter:
    return Filter(
        {
            "length": filters.length(least=2, most=6),
            "junk": filters.junk(letters=0.6),
            "repetition": filters.repetition(size=2, most=0.4),
            "duplicates": filters.duplicates(threshold=0.6, size=1),
        }
    )


@given(texts=some)
def test_every_row_is_kept_or_dropped_with_a_reason_and_sifting_twice_drops_no_more(texts: list[str]) -> None:
    sifted = chain()(texts)
    assert sorted([*sifted.passed, *sifted.dropped]) == list(range(len(texts)))
    assert all(rule in sifted.rules and why for rule, why in sifted.dropped.values())
    assert sum(sifted.counts.values()) == len(sifted.dropped)
    again = chain()([texts[at] for at in sifted.passed])
    assert again.passed == tuple(range(len(sifted.passed)))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (filters.length(least=3, most=5), "It fits so well.", "It fits."),
        (filters.length(least=3, most=5), "a, b, c!", "one two three four five six"),
        (filters.repetition(), "I love the cut and I love the colour of it.", "so soft and so soft and so soft and so"),
        (filters.junk(), "Soft – and 100% made of cotton!", "### 5/5 *** $$$ ok"),
        (filters.junk(), "यह कपड़ा अच्छा है", "bro\ufffdken sign in here"),
        (filters.junk(), "两种颜色都很好看", "a bell \x07 rings"),
        (filters.foreign(["the fit is good and the colour lovely"]), "The colour is good", "der Stoff ist good"),
    ],
)
def test_each_rule_tells_good_from_bad(rule: filters.Rule, good: str, bad: str) -> None:
    sifted = Filter({"it": rule})([good, bad])
    assert sifted.passed == (0,)
    assert sifted.dropped[1][1]


def test_a_twin_of_a_dropped_row_stays_and_a_given_text_has_no_twin() -> None:
    texts = ["x", "Fits me very well", "fits me, very well!", "Quite another thing altogether", "Shown as an example"]
    rules = {"first": filters.flagged([False, True, False, False, False]), "duplicates": filters.duplicates()}
    assert Filter(rules)(texts).passed == (0, 2, 3, 4)
    shown = Filter({"duplicates": filters.duplicates(against=["shown as an EXAMPLE"])})(texts)
    assert shown.passed == (0, 1, 3)
    assert shown.dropped[4][1] == "says what given text 0 says"
    assert shown.dropped[2][1] == "says what row 1 says"


def test_scores_and_bits_belong_to_the_texts_as_they_were_given() -> None:
    texts = ["a", "b", "c", "d"]
    nan = float("nan")
    rules = {"bits": filters.flagged([True, False, False, False]), "score": filters.scored([9, 1, nan, 3], least=2)}
    assert Filter(rules)(texts).passed == (3,)
    assert Filter({"most": filters.scored([0, 1, 2, 3], most=1)})(texts).passed == (0, 1)
    for rule in (filters.flagged([True]), filters.scored([1.0] * 5)):
        with pytest.raises(LichenError, match="for 4 texts"):
            Filter({"it": rule})(texts)
    with pytest.raises(LichenError, match="was not asked about"):
        Filter({"all": lambda texts, alive: {0: "x"}, "again": lambda texts, alive: {0: "x"}})(texts)


def slow_twins(texts: list[str], against: list[str], threshold: float, size: int) -> list[int]:
    """Every pair compared: the oracle."""
    every, passed, found = [*against, *texts], list(range(len(against))), []
    for at in range(len(against), len(every)):
        near = [k for k in passed if jaccard(shingles(every[k], size), shingles(every[at], size)) >= threshold]
        found.append(near[0] if near else -1)
        passed += [] if near else [at]
    return found


@given(
    texts=st.lists(st.lists(st.sampled_from("abcde"), max_size=9).map(" ".join), max_size=14),
    against=st.lists(st.lists(st.sampled_from("abcde"), max_size=9).map(" ".join), max_size=3),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
    size=st.integers(1, 3),
)
@settings(max_examples=200)
def test_twins_are_those_of_all_pairs(texts: list[str], against: list[str], threshold: float, size: int) -> None:
    from lichen.data.synthetic.near_duplicates import twins

    found = twins(texts, against=against, threshold=threshold, size=size)
    assert found == slow_twins(texts, against, threshold, size)


def test_words_know_case_signs_and_scripts() -> None:
    assert words("It’s  FINE—really\u200b: 5'4\" ﬁt_ok!") == ["its", "fine", "really", "54", "fit", "ok"]
    assert words("衣服 is nice") == ["衣", "服", "is", "nice"]
    assert words("…!") == []
    assert shingles("one two") == {("one", "two")}
    assert jaccard(shingles("!"), shingles("?")) == 0
    assert jaccard(shingles("a b c d"), shingles("b c d e")) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    try:
        rows = load_records("clothing-reviews")
    except LichenError as error:
        pytest.skip(f"clothing-reviews cannot be fetched here: {error}")
    texts = sorted({row.text for row in rows})
    random.Random(0).shuffle(texts)
    return texts


def disguises(others: list[str], seed: int) -> dict[str, object]:
    """Ways to hide a copy; ``others`` are real texts to hide it in and to take words from."""
    draw = random.Random(seed)
    vocabulary = [word for text in others for word in text.split()]

    def loud(text: str) -> str:
        return " ,".join(word.upper() if draw.random() < 0.5 else word.lower() for word in text.split()) + "!!"

    def part(text: str) -> str:
        found = text.split()
        size = min(max(12, len(found) // 3), len(found))
        start = draw.randrange(len(found) - size + 1)
        return " ".join(found[start : start + size])

    def inside(text: str) -> str:
        before, after = draw.sample(others, 2)
        return f"{before} {text} {after}"

    def swapped(text: str) -> str:
        found = text.split()
        for start in range(0, len(found) - 7, 8):
            found[start + draw.randrange(8)] = draw.choice(vocabulary)
        return " ".join(found)

    def traded(text: str) -> str:
        found = text.split()
        for start in range(0, len(found) - 7, 8):
            at = start + draw.randrange(7)
            found[at], found[at + 1] = found[at + 1], found[at]
        return " ".join(found)

    ways = {"verbatim": str, "loud": loud, "part": part, "inside": inside, "swapped": swapped, "traded": traded}
    return {**ways, "swapped inside": lambda text: inside(swapped(text))}


def test_every_planted_copy_is_caught_and_few_real_reviews_are(reviews: list[str]) -> None:
    private = [text for text in reviews[:500] if len(words(text)) >= 10]
    others = reviews[1000:2000]
    copies = NearDuplicates(private)
    assert len(private) > 450
    for name, way in disguises(others, 1).items():
        missed = [text for text in private if not copies.found([way(text)])[0]]  # type: ignore[operator]
        assert missed == [], name
    alarms = [reason for reason in copies.found(others) if reason]
    assert len(alarms) <= 0.015 * len(others)
    sifted = Filter({"copies": filters.copied(copies)})([private[0], others[0]])
    assert sifted.dropped == {0: ("copies", "copies a private row: equal words")}


def test_short_rows_are_found_when_equal_and_reasons_tell_no_word() -> None:
    copies = NearDuplicates(
        ["Love it!", "Runs small, order up", "", "one two three four five six seven eight nine ten"]
    )
    found = copies.found(["love IT", "I love it so", "runs small order up", "", "!", "one two three"])
    assert found == ["equal words", "", "equal words", "", "", ""]
    assert copies.found(["we say one two three four five six seven eight"]) == ["a run of 8 words"]
    assert copies.found(["one two three four x six seven eight nine ten and more"]) == ["many shingles within 24 words"]
    assert NearDuplicates(["a b c d e f"], jaccard=0.5).found(["b c d e f g"]) == ["nearly all shingles"]
    assert NearDuplicates([]).found(["anything at all"]) == [""]
    with pytest.raises(LichenError, match="do not fit"):
        NearDuplicates(["x"], run=30)
    with pytest.raises(LichenError, match="threshold"):
        Filter({"it": filters.duplicates(threshold=0)})(["x"])
