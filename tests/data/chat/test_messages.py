"""Conversations as people store them: nothing of a turn vanishes, and what cannot be learned is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.data.batches.text import encode_lm
from lichen.data.chat.messages import messages_of
from lichen.data.sources.record import Record
from support.chat_templates import TEMPLATES
from support.tokenizer_kinds import tokenizer_of

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASK = {"role": "user", "content": "Rain in Oslo?"}
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}"
    "{{ '<call>' + c['function']['name'] + ' ' + (c['function']['arguments'] | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learned(turns: Any, template: str, notes: Counter[str] | None = None) -> tuple[str, str]:
    """All of a row, and what of it is learned."""
    tokenizer = tokenizer_of("gpt-2", template=template)
    record = Record(client="", messages=messages_of(turns, "row 1"))
    ((ids, labels),) = encode_lm([record], tokenizer, form="messages", max_length=400, notes=notes)
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != -100])


def test_parts_of_text_are_joined_and_others_refused_by_name() -> None:
    parts = [{"type": "text", "text": "Rain "}, {"type": "text", "text": "in Oslo?"}]
    assert messages_of([{"role": "user", "content": parts}], "row 1") == (ASK,)
    picture = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(LichenError, match="image_url") as refused:
        messages_of(json.dumps([{"role": "user", "content": picture}]), "row 7")
    assert refused.value.where == "row 7"


def test_tool_calls_are_learned_where_the_template_writes_them() -> None:
    turns = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "Yes."},
    ]
    whole, told = learned(turns, TOOLS)
    assert told == '<call>weather {"city": "Oslo"}</call><|im_end|>Yes.<|im_end|>'
    assert "<|im_start|>tool\nrain<|im_end|>" in whole
    with pytest.raises(LichenError, match="writes no tool calls"):
        learned(turns, TEMPLATES["chatml"])


def test_an_answer_that_says_nothing_is_not_learned() -> None:
    turns = [ASK, {"role": "assistant", "content": " "}, ASK, {"role": "assistant", "content": "Yes."}]
    notes: Counter[str] = Counter()
    assert learned(turns, TEMPLATES["chatml"], notes)[1] == "Yes.<|im_end|>"
    assert notes["empty"] == 1
    with pytest.raises(LichenError, match="no assistant turn to learn from"):
        learned(turns[:2], TEMPLATES["chatml"])
    with pytest.raises(LichenError, match="no text as content"):
        messages_of([{"role": "assistant", "content": None}], "row 1")


def test_a_developer_is_a_system_message_where_the_template_knows_none() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, ASK, {"role": "assistant", "content": "Yes."}]
    notes: Counter[str] = Counter()
    whole, _ = learned(turns, TEMPLATES["chatml"], notes)
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert notes["developer"] == 1
    knows = "{# developer #}" + TEMPLATES["chatml"]
    assert learned(turns, knows)[0].startswith("<|im_start|>developer\nBe brief.<|im_end|>")


def test_a_turn_that_the_template_leaves_out_is_counted() -> None:
    deaf = TEMPLATES["chatml"].replace("{{ '<|im_start|>'", "{{ '' if m['role'] == 'system' else '<|im_start|>'")
    notes: Counter[str] = Counter()
    turns = [{"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": "Yes."}]
    whole, told = learned(turns, deaf, notes)
    assert "brief" not in whole
    assert told == "Yes.<|im_end|>"
    assert notes["left out"] == 1


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("{", "list of turns"),
        ({"role": "user"}, "list of turns"),
        (["hi"], "list of turns"),
        ([{"content": "hi"}], "no role"),
        ([{"role": "narrator", "content": "hi"}], "'narrator'"),
        ([{"role": "user", "content": 5}], "no text as content"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "names no function"),
        ([{"role": "assistant", "tool_calls": "call"}], "list of calls"),
        ("[" * 100_000, "list of turns"),
    ],
)
def test_other_shapes_are_one_sentence(value: Any, what: str) -> None:
    with pytest.raises(LichenError, match=what):
        messages_of(value, "row 1")
    assert messages_of(None, "row 1") == messages_of(" ", "row 1") == ()
