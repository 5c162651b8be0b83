"""Split: shares of every kind met, groups whole, no row of one part in another."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.data.sources.records import Record
from lichen.data.splits.fingerprint import answers, fingerprint, normalise
from lichen.data.splits.split import some_of_each, split_records

rows = st.lists(
    st.builds(
        lambda text, group: Record(client="a", text=text, group=group),
        st.text(alphabet="abC ,.", min_size=1, max_size=4),
        st.sampled_from(["", "g1", "g2", "g3", "g4"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(records=rows, by=st.sampled_from(["group", "row"]), seed=st.integers(0, 999))
def test_split_keeps_groups_whole_and_copies_on_one_side(records: list[Record], by: str, seed: int) -> None:
    kinds = [r.text[0] for r in records]
    parts = split_records(records, valid=0.2, test=0.2, seed=seed, by=by, kinds=kinds)  # type: ignore[arg-type]
    train = parts[0]
    marks = [{normalise(r.text) for r in part} for part in parts]
    assert not marks[0] & (marks[1] | marks[2])
    assert not marks[1] & marks[2]
    assert sum(map(len, parts)) <= len(records)
    assert all(any(r is q for q in records) for part in parts for r in part)
    assert bool(train) == bool(records)
    if by == "group":
        groups = [{r.group for r in part if r.group} for part in parts]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]


def test_split_shares_are_met_and_reproducible() -> None:
    records = [Record(client="a", text=f"word{i}", group=f"g{i // 2}") for i in range(200)]
    train, valid, test = split_records(records, valid=0.1, test=0.2, seed=1)
    assert (len(train), len(valid), len(test)) == (140, 20, 40)
    assert split_records(records, valid=0.1, test=0.2, seed=1) == (train, valid, test)
    assert split_records(records, valid=0.1, test=0.2, seed=2) != (train, valid, test)
    assert split_records(records, valid=0.0, test=0.0, seed=1) == (records, [], [])


def test_split_gives_small_clients_something_to_measure() -> None:
    records = [Record(client="a", text=t) for t in ("one", "two", "three")]
    assert [len(part) for part in split_records(records, valid=0.1, test=0.1, seed=0, by="row")] == [1, 1, 1]
    assert [len(part) for part in split_records(records[:1], valid=0.1, test=0.1, seed=0, by="row")] == [1, 0, 0]
    with pytest.raises(LichenError, match=r"data\.valid"):
        split_records(records, valid=0.5, test=0.5, seed=0)


def test_a_copy_is_equal_in_prompt_and_answer_and_each_part_has_every_answer() -> None:
    asked = [Record(client="a", prompt=f"headline {i}", text=["good", "bad"][i % 2], group=f"g{i}") for i in range(20)]
    parts = split_records(asked, valid=0.1, test=0.2, seed=0, kinds=answers(asked))
    found = [Counter(r.text for r in part) for part in parts]
    assert found == [{"good": 7, "bad": 7}, {"good": 1, "bad": 1}, {"good": 2, "bad": 2}]
    again = [*asked, Record(client="a", prompt="Headline  0!", text="Good.")]
    for seed in range(20):
        train, valid, test = split_records(again, valid=0.1, test=0.2, seed=seed, by="row", kinds=answers(again))
        assert len(train) + len(valid) + len(test) == 21  # the two copies went the same way, and none was dropped
        sides = {fingerprint(r) for r in train}, {fingerprint(r) for r in valid}, {fingerprint(r) for r in test}
        assert sum(len(side) for side in sides) == 20


def test_a_text_alone_makes_a_copy_where_the_model_reads_nothing_else() -> None:
    records = [Record(client="a", prompt=f"question {i}", text="yes", group=f"g{i}") for i in range(10)]
    assert [len(p) for p in split_records(records, valid=0.2, test=0.2, seed=0, reads="text")] == [6, 0, 0]
    assert [len(p) for p in split_records(records, valid=0.2, test=0.2, seed=0)] == [6, 2, 2]


def test_conversations_are_copies_if_every_turn_is_equal() -> None:
    def talk(ask: str, reply: str) -> Record:
        turns = ({"role": "user", "content": ask}, {"role": "assistant", "content": reply})
        return Record(client="a", messages=turns)

    same, other = talk("How much?", "ten"), talk("how  much", "Ten.")
    assert fingerprint(same, reads="messages") == fingerprint(other, reads="messages")
    assert fingerprint(same, reads="messages") != fingerprint(talk("How many?", "ten"), reads="messages")
    calls = [replace(same, messages=(*same.messages[:1], {**same.messages[1], "tool_calls": [name]})) for name in "fg"]
    assert len({fingerprint(one, reads="messages") for one in (same, *calls)}) == 3
    talks = [talk(f"how much is number {i}", ("ten", "six")[i % 2]) for i in range(20)]
    kinds = answers(talks, reads="messages")
    assert set(kinds) == {"ten", "six"}
    parts = split_records(talks, valid=0.1, test=0.2, seed=3, reads="messages", kinds=kinds)
    assert [len({r.messages[1]["content"] for r in part}) for part in parts] == [2, 2, 2]


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_every_kind_has_its_share_in_every_part_and_training_first(sizes: list[int], seed: int) -> None:
    kinds = [f"k{k}" for k, size in enumerate(sizes) for _ in range(size)]
    random.Random(seed).shuffle(kinds)
    records = [Record(client="a", text=f"{kind} {i}") for i, kind in enumerate(kinds)]
    parts = split_records(records, valid=0.1, test=0.2, seed=seed, by="row", kinds=kinds)
    total = len(records)
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert abs(len(part) - share * total) <= 1 + len(sizes)
        count = Counter(r.text.split()[0] for r in part)
        for k, size in enumerate(sizes):
            assert abs(count[f"k{k}"] - share * size) <= 3
            # Of very few rows one must be left to be scored on, whatever its kind.
            assert count[f"k{k}"] >= (1 if (part is parts[0] and total > 12) or share * size >= 1 else 0)
            assert part is parts[0] or count[f"k{k}"] <= max(1, size // 2)


def test_the_rarest_class_of_a_group_counts() -> None:
    records = [
        Record(client="a", text=f"{i} {j}", group=f"g{i}", label="rare" if i < 6 and not j else "common")
        for i in range(30)
        for j in range(3)
    ]
    for seed in range(10):
        parts = split_records(records, valid=0.15, test=0.2, seed=seed, kinds=[str(r.label) for r in records])
        assert [sum(r.label == "rare" for r in part) for part in parts] == [4, 1, 1]


def test_shares_of_nothing_get_nothing() -> None:
    records = [Record(client="a", text=f"{i}", label="ab"[i % 2]) for i in range(9)]
    assert split_records(records, valid=0.0, test=0.4, seed=1, kinds=[str(r.label) for r in records])[1] == []


def test_some_of_each_kind_are_drawn_by_their_shares() -> None:
    kinds = ["a"] * 70 + ["b"] * 28 + ["c"] * 2
    for seed in range(10):
        found = Counter(kinds[i] for i in some_of_each(kinds, 20, seed))
        assert found.total() == 20
        assert found["a"] in (13, 14)
        assert found["b"] in (5, 6)
        assert found["c"] == 1
    assert some_of_each(kinds, 100, 0) == list(range(100))
    assert some_of_each(kinds, 20, 0) != some_of_each(kinds, 20, 1)


def test_a_fingerprint_sees_words_of_every_script_and_can_be_keyed() -> None:
    assert normalise("Ça va?") == normalise("C\u0327a VA")
    assert normalise("की") != normalise("का")  # vowels of this script are marks
    assert normalise("ไม่ใช่") != normalise("ไมใช")
    row = Record(client="a", text="Yes.")
    assert fingerprint(row, key=b"ours") != fingerprint(row)
    assert fingerprint(row, key=b"ours") == fingerprint(Record(client="b", text="yes"), key=b"ours")


def test_split_pictures_are_copies_by_their_pixels() -> None:
    same, other = np.zeros((1, 2, 2), np.float32), np.ones((1, 2, 2), np.float32)
    records = [Record(client="", features=x, label=0) for x in (same, same, same, other)]
    train, _, test = split_records(records, valid=0.0, test=0.25, seed=0, by="row", reads="text")
    assert [r.features is same for r in train] == [True] * 3
    assert [r.features is other for r in test] == [True]
