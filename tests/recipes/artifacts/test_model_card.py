"""Model cards: front matter that the hub reads, nothing private, and code that does what ``lichen try`` does."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lichen
from lichen.data.sources.catalog import CATALOG
from lichen.present.charts.card import Card, card_text, front_matter
from lichen.recipes.artifacts.sampling import ask_ids
from support.tiny_llama import recipe, save_model, save_rows

ROUNDS = {"federation": {"rounds": 1, "local_steps": 1, "batch_size": 4}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_model(folder / "model")
    for shape in ("pair", "label"):
        save_rows(folder / f"{shape}.jsonl", shape)  # type: ignore[arg-type]
    return folder


def matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.S)
    assert found is not None
    value = yaml.safe_load(found[1])
    assert isinstance(value, dict)
    return value


def run_code(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's Python leaves, run where the card's folder lies."""
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.S)
    file = folder.parent / "card.py"
    file.write_text(code)
    monkeypatch.chdir(folder.parent)
    return runpy.run_path(str(file))


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4},
    "ia3": {"kind": "ia3", "target_modules": ["v_proj"]},
    "prompt": {"kind": "prompt", "num_virtual_tokens": 2},
}


@pytest.mark.parametrize(
    ("kind", "form"), [("lora", "chat"), ("lora", "transcript"), ("lora", "plain"), ("ia3", "chat")]
)
def test_a_language_model_is_asked_as_it_was_trained(
    home: Path,
    tmp_path: Path,
    kind: str,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = recipe(home / "model", home / "pair.jsonl", "pair", **ROUNDS, data={"form": form})
    whole["model"] = {"name": str(home / "model"), "adapter": ADAPTERS[kind]}
    folder = lichen.run(whole, out=tmp_path / "run").folder
    for target in (folder / "adapter", lichen.export(folder, merge=True)):
        card = (target / "README.md").read_text()
        assert matter(card)["pipeline_tag"] == "text-generation"
        assert matter(card)["library_name"] == {"adapter": "peft", "merged": "transformers"}[target.name]
        assert "The rows of 5 clients, out of 50 that were read: rows that stayed with their owners." in card
        assert not re.search(r"person|w17", card)
        assert str(tmp_path) not in card
        assert ("vllm serve" in card) == (kind == "lora" or target.name == "merged")
        left = run_code(card, target, monkeypatch)
        assert left["row"].tolist() == [ask_ids(left["tokenizer"], form, "Hello, how are you?")]
        assert capsys.readouterr().out.endswith("\n")
        (prompt,) = re.findall(r"given exactly\n\n```text\n(.*?)\n```", card, re.S)
        assert "Hello, how are you?" in prompt
        if form == "chat":
            assert prompt == "<user> Hello, how are you? </s> <assistant> "


def test_a_classifier_names_its_classes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lichen.run(recipe(home / "model", home / "label.jsonl", "label", **ROUNDS), out=tmp_path / "run").folder
    mine = lichen.talk(folder).answer("some text")[1].split()[0]
    for target in (folder / "adapter", lichen.export(folder, merge=True)):
        card = (target / "README.md").read_text()
        assert matter(card)["pipeline_tag"] == "text-classification"
        assert re.findall(r"^\| (\d) \| (\w+) \|$", card, re.M) == [("0", "calm"), ("1", "glad"), ("2", "sad")]
        assert "macro_f1" in card
        run_code(card, target, monkeypatch)
        assert capsys.readouterr().out.split() == [mine]
        modes = {file.stat().st_mode & 0o777 for file in target.iterdir()}
        assert modes == {(target / "README.md").stat().st_mode & 0o777}


def test_a_base_that_lies_nowhere_is_not_named_to_other_tools(home: Path, tmp_path: Path) -> None:
    whole = recipe(home / "model", home / "pair.jsonl", "pair", **ROUNDS)
    whole["model"] |= {"layers": 1}
    folder = lichen.run(whole, out=tmp_path / "run").folder
    card = (folder / "adapter" / "README.md").read_text()
    assert "The base was its first 1 layers, and lies nowhere" in card
    assert "```python" not in card
    assert "```python" in (lichen.export(folder, merge=True) / "README.md").read_text()


def test_the_words_of_a_model_from_nothing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    whole = recipe(data, data, "pair", **ROUNDS)
    size = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2}
    whole["model"] = {"scratch": size, "adapter": {"kind": "full"}}
    whole["data"] |= {"form": "stream", "max_length": 16, "columns": {"client": "who", "text": "reply"}}
    folder = lichen.run(whole, out=tmp_path / "run").folder
    card = (lichen.export(folder, merge=True) / "README.md").read_text()
    assert "its vocabulary holds their words" in card
    run_code(card, folder / "merged", monkeypatch)


CLASSIFIER: dict[str, Any] = {"writes": False, "pipeline": "text-classification", "classes": ("a", "b")}


def card_of(**more: Any) -> Card:
    score = {"mean": 0.5, "worst_decile": 0.25}
    summary = {
        "clients": 3,
        "metric": "perplexity",
        "higher_is_better": False,
        "columns": {"federated": score, "base": None},
        "extra_columns": {"a|b": score},
    }
    known: dict[str, Any] = {
        "name": "run",
        "question": "",
        "writes": True,
        "pipeline": "text-generation",
        "folder": "adapter",
        "base": "smollm2-135m",
        "base_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "kind": "LORA",
        "low_rank": True,
        "rank": 24,
        "whole": (),
        "form": "chat",
        "prompt": "```\nhello```",
        "start": -1,
        "example_prompt": "hello",
        "max_length": 64,
        "classes": (),
        "data": "chitchat",
        "rows": 1234,
        "own_words": False,
        "nowhere": "",
        "summary": summary,
    }
    return Card(**(known | more))


def test_a_base_of_the_catalog_is_named_as_the_hub_knows_it() -> None:
    card = card_of()
    found = matter(card_text(card))
    assert found == front_matter(card)
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["license"] == "apache-2.0"
    assert "lora" in found["tags"]
    text = card_text(card)
    assert "--max-lora-rank 32" in text
    assert "--base HuggingFaceTB/SmolLM2-135M-Instruct" in text
    assert "````text\n```\nhello```\n````" in text
    assert "out of 1,234 that were read: the catalog's data `chitchat`." in text
    assert r"| a\|b | 0.5 | 0.25 |" in text
    assert "| base |" not in text
    # The hub knows these licences by these names.
    models = {entry.licence.lower() for entry in CATALOG.values() if entry.kind == "model"}
    assert models <= {"apache-2.0", "mit"}


def test_what_servers_do_not_take_is_said() -> None:
    for more in ({"kind": "IA3", "low_rank": False, "rank": 0}, {"whole": ("lm_head",)}, CLASSIFIER):
        text = card_text(card_of(**more))
        assert "vllm serve" not in text
        assert "--merge" in text


@pytest.mark.parametrize("name", ["a\x1b[31mb", "---\nlicense: mit\n---", '"x": [', "#", "&a *b"])
def test_strange_names_break_no_front_matter(name: str) -> None:
    text = card_text(
        card_of(name=name, question=name, base_id="", classes=(name, "b"), writes=False, pipeline="text-classification")
    )
    assert "\x1b" not in text
    assert set(matter(text)) == {"library_name", "license", "pipeline_tag", "tags"}
    assert json.loads(json.dumps(matter(text))) == matter(text)


def test_torch_is_named_where_it_is_used() -> None:
    for more in ({}, {"start": 3, "form": "plain"}, CLASSIFIER, {"kind": "merged"}):
        (code,) = re.findall(r"```python\n(.*?)\n```", card_text(card_of(**more)), re.S)
        compile(code, "card", "exec")
        assert code.startswith("import torch\n")
        assert "torch." in code
    assert torch.__version__


def test_a_card_warns_of_a_model_that_was_attacked_on_purpose(home: Path, tmp_path: Path) -> None:
    more = {**ROUNDS, "compare": {"baselines": []}}
    for name, attack, warned in (("lied", {"attack": {"kind": "weight"}}, True), ("honest", {}, False)):
        result = lichen.run(recipe(home / "model", home / "pair.jsonl", "pair", **more, **attack), out=tmp_path / name)
        assert result.adapter is not None
        assert ("Attacked on purpose" in (result.adapter / "README.md").read_text()) is warned
