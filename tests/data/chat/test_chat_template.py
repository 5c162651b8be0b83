"""The template of a run: the system message and the end of the prompt are part of it, for whoever has the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.data.batches.text import encode_lm
from lichen.data.chat.chat_template import chat_template_of, render
from lichen.data.sources.record import Record
from support.chat_templates import TEMPLATES
from support.tokenizer_kinds import tokenizer_of

ASK = [{"role": "user", "content": "What is it?"}]
TALK = [*ASK, {"role": "assistant", "content": "Moss."}]
THOUGHT = "It grows on stone."


def of(family: str) -> Any:
    return tokenizer_of("llama-3", template=TEMPLATES[family])


def rendered(family: str, *, turns: Any = ASK, ask: bool = True, **how: Any) -> str:
    tokenizer = of(family)
    template, _ = chat_template_of(tokenizer, **how)
    return render(turns, tokenizer, ask=ask, template=template)


def test_the_default_is_what_the_template_does() -> None:
    for family in set(TEMPLATES) - {"qwen3", "qwen3-thinking", "r1"}:
        assert chat_template_of(of(family)) == (None, ()), family
    assert "You help with moss." in rendered("chatml-default-system")


@pytest.mark.parametrize("family", sorted(TEMPLATES.keys() - {"gemma"}))
@pytest.mark.parametrize("system", ["Be brief.", 'Say "no"\n{% if %} {{ x }} \\n {# 苔 🌱 #}'])
def test_a_system_message_is_what_a_system_turn_would_be(family: str, system: str) -> None:
    first = {"role": "system", "content": system}
    asked = rendered(family, system=system)
    assert asked == rendered(family, turns=[first, *ASK])
    assert asked.count(system) == 1
    own = [{"role": "system", "content": "Mine."}, *ASK]
    assert rendered(family, system=system, turns=own) == rendered(family, turns=own)


def test_an_empty_system_message_takes_the_place_of_a_default_and_nothing_else() -> None:
    assert rendered("chatml-default-system", system="").startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
    for family in ("chatml", "llama-2", "gemma", "alpaca"):
        assert rendered(family, system="") == rendered(family)


def test_a_template_without_a_system_role_refuses_one() -> None:
    with pytest.raises(LichenError, match="takes no system message") as refused:
        chat_template_of(of("gemma"), system="Be brief.")
    assert refused.value.where == "data.system"


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("qwen3-thinking", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("r1", "<|Assistant|>"),
    ],
)
def test_a_prompt_that_opens_a_thought_is_closed_where_answers_hold_none(family: str, end: str) -> None:
    tokenizer = of(family)
    template, notes = chat_template_of(tokenizer)
    assert template is not None
    assert len(notes) == 1
    assert "think" in notes[0] or "thought" in notes[0]
    asked = render(ASK, tokenizer, ask=True, template=template)
    assert asked.endswith(end)
    assert render(TALK, tokenizer, ask=False, template=template).startswith(asked + "Moss.")
    assert render(TALK, tokenizer, ask=False, template=template) == render(TALK, tokenizer, ask=False)
    again = tokenizer_of("llama-3", template=template)
    assert chat_template_of(again) == (None, ()), "what a run has made is left alone"
    row = Record(client="", prompt="What is it?", text="Moss.")
    direct, wrapped = (encode_lm([row], one, form="chat", max_length=99)[0] for one in (tokenizer, again))
    assert [a.tolist() for a in direct] == [a.tolist() for a in wrapped]
    assert again.decode(direct[1][direct[1] != -100]) in ("Moss.<|im_end|>", "Moss.</s>")


@pytest.mark.parametrize("family", ["qwen3", "qwen3-thinking"])
@pytest.mark.parametrize("apart", [False, True])
def test_thoughts_are_learned_where_the_answers_hold_them(family: str, apart: bool) -> None:
    tokenizer = of(family)
    assert chat_template_of(tokenizer, thinking=True) == (None, ())
    content = "Moss." if apart else f"<think>\n{THOUGHT}\n</think>\n\nMoss."
    answer = {"role": "assistant", "content": content, **({"reasoning_content": THOUGHT} if apart else {})}
    record = Record(client="", messages=(*ASK, answer))
    ((ids, labels),) = encode_lm([record], tokenizer, form="messages", max_length=200, thinking=True)
    asked = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert ids[labels == -100].tolist() == asked
    opened = "" if family == "qwen3-thinking" else "<think>\n"
    assert tokenizer.decode(ids[labels != -100]) == f"{opened}{THOUGHT}\n</think>\n\nMoss.<|im_end|>"
    with pytest.raises(LichenError, match="told apart") as refused:
        encode_lm([record], tokenizer, form="messages", max_length=200)
    assert refused.value.fix is not None
    assert "data.thinking" in refused.value.fix


def test_a_thought_that_the_template_leaves_out_is_refused() -> None:
    answer = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nMoss."}
    with pytest.raises(LichenError, match="leaves out the thought") as refused:
        encode_lm([Record(client="", messages=(*ASK, answer))], of("r1"), form="messages", max_length=200)
    assert refused.value.where == "data.template"


def test_a_template_of_ones_own_is_used_and_a_broken_one_refused() -> None:
    tokenizer = of("chatml")
    mine = "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    mine += "{{ '(assistant) ' if add_generation_prompt }}"
    template, notes = chat_template_of(tokenizer, template=mine, system="Be brief.")
    assert len(notes) == 1
    assert notes[0].startswith("the last tokens of a prompt are others"), "its prompt ends with a blank"
    assert render(ASK, tokenizer, ask=True, template=template) == "(system) Be brief.\n(user) What is it?\n(assistant) "
    for broken in (
        "{% for m in messages %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ nothing.at.all }}",
    ):
        with pytest.raises(LichenError) as refused:
            chat_template_of(tokenizer, template=broken)
        assert refused.value.where == "data.template"
    with pytest.raises(LichenError, match="no chat template"):
        chat_template_of(tokenizer_of("llama-3"))


def test_words_about_thoughts_are_words_where_the_template_knows_none() -> None:
    content = f"<think>{THOUGHT}</think>Moss."
    record = Record(client="", prompt="What is it?", text=content)
    ((ids, labels),) = encode_lm([record], of("chatml"), form="chat", max_length=200)
    assert of("chatml").decode(ids[labels != -100]) == f"{content}<|im_end|>"


def test_a_date_in_the_template_is_told() -> None:
    dated = "{{ strftime_now('%Y') }}" + TEMPLATES["chatml"]
    assert [note for note in chat_template_of(of("chatml"), template=dated)[1] if "today's date" in note]
