"""A teacher behind an endpoint is sent what the recipe's filter leaves, and the record says how much that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.files.record import RECORD, chain
from lichen.core.seeds import numpy_generator
from lichen.models.loading.load import load_causal
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.help.foundation_models import FMRegistry
from lichen.recipes.schema.read import read_recipe
from support.openai_server import answering
from support.tiny_llama import recipe, save_model, say


def test_no_mail_name_or_run_of_a_private_row_reaches_the_endpoint(tmp_path: Path) -> None:
    words = tuple(f"word{'abcdefghij'[i % 10]}{'klmno'[i // 10]}" for i in range(40))  # so that its texts are no junk
    save_model(tmp_path / "model", more=words)
    model, tokenizer = load_causal(save_model(tmp_path / "teacher", more=words, seed=3))
    lines = []
    for client in range(6):
        rng = numpy_generator(client, "filtered")
        for row in range(12):
            ask = f"w1 w2 Anna w3 {say(rng, 2)} p{client}x{row}@clinic{client}.example"
            lines.append(json.dumps({"who": f"person-{client}", "ask": ask, "reply": say(rng, 5)}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "names.txt").write_text("Anna\n")
    whole = recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", federation={"rounds": 1, "local_steps": 1})
    whole["data"] |= {"split_by": "row", "public": {"share": 0.4, "unlabelled": 10}}
    whole["cache_dir"] = str(tmp_path / "kept")
    with answering(model, tokenizer) as (url, told):
        asked = {"url": url, "model": "tiny", "ask": "echo"}
        asked["filter"] = {"kinds": ["mail"], "names": str(tmp_path / "names.txt"), "private_words": 3}
        whole["teacher"] = {"answer_format": "text", "max_new_tokens": 6, "plain": True, "endpoint": asked}
        run = lichen.run(whole, out=tmp_path / "run").folder
    sent = [body["prompt"] for body in told.bodies]
    assert len(sent) == 10
    assert not any("Anna" in text or "@" in text for text in sent)
    assert all("[row]" in text or "[name]" in text for text in sent)
    counts = {key: n for key, n in json.loads((run / "summary.json").read_text())["extra"].items() if "filter" in key}
    assert counts["fm.filter.texts"] == 10
    assert counts["fm.filter.mail"] == 10
    assert counts["fm.filter.row"] >= 1
    assert chain(run / RECORD)[0][-1]["filtered"] == counts
    verify(run)


@pytest.mark.parametrize(
    ("section", "asked", "where", "why"),
    [
        ("teacher", {"filter": {"kinds": []}}, "filter.kinds", "looks for nothing"),
        ("synthetic", {"filter": {"kinds": []}}, "filter.kinds", "looks for nothing"),
        ("teacher", {"filter": {"private_words": 1}}, "teacher.endpoint.filter.private_words", "at least 2"),
        ("teacher", {"filter": {"kinds": ["face"]}}, "teacher.endpoint.filter.kinds", "face"),
        ("teacher", {"filter": {"private_words": 4}, "see": True}, "private_words", "go there whole"),
    ],
)
def test_a_filter_that_finds_nothing_or_everything_is_refused(
    section: str, asked: dict[str, Any], where: str, why: str
) -> None:
    endpoint = {"url": "https://example.org/v1", "model": "m", "filter": asked["filter"]}
    whole: dict[str, Any] = {
        "task": "classify",
        "model": {"student": {"kind": "text-cnn"}},
        "data": {"name": "clothing-reviews", "public": {"unlabelled": 20, "labelled": 20}},
        section: {"endpoint": endpoint, **({"kind": "zero-shot"} if section == "teacher" else {})},
    }
    if "see" in asked:
        whole[section]["may_see"] = ["public", "private"]
    with pytest.raises(LichenError) as caught:
        read_recipe(whole)
    assert where in caught.value.where
    assert why in str(caught.value)


def test_a_list_that_is_not_there_is_told_before_anything_is_sent() -> None:
    endpoint = {"url": "https://example.org/v1", "model": "m", "filter": {"kinds": [], "names": "/nowhere/names.txt"}}
    whole = read_recipe(
        {
            "task": "classify",
            "model": {"student": {"kind": "text-cnn"}},
            "data": {"name": "clothing-reviews", "public": {"unlabelled": 20, "labelled": 20}},
            "synthetic": {"endpoint": endpoint},
        }
    )
    assert whole.synthetic is not None
    with pytest.raises(LichenError, match="cannot be read") as caught:
        FMRegistry(recipe=whole, say=print).writer("", whole.synthetic.endpoint, ("public",), chat=False)
    assert caught.value.where == "synthetic.endpoint.filter.names"
