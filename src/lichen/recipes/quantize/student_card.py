"""Writes what an exported student's card says of its rows and outputs, and the code that loads it without Lichen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from lichen.core.visible import visible
from lichen.models.students.plain import code_of
from lichen.models.students.rounded import SCALE, StudentBits

__all__ = ["StudentFacts", "use_text"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFacts:
    """What a student's folder says of it.

    Attributes:
        kind: The architecture.
        shapes: Of its tensors.
        row: Numbers of a row; none for texts.
        classes: Names of the outputs, in their order.
        names_classes: They are classes, and the largest output is the class.
        tokenizer: Whose tokens it reads; None for numbers.
        words: The token of each row of its embedding; None where all tokens have one.
        max_length: Tokens of a row, at most.
        scaled: Its rows were the catalog's pictures, which lie between 0 and 1.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    row: tuple[int, ...]
    classes: tuple[str, ...]
    names_classes: bool
    tokenizer: str | None
    words: tuple[int, ...] | None
    max_length: int
    scaled: bool


def use_text(facts: StudentFacts, bits: StudentBits, measured: str = "") -> str:
    """The sections of the card that say what it reads, what it answers, and how it is loaded.

    Args:
        facts: The student.
        bits: How its numbers are written.
        measured: What that cost.
    """
    names = "\n".join(f"| {place} | {_cell(name)} |" for place, name in enumerate(facts.classes))
    word = "Class" if facts.names_classes else "Output"
    cost = f" {measured}" if measured else ""
    needs = "torch and safetensors" if facts.tokenizer is None else "torch, safetensors and tokenizers"
    return (
        f"## What it reads and answers\n\n{_reads(facts)}\n\n"
        f"{'The largest output is the class; a softmax gives shares.' if facts.names_classes else 'Its outputs:'}\n\n"
        f"| Output | {word} |\n|---|---|\n{names}\n\n"
        f"## In torch\n\nIn this folder, with {needs}; Lichen is not needed. {_BITS[bits]}{cost}\n\n"
        f"```python\n{_code(facts, bits)}\n```\n"
    )


_BITS: Mapping[StudentBits, str] = {
    "f32": "Weights are float32.",
    "f16": "Weights are float16, and become float32 as they are loaded.",
    "int8": "Weights are int8 with a scale for each row, and become float32 as they are loaded.",
}


def _reads(facts: StudentFacts) -> str:
    if facts.tokenizer is not None:
        words = "" if facts.words is None else f", of which it knows the {len(facts.words):,} in `vocabulary`"
        cut = f"cut after {facts.max_length} tokens"
        return f"A text by itself, {cut}, in the tokens of `{facts.tokenizer}` (`tokenizer.json`){words}."
    size = " x ".join(map(str, facts.row))
    first = ", channels first" if len(facts.row) == 3 else ""
    if facts.scaled:
        scale = "Pixels are scaled to lie from 0 to 1."
    else:
        scale = "They are not scaled: they have the range of the rows that it was trained on."
    return f"Rows of {size} numbers{first}. {scale}"


def _code(facts: StudentFacts, bits: StudentBits) -> str:
    lines = ["import json", "", "import torch", "from safetensors.torch import load_file"]
    lines += ["from tokenizers import Tokenizer"] if facts.tokenizer is not None else []
    lines += ["", 'config = json.load(open("config.json", encoding="utf-8"))', 'state = load_file("model.safetensors")']
    if bits == "int8":
        lines += [
            f'for name in [name for name in state if name.endswith("{SCALE}")]:',
            f'    scale, weight = state.pop(name), name.removesuffix("{SCALE}")',
            "    state[weight] = state[weight] * scale.view(-1, *[1] * (state[weight].dim() - 1))",
        ]
    lines += ["", *(["", ""] if facts.tokenizer is not None else []), code_of(facts.kind, facts.shapes, facts.row)]
    lines += ["model.load_state_dict(state)", "model.eval()", ""]
    lines += _text_rows(facts) if facts.tokenizer is not None else _number_rows(facts)
    given = "*rows" if facts.tokenizer is not None else "rows"
    lines += ["with torch.no_grad():", f"    outputs = model({given})"]
    if facts.names_classes:
        lines += ['print([config["classes"][place] for place in outputs.argmax(1)])']
    else:
        lines += ["print(outputs)"]
    return "\n".join(lines)


def _number_rows(facts: StudentFacts) -> list[str]:
    return [f"rows = torch.zeros({', '.join(map(str, (1, *facts.row)))})  # in place of yours"]


def _text_rows(facts: StudentFacts) -> list[str]:
    lines = [
        'tokenizer = Tokenizer.from_file("tokenizer.json")',
        'tokenizer.enable_truncation(config["max_length"])',
        "tokenizer.enable_padding()",
        'found = tokenizer.encode_batch(["some text", "another"])',
        "ids = [one.ids for one in found]",
    ]
    if facts.words is not None:
        lines += [
            'place = {token: place for place, token in enumerate(config["vocabulary"])}',
            'ids = [[place.get(token, config["unknown"]) for token in row] for row in ids]',
        ]
    return [*lines, "rows = torch.tensor(ids), torch.tensor([one.attention_mask for one in found])"]


def _cell(text: str) -> str:
    return visible(text).replace("\n", " ").replace("|", "\\|")
