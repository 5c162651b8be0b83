"""Sequence-level distillation: a student trains on answers that the teacher wrote.

A student with another tokenizer cannot be told next tokens one by one, and most endpoints do not tell any. What
every language model gives is text. Learning from what it is likeliest to write, word after word, comes close to
learning from its distribution over whole texts; the labels are hard, and whatever the teacher would seldom say is not
in them. The likeliest text is taken token by token here, where the paper searches with a beam.

Reference:
    Yoon Kim and Alexander M. Rush. "Sequence-Level Knowledge Distillation." EMNLP 2016.
    https://arxiv.org/abs/1606.07947
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lichen.data.sources.record import Record
from lichen.data.synthetic.filters import Filter, Sifted, junk, length, repetition
from lichen.fm.interface import Generator

__all__ = ["prompt_of", "sequences"]

SequenceAnswers = tuple[tuple[Record, ...], Sifted]
"""``(rows to learn from, what became of every text)``."""

_SIEVE: Final = Filter({"length": length(least=1), "repetition": repetition(), "junk": junk()})


def prompt_of(record: Record) -> str:
    """What a teacher can be asked with: what came before the text, or a conversation's first turn; else nothing.

    >>> prompt_of(Record(client="", prompt="How are you?", text="Fine."))
    'How are you?'
    """
    if record.messages:
        turns = [turn for turn in record.messages if turn["role"] not in ("system", "developer")]
        return turns[0]["content"].strip() if turns and turns[0]["role"] == "user" else ""
    return record.prompt.strip()


def sequences(teacher: Generator, prompted: Sequence[Record], *, max_new_tokens: int) -> SequenceAnswers:
    """The rows with the teacher's answers in place of what was said; those that loop or hold no words are left out.

    Args:
        teacher: Who writes.
        prompted: Public rows, each with a prompt (:func:`prompt_of`); their own texts are not looked at.
        max_new_tokens: Tokens an answer at most.

    Raises:
        LichenError: if the teacher cannot write.

    >>> class Parrot:
    ...     name = "parrot"
    ...     def generate(self, prompts, **how):
    ...         return [f" {prompt} indeed." for prompt in prompts]
    >>> rows, sifted = sequences(Parrot(), [Record(client="", prompt="Nice day", text="Yes")], max_new_tokens=8)
    >>> rows[0].prompt, rows[0].text, str(sifted)
    ('Nice day', 'Nice day indeed.', 'kept 1 of 1')
    """
    prompts = [prompt_of(record) for record in prompted]
    written = (
        teacher.generate(prompts, seeds=[0] * len(prompts), max_new_tokens=max_new_tokens, temperature=0.0)
        if prompts
        else []
    )
    texts = [text.strip() for text in written]
    sifted = _SIEVE(texts)
    return tuple(_as_record(prompted[i], prompts[i], texts[i]) for i in sifted.passed), sifted


def _as_record(record: Record, prompt: str, text: str) -> Record:
    if not record.messages:
        return Record(client="", prompt=prompt, text=text)
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": text})
    return Record(client="", messages=turns)
