"""One prompt: what a chat run trains and scores with is what ``lichen try`` asks and the exported tokenizer writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lichen
from lichen.recipes.artifacts.sampling import Sampling, ask_ids, generate_text
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.schema.read import read_recipe
from support.chat_templates import TEMPLATES
from support.tokenizer_kinds import tokenizer_of

ASK = "What is it?"
MINE = (
    "{% for m in messages %}{{ m['role'] + '=' + m['content'] + '\n' }}{% endfor %}"
    "{{ 'assistant=' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model for each template, and rows of two people."""
    folder = tmp_path_factory.mktemp("one-prompt")
    for family in ("chatml-default-system", "gemma", "qwen3-thinking", "r1"):
        tokenizer = tokenizer_of("llama-2" if family == "gemma" else "gpt-2", template=TEMPLATES[family])
        tokenizer.save_pretrained(folder / family)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder / family)
    rows = [{"client": f"p{i % 2}", "prompt": f"{ASK[:-1]} {i}?", "completion": f"Moss {i}."} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "mine.jinja").write_text(MINE)
    return folder


def recipe(home: Path, family: str, **data: Any) -> dict[str, Any]:
    return {
        "name": "one-prompt",
        "task": "chat",
        "model": {"name": str(home / family), "adapter": {"rank": 1}},
        "data": {"name": str(home / "rows.jsonl"), "max_length": 96, **data},
        "federation": {"rounds": 1, "local_steps": 1, "batch_size": 2},
        "compare": {"baselines": []},
    }


@pytest.mark.parametrize(
    ("family", "data", "begins", "ends"),
    [
        ("chatml-default-system", {}, "<|im_start|>system\nYou help with moss.<|im_end|>", "assistant\n"),
        ("chatml-default-system", {"system": ""}, "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", "assistant\n"),
        (
            "chatml-default-system",
            {"system": 'Be "brief".\n苔'},
            '<|im_start|>system\nBe "brief".\n苔<|',
            "assistant\n",
        ),
        ("chatml-default-system", {"template": "mine.jinja", "system": "Hm"}, "system=Hm\nuser=", "assistant="),
        ("gemma", {}, "<s><start_of_turn>user\n", "<start_of_turn>model\n"),
        ("r1", {}, "<s><|User|>", "<|Assistant|>"),
    ],
)
def test_training_try_and_export_ask_in_the_same_words(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    data: dict[str, Any],
    begins: str,
    ends: str,
) -> None:
    data = {**data, **({"template": str(tmp_path / "own.jinja")} if "template" in data else {})}
    (tmp_path / "own.jinja").write_text(MINE)
    told: list[str] = []
    result = lichen.run(recipe(home, family, **data), out=tmp_path / "run", say=told.append)
    loaded = open_recipe(read_recipe(recipe(home, family, **data)))
    trained = set()
    for shard in (*loaded.experiment.clients.train, *loaded.experiment.clients.test):
        for ids, labels in zip(shard.input_ids, shard.labels, strict=True):  # type: ignore[union-attr]
            trained.add(tuple(np.asarray(ids)[np.asarray(labels) == -100].tolist()))
    (tmp_path / "own.jinja").unlink()  # a finished run needs it no more

    asked: list[tuple[int, ...]] = []

    def generate(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append(tuple(input_ids[0].tolist()))
        return input_ids

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    talker = lichen.talk(str(result.folder))
    question = f"{ASK[:-1]} 3?"
    talker.answer(question)
    lichen.export(result.folder, merge=True, out=tmp_path / "whole")
    for folder in (result.folder / "adapter", tmp_path / "whole"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        turns = [{"role": "user", "content": question}]
        asked.append(tuple(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)))
    assert len(asked) == 4
    assert len(set(asked)) == 1
    assert asked[0] in trained
    words = tokenizer.decode(asked[0])
    assert words.startswith(begins)
    assert words.endswith(ends)
    assert (family == "r1") == any("opens a thought" in line for line in told)


def test_what_is_cut_is_said(home: Path) -> None:
    told: list[str] = []
    open_recipe(read_recipe(recipe(home, "chatml-default-system", max_length=32)), say=told.append)
    assert "12 of 14 rows are longer than data.max_length and lost the beginning of their prompt" in told


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"system": "x", "form": "transcript"}, "data.system"),
        ({"thinking": True, "form": "plain"}, "data.thinking"),
        ({"template": "x.jinja", "form": "stream"}, "data.template"),
        ({"template": "no-such.jinja"}, "data.template"),
    ],
)
def test_a_key_without_effect_or_file_is_refused(home: Path, data: dict[str, Any], where: str) -> None:
    with pytest.raises(lichen.LichenError) as refused:
        open_recipe(read_recipe(recipe(home, "chatml-default-system", **data)))
    assert where in str(refused.value)


def test_a_system_message_that_the_model_takes_none_of_is_refused(home: Path) -> None:
    with pytest.raises(lichen.LichenError, match="takes no system message"):
        open_recipe(read_recipe(recipe(home, "gemma", system="Be brief.")))


def test_settings_are_said_and_taken(home: Path, tmp_path: Path) -> None:
    result = lichen.run(recipe(home, "r1"), out=tmp_path / "run")
    assert lichen.talk(result.folder).settings.startswith("greedy, repetition penalty 1.2, at most 48 new tokens")
    drawn = lichen.talk(result.folder, temperature=0.8, top_p=0.9, seed=3, max_new_tokens=7, repetition_penalty=1.0)
    assert drawn.settings.startswith("temperature 0.8, top-p 0.9, seed 3, repetition penalty 1, at most 7 new tokens")
    assert drawn.answer("Hi") == drawn.answer("Hi")
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 0.5}, {"seed": -1}):
        with pytest.raises(lichen.LichenError):
            lichen.talk(result.folder, **wrong)  # type: ignore[arg-type]
    model, tokenizer = LlamaForCausalLM.from_pretrained(home / "r1"), AutoTokenizer.from_pretrained(home / "r1")
    ids = ask_ids(tokenizer, "chat", "Hi")
    many = {generate_text(model, tokenizer, ids, Sampling(temperature=1.5, seed=s), ends=()) for s in range(4)}
    assert len(many) > 1


def test_forms_without_a_template_are_asked_as_they_are_trained() -> None:
    for kind in ("gpt-2", "llama-2-legacy", "unigram", "letters"):
        tokenizer = tokenizer_of(kind)
        start = tokenizer.bos_token_id
        assert ask_ids(tokenizer, "plain", "Hi there") == [
            start,
            *tokenizer("Hi there", add_special_tokens=False)["input_ids"],
        ]
        assert ask_ids(tokenizer, "transcript", "Hi") == [
            start,
            *tokenizer("Hi\n", add_special_tokens=False)["input_ids"],
        ]


def test_a_run_goes_on_with_the_template_it_began_with(home: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(MINE)
    made = recipe(home, "gemma", template=str(tmp_path / "own.jinja"))
    lichen.run(made, out=tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    lichen.run(made, out=tmp_path / "run", resume=True)
    (tmp_path / "own.jinja").write_text(MINE.replace("=", ": "))
    with pytest.raises(lichen.LichenError, match="another than the one this run began with"):
        lichen.run(made, out=tmp_path / "run", resume=True)


def test_a_teacher_is_asked_for_answers_without_thoughts(home: Path) -> None:
    told: list[str] = []
    foundation_models = FMRegistry(recipe=read_recipe(recipe(home, "r1")), say=told.append)
    texts = foundation_models._load(str(home / "r1"), None, True)._texts  # type: ignore[union-attr]
    assert texts.head("Hi") == "<s><|User|>Hi<|Assistant|>"
    assert any("opens a thought" in line for line in told)


def test_a_run_learns_thoughts_where_the_recipe_says_that_there_are_some(home: Path, tmp_path: Path) -> None:
    said = [f"<think>\nIt grows on stone {i}.\n</think>\n\nMoss." for i in range(20)]
    rows = [{"client": f"p{i % 2}", "prompt": f"{ASK[:-1]} {i}?", "completion": said[i]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    thoughts = {"name": str(tmp_path / "rows.jsonl"), "thinking": True}
    result = lichen.run(recipe(home, "qwen3-thinking", **thoughts), out=tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "adapter")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith("assistant\n<think>\n")
    with pytest.raises(lichen.LichenError, match="told apart"):
        lichen.run(recipe(home, "qwen3-thinking", name=thoughts["name"]), out=tmp_path / "other")
