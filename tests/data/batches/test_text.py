"""Encoding: what is learned is exactly the completion, and truncation keeps what matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lichen.core.errors import LichenError
from lichen.data.batches.text import LmForm, encode_classify, encode_lm, label_set, pad_id
from lichen.data.sources.records import Record

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>system\nBe kind</s>\n{% endif %}"
    "<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FRAME = 36
"""Tokens of CHATML around a question."""
FORGETFUL = "{% for m in messages %}{% if loop.last %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endif %}{% endfor %}"


def byte_tokenizer(template: str | None = CHATML, **special: str) -> Any:
    """A tokenizer of one token a byte, so that lengths can be counted by hand."""
    names = special or {"bos_token": "<s>", "eos_token": "</s>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<p>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<p>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def read(tokenizer: Any, row: tuple[np.ndarray, np.ndarray]) -> tuple[str, str]:
    """All of a row, and what of it is learned."""
    ids, labels = row
    assert ids.dtype == labels.dtype == np.int32
    assert np.array_equal(ids[labels >= 0], labels[labels >= 0])
    return tokenizer.decode(ids), tokenizer.decode(labels[labels >= 0])


@pytest.mark.parametrize(
    ("form", "whole", "learned"),
    [
        ("plain", "<s>fine</s>", "fine</s>"),
        ("transcript", "<s>how?\nfine</s>", "fine</s>"),
        ("chat", "<s>system\nBe kind</s>\n<s>user\nhow?</s>\n<s>assistant\nfine</s>", "fine</s>"),
    ],
)
def test_forms_learn_the_text_and_its_end(tokenizer: Any, form: LmForm, whole: str, learned: str) -> None:
    (row,) = encode_lm([Record(client="", prompt="how?", text="fine")], tokenizer, form=form, max_length=100)
    assert read(tokenizer, row) == (whole, learned)


def test_messages_learn_every_assistant_turn_and_nothing_else(tokenizer: Any) -> None:
    talk = [("user", "a"), ("assistant", "b!"), ("user", "c"), ("assistant", "d!"), ("user", "e")]
    record = Record(client="", messages=tuple({"role": r, "content": c} for r, c in talk))
    whole, learned = read(tokenizer, encode_lm([record], tokenizer, form="messages", max_length=200)[0])
    assert learned == "b!</s>d!</s>"
    assert whole == "<s>system\nBe kind</s>\n<s>user\na</s>\n<s>assistant\nb!</s>\n<s>user\nc</s>\n<s>assistant\nd!</s>"


def test_a_template_without_system_role_or_end_is_completed() -> None:
    tokenizer = byte_tokenizer(STRICT)
    (row,) = encode_lm([Record(client="", prompt="q", text="a")], tokenizer, form="chat", max_length=100)
    assert read(tokenizer, row) == ("[user]q[assistant]a</s>", "a</s>")


def test_a_template_that_hides_turns_is_refused() -> None:
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    with pytest.raises(LichenError, match=r"data\.form"):
        encode_lm([Record(client="", messages=talk)], byte_tokenizer(FORGETFUL), form="messages", max_length=99)


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(["plain", "transcript", "chat", "messages"]),
    prompt=st.text(alphabet="abc é\n", max_size=60),
    text=st.text(alphabet="xyz ", min_size=1, max_size=60).map(lambda s: "x" + s),
    max_length=st.integers(4, 150),
)
def test_rows_fit_and_always_have_something_to_predict(form: Any, prompt: str, text: str, max_length: int) -> None:
    tokenizer = byte_tokenizer()
    talk = ({"role": "user", "content": prompt}, {"role": "assistant", "content": text})
    record = Record(client="", prompt=prompt, text=text, messages=talk)
    ((ids, labels),) = encode_lm([record], tokenizer, form=form, max_length=max_length)
    assert len(ids) == len(labels) <= max_length
    assert labels[0] == -100
    first = int(np.flatnonzero(labels >= 0)[0])
    assert (labels[first:] >= 0).all()
    learned = tokenizer.decode(labels[first:])
    assert f"{text.rstrip()}</s>".startswith(learned) or f"{text}</s>".startswith(learned)
    # The text is only cut once the prompt is down to half of the room, which begins behind the template's frame.
    if not learned.endswith("</s>"):
        assert len(ids) == max_length
        frame = FRAME if form in ("chat", "messages") else 0
        assert first <= max(max_length // 2, frame + max((max_length - frame) // 2, 4), 1)


def test_a_long_prompt_loses_its_left_and_a_short_text_leaves_it_room(tokenizer: Any) -> None:
    record = Record(client="", prompt="0123456789" * 3, text="ab")
    whole, _ = read(tokenizer, encode_lm([record], tokenizer, form="transcript", max_length=20)[0])
    assert whole == "<s>" + ("0123456789" * 3)[-15:] + "\nab</s>"
    record = Record(client="", prompt="0123456789", text="abcdefghijklmnopq")
    whole, learned = read(tokenizer, encode_lm([record], tokenizer, form="transcript", max_length=10)[0])
    assert (whole, learned) == ("<s>789\nabcde", "abcde")


def test_a_long_chat_keeps_its_template(tokenizer: Any) -> None:
    record = Record(client="", prompt="0123456789" * 9, text="fine")
    row = encode_lm([record], tokenizer, form="chat", max_length=60)[0]
    whole, learned = read(tokenizer, row)
    assert learned == "fine</s>"
    assert whole.startswith("<s>system\nBe kind</s>\n<s>user\n")
    assert whole.endswith("456789</s>\n<s>assistant\nfine</s>")
    assert len(row[0]) == 60


def test_what_the_tokenizer_lacks_is_named() -> None:
    record = Record(client="", text="a")
    with pytest.raises(LichenError, match="chat template"):
        encode_lm([record], byte_tokenizer(None), form="chat", max_length=9)
    bare = byte_tokenizer(None, unk_token="<p>")
    with pytest.raises(LichenError, match=r"model\.name"):
        encode_lm([record], bare, form="plain", max_length=9)
    with pytest.raises(LichenError, match=r"model\.name"):
        pad_id(bare)
    with pytest.raises(LichenError, match="assistant turn"):
        encode_lm([record], byte_tokenizer(), form="messages", max_length=9)
    with pytest.raises(LichenError, match="unknown form"):
        encode_lm([record], byte_tokenizer(), form="poem", max_length=9)  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="too few"):
        encode_lm([record], byte_tokenizer(), form="plain", max_length=2)


def test_padding_falls_back_to_the_end_token() -> None:
    assert pad_id(byte_tokenizer()) == 1
    assert pad_id(byte_tokenizer(pad_token="<p>", eos_token="</s>")) == 2


def test_classes_are_numbered_and_unknown_ones_refused(tokenizer: Any) -> None:
    records = [Record(client="", text=t, label=v) for t, v in (("abc", 10), ("abcdef", 9), ("", None))]
    classes = label_set(records)
    assert classes == ("9", "10")
    rows = encode_classify(records, tokenizer, max_length=5, classes=classes)
    assert [label for _, label in rows] == [1, 0, -100]
    assert [len(ids) for ids, _ in rows] == [3, 5, 1]
    with pytest.raises(LichenError, match=r"data\.columns\.label"):
        encode_classify(records, tokenizer, max_length=5, classes=("9",))
    assert label_set([Record(client="", label=v) for v in ("b", "a", 3)]) == ("3", "a", "b")
