"""What a teacher wrote becomes rows; loops, junk and silence do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lichen.clients.distillation.sequence import prompt_of, sequences
from lichen.data.sources.record import Record


class Labeler:
    """A teacher that has an answer ready for each prompt, and remembers how it was asked."""

    name = "says"

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.how = answers, dict[str, Any]()

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        self.how = how
        return [self.answers[prompt] for prompt in prompts]


def test_answers_take_the_place_of_what_was_said_and_loops_are_left_out() -> None:
    asked = [Record(client="ann", prompt=p, text="private?", label="x") for p in ("a", "b", "c", "d")]
    teacher = Labeler({"a": " Yes. ", "b": "no no no no no no no no", "c": "  ", "d": "\ufffd\ufffd"})
    rows, sifted = sequences(teacher, asked, max_new_tokens=7)
    assert rows == (Record(client="", prompt="a", text="Yes."),)
    assert {i: rule for i, (rule, _) in sifted.dropped.items()} == {1: "repetition", 2: "length", 3: "length"}
    assert teacher.how == {"seeds": [0, 0, 0, 0], "max_new_tokens": 7, "temperature": 0.0}


def test_a_conversation_is_asked_by_its_first_turn() -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "be kind"), ("user", "hi "), ("assistant", "yo"))]
    rows, _ = sequences(Labeler({"hi": "Hello there."}), [Record(client="", messages=tuple(turns))], max_new_tokens=3)
    assert rows[0].messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello there."})
    assert prompt_of(Record(client="", messages=tuple(turns[2:]))) == ""
    assert sequences(Labeler({}), [], max_new_tokens=3)[0] == ()
