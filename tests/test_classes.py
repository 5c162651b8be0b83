"""Every class is final, abstract, or a section of a schema; and nobody asks a contract what it happens to have."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lichen

ROOT = Path(lichen.__file__).parent

MODELS = {
    "base",
    "config",
    "getattr(model, 'generation_config', None)",
    "head",
    "layer",
    "m",
    "model",
    "model.config",
    "model.get_submodule(path)",
    "module",
    "self.whole.model.get_output_embeddings()",
    "self_attention",
    "tokenizer",
    "wrapped.model.config",
}
"""Models of transformers, their layers, configurations and tokenizers: they differ by architecture and by version."""

ASKED = {
    *{(room, whom) for room in ("data", "fm", "models", "serving") for whom in MODELS},
    ("recipes/artifacts/sampling.py", "model"),  # transformers' as well
    ("recipes/artifacts/sampling.py", "getattr(model, 'generation_config', None)"),
    ("recipes/artifacts/sampling.py", "tokenizer"),
    ("recipes/assemble/model.py", "model.config"),
    ("recipes/help/foundation_models.py", "tokenizer"),
    ("models/arithmetic.py", "config"),
    ("models/arithmetic.py", "model"),
    ("research/mutual/vocabulary.py", "tokenizer"),
    ("data/chat/spans.py", "encoded"),
    ("models/loading/load.py", "method"),  # what a file says of its quantisation
    ("models/loading/load.py", "quantized"),
    ("data/formats/json_rows.py", "error"),  # some errors of Python name a place
    ("data/sources/files.py", "error"),
    ("recipes/assemble/chat_template.py", "error"),
    ("recipes/schema/yaml.py", "event"),  # PyYAML's
    ("core/private.py", "os"),  # differs by system
    ("core/files/durable.py", "os"),
    ("core/files/lock.py", "os"),
    ("recipes/schema/idle.py", "getattr(recipe, section)"),  # sections may be left out, and differ by task
    ("engines/ranks.py", "os"),
    ("models/peft/start.py", "spec"),  # an adapter's own fields differ by kind
}
"""Who may be asked whether it has an attribute: by room or file, and by the expression that names it."""

SET = {
    ("data/batches/rows.py", "self"),  # a frozen dataclass brings its fields into one form when it is made
    ("fm/generation/synthesis.py", "self"),
    ("research/mutual/vocabulary.py", "self"),
    ("models/adapters/quantized.py", "parent"),  # a layer of transformers' model gets another in its place
    ("models/adapters/ends/end_blocks.py", "model"),
    ("models/adapters/whole_layers.py", "model"),
    ("models/loading/initial.py", "config"),
    ("models/loading/span.py", "model"),
    ("models/packing/position_table.py", "layer"),
    ("models/peft/merge.py", "layer"),
}
"""Where an attribute is set by name."""


@pytest.fixture(scope="module")
def trees() -> list[tuple[str, ast.Module]]:
    """Every file of the package, parsed once."""
    files = sorted(ROOT.rglob("*.py"))
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in files]


def loose(parsed: list[tuple[str, ast.Module]]) -> list[str]:
    """Classes that are neither final nor abstract nor, by what they stand on, a section of a schema."""
    classes = [(path, node) for path, tree in parsed for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    sections = {"BaseModel"}
    for _ in classes:  # as long as there are more
        more = {node.name for _, node in classes if {ast.unparse(b) for b in node.bases} & sections}
        if more <= sections:
            break
        sections |= more
    found = []
    for path, node in classes:
        bases = {ast.unparse(base).split("[")[0] for base in node.bases}
        marks = {ast.unparse(mark) for mark in node.decorator_list}
        if not ("final" in marks or bases & {"ABC", "Protocol", "TypedDict"} or bases & sections):
            found.append(f"{path}: {node.name}")
    return found


def asked(parsed: list[tuple[str, ast.Module]]) -> list[str]:
    """Objects of the house that are asked whether they have an attribute, and attributes set by name."""
    found = []
    for path, tree in parsed:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
            asks = name == "hasattr" or (name == "getattr" and len(node.args) == 3)
            sets = name in ("setattr", "delattr", "object.__setattr__")
            if not asks and not sets:
                continue
            whom = ast.unparse(node.args[0]) if node.args else ""
            known = (path, whom) in ASKED or (path.split("/")[0], whom) in ASKED
            if (asks and not known) or (sets and (path, whom) not in SET):
                found.append(f"{path}: {ast.unparse(node)}")
    return found


def test_every_class_is_final_abstract_or_a_section(trees: list[tuple[str, ast.Module]]) -> None:
    assert sum(isinstance(node, ast.ClassDef) for _, tree in trees for node in ast.walk(tree)) > 200
    assert loose(trees) == []


def test_no_contract_is_asked_what_it_has(trees: list[tuple[str, ast.Module]]) -> None:
    assert asked(trees) == []


def test_the_walks_see_faults() -> None:
    source = "class A: ...\n@final\nclass B: ...\nclass C(ABC): ...\nclass D(BaseModel): ...\nclass E(D): ...\n"
    source += "class F(B): ...\nhasattr(work, 'inner')\ngetattr(work, 'inner', None)\ngetattr(work, name)\n"
    source += "setattr(work, 'x', 1)\n"
    parsed = [("a.py", ast.parse(source))]
    assert loose(parsed) == ["a.py: A", "a.py: F"]
    assert [fault.removeprefix("a.py: ") for fault in asked(parsed)] == [
        "hasattr(work, 'inner')",
        "getattr(work, 'inner', None)",
        "setattr(work, 'x', 1)",
    ]
